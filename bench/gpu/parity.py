"""Real sizes against fp64: the ops, and offsets beyond 2^31 elements."""

import math

import torch
from torch import Tensor

from bench.cases import Case, real_rows, rows
from bench.gpu import truth
from bench.gpu.harness import (
    DEVICE,
    DRY,
    Report,
    Scale,
    dictionary,
    free_memory,
    gibibytes,
    normal,
    rough,
)
from fastsae_kernels import (
    Impl,
    RaggedCode,
    SparseCode,
    aux_topk,
    batch_topk_encode,
    group_by_latent,
    mse_l1_loss,
    row_adam,
    sparse_decode,
    threshold_encode,
    topk_encode,
)
from fastsae_kernels._row_grads import PairGrad
from fastsae_kernels.decode.ops import pair_dots
from fastsae_kernels.grouping.ops import segment_sum, segment_total

SUMS = 1e-4
"""Relative error allowed to fp32 sums of exact products, also those of a matrix unit."""
SAMPLED = 256


def check_code(
    report: Report,
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    code: SparseCode,
    slack: float = SUMS,
) -> None:
    """Hold a code of rows x [n, D] to the fp64 top-k; weight [F, D] as the product reads it."""
    values, indices = truth.largest(x, weight, bias, code.acts.shape[1])
    chosen = code.indices.long()
    in_order = bool((code.acts.diff(dim=1) <= 0).all())
    distinct = bool((chosen.sort(dim=1).values.diff(dim=1) > 0).all())
    inside = bool(((chosen >= 0) & (chosen < len(weight))).all())
    if not inside:
        return report.check(name, False, indices_inside=inside)
    value_error = rough(code.acts, values)
    place_error = rough(truth.scores_at(x, weight, bias, chosen), code.acts.double())
    both = torch.cat([chosen, indices], 1).sort(dim=1).values
    shared = int((both.diff(dim=1) == 0).sum())
    report.check(
        name,
        in_order and distinct and max(value_error, place_error) <= slack,
        value_error=value_error,
        score_at_index_error=place_error,
        flipped_pairs=chosen.numel() - shared,
        pairs=chosen.numel(),
        in_order=in_order,
        distinct=distinct,
    )


@torch.no_grad()
def encode(scale: Scale, report: Report) -> None:
    case = scale.parity
    x, weight = rows(case).to(DEVICE), dictionary(case.F, case.D, seed=1)
    bias = 0.1 * normal(case.F, seed=2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        few = x.to(dtype) if dtype == torch.bfloat16 else x[:SAMPLED].to(dtype)
        cheap = weight.to(dtype)
        for k in {1, case.K}:
            code = topk_encode(few, weight.t(), bias, k, W_compute=cheap.t(), impl=Impl.TRITON)
            name = f"topk_encode {str(dtype)[6:]} B={len(few)} D={case.D} F={case.F} K={k}"
            check_code(report, name, few, cheap, bias, code)
    # Rows whose k largest all lie side by side open as many groups as there can be. Rows of zeros
    # have exactly the bias for scores.
    ramp = torch.arange(case.F, device=DEVICE, dtype=torch.float32)
    half, few = weight.bfloat16(), torch.zeros_like(x[:SAMPLED], dtype=torch.bfloat16)
    for name, scores in (("rising", ramp), ("falling", ramp.flip(0)), ("tied", ramp // 512)):
        code = topk_encode(few, half.t(), scores, case.K, impl=Impl.TRITON)
        check_code(report, f"topk_encode, {name} columns", few, half, scores, code, slack=0.0)
    few = x[:SAMPLED].bfloat16()
    few[3] = math.nan
    code = topk_encode(few, half.t(), bias, case.K, impl=Impl.TRITON)
    lost = bool(code.acts[3].isnan().all() and not code.acts[[0, 1, 2, 4]].isnan().any())
    report.check("topk_encode, a row of NaN stays NaN and alone", lost)


@torch.no_grad()
def free_slots(scale: Scale, report: Report) -> None:
    """Rows whose free slots wait for open groups, before rows that have all of their entries.

    With the fewest latents that the kernels take.
    """
    for k, d_sae in ((17, 1100), (18, 1200)):
        ramp = torch.arange(d_sae, device=DEVICE, dtype=torch.float32)
        noise = normal(d_sae, seed=14)
        late = torch.where(ramp >= d_sae - 40, ramp, noise.abs())
        twice = noise.repeat_interleave(2)[:d_sae]
        few = torch.where(ramp % 401 == 5, ramp, -ramp)
        weight = torch.stack([late, twice] * 4 + [few, late, twice, few] * 2, 1)
        x, bias = torch.eye(16, device=DEVICE), torch.zeros_like(ramp)
        code = topk_encode(x, weight.t(), bias, k, impl=Impl.TRITON)
        name = f"topk_encode, free slots, F={d_sae} K={k}"
        check_code(report, name, x, weight, bias, code, slack=0.0)


@torch.no_grad()
def ragged_encodes(scale: Scale, report: Report) -> None:
    """One threshold for a batch, found by the encode and then given to the other one."""
    case = scale.parity
    x, weight = rows(case)[:1024].to(DEVICE), dictionary(case.F, case.D, seed=1)
    bias, n_kept = 0.1 * normal(case.F, seed=2), case.K * len(x)
    for dtype in (torch.bfloat16, torch.float32):
        few, cheap = x.to(dtype), weight.to(dtype)
        scores = (few.double() @ cheap.double().t() + bias.double()).relu()
        limit = float(scores.view(-1).topk(n_kept, sorted=False).values.min())
        name = f"{str(dtype)[6:]} B={len(x)} D={case.D} F={case.F}"
        arguments = (few, weight.t(), bias)
        options = {"W_compute": cheap.t(), "impl": Impl.TRITON}
        code = batch_topk_encode(*arguments, case.K, **options)
        check_ragged(report, f"batch_topk_encode {name}", code, scores, limit, n_kept)
        code = threshold_encode(*arguments, threshold=limit, **options)
        check_ragged(report, f"threshold_encode {name}", code, scores, limit, len(code.acts))


def check_ragged(
    report: Report, name: str, code: RaggedCode, scores: Tensor, limit: float, n_kept: int
) -> None:
    """Hold a code to the fp64 `scores` [B, F] above a limit, which may move by a rounding error."""
    entry_rows, latents = code.rows().long(), code.indices.long()
    in_order = bool(((entry_rows * scores.shape[1] + latents).diff() > 0).all())
    found, slack = scores[entry_rows, latents], SUMS * float(scores.max())
    missing = int((scores > limit + slack).sum() - (found > limit + slack).sum())
    too_low = int((found < limit - slack).sum())
    error = rough(code.acts, found)
    report.check(
        name,
        in_order and len(found) == n_kept and missing == too_low == 0 and error <= SUMS,
        score_at_index_error=error,
        pairs=len(found),
        missing=missing,
        too_low=too_low,
        in_order=in_order,
    )


def dead_latents(scale: Scale, report: Report) -> None:
    """AuxK over so many dead latents that they are selected by the kernels."""
    case = scale.parity
    x, err = rows(case)[:SAMPLED].to(DEVICE), normal(min(case.B, SAMPLED), case.D, seed=15)
    W_dec = dictionary(case.F, case.D, seed=1)
    weights = [W_dec.clone().t(), 0.1 * normal(case.F, seed=2), W_dec]
    dead = torch.arange(case.F, device=DEVICE) % 3 == 0
    found = []
    for dtype, impl in ((torch.float32, Impl.TRITON), (torch.float64, Impl.REFERENCE)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in weights]
        loss = aux_topk(x.to(dtype), err.to(dtype), dead, *leaves, impl=impl)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    name = f"aux_topk B={len(x)} D={case.D} dead={int(dead.sum())}"
    (loss, *grads), (exact, *exact_grads) = found
    _close(report, f"{name}: loss", loss, exact)
    # A selection that flips at rounding is another row of a gradient: by norms, not by elements.
    for leaf, grad, truly in zip(("W_enc", "b_enc", "W_dec"), grads, exact_grads, strict=True):
        apart = float((grad.double() - truly).norm() / truly.norm())
        report.check(f"{name}: d {leaf}", apart <= 1e-2, error=apart)


@torch.no_grad()
def encode_real_rows(scale: Scale, report: Report) -> None:
    """Heavy-tailed rows and latents that are such rows themselves."""
    case = scale.training
    x = real_rows().to(DEVICE)
    x = x if DEVICE == "cuda" else x[: case.B]
    weight = x[torch.arange(case.F, device=DEVICE) % len(x)]
    weight = weight / weight.norm(dim=1, keepdim=True) + dictionary(case.F, case.D, seed=3)
    half, bias = weight.bfloat16(), torch.zeros(case.F, device=DEVICE)
    code = topk_encode(x.bfloat16(), half.t(), bias, case.K, impl=Impl.TRITON)
    check_code(report, "topk_encode of real rows", x.bfloat16(), half, bias, code)


def sparse_ops(scale: Scale, report: Report) -> None:
    case = scale.memory
    x = rows(case).to(DEVICE)
    W_dec, b_dec = dictionary(case.F, case.D, seed=4), normal(case.D, seed=5)
    code = skewed_code(case)
    some = torch.arange(SAMPLED, device=DEVICE) * (case.B - 1) // (SAMPLED - 1)
    part = SparseCode(code.acts[some], code.indices[some])
    for dtype in (torch.float32, torch.bfloat16):
        weight, name = W_dec.to(dtype), f"{str(dtype)[6:]} at {case.name}"
        x_hat = sparse_decode(code, weight, b_dec, impl=Impl.TRITON)
        exact = truth.decoded(part, weight) + b_dec.double()
        _close(report, f"sparse_decode {name}", x_hat[some], exact)
        acts = code.acts.clone().requires_grad_()
        made = SparseCode(acts, code.indices)
        target = x.to(dtype)
        found = mse_l1_loss(target, made, weight, b_dec, impl=Impl.TRITON)
        err = exact - target[some].double()
        _close(report, f"mse_l1_loss {name}: err", found.err[some], err)
        mean = found.err.double().square().sum(1).mean()
        _close(report, f"mse_l1_loss {name}: mse of its err", found.mse.detach(), mean)
        _close(
            report, f"mse_l1_loss {name}: l1", found.l1.detach(), code.acts.double().sum(1).mean()
        )
        (d_acts,) = torch.autograd.grad(found.mse, acts)
        picked = weight[part.indices.long()].double()
        exact_d = torch.einsum("nkd,nd->nk", picked, err) * (2 / case.B)
        _close(report, f"mse_l1_loss {name}: d acts", d_acts[some], exact_d)
        dots = pair_dots(None, code.indices, x, weight, Impl.TRITON)
        exact_dots = torch.einsum("nkd,nd->nk", picked, x[some].double())
        _close(report, f"pair_dots {name}", dots[some], exact_dots)
    _segments(report, case, code, x)


def _segments(report: Report, case: Case, code: SparseCode, x: Tensor) -> None:
    groups = group_by_latent(code, case.F, impl=Impl.TRITON)
    counts = code.indices[code.acts != 0].long().bincount(minlength=case.F)
    report.check("group_by_latent: counts", torch.equal(groups.counts().long(), counts))
    coef = code.acts.reshape(-1)[groups.pairs.long()]
    latents = [*counts.topk(4).indices.tolist(), *range(0, case.F, max(1, case.F // 60))]
    weight = dictionary(case.F, case.D, seed=6)
    grads = [PairGrad(groups, coef, x)]
    exact = torch.stack([truth.segment(groups, coef, x, latent) for latent in latents])
    found = segment_sum(groups, coef, x, Impl.TRITON)
    _close(report, f"segment_sum, the longest {int(counts.max())} pairs", found[latents], exact)
    total = segment_total(groups, coef, Impl.TRITON)
    first = groups.offsets.long()[latents]
    last = groups.offsets.long()[[latent + 1 for latent in latents]]
    pairs = [coef[a:b].double().sum() for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    _close(report, "segment_total", total[latents], torch.stack(pairs))
    del found
    before = weight[latents].double()
    moments = [torch.zeros_like(weight) for _ in range(2)]
    copy = torch.empty_like(weight, dtype=torch.bfloat16)
    for step in (1, 2):
        row_adam(weight, grads, *moments, step=step, lr=1e-2, copy=copy, impl=Impl.TRITON)
    # The gradient is the same in both steps, so that the corrected moments are g and g^2.
    moved = before - 2e-2 * exact / (exact.abs() + 1e-8)
    _close(report, "row_adam: weights", weight[latents], moved)
    _close(report, "row_adam: second moments", moments[1][latents], exact**2 * (1 - 0.999**2))
    _rounded(report, "row_adam: copy", copy, weight)


def skewed_code(case: Case) -> SparseCode:
    """Latent 0 fires on every row, the next on half of them, and so on; the others at random."""
    indices = torch.randint(16, case.F, (case.B, case.K), device=DEVICE, dtype=torch.int32)
    indices = indices.sort(dim=1).values
    repeated = torch.zeros_like(indices, dtype=torch.bool)
    repeated[:, 1:] = indices[:, 1:] == indices[:, :-1]
    acts = normal(case.B, case.K, seed=7).abs().masked_fill(repeated, 0.0)
    row = torch.arange(case.B, device=DEVICE)
    for latent in range(min(4, case.K)):
        often = row % 2**latent == 0
        indices[:, latent] = torch.where(often, latent, indices[:, latent])
        acts[:, latent] = torch.where(often, 1.0 + row % 7, acts[:, latent])
    return SparseCode(acts, indices)


def _rounded(report: Report, name: str, copy: Tensor, master: Tensor) -> None:
    # The interpreter cuts bits off where a GPU rounds to nearest.
    same = torch.equal(copy, master.bfloat16()) or (DRY and rough(copy, master.double()) < 2**-7)
    report.check(name, same)


def _close(report: Report, name: str, found: Tensor, exact: Tensor) -> None:
    error = rough(found.detach(), exact)
    report.check(name, error <= SUMS, error=error)


def _fits(report: Report, case: Case, n_bytes: float) -> bool:
    fits = gibibytes() > n_bytes / 2**30 + 2
    if not fits:
        report.note(f"left out for want of memory: {case.name} takes {n_bytes / 2**30:.0f} GiB")
    return fits


def far_weights(scale: Scale, report: Report) -> None:
    """F * D > 2^31: encode, decode, segment sums and the update at both ends of a dictionary."""
    case = scale.wide
    if not _fits(report, case, 20 * case.F * case.D):
        return
    x = rows(case).to(DEVICE).bfloat16()
    weight = dictionary(case.F, case.D, seed=8, dtype=torch.bfloat16)
    bias = torch.zeros(case.F, device=DEVICE)
    report.note(f"{case.F * case.D / 2**31:.2f} x 2^31 weights")
    with torch.no_grad():
        code = topk_encode(x, weight.t(), bias, case.K, impl=Impl.TRITON)
        check_code(report, "far weights: topk_encode", x, weight, bias, code)
        # Rows that are not aligned have no descriptors: pointers are checked as well.
        odd_x, odd = x[:, 1:].contiguous(), weight[:, 1:]
        code_of_odd = topk_encode(odd_x, odd.t(), bias, case.K, impl=Impl.TRITON)
        check_code(report, "far weights: topk_encode, unaligned", odd_x, odd, bias, code_of_odd)
        del odd_x, odd, code_of_odd
        last = case.F - 1 - torch.arange(case.K, device=DEVICE, dtype=torch.int32)
        ends = SparseCode(code.acts + 1, last.expand_as(code.indices).contiguous())
        x_hat = sparse_decode(ends, weight, None, impl=Impl.TRITON)
        _close(report, "far weights: sparse_decode", x_hat, truth.decoded(ends, weight))
        zero = torch.zeros(case.D, device=DEVICE)
        err = mse_l1_loss(x, ends, weight, zero, impl=Impl.TRITON).err
        exact = truth.decoded(ends, weight) - x.double()
        _close(report, "far weights: mse_l1_loss", err, exact)
        dots = pair_dots(None, ends.indices, x.float(), weight, Impl.TRITON)
        picked = weight[ends.indices.long()].double()
        exact = torch.einsum("nkd,nd->nk", picked, x.double())
        _close(report, "far weights: pair_dots", dots, exact)
        groups = group_by_latent(ends, case.F)
        coef = ends.acts.reshape(-1)[groups.pairs.long()]
        operand = x.float()
        summed = segment_sum(groups, coef, operand, Impl.TRITON)
        at = last[:8].tolist()
        exact = torch.stack([truth.segment(groups, coef, operand, latent) for latent in at])
        _close(report, "far weights: segment_sum", summed[at], exact)
        report.check("far weights: rows without a pair", not bool(summed[0].any()))
        del summed
        free_memory()
        master = weight.float()
        before = master[at].double()
        moments = [torch.zeros_like(master) for _ in range(2)]
        grads = [PairGrad(groups, coef, operand)]
        row_adam(master, grads, *moments, step=1, lr=1e-2, copy=weight, impl=Impl.TRITON)
        moved = before - 1e-2 * exact / (exact.abs() + 1e-8)
        _close(report, "far weights: row_adam", master[at], moved)
        _rounded(report, "far weights: copy", weight[at], master[at])


@torch.no_grad()
def far_groups(scale: Scale, report: Report) -> None:
    """Rows x groups of latents > 2^31."""
    case = scale.tall
    if not _fits(report, case, 10 * case.B * (case.F // 64)):
        return
    x = normal(case.B, case.D, seed=9, dtype=torch.bfloat16)
    weight = dictionary(case.F, case.D, seed=10, dtype=torch.bfloat16)
    bias = torch.zeros(case.F, device=DEVICE)
    report.note(f"{case.B * (case.F // 64) / 2**31:.2f} x 2^31 groups")
    code = topk_encode(x, weight.t(), bias, case.K, impl=Impl.TRITON)
    for name, some in (("first", slice(0, 32)), ("last", slice(case.B - 32, case.B))):
        part = SparseCode(code.acts[some], code.indices[some])
        check_code(report, f"far groups: {name} rows", x[some], weight, bias, part)


@torch.no_grad()
def far_rows(scale: Scale, report: Report) -> None:
    """B * D > 2^31."""
    case = scale.long
    if not _fits(report, case, 12 * case.B * case.D):
        return
    weight = dictionary(case.F, case.D, seed=11, dtype=torch.bfloat16)
    x = normal(case.B, case.D, seed=12, dtype=torch.bfloat16)
    shape = (case.B, case.K)
    indices = torch.randint(case.F, shape, device=DEVICE, dtype=torch.int32)
    code = SparseCode(normal(*shape, seed=13).abs(), indices)
    report.note(f"{case.B * case.D / 2**31:.2f} x 2^31 numbers")
    some = slice(max(0, case.B - 128), case.B)
    part = SparseCode(code.acts[some], indices[some])
    exact = truth.decoded(part, weight)
    x_hat = sparse_decode(code, weight, None, impl=Impl.TRITON)
    _close(report, "far rows: sparse_decode", x_hat[some], exact)
    dots = pair_dots(None, indices, x_hat, weight, Impl.TRITON)
    picked = weight[part.indices.long()].double()
    _close(report, "far rows: pair_dots", dots[some], torch.einsum("nkd,nd->nk", picked, exact))
    del x_hat, dots
    free_memory()
    zero = torch.zeros(case.D, device=DEVICE)
    err = mse_l1_loss(x, code, weight, zero, impl=Impl.TRITON).err
    _close(report, "far rows: mse_l1_loss", err[some], exact - x[some].double())
    groups = group_by_latent(code, case.F)
    coef = code.acts.reshape(-1)[groups.pairs.long()]
    summed = segment_sum(groups, coef, err, Impl.TRITON)
    at = [0, case.F - 1]
    exact = torch.stack([truth.segment(groups, coef, err, latent) for latent in at])
    _close(report, "far rows: segment_sum", summed[at], exact)
