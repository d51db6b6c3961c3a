"""SAELens's own trainer and runner with fastsae's ops inside against the same without."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.providers.sae_lens import sae_lens_config
from parity import relative_error

D, F, B, STEPS = 16, 96, 64, 20


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CASES: dict[str, dict[str, Any]] = {
    "topk": {"k": 6},
    "abstopk": {"k": 6},
    "batchtopk": {"k": 6.5},
    "matryoshka_batchtopk": {"k": 6.5, "matryoshka_widths": [16, 40, F]},
    "standard": {"l1_coefficient": 0.3, "l1_warm_up_steps": 10},
    "gated": {"l1_coefficient": 0.3, "l1_warm_up_steps": 10},
    "jumprelu": {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.5, "l0_warm_up_steps": 10},
    "matching_pursuit": {"max_iterations": 4},
}


def trainer_of(sae):
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = sae_lens_config(1000 * B, B, 1e-3, dead_window=4)
    return SAETrainer(cfg, sae, iter(()))


@pytest.mark.parametrize("architecture", CASES)
def test_twenty_steps_of_its_own_trainer(architecture):
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    torch.manual_seed(0)
    sae_class, config_class = sae_lens.registry.get_sae_training_class(architecture)
    plain = sae_class(config_class(d_in=D, d_sae=F, **CASES[architecture]))
    fast = accelerate(copy.deepcopy(plain))
    trainers = trainer_of(fast), trainer_of(plain)
    mixed = torch.randn(5, D)
    for step in range(STEPS):
        x = torch.randn(B, 5) @ mixed + 0.3 * torch.randn(B, D) + 0.5
        got, want = (trainer.step(x) for trainer in trainers)
        for trainer in trainers:
            trainer.n_training_steps += 1
        tolerance = 1e-5 if step == 0 else 1e-3
        assert relative_error(got.loss.detach(), want.loss.detach()) < tolerance
        assert got.losses.keys() == want.losses.keys()
        for name, value in want.losses.items():
            if float(value) > 1e-6:
                assert relative_error(got.losses[name].detach(), value.detach()) < tolerance, name
        assert relative_error(got.sae_out.detach(), want.sae_out.detach()) < 10 * tolerance
        fires = torch.equal(trainers[0].dead_neurons, trainers[1].dead_neurons)
        assert fires and torch.equal(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    for name, value in plain.state_dict().items():
        assert relative_error(fast.state_dict()[name], value) < 1e-3, name
    assert isinstance(fast, type(plain)) and fast.W_enc.stride() == (1, D)


def test_what_cannot_be_accelerated_is_named():
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    inference = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=3))
    with pytest.raises(TypeError, match="training_sae must be a TrainingSAE of SAELens, got TopK"):
        accelerate(inference)


@pytest.mark.parametrize("architecture", CASES)
def test_it_is_copied_and_saved(architecture, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    sae_class, config_class = sae_lens.registry.get_sae_training_class(architecture)
    sae = accelerate(sae_class(config_class(d_in=D, d_sae=F, **CASES[architecture])))
    trainer_of(sae).step(torch.randn(B, D))
    x = torch.randn(5, D)
    again = copy.deepcopy(sae)
    assert type(again) is type(sae) and torch.equal(again.encode(x), sae.encode(x))
    sae.save_model(tmp_path / "training")
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "training")
    assert all(torch.equal(again.state_dict()[n], t) for n, t in sae.state_dict().items())
    sae.save_inference_model(tmp_path / "inference")
    assert sae_lens.SAE.load_from_disk(tmp_path / "inference").cfg.d_sae == F


def test_a_copy_trains_itself():
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    first = accelerate(sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(D, F, k=3)))
    trainer_of(first).step(torch.randn(B, D))
    before = copy.deepcopy(first.state_dict())
    second = copy.deepcopy(first)
    trainer_of(second).step(torch.randn(B, D))
    assert all(torch.equal(first.state_dict()[name], before[name]) for name in before)
    assert not torch.equal(second.W_dec, before["W_dec"])


def test_moved_weights_are_followed():
    sae_lens = pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from fastsae.interop.sae_lens import accelerate

    sae = accelerate(sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(D, F, k=3)))
    trainer_of(sae).step(torch.randn(B, D))
    sae.double().float()  # both take new storage for parameters and new buffers
    sae.W_dec.data.mul_(2)
    x = torch.randn(B, D)
    plain = copy.deepcopy(sae)
    plain.__class__ = sae_lens.BatchTopKTrainingSAE
    got, want = trainer_of(sae).step(x), trainer_of(plain).step(x)
    assert relative_error(got.loss.detach(), want.loss.detach()) < 1e-5
    assert float(sae.topk_threshold) == pytest.approx(float(plain.topk_threshold), rel=1e-4)


@pytest.fixture
def registry():
    pytest.importorskip("sae_lens", reason="the `peers` extra is absent")
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    saved = dict(SAE_TRAINING_CLASS_REGISTRY)
    yield SAE_TRAINING_CLASS_REGISTRY
    SAE_TRAINING_CLASS_REGISTRY.update(saved)


def run_of_sae_lens(folder: Path, **changes: Any):
    """Its runner, from seed 0, on a tiny HookedTransformer: the trained SAE and the losses."""
    import datasets
    import sae_lens
    from sae_lens.training.sae_trainer import SAETrainer
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layers": 2, "d_model": D, "n_ctx": 16, "d_head": 8, "d_vocab": 50}
    model = HookedTransformer(HookedTransformerConfig(**sizes, n_heads=2, act_fn="gelu"))
    cfg = sae_lens.LanguageModelSAERunnerConfig(
        sae=sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=6),
        hook_name="blocks.1.hook_resid_post",
        context_size=16,
        training_tokens=12 * B,
        train_batch_size_tokens=B,
        store_batch_size_prompts=4,
        n_batches_in_buffer=4,
        n_eval_batches=1,
        lr=3e-3,
        prepend_bos=False,
        exclude_special_tokens=[0],
        save_final_checkpoint=True,
        checkpoint_path=str(folder / "checkpoints"),
        output_path=str(folder / "out"),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        **changes,
    )
    tokens = torch.randint(50, (200, 16), generator=torch.Generator().manual_seed(0))
    data = datasets.Dataset.from_dict({"tokens": tokens.tolist()})
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        step = SAETrainer.step

        def noted(self: Any, x: torch.Tensor):
            found = step(self, x)
            losses.append(float(found.loss.detach()))
            return found

        patch.setattr(SAETrainer, "step", noted)
        runner = sae_lens.LanguageModelSAETrainingRunner(cfg, data, model)
        made = runner.run()
    return made, losses


@pytest.mark.parametrize("compiled", [False, True])
def test_its_runner_with_registered_classes(registry, tmp_path, compiled):
    from sae_lens import TrainingSAE

    from fastsae.interop.sae_lens import register

    plain, want = run_of_sae_lens(tmp_path / "plain")
    assert set(register()) == set(CASES) and register() == sorted(CASES)
    fast, got = run_of_sae_lens(tmp_path / "fast", compile_sae=compiled)
    assert len(got) == len(want) == 12
    assert got == pytest.approx(want, rel=1e-4)
    assert type(fast) is registry["topk"][0] is not type(plain) and isinstance(fast, type(plain))
    for name, value in plain.state_dict().items():
        assert relative_error(fast.state_dict()[name], value) < 1e-3, name
    configs = [tmp_path / name / "out" / "cfg.json" for name in ("plain", "fast")]
    assert configs[0].read_text() == configs[1].read_text()
    [saved] = (tmp_path / "fast" / "checkpoints").glob(f"*/final_{12 * B}")
    assert type(TrainingSAE.load_from_disk(saved)) is type(fast)
