"""What every configuration of an SAE shares: its shape and what it does to its input."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

from fastsae.checks import check_choice, check_counts, float_dtype
from fastsae.saes.metadata import Metadata

Normalization = Literal[
    "none",
    "expected_average_only_in",
    "covariance_whitening",
    "constant_norm_rescale",
    "layer_norm",
]
Reshaping = Literal["none", "hook_z"]
RUN_TIME_NORMALIZATIONS = ("constant_norm_rescale", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """The shape of an SAE and what it does to its input."""

    architecture: ClassVar[str]
    file_defaults: ClassVar[Mapping[str, Any]] = {}
    """What a file means that does not state a field, where that is not the default here."""
    normalizations: ClassVar[tuple[str, ...]] = get_args(Normalization)

    d_in: int
    """D, the width of the activations."""
    d_sae: int
    """F, the number of latents."""
    dtype: str = "float32"
    """Dtype of the parameters."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec from the input before encoding."""
    normalize_activations: Normalization = "none"
    """What is done to a row before encoding and undone after decoding. `expected_average_only_in`
    and `covariance_whitening` are done by the trainer and folded into the weights when it saves."""
    reshape_activations: Reshaping = "none"
    """`hook_z` flattens rows [n_heads, d_head] on the way in and restores them on the way out; rows
    that come flattened, as in training, stay so."""
    decoder_init_norm: float = 0.1
    """Norm of W_dec's rows at initialisation."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Where the SAE belongs: model_name, hook_name, context_size, ..."""

    def __post_init__(self) -> None:
        check_counts(self, "d_in", "d_sae")
        check_choice(self, "normalize_activations", self.normalizations)
        check_choice(self, "reshape_activations", get_args(Reshaping))
        float_dtype("dtype", self.dtype)
        if not self.decoder_init_norm > 0:
            raise ValueError(f"decoder_init_norm must be above 0, got {self.decoder_init_norm}")
        object.__setattr__(self, "metadata", Metadata(self.metadata))

    def __getattr__(self, name: str) -> Any:
        """What the metadata hold can be read here too: cfg.hook_name."""
        metadata = self.__dict__.get("metadata", {})
        if name not in metadata:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return metadata[name]

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed: D, but for transcoders."""
        return self.d_in

    def check_trainable(self) -> None:
        """Raise ValueError for what can be used and not trained."""

    def to_dict(self) -> dict[str, Any]:
        return {"architecture": self.architecture, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SAEConfig":
        """Build from a file's fields; those that are null or not of this class are left out."""
        known = {f.name for f in fields(cls)}
        stated = {k: v for k, v in values.items() if k in known and v is not None}
        return cls(**{**cls.file_defaults, **stated})
