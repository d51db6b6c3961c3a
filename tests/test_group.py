"""Several SAEs side by side: each ends as if it were alone, and goes on after a kill."""

import os
import shutil
import signal

import pytest
import torch

from fastsae import Trainer, TrainerGroup
from fastsae.training.checkpoint import checkpoint_steps
from fastsae.training.interruption import Interrupted
from fastsae.training.log import read_log
from training_runs import (
    ROWS,
    B,
    D,
    assert_same_bits,
    config,
    standard_config,
    state,
    timeless,
    topk_config,
    train,
)

CFGS = {
    "small": config(checkpoint={"every": 10}),
    "wide": config(sae=topk_config(d_sae=200, k=3), kind="adam", seed=4, checkpoint={"every": 10}),
    "relu": config(sae=standard_config(), checkpoint={"every": 10}, log={"every": 20}),
}


def fit(group, stop_before=None):
    def batches():
        for step, x in enumerate(ROWS.from_step(group.steps_done), group.steps_done):
            if step == stop_before:
                raise KeyboardInterrupt
            yield x

    try:
        return group.fit(batches(), sample=ROWS.rows)
    except KeyboardInterrupt:
        return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A group that was never stopped."""
    group = TrainerGroup(CFGS, device="cpu", out=tmp_path_factory.mktemp("group"))
    assert set(fit(group) or {}) == set(CFGS)
    return group


@pytest.mark.parametrize("name", CFGS)
def test_each_ends_like_one_trained_alone(name, whole, tmp_path):
    alone = Trainer(CFGS[name], device="cpu", out=tmp_path)
    train(alone)
    here = whole.trainers[name]
    assert here.out is not None
    assert_same_bits(state(here), state(alone))
    assert timeless(here.out / "metrics.jsonl") == timeless(tmp_path / "metrics.jsonl")
    assert checkpoint_steps(here.out / "checkpoints") == [50, 60]
    assert whole.metrics[name]["step"] == 60


@pytest.mark.parametrize("lost", [None, "relu", "wide"])
def test_a_group_goes_on_from_what_all_have(lost, whole, tmp_path):
    fit(TrainerGroup(CFGS, device="cpu", out=tmp_path), stop_before=37)
    if lost is not None:  # a kill came before this one had written its newest
        shutil.rmtree(tmp_path / lost / "checkpoints" / "step-000000030")
    group = TrainerGroup(CFGS, device="cpu", out=tmp_path)
    assert group.resume()
    assert group.steps_done == (30 if lost is None else 20)
    assert {t.steps_done for t in group.trainers.values()} == {group.steps_done}
    fit(group)
    for name, trainer in group.trainers.items():
        assert_same_bits(state(trainer), state(whole.trainers[name]))
        there = whole.trainers[name].out
        assert there is not None
        paths = [folder / "metrics.jsonl" for folder in (tmp_path / name, there)]
        assert timeless(paths[0]) == timeless(paths[1])


def test_a_kill_during_the_first_save_starts_anew(whole, tmp_path):
    fit(TrainerGroup(CFGS, device="cpu", out=tmp_path), stop_before=15)
    shutil.rmtree(tmp_path / "relu" / "checkpoints")
    group = TrainerGroup(CFGS, device="cpu", out=tmp_path)
    assert not group.resume() and group.steps_done == 0
    fit(group)
    assert_same_bits(state(group.trainers["wide"]), state(whole.trainers["wide"]))


def test_with_one_checkpoint_kept_there_is_always_one_that_all_have(tmp_path):
    cfgs = {name: config(checkpoint={"every": 5, "keep": 1}, seed=i) for i, name in enumerate("ab")}
    group = TrainerGroup(cfgs, device="cpu", out=tmp_path)
    written = []

    def failing(trainer):
        if trainer is group.trainers["b"] and trainer.steps_done == 10:
            raise KeyboardInterrupt
        written.append(trainer.steps_done)
        return save(trainer)

    from fastsae.training import loop

    save = loop.save_checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", failing)
        fit(group)
    assert written == [5, 5, 10]
    again = TrainerGroup(cfgs, device="cpu", out=tmp_path)
    assert again.resume() and again.steps_done == 5


def test_each_gets_the_rows_of_its_name():
    cfgs = {name: config(steps=3, log={"every": 1}) for name in ("here", "there")}
    lines = []
    group = TrainerGroup(cfgs, device="cpu")
    stream = ({"here": x, "there": 3 * x + 1} for x in ROWS.from_step(0))
    sample = {"here": ROWS.rows, "there": 3 * ROWS.rows + 1}
    group.fit(stream, sample=sample, progress=lambda name, line: lines.append((name, line["step"])))
    assert lines == [(name, step) for step in (1, 2, 3) for name in cfgs]
    alone = Trainer(cfgs["there"], device="cpu")
    alone.fit([3 * ROWS.batch(i) + 1 for i in range(3)], sample=3 * ROWS.rows + 1)
    assert_same_bits(state(group.trainers["there"]), state(alone))


def test_a_signal_saves_all(tmp_path):
    group = TrainerGroup(CFGS, device="cpu", out=tmp_path)

    def batches():
        for step, x in enumerate(ROWS.from_step(0)):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield x

    with pytest.raises(Interrupted, match="stopped after step 4, saved in .*small.*wide.*relu"):
        group.fit(batches(), sample=ROWS.rows)
    assert all(checkpoint_steps(tmp_path / name / "checkpoints") == [4] for name in CFGS)
    assert len(read_log(tmp_path / "small" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "cfgs, message",
    [
        ({}, "cfgs must hold at least one run, got none"),
        ({"a/b": config()}, "cfgs must have names that are folders' names, got 'a/b'"),
        ({"..": config()}, "cfgs must have names that are folders' names, got '..'"),
        (
            {"a": config(), "b": config(data={"batch_size": 2 * B})},
            "data.batch_size must be one for all runs of a group, "
            f"got {B} for 'a' and {2 * B} for 'b'",
        ),
        (
            {"a": config(60), "b": config(61)},
            "data.total_tokens must be one for all runs of a group",
        ),
    ],
    ids=["none", "path", "parent", "batch_size", "total_tokens"],
)
def test_a_group_is_refused(cfgs, message):
    with pytest.raises(ValueError, match=message):
        TrainerGroup(cfgs, device="cpu")


def test_bad_rows_of_one_are_named():
    group = TrainerGroup(
        {"a": config(log={"every": 1}), "b": config(log={"every": 1})}, device="cpu"
    )
    bad = ROWS.batch(0).clone()
    bad[3, D - 1] = torch.nan
    with pytest.raises(ValueError, match="activations must be finite, .* at row 3"):
        group.fit([{"a": ROWS.batch(0), "b": bad}], sample=ROWS.rows)
