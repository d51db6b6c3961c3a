"""Argument checks shared by the ops: one sentence that names the argument, the rule, what came."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FLOATS = ("float16", "bfloat16", "float32", "float64")

_index_checks = False


@contextmanager
def index_checks() -> Iterator[None]:
    """Check every code's latents on a GPU too, where each check waits for the device.

    On a CPU they are always checked. An index outside the dictionary reads or writes memory that
    is not its own.
    """
    global _index_checks
    before, _index_checks = _index_checks, True
    try:
        yield
    finally:
        _index_checks = before


def check_indices(indices: Tensor, d_sae: int) -> None:
    wanted = indices.device.type == "cpu" or _index_checks
    if not wanted or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= d_sae:
        raise ValueError(
            f"indices must be in [0, F) with F = {d_sae}, got values from {least} to {most}"
        )


def check_float(name: str, tensor: Tensor) -> None:
    if str(tensor.dtype).removeprefix("torch.") not in FLOATS:
        raise TypeError(
            f"{name} must be a floating dtype ({', '.join(FLOATS)}), got {tensor.dtype}"
        )


def check_shape(name: str, tensor: Tensor, letters: str, shape: tuple[int | None, ...]) -> None:
    """`letters` is the rule as a reader knows it, `shape` the sizes it means (None: any)."""
    got = tuple(tensor.shape)
    wrong = len(got) != len(shape) or any(
        want is not None and want != have for want, have in zip(shape, got, strict=True)
    )
    if wrong:
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {letters} = [{sizes}], got {list(got)}")


def check_rows(name: str, tensor: Tensor, width: int, letter: str = "D") -> None:
    check_float(name, tensor)
    if tensor.ndim < 1 or tensor.shape[-1] != width:
        raise ValueError(
            f"{name} must have shape [..., {letter}] with {letter} = {width}, "
            f"got {list(tensor.shape)}"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{next(iter(devices))} and the others must share a device, got {listing}")


def check_code(acts: Tensor, indices: Tensor) -> None:
    check_float("acts", acts)
    if indices.is_floating_point() or indices.dtype.is_complex or indices.dtype.itemsize < 4:
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
    if acts.shape != indices.shape or acts.ndim < 1:
        raise ValueError(
            "acts and indices must have the same shape [..., K], "
            f"got {list(acts.shape)} and {list(indices.shape)}"
        )


def check_encoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor | None,
    scale: Tensor | None = None,
    W_compute: Tensor | None = None,
) -> None:
    """x [..., D], W_enc [D, F] and what goes with it."""
    check_float("W_enc", W_enc)
    check_shape("W_enc", W_enc, "[D, F]", (None, None))
    d_in, d_sae = W_enc.shape
    check_rows("x", x, d_in)
    vectors = (("b_enc", b_enc, "[F]", d_sae), ("b_pre", b_pre, "[D]", d_in))
    for name, vector, letters, size in (*vectors, ("scale", scale, "[F]", d_sae)):
        if vector is not None:
            check_float(name, vector)
            check_shape(name, vector, letters, (size,))
    if W_compute is not None:
        check_float("W_compute", W_compute)
        check_shape("W_compute", W_compute, "W_enc's", (d_in, d_sae))
    check_same_device(x=x, W_enc=W_enc, b_enc=b_enc, b_pre=b_pre, scale=scale, W_compute=W_compute)


def check_decoder(W_dec: Tensor, b_dec: Tensor | None) -> None:
    """W_dec [F, D], or [F, T, D] for T targets, and b_dec of one of its rows' shape."""
    check_float("W_dec", W_dec)
    if W_dec.ndim not in (2, 3):
        raise ValueError(f"W_dec must have shape [F, D] or [F, T, D], got {list(W_dec.shape)}")
    if b_dec is not None:
        check_float("b_dec", b_dec)
        check_shape("b_dec", b_dec, "[D]" if W_dec.ndim == 2 else "[T, D]", tuple(W_dec.shape[1:]))
