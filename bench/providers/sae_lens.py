"""SAELens's trainer: as it is, and with fastsae's arithmetic inside."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import Start
from bench.providers.base import LR, Step, quiet


def sae_lens_config(
    tokens: int, batch_size: int, lr: float, *, dead_window: int, device: str = "cpu"
) -> Any:
    """SAELens's trainer configuration: constant learning rate, no log, no checkpoint."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=tokens,
        device=device,
        autocast=device != "cpu",  # its fastest way on a GPU
        lr=lr,
        lr_end=lr,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=batch_size,
        dead_feature_window=dead_window,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=50,
    )


def sae_lens_step(start: Start, *, accelerated: bool = False) -> Step:
    with quiet():
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        case, device = start.case, str(start.device)
        cfg = TopKTrainingSAEConfig(d_in=case.D, d_sae=case.F, k=case.K, device=device)
        sae = TopKTrainingSAE(cfg)
        if accelerated:
            from fastsae.interop.sae_lens import accelerate

            sae = accelerate(sae)
        trainer_cfg = sae_lens_config(10**6 * case.B, case.B, LR, dead_window=10**9, device=device)
        no_data: Iterator[Tensor] = iter(())
        trainer = SAETrainer(trainer_cfg, sae, no_data)
    with torch.no_grad():
        sae.W_enc.copy_(start.W_enc)
        sae.W_dec.copy_(start.W_dec)
        sae.b_enc.copy_(start.b_enc)

    def step(x: Tensor) -> float:
        if start.dead is not None:
            trainer.n_forward_passes_since_fired.masked_fill_(start.dead, 2e9)
        with quiet():
            output = trainer.step(x)
        return float(output.losses["mse_loss"].detach())

    return step
