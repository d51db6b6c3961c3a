"""SAELens's runner: nested and flat configurations train, log, save, stop and go on."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastsae
from fastsae.data import LanguageModel
from fastsae.interop.formats import save_checkpoint_as
from fastsae.sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainingRunner,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from fastsae.training.interruption import Interrupted
from parity import relative_error
from tiny_models import save_tiny_llama, tiny_llama

HOOK = "blocks.1.hook_resid_post"
D, F, L, B = 16, 64, 16, 64
STEPS = 12
QUIET = LoggingConfig(log_to_wandb=False, wandb_log_frequency=4)
RUN: dict[str, Any] = {
    "hook_name": HOOK,
    "context_size": L,
    "training_tokens": STEPS * B,
    "train_batch_size_tokens": B,
    "store_batch_size_prompts": 4,
    "n_batches_in_buffer": 16,
    "n_eval_batches": 2,
    "lr": 3e-3,
    "verbose": False,
}
HEADLINE = ("l0", "ce_loss_score", "explained_variance", "dead_latents")


def dataset(n=400):
    tokens = torch.randint(50, (n, L), generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict({"tokens": tokens.tolist()})


def topk(**changes):
    return TopKTrainingSAEConfig(d_in=D, d_sae=F, **{"k": 4, **changes})


def config(folder: Path, sae=None, **changes: Any):
    paths = {"checkpoint_path": str(folder / "checkpoints"), "output_path": str(folder / "out")}
    given = {**RUN, **paths, "logger": QUIET, **changes}
    return LanguageModelSAERunnerConfig(sae=topk() if sae is None else sae, **given)


@pytest.fixture(scope="module")
def lm():
    """Without a tokenizer there are no special tokens to leave out."""
    from types import SimpleNamespace

    tiny = tiny_llama()
    tokenizer: Any = SimpleNamespace(all_special_ids=[0], bos_token_id=0, eos_token_id=0)
    return LanguageModel("tiny", tiny.model, tokenizer)


def runner(cfg, lm, **options):
    return SAETrainingRunner(cfg, override_dataset=dataset(), override_model=lm, **options)


@pytest.mark.parametrize(
    "sae",
    [
        StandardTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=0.5, l1_warm_up_steps=4),
        GatedTrainingSAEConfig(d_in=D, d_sae=F, l1_coefficient=0.5),
        topk(normalize_activations="expected_average_only_in"),
        BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=4),
        MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=4, matryoshka_widths=[16, 32, F]),
        JumpReLUTrainingSAEConfig(d_in=D, d_sae=F, l0_coefficient=0.1),
        MatchingPursuitTrainingSAEConfig(d_in=D, d_sae=F, max_iterations=4),
    ],
    ids=lambda sae: sae.architecture,
)
def test_todays_configuration_trains_every_architecture(sae, tmp_path, lm):
    trainer = runner(config(tmp_path, sae), lm)
    made = trainer.run()
    for metrics in (trainer.metrics, trainer.trainer.metrics):
        assert all(isinstance(metrics[name], int | float) for name in HEADLINE)
        assert metrics["tokens"] == STEPS * B
    assert isinstance(made, fastsae.SAE) and hasattr(made, "hook_sae_acts_post")
    saved = SAE.load_from_disk(tmp_path / "out")
    x = torch.randn(3, D)
    assert torch.equal(saved(x), made(x))
    assert saved.cfg.hook_name == HOOK and saved.cfg.metadata.context_size == L
    sparsity = load_file(tmp_path / "out" / "sparsity.safetensors")["sparsity"]
    assert sparsity.shape == (F,) and float(sparsity.max()) <= 0
    lines = list(tmp_path.glob("checkpoints/*/metrics.jsonl"))
    assert [json.loads(line)["step"] for line in lines[0].read_text().splitlines()] == [1, 4, 8, 12]


@pytest.mark.filterwarnings("ignore")  # SAELens warns of itself
def test_what_it_writes_sae_lens_loads(tmp_path, lm):
    sae_lens = pytest.importorskip("sae_lens")
    made = runner(config(tmp_path), lm).run()
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    x = torch.randn(5, D)
    assert relative_error(theirs(x).detach(), made(x).detach()) < 1e-5
    assert theirs.cfg.metadata.hook_name == HOOK


def test_the_older_flat_configuration(tmp_path, lm):
    flat = {"d_in": D, "expansion_factor": 4, "hook_layer": 1, "log_to_wandb": False}
    cfg = LanguageModelSAERunnerConfig(
        **{**RUN, **flat},
        architecture="standard",
        l1_coefficient=1e-2,
        l1_warm_up_steps=4,
        use_ghost_grads=True,
        dead_feature_window=2,
        checkpoint_path=None,
        output_path=str(tmp_path / "out"),
        wandb_log_frequency=4,
    )
    trainer = runner(cfg, lm)
    sae = trainer.run()
    assert type(sae.cfg) is fastsae.StandardConfig
    assert sae.cfg.l1_coefficient == pytest.approx(1e-2 * D)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(F), atol=1e-5)
    assert (sae.b_dec != 0).any()
    assert all(name in trainer.metrics for name in (*HEADLINE, "ghost"))
    assert fastsae.SAE.load_from_disk(tmp_path / "out").cfg.architecture == "standard"


def test_the_flat_topk(tmp_path, lm):
    cfg = LanguageModelSAERunnerConfig(
        **{**RUN, "d_in": D, "d_sae": F, "log_to_wandb": False},
        architecture="topk",
        activation_fn="topk",
        activation_fn_kwargs={"k": 3},
        checkpoint_path=None,
        output_path=None,
    )
    trainer = runner(cfg, lm)
    sae = trainer.run()
    assert trainer.metrics["l0"] == 3 and sae.encode(torch.randn(1, D)).count_nonzero() <= 3


def test_heads_all_or_one(tmp_path, lm):
    hook = {"hook_name": "blocks.0.attn.hook_z"}
    whole = runner(config(tmp_path / "all", **hook), lm).run()
    assert whole.cfg.reshape_activations == "hook_z"
    assert whole(torch.randn(3, 2, D // 2)).shape == (3, 2, D // 2)
    one = TopKTrainingSAEConfig(d_in=D // 2, d_sae=F, k=4)
    made = runner(config(tmp_path / "one", one, hook_head_index=1, **hook), lm).run()
    assert made.cfg.reshape_activations == "none" and made(torch.randn(3, 8)).shape == (3, 8)


def test_the_same_seed_gives_the_same_bits(tmp_path, lm):
    one, two, other = (
        runner(config(tmp_path / str(n), seed=seed), lm).run() for n, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(one.W_dec, two.W_dec) and not torch.equal(one.W_dec, other.W_dec)


def test_figures_are_those_of_the_saved_sae(tmp_path, lm):
    trainer = runner(config(tmp_path), lm)
    sae = trainer.run()
    found = trainer.evaluate(sae)
    again = runner(config(tmp_path), lm).evaluate(fastsae.SAE.load_from_disk(tmp_path / "out"))
    assert found == again
    assert found["sparsity"]["l0"] == pytest.approx(trainer.metrics["l0"], abs=0.2)
    assert trainer.metrics["evaluation"].keys() == found.keys()


def test_an_evaluation_that_fails_costs_no_sae(tmp_path, lm, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("logits")

    trainer = runner(config(tmp_path), lm)
    monkeypatch.setattr(trainer, "_evaluate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.run()
    found = fastsae.SAE.load_from_disk(tmp_path / "out")
    assert torch.equal(found.W_dec, trainer.trainer.export().W_dec)


class TestStops:
    def saved(self, folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "out" / "sae_weights.safetensors")

    def test_checkpoints_are_n_and_the_last_on_demand(self, tmp_path, lm):
        for n, last, expected in ((0, False, []), (2, False, [4, 8, 12]), (0, True, [12])):
            folder = tmp_path / f"{n}{last}"
            runner(config(folder, n_checkpoints=n, save_final_checkpoint=last), lm).run()
            found = sorted(int(p.name[5:]) for p in folder.glob("checkpoints/*/checkpoints/*"))
            assert found == expected

    def test_a_resumed_run_ends_like_one_never_stopped(self, tmp_path, lm):
        runner(config(tmp_path / "whole", n_checkpoints=2), lm).run()
        (run,) = tmp_path.glob("whole/checkpoints/*")
        for n, path in enumerate((run / "checkpoints" / "step-000000008", run)):
            cfg = config(tmp_path / f"again{n}", resume_from_checkpoint=str(path))
            resumed = runner(cfg, lm)
            resumed.run()
            for name, value in self.saved(tmp_path / f"again{n}").items():
                assert torch.equal(value, self.saved(tmp_path / "whole")[name]), name

    def test_a_checkpoint_of_another_run_is_refused(self, tmp_path, lm):
        runner(config(tmp_path, n_checkpoints=2), lm).run()
        (run,) = tmp_path.glob("checkpoints/*")
        cfg = config(tmp_path / "other", lr=1e-3, resume_from_checkpoint=str(run))
        with pytest.raises(ValueError, match="config must be the checkpoint's to resume"):
            runner(cfg, lm).run()

    def test_a_signal_saves(self, tmp_path, lm):
        trainer = runner(config(tmp_path), lm)
        steps = iter(trainer.activations_store)

        def batches():
            for step in range(STEPS):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield next(steps)

        trainer.activations_store = batches()  # type: ignore[assignment]
        with pytest.raises(Interrupted, match="step-000000006"):
            trainer.run()
        (run,) = tmp_path.glob("checkpoints/*")
        runner(config(tmp_path / "rest", resume_from_checkpoint=str(run)), lm).run()
        runner(config(tmp_path / "whole"), lm).run()
        rest, whole = self.saved(tmp_path / "rest"), self.saved(tmp_path / "whole")
        assert all(torch.equal(rest[name], whole[name]) for name in whole)


class TestStarts:
    def test_finetune_from_any_format(self, tmp_path, lm):
        first = runner(config(tmp_path), lm).run()
        save_checkpoint_as(first, tmp_path / "sparsify", "sparsify")
        for n, name in enumerate(("finetune_from", "from_pretrained_path")):
            cfg = config(tmp_path / str(n), lr=1e-9, **{name: str(tmp_path / "sparsify")})
            x = torch.randn(40, D) * 3
            assert relative_error(runner(cfg, lm).run()(x).detach(), first(x).detach()) < 1e-4

    def test_an_sae_that_is_handed_in(self, tmp_path, lm):
        first = runner(config(tmp_path), lm).run()
        cfg = config(tmp_path / "more", topk(k=8), lr=1e-9)
        made = runner(cfg, lm, override_sae=first).run()
        assert made.cfg.k == 4 and relative_error(made.W_dec.detach(), first.W_dec.detach()) < 1e-4

    def test_an_untrained_training_sae(self, tmp_path, lm):
        start = TrainingSAE.from_dict(topk())
        made = runner(config(tmp_path, lr=1e-9), lm, override_sae=start).run()
        x = torch.randn(4, D)
        assert relative_error(made(x).detach(), start(x).detach()) < 1e-4


def test_the_model_by_name(tmp_path):
    folder = save_tiny_llama(tmp_path / "model")
    shape = {"dataset_path": "", "context_size": 8, "train_batch_size_tokens": 32}
    cfg = config(
        tmp_path,
        model_name=str(folder),
        **{**shape, "training_tokens": 96, "n_eval_batches": 1, "exclude_special_tokens": True},
    )
    trainer = LanguageModelSAETrainingRunner(cfg)
    sae = trainer.run()
    assert sae.cfg.metadata.model_name == str(folder)
    assert sae.cfg.metadata.exclude_special_tokens is True
    assert trainer.metrics["l0"] == 4


def test_how_the_model_is_loaded(tmp_path, monkeypatch):
    folder = str(save_tiny_llama(tmp_path / "model"))
    kwargs = {"dtype": "float64", "fold_ln": True, "n_devices": None}
    cfg = config(tmp_path, model_name=folder, dataset_path="", model_from_pretrained_kwargs=kwargs)
    assert SAETrainingRunner(cfg).lm.model.dtype == torch.float64
    cfg.model_from_pretrained_kwargs = {"dtype": "half8"}
    with pytest.raises(ValueError, match="kwargs.dtype must name a floating torch dtype"):
        SAETrainingRunner(cfg)
    asked = []
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):

        def load(*args, own=kind.from_pretrained, **kwargs):
            asked.append(kwargs["revision"])
            return own(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", load)
    cfg.model_from_pretrained_kwargs = {"revision": "step3000"}
    SAETrainingRunner(cfg)
    assert asked == ["step3000"] * 2
    cfg.model_from_pretrained_kwargs = {"checkpoint_value": 3000}
    with pytest.raises(ValueError, match="got checkpoint_value=3000; pass a model that was loaded"):
        SAETrainingRunner(cfg)


def test_wandb_that_is_absent_names_the_way_out(tmp_path, lm, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = config(tmp_path, logger=LoggingConfig())
    with pytest.raises(ImportError, match="logger=LoggingConfig\\(log_to_wandb=False\\)"):
        runner(cfg, lm).run()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"training_tokens": 0}, "training_tokens must be at least 1, got 0"),
        ({"n_eval_batches": 0}, "n_eval_batches must be at least 1, got 0"),
        ({"model_class_name": "HookedMamba"}, "model_class_name must be one of .*'HookedMamba'"),
        ({"lr_scheduler_name": "linear"}, "lr_scheduler_name must be one of .*got 'linear'"),
        ({"use_cached_activations": True}, "use_cached_activations must be False: .*Trainer"),
        ({"model_kwargs": {"a": 1}}, "model_kwargs must be empty"),
        ({"b_dec_init": "median"}, "b_dec_init must be one of"),
        ({"hook_name": "blocks.9.hook_resid_post"}, "9"),
        ({"model_name": "/nowhere/at/all"}, "nowhere"),
        ({"resume_from_checkpoint": "/nowhere"}, "nowhere"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_a_wrong_value_is_named(changes, message, tmp_path, lm):
    by_name = {"model_name"} & set(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runner(config(tmp_path, **changes), None if by_name else lm).run()


def test_a_width_that_is_not_the_models(tmp_path, lm):
    with pytest.raises(ValueError, match="d_in must be the width of .* 16, got 17"):
        runner(config(tmp_path, TopKTrainingSAEConfig(d_in=17, d_sae=F, k=4)), lm)
