"""Argument checks shared by the ops: one sentence that names the argument, the rule, what came."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsae_kernels.code import MOST_ENTRIES, RaggedCode, SparseCode

FLOATS = ("float16", "bfloat16", "float32", "float64")

_index_checks = False


@contextmanager
def index_checks() -> Iterator[None]:
    """Check each code's latents and row offsets on a GPU too, where a check waits for the device.

    On a CPU they are always checked. An index outside the dictionary, or an offset outside the
    code, reads or writes memory that is not its own.
    """
    global _index_checks
    before, _index_checks = _index_checks, True
    try:
        yield
    finally:
        _index_checks = before


def values_are_checked(tensor: Tensor) -> bool:
    wanted = tensor.device.type == "cpu" or _index_checks
    return wanted and not torch.compiler.is_compiling()


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_d_sae(d_sae: int) -> None:
    if isinstance(d_sae, bool) or not isinstance(d_sae, int):
        raise TypeError(f"d_sae must be an int, got {d_sae!r}")


def check_indices(indices: Tensor, d_sae: int) -> None:
    check_within("indices", indices, "F", d_sae)


def check_within(name: str, indices: Tensor, letter: str, size: int) -> None:
    if not values_are_checked(indices) or indices.numel() == 0:
        return
    least, most = (int(bound) for bound in indices.aminmax())
    if least < 0 or most >= size:
        raise ValueError(
            f"{name} must be in [0, {letter}) with {letter} = {size}, "
            f"got values from {least} to {most}"
        )


def check_row_offsets(row_offsets: Tensor, nnz: int) -> None:
    check_int("row_offsets", row_offsets)
    if row_offsets.ndim != 1 or len(row_offsets) == 0:
        raise ValueError(f"row_offsets must have shape [B + 1], got {list(row_offsets.shape)}")
    if not values_are_checked(row_offsets):
        return
    first, last = int(row_offsets[0]), int(row_offsets[-1])
    least = int(row_offsets.diff(prepend=row_offsets[:1]).min())
    if first != 0 or last != nnz or least < 0:
        raise ValueError(
            f"row_offsets must rise from 0 to nnz = {nnz}, got {first} to {last} "
            f"with a smallest step of {least}"
        )


def check_float(name: str, tensor: Tensor) -> None:
    if str(tensor.dtype).removeprefix("torch.") not in FLOATS:
        raise TypeError(
            f"{name} must be a floating dtype ({', '.join(FLOATS)}), got {tensor.dtype}"
        )


def check_int(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")


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


def check_code(code: SparseCode | RaggedCode, d_sae: int) -> None:
    """Its dtypes, shapes and device, that all of its latents exist, and where its rows start."""
    acts, indices = code.acts, code.indices
    row_offsets = code.row_offsets if isinstance(code, RaggedCode) else None
    check_float("acts", acts)
    check_int("indices", indices)
    check_same_device(acts=acts, indices=indices, row_offsets=row_offsets)
    fits = acts.ndim >= 1 if row_offsets is None else acts.ndim == 1
    if not fits or acts.shape != indices.shape:
        letters = "[..., K]" if row_offsets is None else "[nnz]"
        raise ValueError(
            f"acts and indices must have the same shape {letters}, "
            f"got {list(acts.shape)} and {list(indices.shape)}"
        )
    if row_offsets is None and acts.shape[-1] == 0:
        raise ValueError(f"acts must have shape [..., K] with K >= 1, got {list(acts.shape)}")
    if code.groups is not None:
        check_shape("code.groups.offsets", code.groups.offsets, "[F + 1]", (d_sae + 1,))
    # While a graph is traced nobody knows how many entries a ragged code has.
    if not torch.compiler.is_compiling() and acts.numel() > MOST_ENTRIES:
        raise ValueError(
            f"acts must hold at most 2^31 - 1 entries (positions are int32), got {acts.numel()}"
        )
    check_indices(indices, d_sae)
    if row_offsets is not None:
        check_row_offsets(row_offsets, acts.numel())


def dtypes_of(*tensors: Tensor | None) -> list[torch.dtype]:
    return [t.dtype for t in tensors if t is not None]


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


def check_bias(name: str, bias: object) -> None:
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name} must be a tensor, got {bias!r}")


def check_decoder(W_dec: Tensor, b_dec: Tensor | None) -> None:
    """W_dec [F, D], or [F, T, D] for T targets, and b_dec of one of its rows' shape."""
    check_float("W_dec", W_dec)
    if W_dec.ndim not in (2, 3):
        raise ValueError(f"W_dec must have shape [F, D] or [F, T, D], got {list(W_dec.shape)}")
    if b_dec is not None:
        check_float("b_dec", b_dec)
        check_shape("b_dec", b_dec, "[D]" if W_dec.ndim == 2 else "[T, D]", tuple(W_dec.shape[1:]))
