"""What a run says of itself: its memory before, its figures against targets after."""

import math
from typing import Any

import pytest
import torch

from fastsae import SAES, MatchingPursuitConfig, StandardConfig, Trainer
from fastsae.data import harvest, resid_hook_name, resolve_hook
from fastsae.evaluation.diagnosis import diagnose, verdict_table
from fastsae.evaluation.evaluate import (
    comparison_table,
    evaluate,
    evaluate_on_text,
    evaluate_several,
    report_table,
)
from fastsae.training.memory import MemoryPlan, OutOfMemory, explained
from fastsae.training.optimizer import DICTIONARY
from tiny_models import tiny_llama
from training_runs import ROWS, B, D, F, config, standard_config, topk_config

CPU = torch.device("cpu")


class TestMemory:
    @pytest.mark.parametrize(
        "sae, options, compute",
        [
            (topk_config(), {}, None),
            (topk_config(), {"kind": "adam"}, "bfloat16"),
            (topk_config(), {"moments": "8bit"}, None),
            (topk_config(), {"moments": "bfloat16"}, "bfloat16"),
            (topk_config(dtype="bfloat16"), {"rounding": "stochastic"}, None),
            (standard_config(), {"kind": "signum"}, None),
        ],
        ids=["row_adam", "adam", "8bit", "bf16 moments", "bf16 masters", "signum"],
    )
    def test_what_stays_is_predicted_to_the_byte(self, sae, options, compute):
        trainer = Trainer(
            config(sae=sae, optimizer=options, data={"compute_dtype": compute}), device="cpu"
        )
        trainer.initialise(ROWS.rows)
        trainer.step(ROWS.batch(0))
        items = MemoryPlan({"": trainer.cfg}, CPU).items()
        states = [trainer.optimizer.state[p] for p in trainer.sae.parameters()]
        moments = [t for s in states for t in s.values() if t.ndim and t.shape != (F,)]
        moments += [s[n] for s in states for n in ("exp_avg", "exp_avg_sq") if n in s]
        unique = {t.data_ptr(): t.nbytes for t in moments}
        dead = trainer.dead
        dense = [
            p.nbytes
            for name, p in trainer.sae.named_parameters()
            if not (name in DICTIONARY and trainer.cfg.optimizer.kind == "row_adam")
        ]
        assert items["weights"] == sum(p.nbytes for p in trainer.sae.parameters())
        assert items["moments"] == sum(unique.values())
        assert items["gradients"] == sum(dense)
        copies = trainer.sae.compute_copies.values()
        assert items["copies for the products"] == sum(t.nbytes for t in copies)
        assert items["counters"] == dead.since_fired.nbytes + dead.fired.nbytes

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_a_whole_step_is_predicted_on_a_gpu(self):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cfg = config(sae=topk_config(d_in=768, d_sae=65_536, k=32), data={"batch_size": 4096})
        trainer = Trainer(cfg, device="cuda")
        trainer.initialise(torch.randn(4096, 768))
        for _ in range(3):
            trainer.step(torch.randn(4096, 768))
        peak = torch.cuda.max_memory_allocated() - before
        predicted = MemoryPlan({"": trainer.cfg}, trainer.device).n_bytes
        assert 0.7 < predicted / peak < 1.4

    def test_runs_side_by_side_add_up_but_for_their_steps(self):
        one, two = (config(sae=topk_config(d_sae=n)).resolved(CPU) for n in (F, 2 * F))
        alone = [MemoryPlan({"": cfg}, CPU).items() for cfg in (one, two)]
        both = MemoryPlan({"a": one, "b": two}, CPU, held={"activations": 7}).items()
        assert both["weights"] == alone[0]["weights"] + alone[1]["weights"]
        assert both["one step"] == max(items["one step"] for items in alone)
        assert both["activations"] == 7

    def test_the_settings_that_free_most_come_first_with_their_bytes(self):
        cfg = config(sae=topk_config(d_in=64, d_sae=2**17, k=8)).resolved(CPU)
        held = {"activations": 4 * 10**9}
        plan = MemoryPlan({"": cfg}, CPU, held, {"activations": "harvest_tokens halved"})
        savings = plan.savings()
        assert savings[0] == ("harvest_tokens halved", 2 * 10**9)
        assert len(savings) == 3 and savings[1].n_bytes >= savings[2].n_bytes > 0
        assert "1.863 GiB less" in plan.advice() and "activations" in plan.table()
        assert str(plan.device) in plan.table()

    @pytest.mark.parametrize("architecture", sorted(set(SAES) - {"temporal"}))
    def test_every_variant_has_a_plan(self, architecture):
        shape: dict[str, Any] = {"d_in": D, "d_sae": F} | (
            {"k": 4} if "topk" in architecture else {}
        )
        sae = SAES[architecture].config_class(**shape)
        plan = MemoryPlan({"": config(sae=sae).resolved(CPU)}, CPU)
        assert plan.n_bytes > 0 and plan.savings() and plan.fits

    def test_running_out_says_what_there_is_and_what_frees_most(self):
        def batches():
            yield ROWS.batch(0)
            yield torch.empty(2**50, D)

        with pytest.raises(OutOfMemory) as caught:
            Trainer(config(), device="cpu").fit(batches())
        message = str(caught.value)
        assert "DefaultCPUAllocator" in message.splitlines()[0]
        assert "memory on cpu, predicted:" in message and "moments" in message
        assert message.count(" less") == 3

    def test_other_errors_stay_what_they_are(self):
        plan = MemoryPlan({"": config().resolved(CPU)}, CPU)
        with pytest.raises(RuntimeError, match="^something else$"), explained(plan):
            raise RuntimeError("something else")


def report(l0=8.0, ev=0.8, score=0.95, dead=3):
    trained = {"ce_loss_score": score}
    return {
        "rows": {"l0": l0, "ev_saelens": ev},
        "cross_entropy": {"trained_rows": trained},
        "training": {"dead": dead},
    }


class TestVerdicts:
    def test_a_good_run_meets_its_targets(self):
        verdicts = diagnose(topk_config(k=8), report())
        assert [v.metric for v in verdicts] == [
            "L0",
            "CE loss score",
            "explained variance",
            "dead latents",
        ]
        assert all(v.met for v in verdicts)
        assert verdict_table(verdicts).count("met") == 4

    @pytest.mark.parametrize(
        "sae, changes, metric, said",
        [
            (standard_config(), {"l0": 500.0}, "L0", "raise l1_coefficient"),
            (standard_config(), {"l0": 1.0}, "L0", "lower l1_coefficient"),
            (topk_config(k=8), {"l0": 4.0}, "L0", "train on more tokens"),
            (topk_config(k=8), {"score": 0.5}, "CE loss score", "raise k"),
            (standard_config(), {"ev": 0.2}, "explained variance", "lower l1_coefficient"),
            (topk_config(k=8), {"dead": 60}, "dead latents", "aux_loss_coefficient"),
            (
                MatchingPursuitConfig(d_in=D, d_sae=F),
                {"score": 0.1, "l0": 20.0},
                "CE loss score",
                "raise max_iterations",
            ),
        ],
    )
    def test_a_miss_names_the_field(self, sae, changes, metric, said):
        verdicts = diagnose(sae, report(**{"l0": 8.0, **changes}))
        missed = {v.metric: v for v in verdicts if not v.met}
        assert said in missed[metric].change
        assert f"missed: {missed[metric].change}" in verdict_table(verdicts)

    def test_targets_that_are_nan_are_missed(self):
        assert not any(
            v.met for v in diagnose(topk_config(k=8), report(*[float("nan")] * 3, dead=F))
        )


def test_several_saes_are_evaluated_as_each_alone():
    lm = tiny_llama(initializer_range=0.5)
    hook = resolve_hook(lm, resid_hook_name(0))
    tokens = torch.randint(50, (6, 12), generator=torch.Generator().manual_seed(0))
    held_out = harvest(lm, hook, tokens)
    saes = {
        "topk": SAES["topk"](topk_config()),
        "relu": SAES["standard"](StandardConfig(d_in=D, d_sae=F)),
    }
    done = []
    reports = evaluate_several(saes, lm, hook, held_out, progress=lambda a, b: done.append((a, b)))
    assert reports == {name: evaluate(sae, lm, hook, held_out) for name, sae in saes.items()}
    assert done[-1][0] == done[-1][1]
    ce = reports["topk"]["cross_entropy"]["trained_rows"]
    assert ce["kl_score"] == pytest.approx(1 - ce["kl_spliced"] / ce["kl_zero_ablated"])
    assert ce["ce_mean_ablated"] != ce["ce_zero_ablated"]
    table = comparison_table(reports).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["topk", "relu"]
    table = report_table(reports["relu"])
    for name in ("KL from clean", "CE mean-ablated", "overcomplete", "norm of x_hat", "density"):
        assert name in table
    (untouched,) = [line for line in table.splitlines() if "untouched" in line]
    assert untouched.split()[-2:] == ["0.0833", "0.0000"]  # the first of 12 positions
    with pytest.raises(ValueError, match="saes must hold at least one SAE, got none"):
        evaluate_several({}, lm, hook, held_out)


def test_text_in_parts_gives_the_figures_of_the_whole():
    lm = tiny_llama(initializer_range=0.5)
    hook = resolve_hook(lm, resid_hook_name(0))
    tokens = torch.randint(50, (7, 12), generator=torch.Generator().manual_seed(0))
    sae = {"": SAES["topk"](topk_config())}
    whole = evaluate_several(sae, lm, hook, harvest(lm, hook, tokens))[""]
    assert evaluate_on_text(sae, lm, hook, tokens)[""] == whole
    done = []
    tell = lambda a, b: done.append((a, b))
    median = harvest(lm, hook, tokens[:3]).median_norm
    parts = evaluate_on_text(sae, lm, hook, tokens, part_tokens=3 * 12, progress=tell)[""]
    assert done == sorted(done) and done[-1] == (tokens.numel(), tokens.numel()) and len(done) > 6
    assert parts["left_out"] == {**whole["left_out"], "norm_limit": 10 * median}
    for name in ("l0", "fvu", "cosine_similarity", "l2_ratio", "dead_fraction", "density_max"):
        for rows in ("rows", "all_rows"):
            assert parts[rows][name] == pytest.approx(whole[rows][name], rel=1e-5), (rows, name)
    for name in ("ce_clean", "ce_spliced", "ce_zero_ablated", "kl_spliced", "ce_loss_score"):
        for rows in ("trained_rows", "every_position"):
            got, wanted = (one["cross_entropy"][rows][name] for one in (parts, whole))
            assert got == pytest.approx(wanted, rel=1e-5), (rows, name)


def test_nan_in_a_later_part_is_named_by_its_context():
    lm = tiny_llama()
    with torch.no_grad():
        poisoned: Any = lm.model.get_input_embeddings().weight
        poisoned[7] = math.nan
    tokens = torch.full((5, 12), 3)
    tokens[4, 6] = 7  # attention spreads it over the context
    hook = resolve_hook(lm, resid_hook_name(0))
    sae = {"": SAES["topk"](topk_config())}
    with pytest.raises(ValueError, match="NaN or inf in context 4 at position 0"):
        evaluate_on_text(sae, lm, hook, tokens, part_tokens=24)


def test_the_step_of_a_plan_shrinks_with_its_parts():
    cfgs = [config(data={"micro_batch_size": m}).resolved(CPU) for m in (None, B // 2)]
    steps = [MemoryPlan({"": cfg}, CPU).items()["one step"] for cfg in cfgs]
    assert steps[1] < steps[0]
