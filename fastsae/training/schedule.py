"""The learning rate over a run: up, a main phase, down to 0. SAELens's three schedules."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "cosine_restarts"]


def lr_factor(
    step: int,
    total_steps: int,
    warm_up_steps: int,
    decay_steps: int,
    schedule: Schedule = "constant",
    end: float = 0.1,
    cycles: int = 1,
) -> float:
    """Share of the peak learning rate at a step, from 0.

    Linear from 1/w to 1 over w = `warm_up_steps`; then 1, or with s of S steps of the main phase
    behind it

        cosine:           end + (1 - end) (1 + cos(pi s / S)) / 2
        cosine_restarts:  the same with s mod (S // cycles) of S // cycles steps;

    over the last `decay_steps` linear from where the main phase ends to 0. A constant rate whose
    warm-up and decay overlap follows the lower of the two.
    """
    up = (step + 1) / warm_up_steps if warm_up_steps else 1.0
    down = (total_steps - step) / decay_steps if decay_steps else 1.0
    if schedule == "constant":
        return max(0.0, min(1.0, up, down))
    if step < warm_up_steps:
        return up
    if decay_steps and step >= total_steps - decay_steps:
        return end * down
    length = total_steps - warm_up_steps - decay_steps
    passed = step - warm_up_steps
    if schedule == "cosine_restarts":
        length = max(1, length // cycles)
        passed %= length
    return end + (1 - end) * (1 + math.cos(math.pi * passed / length)) / 2
