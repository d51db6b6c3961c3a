"""A SAELens run with fastsae's ops inside: its trainer, store and logging stay its own."""

from dataclasses import fields, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastsae.extras import require
from fastsae.saes import SAE, SAES, SAELoss
from fastsae_kernels import RaggedCode, entry_rows

TERMS = {
    "mse": "mse_loss",
    "l1": "l1_loss",
    "l0": "l0_loss",
    "pre_act": "pre_act_loss",
    "auxk": "auxiliary_reconstruction_loss",
    "auxiliary": "auxiliary_reconstruction_loss",
}
"""Our names of loss terms -> SAELens's; inner_mse_W -> inner_mse_loss_W."""


def accelerate(training_sae: Any) -> Any:
    """Make a SAELens training SAE compute its training steps with fastsae, and return it.

    Losses and gradients are SAELens's to rounding. The SAE keeps its parameters (W_enc gets one
    latent contiguous in memory, its shape stays), its files and everything else; its class becomes
    a subclass of its own with another `training_forward_pass`. Under SAELens's autocast rows are
    rounded to its dtype and weights and sums stay in theirs; torch.compile (`compile_sae=True`)
    leaves the step as it is. `feature_acts` of the output is a sparse COO tensor where the code is
    sparse, as SAELens's own with `use_sparse_activations`; `hidden_pre` is not made.

        trainer = SAETrainer(cfg, accelerate(TopKTrainingSAE(sae_cfg)), data)

    Raises:
        ImportError: sae-lens is not installed.
        TypeError: not a training SAE of an architecture that fastsae has.
    """
    kind = require("sae_lens.saes.sae", extra="peers").TrainingSAE
    if not isinstance(training_sae, kind):
        raise TypeError(
            f"training_sae must be a TrainingSAE of SAELens, got {type(training_sae).__name__}"
        )
    architecture = training_sae.cfg.architecture()
    if architecture not in SAES:
        raise TypeError(
            f"training_sae must be of an architecture among {sorted(SAES)}, got {architecture!r}"
        )
    training_sae.__class__ = accelerated_class(type(training_sae))
    return training_sae


def register() -> list[str]:
    """Make the training SAEs that SAELens makes from configurations accelerated ones.

    Its registry gets subclasses of its own training classes, under the same architectures and with
    the same configurations, so that runners, resumed runs and files do not change:

        from fastsae.interop.sae_lens import register

        register()
        LanguageModelSAETrainingRunner(cfg).run()

    Returns:
        The architectures that are accelerated; SAELens's others stay as they are.

    Raises:
        ImportError: sae-lens is not installed.
    """
    require("sae_lens", extra="peers")  # it fills its registry
    registry = require("sae_lens.registry", extra="peers").SAE_TRAINING_CLASS_REGISTRY
    known = sorted(registry.keys() & SAES.keys())
    for architecture in known:
        sae_class, config_class = registry[architecture]
        registry[architecture] = accelerated_class(sae_class), config_class
    return known


_TrainingSAE: Any = object  # SAELens's own, once `accelerated_class` has mixed the two


class Accelerated(_TrainingSAE):
    """What a SAELens training SAE computes by us, before its own class in the order of methods."""

    @torch.compiler.disable
    def training_forward_pass(self, step_input: Any) -> Any:
        ours = sharing(self)
        x = step_input.sae_in
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        set_coefficients(ours, step_input.coefficients)
        with torch.autocast(x.device.type, enabled=False):
            found = ours.loss(x.reshape(-1, ours.cfg.d_in), step_input.dead_neuron_mask)
        losses = {their_name(name): value for name, value in found.terms.items()}
        if getattr(ours.cfg, "aux_loss_coefficient", 0):
            losses.setdefault(TERMS["auxk"], found.total.new_zeros(()))
        threshold = getattr(ours, "topk_threshold", None)
        return require("sae_lens.saes.sae", extra="peers").TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=found.x_hat.reshape(step_input.sae_in.shape),
            feature_acts=acts_as_sae_lens(ours, found),
            hidden_pre=None,
            loss=found.total,
            losses=losses,
            metrics={} if threshold is None else {"topk_threshold": threshold},
        )

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """safetensors refuses tensors that are not contiguous, as W_enc is."""
        super().process_state_dict_for_saving(state_dict)
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()


@cache
def accelerated_class(sae_class: type) -> type:
    """`sae_class` of SAELens with our step inside; one that has it already is returned."""
    if issubclass(sae_class, Accelerated):
        return sae_class
    return type(sae_class.__name__, (Accelerated, sae_class), {})


_SHARING: WeakKeyDictionary[nn.Module, SAE] = WeakKeyDictionary()
"""A SAELens SAE -> ours of the same tensors. Not an attribute: a copy must not share them."""


def sharing(theirs: Any) -> SAE:
    """Our SAE over the very parameters and buffers that theirs has now."""
    if theirs not in _SHARING:
        kind = SAES[theirs.cfg.architecture()]
        cfg = kind.config_class.from_dict({**theirs.cfg.to_dict(), "metadata": {}})
        _SHARING[theirs] = kind(cfg, device="meta")
    ours = _SHARING[theirs]
    if theirs.W_enc.stride(0) != 1:
        theirs.W_enc.data = theirs.W_enc.data.t().contiguous().t()
    for name in ours._parameters:
        ours._parameters[name] = getattr(theirs, name)
    for name in ours._buffers:
        ours._buffers[name] = getattr(theirs, name)
    return ours


def set_coefficients(ours: SAE, coefficients: dict[str, float]) -> None:
    """SAELens warms coefficients up itself and hands over the value of the step."""
    known = {f.name for f in fields(ours.cfg)}
    values: dict[str, Any] = {}
    for name, value in coefficients.items():
        if f"{name}_coefficient" in known:
            values |= {f"{name}_coefficient": value, f"{name}_warm_up_steps": 0}
    if any(getattr(ours.cfg, name) != value for name, value in values.items()):
        ours.cfg = replace(ours.cfg, **values)


def their_name(name: str) -> str:
    return TERMS.get(name, name.replace("inner_mse_", "inner_mse_loss_"))


@torch.no_grad()
def acts_as_sae_lens(ours: SAE, found: SAELoss) -> Tensor:
    """[B, F]: what SAELens's trainer counts firing from."""
    code, d_sae = found.code, ours.cfg.d_sae
    if code is None:
        return ours.encode(found.x)
    offsets = code.row_offsets if isinstance(code, RaggedCode) else None
    rows = entry_rows(offsets, code.indices).expand_as(code.indices)
    active = code.acts != 0
    where = torch.stack([rows[active], code.indices[active]]).long()
    # In order within a row, but for TopK's, and distinct: nothing reads it but sums.
    return torch.sparse_coo_tensor(
        where,
        code.acts[active],
        (len(found.err), d_sae),
        is_coalesced=True,
        check_invariants=False,  # said, or torch warns of it
    )
