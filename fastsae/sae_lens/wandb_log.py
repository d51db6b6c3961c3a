"""A run's log on Weights & Biases, under the keys that SAELens's dashboards read."""

from pathlib import Path
from typing import Any

from fastsae.extras import require
from fastsae.interop.sae_lens import TERMS
from fastsae.sae_lens.config import LoggingConfig

KEYS = {
    "loss": "losses/overall_loss",
    "l0": "metrics/l0",
    "dead": "sparsity/dead_features",
    "lr": "details/current_learning_rate",
    "tokens": "details/n_training_samples",
    "tokens_per_second": "details/tokens_per_second",
}


class WandbLog:
    """Open inside a `with`; without `log_to_wandb` it says nothing."""

    def __init__(self, cfg: LoggingConfig, config: dict[str, Any]) -> None:
        self.cfg, self.config, self.run = cfg, config, None

    def __enter__(self) -> "WandbLog":
        if self.cfg.log_to_wandb:
            try:
                wandb = require("wandb", extra="wandb")
            except ImportError as error:
                raise ImportError(
                    f"{error}; or pass logger=LoggingConfig(log_to_wandb=False)"
                ) from error
            self.run = wandb.init(
                project=self.cfg.wandb_project,
                entity=self.cfg.wandb_entity,
                name=self.cfg.run_name,
                id=self.cfg.wandb_id,
                config=self.config,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.run is not None:
            self.run.finish()

    def log(self, line: dict[str, Any]) -> None:
        """A line of the trainer's log."""
        if self.run is None:
            return
        values = {KEYS[name]: value for name, value in line.items() if name in KEYS}
        values |= {f"losses/{key}": line[name] for name, key in TERMS.items() if name in line}
        values["metrics/explained_variance"] = 1 - line["fvu"]
        self.run.log(values, step=line["step"])

    def log_evaluation(self, step: int, found: dict[str, Any]) -> None:
        """What `run_evals` found."""
        if self.run is not None:
            groups = found.items()
            self.run.log({f"{g}/{k}": v for g, part in groups for k, v in part.items()}, step=step)

    def save(self, folder: Path) -> None:
        """The saved SAE as an artifact."""
        if self.run is not None and self.cfg.log_weights_to_wandb:
            name = str(self.cfg.run_name).replace("/", "__")
            self.run.log_artifact(str(folder), name=name, type="model")
