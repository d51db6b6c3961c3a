"""Rows read back from a harvest, and runs that train on them without a language model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastsae.data.shards as shards_module
import fastsae.training.language_model_run as language_model_run
import fastsae.training.row_sources as row_sources
from fastsae.cli import main
from fastsae.data.harvest_run import HELD_OUT, harvest_to_disk
from fastsae.data.sharded_rows import ShardedRows
from fastsae.data.shards import ActivationShards
from fastsae.data.smollm2 import file_sha256
from fastsae.saes import SAE
from fastsae.training.config import LogConfig
from fastsae.training.language_model_run import train_side_by_side
from fastsae.training.log import read_log
from fastsae.training.run_config import LanguageModelRun
from harvests import HOOKS, small_harvest
from tiny_models import save_stories, save_tiny_llama
from training_runs import timeless


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_llama(tmp_path_factory.mktemp("shards") / "model"))


@pytest.fixture(scope="module")
def harvest(tmp_path_factory, model):
    """Some 18,000 rows in 3 shards, which all but the first three positions are in."""
    folder = tmp_path_factory.mktemp("shards")
    run = small_harvest(
        folder / "rows",
        model,
        save_stories(folder, 600),
        dtype="bfloat16",
        drop_special=False,
        skip_first=3,
        massive_multiple=None,
    )
    harvest_to_disk(run)
    return run


@pytest.fixture
def shards(harvest):
    return ActivationShards(harvest.out)


@pytest.fixture
def run(harvest, tmp_path):
    return LanguageModelRun(
        out=tmp_path / "run",
        activations=harvest.out,
        hook=HOOKS[0],
        tokens=64 * 60,
        batch_size=64,
        sae={"d_sae": 64, "k": 4},
        device="cpu",
    )


def all_rows(shards, hook=HOOKS[0]):
    return torch.cat([shards.rows(hook, i) for i in range(len(shards.index.shards))])


def bits_of(run):
    """What a run leaves of its SAE, its checkpoints and its log, but for the clock."""
    tensors = [*(run / "sae").iterdir(), *(run / "checkpoints").rglob("*.safetensors")]
    found = {str(path.relative_to(run)): path.read_bytes() for path in tensors}
    return {**found, "metrics.jsonl": timeless(run / "metrics.jsonl")}


def keys(rows):
    return Counter(row.tobytes() for row in rows.view(torch.int16).numpy())


@pytest.mark.parametrize("window_rows", [1, 9000, 10**9])
def test_an_epoch_has_every_row_once_in_the_bits_of_the_files(shards, window_rows):
    n_rows = len(all_rows(shards))
    batches = ShardedRows(shards, HOOKS[0], 100, window_rows=window_rows).from_step(0)
    taken = torch.cat(list(islice(batches, -(-n_rows // 100))))
    assert taken.dtype == torch.bfloat16
    assert keys(taken[:n_rows]) == keys(all_rows(shards))


def test_rows_are_shuffled_across_the_shards_of_a_window(shards):
    place = {row.tobytes(): i for i, row in enumerate(all_rows(shards).view(torch.int16).numpy())}
    batch = next(ShardedRows(shards, HOOKS[0], 200).from_step(0))
    places = torch.tensor([place[row.tobytes()] for row in batch.view(torch.int16).numpy()])
    edges = torch.tensor([shard.rows for shard in shards.index.shards]).cumsum(0)
    assert len(torch.bucketize(places, edges, right=True).unique()) == len(edges)
    assert (places.diff() == 1).sum() < 5


def test_the_order_is_a_function_of_the_seed(shards):
    first = lambda **options: torch.stack(
        list(islice(ShardedRows(shards, HOOKS[0], 300, **options).from_step(0), 80))
    )
    wanted = first(seed=1, ahead=0, window_rows=7000)
    assert torch.equal(first(seed=1, ahead=2, window_rows=7000), wanted)
    assert not torch.equal(first(seed=2, ahead=0, window_rows=7000), wanted)


@pytest.mark.parametrize("step", [1, 59, 63, 64, 150])
def test_batches_go_on_from_any_step(shards, step):
    rows = ShardedRows(shards, HOOKS[1], 301, seed=3, window_rows=7000)
    wanted = list(islice(rows.from_step(0), step + 3))[step:]
    for batch, expected in zip(rows.from_step(step), wanted, strict=False):
        assert torch.equal(batch, expected)


def test_epochs_have_orders_of_their_own(shards):
    size = len(all_rows(shards)) // 2
    batches = list(islice(ShardedRows(shards, HOOKS[0], size).from_step(0), 4))
    assert keys(batches[0]) != keys(batches[2])
    assert keys(batches[1]) != keys(batches[3])


def test_first_rows_are_read_from_no_more_shards_than_they_need(shards, monkeypatch):
    sizes, everything = [shard.rows for shard in shards.index.shards], all_rows(shards)
    rows, opened = shards.rows, set()
    monkeypatch.setattr(shards, "rows", lambda hook, i: opened.add(i) or rows(hook, i))
    for n, needed in ((sizes[0], 1), (sizes[0] + 1, 2), (10**9, len(sizes))):
        opened.clear()
        assert torch.equal(shards.first_rows(HOOKS[0], n), everything[:n])
        assert opened == {*range(needed)}


def test_bad_arguments_are_refused(shards):
    n_rows = len(all_rows(shards))
    with pytest.raises(ValueError, match=rf"batch_size must be in \[1, N\] with N = {n_rows} rows"):
        ShardedRows(shards, HOOKS[0], n_rows + 1)
    with pytest.raises(ValueError, match="window_rows must be at least 1, got 0"):
        ShardedRows(shards, HOOKS[0], 1, window_rows=0)
    with pytest.raises(ValueError, match="hook must be one of those harvested into .*, got 'no'"):
        ShardedRows(shards, "no", 1)


def test_training_loads_no_language_model(run, model, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(row_sources, "load_language_model", refuse)
    arguments = ["--hook", HOOKS[0], "--d-sae", "64", "--k", "4", "--batch-size", "64"]
    arguments += ["--tokens", "3840", "--device", "cpu", "--out", str(run.out)]
    main(["train", "--activations", str(run.activations), *arguments])
    said = capsys.readouterr().out
    assert "FVU" in said and "cross-entropy: fastsae eval" in said and "CE loss score" not in said
    assert (run.out / "run.png").stat().st_size > 10_000
    report = json.loads((run.out / "eval.json").read_text())
    assert report["cross_entropy"] is None
    assert 0 < report["rows"]["fvu"] < 2
    held_out = ActivationShards(run.activations / HELD_OUT)
    assert report["rows"]["n_rows"] == held_out.index.rows
    metadata = SAE.load_from_disk(run.out / "sae").cfg.metadata
    assert metadata["model_name"] == model
    assert metadata["hook_name"] == HOOKS[0]


def test_the_saved_sae_is_evaluated_on_the_harvests_held_out_text(run, capsys):
    trained = train_side_by_side(run)[""]
    main(["eval", "--sae", str(run.out / "sae"), "--tokens", "1000", "--device", "cpu"])
    fvu = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("FVU"))
    # The harvest's rows are rounded to bfloat16, which is 0.0003 of their variance.
    assert float(fvu.split()[1]) == pytest.approx(trained.report["rows"]["fvu"], abs=5e-4)


def test_several_places_train_side_by_side(run):
    trained = train_side_by_side(replace(run, also=({"hook": HOOKS[1]}, {"layer": 0, "k": 2})))
    assert [one.sae.cfg.metadata["hook_name"] for one in trained.values()] == [*HOOKS, HOOKS[0]]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_with_the_same_bits(harvest, tmp_path, kills):
    script = Path(__file__).with_name("killed_training.py")
    command = [sys.executable, str(script), str(harvest.out), str(tmp_path), str(kills), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    assert f"kills {kills}" in made.stdout
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for name in ("sae/sae_weights.safetensors", "checkpoints/step-000000400"):
        path = whole / name
        for file in [path] if path.is_file() else path.glob("*.safetensors"):
            other = load_file(killed / file.relative_to(whole))
            for key, tensor in load_file(file).items():
                assert torch.equal(tensor, other[key]), (name, key)
    clocks = ("seconds", "tokens_per_second")
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in clocks}
            for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        for out in (whole, killed)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_point_of_a_save_it_ends_with_the_same_bits(harvest, tmp_path, every):
    script = Path(__file__).with_name("killed_saving.py")
    command = [sys.executable, str(script), str(harvest.out), str(tmp_path), str(every)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    whole, *killed = (bits_of(out) for out in (tmp_path / "whole", *tmp_path.glob("[0-9]*")))
    assert len(killed) >= 4
    assert all(found == whole for found in killed)
    assert [name for name in whole if name.startswith("checkpoints")] != []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gpt2"}, "model must be left to the harvest .*, got 'gpt2'"),
        ({"context_size": 64}, "context_size must be left to the harvest .*, got 64"),
        ({"hook": None}, "hook must be one of those harvested into .*resid_post.*, got None"),
        ({"hook": None, "layer": 1}, "got 'blocks.1.hook_resid_post'"),
        ({"activations": Path("absent")}, "activations must be a folder with index.json"),
    ],
)
def test_a_run_is_refused(run, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_side_by_side(replace(run, **changes))


def test_a_read_only_folder_is_read_and_not_written_to(run, harvest, mount, capsys):
    disk = mount("size=8m")
    shutil.copytree(harvest.out, disk / "rows")
    mount("ro")
    arguments = ["--hook", HOOKS[0], "--d-sae", "64", "--k", "4", "--batch-size", "64"]
    arguments += ["--tokens", "640", "--device", "cpu", "--activations", str(disk / "rows")]
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments, "--out", str(disk / "run")])
    assert stop.value.code == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert str(disk / "run") in said and "Read-only file system" in said
    main(["train", *arguments, "--out", str(run.out)])
    assert (run.out / "eval.json").exists()


@pytest.mark.parametrize("part", [".", HELD_OUT])
def test_a_flipped_bit_is_noticed_before_training(run, harvest, tmp_path, capsys, part):
    rows = tmp_path / "rows"
    shutil.copytree(harvest.out, rows)
    shard = rows / part / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    arguments = ["--hook", HOOKS[0], "--d-sae", "64", "--k", "4", "--batch-size", "64"]
    arguments += ["--tokens", "640", "--device", "cpu", "--out", str(run.out)]
    command = ["train", "--activations", str(rows), *arguments]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "shard must have the SHA-256 of the index" in said and str(shard) in said
    assert list(run.out.rglob("*")) == []
    main([*command, "--no-verify"])
    assert (run.out / "eval.json").exists()


@pytest.mark.parametrize("row", [8, 9])  # of which the sample has the second only
@pytest.mark.parametrize("bits", [0x7FC0, 0xFF80])  # NaN, -inf
def test_nan_in_a_shard_is_placed(run, harvest, tmp_path, monkeypatch, row, bits):
    sizes = [shard.rows for shard in ActivationShards(harvest.out).index.shards]
    monkeypatch.setattr(row_sources, "SAMPLE_ROWS", sum(sizes) // 9)
    spoilt = tmp_path / "rows"
    shutil.copytree(harvest.out, spoilt)
    path = ActivationShards(spoilt).path(1)
    with path.open("r+b") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(n_bytes))[f"rows.{HOOKS[0]}"]["data_offsets"]
        width = ActivationShards(spoilt).index.widths[HOOKS[0]]
        file.seek(8 + n_bytes + start + 2 * (row * width + 5))
        file.write(bits.to_bytes(2, "little"))
    with pytest.raises(ValueError, match=f"got NaN or inf in {re.escape(str(path))}, row {row}$"):
        train_side_by_side(replace(run, activations=spoilt, verify=False, tokens=64 * 300))


def test_each_process_verifies_its_share(run, monkeypatch):
    def seen(path):
        looked_at[-1].append(path)
        return file_sha256(path)

    looked_at = []
    monkeypatch.setattr(shards_module, "file_sha256", seen)
    for part in range(2):
        looked_at.append([])
        row_sources.ShardSource(run, run.activations, part, 2).read(set(), lambda *_: None)
    assert looked_at[0] and looked_at[1]
    everything = sorted(run.activations.rglob("shard-*.safetensors"))
    assert sorted(looked_at[0] + looked_at[1]) == everything


def test_all_wait_for_the_slowest_checksums_and_hear_what_they_say(run, harvest, tmp_path):
    rows = tmp_path / "rows"
    shutil.copytree(harvest.out, rows)
    shard = rows / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [str(here / "slow_checksums.py"), "15", "train", "--activations", str(rows)]
    command += ["--hook", HOOKS[0], "--d-sae", "64", "--k", "4", "--batch-size", "64"]
    command += ["--tokens", "640", "--device", "cpu", "--out", str(run.out)]
    command += ["--timeout-seconds", "10"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "error: shard must have the SHA-256 of the index" in done.stderr, done.stderr[-3000:]
    assert list(run.out.rglob("*.safetensors")) == []


def test_a_harvest_without_held_out_rows_is_refused(run, harvest, tmp_path):
    harvest_to_disk(replace(harvest, out=tmp_path / "rows", eval_tokens=0, tokens=1000))
    with pytest.raises(ValueError, match="activations must hold rows of held-out documents"):
        train_side_by_side(replace(run, activations=tmp_path / "rows"))


def test_a_run_does_not_resume_on_other_rows(run, harvest, tmp_path):
    train_side_by_side(run)
    other = replace(harvest, out=tmp_path / "rows", tokens=15_000)
    harvest_to_disk(other)
    settings = run.out / "run.json"
    settings.write_text(settings.read_text().replace(str(harvest.out), str(other.out)))
    with pytest.raises(ValueError, match="activations_sha256"):
        train_side_by_side(replace(run, activations=other.out, resume=True))


def test_300_losses_do_not_depend_on_what_is_read_ahead(run, monkeypatch):
    curves = []
    for ahead in (0, 1, 2):
        monkeypatch.setattr(row_sources, "ShardedRows", partial(ShardedRows, ahead=ahead))
        monkeypatch.setattr(language_model_run, "LogConfig", partial(LogConfig, every=1))
        one = replace(run, out=run.out / str(ahead), tokens=64 * 300, checkpoints=1)
        train_side_by_side(one)
        curves.append([line["loss"] for line in read_log(one.out / "metrics.jsonl")])
    assert len(curves[0]) == 300
    assert curves[0] == curves[1] == curves[2]
