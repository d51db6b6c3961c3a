"""What a training run is. A field left at None follows `defaults`, as a function of the run."""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from fastsae.checks import check_choice, check_counts, float_dtype
from fastsae.saes import SAEConfig
from fastsae.training import defaults
from fastsae.training.centre import CENTRES, Centre
from fastsae.training.directions import Directions
from fastsae.training.schedule import Schedule, lr_factor

Tracking = Literal["wandb", "tensorboard", "trackio"]
Kind = Literal["row_adam", "adam", "signum", "muon"]
Moments = Literal["float32", "bfloat16", "8bit"]
Rounding = Literal["nearest", "stochastic"]
Exchanged = Literal["auto", "pairs", "rows"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run draws: how many tokens, and in which parts."""

    total_tokens: int
    """Tokens the run is made of; batches are drawn until they are used up."""
    batch_size: int | None = None
    """Tokens a step; None: by device and length of the run, 256 to 2048 (8192 on a GPU)."""
    micro_batch_size: int | None = None
    """Tokens whose gradient is computed at once, where a whole batch takes too much memory; the
    gradient is the batch's (BatchTopK selects within each part). None: the batch."""
    compute_dtype: str | None = None
    """Dtype of the rows and so of the encoder's product; weights and sums stay in the SAE's dtype.
    None: bfloat16 on a GPU, the SAE's dtype elsewhere."""

    def __post_init__(self) -> None:
        if self.compute_dtype is not None:
            float_dtype("compute_dtype", self.compute_dtype)
        check_counts(self, "total_tokens")
        check_counts(self, "batch_size", "micro_batch_size", optional=True)

    def resolved(self, device: torch.device, sae_dtype: str) -> "DataConfig":
        """On a device, for an SAE's dtype, with every None replaced by its default."""
        return replace(
            self,
            batch_size=self.batch_size or defaults.batch_size(device, self.total_tokens),
            compute_dtype=self.compute_dtype or defaults.compute_dtype(device, sae_dtype),
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, or what steps in its place."""

    kind: Kind = "row_adam"
    """`row_adam` is Adam and never writes the dictionary's dense gradient; `adam` is torch's fused
    one, `signum` steps by the sign of the first moment, `muon` orthogonalises it (torch 2.9)."""
    lr: float | None = None
    """Peak learning rate; None: 3e-3 * sqrt(4608 / d_sae), a tenth of it for signum."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Of Adam; with 0.999 for the second FVU ends 0.7 % higher at equal tokens."""
    eps: float = 1e-8
    moments: Moments = "float32"
    """How `row_adam` keeps the dictionary's two moments: 8, 4 or 2 bytes a weight."""
    rounding: Rounding = "nearest"
    """How `row_adam` writes weights that are bf16 (`dtype` of the SAE): `stochastic` lets steps
    under 1/512 of a weight move it by chance, right on average, where `nearest` loses them."""
    clip_norm: float | None = 1.0
    """Bound on the global norm of the gradient; None: no clipping."""
    unit_norm_decoder: bool = False
    """Keep W_dec's rows at norm 1: the gradient's component along a row is taken off, and the row
    is scaled after each step."""

    def __post_init__(self) -> None:
        for name, known in {"kind": Kind, "moments": Moments, "rounding": Rounding}.items():
            check_choice(self, name, get_args(known))
        if self.kind != "row_adam" and (self.moments, self.rounding) != ("float32", "nearest"):
            raise ValueError(
                "moments and rounding must be 'float32' and 'nearest' for every kind but "
                f"'row_adam', got {self.moments!r} and {self.rounding!r} for {self.kind!r}"
            )
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0 or None, got {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over a run: linear warm-up, constant or cosine, linear decay to 0."""

    lr_curve: Schedule = "constant"
    """Between warm-up and decay; see `fastsae.training.schedule`."""
    warm_up_steps: int | None = None
    """Steps from 0 to the peak; None: a sixteenth of the run, at most 1000."""
    decay_steps: int | None = None
    """Steps from the peak to 0 at the end; None: all after the warm-up, half of the run if
    `lr_curve` is a cosine."""
    lr_end: float | None = None
    """Where a cosine ends; None: a tenth of lr."""
    restart_cycles: int = 1
    """Cosines in a row, under `cosine_restarts`."""

    def __post_init__(self) -> None:
        check_choice(self, "lr_curve", get_args(Schedule))
        check_counts(self, "warm_up_steps", "decay_steps", least=0, optional=True)
        if self.lr_end is not None and self.lr_end < 0:
            raise ValueError(f"lr_end must be at least 0 or None, got {self.lr_end}")
        check_counts(self, "restart_cycles")

    def resolved(self, steps: int, lr: float) -> "ScheduleConfig":
        """Of a run of so many steps and a peak rate, with every None replaced by its default."""
        warm_up, decay = self.warm_up_steps, self.decay_steps
        warm_up = defaults.warm_up_steps(steps) if warm_up is None else warm_up
        decay = defaults.decay_steps(steps, warm_up, self.lr_curve) if decay is None else decay
        return replace(
            self,
            lr_end=lr / 10 if self.lr_end is None else self.lr_end,
            warm_up_steps=warm_up,
            decay_steps=max(0, decay),
        )

    def factor(self, step: int, total_steps: int, lr: float) -> float:
        """Share of the peak rate lr at a step, from 0, of a schedule that is resolved."""
        return lr_factor(
            step,
            total_steps,
            self.warm_up_steps or 0,
            self.decay_steps or 0,
            self.lr_curve,
            (self.lr_end or 0.0) / lr,
            self.restart_cycles,
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told of a run; `metrics.jsonl` always is."""

    every: int = 20
    """Steps between two lines."""
    to: tuple[Tracking, ...] = ()
    """Where lines go besides: each comes with the extra of its name."""
    project: str = "fastsae"
    """The run's project there."""
    run_name: str | None = None
    """The run's name there; None: its folder's."""

    def __post_init__(self) -> None:
        for name in self.to:
            if name not in get_args(Tracking):
                raise ValueError(f"log.to must be among {list(get_args(Tracking))}, got {name!r}")
        check_counts(self, "every", prefix="log.")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, and what of it is kept."""

    every: int | None = None
    """Steps between two; None: at the end only."""
    keep: int = 2
    """Newest ones that are kept."""
    keep_every: int | None = None
    """Those at multiples of so many steps are kept as well; None: no others."""
    at_end: bool = True
    """Whether the last step is saved too, wherever it falls."""

    def __post_init__(self) -> None:
        check_counts(self, "every", "keep_every", optional=True, prefix="checkpoint.")
        check_counts(self, "keep", prefix="checkpoint.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One SAE, one stream of activations."""

    sae: SAEConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    exchange: Exchanged = "auto"
    """What processes that have parts of a batch send each other: the active `pairs` and the rows
    they refer to, or dense gradients by `rows` of the dictionary, of whose moments each process
    then has a part only; `auto`: the fewer bytes."""
    dead_window: int | None = None
    """Tokens without firing after which a latent is dead; None: 10 % of the run, at most 10M."""
    b_dec_init: Centre = "mean"
    """Where b_dec starts, of a sample of the rows."""
    W_dec_init: Directions | None = None
    """Where the latents' directions start: `random`, or near `whitened_rows` of the sample; None:
    near rows for the TopK family, at random for others (`fastsae.training.defaults`)."""
    resample_every: int | None = None
    """Steps between two resamplings of dead latents (`fastsae.training.resampling`), in the first
    half of the run; None: never, AuxK revives them."""
    seed: int = 0
    """Of the initial weights and of the order of the rows."""

    def __post_init__(self) -> None:
        self.sae.check_trainable()
        check_choice(self, "b_dec_init", CENTRES)
        check_choice(self, "exchange", get_args(Exchanged))
        if self.W_dec_init is not None:
            check_choice(self, "W_dec_init", get_args(Directions))
        if self.W_dec_init == "whitened_rows" and "transcoder" in self.sae.architecture:
            raise ValueError(
                "W_dec_init must be 'random' for a transcoder, whose encoder and decoder are of "
                "two spaces, got 'whitened_rows'"
            )
        if self.exchange == "rows" and self.optimizer.kind != "row_adam":
            raise ValueError(
                f"exchange must be 'auto' or 'pairs' for kind {self.optimizer.kind!r}, got 'rows'"
            )
        check_counts(self, "dead_window", "resample_every", optional=True)

    def resolved(self, device: torch.device) -> "TrainConfig":
        """The same run with every None replaced by its default."""
        optimizer = self.optimizer
        lr = optimizer.lr or defaults.learning_rate(self.sae.d_sae, optimizer.kind)
        run = replace(
            self,
            data=self.data.resolved(device, self.sae.dtype),
            dead_window=self.dead_window or defaults.dead_window(self.data.total_tokens),
            W_dec_init=self.W_dec_init or defaults.directions(self.sae.architecture),
            optimizer=replace(optimizer, lr=lr),
        )
        return replace(run, schedule=self.schedule.resolved(run.total_steps, lr))

    @property
    def total_steps(self) -> int:
        if self.data.batch_size is None:
            raise ValueError("batch_size must be resolved before total_steps is known, got None")
        return max(1, self.data.total_tokens // self.data.batch_size)
