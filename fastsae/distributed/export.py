"""Shards into one folder in SAELens's format, each process writing its bytes where they belong.

Nobody holds another's latents: a safetensors file is a header and the tensors row-major one after
the other, so that every shard knows where its rows, or its piece of each row, go.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.distributed.assembly import latent_axis, whole_shape
from fastsae.distributed.mesh import Mesh
from fastsae.files import replacing_together
from fastsae.saes import SAE
from fastsae.saes.native_format import CONFIG, INDEX, WEIGHTS, config_of

LARGEST_FILE = 5_000_000_000
"""Bytes above which each tensor has a file of its own, and an index names them."""
BLOCK_BYTES = 64 << 20
"""Of a tensor that are made row-major at once."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
"""As a safetensors header names them."""


class _Place(NamedTuple):
    file: str
    offset: int
    shape: list[int]


def write_shards(
    sae: SAE, mesh: Mesh, folder: Path, *, largest_file: int = LARGEST_FILE
) -> list[Path]:
    """Write the dictionary of which every process of a mesh has a shard; called by all of them.

    Args:
        sae: in the form that is used, `Trainer.export`.
        folder: seen by all processes.
        largest_file: bytes, above which there is a file a tensor.

    Returns:
        The files, of which `cfg.json` is one.

    Raises:
        OSError: on every process, where one cannot write; the folder is as it was.
    """
    state = {name: t.detach() for name, t in sae.state_dict().items()}
    files, places = _layout(sae, state, largest_file)
    writing = mesh.on_first(partial(_begin, folder, files))
    failed: Exception | None = None
    if mesh.part == 0:
        try:
            for name, t in state.items():
                if mesh.shard == 0 or latent_axis(sae, name) is not None:
                    _write_part(writing / places[name].file, places[name], sae, name, t)
        except Exception as error:
            failed = error
    if mesh.any(failed is not None):
        mesh.on_first(partial(shutil.rmtree, writing))
        raise failed or OSError("another process could not write its shard")
    return mesh.on_first(partial(_finish, folder, writing, sae, state, places))


def _layout(
    sae: SAE, state: Mapping[str, Tensor], largest_file: int
) -> tuple[dict[str, tuple[bytes, int]], dict[str, _Place]]:
    """Header and size of each file, and where each tensor begins."""
    shapes = {name: whole_shape(sae, name, t) for name, t in state.items()}
    sizes = {
        name: torch.Size(shape).numel() * state[name].itemsize for name, shape in shapes.items()
    }
    names = list(state)
    groups = [names] if sum(sizes.values()) <= largest_file else [[name] for name in names]
    files: dict[str, tuple[bytes, int]] = {}
    places: dict[str, _Place] = {}
    for number, group in enumerate(groups, 1):
        stem, suffix = WEIGHTS.rsplit(".", 1)
        of_all = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
        file = WEIGHTS if len(groups) == 1 else of_all
        header: dict[str, Any] = {}
        end = 0
        for name in group:
            begin, end = end, end + sizes[name]
            header[name] = {
                "dtype": DTYPES[state[name].dtype],
                "shape": shapes[name],
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
        files[file] = start, len(start) + end
        for name in group:
            offset = len(start) + header[name]["data_offsets"][0]
            places[name] = _Place(file, offset, shapes[name])
    return files, places


def _begin(folder: Path, files: dict[str, tuple[bytes, int]]) -> Path:
    """Files with their headers, of their final sizes, in a folder beside."""
    writing = folder / ".writing"
    writing.mkdir(parents=True, exist_ok=True)
    for name, (start, size) in files.items():
        with (writing / name).open("wb") as file:
            file.write(start)
            file.truncate(size)
    return writing


def _write_part(path: Path, place: _Place, sae: SAE, name: str, t: Tensor) -> None:
    axis = latent_axis(sae, name)
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if t.ndim == 0:
            _write(descriptor, place.offset, t)
        elif axis == 1:
            _write_columns(descriptor, place, sae.latents.start, t)
        else:
            first = 0 if axis is None else sae.latents.start
            row_bytes = t[:1].nbytes
            block = max(1, BLOCK_BYTES // max(1, row_bytes))
            for start in range(0, len(t), block):
                offset = place.offset + (first + start) * row_bytes
                _write(descriptor, offset, t[start : start + block])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_columns(descriptor: int, place: _Place, first: int, t: Tensor) -> None:
    """A piece of each row of the whole."""
    width = place.shape[1]
    block = max(1, BLOCK_BYTES // max(1, t[:1].nbytes))
    for start in range(0, len(t), block):
        for row, values in enumerate(t[start : start + block].contiguous(), start):
            _write(descriptor, place.offset + (row * width + first) * t.itemsize, values)


def _write(descriptor: int, offset: int, values: Tensor) -> None:
    left = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _finish(
    folder: Path, writing: Path, sae: SAE, state: Mapping[str, Tensor], places: dict[str, _Place]
) -> list[Path]:
    """Give the files their names, with the configuration and, of several, the index."""
    written = sorted({place.file for place in places.values()})
    with replacing_together(folder) as temporary:
        for name in written:
            os.replace(writing / name, temporary / name)
        if written != [WEIGHTS]:
            total = sum(torch.Size(places[n].shape).numel() * t.itemsize for n, t in state.items())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: place.file for name, place in places.items()},
            }
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            written.append(INDEX)
        (temporary / CONFIG).write_text(config_of(sae))
    if len(written) > 1:
        (folder / WEIGHTS).unlink(missing_ok=True)
    writing.rmdir()
    return [folder / name for name in [*written, CONFIG]]
