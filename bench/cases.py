"""Named shapes, after real uses, and inputs with the statistics of a residual stream."""

import difflib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SAMPLE = Path(__file__).parent / "data" / "smollm2-135m-layer15-sample.safetensors"
"""Rows of SmolLM2-135M's residual stream, written by `python -m bench.quality --sample`."""
SAMPLE_WIDTH = 576
OUTLIERS = (32.0, 28.0, 13.0, 9.0, 7.0)
"""Root mean squares of the sample's largest dimensions over that of its median one."""


@dataclass(frozen=True)
class Case:
    name: str
    B: int
    D: int
    F: int
    K: int


def shape_of(case: Case) -> dict[str, Any]:
    """What every row of a case says of it."""
    return {"case": case.name, "B": case.B, "D": case.D, "F": case.F, "K": case.K}


CASES = {
    case.name: case
    for case in (
        Case("smollm2-135m-4k", 2048, 576, 4096, 32),
        Case("smollm2-135m-16k", 2048, 576, 16_384, 32),
        Case("smollm2-135m-16k-k64", 4096, 576, 16_384, 64),
        Case("smollm2-135m-65k", 2048, 576, 65_536, 32),
        Case("smollm2-135m-262k", 2048, 576, 262_144, 32),
        Case("gpt2-small-24k", 4096, 768, 24_576, 32),
        Case("gpt2-small-131k", 8192, 768, 131_072, 64),
        Case("gemma-2-2b-65k", 8192, 2304, 65_536, 64),
        Case("gemma-2-2b-131k", 8192, 2304, 131_072, 64),
        Case("llama-3.1-8b-131k", 8192, 4096, 131_072, 64),
        Case("llama-3.1-8b-1m", 8192, 4096, 1_048_576, 64),
    )
}


def rows(case: Case, seed: int = 0) -> Tensor:
    """[B, D]: low-rank plus noise with a few large dimensions, norm sqrt(D) in the mean.

    As in a language model these are about as large in every row; their signs are drawn, where a
    model's are fixed, so that it is not the same latents that win in all rows.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = max(1, case.D // 8)
    low = torch.randn(case.B, rank, generator=generator)
    x = low @ torch.randn(rank, case.D, generator=generator)
    x += 0.3 * x.std() * torch.randn(case.B, case.D, generator=generator)
    large = torch.arange(len(OUTLIERS)) * (case.D // len(OUTLIERS))
    signs = torch.randn(case.B, len(OUTLIERS), generator=generator).sign()
    x[:, large] = x.std() * torch.tensor(OUTLIERS) * signs
    return _scaled(x * (1 + 0.1 * torch.randn(case.B, 1, generator=generator)))


def real_rows() -> Tensor:
    """[8192, 576] fp32 activations of a language model, norm sqrt(D) in the mean."""
    return _scaled(load_file(SAMPLE)["rows"].float())


def harvested_rows(case: Case, folder: Path) -> Tensor:
    """[B, D] fp32 rows of a harvest, drawn without repeats, norm sqrt(D) in the mean.

    They are of the first of its hooks whose rows are D wide.

    Args:
        folder: what `fastsae harvest` wrote.

    Raises:
        FileNotFoundError: it is no such folder, or a shard is absent.
        ValueError: it is not finished, no hook has rows of that width, or there are fewer than B.
    """
    # Not on top: `bench.gpu_check` runs where only what the kernels need is installed.
    from fastsae.data.sharded_rows import ShardedRows
    from fastsae.data.shards import ActivationShards

    shards = ActivationShards(folder)
    widths = shards.index.widths
    hook = next((name for name, width in widths.items() if width == case.D), None)
    if hook is None:
        raise ValueError(
            f"shards must hold rows of the width D = {case.D} of {case.name}, got {widths} in "
            f"{folder}"
        )
    if shards.index.rows < case.B:
        raise ValueError(
            f"shards must hold at least the B = {case.B} rows of {case.name}, of which none is "
            f"repeated, got {shards.index.rows} in {folder}"
        )
    with closing(ShardedRows(shards, hook, case.B).from_step(0)) as batches:
        return _scaled(next(batches).float())


def _scaled(x: Tensor) -> Tensor:
    return x * (x.shape[1] ** 0.5 / x.norm(dim=1).mean())


def find_case(name: str) -> Case:
    """A case by its name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    if name.lower() in CASES:
        return CASES[name.lower()]
    near = difflib.get_close_matches(name, CASES)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"case must be one of {list(CASES)}, got {name!r}{hint}")


def batch(case: Case, shards: Path | None = None) -> Tensor:
    """[B, D] rows: of a harvest, if one is given, else of the sample where its width is D."""
    if shards is not None:
        return harvested_rows(case, shards)
    if case.D == SAMPLE_WIDTH:
        real = real_rows()
        return real[torch.arange(case.B) % len(real)]
    return rows(case)


@dataclass(frozen=True)
class Start:
    """What every provider starts from: weights [D, F], [F, D], [F], and what is taken for dead."""

    case: Case
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    dead: Tensor | None
    device: torch.device

    @staticmethod
    def random(
        case: Case,
        dead_fraction: float = 0.0,
        seed: int = 0,
        *,
        skewed: bool = False,
        device: torch.device | str = "cpu",
    ) -> "Start":
        """Unit rows. `skewed`: a few latents fire on most rows, as in a trained SAE."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = torch.randn(case.F, case.D, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        b_enc = torch.zeros(case.F)
        if skewed:
            # Scores of unit rows against rows of norm sqrt(D) are standard normal; half of the k
            # latents of a row are then the same few.
            often = torch.randperm(case.F, generator=generator)[: max(1, case.K // 2)]
            b_enc[often] = 6.0
        dead = None
        if dead_fraction:
            dead = (torch.rand(case.F, generator=generator) < dead_fraction).to(device)
        W_dec = W_dec.to(device)
        return Start(case, W_dec.t(), W_dec, b_enc.to(device), dead, torch.device(device))
