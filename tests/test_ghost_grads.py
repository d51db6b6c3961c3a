"""Ghost gradients of the standard SAE against the formula written out densely."""

import pytest
import torch

from fastsae import (
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
    StandardConfig,
    TrainConfig,
    Trainer,
)
from fastsae.saes import StandardSAE
from fastsae_kernels import workspace
from parity import relative_error

D, F, B = 16, 64, 250
DEAD = torch.arange(F) % 3 == 0


def made(**changes):
    torch.manual_seed(0)
    fields = {"l1_coefficient": 0.3, "dtype": "float64", "use_ghost_grads": True, **changes}
    sae = StandardSAE(StandardConfig(d_in=D, d_sae=F, **fields))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.3)
        sae.b_dec.normal_(std=0.3)
    return sae, torch.randn(B, D, dtype=torch.float64)


def dense_ghost(sae, x):
    h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    residual = (x - h.relu() @ sae.W_dec - sae.b_dec).detach()
    ghost = torch.exp(h[:, DEAD]) @ sae.W_dec[DEAD]
    scale = residual.norm(dim=-1) / (1e-6 + 2 * ghost.norm(dim=-1))
    missed = (ghost * scale[:, None].detach() - residual) ** 2
    return (missed * (residual**2 / (missed + 1e-6)).detach()).mean()


def test_the_term_and_every_gradient_are_those_of_the_formula():
    sae, x = made()
    plain, _ = made(use_ghost_grads=False)
    with workspace(1 << 20):  # two chunks, the second one shorter
        found = sae.loss(x, DEAD)
    want = dense_ghost(sae, x)
    assert relative_error(found.terms["ghost"], want.detach()) < 1e-12
    base = plain.loss(x, DEAD)
    assert relative_error(found.total.detach(), (base.total + want).detach()) < 1e-12
    found.total.backward()
    base.total.backward()
    ghost = torch.autograd.grad(want, list(sae.parameters()))
    for (name, p), q, g in zip(sae.named_parameters(), plain.parameters(), ghost, strict=True):
        assert g.abs().max() > 0, name
        assert p.grad is not None and q.grad is not None
        assert relative_error(p.grad, q.grad + g) < 1e-10, name


@pytest.mark.parametrize("dead", [None, torch.zeros(F, dtype=torch.bool)], ids=["none", "empty"])
def test_without_dead_latents_there_is_no_term(dead):
    sae, x = made()
    assert "ghost" not in sae.loss(x, dead).terms


def test_row_adam_takes_the_same_steps_as_adam():
    weights = []
    for kind in ("row_adam", "adam"):
        sae, _ = made()
        optimizer = OptimizerConfig(kind=kind, lr=1e-3)
        cfg = TrainConfig(
            sae=sae.cfg,
            data=DataConfig(total_tokens=20 * B, batch_size=B),
            dead_window=B,
            optimizer=optimizer,
            schedule=ScheduleConfig(warm_up_steps=0, decay_steps=0),
        )
        trainer = Trainer(cfg, device="cpu")
        torch.manual_seed(1)
        with torch.no_grad():
            trainer.sae.b_enc[:5] = -50
        found = [trainer.step(torch.randn(B, D)).terms for _ in range(5)]
        assert "ghost" in found[-1]
        weights.append(trainer.sae.state_dict())
    for name, value in weights[0].items():
        assert relative_error(value, weights[1][name]) < 1e-8, name
