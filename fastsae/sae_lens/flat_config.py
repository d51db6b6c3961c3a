"""The flat configuration of SAELens before version 6, put into today's.

Every field becomes what it meant, or raises an error that names today's way. Fields that are not
given take the defaults of their time.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fastsae.sae_lens.flat_sae import flat_sae

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
SAE_OPTIONS = (
    "activation_fn",
    "activation_fn_kwargs",
    "activation_fn_str",
    "architecture",
    "d_in",
    "d_sae",
    "decoder_heuristic_init_norm",
    "expansion_factor",
    "normalize_activations",
    "scale_sparsity_penalty_by_decoder_norm",
)
"""What they mean together is in `flat_sae`."""
OPTIONS = (
    "b_dec_init_method",
    "decoder_heuristic_init",
    "decoder_orthogonal_init",
    "finetuning_method",
    "finetuning_tokens",
    "hook_layer",
    "hook_point_layer",
    "init_encoder_as_decoder_transpose",
    "noise_scale",
    "normalize_sae_decoder",
    "resume",
)
"""Read one by one below."""
GONE = {
    "resume": "pass resume_from_checkpoint=FOLDER",
    "finetuning_tokens": "train once more with from_pretrained_path=FOLDER",
    "finetuning_method": "train once more with from_pretrained_path=FOLDER",
    "noise_scale": "leave it out: a JumpReLU SAE does what noise on the pre-activations was for",
    "decoder_orthogonal_init": "leave it out: rows start as random directions",
}
THEIR_DEFAULTS: Mapping[str, Any] = {"adam_beta1": 0.0}
"""Of a flat configuration, where they are not today's."""
KNOWN = (*RENAMED, *LOGGER, *SAE_FIELDS, *SAE_OPTIONS, *OPTIONS)


class Nested(NamedTuple):
    """A flat configuration in today's parts."""

    fields: dict[str, Any]
    """Of the runner, `sae` among them."""
    logger: dict[str, Any]


def nested(given: Mapping[str, Any]) -> Nested:
    """What a caller of the flat configuration wrote, in today's parts.

    Raises:
        ValueError: a field whose meaning exists no more, or two that contradict each other.
    """
    values = {RENAMED.get(name, name): value for name, value in given.items()}
    logger = {name: values.pop(name) for name in LOGGER if name in values}
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    sae_options = {name: values.pop(name) for name in SAE_OPTIONS if name in values}
    sae_fields = {name: values.pop(name) for name in SAE_FIELDS if name in values}
    _refuse_what_is_gone(options)
    _refuse_free_norms(options, sae_options)
    _place_layer(options, values)
    # Batches of prompts then, contexts now.
    prompts = values.get("store_batch_size_prompts", 32)
    values["n_batches_in_buffer"] = prompts * values.get("n_batches_in_buffer", 20)
    unit_rows = options.get("normalize_sae_decoder", True)
    sae = flat_sae(sae_options, sae_fields, values.get("dtype", "float32"), unit_rows)
    ours = {"unit_norm_decoder": unit_rows, "b_dec_init": _b_dec_init(options), "sae": sae}
    return Nested({**THEIR_DEFAULTS, **values, **ours}, logger)


def refuse_unknown(names: Iterable[str], today: tuple[str, ...]) -> None:
    """Raise TypeError, with the nearest names, for a field that never was."""
    for name in names:
        if name not in (*today, *KNOWN):
            near = difflib.get_close_matches(name, (*today, *KNOWN), n=3)
            raise TypeError(
                f"LanguageModelSAERunnerConfig has no field {name!r}; nearest: {near or 'none'}"
            )


def _b_dec_init(options: Mapping[str, Any]) -> str:
    """Where b_dec starts, under a flat configuration."""
    method = options.get("b_dec_init_method", "geometric_median")
    if method not in ("geometric_median", "mean", "zeros"):
        raise ValueError(
            f"b_dec_init_method must be 'geometric_median', 'mean' or 'zeros', got {method!r}"
        )
    return method


def _refuse_what_is_gone(options: Mapping[str, Any]) -> None:
    for name, way in GONE.items():
        if options.get(name):
            raise ValueError(f"{name} is no longer part of training, got {options[name]!r}; {way}")
    if options.get("init_encoder_as_decoder_transpose") is False:
        raise ValueError(
            "init_encoder_as_decoder_transpose must be True or left out, got False: every encoder "
            "starts as its decoder's transpose today"
        )


def _refuse_free_norms(options: Mapping[str, Any], sae_options: Mapping[str, Any]) -> None:
    weighed = sae_options.get("scale_sparsity_penalty_by_decoder_norm", False)
    penalised = sae_options.get("architecture", "standard") in ("standard", "gated")
    if penalised and options.get("normalize_sae_decoder") is False and not weighed:
        raise ValueError(
            "scale_sparsity_penalty_by_decoder_norm must be True where normalize_sae_decoder is "
            f"False, got {weighed}: free decoder norms would undo the penalty"
        )


def _place_layer(options: Mapping[str, Any], values: dict[str, Any]) -> None:
    """Put the layer into a hook name with a place for it; check one that has its own."""
    layer = options.get("hook_layer", options.get("hook_point_layer"))
    hook = str(values.get("hook_name", ""))
    if "{layer}" in hook:
        if layer is None:
            raise ValueError(f"hook_layer must be given for hook_name={hook!r}, got None")
        values["hook_name"] = hook.format(layer=layer)
    elif layer is not None and hook.startswith("blocks.") and int(hook.split(".")[1]) != layer:
        raise ValueError(f"hook_layer must be the layer of hook_name, {hook}, got {layer}")
