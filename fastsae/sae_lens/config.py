"""`LanguageModelSAERunnerConfig`: today's nested one, and the flat one of before version 6."""

import json
import uuid
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastsae.checks import check_counts
from fastsae.sae_lens import flat_config
from fastsae.sae_lens.tokens import Separator
from fastsae.sae_lens.training_saes import CONFIGS
from fastsae.saes import LegacyStandardConfig, SAEConfig
from fastsae.training.centre import Centre
from fastsae.training.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {
    "constant": "constant",
    "cosineannealing": "cosine",
    "cosineannealingwarmrestarts": "cosine_restarts",
}
MODEL_CLASSES = ("HookedTransformer", "TransformerBridge", "AutoModelForCausalLM")


@dataclass(kw_only=True)
class LoggingConfig:
    """Weights & Biases; what a run logs is in `metrics.jsonl` as well."""

    log_to_wandb: bool = True
    log_activations_store_to_wandb: bool = False
    log_optimizer_state_to_wandb: bool = False
    log_weights_to_wandb: bool = True
    wandb_project: str = "sae_lens_training"
    wandb_id: str | None = None
    run_name: str | None = None
    wandb_entity: str | None = None
    wandb_log_frequency: int = 10
    """Steps between two lines of the log."""
    eval_every_n_wandb_logs: int = 100
    """Lines between two evaluations; a run is evaluated at its end in any case."""


@dataclass(kw_only=True)
class RunnerFields:
    """Fields of today's configuration with SAELens's defaults."""

    sae: SAEConfig
    model_name: str = "gelu-2l"
    """Hub name, local folder or .gguf file; `SmolLM2-135M-Instruct.Q4_1` is the offline one."""
    model_class_name: str = "HookedTransformer"
    hook_name: str = "blocks.0.hook_mlp_out"
    hook_eval: str = "NOT_IN_USE"
    hook_head_index: int | None = None
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    streaming: bool = True
    is_dataset_tokenized: bool = True
    use_chat_formatting: bool = False
    context_size: int = 128
    use_cached_activations: bool = False
    cached_activations_path: str | None = None
    from_pretrained_path: str | None = None
    n_batches_in_buffer: int = 20
    training_tokens: int = 2_000_000
    store_batch_size_prompts: int = 32
    seqpos_slice: tuple[int | None, ...] = (None,)
    disable_concat_sequences: bool = False
    sequence_separator_token: Separator = "bos"
    activations_mixing_fraction: float = 0.5
    device: str = "cpu"
    llm_device: str | None = None
    act_store_device: str | None = None
    prefetch_llm_batches: bool | int = False
    seed: int = 42
    dtype: str = "float32"
    prepend_bos: bool = True
    autocast: bool = False
    autocast_lm: bool = False
    compile_llm: bool = False
    llm_compilation_mode: str | None = None
    compile_sae: bool = False
    sae_compilation_mode: str | None = None
    train_batch_size_tokens: int = 4096
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr: float = 3e-4
    lr_scheduler_name: str = "constant"
    lr_warm_up_steps: int = 0
    lr_end: float | None = None
    lr_decay_steps: int = 0
    n_restart_cycles: int = 1
    dead_feature_window: int = 1000
    """In steps."""
    feature_sampling_window: int = 2000
    dead_feature_threshold: float = 1e-8
    n_eval_batches: int = 10
    eval_batch_size_prompts: int | None = None
    logger: LoggingConfig = field(default_factory=LoggingConfig)
    n_checkpoints: int = 0
    checkpoint_path: str | None = "checkpoints"
    save_final_checkpoint: bool = False
    output_path: str | None = "output"
    resume_from_checkpoint: str | None = None
    verbose: bool = True
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    exclude_special_tokens: bool | list[int] = False
    n_batches_for_norm_estimate: int = 1000
    b_dec_init: Centre = "zeros"
    """Where b_dec starts: not in SAELens, whose SAEs start at 0 since version 6."""
    unit_norm_decoder: bool = False
    """Keep the decoder's rows at norm 1: not in SAELens since version 6."""


TODAY = tuple(f.name for f in fields(RunnerFields))
WRITTEN_BY_SAE_LENS = ("sae_lens_version", "sae_lens_training_version", "tokens_per_buffer")
OTHER_NAMES = {"finetune_from": "from_pretrained_path"}


class LanguageModelSAERunnerConfig(RunnerFields):
    """An SAE's training on a language model, in the fields of SAELens 6 or of its predecessors.

    Today's: `LanguageModelSAERunnerConfig(sae=TopKTrainingSAEConfig(d_in=..., d_sae=..., k=...),
    model_name=..., hook_name=..., ...)`. The older: `LanguageModelSAERunnerConfig(
    architecture="topk", activation_fn_kwargs={"k": 50}, d_in=..., expansion_factor=..., ...)`; a
    standard SAE then trains with the loss of its time (`LegacyStandardConfig`), and the L1 weight
    that today's loss would need is logged.

    Raises:
        TypeError: no such field, then or now.
        ValueError: a value breaks the rule it names, or its meaning exists no more.
    """

    def __init__(self, sae: SAEConfig | None = None, **given: Any) -> None:
        for name in WRITTEN_BY_SAE_LENS:
            given.pop(name, None)
        given = {OTHER_NAMES.get(name, name): value for name, value in given.items()}
        flat_config.refuse_unknown(given, TODAY)
        flat = [name for name in given if name in flat_config.KNOWN]
        if sae is None:
            logger = given.pop("logger", None)
            made = flat_config.nested(given)
            given = {**made.fields, "logger": logger or LoggingConfig(**made.logger)}
        elif flat:
            raise TypeError(
                f"{flat[0]} must not be given beside sae, got both; it belongs in the SAE's "
                "configuration or in logger=LoggingConfig(...)"
            )
        else:
            given["sae"] = sae
        super().__init__(**given)
        self._check()
        self._resolve()

    def _check(self) -> None:
        counts = ("training_tokens", "context_size", "train_batch_size_tokens", "n_eval_batches")
        check_counts(self, *counts)
        if self.model_class_name not in MODEL_CLASSES:
            raise ValueError(
                f"model_class_name must be one of {list(MODEL_CLASSES)}, got "
                f"{self.model_class_name!r}; any other model can be passed as override_model"
            )
        if self.lr_scheduler_name.lower() not in SCHEDULES:
            raise ValueError(
                f"lr_scheduler_name must be one of {list(SCHEDULES)}, got "
                f"{self.lr_scheduler_name!r}"
            )
        if self.use_cached_activations or self.cached_activations_path is not None:
            raise ValueError(
                "use_cached_activations must be False: read the rows [N, D] and train on them with "
                "fastsae.Trainer(cfg).fit(fastsae.ShuffledRows(rows, batch_size).from_step(0))"
            )
        if self.model_kwargs:
            raise ValueError(
                f"model_kwargs must be empty, got {self.model_kwargs}; pass a model that runs as "
                "it should as override_model"
            )
        self.sae.check_trainable()

    def _resolve(self) -> None:
        if self.model_from_pretrained_kwargs is None:
            hooked = self.model_class_name == "HookedTransformer"
            self.model_from_pretrained_kwargs = {"center_writing_weights": False} if hooked else {}
        self.llm_device = self.llm_device or self.device
        store = self.act_store_device or self.device
        self.act_store_device = self.llm_device if store == "with_model" else store
        if self.lr_end is None:
            self.lr_end = self.lr / 10
        if self.logger.run_name is None:
            self.logger.run_name = (
                f"{self.sae.architecture}-{self.sae.d_sae}-LR-{self.lr}-"
                f"Tokens-{self.training_tokens:3.3e}"
            )
        if self.checkpoint_path is not None:
            run = self.logger.wandb_id or uuid.uuid4().hex[:8]
            self.checkpoint_path = f"{self.checkpoint_path}/{run}"

    @property
    def schedule(self) -> Schedule:
        return SCHEDULES[self.lr_scheduler_name.lower()]

    @property
    def total_training_steps(self) -> int:
        return self.training_tokens // self.train_batch_size_tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the SAE's and the logger's as dictionaries."""
        values = {name: getattr(self, name) for name in TODAY}
        values |= {"sae": self.sae.to_dict(), "logger": asdict(self.logger)}
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LanguageModelSAERunnerConfig":
        """The configuration that `to_dict`, here or in SAELens, wrote."""
        values = dict(values)
        sae = dict(values.pop("sae"))
        architecture = sae.pop("architecture", None)
        kinds = {**CONFIGS, LegacyStandardConfig.architecture: LegacyStandardConfig}
        if architecture not in kinds:
            raise ValueError(
                f"sae must have an architecture of {list(kinds)}, got {architecture!r}"
            )
        values["logger"] = LoggingConfig(**values.get("logger", {}))
        values["seqpos_slice"] = tuple(values.get("seqpos_slice", (None,)))
        return cls(kinds[architecture].from_dict(sae), **values)
