"""Training SAEs under SAELens's names and with its defaults."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.formats import load_sae
from fastsae.interop.sae_lens import acts_as_sae_lens, set_coefficients, their_name
from fastsae.sae_lens.hooked_sae import HookedSAE, hooked
from fastsae.sae_lens.inference_saes import OnDevice
from fastsae.saes import (
    SAE,
    SAES,
    AbsTopKConfig,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatchingPursuitConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
)


@dataclass(frozen=True, kw_only=True)
class StandardTrainingSAEConfig(OnDevice, StandardConfig): ...


@dataclass(frozen=True, kw_only=True)
class GatedTrainingSAEConfig(OnDevice, GatedConfig): ...


@dataclass(frozen=True, kw_only=True)
class TopKTrainingSAEConfig(OnDevice, TopKConfig):
    k: int = 100
    use_sparse_activations: bool = False
    """Codes are sparse here whatever this says."""


@dataclass(frozen=True, kw_only=True)
class AbsTopKTrainingSAEConfig(OnDevice, AbsTopKConfig):
    k: int = 100


@dataclass(frozen=True, kw_only=True)
class BatchTopKTrainingSAEConfig(OnDevice, BatchTopKConfig):
    k: float | int = 100


@dataclass(frozen=True, kw_only=True)
class MatryoshkaBatchTopKTrainingSAEConfig(OnDevice, MatryoshkaBatchTopKConfig):
    k: float | int = 100


@dataclass(frozen=True, kw_only=True)
class JumpReLUTrainingSAEConfig(OnDevice, JumpReLUConfig): ...


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitTrainingSAEConfig(OnDevice, MatchingPursuitConfig): ...


CONFIGS: dict[str, type[SAEConfig]] = {
    "standard": StandardTrainingSAEConfig,
    "gated": GatedTrainingSAEConfig,
    "topk": TopKTrainingSAEConfig,
    "abstopk": AbsTopKTrainingSAEConfig,
    "batchtopk": BatchTopKTrainingSAEConfig,
    "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
    "matching_pursuit": MatchingPursuitTrainingSAEConfig,
}


@dataclass
class TrainStepInput:
    """What a training step is given."""

    sae_in: Tensor
    coefficients: dict[str, float] = field(default_factory=dict)
    """Weights of this step: `l1` or `l0`; those that are not given come from the configuration."""
    dead_neuron_mask: Tensor | None = None
    n_training_steps: int = 0
    is_logging_step: bool = False


@dataclass
class TrainStepOutput:
    """What it returns; `loss` carries the gradient."""

    sae_in: Tensor
    sae_out: Tensor
    feature_acts: Tensor
    """[B, F], a sparse COO tensor where the code is sparse."""
    loss: Tensor
    losses: dict[str, Tensor]


class TrainingSAE(HookedSAE):
    """Made from a SAELens configuration; trains by `training_forward_pass`, or by our Trainer."""

    def __new__(cls, cfg: SAEConfig, *args: Any, **kwargs: Any) -> Any:
        if cls is TrainingSAE:
            raise TypeError("TrainingSAE must be made by from_dict, load_from_disk or a subclass")
        return super().__new__(cls)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step's losses, under SAELens's names."""
        set_coefficients(self, step_input.coefficients)
        found = self.loss(
            step_input.sae_in, step_input.dead_neuron_mask, step_input.n_training_steps
        )
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=found.x_hat,
            feature_acts=acts_as_sae_lens(self, found),
            loss=found.total,
            losses={their_name(name): value for name, value in found.terms.items()},
        )

    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save the form it is used in: decoder norms folded, BatchTopK as JumpReLU."""
        made = SAES[self.cfg.architecture](self.cfg, device=self.device)
        made.load_state_dict(self.state_dict())
        if made.can_fold_W_dec_norm:
            made.fold_W_dec_norm()
        return made.inference_form().save_model(path)

    @staticmethod
    def from_dict(values: dict[str, Any] | SAEConfig) -> Any:
        """The training SAE of a configuration, or of one as a dictionary."""
        if isinstance(values, SAEConfig):
            return _class_of(values.architecture)(values)
        architecture = values.get("architecture")
        if architecture not in CONFIGS:
            raise ValueError(f"architecture must be one of {list(CONFIGS)}, got {architecture!r}")
        return _class_of(architecture)(CONFIGS[architecture].from_dict(values))

    @staticmethod
    def load_from_disk(path: str | Path, device: torch.device | str = "cpu") -> SAE:
        """A saved SAE, in any format that loads, with hook points."""
        return hooked(load_sae(path, device))


def _training_class(architecture: str) -> type[TrainingSAE]:
    core: Any = SAES[architecture]
    name = CONFIGS[architecture].__name__.removesuffix("Config")
    return type(name, (TrainingSAE, core), {"__module__": __name__})


CLASSES = {architecture: _training_class(architecture) for architecture in CONFIGS}
StandardTrainingSAE = CLASSES["standard"]
GatedTrainingSAE = CLASSES["gated"]
TopKTrainingSAE = CLASSES["topk"]
AbsTopKTrainingSAE = CLASSES["abstopk"]
BatchTopKTrainingSAE = CLASSES["batchtopk"]
MatryoshkaBatchTopKTrainingSAE = CLASSES["matryoshka_batchtopk"]
JumpReLUTrainingSAE = CLASSES["jumprelu"]
MatchingPursuitTrainingSAE = CLASSES["matching_pursuit"]


def _class_of(architecture: str) -> Any:
    return CLASSES[architecture]
