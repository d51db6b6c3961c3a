"""`fastsae train | eval` on the real offline model, a few thousand tokens at a shallow layer."""

import json
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch

from fastsae import SAE, SAES, StandardConfig, TopKConfig, TopKSAE
from fastsae.analysis.plots import density_of_run
from fastsae.cli import MUST_AGREE, _shared_metadata, main
from fastsae.training.log import read_log
from fastsae.training.run_config import LanguageModelRun
from fastsae.training.side_by_side import SET_BY_THE_RUN, changes_in
from tiny_models import save_tiny_llama

SMALL = [
    "--layer",
    "1",
    "--d-sae",
    "640",
    "--k",
    "8",
    "--tokens",
    "6144",
    "--batch-size",
    "512",
    "--context-size",
    "64",
    "--eval-tokens",
    "256",
    "--checkpoints",
    "3",
    "--device",
    "cpu",
]

WITHOUT_K = [a for i, a in enumerate(SMALL) if "--k" not in SMALL[max(0, i - 1) : i + 1]]


@pytest.fixture(scope="module")
def tiny(made_once):
    """Options of a run on a tiny model."""
    return ["--model", str(made_once("cli-model", save_tiny_llama))]


@pytest.fixture(scope="module")
def run(made_once):
    """A finished run."""
    return made_once("cli-run", lambda out: main(["train", "--out", str(out), *SMALL]))


@pytest.fixture(scope="module")
def tiny_run(made_once, tiny):
    return made_once("cli-tiny-run", lambda out: main(["train", "--out", str(out), *SMALL, *tiny]))


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fastsae: error: ")
    return message


def test_train_leaves_everything_behind(run):
    assert (run / "run.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "step-000000008",
        "step-000000012",
    ]
    log = read_log(run / "metrics.jsonl")
    assert log[-1]["step"] == 12 and log[-1]["fvu"] < log[0]["fvu"]
    sae = SAE.load_from_disk(run / "sae")
    assert sae.cfg.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert torch.allclose(sae.decoder_norms(), torch.ones(640), atol=1e-5)
    report = json.loads((run / "eval.json").read_text())
    assert report["rows"]["l0"] == 8
    assert report["left_out"]["first_positions"] == 4


def test_eval_repeats_the_figures_of_the_run(run, tmp_path, capsys):
    arguments = ["eval", "--sae", str(run / "sae"), "--tokens", "256", "--device", "cpu"]
    main([*arguments, "--out", str(tmp_path / "eval.json")])
    table = capsys.readouterr().out
    assert "CE loss score" in table and "FVU" in table
    again = json.loads((tmp_path / "eval.json").read_text())
    first = json.loads((run / "eval.json").read_text())
    assert again["rows"]["fvu"] == pytest.approx(first["rows"]["fvu"], rel=1e-4)
    for columns in ("trained_rows", "every_position"):
        again_ce, first_ce = again["cross_entropy"][columns], first["cross_entropy"][columns]
        assert again_ce["ce_spliced"] == pytest.approx(first_ce["ce_spliced"], rel=1e-3)


def test_options_of_a_variant_reach_its_configuration(tiny, tmp_path):
    own = ["--variant", "standard", "--l1-coefficient", "0.25", "--no-apply-b-dec-to-input"]
    main(["train", "--out", str(tmp_path / "run"), *WITHOUT_K, *tiny, *own])
    cfg = SAE.load_from_disk(tmp_path / "run/sae").cfg
    assert isinstance(cfg, StandardConfig)
    assert (cfg.l1_coefficient, cfg.apply_b_dec_to_input, cfg.d_sae) == (0.25, False, 640)


def test_a_variant_that_is_registered_can_be_trained(tiny, tmp_path, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class PairConfig(TopKConfig):
        architecture: ClassVar[str] = "pair"
        k: int = 2
        temperature: float = 1.0

    class PairSAE(TopKSAE):
        config_class = PairConfig

    monkeypatch.setitem(SAES, "pair", PairSAE)
    out = tmp_path / "run"
    own = ["--variant=pair", "--temperature", "0.5"]
    main(["train", "--out", str(out), *WITHOUT_K, *tiny, *own])
    cfg = SAE.load_from_disk(out / "sae").cfg
    assert isinstance(cfg, PairConfig)
    assert (cfg.k, cfg.temperature) == (2, 0.5)


@pytest.mark.parametrize("variant", SAES)
def test_help_has_an_option_for_every_field_of_a_variant(variant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--variant", variant, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in fields(SAES[variant].config_class):
        option = f"--{field.name.replace('_', '-')}"
        assert (option in shown) == (field.name not in SET_BY_THE_RUN), option


@pytest.mark.parametrize(
    "own, named",
    [
        (["--variant", "dense"], list(SAES)),
        (["--variant"], ["--variant"]),
        (["--variant", "standard", "--k", "8"], ["--k"]),
    ],
    ids=["unknown", "none", "of-another"],
)
def test_an_option_that_no_variant_has_is_refused(own, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "run"), *own])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in named)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variant": "dense"}, r"variant must be one of \['.*'topk'.*\], got 'dense'"),
        ({"variant": "transcoder"}, "variant must reconstruct its input, got 'transcoder'"),
        ({"sae": {"kk": 3}}, "sae must hold fields of the variant topk among .*'k'.*, got 'kk'"),
        ({"sae": {"d_in": 3}}, "sae must hold fields of the variant topk among .*, got 'd_in'"),
        ({"layer": 1, "hook": "model.layers.1"}, "layer must be None when hook is given, got 1"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
    ],
    ids=["variant", "transcoder", "field", "field-of-the-run", "layer", "tokens"],
)
def test_a_run_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LanguageModelRun(out=tmp_path, **changes)


def test_a_normalisation_that_cannot_be_trained_is_refused_at_once(tmp_path, capsys):
    own = ["--normalize-activations", "layer_norm"]
    message = refused(["train", "--out", str(tmp_path / "run"), *SMALL, *own], capsys)
    assert "aux_loss_coefficient must be 0 to train with normalize_activations" in message


ALSO = ["--also", "k=16 lr=0.002", "--also", "layer=0 variant=standard l1_coefficient=0.5"]


@pytest.fixture(scope="module")
def several(made_once, tiny):
    """Three SAEs of one run: two at one layer, one of another variant at another."""
    train = lambda out: main(["train", "--out", str(out), *SMALL, *tiny, *ALSO])
    return made_once("cli-several", train)


NAMES = ("base", "k=16,lr=0.002", "layer=0,variant=standard,l1_coefficient=0.5")


def test_several_saes_come_of_one_harvest(several, tiny_run):
    assert {p.name for p in several.iterdir()} == {*NAMES, "run.json"}
    for name in NAMES:
        found = {p.name for p in (several / name).iterdir()}
        assert found == {"sae", "checkpoints", "metrics.jsonl", "eval.json", "run.png"}
    cfgs = [SAE.load_from_disk(several / name / "sae").cfg for name in NAMES]
    assert [getattr(cfg, "k", None) for cfg in cfgs] == [8, 16, None]
    assert isinstance(cfgs[2], StandardConfig) and cfgs[2].l1_coefficient == 0.5
    hooks = [cfg.metadata["hook_name"] for cfg in cfgs]
    assert hooks == ["blocks.1.hook_resid_post"] * 2 + ["blocks.0.hook_resid_post"]
    paths = (several / "base", tiny_run)
    first, again = (SAE.load_from_disk(p / "sae").state_dict() for p in paths)
    assert all(torch.equal(first[name], again[name]) for name in first)
    reports = [json.loads((path / "eval.json").read_text()) for path in paths]
    assert reports[0]["rows"] == reports[1]["rows"]
    assert [verdict["metric"] for verdict in reports[0]["verdicts"]][0] == "L0"


def test_several_saes_resume_together(several, tiny, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(several, out)
    shutil.rmtree(out / NAMES[1] / "checkpoints/step-000000012")
    main(["train", "--out", str(out), *SMALL, *tiny, *ALSO, "--resume"])
    for name in NAMES:
        first, again = (SAE.load_from_disk(p / name / "sae").state_dict() for p in (several, out))
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_several_saes_are_evaluated_together(several, tmp_path, capsys):
    paths = [str(several / name / "sae") for name in NAMES]
    options = ["--tokens", "256", "--device", "cpu", "--out", str(tmp_path / "eval.json")]
    main(["eval", "--sae", *paths[:2], *options])
    reports = json.loads((tmp_path / "eval.json").read_text())
    assert list(reports) == paths[:2]
    for name, report in zip(NAMES, reports.values(), strict=False):
        first = json.loads((several / name / "eval.json").read_text())
        assert report["rows"]["fvu"] == pytest.approx(first["rows"]["fvu"], rel=1e-4)
    assert "KL score" in capsys.readouterr().out
    message = refused(["eval", "--sae", paths[0], paths[2]], capsys)
    assert "sae must be SAEs of the same hook_name to be evaluated together" in message


def test_what_one_sae_does_not_say_another_may(several):
    saes = {name: SAE.load_from_disk(several / name / "sae") for name in NAMES[:2]}
    older = saes[NAMES[0]]
    metadata = {k: v for k, v in older.cfg.metadata.items() if k != "skip_first"}
    older.cfg = replace(older.cfg, metadata=metadata)
    shared = _shared_metadata(saes, MUST_AGREE)
    assert shared["skip_first"] == 1 and shared["hook_name"] == metadata["hook_name"]


def test_plot_draws_a_run_finished_or_not(several, tmp_path, capsys):
    import shutil

    unfinished = tmp_path / "run"
    shutil.copytree(several / "base", unfinished)
    main(["plot", str(unfinished)])
    assert (unfinished / "curves.png").read_bytes().startswith(b"\x89PNG")
    of_the_sae = density_of_run(unfinished)
    shutil.rmtree(unfinished / "sae")
    assert torch.allclose(density_of_run(unfinished), of_the_sae, atol=1e-6)
    main(["plot", str(unfinished), "--out", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").is_file()
    shutil.rmtree(unfinished / "checkpoints")
    assert "sae/ or checkpoints/" in refused(["plot", str(unfinished)], capsys)


def test_memory_is_predicted_and_running_out_says_what_frees_most(tiny, tmp_path, capsys):
    huge = [{"640": str(10**13)}.get(a, a) for a in SMALL]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(tmp_path / "run"), *huge, *tiny])
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert "memory on cpu, predicted:" in shown.out and "language model" in shown.out
    message = shown.err[shown.err.index("fastsae: error:") :]
    assert "what frees most:" in message and "d_sae halved" in message


@pytest.mark.parametrize(
    "also, message",
    [
        (({"tokens": 5},), "also must hold fields among .*'k'.*, got 'tokens'"),
        (({"variant": "dense"},), "variant must be one of .*got 'dense'"),
        (({"k": 3}, {"k": 3}), "also must hold different SAEs, got {'k': 3} twice or empty"),
        (({},), "also must hold different SAEs, got {} twice or empty"),
    ],
    ids=["field", "variant", "twice", "empty"],
)
def test_saes_side_by_side_are_refused(also, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LanguageModelRun(out=tmp_path, also=also)


def test_a_change_without_a_value_is_refused():
    assert changes_in("k=16 lr=1e-3 hook=blocks.1.hook_mlp_out b-dec-init=zeros") == {
        "k": 16,
        "lr": 1e-3,
        "hook": "blocks.1.hook_mlp_out",
        "b_dec_init": "zeros",
    }
    with pytest.raises(ValueError, match="also must hold parts like k=16, got 'k16'"):
        changes_in("k16")


def test_resume_continues_from_the_newest_checkpoint(tiny_run, tiny, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    shutil.rmtree(out / "checkpoints/step-000000012")
    main(["train", "--out", str(out), *SMALL, *tiny, "--resume"])
    first, again = (SAE.load_from_disk(p / "sae").state_dict() for p in (tiny_run, out))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("held_bytes", [0, 1 << 20], ids=["streamed", "in-memory"])
def test_eval_reads_what_was_held_out_from_the_sae(tiny, tmp_path, monkeypatch, held_bytes):
    monkeypatch.setattr("fastsae.data.text.HELD_BYTES", held_bytes)
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"body": f"Document {i} tells of {i} things. " * 60}) for i in range(40)]
    data.write_text("\n".join(lines))
    out = tmp_path / "run"
    own = ["--dataset", str(data), "--text-column", "body", "--seed", "1"]
    main(["train", "--out", str(out), *SMALL, *tiny, *own])
    evaluated = tmp_path / "eval.json"
    arguments = ["--tokens", "256", "--device", "cpu", "--out", str(evaluated)]
    main(["eval", "--sae", str(out / "sae"), *arguments])
    again, first = json.loads(evaluated.read_text()), json.loads((out / "eval.json").read_text())
    assert again["rows"]["fvu"] == pytest.approx(first["rows"]["fvu"], rel=1e-4)


def test_a_field_that_came_later_had_its_default(tiny_run, tiny, tmp_path, capsys):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    then = json.loads((out / "run.json").read_text())
    del then["revision"]
    (out / "run.json").write_text(json.dumps(then))
    main(["train", "--out", str(out), *SMALL, *tiny, "--resume"])
    other = ["train", "--out", str(out), *SMALL, *tiny, "--resume", "--revision", "v2"]
    assert "revision: 'main' then, 'v2' now" in refused(other, capsys)


def test_resume_with_another_argument_is_refused(tiny_run, tiny, capsys):
    changed = [{"6144": "9216"}.get(a, a) for a in SMALL]
    message = refused(["train", "--out", str(tiny_run), *changed, *tiny, "--resume"], capsys)
    assert "tokens: 6144 then, 9216 now" in message


def test_a_folder_with_a_run_is_refused(tiny_run, capsys):
    message = refused(["train", "--out", str(tiny_run), *SMALL], capsys)
    assert "out must be a folder without a run" in message and "--resume" in message


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    message = refused(["train", "--out", str(tmp_path / "file/run"), *SMALL], capsys)
    assert "file/run" in message


def test_k_above_d_sae_is_refused(tmp_path, capsys):
    small = [{"640": "6"}.get(a, a) for a in SMALL]
    message = refused(["train", "--out", str(tmp_path / "run"), *small], capsys)
    assert "k must be in [1, d_sae] with d_sae = 6, got 8" in message
    assert not (tmp_path / "run/run.json").exists()


@pytest.mark.parametrize(
    "option, names",
    [
        (["--hook", "blocks.1.hook_resid_pos"], "hook_resid_post"),
        (["--model", "no/such-model"], "no/such-model"),
        (["--dataset", "no-such-file.jsonl"], "no-such-file.jsonl"),
    ],
    ids=["hook", "model", "dataset"],
)
def test_a_wrong_name_is_refused(option, names, tmp_path, capsys):
    small = SMALL[2:] if option[0] == "--hook" else SMALL
    assert names in refused(["train", "--out", str(tmp_path / "run"), *small, *option], capsys)


def test_too_little_held_out_text_is_refused_before_the_harvest(tiny, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "many words " * 200}) + '\n{"text": "a few words"}\n')
    arguments = ["train", "--out", str(tmp_path / "run"), *SMALL, *tiny, "--dataset", str(data)]
    with pytest.raises(SystemExit):
        main([*arguments, "--seed", "1"])
    shown = capsys.readouterr().err
    assert "text must fill one context of 63 tokens, got 4 in" in shown
    assert "harvest" not in shown


def test_a_missing_text_column_is_refused(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"body": "some words"}\n')
    arguments = ["train", "--out", str(tmp_path / "run"), *SMALL, "--dataset", str(data)]
    message = refused([*arguments, "--text-column", "text"], capsys)
    assert "text" in message and "body" in message


def test_an_sae_that_is_absent_is_refused(tmp_path, capsys):
    assert str(tmp_path) in refused(["eval", "--sae", str(tmp_path)], capsys)
