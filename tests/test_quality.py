"""The quality benchmark from end to end on a tiny model, and what its tables say."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("sae_lens", reason="the `peers` extra is absent")

from bench.quality import __main__ as quality
from bench.quality import data, synthetic
from bench.quality.methods import Setting, sae_config
from bench.quality.search import ABLATIONS, SCHEDULES, our_defaults, trial
from bench.report.quality import T_QUANTILES, interval, report
from bench.report.readme import quality_table
from fastsae import TopKConfig
from tiny_models import save_tiny_llama


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    folder = save_tiny_llama(tmp_path / "model", max_position_embeddings=128)
    source = data.Source("tiny", 1, 2, lambda: folder)
    monkeypatch.setitem(data.SOURCES, "tiny", source)
    monkeypatch.setattr(data, "TRAIN_TOKENS", 5000)
    for module in ("bench.record", "bench.report.rows"):
        monkeypatch.setattr(f"{module}.RESULTS", tmp_path)
    monkeypatch.setattr(quality, "K", 8)
    few = ("the defaults", "directions at random", "without AuxK")
    monkeypatch.setattr(quality, "ABLATIONS", {name: ABLATIONS[name] for name in few})
    return ["--sources", "tiny", "--cache", str(tmp_path / "cache"), "--tokens", "4096"]


def rows_in(folder):
    return [json.loads(line) for line in (folder / "quality.jsonl").read_text().splitlines()]


def test_every_part_resumes_and_is_told(tiny, tmp_path, capsys):
    few = ["--trials", "2", "--seeds", "2"]
    quality.main([*tiny, *few, "--parts", "search", "compare", "ablation"])
    rows = rows_in(tmp_path)
    names = [row["bench"] for row in rows]
    assert names.count("quality-search") == 4
    assert names.count("quality") == 2 * 3 * 2  # architectures, methods, seeds
    assert names.count("quality-ablation") == 2 * len(quality.ABLATIONS)
    compared = [row for row in rows if row["bench"] == "quality"]
    assert all(0 < row["fvu"] < 10 and row["l0"] > 0 for row in compared)
    assert {row["l0"] for row in compared if row["setting"]["architecture"] == "topk"} == {8.0}
    assert all(("decoder_match" in row) == (row["seed"] == 1) for row in compared)
    tuned = [row for row in compared if row["method"] == "sae-lens-tuned"]
    tried = [r for r in rows if r["bench"] == "quality-search" and r["library"] == "sae-lens"]
    best = min(tried, key=lambda row: row["fvu"])
    assert all(row["options"] == best["options"] for row in tuned)
    capsys.readouterr()
    quality.main([*tiny, *few, "--parts", "search", "compare", "ablation"])
    assert rows_in(tmp_path) == rows
    shown = capsys.readouterr().out
    for words in ("tiny, batchtopk, F = 128", "fvu: ", "without AuxK", "search, on validation"):
        assert words in shown


def test_sae_lens_by_its_own_arithmetic_learns_the_same(tiny, tmp_path):
    both = ["--methods", "sae-lens-tuned", "sae-lens-tuned-own", "--architectures", "topk"]
    with pytest.raises(SystemExit, match="SAELens must be tuned before it is compared with"):
        quality.main([*tiny, *both, "--seeds", "1", "--parts", "compare"])
    quality.main([*tiny, *both, "--seeds", "1", "--trials", "1", "--parts", "search", "compare"])
    accelerated, own = rows_in(tmp_path)[-2:]
    assert accelerated["fvu"] == pytest.approx(own["fvu"], rel=1e-3)
    assert accelerated["ce_loss_score"] == pytest.approx(own["ce_loss_score"], abs=0.01)


def test_a_known_dictionary_is_recovered(monkeypatch):
    monkeypatch.setattr(synthetic, "FEATURES", 64)
    monkeypatch.setattr(synthetic, "WIDTH", 32)
    monkeypatch.setattr(synthetic, "K", 3)
    monkeypatch.setattr(synthetic, "ROWS", 60_000)
    monkeypatch.setattr(synthetic, "EVALUATED", 4096)
    options = our_defaults(synthetic.setting_of("topk"))
    found = synthetic.recovery("fastsae", options, "topk", 0)
    untrained = synthetic.recovery("fastsae", {**options, "lr": 1e-9}, "topk", 0)
    assert found["mcc"] > 0.8 > untrained["mcc"]
    assert found["f1"] > untrained["f1"]


def test_our_sae_is_the_one_that_users_get():
    setting = Setting("smollm2-135m", "topk", 4608, 32, 400_000)
    expected = TopKConfig(
        d_in=576, d_sae=4608, k=32, normalize_activations="expected_average_only_in"
    )
    assert sae_config(setting, 576) == expected
    changed = sae_config(setting, 576, normalize_activations="none", aux_loss_coefficient=0.0)
    assert changed == replace(expected, normalize_activations="none", aux_loss_coefficient=0.0)


def test_trials_are_the_same_each_time_and_within_the_space():
    setting = Setting("smollm2-135m", "topk", 4608, 32, 400_000)
    for library in ("fastsae", "sae-lens"):
        options = trial(library, 5, setting)
        assert options == trial(library, 5, setting) != trial(library, 4, setting)
        assert all(options[name] in values for name, values in SCHEDULES.items())
    ours = trial("sae-lens", 1, setting)
    assert ours["batch_size"] == 512 and ours["lr"] == 3e-3
    assert ours["warm_up"] + ours["decay"] == 1


def test_the_quantiles_are_students():
    t = pytest.importorskip("scipy.stats").t
    for n, quantile in T_QUANTILES.items():
        assert quantile == pytest.approx(t.ppf(0.975, n - 1), abs=1e-3)


def test_a_difference_stands_beside_its_interval():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3**0.5)
    setting = {"source": "s", "architecture": "topk", "d_sae": 8, "k": 2, "tokens": 10}
    base = {"bench": "quality", "setting": setting, "ce_loss_score": 0.9, "never_fired": 0.0}
    rows = [
        base | {"method": method, "seed": seed, "fvu": value + 0.01 * seed, "date": "2"}
        for method, value in (("fastsae", 0.18), ("sae-lens-tuned", 0.2))
        for seed in range(3)
    ]
    assert "wall-clock" not in report(rows)
    rows[0] |= {"seconds": 30.0, "curve": [[10.0, 0.4], [20.0, 0.21], [30.0, 0.18]]}
    slow = {"method": "sae-lens-tuned-own", "seed": 0, "seconds": 90.0, "fvu": 0.2, "date": "2"}
    rows.append(base | slow | {"curve": [[15.0, 0.9], [29.0, 0.5], [31.0, 0.4], [90.0, 0.22]]})
    seen = next(line.split() for line in report(rows).splitlines() if line.startswith("0 "))
    assert seen == ["0", "30", "0.1800", "0.5000", "90", "0.2200", "20"]
    assert "wall-clock" not in report([*rows[:-1], rows[-1] | {"threads": 1}])
    repeated = [row | {"fvu": 0.5, "date": "1"} for row in rows[:2]]
    assert "fvu: -9.54 +- 1.13 %" in report(rows)
    assert report([*repeated, *rows]) == report(rows)


def test_the_readme_has_the_setting_with_the_most_seeds():
    def row(tokens, method, seed, fvu):
        setting = {"source": "s", "architecture": "topk", "d_sae": 8, "k": 2, "tokens": tokens}
        found = {"fvu": fvu, "ce_loss_score": 0.9, "never_fired": 0.25, "date": "1"}
        return {"bench": "quality", "setting": setting, "method": method, "seed": seed, **found}

    rows = [row(10, m, s, f) for m, f in (("fastsae", 0.2), ("sae-lens", 0.4)) for s in (0, 1)]
    rows += [row(20, "fastsae", 0, 0.1), row(20, "sae-lens-tuned-own", 0, 0.1)]
    text = "\n".join(quality_table(rows))
    assert "s, topk, F=8, K=2, 10 tokens" in text and "20 tokens" not in text
    assert "| fastsae, its defaults | 0.200 | 0.900 | 25.0% | 2 |" in text
    assert "| SAELens, its defaults | 0.400 |" in text and "tuned |" not in text
