"""`LanguageModelSAETrainingRunner`: SAELens's runner, on fastsae's trainer."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.checks import float_dtype
from fastsae.data import LanguageModel, load_language_model
from fastsae.extras import require
from fastsae.files import write_json
from fastsae.interop.formats import load_sae
from fastsae.interop.transformer_lens import as_language_model
from fastsae.sae_lens.activations_store import ActivationsStore
from fastsae.sae_lens.config import LanguageModelSAERunnerConfig
from fastsae.sae_lens.evals import EvalConfig, run_evals
from fastsae.sae_lens.hooked_sae import hooked
from fastsae.sae_lens.wandb_log import WandbLog
from fastsae.saes import SAE
from fastsae.training import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    Trainer,
)
from fastsae.training.checkpoint import load_checkpoint
from fastsae.training.trainer import write_sparsity

_log = logging.getLogger(__name__)

SAMPLE_BATCHES = 16
"""Most batches that decide the scale of the rows: 16 of 4096 rows settle a mean norm to 0.1 %."""
NO_DENSE_ROW_GRADIENT = ("matching_pursuit",)
"""Architectures whose loss reaches the dictionary through plain autograd."""
OF_NO_ROW = ("center_writing_weights", "fold_ln", "center_unembed")
"""Processing of TransformerLens's after which the residual stream is what it was, but for its mean,
which is taken off the rows."""


class LanguageModelSAETrainingRunner:
    """Trains the SAE that a configuration describes, evaluates and saves it.

        runner = LanguageModelSAETrainingRunner(cfg)
        sae = runner.run()
        runner.metrics["l0"], runner.metrics["ce_loss_score"]

    Args:
        cfg: the run.
        override_dataset: a `datasets` dataset instead of `cfg.dataset_path`.
        override_model: a model instead of `cfg.model_name`: HookedTransformer, TransformerBridge,
            a Hugging Face model or a `LanguageModel`.
        override_sae: start from this SAE, trained or not, whose configuration replaces `cfg.sae`.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig,
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: SAE | None = None,
    ) -> None:
        self.cfg = cfg
        self.lm = _load_model(cfg) if override_model is None else as_language_model(override_model)
        self.model = self.lm if override_model is None else override_model
        if cfg.compile_llm:
            self.lm.model.compile(mode=cfg.llm_compilation_mode)
        self._dataset = override_dataset
        self.activations_store = self._store()
        start = override_sae
        if start is None and cfg.from_pretrained_path is not None:
            start = load_sae(cfg.from_pretrained_path, cfg.device)
        self.trainer = Trainer(
            self._train_config(cfg.sae if override_sae is None else override_sae.cfg),
            device=cfg.device,
            out=None if cfg.checkpoint_path is None else Path(cfg.checkpoint_path),
            start=start,
        )
        self.metrics: dict[str, Any] = {}
        """The last line of the log; after `run`, the evaluation's figures as well."""

    @property
    def sae(self) -> SAE:
        """The SAE in training."""
        return self.trainer.sae

    def run(self) -> SAE:
        """Train, save and evaluate; returns the SAE as it is used.

        Afterwards `metrics`, here and on `trainer`, hold "l0", "explained_variance",
        "ce_loss_score", "dead_latents" and the rest of the evaluation, on contexts that follow
        those that were trained on.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
            ValueError: activations hold NaN or inf, or an argument breaks the rule it names.
        """
        cfg, trainer = self.cfg, self.trainer
        batches: Iterator[Tensor] = iter(self.activations_store)
        sample = list(islice(batches, self._sample_size()))
        batches = chain(sample, batches)
        if cfg.resume_from_checkpoint is not None:
            load_checkpoint(trainer, _checkpoint_folder(Path(cfg.resume_from_checkpoint)))
            _log.info("drawing the %d batches before the checkpoint again", trainer.steps_done)
            batches = islice(batches, trainer.steps_done, None)
        with ExitStack() as stack:
            bar = stack.enter_context(self._bar())
            wandb = stack.enter_context(WandbLog(cfg.logger, cfg.to_dict()))
            every = cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs

            def on_line(line: dict[str, Any]) -> None:
                bar.update(line["tokens"] - bar.n)
                bar.set_postfix({k: f"{line[k]:.4g}" for k in ("loss", "fvu", "l0", "dead")})
                wandb.log(line)
                if line["step"] % every == 0 and line["step"] < trainer.cfg.total_steps:
                    wandb.log_evaluation(line["step"], self.evaluate(trainer.export()))

            sae = trainer.fit(batches, sample=torch.cat(sample), progress=on_line)
            if cfg.hook_name.endswith("hook_z") and cfg.hook_head_index is None:
                sae.cfg = replace(sae.cfg, reshape_activations="hook_z")  # as models have it
            if cfg.output_path is not None:  # before the evaluation, which may fail
                self._save(sae, Path(cfg.output_path))
                wandb.save(Path(cfg.output_path))
            self.metrics = trainer.metrics = trainer.metrics | self._headline(sae)
            wandb.log_evaluation(trainer.steps_done, self.metrics["evaluation"])
        return hooked(sae)

    def evaluate(self, sae: SAE) -> dict[str, Any]:
        """`run_evals` on the first contexts of the dataset, which takes nothing from the run."""
        return self._evaluate(sae, self._store())

    def _evaluate(self, sae: SAE, store: ActivationsStore) -> dict[str, Any]:
        cfg = self.cfg
        evaluation = EvalConfig(
            batch_size_prompts=cfg.eval_batch_size_prompts,
            n_eval_reconstruction_batches=cfg.n_eval_batches,
            n_eval_sparsity_variance_batches=cfg.n_eval_batches,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        special = cfg.exclude_special_tokens
        return run_evals(sae, store, eval_config=evaluation, exclude_special_tokens=special)[0]

    def _headline(self, sae: SAE) -> dict[str, Any]:
        found = self._evaluate(sae, self.activations_store)
        dead = int(self.trainer.dead.dead().sum())
        return {
            "l0": found["sparsity"]["l0"],
            "explained_variance": found["reconstruction_quality"]["explained_variance"],
            "ce_loss_score": found["model_performance_preservation"]["ce_loss_score"],
            "dead_latents": dead,
            "dead_fraction": dead / sae.cfg.d_sae,
            "evaluation": found,
        }

    def _store(self) -> ActivationsStore:
        return ActivationsStore.from_config(self.lm, self.cfg, self._dataset)

    def _train_config(self, sae: Any) -> TrainConfig:
        cfg = self.cfg
        names = (
            "model_name",
            "model_class_name",
            "hook_name",
            "hook_head_index",
            "dataset_path",
            "context_size",
            "prepend_bos",
            "seqpos_slice",
            "exclude_special_tokens",
            "sequence_separator_token",
            "disable_concat_sequences",
            "model_from_pretrained_kwargs",
        )
        metadata = {name: getattr(cfg, name) for name in names}
        steps = cfg.total_training_steps
        row_gradients = sae.architecture not in NO_DENSE_ROW_GRADIENT
        return TrainConfig(
            sae=replace(
                sae, reshape_activations="none", metadata={**sae.metadata, **metadata}
            ),  # the store flattens heads
            data=DataConfig(
                total_tokens=cfg.training_tokens,
                batch_size=cfg.train_batch_size_tokens,
                compute_dtype="bfloat16" if cfg.autocast and cfg.device != "cpu" else sae.dtype,
            ),
            optimizer=OptimizerConfig(
                kind="row_adam" if row_gradients else "adam",
                lr=cfg.lr,
                betas=(cfg.adam_beta1, cfg.adam_beta2),
                unit_norm_decoder=cfg.unit_norm_decoder,
            ),
            schedule=ScheduleConfig(
                lr_curve=cfg.schedule,
                warm_up_steps=cfg.lr_warm_up_steps,
                decay_steps=cfg.lr_decay_steps,
                lr_end=cfg.lr_end,
                restart_cycles=cfg.n_restart_cycles,
            ),
            log=LogConfig(every=cfg.logger.wandb_log_frequency),
            checkpoint=CheckpointConfig(
                every=max(1, steps // (cfg.n_checkpoints + 1)) if cfg.n_checkpoints else None,
                keep=cfg.n_checkpoints + 1,
                at_end=cfg.save_final_checkpoint,
            ),
            dead_window=cfg.dead_feature_window * cfg.train_batch_size_tokens,
            b_dec_init=cfg.b_dec_init,
            W_dec_init="random",
            seed=cfg.seed,
        )

    def _sample_size(self) -> int:
        needed = self.cfg.b_dec_init != "zeros" or self.cfg.sae.normalize_activations != "none"
        steps = self.trainer.cfg.total_steps
        most = min(self.cfg.n_batches_for_norm_estimate, SAMPLE_BATCHES, steps)
        return max(1, most) if needed else 1

    def _bar(self) -> Any:
        tqdm = require("tqdm.auto", extra="train").tqdm
        total = self.trainer.cfg.data.total_tokens
        return tqdm(total=total, unit="tok", unit_scale=True, disable=not self.cfg.verbose)

    def _save(self, sae: SAE, folder: Path) -> None:
        sae.save_model(folder)
        write_sparsity(folder, self.trainer.log_sparsity().float().cpu())
        write_json(folder / "runner_cfg.json", self.cfg.to_dict())


class SAETrainingRunner(LanguageModelSAETrainingRunner):
    """The older name of `LanguageModelSAETrainingRunner`."""


def _load_model(cfg: LanguageModelSAERunnerConfig) -> LanguageModel:
    """The Hugging Face model: its residual stream is TransformerLens's, without its processing."""
    asked = dict(cfg.model_from_pretrained_kwargs or {})
    dtype, revision = asked.pop("dtype", None), asked.pop("revision", "main")
    for name, value in asked.items():
        if value and name not in OF_NO_ROW:
            raise ValueError(
                "model_from_pretrained_kwargs must be of 'dtype', 'revision' and "
                f"{list(OF_NO_ROW)}, got {name}={value!r}; pass a model that was loaded with it as "
                "override_model"
            )
    return load_language_model(
        _official_name(cfg.model_name),
        device=cfg.llm_device or cfg.device,
        dtype=None if dtype is None else float_dtype("model_from_pretrained_kwargs.dtype", dtype),
        revision=revision,
    )


def _official_name(name: str) -> str | None:
    """TransformerLens's short names of models, such as gpt2-small, as the hub knows them."""
    if "/" in name or Path(name).exists():
        return name
    try:
        from transformer_lens.loading_from_pretrained import get_official_model_name
    except ImportError:
        return name
    try:
        return get_official_model_name(name)
    except ValueError:
        return name


def _checkpoint_folder(path: Path) -> Path:
    """A checkpoint, or the newest one of a run's folder."""
    found = sorted(path.glob("checkpoints/step-*")) or sorted(path.glob("step-*"))
    return found[-1] if found else path
