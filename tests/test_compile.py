"""torch.compile sees every op, forward and backward, without a graph break."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastsae_kernels import Impl, SparseCode, aux_topk, mse_l1_loss, topk_encode
from fastsae_kernels.auxk.ops import _aux_topk_sums
from fastsae_kernels.decode.ops import _gather_sum, _pair_dots
from fastsae_kernels.grouping.eager import group_by_latent
from fastsae_kernels.grouping.ops import _segment_sum, _segment_total, _weighted_row_sum
from fastsae_kernels.loss.ops import _mse_l1_rows
from fastsae_kernels.topk.ops import _select_topk
from parity import DEVICE, lattice

IMPLS = [Impl.EAGER, Impl.TRITON]
F = 256  # as few latents as the kernels take with k = 4
IGNORED = "ignore::DeprecationWarning"  # raised by torch.compile over itself


def check_that_kernels_run(impl, k):
    if impl is Impl.TRITON:
        kernel = pytest.importorskip("fastsae_kernels.topk.kernel")
        assert kernel.fits(F, k)


def step_loss(x, dead, weights, impl):
    """A TopK SAE's training loss on the ops themselves."""
    W_enc, b_enc, W_dec, b_dec = weights
    norms = W_dec.norm(dim=1).detach()
    code = topk_encode(x, W_enc, b_enc, 4, b_pre=b_dec, scale=norms, impl=impl)
    unscaled = SparseCode(code.acts / norms[code.indices.long()], code.indices, code.groups)
    mse, l1, err = mse_l1_loss(x, unscaled, W_dec, b_dec, norms, impl=impl)
    if dead is not None:
        mse = mse + aux_topk(x, err, dead, W_enc, b_enc, W_dec, b_pre=b_dec, impl=impl)
    return mse + 0.1 * l1


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("aux", [False, True], ids=["without auxk", "with auxk"])
@pytest.mark.parametrize("impl, backend", [(Impl.EAGER, "inductor"), (Impl.TRITON, "aot_eager")])
def test_a_step_compiles_as_one_graph_and_keeps_its_gradients(impl, backend, aux):
    check_that_kernels_run(impl, 4)
    shapes = (16, F), (F,), (F, 16), (16,)
    weights = [torch.randn(*shape, device=DEVICE).requires_grad_() for shape in shapes]
    x = torch.randn(12, 16, device=DEVICE)
    dead = torch.arange(F, device=DEVICE) % 3 == 0 if aux else None
    torch._dynamo.reset()
    compiled = torch.compile(step_loss, fullgraph=True, backend=backend)
    found = []
    for run in (step_loss, compiled):
        total = run(x, dead, weights, impl)
        found.append([total, *torch.autograd.grad(total, weights)])
    for before, after in zip(*found, strict=True):
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


def test_an_sae_compiles_as_one_graph():
    # In a process of its own: here the shapes of fastsae's signatures are checked at each call,
    # which torch.compile cannot trace.
    script = """
import torch, fastsae
sae = fastsae.TopKSAE(fastsae.TopKConfig(d_in=16, d_sae=96, k=4))
x, dead = torch.randn(12, 16), torch.arange(96) % 3 == 0
total = torch.compile(lambda: sae.loss(x, dead).total, fullgraph=True, backend="aot_eager")()
total.backward()
assert torch.allclose(total, sae.loss(x, dead).total)
assert all(p.grad is not None for p in sae.parameters())
assert torch.compile(sae, fullgraph=True, backend="aot_eager")(x).shape == x.shape
"""
    root = Path(__file__).parent.parent
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'kernels')!r}]"
    subprocess.run([sys.executable, "-c", path + script], check=True)


def arguments(dtype):
    x, W_enc, W_dec = (lattice(*shape).to(dtype) for shape in ((6, 8), (8, F), (F, 8)))
    b_enc = torch.randperm(F, device=DEVICE).to(dtype)
    acts, indices = _select_topk(x, W_enc, b_enc, 3, None, False, "eager")
    groups = group_by_latent(None, indices, acts, F)
    coef = acts.reshape(-1)[groups.pairs]
    dead = torch.arange(F, device=DEVICE) % 2 == 0
    offsets = torch.arange(0, 19, 3, dtype=torch.int32, device=DEVICE)
    ragged = offsets, indices.reshape(-1), acts.reshape(-1)
    b_dec, err = x[0].clone(), x.clone()
    return [
        (_select_topk, (x, W_enc, b_enc, 3, None, False)),
        (_select_topk, (x, W_enc, b_enc, 3, b_enc.abs(), True)),
        (_gather_sum, (None, indices, acts, W_dec)),
        (_gather_sum, (*ragged, W_dec)),
        (_pair_dots, (None, indices, x, W_dec)),
        (_pair_dots, (offsets, indices.reshape(-1), x, W_dec)),
        (_segment_sum, (groups.rows, groups.offsets, coef, x)),
        (_segment_total, (groups.rows, groups.offsets, coef)),
        (_weighted_row_sum, (W_dec, b_enc)),
        (_mse_l1_rows, (x, None, indices, acts, W_dec, b_dec, None, True)),
        (_mse_l1_rows, (x, *ragged, W_dec, b_dec, b_enc, False)),
        (_aux_topk_sums, (x, err, dead, W_enc, b_enc, W_dec, b_dec, None, False)),
    ]


@pytest.mark.filterwarnings(IGNORED)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", range(len(arguments(torch.float32))))
def test_registered_ops_pass_opcheck(number, impl):
    check_that_kernels_run(impl, 3)
    op, args = arguments(torch.float32)[number]
    torch.library.opcheck(op, (*args, impl.value))
