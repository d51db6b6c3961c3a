"""What a trained SAE is worth: on text that nothing was chosen on, and by its dictionary."""

import torch
from torch import Tensor

from bench.quality.data import Data, Source
from fastsae import SAE
from fastsae.data import HookPoint, LanguageModel
from fastsae.evaluation import ReconstructionMetrics, loss_recovered

REDUNDANT = 0.9
"""Cosine from which on two latents count as one."""


@torch.no_grad()
def fvu(sae: SAE, *parts: Tensor) -> dict[str, float]:
    """FVU and L0 of the saved SAE over the rows of all parts together."""
    metrics = ReconstructionMetrics(sae.cfg.d_in, sae.cfg.d_sae)
    for x in (chunk for part in parts for chunk in part.split(2048)):
        code = sae.encode_sparse(x)
        metrics.update(x, sae.decode(code), code.indices, code.acts)
    found = metrics.result()
    return {"fvu": found["fvu"], "l0": found["l0"]}


def score(
    sae: SAE, data: Data, source: Source, lm: LanguageModel, hook: HookPoint
) -> dict[str, float]:
    """On the test documents."""
    test = data.test
    ce = loss_recovered(
        lm, hook, test.tokens[: source.ce_contexts], sae, row_filter=data.row_filter
    )
    assert ce.every_position is not None
    return {
        **fvu(sae, test.kept),
        "fvu_all_rows": fvu(sae, test.kept, test.excluded)["fvu"],
        "ce_loss_score": ce.ce_loss_score,
        "ce_clean": ce.ce_clean,
        "ce_spliced": ce.ce_spliced,
        "untouched": ce.untouched_fraction,
        "ce_loss_score_every_position": ce.every_position.ce_loss_score,
        **redundancy(sae.W_dec),
    }


@torch.no_grad()
def redundancy(W_dec: Tensor) -> dict[str, float]:
    """Each latent's largest cosine to another latent of the dictionary [F, D]."""
    rows = torch.nn.functional.normalize(W_dec, dim=1)
    largest = torch.cat([_largest(rows, part) for part in torch.arange(len(rows)).split(1024)])
    return {
        "decoder_cosine": float(largest.mean()),
        "redundant": float((largest > REDUNDANT).float().mean()),
    }


def _largest(rows: Tensor, part: Tensor) -> Tensor:
    cosines = rows[part] @ rows.T
    cosines[torch.arange(len(part)), part] = -1
    return cosines.amax(1)


@torch.no_grad()
def match(W_dec: Tensor, other: Tensor) -> float:
    """Mean over latents of the largest cosine to a latent of another seed's dictionary."""
    mine, theirs = (torch.nn.functional.normalize(W, dim=1) for W in (W_dec, other))
    return float(torch.cat([(part @ theirs.T).amax(1) for part in mine.split(1024)]).mean())
