"""Checks of configurations: one sentence that names the field, the rule and what came."""

from collections.abc import Collection

import torch


def check_choice(cfg: object, name: str, choices: Collection[object]) -> None:
    value = getattr(cfg, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_counts(
    cfg: object, *names: str, least: int = 1, optional: bool = False, prefix: str = ""
) -> None:
    or_none = " or None" if optional else ""
    for name in names:
        value = getattr(cfg, name)
        if (value is None and not optional) or (value is not None and value < least):
            raise ValueError(f"{prefix}{name} must be at least {least}{or_none}, got {value}")


def float_dtype(name: str, value: object) -> torch.dtype:
    """The dtype that a field names, with or without `torch.`."""
    dtype = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"{name} must name a floating torch dtype, got {value!r}")
    return dtype
