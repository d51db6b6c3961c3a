"""The SAE of a flat configuration: what its fields meant, in one of today's SAE configurations."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastsae.sae_lens.training_saes import CONFIGS, StandardTrainingSAEConfig
from fastsae.saes import LegacyStandardConfig, SAEConfig

_log = logging.getLogger(__name__)

ARCHITECTURES = ("standard", "gated", "topk", "jumprelu")
ACTIVATIONS = ("relu", "topk")
THEIR_L1_COEFFICIENT = 1e-3
"""The default of flat configurations."""
LEAST_SUMMED_L1_COEFFICIENT = 0.1
"""Weights of L1 beside a squared error averaged over d_in, the loss until April 2024, were 1e-5 to
1e-2; beside one summed over d_in, the loss ever since, 0.5 to 10."""
JUMPRELU_DEFAULTS = {"jumprelu_init_threshold": 0.001, "jumprelu_bandwidth": 0.001}


def flat_sae(
    options: Mapping[str, Any], given: Mapping[str, Any], dtype: str, unit_norm_decoder: bool
) -> SAEConfig:
    """The SAE that a flat configuration describes.

    Args:
        options: its shape and activation function, under the names of flat configurations.
        given: fields of the SAE whose name is today's.
        dtype: of the run.
        unit_norm_decoder: whether the run keeps the decoder's rows at norm 1.

    Raises:
        ValueError: fields contradict each other, or mean nothing for the architecture.
    """
    architecture = _architecture(options)
    shape = {
        **_shape(options),
        "dtype": dtype.removeprefix("torch."),
        "normalize_activations": _normalization(options.get("normalize_activations")),
    }
    norm = options.get("decoder_heuristic_init_norm")
    if unit_norm_decoder or norm is not None:
        shape["decoder_init_norm"] = 1.0 if unit_norm_decoder else norm
    stated = {name: value for name, value in given.items() if value is not None}
    coefficient = float(stated.pop("l1_coefficient", THEIR_L1_COEFFICIENT))
    if architecture == "standard":
        return _standard(shape, coefficient, stated, options)
    if architecture == "gated":
        shape["l1_coefficient"] = coefficient
    if architecture == "jumprelu":
        shape |= JUMPRELU_DEFAULTS
        shape |= {
            "l0_coefficient": coefficient,
            "l0_warm_up_steps": stated.pop("l1_warm_up_steps", 0),
        }
    if architecture == "topk":  # its runs were given an L1 that never was part of their loss
        shape["k"] = _k(options)
        stated = {k: v for k, v in stated.items() if k not in ("l1_warm_up_steps", "lp_norm")}
    kind = CONFIGS[architecture]
    known = {f.name for f in fields(kind)}
    unused = [name for name, value in stated.items() if name not in known and value is not False]
    unused = [name for name in unused if (name, stated[name]) != ("lp_norm", 1)]
    if unused:
        raise ValueError(f"{unused[0]} must not be given for the architecture {architecture!r}")
    return kind(**{**shape, **{name: v for name, v in stated.items() if name in known}})


def _standard(
    shape: Mapping[str, Any],
    coefficient: float,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
) -> SAEConfig:
    """Under the loss of the L1 weight's time: a squared error averaged, or summed, over d_in."""
    d_in = shape["d_in"]
    stated = {k: v for k, v in given.items() if not k.startswith("jumprelu_")}
    weighed = options.get("scale_sparsity_penalty_by_decoder_norm", False)
    if weighed or coefficient >= LEAST_SUMMED_L1_COEFFICIENT:
        _log.warning(
            "l1_coefficient=%g is taken with a squared error summed over d_in, as in "
            "StandardTrainingSAEConfig(l1_coefficient=%g)",
            coefficient,
            coefficient,
        )
        if "mse_loss_normalization" in stated:  # the summed loss over d_in: the same minimum
            return LegacyStandardConfig(**{**shape, **stated, "l1_coefficient": coefficient / d_in})
        return StandardTrainingSAEConfig(**{**shape, **stated, "l1_coefficient": coefficient})
    legacy = LegacyStandardConfig(**{**shape, **stated, "l1_coefficient": coefficient})
    _log.warning(
        "l1_coefficient=%g with a squared error averaged over d_in = %d is l1_coefficient=%g "
        "in StandardTrainingSAEConfig, whose squared error is summed",
        coefficient,
        d_in,
        legacy.equivalent_l1_coefficient,
    )
    return legacy


def _architecture(options: Mapping[str, Any]) -> str:
    architecture = options.get("architecture") or "standard"
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture must be one of {list(ARCHITECTURES)} in a flat configuration, got "
            f"{architecture!r}; newer ones are sae=...TrainingSAEConfig(...)"
        )
    activation = options.get("activation_fn") or options.get("activation_fn_str") or "relu"
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_fn must be one of {list(ACTIVATIONS)}, got {activation!r}")
    return "topk" if activation == "topk" else architecture


def _shape(options: Mapping[str, Any]) -> dict[str, Any]:
    d_in = options.get("d_in")
    if d_in is None:
        raise ValueError("d_in must be the width of the activations at hook_name, got None")
    d_sae, factor = options.get("d_sae"), options.get("expansion_factor")
    if d_sae is not None and factor is not None and d_sae != factor * d_in:
        raise ValueError(
            f"d_sae must be expansion_factor * d_in = {factor * d_in} or alone, got {d_sae}"
        )
    return {"d_in": d_in, "d_sae": int(d_sae or (factor or 4) * d_in)} | {
        name: options[name] for name in ("apply_b_dec_to_input",) if name in options
    }


def _k(options: Mapping[str, Any]) -> int:
    k = (options.get("activation_fn_kwargs") or {}).get("k")
    if k is None:
        raise ValueError('activation_fn_kwargs must be {"k": ...} for a TopK SAE, got no k')
    return k


def _normalization(value: Any) -> str:
    if value in (None, False, "none"):
        return "none"
    return "expected_average_only_in" if value is True else value
