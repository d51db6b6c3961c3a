"""group_by_latent, sparse_decode and mse_l1_loss."""

from typing import Any

import pytest
import torch

from fastsae_kernels import (
    RaggedCode,
    SparseCode,
    batch_topk_encode,
    group_by_latent,
    index_checks,
    mse_l1_loss,
    sparse_decode,
    threshold_encode,
    workspace,
)
from fastsae_kernels.threshold import jumprelu_encode
from parity import CASES, DEVICE, SHAPES, Shape, all_in, check_parity, lattice, weights


def code_of(shape, repeated=False):
    """A code with some acts of 0; `repeated` makes all rows share their latents."""
    n = 1 if repeated else shape.B
    indices = torch.stack([torch.randperm(shape.F, device=DEVICE)[: shape.K] for _ in range(n)])
    acts = lattice(shape.B, shape.K).abs()
    return acts, indices.expand(shape.B, -1).int().contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_match_reference(shape):
    acts, indices = code_of(shape)
    code = SparseCode(acts, indices)
    eager = group_by_latent(code, shape.F, impl="eager")
    reference = group_by_latent(code, shape.F, impl="reference")
    live = int(reference.offsets[-1])
    assert torch.equal(eager.offsets, reference.offsets)
    assert torch.equal(eager.pairs[:live], reference.pairs[:live])
    assert torch.equal(eager.rows[:live], reference.rows[:live])
    assert live == int((acts != 0).sum())
    dense = code.to_dense(shape.F)
    assert torch.equal(eager.counts().long(), (dense != 0).sum(0))


@pytest.mark.parametrize("repeated", [False, True], ids=["spread", "repeated"])
@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_decode_matches_reference(shape, dtype, impl, repeated):
    acts, indices = code_of(shape, repeated)
    inputs = weights(shape) | {"acts": acts}
    mix = lattice(shape.B, shape.D)

    def losses(i, impl):
        x_hat = sparse_decode(SparseCode(i["acts"], indices), i["W_dec"], i["b_dec"], impl=impl)
        return {"x_hat": x_hat, "loss": (x_hat * mix).sum()}

    wide = torch.promote_types(dtype, torch.float32)
    check_parity(losses, inputs, all_in(dtype) | {"acts": wide}, impl)


def ragged_code_of(shape):
    """Rows of 0 to K entries, some of them 0: acts and the rest of the code."""
    acts, indices = code_of(shape)
    counts = torch.arange(shape.B, device=DEVICE) % (shape.K + 1)
    kept = torch.arange(shape.K, device=DEVICE) < counts[:, None]
    row_offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return acts[kept], row_offsets, indices[kept]


def loss_terms(i, code, impl):
    optional = {"row_weight": i["row_weight"].detach()} if "row_weight" in i else {}
    found = mse_l1_loss(
        i["x"], code, i["W_dec"], i["b_dec"], i.get("l1_weight"), impl=impl, **optional
    )
    both = found.mse + 0.25 * found.l1
    return {"mse": found.mse, "l1": found.l1, "err": found.err, "both": both}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_each_loss_term_matches_reference(shape, dtype, impl, ragged, weighted):
    acts, *rest = ragged_code_of(shape) if ragged else code_of(shape)
    signed = acts * torch.where(torch.rand_like(acts) < 0.2, -1.0, 1.0)
    inputs = weights(shape) | {"acts": signed}
    if weighted:
        inputs["l1_weight"] = lattice(shape.F).abs()
        inputs["row_weight"] = lattice(shape.B).abs() + 0.125

    def losses(i, impl):
        if ragged:
            return loss_terms(i, RaggedCode(rest[0], rest[1], i["acts"]), impl)
        return loss_terms(i, SparseCode(i["acts"], rest[0]), impl)

    wide = torch.promote_types(dtype, torch.float32)
    check_parity(losses, inputs, all_in(dtype) | {"acts": wide, "row_weight": wide}, impl)


@pytest.mark.parametrize("impl, dtype, shape", CASES)
def test_several_targets_match_reference(shape, dtype, impl):
    """W_dec [F, T, D_out], D_out other than D: what transcoders and crosscoders decode to."""
    acts, indices = code_of(shape)
    inputs = {
        "x": lattice(shape.B, 3, 5),
        "acts": acts,
        "W_dec": lattice(shape.F, 3, 5),
        "b_dec": lattice(3, 5),
    }

    def losses(i, impl):
        code = SparseCode(i["acts"], indices)
        x_hat = sparse_decode(code, i["W_dec"], i["b_dec"], impl=impl)
        assert x_hat.shape == (shape.B, 3, 5)
        return loss_terms(i, code, impl) | {"x_hat": x_hat, "decoded": x_hat.sum()}

    wide = torch.promote_types(dtype, torch.float32)
    check_parity(losses, inputs, all_in(dtype) | {"acts": wide}, impl)


def test_a_row_of_weight_zero_is_left_out():
    shape = Shape(6, 5, 20, 3)
    acts, indices = code_of(shape)
    i = weights(shape)
    i["x"][1], acts[4] = torch.nan, torch.nan
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64, device=DEVICE)
    kept = mask.bool()
    whole, part = (
        mse_l1_loss(x, SparseCode(a, j), i["W_dec"], i["b_dec"], row_weight=w)
        for x, a, j, w in (
            (i["x"], acts, indices, mask),
            (i["x"][kept], acts[kept], indices[kept], None),
        )
    )
    assert torch.allclose(whole.mse, part.mse) and torch.allclose(whole.l1, part.l1)


def test_gather_in_blocks_equals_sampled_product():
    from fastsae_kernels.decode import eager

    indices = torch.randint(0, 50, (4000, 6))
    rows, weight = torch.randn(4000, 8), torch.randn(50, 8)
    with workspace(1 << 20):
        dots = eager._gathered_products(None, indices, rows, weight)
    sampled = eager.pair_dots(None, indices, rows, weight)
    assert torch.allclose(dots, sampled, atol=1e-5)


def test_ragged_decode_matches_dense():
    inputs = {k: v.float() for k, v in weights(Shape(13, 10, 80, 1)).items()}
    code = threshold_encode(inputs["x"], inputs["W_enc"], inputs["b_enc"], threshold=0.5)
    dense = code.to_dense(80)
    expected = dense @ inputs["W_dec"] + inputs["b_dec"]
    for impl in ("eager", "reference"):
        x_hat = sparse_decode(code, inputs["W_dec"], inputs["b_dec"], impl=impl)
        assert torch.allclose(x_hat, expected, atol=1e-5)


def test_ragged_code_without_entries_decodes_to_the_bias():
    no_indices = torch.zeros(0, dtype=torch.int32)
    empty = RaggedCode(torch.zeros(4, dtype=torch.int32), no_indices, torch.zeros(0))
    bias = torch.tensor([1.0, 2.0])
    assert torch.equal(sparse_decode(empty, torch.ones(5, 2), bias), bias.repeat(3, 1))


def test_nan_reaches_the_loss():
    code = SparseCode(torch.tensor([[1.0, torch.nan]]), torch.tensor([[0, 1]], dtype=torch.int32))
    assert mse_l1_loss(torch.ones(1, 3), code, torch.ones(4, 3), torch.zeros(3)).mse.isnan()


def test_bad_shapes_are_refused():
    code = SparseCode(torch.ones(2, 3), torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"acts and indices must have the same shape \[\.\.\., K\]"
    ):
        sparse_decode(code, torch.ones(4, 3))
    with pytest.raises(ValueError, match="acts and indices"):
        group_by_latent(code, 4)
    good = SparseCode(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"x must have shape \[\.\.\., D\] .* = \[2, 3\], got \[2, 4\]"
    ):
        mse_l1_loss(torch.ones(2, 4), good, torch.ones(4, 3), torch.ones(3))
    with pytest.raises(ValueError, match=r"x must have shape .* code's leading shape = \[2, 3\]"):
        mse_l1_loss(torch.ones(5, 3), good, torch.ones(4, 3), torch.ones(3))
    with pytest.raises(TypeError, match="indices must be int32 or int64"):
        sparse_decode(SparseCode(torch.ones(2, 2), torch.ones(2, 2)), torch.ones(4, 3))


BAD_LOSS: dict[str, Any] = {
    "l1_weight": ({"l1_weight": torch.ones(3)}, r"l1_weight must have shape \[F\] = \[4\], got"),
    "l1_weight_int": ({"l1_weight": torch.ones(4).int()}, "l1_weight must be a floating dtype"),
    "row_weight": (
        {"row_weight": torch.ones(3)},
        r"row_weight must have shape .* = \[2\], got \[3\]",
    ),
    "row_weight_int": ({"row_weight": torch.ones(2).int()}, "row_weight must be a floating dtype"),
    "W_compute": ({"W_compute": torch.ones(3, 4)}, "W_compute must have shape W_dec's"),
    "W_compute_int": ({"W_compute": torch.ones(4, 3).int()}, "W_compute must be a floating dtype"),
    "b_dec": ({"b_dec": None}, "b_dec must be a tensor, got None"),
    "x_device": ({"x": torch.ones(2, 3, device="meta")}, "x and the others must share a device"),
}


@pytest.mark.parametrize("name", BAD_LOSS)
def test_bad_argument_of_the_loss_is_refused(name):
    change, message = BAD_LOSS[name]
    code = SparseCode(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int32))
    good: dict[str, Any] = {
        "x": torch.ones(2, 3),
        "W_dec": torch.ones(4, 3),
        "b_dec": torch.ones(3),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        mse_l1_loss(code=code, **(good | change))


def ragged(*offsets):
    row_offsets = torch.tensor(offsets, dtype=torch.int32)
    return RaggedCode(row_offsets, torch.tensor([0, 3, 1], dtype=torch.int32), torch.ones(3))


BAD_CODES = {
    "devices": (SparseCode(torch.ones(2, 1), torch.ones(2, 1, device="meta").int()),
                "acts and the others must share a device, got acts on cpu, indices on meta"),
    "int16": (SparseCode(torch.ones(2, 1), torch.ones(2, 1).short()), "indices must be int32 or"),
    "offsets_device": (ragged(0, 1, 3)._replace(row_offsets=torch.ones(3, device="meta").int()),
                       "acts on cpu, indices on cpu, row_offsets on meta"),
    "offsets_float": (ragged(0, 1, 3)._replace(row_offsets=torch.tensor([0.0, 1.0, 3.0])),
                      "row_offsets must be int32 or int64, got torch.float32"),
    "offsets_ndim": (ragged(), r"row_offsets must have shape \[B \+ 1\], got \[0\]"),
    "offsets_first": (ragged(1, 2, 3), "row_offsets must rise from 0 to nnz = 3, got 1 to 3"),
    "offsets_last": (ragged(0, 1, 2), "row_offsets must rise from 0 to nnz = 3, got 0 to 2"),
    "offsets_fall": (ragged(0, 2, 1, 3), "with a smallest step of -1"),
    "ragged_ndim": (ragged(0, 3)._replace(acts=torch.ones(3, 1)),
                    r"acts and indices must have the same shape \[nnz\], got \[3, 1\] and \[3\]"),
    "no_slots": (SparseCode(torch.ones(2, 0), torch.ones(2, 0).int()),
                 r"acts must have shape \[\.\.\., K\] with K >= 1, got \[2, 0\]"),
    "other_groups": (ragged(0, 1, 3)._replace(groups=group_by_latent(ragged(0, 1, 3), 5)),
                     r"code.groups.offsets must have shape \[F \+ 1\] = \[5\], got \[6\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CODES)
def test_bad_code_is_refused(name):
    code, message = BAD_CODES[name]
    for run in (
        lambda: sparse_decode(code, torch.ones(4, 3)),
        lambda: mse_l1_loss(torch.ones(2, 3), code, torch.ones(4, 3), torch.ones(3)),
        lambda: group_by_latent(code, 4),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            run()


@pytest.mark.parametrize("latent", [-1, 4])
def test_indices_outside_the_dictionary_are_refused(latent):
    code = SparseCode(torch.ones(2, 1), torch.tensor([[0], [latent]]))
    for run in (
        lambda: sparse_decode(code, torch.ones(4, 3)),
        lambda: mse_l1_loss(torch.ones(2, 3), code, torch.ones(4, 3), torch.ones(3)),
        lambda: group_by_latent(code, 4),
    ):
        with pytest.raises(ValueError, match=r"indices must be in \[0, F\) with F = 4, got values"):
            run()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU they are always checked")
def test_indices_on_a_gpu_are_checked_on_demand():
    code = SparseCode(torch.ones(2, 1).cuda(), torch.full((2, 1), 4).cuda())
    with index_checks(), pytest.raises(ValueError, match="indices must be in"):
        group_by_latent(code, 4)
    row_offsets, indices, acts = (t.cuda() for t in ragged(0, 1, 2)[:3])
    with index_checks(), pytest.raises(ValueError, match="row_offsets must rise from 0"):
        group_by_latent(RaggedCode(row_offsets, indices, acts), 4)


@pytest.mark.parametrize("d_sae", [4.0, 2.5, True])
def test_a_number_of_latents_that_is_no_int_is_refused(d_sae):
    with pytest.raises(TypeError, match="d_sae must be an int, got"):
        group_by_latent(ragged(0, 1, 3), d_sae)


@pytest.mark.parametrize("number", ["a", True, None])
def test_what_is_no_number_is_refused(number):
    x, W_enc, b_enc = torch.ones(2, 3), torch.ones(3, 4), torch.ones(4)
    for name, run in (
        ("k", lambda: batch_topk_encode(x, W_enc, b_enc, number)),
        ("threshold", lambda: threshold_encode(x, W_enc, b_enc, threshold=number)),
        ("bandwidth", lambda: jumprelu_encode(x, W_enc, b_enc, b_enc, number)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a number, got {number!r}"):
            run()
