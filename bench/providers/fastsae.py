"""Our own trainer, with everything it does by default."""

from typing import Any

import torch
from torch import Tensor

from bench.cases import Start
from bench.providers.base import LR, Step
from fastsae import DataConfig, OptimizerConfig, ScheduleConfig, TopKConfig, TrainConfig, Trainer
from fastsae_kernels import Impl


def fastsae_step(
    start: Start,
    *,
    clip: bool = True,
    kind: Any = "row_adam",
    impl: Impl | str = Impl.AUTO,
) -> Step:
    case = start.case
    sae_cfg = TopKConfig(d_in=case.D, d_sae=case.F, k=case.K)
    optimizer = OptimizerConfig(
        kind=kind, lr=LR, betas=(0.9, 0.999), clip_norm=1.0 if clip else None
    )
    trainer = Trainer(
        TrainConfig(
            sae=sae_cfg,
            data=DataConfig(total_tokens=10**6 * case.B, batch_size=case.B),
            optimizer=optimizer,
            schedule=ScheduleConfig(warm_up_steps=0),
            dead_window=10**12,
        ),
        device=start.device,
    )
    trainer.sae.impl = impl
    with torch.no_grad():
        trainer.sae.W_enc.copy_(start.W_enc)
        trainer.sae.W_dec.copy_(start.W_dec)
        trainer.sae.b_enc.copy_(start.b_enc)
    trainer.copy_weights()

    def step(x: Tensor) -> float:
        if start.dead is not None:
            trainer.dead.since_fired.masked_fill_(start.dead, 2 * 10**12)
        return float(trainer.step(x).terms["mse"])

    return step
