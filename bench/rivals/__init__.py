"""Every op, ours and its rivals: what `bench.ops` checks and times."""

from collections.abc import Callable

from bench.rivals.decodes import (
    aux_topk_runs,
    mse_forward_runs,
    mse_l1_loss_runs,
    pair_dots_runs,
    relu_l1_loss_runs,
    sparse_decode_runs,
)
from bench.rivals.encodes import (
    batch_topk_encode_runs,
    jumprelu_encode_runs,
    threshold_encode_runs,
    topk_encode_backward_runs,
    topk_encode_runs,
)
from bench.rivals.inputs import Inputs as Inputs
from bench.rivals.inputs import Run as Run
from bench.rivals.updates import (
    group_by_latent_runs,
    lazy_update_runs,
    row_adam_runs,
    segment_sum_runs,
    update_runs,
)

OPS: dict[str, Callable[[Inputs], dict[str, Run]]] = {
    "topk_encode": topk_encode_runs,
    "topk_encode fwd+bwd": topk_encode_backward_runs,
    "sparse_decode": sparse_decode_runs,
    "mse_l1_loss fwd": mse_forward_runs,
    "mse_l1_loss fwd+bwd": mse_l1_loss_runs,
    "pair_dots": pair_dots_runs,
    "group_by_latent": group_by_latent_runs,
    "segment_sum": segment_sum_runs,
    "aux_topk 5% dead fwd+bwd": aux_topk_runs,
    "row_adam": row_adam_runs,
    "row_adam from pairs": update_runs,
    "batch_topk_encode": batch_topk_encode_runs,
    "threshold_encode": threshold_encode_runs,
    "jumprelu_encode fwd+bwd": jumprelu_encode_runs,
    "lazy_row_adam from pairs": lazy_update_runs,
    "relu_l1_loss fwd+bwd": relu_l1_loss_runs,
}
NO_RIVAL = ("mm",)
"""A part of the work: timed, with nothing to compare."""
BY_NORM = (
    "topk_encode fwd+bwd",
    "batch_topk_encode",
    "threshold_encode",
    "jumprelu_encode fwd+bwd",
)
"""Scores that were rounded otherwise choose other latents near the k-th or near the threshold, and
a batch's largest have no order: norms are compared."""
