"""Every field of the flat configuration becomes what it meant, or names today's way."""

import logging
from dataclasses import asdict
from typing import Any

import pytest

from fastsae import LegacyStandardConfig
from fastsae.sae_lens import (
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from fastsae.sae_lens.flat_config import KNOWN

D = 64


def flat(**changes: Any) -> LanguageModelSAERunnerConfig:
    given = {"d_in": D, "hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}
    return LanguageModelSAERunnerConfig(**{**given, **changes})


class TestTheSAE:
    def test_the_classic_recipe_trains_under_the_loss_of_its_time(self, caplog):
        with caplog.at_level(logging.WARNING):
            cfg = flat(
                architecture="standard",
                expansion_factor=8,
                l1_coefficient=8e-5,
                l1_warm_up_steps=500,
                use_ghost_grads=True,
                mse_loss_normalization="dense_batch",
            )
        assert cfg.sae == LegacyStandardConfig(
            d_in=D,
            d_sae=8 * D,
            l1_coefficient=8e-5,
            l1_warm_up_steps=500,
            use_ghost_grads=True,
            mse_loss_normalization="dense_batch",
            decoder_init_norm=1.0,
        )
        assert cfg.unit_norm_decoder and cfg.b_dec_init == "geometric_median"
        assert "l1_coefficient=0.00512 in StandardTrainingSAEConfig" in caplog.text

    @pytest.mark.parametrize(
        "changes, unit_rows",
        [
            (
                {
                    "scale_sparsity_penalty_by_decoder_norm": True,
                    "normalize_sae_decoder": False,
                    "decoder_heuristic_init": True,
                    "decoder_heuristic_init_norm": 0.2,
                    "init_encoder_as_decoder_transpose": True,
                },
                False,
            ),
            ({}, True),
        ],
    )
    @pytest.mark.filterwarnings("ignore:decoder_heuristic_init")
    def test_the_later_recipe_has_todays_loss(self, changes, unit_rows, caplog):
        with caplog.at_level(logging.WARNING):
            cfg = flat(d_sae=128, l1_coefficient=5, l1_warm_up_steps=10, **changes)
        norm = changes.get("decoder_heuristic_init_norm", 1.0)
        assert cfg.sae == StandardTrainingSAEConfig(
            d_in=D, d_sae=128, l1_coefficient=5.0, l1_warm_up_steps=10, decoder_init_norm=norm
        )
        assert cfg.unit_norm_decoder == unit_rows
        assert "StandardTrainingSAEConfig(l1_coefficient=5)" in caplog.text

    def test_a_summed_loss_over_the_rows_norm(self):
        cfg = flat(l1_coefficient=5.0, mse_loss_normalization="dense_batch")
        assert isinstance(cfg.sae, LegacyStandardConfig)
        assert cfg.sae.equivalent_l1_coefficient == pytest.approx(5.0)

    @pytest.mark.parametrize(
        "named",
        [
            {"architecture": "topk", "activation_fn": "topk"},
            {"activation_fn": "topk"},
            {"activation_fn_str": "topk", "l1_coefficient": 1e-3, "lp_norm": 1.0},
            {"architecture": "topk"},
        ],
    )
    def test_topk(self, named):
        cfg = flat(activation_fn_kwargs={"k": 50}, d_sae=256, **named)
        assert cfg.sae == TopKTrainingSAEConfig(d_in=D, d_sae=256, k=50, decoder_init_norm=1.0)

    def test_jumprelu_and_gated(self):
        jumprelu = flat(architecture="jumprelu", l1_coefficient=2.0, l1_warm_up_steps=7).sae
        assert isinstance(jumprelu, JumpReLUTrainingSAEConfig)
        assert (jumprelu.l0_coefficient, jumprelu.l0_warm_up_steps) == (2.0, 7)
        assert (jumprelu.jumprelu_bandwidth, jumprelu.jumprelu_init_threshold) == (0.001, 0.001)
        assert jumprelu.d_sae == 4 * D
        gated = flat(architecture="gated", jumprelu_bandwidth=None).sae
        assert isinstance(gated, GatedTrainingSAEConfig) and gated.l1_coefficient == 1e-3

    @pytest.mark.parametrize(
        "value, expected",
        [
            (True, "expected_average_only_in"),
            (False, "none"),
            (None, "none"),
            ("layer_norm", "layer_norm"),
        ],
    )
    def test_normalization(self, value, expected):
        cfg = flat(normalize_activations=value, apply_b_dec_to_input=False)
        assert cfg.sae.normalize_activations == expected and not cfg.sae.apply_b_dec_to_input

    def test_dtype_is_the_saes(self):
        assert flat(dtype="torch.float32").sae.dtype == "float32"


class TestTheRun:
    def test_old_names(self):
        cfg = flat(
            hook_name="blocks.{layer}.hook_mlp_out",
            hook_layer=3,
            total_training_tokens=10_000,
            train_batch_size=256,
            store_batch_size=4,
            n_batches_in_buffer=8,
            hook_point_head_index=2,
        )
        assert cfg.hook_name == "blocks.3.hook_mlp_out"
        assert (cfg.training_tokens, cfg.train_batch_size_tokens) == (10_000, 256)
        assert (cfg.store_batch_size_prompts, cfg.n_batches_in_buffer) == (4, 32)
        assert cfg.hook_head_index == 2

    def test_names_before_hook_name(self):
        given: Any = {"hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1, "d_in": D}
        assert LanguageModelSAERunnerConfig(**given).hook_name == "blocks.1.hook_resid_pre"

    def test_logging(self):
        cfg = flat(log_to_wandb=False, wandb_project="tides", wandb_log_frequency=5, wandb_id="a")
        assert cfg.logger == LoggingConfig(
            log_to_wandb=False,
            wandb_project="tides",
            wandb_log_frequency=5,
            wandb_id="a",
            run_name=cfg.logger.run_name,
        )
        assert cfg.checkpoint_path == "checkpoints/a"

    def test_defaults_of_the_time(self):
        old, new = flat(), nested()
        assert (old.adam_beta1, new.adam_beta1) == (0.0, 0.9)
        assert (old.b_dec_init, new.b_dec_init) == ("geometric_median", "zeros")
        assert (old.unit_norm_decoder, new.unit_norm_decoder) == (True, False)
        assert flat(b_dec_init_method="mean").b_dec_init == "mean"
        assert flat(adam_beta1=0.5).adam_beta1 == 0.5

    def test_a_buffer_is_counted_in_batches_of_prompts(self):
        assert flat().n_batches_in_buffer == flat(n_batches_in_buffer=20).n_batches_in_buffer
        few = flat(n_batches_in_buffer=8, store_batch_size_prompts=4)
        assert (few.n_batches_in_buffer, flat().n_batches_in_buffer) == (32, 640)

    def test_todays_fields_pass_through(self):
        same = {
            "context_size": 64,
            "lr": 4e-4,
            "lr_scheduler_name": "cosineannealing",
            "lr_warm_up_steps": 5,
            "n_checkpoints": 3,
            "seed": 7,
            "dead_feature_window": 50,
            "exclude_special_tokens": True,
            "output_path": None,
        }
        for name, value in same.items():
            assert getattr(flat(**{name: value}), name) == value, name


def nested(**changes: Any) -> LanguageModelSAERunnerConfig:
    return LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=D, d_sae=256, k=8), **changes
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "batchtopk"}, "architecture must be one of .*newer ones are sae="),
        ({"activation_fn": "tanh-relu"}, r"activation_fn must be one of .*got 'tanh-relu'"),
        ({"activation_fn": "topk"}, 'activation_fn_kwargs must be {"k": ...}'),
        ({"d_in": None}, "d_in must be the width"),
        ({"d_sae": 100, "expansion_factor": 2}, "expansion_factor .* = 128 or alone, got 100"),
        ({"noise_scale": 0.1}, "noise_scale is no longer part of training, got 0.1"),
        ({"resume": True}, "pass resume_from_checkpoint=FOLDER"),
        ({"finetuning_tokens": 5}, "from_pretrained_path=FOLDER"),
        ({"decoder_orthogonal_init": True}, "decoder_orthogonal_init is no longer"),
        ({"init_encoder_as_decoder_transpose": False}, "transpose must be True or left out"),
        ({"normalize_sae_decoder": False}, "scale_sparsity_penalty_by_decoder_norm must be True"),
        ({"b_dec_init_method": "median"}, "b_dec_init_method must be 'geometric_median'"),
        ({"hook_layer": 3}, "hook_layer must be the layer of hook_name, .* got 3"),
        ({"hook_name": "blocks.{layer}.hook_mlp_out"}, "hook_layer must be given"),
        ({"normalize_activations": "twice"}, "normalize_activations"),
        ({"architecture": "gated", "use_ghost_grads": True}, "use_ghost_grads must not be given"),
        ({"architecture": "jumprelu", "lp_norm": 0.5}, "lp_norm must not be given"),
        ({"mse_loss_normalization": "rows"}, "mse_loss_normalization must be 'dense_batch'"),
    ],
)
@pytest.mark.usefixtures("no_type_checker")
def test_what_means_nothing_today_says_so(changes, message):
    with pytest.raises(ValueError, match=message):
        flat(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"l1_coeficient": 1.0}, r"no field 'l1_coeficient'; nearest: \['l1_coefficient'"),
        ({"trainning_tokens": 1}, r"no field 'trainning_tokens'; nearest: \['training_tokens'"),
        ({"qqqqq": 1}, "no field 'qqqqq'; nearest: none"),
    ],
)
def test_a_field_that_never_was_names_the_nearest(changes, message):
    with pytest.raises(TypeError, match=message):
        flat(**changes)
    with pytest.raises(TypeError, match=message):
        nested(**changes)


@pytest.mark.parametrize("name", KNOWN)
def test_no_flat_field_beside_a_nested_sae(name):
    with pytest.raises(TypeError, match=f"{name} must not be given beside sae"):
        nested(**{name: 1})


@pytest.mark.parametrize("made", [flat(), flat(l1_coefficient=5.0), nested()])
def test_a_configuration_survives_its_file(made):
    again = LanguageModelSAERunnerConfig.from_dict(made.to_dict())
    assert again.checkpoint_path.startswith(made.checkpoint_path)
    again.checkpoint_path = made.checkpoint_path
    assert asdict(again) == asdict(made)
    assert type(again.sae) is type(made.sae)
