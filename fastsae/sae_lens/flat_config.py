"""The flat configuration of SAELens before version 6, put into today's.

Every field becomes what it meant, or raises an error that names today's way. Fields that are not
given take the defaults of their time.
"""

import difflib
import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from fastsae.sae_lens.training_saes import CONFIGS
from fastsae.saes import LegacyStandardConfig, SAEConfig

_log = logging.getLogger(__name__)

RENAMED = {
    "hook_point": "hook_name",
    "hook_point_eval": "hook_eval",
    "hook_point_head_index": "hook_head_index",
    "total_training_tokens": "training_tokens",
    "train_batch_size": "train_batch_size_tokens",
    "store_batch_size": "store_batch_size_prompts",
    "model_batch_size": "store_batch_size_prompts",
}
LOGGER = (
    "log_to_wandb",
    "log_activations_store_to_wandb",
    "log_optimizer_state_to_wandb",
    "log_weights_to_wandb",
    "wandb_project",
    "wandb_id",
    "run_name",
    "wandb_entity",
    "wandb_log_frequency",
    "eval_every_n_wandb_logs",
)
SAE_FIELDS = (
    "apply_b_dec_to_input",
    "l1_coefficient",
    "l1_warm_up_steps",
    "lp_norm",
    "use_ghost_grads",
    "mse_loss_normalization",
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
)
"""Their meaning is that of the field of this name today, where the architecture has it."""
OPTIONS = (
    "activation_fn",
    "activation_fn_kwargs",
    "activation_fn_str",
    "architecture",
    "b_dec_init_method",
    "d_in",
    "d_sae",
    "decoder_heuristic_init",
    "decoder_orthogonal_init",
    "expansion_factor",
    "finetuning_method",
    "finetuning_tokens",
    "hook_layer",
    "hook_point_layer",
    "init_encoder_as_decoder_transpose",
    "noise_scale",
    "normalize_activations",
    "normalize_sae_decoder",
    "resume",
    "scale_sparsity_penalty_by_decoder_norm",
)
"""Read one by one below."""
ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
THEIR_DEFAULTS: Mapping[str, Any] = {"adam_beta1": 0.0}
"""Of a flat configuration, where they are not today's."""
KNOWN = (*RENAMED, *LOGGER, *SAE_FIELDS, *OPTIONS)


class Nested(NamedTuple):
    """A flat configuration in today's parts."""

    fields: dict[str, Any]
    """Of the runner, `sae` among them."""
    logger: dict[str, Any]
    unit_norm_decoder: bool
    """Whether decoder rows are kept on the sphere."""


def nested(given: Mapping[str, Any]) -> Nested:
    """What a caller of the flat configuration wrote, in today's parts.

    Raises:
        ValueError: a field whose meaning exists no more, or two that contradict each other.
    """
    values = {RENAMED.get(name, name): value for name, value in given.items()}
    logger = {name: values.pop(name) for name in LOGGER if name in values}
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    sae_fields = {name: values.pop(name) for name in SAE_FIELDS if name in values}
    _refuse_what_is_gone(options)
    if "n_batches_in_buffer" in values:  # batches of prompts then, contexts now
        values["n_batches_in_buffer"] *= values.get("store_batch_size_prompts", 32)
    sae = _sae(options, sae_fields, values.get("dtype", "float32"))
    _check_layer(options, values)
    values = {**THEIR_DEFAULTS, "b_dec_init": _b_dec_init(options), **values, "sae": sae}
    legacy = isinstance(sae, LegacyStandardConfig)
    return Nested(values, logger, legacy and options.get("normalize_sae_decoder", True))


def refuse_unknown(names: Iterable[str], today: tuple[str, ...]) -> None:
    """Raise TypeError, with the nearest names, for a field that never was."""
    for name in names:
        if name not in (*today, *KNOWN):
            near = difflib.get_close_matches(name, (*today, *KNOWN), n=3)
            raise TypeError(
                f"LanguageModelSAERunnerConfig has no field {name!r}; nearest: {near or 'none'}"
            )


def _sae(options: dict[str, Any], given: dict[str, Any], dtype: str) -> SAEConfig:
    architecture = options.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {list(ARCHITECTURES)}, got {architecture!r}")
    activation = options.get("activation_fn") or options.get("activation_fn_str") or "relu"
    kwargs = options.get("activation_fn_kwargs") or {}
    if activation == "topk":
        architecture = "topk"
    d_in = options.get("d_in")
    if d_in is None:
        raise ValueError("d_in must be the width of the activations at hook_name, got None")
    d_sae, factor = options.get("d_sae"), options.get("expansion_factor")
    if d_sae is not None and factor is not None and d_sae != factor * d_in:
        raise ValueError(
            f"d_sae must be expansion_factor * d_in = {factor * d_in} or alone, got {d_sae}"
        )
    shape = {
        "d_in": d_in,
        "d_sae": d_sae or (factor or 4) * d_in,
        "dtype": dtype.removeprefix("torch."),
        "normalize_activations": _normalization(options.get("normalize_activations")),
    }
    if architecture == "topk":
        k = kwargs.get("k")
        if k is None:
            raise ValueError("activation_fn_kwargs must hold k for a TopK SAE, got none")
        shape["k"] = k
    kind = LegacyStandardConfig if architecture == "standard" else CONFIGS[architecture]
    if architecture == "jumprelu" and "l1_coefficient" in given:
        given = {**given, "l0_coefficient": given.pop("l1_coefficient")}
        given["l0_warm_up_steps"] = given.pop("l1_warm_up_steps", 0)
    known = {f.name for f in fields(kind)}
    unused = [name for name in given if name not in known and given[name] not in (None, False)]
    if architecture == "topk":  # L1 never was part of a TopK run
        unused = [name for name in unused if name not in ("l1_coefficient", "l1_warm_up_steps")]
        unused = [name for name in unused if name != "lp_norm"]
    if unused:
        raise ValueError(f"{unused[0]} must not be given for the architecture {architecture!r}")
    cfg = kind(**{**shape, **{k: v for k, v in given.items() if k in known and v is not None}})
    if isinstance(cfg, LegacyStandardConfig):
        _log.warning(
            "l1_coefficient=%g with a squared error averaged over d_in = %d is l1_coefficient=%g "
            "in StandardTrainingSAEConfig, whose squared error is summed",
            cfg.l1_coefficient,
            d_in,
            cfg.equivalent_l1_coefficient,
        )
    return cfg


def _b_dec_init(given: Mapping[str, Any]) -> str:
    """Where b_dec starts, under a flat configuration."""
    method = given.get("b_dec_init_method", "geometric_median")
    if method not in ("geometric_median", "mean", "zeros"):
        raise ValueError(
            f"b_dec_init_method must be 'geometric_median', 'mean' or 'zeros', got {method!r}"
        )
    return method


def _normalization(value: Any) -> str:
    if value in (None, False, "none"):
        return "none"
    return "expected_average_only_in" if value is True else value


def _refuse_what_is_gone(options: Mapping[str, Any]) -> None:
    gone = {
        "resume": "pass resume_from_checkpoint=FOLDER",
        "finetuning_tokens": "train once more with from_pretrained_path=FOLDER",
        "finetuning_method": "train once more with from_pretrained_path=FOLDER",
        "noise_scale": "leave it out: noise on the pre-activations is of no use since JumpReLU",
        "decoder_orthogonal_init": "leave it out: rows start as random directions",
    }
    for name, way in gone.items():
        if options.get(name):
            raise ValueError(f"{name} is no longer part of training, got {options[name]!r}; {way}")
    if options.get("init_encoder_as_decoder_transpose") is False:
        raise ValueError(
            "init_encoder_as_decoder_transpose must be True or left out, got False: every encoder "
            "starts as its decoder's transpose today"
        )
    weighed = options.get("scale_sparsity_penalty_by_decoder_norm")
    if options.get("normalize_sae_decoder") is False and not weighed:
        raise ValueError(
            "scale_sparsity_penalty_by_decoder_norm must be True where normalize_sae_decoder is "
            f"False, got {weighed}: free decoder norms would undo the penalty"
        )
    if options.get("decoder_heuristic_init"):
        warnings.warn("decoder_heuristic_init is how every run starts today", stacklevel=4)


def _check_layer(options: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    layer = options.get("hook_layer", options.get("hook_point_layer"))
    hook = str(values.get("hook_name", ""))
    if layer is not None and hook.startswith("blocks.") and int(hook.split(".")[1]) != layer:
        raise ValueError(f"hook_layer must be the layer of hook_name, {hook}, got {layer}")
