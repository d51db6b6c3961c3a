"""What a whole training step must keep: its bits, its memory, one graph, and the eager losses."""

import dataclasses
import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, real_rows, rows
from bench.gpu.harness import (
    DEVICE,
    DRY,
    Report,
    Scale,
    dictionary,
    free_memory,
    peak_bytes,
    rough,
)
from bench.gpu.step import FusedStep
from fastsae_kernels import Impl, mse_l1_loss, topk_encode

SAME_TRAINING = 1e-3
"""Relative difference of losses between implementations, whose selections flip at rounding."""


def determinism(scale: Scale, report: Report) -> None:
    case, n = scale.steps[0], min(3, scale.training_steps)
    x = rows(case).to(DEVICE).bfloat16()
    runs = []
    for _ in range(2):
        step = FusedStep(case, Impl.TRITON)
        losses = torch.stack([step(x) for _ in range(n)])
        runs.append([losses, *(t.cpu() for t in step.state())])
        del step
        free_memory()
    same = [torch.equal(a, b) for a, b in zip(*runs, strict=True)]
    finite = bool(torch.isfinite(runs[0][0]).all())
    first, last = runs[0][0][0], runs[0][0][-1]
    report.check(
        f"{n} steps at {case.name} give the same bits twice",
        all(same) and finite,
        first_loss=float(first),
        last_loss=float(last),
    )


def memory(scale: Scale, report: Report) -> None:
    case = scale.memory
    x = rows(case).to(DEVICE).bfloat16()
    step = FusedStep(case, Impl.TRITON)
    enc = step.half[0]
    assert enc is not None

    def encode(rows: Tensor, bias: Tensor) -> object:
        with torch.no_grad():
            k, copy = case.K, enc.t()
            return topk_encode(rows, step.W_enc, bias, k, W_compute=copy, impl=Impl.TRITON)

    # Rows of zeros have the bias for scores, here those that open the most groups.
    zero, rising = torch.zeros_like(x), torch.arange(case.F, device=DEVICE, dtype=torch.float32)
    dense, code = 4 * case.B * case.F, 8 * case.B * case.K
    # Not counted: what is returned, and of a step three [B, D] in fp32 (the centred rows, the
    # error, one more).
    runs = {
        "topk_encode": (lambda: encode(x, step.b_enc), code),
        "topk_encode of rising columns": (lambda: encode(zero, rising), code),
        "a training step": (lambda: step(x), code + 3 * 4 * case.B * case.D),
    }
    for name, (run, given) in runs.items():
        run()
        extra = peak_bytes(run) - given
        report.check(
            f"temporary memory of {name} at {case.name}",
            DRY or 0 < extra <= 0.05 * dense,
            mib=round(extra / 2**20, 1),
            share_of_4BF=extra / dense,
            allowed_share=0.05,
        )


def one_graph(scale: Scale, report: Report) -> None:
    """torch.compile(fullgraph=True) over forward and backward, against the same step without."""
    case = replace(scale.parity, B=min(scale.parity.B, 1024), F=min(scale.parity.F, 16_384))
    x = rows(case).to(DEVICE).bfloat16()
    W_dec = dictionary(case.F, case.D, seed=1)
    W_enc = W_dec.clone().t()
    b_enc, b_dec = torch.zeros(case.F, device=DEVICE), torch.zeros(case.D, device=DEVICE)
    leaves = [t.requires_grad_() for t in (W_enc, b_enc, W_dec, b_dec)]
    half = W_dec.detach().bfloat16()

    def loss_of(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        code = topk_encode(
            x, W_enc, b_enc, case.K, b_pre=b_dec, W_compute=half.t(), impl=Impl.TRITON
        )
        found = mse_l1_loss(x, code, W_dec, b_dec, W_compute=half, impl=Impl.TRITON)
        return found.mse + 0.01 * found.l1

    backend = "aot_eager" if DRY else "inductor"
    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    found = []
    for run in (loss_of, compiled):
        loss = run(x, *leaves)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    errors = [rough(b, a.double()) for a, b in zip(*found, strict=True)]
    report.check(
        f"torch.compile(fullgraph=True, {backend}) of forward and backward",
        max(errors) <= 1e-4,
        loss_error=errors[0],
        gradient_error=max(errors[1:]),
    )


def real_training(scale: Scale, report: Report) -> None:
    """Steps on rows of a language model: the kernels against eager, fp32 and bf16."""
    case, n = scale.training, scale.training_steps
    batches = _batches(case, n)
    spread = float((batches[0] - batches[0].mean(0)).square().sum(1).mean())
    for half in (False, True):
        losses = {}
        for impl in (Impl.EAGER, Impl.TRITON):
            step = FusedStep(case, impl, half=half, lr=1e-3)
            made = [step(x.bfloat16() if half else x) for x in batches]
            losses[impl] = torch.stack(made).double()
            del step
        eager, kernels = losses[Impl.EAGER], losses[Impl.TRITON]
        apart = ((kernels - eager) / eager).abs()
        # In bf16 the eager scores are rounded before they are ranked: other selections.
        allowed = 2e-2 if half else SAME_TRAINING
        report.check(
            f"{n} steps on real rows, {'bf16' if half else 'fp32'}: losses as of eager",
            float(apart[:20].max()) <= allowed and bool(torch.isfinite(kernels).all()),
            apart_first=float(apart[0]),
            apart_in_20_steps=float(apart[:20].max()),
            apart_in_all=float(apart.max()),
            allowed_in_20_steps=allowed,
            fvu_first=float(kernels[0]) / spread,
            fvu_last=float(kernels[-1]) / spread,
            fvu_last_eager=float(eager[-1]) / spread,
        )


def every_variant(scale: Scale, report: Report) -> None:
    """fastsae's trainer on the same rows, bf16 products: each architecture learns, twice alike."""
    if importlib.util.find_spec("jaxtyping") is None:
        return report.note("fastsae's own trainer left out: jaxtyping absent")
    from fastsae import DataConfig, OptimizerConfig, TrainConfig, Trainer
    from fastsae.saes import SAES
    from fastsae.saes.transcoder import Transcodes

    case, n = scale.training, scale.training_steps
    batches = _batches(case, n)
    for name, variant in SAES.items():
        try:
            cfg = _configuration(variant.config_class, case)
            cfg.check_trainable()
        except (TypeError, ValueError) as why:
            report.note(f"{name} is not trained here: {why}")
            continue
        runs = []
        for _ in range(2):
            # The gradient of a matching pursuit is made by plain autograd.
            kind = "adam" if name == "matching_pursuit" else "row_adam"
            optimizer = OptimizerConfig(kind=kind)
            data = DataConfig(total_tokens=n * case.B, batch_size=case.B)
            train = TrainConfig(sae=cfg, data=data, optimizer=optimizer)
            trainer = Trainer(train, device=DEVICE)
            # A transcoder predicts its input here: what counts is that it learns.
            transcodes = isinstance(trainer.sae, Transcodes)
            trainer.initialise(*[batches[0]] * (1 + transcodes))
            fvu = [float(_fvu(trainer.step(*[x] * (1 + transcodes)))) for x in batches]
            runs.append([fvu, *(p.detach().cpu() for p in trainer.sae.parameters())])
            exported = trainer.export()
            del trainer
        same = runs[0][0] == runs[1][0] and all(
            torch.equal(a, b) for a, b in zip(runs[0][1:], runs[1][1:], strict=True)
        )
        first, last = runs[0][0][0], runs[0][0][-1]
        learns = DRY or last < 0.7 * first
        finite = bool(exported(batches[0]).isfinite().all())
        report.check(
            f"{n} steps of {name}: learns, the same bits twice",
            same and learns and finite,
            fvu_first=first,
            fvu_last=last,
            same=same,
        )
        free_memory()


def _batches(case: Case, n: int) -> list[Tensor]:
    x = real_rows().to(DEVICE)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    at = torch.arange(n * case.B, device=DEVICE).view(n, case.B) % len(x)
    return [x[order[rows]] for rows in at]


def _configuration(config_class: Any, case: Case) -> Any:
    fields: dict[str, Any] = {"d_in": case.D, "d_sae": case.F, "k": case.K, "d_out": case.D}
    fields |= {"matryoshka_widths": [case.F // 8, case.F // 2, case.F], "max_iterations": 4}
    known = {f.name for f in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in fields.items() if name in known})


def _fvu(loss: Any) -> Tensor:
    spread = (loss.x - loss.x.mean(0)).float().square().sum()
    return loss.err.square().sum() / spread
