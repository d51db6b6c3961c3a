"""Logs besides the file: what each tracker is told, and what happens without it."""

import glob
import sys
from types import ModuleType

import pytest

from fastsae import Trainer, TrainerGroup
from fastsae.training.log import read_log
from fastsae.training.trackers import TRACKERS
from training_runs import ROWS, config, train


def test_every_tracker_is_an_extra():
    tomllib = pytest.importorskip("tomllib")
    from pathlib import Path

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert set(TRACKERS) <= set(tomllib.loads(text)["project"]["optional-dependencies"])


@pytest.mark.filterwarnings("ignore")
def test_wandb_gets_every_line_of_each_sae(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    started, told = [], {}
    init = wandb.init

    def watched(**options):
        run = init(**options)
        started.append(options)
        log = run.log
        told[run.id] = []
        run.log = lambda line, step: (told[run.id].append((step, line)), log(line, step=step))
        return run

    monkeypatch.setattr(wandb, "init", watched)
    cfgs = {name: config(20, log={"to": ("wandb",)}, seed=i) for i, name in enumerate("ab")}
    group = TrainerGroup(cfgs, device="cpu", out=tmp_path)
    group.fit(ROWS.from_step(0), sample=ROWS.rows)
    assert [options["name"] for options in started] == ["a", "b"]
    assert [options["config"]["seed"] for options in started] == [0, 1]
    for name, (run_id, lines) in zip("ab", told.items(), strict=True):
        assert (tmp_path / name / "run_id").read_text() == run_id
        assert [line for _, line in lines] == read_log(tmp_path / name / "metrics.jsonl")
        assert [step for step, _ in lines] == [1, 7, 14, 20]
        assert glob.glob(str(tmp_path / name / "wandb" / "offline-run-*" / "*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_the_log_without_what_a_resumed_run_repeats(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = config(30, log={"to": ("tensorboard",)}, checkpoint={"every": 10})
    train(Trainer(cfg, device="cpu", out=tmp_path), stop_before=25)
    resumed = Trainer(cfg, device="cpu", out=tmp_path)
    assert resumed.resume()
    train(resumed)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_log(tmp_path / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == set(lines[-1])
    found = [(event.step, event.value) for event in events.Scalars("fvu")]
    assert [step for step, _ in found] == [line["step"] for line in lines]
    assert [v for _, v in found] == pytest.approx([line["fvu"] for line in lines], rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_trackio_gets_every_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage")
    cfg = config(20, log={"to": ("trackio",), "project": "of-a-test"})
    train(Trainer(cfg, device="cpu", out=tmp_path / "run"))
    found = storage.SQLiteStorage.get_logs("of-a-test", "run")
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["fvu"] for line in found] == pytest.approx([line["fvu"] for line in lines])


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_absent_is_named_with_its_extra(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    trainer = Trainer(config(log={"to": (name,)}), device="cpu", out=tmp_path)
    with pytest.raises(ImportError, match=rf"{name} is not installed.*fastsae-triton\[{name}\]"):
        trainer.fit(ROWS.from_step(0))
    assert trainer.steps_done == 0


def test_a_tracker_is_closed_when_a_run_fails(monkeypatch, tmp_path):
    closed = []

    class Quiet:
        def __init__(self, run):
            assert run.steps_done == 0 and run.name == tmp_path.name

        def write(self, line):
            pass

        def close(self):
            closed.append(True)

    monkeypatch.setitem(TRACKERS, "trackio", Quiet)
    with pytest.raises(ValueError, match="batches must last"):
        Trainer(config(log={"to": ("trackio",)}), device="cpu", out=tmp_path).fit([ROWS.batch(0)])
    assert closed == [True]


def test_tensorboard_needs_a_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    writer = ModuleType("torch.utils.tensorboard")
    writer.SummaryWriter = None  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writer)
    with pytest.raises(ValueError, match="out must be a folder to log to tensorboard, got None"):
        Trainer(config(log={"to": ("tensorboard",)}), device="cpu").fit(ROWS.from_step(0))


@pytest.mark.usefixtures("no_type_checker")
def test_an_unknown_tracker_is_refused():
    with pytest.raises(ValueError, match=r"log.to must be among \['wandb', .*\], got 'mlflow'"):
        config(log={"to": ("mlflow",)})
