"""Who trains: fastsae and SAELens, each by its own trainer on the same rows in the same order."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.clock import Clock, held_out_fvu
from bench.providers.base import quiet
from bench.providers.sae_lens import sae_lens_config
from fastsae import SAE, DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, Trainer
from fastsae.data.batches import ShuffledRows
from fastsae.saes import SAES, SAEConfig
from fastsae.training.defaults import sae_fields

CURVE_STEPS = 25
"""Evaluations of the validation FVU over a run whose time is taken."""


@dataclass(frozen=True)
class Setting:
    """What every method shares."""

    source: str
    architecture: str
    d_sae: int
    k: int
    tokens: int


@dataclass
class Watch(Clock):
    """Training seconds, and the validation FVU on the way."""

    validation: Tensor = field(kw_only=True)
    every: int = 1

    def look(self, step: int, forward: Callable[[Tensor], Tensor]) -> None:
        if step and step % self.every == 0:
            self.measure(forward)

    def measure(self, forward: Callable[[Tensor], Tensor]) -> None:
        fvu = held_out_fvu(forward, self.validation)
        self.curve.append((round(self.seconds, 2), round(fvu, 5)))


@dataclass(frozen=True)
class Outcome:
    """What is saved, as it is used."""

    sae: SAE
    never_fired: float
    """Share of the latents, over the whole run."""


Options = dict[str, Any]
"""Hyperparameters that differ from the library's defaults; shares are of the run's steps."""


def sae_config(setting: Setting, d_in: int, **fields: Any) -> SAEConfig:
    """Ours, with the defaults of `fastsae train`."""
    config_class: Any = SAES[setting.architecture].config_class
    shape = {"d_in": d_in, "d_sae": setting.d_sae, "k": setting.k}
    return config_class(**{**shape, **sae_fields(setting.architecture), **fields})


def train_fastsae(
    setting: Setting, rows: Tensor, seed: int, clock: Watch, options: Options
) -> Outcome:
    """Options: batch_size, lr, beta2, warm_up and decay, as `search.our_defaults` has them;
    W_dec_init, and fields of the SAE's configuration."""
    rest = dict(options)
    batch_size, lr, beta2 = (rest.pop(name) for name in ("batch_size", "lr", "beta2"))
    steps = setting.tokens // batch_size
    warm_up, decay = (round(rest.pop(name) * steps) for name in ("warm_up", "decay"))
    W_dec_init = rest.pop("W_dec_init", None)
    run = TrainConfig(
        sae=sae_config(setting, rows.shape[1], **rest),
        data=DataConfig(total_tokens=setting.tokens, batch_size=batch_size),
        seed=seed,
        optimizer=OptimizerConfig(lr=lr, betas=(0.9, beta2)),
        schedule=ScheduleConfig(warm_up_steps=warm_up, decay_steps=decay),
        W_dec_init=W_dec_init,
    )
    trainer = Trainer(run, device="cpu")
    clock.every = max(1, run.total_steps // CURVE_STEPS)
    batches = ShuffledRows(rows, batch_size, seed)

    def timed() -> Iterator[Tensor]:
        for step in range(run.total_steps):
            if step:
                clock.stop()
                clock.look(step, lambda x: trainer.export()(x))
            batch = batches.batch(step)
            clock.start()
            yield batch

    sae = trainer.fit(timed(), sample=rows[:: max(1, len(rows) // 65_536)])
    clock.stop()
    return Outcome(sae, float((trainer.dead.fired == 0).float().mean()))


def train_sae_lens(
    setting: Setting, rows: Tensor, seed: int, clock: Watch, options: Options
) -> Outcome:
    """Options: batch_size, lr, beta2, warm_up, decay and dead_share (shares), and fields of the
    SAE's configuration.

    `own=True` computes with SAELens's own arithmetic; otherwise `accelerate` puts ours inside its
    trainer, whose losses and gradients are the same to rounding, to save most of the time.
    """
    with quiet():
        from sae_lens.registry import get_sae_training_class
        from sae_lens.training.sae_trainer import SAETrainer
    from fastsae.interop.sae_lens import accelerate

    options = {"batch_size": 4096, "lr": 3e-4, "warm_up": 0.0, "decay": 0.0, **options}
    batch_size, lr = options.pop("batch_size"), options.pop("lr")
    steps = setting.tokens // batch_size
    shares = {name: round(options.pop(name) * steps) for name in ("warm_up", "decay")}
    dead_share = options.pop("dead_share", None)
    window = 1000 if dead_share is None else max(1, round(dead_share * steps))
    own, beta2 = options.pop("own", False), options.pop("beta2", 0.999)
    torch.manual_seed(seed)
    sae_class, config_class = get_sae_training_class(setting.architecture)
    shape: dict[str, Any] = {"d_in": rows.shape[1], "d_sae": setting.d_sae, "k": setting.k}
    sae = sae_class(config_class(**shape, **options))
    with quiet():
        cfg = replace(
            sae_lens_config(steps * batch_size, batch_size, lr, dead_window=window),
            lr_warm_up_steps=shares["warm_up"],
            lr_decay_steps=shares["decay"],
            adam_beta2=beta2,
            feature_sampling_window=steps + 1,  # it forgets then what has fired
        )
    scaled = sae.cfg.normalize_activations == "expected_average_only_in"
    clock.every = max(1, steps // CURVE_STEPS)
    batches = ShuffledRows(rows, batch_size, seed)

    def timed() -> Iterator[Tensor]:
        for step in range(cfg.n_batches_for_norm_estimate if scaled else 0):
            yield batches.batch(step)
        for step in range(steps):
            if step:
                clock.stop()
            scale = trainer.activation_scaler.scaling_factor or 1.0
            clock.look(step, lambda x, s=scale: sae(x * s) / s)
            batch = batches.batch(step)
            clock.start()
            yield batch

    trainer = SAETrainer(cfg, sae if own else accelerate(sae), timed())
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer.fit()
        clock.stop()
        sae.save_inference_model(folder)
        found = SAE.load_from_disk(folder)
    return Outcome(found, float((trainer.act_freq_scores == 0).float().mean()))


TRAINERS = {"fastsae": train_fastsae, "sae-lens": train_sae_lens}
