"""One whole training step of a TopK SAE built on the ops, and dense steps to compare it with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case
from bench.gpu.harness import DEVICE, dictionary
from fastsae_kernels import Impl, collect_row_grads, mse_l1_loss, row_adam, topk_encode

LR = 3e-4


class FusedStep:
    """fp32 masters and moments, bf16 copies that the update writes, counters of dead latents."""

    def __init__(self, case: Case, impl: Impl, *, half: bool = True, lr: float = LR) -> None:
        self.case, self.impl, self.lr, self.steps = case, impl, lr, 0
        self.W_dec = dictionary(case.F, case.D, seed=1)
        rows = self.W_dec.clone()
        """W_enc with one latent a row."""
        self.W_enc = rows.t()
        self.half = [rows.bfloat16(), self.W_dec.bfloat16()] if half else [None, None]
        self.moments = [torch.zeros_like(rows) for _ in range(4)]
        self.rows = [rows, self.W_dec]
        self.b_enc = torch.zeros(case.F, device=DEVICE, requires_grad=True)
        self.b_dec = torch.zeros(case.D, device=DEVICE, requires_grad=True)
        self.since_fired = torch.zeros(case.F, dtype=torch.int64, device=DEVICE)
        self.biases = torch.optim.Adam([self.b_enc, self.b_dec], lr=lr, fused=True)
        self.grads = []
        for weight in (self.W_enc, self.W_dec):
            self.grads.append(collect_row_grads(weight.requires_grad_()))

    def loss(self, x: Tensor) -> Tensor:
        enc, dec = self.half
        code = topk_encode(
            x,
            self.W_enc,
            self.b_enc,
            self.case.K,
            b_pre=self.b_dec,
            W_compute=None if enc is None else enc.t(),
            impl=self.impl,
        )
        if code.groups is not None:
            fired = code.groups.counts() > 0
            self.since_fired.add_(len(x)).masked_fill_(fired, 0)
        return mse_l1_loss(x, code, self.W_dec, self.b_dec, W_compute=dec, impl=self.impl).mse

    def __call__(self, x: Tensor) -> Tensor:
        self.steps += 1
        loss = self.loss(x)
        loss.backward()
        for i, grads in enumerate(self.grads):
            row_adam(
                self.rows[i].detach(),
                grads,
                *self.moments[2 * i : 2 * i + 2],
                step=self.steps,
                lr=self.lr,
                copy=self.half[i],
                impl=self.impl,
            )
            grads.clear()
        self.biases.step()
        self.biases.zero_grad(set_to_none=True)
        return loss.detach()

    def state(self) -> list[Tensor]:
        halves = [t for t in self.half if t is not None]
        biases = [self.b_enc, self.b_dec]
        return [t.detach() for t in (*self.rows, *self.moments, *halves, *biases, self.since_fired)]


Step = Callable[[Tensor], Tensor]


def dense_step(case: Case, *, compiled: bool = False) -> Step:
    """What libraries do: dense scores, dense code, five products, fused Adam, bf16 autocast."""

    def loss_of(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        scores = torch.addmm(b_enc, x - b_dec, W_enc)
        values, indices = scores.relu().topk(case.K, dim=1)
        code = torch.zeros_like(scores).scatter(1, indices, values.to(scores.dtype))
        return (torch.addmm(b_dec, code, W_dec) - x).float().square().sum(1).mean()

    return _plain(case, torch.compile(loss_of) if compiled else loss_of)


def bag_step(case: Case) -> Step:
    """The best plain PyTorch known: dense scores, `topk`, a bag for the decoder, fused Adam."""

    def loss_of(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        scores = torch.addmm(b_enc, x - b_dec, W_enc)
        values, indices = scores.topk(case.K, dim=1, sorted=False)
        acts = values.relu().float()
        x_hat = F.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec
        return (x_hat - x).float().square().sum(1).mean()

    return _plain(case, loss_of)


def _plain(case: Case, loss_of: Callable[..., Tensor]) -> Step:
    W_dec = dictionary(case.F, case.D, seed=1)
    W_enc = W_dec.clone().t()
    biases = torch.zeros(case.F, device=DEVICE), torch.zeros(case.D, device=DEVICE)
    weights = [t.requires_grad_() for t in (W_enc, biases[0], W_dec, biases[1])]
    optimizer = torch.optim.Adam(weights, lr=LR, fused=True)

    def step(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(x, *weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def trainer_step(case: Case) -> Step:
    """fastsae's own trainer, with everything it does by default: clipping, AuxK, counters."""
    from fastsae import DataConfig, TopKConfig, TrainConfig, Trainer

    sae = TopKConfig(d_in=case.D, d_sae=case.F, k=case.K)
    data = DataConfig(total_tokens=10_000 * case.B, batch_size=case.B)
    cfg = TrainConfig(sae=sae, data=data)
    trainer = Trainer(cfg, device=DEVICE)
    return lambda x: trainer.step(x).total.detach()
