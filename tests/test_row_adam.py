"""The ops `row_adam` and `lazy_row_adam`: kernels and eager against the reference."""

import pytest
import torch

from fastsae_kernels import (
    DenseGrad,
    SparseCode,
    collect_row_grads,
    group_by_latent,
    mse_l1_loss,
    row_adam,
)
from fastsae_kernels._row_grads import PairGrad, SubsetGrad
from fastsae_kernels.code import LatentGroups
from fastsae_kernels.optimizer import lazy_row_adam, row_grad_norm
from fastsae_kernels.optimizer.rounding import hash_bits, stochastic_round
from row_grads import device_for, pair_grad, start_of, subset_grad

LEAN = ("triton", "eager")


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 pairs, so that a small batch has latents of several."""
    pytest.importorskip("triton")
    monkeypatch.setattr("fastsae_kernels.grouping.kernel.CHUNK", 8)


@pytest.fixture
def narrow_programs(monkeypatch):
    """Sixteen columns a program, so that a row of 33 has three."""
    pytest.importorskip("triton")
    monkeypatch.setattr("fastsae_kernels.grouping.kernel._LEAST_COLS", 16)
    monkeypatch.setattr("fastsae_kernels.grouping.kernel._MOST_COLS", 16)


def moved(grad, device):
    if isinstance(grad, PairGrad):
        groups = LatentGroups(*(t.to(device) for t in grad.groups))
        return PairGrad(groups, grad.coef.to(device), grad.operand.to(device))
    if isinstance(grad, SubsetGrad):
        return SubsetGrad(grad.latents.to(device), grad.values.to(device))
    return DenseGrad(grad.values.to(device))


def updated(impl, grads, run=row_adam, start=None, copy=None, moments=torch.float32, **options):
    """[weight, exp_avg, exp_avg_sq, copy] after a step."""
    device = device_for(impl)
    state = start_of(copy=copy, moments=moments) if start is None else start
    state = [t.to(device, copy=True) for t in state]
    options = {"step": 3, "lr": 0.1, **options}
    if len(state) == 4:
        options["copy"] = state[3]
    if options.get("grad_scale") is not None:
        options["grad_scale"] = options["grad_scale"].to(device)
    weight, m, v = state[:3]
    run(weight, [moved(grad, device) for grad in grads], m, v, impl=impl, **options)
    return [t.cpu() for t in state]


def assert_close(found, expected, atol=2e-6):
    names = ("weight", "exp_avg", "exp_avg_sq", "copy")[: len(expected)]
    for name, a, b in zip(names, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        # bf16: a neighbour, where the fp32 numbers lie on either side of the border.
        rtol = 0.0 if a.dtype == torch.float32 else 2.0**-7
        assert torch.allclose(a.float(), b.float(), atol=atol, rtol=rtol), name


def test_eager_step_matches_reference():
    g = torch.randn(700, 9)
    found = []
    for impl in ("eager", "reference"):
        torch.manual_seed(2)
        weight, m, v = torch.randn(700, 9), torch.randn(700, 9), torch.rand(700, 9)
        row_adam(
            weight, [DenseGrad(g)], m, v, step=3, lr=0.1, grad_scale=torch.tensor(0.5), impl=impl
        )
        found.append((weight, m, v))
    for eager, reference in zip(*found, strict=True):
        assert torch.allclose(eager, reference, atol=1e-5)


OPTIONS = {
    "plain": {},
    "scale, fp16 copy": {"grad_scale": torch.tensor(0.3), "copy": torch.float16},
    "project": {"project": True},
    "renormalise, bf16 copy": {"renormalise": True, "copy": torch.bfloat16},
    "bf16 moments": {"moments": torch.bfloat16},
    "everything": {
        "grad_scale": torch.tensor(0.3),
        "project": True,
        "renormalise": True,
        "copy": torch.bfloat16,
        "moments": torch.bfloat16,
    },
}


@pytest.mark.parametrize("run", [row_adam, lazy_row_adam])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", LEAN)
def test_a_step_matches_the_reference(short_chunks, impl, name, run):
    grads = [pair_grad(), subset_grad(0, 2, 8)]
    expected = updated("reference", grads, run, **OPTIONS[name])
    found = updated(impl, grads, run, **OPTIONS[name])
    assert_close(found, expected)
    assert not torch.equal(found[0], start_of()[0])


def test_two_steps_alike_give_the_same_bits(short_chunks):
    grads = [pair_grad(), subset_grad(0, 2, 8)]
    first, second = (updated("triton", grads, **OPTIONS["everything"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", (*LEAN, "reference"))
def test_several_steps_give_the_numbers_of_torch_adam(short_chunks, impl):
    weight, m, v = (torch.zeros(12, 33) for _ in range(3))
    parameter = torch.nn.Parameter(weight.clone())
    adam = torch.optim.Adam([parameter], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    state = [weight, m, v]
    for step in range(1, 4):
        grads = [pair_grad(), pair_grad(dtype=torch.bfloat16), subset_grad(1, 8)]
        parameter.grad = torch.stack([grad.block(0, 12).float() for grad in grads]).sum(0)
        adam.step()
        state = updated(impl, grads, start=state, step=step, lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    assert torch.allclose(state[0], parameter, atol=1e-5)


@pytest.mark.parametrize("impl", LEAN)
def test_micro_batches_are_one_big_batch(short_chunks, impl):
    B, K, F, D = 20, 3, 12, 33
    acts, indices = torch.rand(B, K) + 0.1, torch.rand(B, F).topk(K).indices.int()
    acts[::4, 1], operand, coef = 0, torch.randn(B, D), torch.randn(B * K)

    def part(rows):
        groups = group_by_latent(SparseCode(acts[rows], indices[rows]), F)
        flat = coef.view(B, K)[rows].reshape(-1)
        return PairGrad(groups, flat[groups.pairs], operand[rows])

    whole = updated(impl, [part(slice(0, B))])
    parts = updated(impl, [part(slice(0, 7)), part(slice(7, 12)), part(slice(12, B))])
    assert_close(parts, whole)
    if impl == "triton":
        assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def mixtures():
    shared = pair_grad()
    dense = DenseGrad(torch.randn(12, 33))
    return {
        "nothing": [],
        "subset": [subset_grad(3, 5, 11)],
        "empty subset": [subset_grad(), shared],
        "subsets": [subset_grad(0, 3), subset_grad(3, 7, 11), subset_grad(7)],
        "dense": [dense],
        "dense and others": [dense, subset_grad(0, 3), shared, dense, pair_grad()],
        "one operand": [shared, PairGrad(shared.groups, -2 * shared.coef, shared.operand)],
    }


@pytest.mark.parametrize("name", mixtures())
@pytest.mark.parametrize("impl", LEAN)
def test_gradients_of_every_kind_add_up(short_chunks, impl, name):
    grads = mixtures()[name]
    for run in (row_adam, lazy_row_adam):
        expected = updated("reference", grads, run, copy=torch.bfloat16)
        assert_close(updated(impl, grads, run, copy=torch.bfloat16), expected)


@pytest.mark.parametrize("impl", LEAN)
def test_gradient_norm_matches_the_reference(short_chunks, impl):
    for grads in [[pair_grad()], *mixtures().values()]:
        device = device_for(impl)
        here = [moved(grad, device) for grad in grads]
        found = row_grad_norm(torch.zeros(12, 33, device=device), here, impl=impl)
        expected = row_grad_norm(torch.zeros(12, 33), grads, impl="reference")
        assert found.ndim == 0 and torch.allclose(found.cpu(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["scale, fp16 copy", "bf16 moments"])
@pytest.mark.parametrize("run", [row_adam, lazy_row_adam])
def test_blocks_of_columns_change_no_bit(short_chunks, request, run, name):
    grads = [pair_grad(), subset_grad(0, 2, 8)]
    whole = updated("triton", grads, run, **OPTIONS[name])
    request.getfixturevalue("narrow_programs")
    blocks = updated("triton", grads, run, **OPTIONS[name])
    assert all(torch.equal(a, b) for a, b in zip(blocks, whole, strict=True))
    assert_close(blocks, updated("reference", grads, run, **OPTIONS[name]))


def test_the_gradient_norm_adds_up_over_blocks_of_columns(short_chunks, narrow_programs):
    device, grads = device_for("triton"), [pair_grad(), subset_grad(0, 2, 8)]
    here = [moved(grad, device) for grad in grads]
    found = row_grad_norm(torch.zeros(12, 33, device=device), here, impl="triton")
    expected = row_grad_norm(torch.zeros(12, 33), grads, impl="reference")
    assert torch.allclose(found.cpu(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["project", "everything"])
@pytest.mark.parametrize("run", [row_adam, lazy_row_adam])
def test_rows_too_wide_for_registers_go_by_blocks(short_chunks, monkeypatch, run, name):
    monkeypatch.setattr("fastsae_kernels.optimizer.kernel.MAX_COLUMNS", 32)
    monkeypatch.setattr("fastsae_kernels.optimizer.blocks.WIDE_BYTES", 8 * 4 * 33)
    grads = [pair_grad(), subset_grad(0, 2, 8)]
    expected = updated("reference", grads, run, **OPTIONS[name])
    assert_close(updated("triton", grads, run, **OPTIONS[name]), expected)


@pytest.mark.parametrize("impl", LEAN)
def test_a_bias_is_one_column(impl):
    grads = [DenseGrad(torch.randn(50, 1)), DenseGrad(torch.randn(50, 1))]
    start = [torch.randn(50, 1), torch.randn(50, 1), torch.rand(50, 1)]
    assert_close(updated(impl, grads, start=start), updated("reference", grads, start=start))


@pytest.mark.parametrize("impl", LEAN)
def test_a_narrow_weight_is_widened_for_the_arithmetic(impl):
    start = [t.to(torch.bfloat16) for t in start_of()]
    grads = [pair_grad(dtype=torch.bfloat16)]
    expected = updated("reference", grads, start=start)
    assert_close(updated(impl, grads, start=start), expected)


@pytest.mark.parametrize("impl", LEAN)
def test_nan_stays_in_the_rows_it_belongs_to(impl):
    grad = pair_grad()
    grad.operand[0] = float("nan")
    hit = grad.block(0, 12).isnan().any(1)
    weight, m, v = updated(impl, [grad], moments=torch.bfloat16)
    assert hit.any() and not hit.all()
    assert all(torch.equal(t.isnan().all(1), hit) for t in (weight, m, v))


@pytest.mark.parametrize("impl", (*LEAN, "reference"))
def test_lazy_rows_are_those_of_torch_sparse_adam_and_not_of_adam(impl):
    # A gradient as small as eps tells where eps is added.
    first, second = subset_grad(1, 4, 9), subset_grad(1, 6)
    grads = [SubsetGrad(grad.latents, 1e-7 * grad.values) for grad in (first, second)]
    start = start_of()[0]
    parameter = torch.nn.Parameter(start.clone())
    sparse = torch.optim.SparseAdam([parameter], lr=0.02)
    state = [start, torch.zeros_like(start), torch.zeros_like(start)]
    lazy, full = state, state
    for step, grad in enumerate(grads, 1):
        parameter.grad = torch.sparse_coo_tensor(
            grad.latents[None], grad.values, start.shape, check_invariants=True
        )
        sparse.step()
        lazy = updated(impl, [grad], lazy_row_adam, start=lazy, step=step, lr=0.02)
        full = updated(impl, [grad], start=full, step=step, lr=0.02)
    assert torch.allclose(lazy[0], parameter, atol=1e-7)
    # Touched in the first step alone, row 4 rests in the second; Adam's momentum carries it on.
    alone = updated(impl, grads[:1], lazy_row_adam, start=state, step=1, lr=0.02)
    for now, before, moving in zip(lazy, alone, full, strict=True):
        assert torch.equal(now[4], before[4]) and not torch.equal(moving[4], before[4])
    untouched = [row for row in range(12) if row not in (1, 4, 6, 9)]
    assert torch.equal(lazy[0][untouched], start[untouched])


def test_a_bf16_second_moment_follows_a_constant_gradient():
    start = [torch.zeros(2, 64), torch.zeros(2, 64), torch.full((2, 64), 0.5)]
    state = [start[0], *(t.bfloat16() for t in start[1:])]
    nearest = torch.tensor(0.5).bfloat16()
    for step in range(1, 201):
        state = updated("eager", [DenseGrad(torch.ones(2, 64))], start=state, step=step)
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    assert nearest == 0.5  # 0.0005 is less than half of what separates bf16 numbers there
    assert abs(state[2].float().mean() - (1 - 0.5 * 0.999**200)) < 5e-3


def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_no_number():
    bits = hash_bits(torch.arange(1000), 200, step=5)
    assert torch.equal(bits, hash_bits(torch.arange(1000), 200, step=5))
    assert bits.unique().numel() > 0.9999 * bits.numel()
    assert not torch.equal(bits, hash_bits(torch.arange(1000), 200, step=6))
    assert torch.equal(bits[7:9], hash_bits(torch.tensor([7, 8]), 200, step=5))
    values = torch.full(bits.shape, 1 + 0.3 * 2.0**-7)
    for half in (bits & 0xFFFF, bits >> 16):
        up = stochastic_round(values, half) > 1
        assert abs(up.float().mean() - 0.3) < 0.005
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1.5, -2.0])
    special = torch.cat([special, torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float)])
    found = stochastic_round(special, torch.tensor([0xFFFF]))
    assert torch.equal(found.float().nan_to_num(7), special.nan_to_num(7))


def test_bf16_moments_have_the_same_bits_in_kernel_and_eager():
    grads = [DenseGrad(torch.randn(12, 33))]
    eager, triton = (updated(impl, grads, moments=torch.bfloat16) for impl in ("eager", "triton"))
    for name in (1, 2):  # rounding of the fp32 numbers may still tip one or another
        assert (eager[name] == triton[name]).float().mean() > 0.99


@pytest.mark.parametrize("impl", (*LEAN, "reference"))
def test_several_targets_move_as_in_torch_adam(impl):
    device = device_for(impl)
    x, acts = torch.randn(9, 3, 5, device=device), torch.rand(9, 2, device=device)
    indices = torch.rand(9, 12, device=device).topk(2).indices.int()
    loss = lambda W: mse_l1_loss(x, SparseCode(acts, indices), W, torch.zeros_like(x[0])).mse
    weight, plain = (torch.ones(12, 3, 5, device=device, requires_grad=True) for _ in range(2))
    loss(plain).backward()
    torch.optim.Adam([plain], lr=0.02).step()
    assert plain.grad is not None
    grads = collect_row_grads(weight)
    loss(weight).backward()
    moments = [torch.zeros(12, 3, 5, device=device) for _ in range(2)]
    assert torch.allclose(row_grad_norm(weight, grads, impl=impl), plain.grad.norm())
    row_adam(weight, grads, *moments, step=1, lr=0.02, impl=impl)
    assert torch.allclose(weight, plain, atol=1e-6) and not weight.allclose(torch.ones_like(weight))
