"""T-Tech's flex-sae, kernels that Hugging Face's hub serves to GPUs."""

from torch import Tensor

from bench.cases import Start
from bench.providers.base import Step
from bench.providers.plain import plain_step


def flex_sae_step(start: Start) -> Step:
    """Its decoder and loss in the plain step: it has no encoder and no optimizer of its own.

    It takes K that are powers of two and D that are multiples of 256.
    """
    from kernels import get_kernel  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    mean_over_all = get_kernel("t-tech/flex-sae").triton_topk_sae_loss

    def mse(indices: Tensor, acts: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> Tensor:
        return start.case.D * mean_over_all(indices, W_dec, acts, b_dec, x)

    return plain_step(start, mse)
