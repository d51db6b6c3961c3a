"""Codes and batches with more entries than int32 can count."""

import pytest
import torch

from fastsae_kernels import SparseCode, group_by_latent

batch_topk = pytest.importorskip("fastsae_kernels.batch_topk.kernel", exc_type=ImportError)


def test_starts_behind_the_last_kept_place_do_not_wrap():
    counts = torch.tensor([3, 0, 2**31, 2**31, 5])
    assert batch_topk._starts(counts, 7).tolist() == [0, 3, 3, 7, 7, 7]


def test_a_bound_is_compared_without_a_copy():
    edges = torch.tensor([-(2**31), -65537, -65536, -1, 0, 65535, 65536, 2**31 - 1])
    rest, tau = edges.int()[:, None], edges.int()
    assert torch.equal((rest & -0x10000) > tau, rest > (tau | 0xFFFF))


def test_positions_that_int32_cannot_hold_are_refused():
    acts = torch.empty(2**16, 2**15, device="meta")
    with pytest.raises(ValueError, match=r"acts must hold at most 2\^31 - 1 entries .* got 2147"):
        group_by_latent(SparseCode(acts, acts.int()), 4)
