"""The three launches of the fused encode, on scores chosen to be hard for them."""

from types import SimpleNamespace

import pytest
import torch

from fastsae_kernels import Impl, topk_encode
from parity import DEVICE, lattice

triton = pytest.importorskip("triton")

from fastsae_kernels.topk import groups, kernel, keys, selection  # noqa: E402

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def down_to_one_group_a_latent(monkeypatch):
    """The least that the certificate needs, where it has most to do; users get `eager` earlier."""
    monkeypatch.setattr(kernel, "fits", lambda d_sae, k: d_sae // kernel.GROUP_SIZES[-1] >= k)


def encode_scores(scores, k, **kwargs):
    """Encode rows whose pre-activations are exactly `scores` [B, F]: one-hot rows pick them."""
    rows = torch.eye(len(scores), device=DEVICE)
    bias = torch.zeros(scores.shape[1], device=DEVICE)
    weight = scores.t().contiguous().t()  # one latent contiguous
    return topk_encode(rows, weight, bias, k, impl=Impl.TRITON, **kwargs)


def check_exact(scores, code):
    """The multiset of values, that the indices are where the values are, and the order."""
    exact = scores.relu()
    assert torch.equal(code.acts, exact.topk(code.acts.shape[1], dim=1).values)
    indices = code.indices.long()
    assert torch.equal(exact.gather(1, indices), code.acts)
    for row, values in zip(indices.tolist(), code.acts.tolist(), strict=True):
        assert len(set(row)) == len(row)
        pairs = list(zip(values, row, strict=True))
        assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))


def families(F):
    """Rows that are hard for a certificate by groups, one a family."""
    ramp = torch.arange(F, device=DEVICE).float()
    noise = torch.randn(F, device=DEVICE)
    return torch.stack(
        [
            ramp,
            F - ramp,
            torch.where(ramp // 32 == 3, ramp, ramp / F),
            torch.where(ramp % 8 == 3, ramp + F, ramp / F),
            torch.ones_like(ramp),
            torch.zeros_like(ramp),
            -1 - ramp,
            torch.where(ramp % 41 == 5, ramp, -ramp),
            torch.randint(0, 4, (F,), device=DEVICE).float(),
            torch.randint(-1, 2, (F,), device=DEVICE).float(),
            noise,
            noise.abs() * 1e-38,
            torch.where(ramp >= F - 40, ramp, noise.abs()),
            noise.repeat_interleave(2)[:F],
            noise.clamp(max=0.5),
            3e38 * noise.clamp(-1, 1),
        ]
    )


@pytest.mark.parametrize("k", [1, 2, 5, 16])
@pytest.mark.parametrize("F", [256, 517])
def test_hard_rows_are_exact(F, k):
    scores = families(F)
    check_exact(scores, encode_scores(scores, k))


@pytest.mark.parametrize("F", [1024, 1100])
def test_large_groups_are_exact(F):
    assert keys.group_size(F, 4) == 64
    scores = families(F)
    check_exact(scores, encode_scores(scores, 4))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes what it has")
@pytest.mark.skipif(TRITON < (3, 7), reason="its interpreter fails at loads by descriptor")
@pytest.mark.parametrize("dtype, signed", [(torch.float32, False), (torch.bfloat16, True)])
def test_what_hopper_runs_is_exact(dtype, signed, monkeypatch):
    """Operands by tensor descriptors, and of bf16 a loop over 6 tiles on three multiprocessors."""
    of_three = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_three)
    monkeypatch.setattr(groups, "_takes_descriptors", lambda x, W_enc: True)
    x, W_enc = lattice(200, 24).to(dtype), lattice(600, 24).to(dtype).t()
    b_enc = torch.randperm(600) * 2.0**-18
    acts, indices = kernel.select_topk(x, W_enc, b_enc, 3, None, signed)
    exact = x.double() @ W_enc.double() + b_enc
    expected = (exact if signed else exact.relu()).topk(3)
    assert torch.equal(acts.double(), expected.values)
    assert torch.equal(indices.long(), expected.indices)


def test_rows_longer_than_one_block_are_exact(monkeypatch):
    monkeypatch.setattr(selection, "MOST_RESIDENT", 16)
    scores = families(700)
    check_exact(scores, encode_scores(scores, 9))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("values", [[torch.inf, 1.0, torch.inf], [-torch.inf, 2.0, -1.0]])
def test_infinite_scores_are_exact(values):
    weight = torch.tensor(values, device=DEVICE).repeat(1, 40)
    bias = torch.zeros(120, device=DEVICE)
    code = topk_encode(torch.ones(2, 1, device=DEVICE), weight, bias, 5, impl=Impl.TRITON)
    check_exact(weight.expand(2, -1), code)


def test_signed_scores_are_exact():
    scores = torch.cat([families(300), -families(300)])
    rows = torch.eye(len(scores), device=DEVICE)
    bias = torch.zeros(300, device=DEVICE)
    acts, indices = kernel.select_topk(rows, scores, bias, 11, None, signed=True)
    assert torch.equal(acts, scores.topk(11, dim=1).values)
    assert torch.equal(scores.gather(1, indices.long()), acts)


def test_at_most_k_groups_are_open_and_pairs_in_one_part_open_theirs():
    k, F = 12, 800
    scores = families(F)
    rows = torch.eye(len(scores), device=DEVICE)
    columns = groups.choose_tile(rows, rows, False).columns
    apart = columns // keys.group_size(F, k) * 2  # two parts a group of 16: every other member
    hidden = 0.5 + 0.4 * torch.rand(F, device=DEVICE)
    hidden[:6] = hidden[apart : apart + 6] = torch.arange(6.0, device=DEVICE) + 2
    scores[0] = hidden
    bias = torch.zeros(F, device=DEVICE)
    opened = []
    original = kernel._merge_open_groups

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                opened.append(args[7].clone())
                return original[grid](*args, **kwargs)

            return launch

    kernel._merge_open_groups = Spy()
    try:
        acts, _ = kernel.select_topk(rows, scores, bias, k, None, signed=False)
    finally:
        kernel._merge_open_groups = original
    counts = opened[0]
    assert counts.max() <= k
    assert counts[0] >= 6
    assert torch.equal(acts[0], scores[0].topk(k).values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_selects_by_fp32_sums(dtype):
    x, weight = lattice(6, 48).to(dtype), lattice(48, 500).to(dtype)
    bias = torch.randperm(500, device=DEVICE).float() * 2.0**-18
    code = topk_encode(x, weight, bias, 9, impl=Impl.TRITON)
    check_exact(x.float() @ weight.float() + bias, code)


def test_fp32_weights_beside_rows_in_half_precision():
    """As many rows as the largest tile has: both operands of it must fit into shared memory."""
    x, weight = lattice(128, 24).bfloat16(), lattice(24, 300).float()
    bias = torch.randperm(300, device=DEVICE).float() * 2.0**-18
    code = topk_encode(x, weight.t().contiguous().t(), bias, 7, impl=Impl.TRITON)
    check_exact(x.float() @ weight + bias, code)


def test_strides_and_a_cheaper_copy_of_the_weights():
    x, weight = lattice(5, 24).float(), lattice(24, 300).float()
    bias = torch.randperm(300, device=DEVICE).float() * 2.0**-18
    truth = topk_encode(x, weight, bias, 7, impl=Impl.REFERENCE)
    spread = torch.zeros(5, 48, device=DEVICE)[:, ::2].copy_(x)
    latents_contiguous = weight.t().contiguous().t()
    for rows, matrix in ((spread, weight), (x, latents_contiguous)):
        code = topk_encode(rows, matrix, bias, 7, impl=Impl.TRITON)
        assert torch.equal(code.acts, truth.acts) and torch.equal(code.indices, truth.indices)
    code = topk_encode(x, weight, bias, 7, W_compute=weight.bfloat16(), impl=Impl.TRITON)
    assert torch.equal(code.acts, truth.acts) and torch.equal(code.indices, truth.indices)


def test_same_bits_twice():
    x, weight = torch.randn(20, 40, device=DEVICE), torch.randn(40, 600, device=DEVICE)
    bias = torch.randn(600, device=DEVICE)
    first, second = (topk_encode(x, weight, bias, 8, impl=Impl.TRITON) for _ in range(2))
    assert torch.equal(first.acts, second.acts) and torch.equal(first.indices, second.indices)


def test_one_row_a_program_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(kernel, "INTERPRETED_ROWS", 1)
    scores = families(300)
    for k in (7, 18):
        check_exact(scores, encode_scores(scores, k))


def test_free_slots_stay_in_their_row():
    """Rows whose entries are still to be found, before rows that have all of theirs."""
    scores = families(1100)
    for order in (torch.arange(16), torch.tensor([12, 13] * 8)):
        check_exact(scores[order], encode_scores(scores[order], 17))


def test_rows_of_few_groups_are_left_to_eager(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "select_topk", None)
    scores = families(256)
    check_exact(scores, encode_scores(scores, 5))


def test_no_rows():
    code = topk_encode(
        torch.zeros(0, 8, device=DEVICE),
        torch.zeros(8, 64, device=DEVICE),
        torch.zeros(64, device=DEVICE),
        3,
        impl=Impl.TRITON,
    )
    assert code.acts.shape == code.indices.shape == (0, 3)
