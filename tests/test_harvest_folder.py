"""The folder of a harvest: what a kill, a lost shard or a full disk leaves, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastsae.cli import main
from fastsae.data import load_language_model
from fastsae.data.harvest_run import HELD_OUT, harvest_to_disk
from fastsae.data.shards import ActivationShards, read_index
from harvests import HOOKS, files, small_harvest
from tiny_models import save_stories, save_tiny_llama

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("harvest") / "model"))


@pytest.fixture(scope="module")
def lm(model):
    return load_language_model(model)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return save_stories(tmp_path_factory.mktemp("harvest"), 600)


@pytest.fixture
def run(tmp_path, model, stories):
    return small_harvest(tmp_path / "rows", model, stories)


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, model, stories, kills):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "tests/killed_harvest.py"), model, stories]
    done = subprocess.run(
        [*command, str(tmp_path), str(kills), "0"],
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == str(kills)
    killed, whole = (files(tmp_path / name) for name in ("killed", "whole"))
    assert killed.keys() == whole.keys() and len(whole) > 5
    assert [name for name in whole if killed[name] != whole[name]] == []
    ActivationShards(tmp_path / "killed").verify()


def test_a_kill_between_shard_and_index_is_made_good(run, lm):
    harvest_to_disk(run, lm=lm)
    before = files(run.out)
    index = read_index(run.out)
    replace(index, shards=index.shards[:1], complete=False).write(run.out)
    (run.out / "shard-00001.safetensors").write_bytes(b"half")
    (run.out / ".shard-00002.safetensors.abc").mkdir()
    harvest_to_disk(run, lm=lm)
    assert files(run.out) == before and not list(run.out.glob(".*"))


@pytest.mark.parametrize(
    "damage, unfinished, part, number",
    [
        ("lost", False, HELD_OUT, 0),
        ("flipped", False, ".", 1),
        ("lost", True, ".", 0),
        ("flipped", True, ".", 1),
    ],
)
def test_the_same_harvest_again_repairs_a_shard(
    run, lm, monkeypatch, caplog, damage, unfinished, part, number
):
    harvest_to_disk(run, lm=lm)
    before = files(run.out)
    if unfinished:
        index = read_index(run.out)
        replace(index, shards=index.shards[:2], complete=False).write(run.out)
    shard = run.out / part / f"shard-{number:05}.safetensors"
    whole = shard.read_bytes()
    if damage == "lost":
        shard.unlink()
    else:
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
        with pytest.raises(OSError, match="out must have room"):
            harvest_to_disk(run, lm=lm)
    assert f"shards from {shard.name} on are made again" in caplog.text
    cut = read_index(run.out / part)
    assert len(cut.shards) == number and not cut.complete
    harvest_to_disk(run, lm=lm)
    assert files(run.out) == before


def test_the_same_harvest_again_does_nothing(run, lm, monkeypatch):
    index = harvest_to_disk(run, lm=lm)
    monkeypatch.setattr("fastsae.data.model_rows.capture_all", None)
    assert harvest_to_disk(run, lm=lm) == index


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hooks": HOOKS[:1]}, "hooks: "),
        ({"dtype": "bfloat16"}, "row dtype: 'float32' there, 'bfloat16' asked for"),
        ({"context_size": 16}, "context_size: 32 there, 16 asked for"),
    ],
)
def test_another_harvest_is_refused(run, lm, change, said):
    harvest_to_disk(replace(run, tokens=640), lm=lm)
    before = files(run.out)
    with pytest.raises(ValueError, match="^out must be a new folder") as error:
        harvest_to_disk(replace(run, tokens=640, **change), lm=lm)
    assert said in str(error.value)
    assert files(run.out) == before


def test_another_model_is_refused_even_under_the_same_name(run, lm):
    harvest_to_disk(replace(run, tokens=640), lm=lm)
    other = replace(lm, model=load_language_model(run.model).model)
    other.model.model.layers[1].mlp.down_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="of another: weights: "):
        harvest_to_disk(replace(run, tokens=640), lm=other)


def test_folder_that_cannot_be_written_to_is_refused(run, lm, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="out must be a folder that can be written to, got"):
        harvest_to_disk(replace(run, out=tmp_path / "file" / "rows"), lm=lm)


def test_a_read_only_folder_is_refused(run, mount, capsys):
    disk = mount("ro")
    small = ["--model", run.model, "--dataset", run.dataset, "--tokens", "640", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main(["harvest", "--out", str(disk / "rows"), *small])
    assert stop.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert f"out must be a folder that can be written to, got {disk / 'rows'}" in said
    assert "Read-only file system" in said


def test_a_disk_that_fills_up_is_said_and_the_harvest_goes_on_once_there_is_room(run, lm, mount):
    harvest_to_disk(run, lm=lm)
    disk = mount("size=8m")
    filler = disk / "filler"

    def fill(stage, *_):
        if stage == "train" and not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - (3 << 19)))

    other = replace(run, out=disk / "rows")
    with pytest.raises(OSError, match="could not be written, .*No space left on device.*shard-000"):
        harvest_to_disk(other, fill, lm=lm)
    begun = read_index(other.out)
    assert len(begun.shards) == 1 and not begun.complete
    filler.unlink()
    harvest_to_disk(other, lm=lm)
    assert files(other.out) == files(run.out)


def test_disk_without_room_is_refused_before_the_work(run, lm, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr("fastsae.data.model_rows.capture_all", None)
    with pytest.raises(OSError, match="out must have room for the rows, 0.00.* GB"):
        harvest_to_disk(run, lm=lm)


def refused(folder, error, message):
    with pytest.raises(error, match=message) as raised:
        ActivationShards(folder).verify()
    assert str(folder) in str(raised.value)


def test_damaged_folders_are_refused(run, lm):
    harvest_to_disk(run, lm=lm)
    refused(run.out.parent, FileNotFoundError, "^activations must be a folder with index.json")
    shard = run.out / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(run.out, ValueError, "^shard must have the SHA-256 of the index")
    shard.write_bytes(whole[:-7])
    refused(run.out, ValueError, "^shard must have .* bytes, got .* truncated")
    shard.unlink()
    refused(run.out, FileNotFoundError, "^activations must hold every shard")
    shard.write_bytes(whole)
    index = (run.out / "index.json").read_text()
    (run.out / "index.json").write_text(index[: len(index) // 2])
    refused(run.out, ValueError, "index.json is damaged")
    (run.out / "index.json").write_text(index.replace('"version": 1', '"version": 9'))
    refused(run.out, ValueError, "must be of the format fastsae-activations, version 1, got")


def test_an_unfinished_harvest_is_refused(run, lm):
    index = harvest_to_disk(run, lm=lm)
    replace(index, complete=False).write(run.out)
    refused(run.out, ValueError, "^activations must be harvested to the end, got 19.* rows")
