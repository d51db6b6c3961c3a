"""Where b_dec starts."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Centre = Literal["mean", "geometric_median", "zeros"]

STEPS = 100
TOLERANCE = 1e-6


def geometric_median(rows: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration.

    m <- sum_i x_i / |x_i - m| / sum_i 1 / |x_i - m| from the mean on, until the sum of distances
    falls by less than a millionth. What massive rows do to a mean they do not do to it.
    """
    rows = rows.float()
    median, before = rows.mean(0), torch.inf
    for _ in range(STEPS):
        distances = (rows - median).norm(dim=1)
        total = float(distances.sum())
        if total >= before * (1 - TOLERANCE):
            break
        weights = 1 / distances.clamp_min(1e-6)
        median, before = weights @ rows / weights.sum(), total
    return median


CENTRES: dict[Centre, Callable[[Tensor], Tensor]] = {
    "mean": lambda rows: rows.mean(0),
    "geometric_median": geometric_median,
    "zeros": lambda rows: rows.new_zeros(rows.shape[-1]),
}
