"""A SAELens run with fastsae's ops inside: its trainer, store and logging stay its own."""

from dataclasses import fields, replace
from types import MethodType
from typing import Any

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

    Losses and gradients are SAELens's to rounding. The SAE keeps its class, its parameters (W_enc
    gets one latent contiguous in memory, its shape stays), its files and everything else; only
    `training_forward_pass` is another. Under SAELens's autocast rows are rounded to its dtype and
    weights and sums stay in theirs. `feature_acts` of the output is a sparse COO tensor where the
    code is sparse, as SAELens's own with `use_sparse_activations`; `hidden_pre` is not made.

        trainer = SAETrainer(cfg, accelerate(TopKTrainingSAE(sae_cfg)), data)

    Raises:
        ImportError: sae-lens is not installed.
        TypeError: not a training SAE of an architecture that fastsae has.
    """
    saes = require("sae_lens.saes.sae", extra="peers")
    if not isinstance(training_sae, saes.TrainingSAE):
        raise TypeError(
            f"training_sae must be a TrainingSAE of SAELens, got {type(training_sae).__name__}"
        )
    architecture = training_sae.cfg.architecture()
    if architecture not in SAES:
        raise TypeError(
            f"training_sae must be of an architecture among {sorted(SAES)}, got {architecture!r}"
        )
    ours = _sharing(training_sae, SAES[architecture])

    def training_forward_pass(self: Any, step_input: Any) -> Any:
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
        return saes.TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=found.x_hat.reshape(step_input.sae_in.shape),
            feature_acts=acts_as_sae_lens(ours, found),
            hidden_pre=None,
            loss=found.total,
            losses=losses,
            metrics={} if threshold is None else {"topk_threshold": threshold},
        )

    training_sae.training_forward_pass = MethodType(training_forward_pass, training_sae)
    return training_sae


def _sharing(theirs: nn.Module, kind: type[SAE]) -> SAE:
    """Our SAE over the very parameters and buffers of theirs."""
    cfg: Any = theirs.cfg
    ours = kind(kind.config_class.from_dict({**cfg.to_dict(), "metadata": {}}), device="meta")
    for name, _ in list(ours.named_parameters()):
        parameter = getattr(theirs, name)
        if name == "W_enc" and parameter.stride(0) != 1:
            parameter.data = parameter.data.t().contiguous().t()
        ours._parameters[name] = parameter
    for name, _ in list(ours.named_buffers()):
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
