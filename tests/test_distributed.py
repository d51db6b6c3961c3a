"""Several gloo processes on the CPU, against one: the same losses, codes, gradients and weights."""

import json
import os
import socket
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from distributed_cases import (
    CASES,
    CHECKPOINTED,
    MESHES,
    OF_FOUR,
    STEPS,
    TWICE,
    B,
    run_config,
    steps_of,
)
from distributed_runs import fit as fit_alone
from distributed_runs import run, start_of
from fastsae.distributed.gradients import Parts
from fastsae.distributed.mesh import Extent, Mesh
from fastsae.distributed.plan import step_bytes
from fastsae.distributed.shards import LatentShards, range_of
from fastsae.training.language_model_run import train_on_language_model
from fastsae.training.run_config import LanguageModelRun
from fastsae.training.split import check_split
from fastsae.training.trainer import Trainer
from training_runs import config, standard_config

HERE = Path(__file__).parent
ALL = [(w, m, c) for w, ms in MESHES.items() for m in ms for c in (CASES if w == 2 else OF_FOUR)]
ON_EVERY_MESH = [(w, m) for w, ms in MESHES.items() for m in ms]


def on_every_mesh(cases: dict[int, tuple[str, ...]]) -> list[tuple[int, tuple[int, int], str]]:
    return [(w, m, case) for w, m in ON_EVERY_MESH for case in cases[w]]


def label(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def in_name(case: str) -> str:
    return case.replace("/", "+")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(folder: Path, world: int, what: str) -> None:
    """Run so many processes; all must end well."""
    port, env = free_port(), {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(world):
        command = [sys.executable, str(HERE / "distributed_runs.py"), str(folder)]
        command += [str(rank), str(world), str(port), what]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, cwd=HERE, **pipes))
    said = [process.communicate(timeout=900)[0] for process in started]
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text[-3000:]


@pytest.fixture(scope="module")
def alone():
    """Results of one process, by case and steps."""
    return cache(lambda case, steps: run(case, None, steps))


@pytest.fixture(scope="module")
def results(made_once):
    """Of all meshes of a number of processes, and their folder."""
    read = cache(torch.load)

    def fill(folder: Path, world: int) -> None:
        for case in CHECKPOINTED[world]:
            fit_alone(case, None, folder / f"{in_name(case)}-alone", stop_before=10)
        together(folder, world, "parity")

    def of(world: int, mesh: tuple[int, int]) -> tuple[dict[str, Any], Path]:
        folder = made_once(f"world-{world}", partial(fill, world=world))
        return read(folder / f"{label(mesh)}.pt"), folder

    return of


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-30))


def check_parity(case: str, found: dict[str, Any], one: dict[str, Any]) -> None:
    """What a mesh found of a case is what one process does."""
    first, expected = found["first"], one["first"]
    assert first.keys() == expected.keys()
    if "code" in first:  # the gaps at the k-th place exceed rounding in these cases
        assert torch.equal(first["code"] != 0, expected["code"] != 0), case
    # bf16 rows round products that are summed in another order.
    tolerance = 2e-3 if "bf16" in case else 1e-4
    for name, value in expected.items():
        assert relative(first[name], value) < tolerance, f"{name} of {case}"
    flipped = int((found["fired"] != one["fired"]).sum())
    ours, theirs = torch.tensor(found["losses"]), torch.tensor(one["losses"])
    # 8-bit moments are rounded by chance, and by other chances on another mesh.
    # Below p = 1 slopes near an act of 0 have no bound, and rounding grows from step to step.
    bound = {"topk/8bit-rows": 0.05, "standard-p-half": 0.01}.get(case, 1e-3)
    error = float(((ours - theirs) / theirs).abs().max())
    assert error < bound, f"{case}, where {flipped} latents differ"


class TestParity:
    @pytest.mark.parametrize(("world", "mesh", "case"), ALL, ids=label)
    def test_every_mesh_is_one_process(self, results, alone, world, mesh, case):
        check_parity(case, results(world, mesh)[0][case], alone(case, steps_of(case, world)))

    @pytest.mark.parametrize("p", [0.5, 2.0])
    def test_a_row_without_acts_has_no_slope(self, p):
        cfg = fastsae.StandardConfig(d_in=4, d_sae=6, lp_norm=p, l1_coefficient=0.3)
        gradients = []
        for shards in (None, LatentShards(Extent(), 6)):
            torch.manual_seed(0)
            sae = fastsae.StandardSAE(cfg, shards=shards)
            weighted = torch.rand(3, 6).requires_grad_()
            (sae._p_norm(weighted * torch.tensor([[0.0], [1.0], [1.0]])).sum()).backward()
            gradients.append(weighted.grad)
        assert gradients[1].isfinite().all()
        assert relative(gradients[1][1:], gradients[0][1:]) < 1e-5

    @pytest.mark.parametrize(("world", "mesh", "case"), on_every_mesh(TWICE), ids=label)
    def test_the_same_mesh_twice_gives_the_same_bits(self, results, world, mesh, case):
        assert results(world, mesh)[0][case]["same_twice"]

    @pytest.mark.slow
    @pytest.mark.parametrize("world", MESHES)
    def test_so_does_every_architecture_in_all_steps(self, tmp_path, alone, world):
        together(tmp_path, world, "long")
        for mesh in MESHES[world]:
            for case, found in torch.load(tmp_path / f"{label(mesh)}.pt").items():
                check_parity(case, found, alone(case, STEPS))
                assert found["same_twice"], case

    @pytest.mark.parametrize(("world", "mesh"), ON_EVERY_MESH, ids=label)
    def test_ties_go_to_the_lowest_latent_and_row(self, results, world, mesh):
        found = results(world, mesh)[0]["selections"]
        for name in ("ties", "first shard wins", "last shard wins"):
            dense = found[name]
            for k in (1, 3, 9, 22):
                order = dense.sort(dim=1, descending=True, stable=True).indices[:, :k]
                expected = torch.zeros_like(dense).scatter(1, order, dense.gather(1, order))
                assert torch.equal(found[f"{name}, topk, {k}"], expected)
                flat = dense.flatten()
                order = flat.sort(descending=True, stable=True).indices[: k * len(dense)]
                expected = torch.zeros_like(flat).scatter(0, order, flat[order])
                assert torch.equal(found[f"{name}, batch, {k}"], expected.view_as(dense))


class TestTraffic:
    @pytest.mark.parametrize("case", ["traffic/rows", "traffic/pairs", "traffic/micro"])
    @pytest.mark.parametrize(("world", "mesh"), ON_EVERY_MESH, ids=label)
    def test_what_is_sent_is_the_formula(self, results, world, mesh, case):
        found = results(world, mesh)[0]
        if case not in found:
            pytest.skip("two processes run it")
        sent, extent = found[case]["sent"], Extent(*mesh)
        cfg = run_config(case).resolved(torch.device("cpu"))
        predicted = step_bytes(cfg, extent, row_itemsize=4)
        if case != "traffic/rows" and extent.tp > 1 and extent.dp > 1:
            # Pairs are padded to those of the part that has most, between the mean and all.
            rest = {k: v for k, v in sent.items() if k != "all_gather over dp"}
            assert rest == {k: v for k, v in predicted.items() if k != "all_gather over dp"}
            most = step_bytes(cfg, extent, row_itemsize=4, n_pairs=B // extent.dp * cfg.sae.k)
            bounds = (predicted["all_gather over dp"], most["all_gather over dp"])
            assert bounds[0] <= sent["all_gather over dp"] <= bounds[1]
        else:
            assert sent == dict(predicted)

    def test_nothing_of_size_B_F_is_sent(self):
        cfg = run_config("traffic/rows")
        wide = fastsae.TrainConfig(
            sae=fastsae.TopKConfig(d_in=64, d_sae=1 << 20, k=5),
            data=fastsae.DataConfig(total_tokens=1, batch_size=4096),
        )
        tp = step_bytes(wide.resolved(torch.device("cpu")), Extent(1, 8), row_itemsize=4)
        assert cfg.sae.k == 5 and tp["all_gather over tp"] + tp["all_reduce over tp"] < 4096 * 1024


class TestCheckpoints:
    @pytest.mark.parametrize(("world", "mesh", "case"), on_every_mesh(CHECKPOINTED), ids=label)
    def test_a_run_goes_on_on_another_mesh(self, results, tmp_path, world, mesh, case):
        _, folder = results(world, mesh)
        name = in_name(case)
        whole = fit_alone(case, None, tmp_path / "whole").export().state_dict()
        shards = fastsae.SAE.load_from_disk(folder / f"{name}-{label(mesh)}" / "sae").state_dict()
        taken = folder / f"{name}-{label(mesh)}" / "taken-over" / "sae"
        taken_over = fastsae.SAE.load_from_disk(taken).state_dict()
        # From shards to one process: the newest checkpoint but the last ones.
        for step in (12, 16, 20):
            path = folder / f"{name}-{label(mesh)}" / "checkpoints" / f"step-{step:09d}"
            assert (path / ".metadata").is_file()
        (tmp_path / "on" / "checkpoints").mkdir(parents=True)
        source = folder / f"{name}-{label(mesh)}" / "checkpoints" / "step-000000008"
        (tmp_path / "on" / "checkpoints" / source.name).symlink_to(source)
        on = fit_alone(case, None, tmp_path / "on").export().state_dict()
        for key, value in whole.items():
            for other in (shards, taken_over, on):
                assert relative(other[key], value) < 1e-4, key

    @pytest.mark.parametrize(("world", "mesh"), ON_EVERY_MESH, ids=label)
    def test_a_file_a_tensor_holds_the_same(self, results, world, mesh):
        _, folder = results(world, mesh)
        for case in CHECKPOINTED[world]:
            out = folder / f"{in_name(case)}-{label(mesh)}"
            index = json.loads(
                (out / "in-parts" / "sae_weights.safetensors.index.json").read_text()
            )
            one, parts = (fastsae.SAE.load_from_disk(out / name) for name in ("sae", "in-parts"))
            assert set(index["weight_map"]) == set(one.state_dict())
            assert len(set(index["weight_map"].values())) == len(one.state_dict())
            for name, t in one.state_dict().items():
                assert torch.equal(t, parts.state_dict()[name])

    @pytest.mark.parametrize(("world", "mesh"), ON_EVERY_MESH, ids=label)
    def test_saes_side_by_side_are_saved_at_the_same_steps(self, results, world, mesh):
        _, folder = results(world, mesh)
        for name in ("a", "b"):
            path = folder / f"side-by-side-{label(mesh)}" / name / "checkpoints"
            assert sorted(p.name for p in path.iterdir()) == ["step-000000018", "step-000000020"]

    def test_a_damaged_checkpoint_is_named(self, results, tmp_path):
        _, folder = results(2, (1, 2))
        source = folder / "topk+rows-1x2" / "checkpoints" / "step-000000020"
        path = tmp_path / "checkpoints" / source.name
        path.mkdir(parents=True)
        for file in source.iterdir():
            (path / file.name).write_bytes(
                file.read_bytes()[: 1 << 14 if "distcp" in file.name else None]
            )
        with pytest.raises(ValueError, match="truncated or damaged"):
            fit_alone("topk/rows", None, tmp_path)


class TestFailure:
    @pytest.mark.parametrize(
        ("world", "n_kills"), [(2, 1), pytest.param(4, 5, marks=pytest.mark.slow)]
    )
    def test_a_killed_process_costs_no_bits(self, results, tmp_path, world, n_kills):
        g = torch.Generator().manual_seed(n_kills)
        draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
        # Ascending, so that no attempt begins behind its kill.
        kills = [[draw(0, world), step] for step in sorted(draw(2, 20) for _ in range(n_kills))]
        (tmp_path / "kills.json").write_text(json.dumps(kills))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
        command += ["--max-restarts", str(n_kills), str(HERE / "distributed_runs.py")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(tmp_path), "kill"], env=env, cwd=HERE, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert all((tmp_path / f"killed-{i}").exists() for i in range(n_kills))
        mesh = (world // 2, 2)
        whole = results(world, mesh)[1] / f"topk+rows-{label(mesh)}"
        ended = [fastsae.SAE.load_from_disk(one / "sae").state_dict() for one in (whole, tmp_path)]
        for name, t in ended[0].items():
            assert torch.equal(t, ended[1][name])

    def test_a_process_that_hangs_is_named(self, tmp_path):
        together(tmp_path, 2, "hang")
        said = (tmp_path / "said-0").read_text()
        assert said.startswith("ProcessLost: behind: rank 1 (pid")
        assert "at step 3" in said

    @pytest.mark.parametrize(("world", "mesh"), ON_EVERY_MESH, ids=label)
    def test_every_process_says_what_is_wrong(self, results, world, mesh):
        found, _ = results(world, mesh)
        assert len(found["disagreements"]) == world
        for said in found["disagreements"]:
            assert said == "seed must be the same on every process, got 0 on rank 0 and 1 on rank 1"
        assert all("activations must be finite" in said for said in found["bad rows"])

    @pytest.mark.parametrize(("world", "mesh"), ON_EVERY_MESH, ids=label)
    def test_latents_start_near_the_first_processs_rows(self, results, world, mesh):
        found = results(world, mesh)[0]["start"]
        (alone,) = start_of(None)
        assert len(found) == mesh[0]
        for W_dec in found:
            assert torch.allclose(W_dec, alone, atol=1e-6)


class TestRules:
    def test_bad_meshes_are_refused(self):
        with pytest.raises(
            ValueError, match=r"dp \* tp must be the number of processes, got 2 \* 3"
        ):
            Mesh(2, 3)
        with pytest.raises(ValueError, match="tp must be at least 1, got 0"):
            Mesh(1, 0)
        with pytest.raises(ValueError, match="tp must leave latents for every shard"):
            LatentShards(Extent(1, 4), 5)

    @pytest.mark.parametrize(
        ("changes", "mesh", "message"),
        [
            ({"data": {"batch_size": 30}}, Extent(2, 2), "batch_size must be a multiple of"),
            ({"resample_every": 3}, Extent(2, 1), "resample_every must be None"),
            ({"kind": "muon"}, Extent(1, 2), "tp must be 1 for kind 'muon'"),
            (
                {"sae": fastsae.MatchingPursuitConfig(d_in=4, d_sae=8), "kind": "adam"},
                Extent(1, 2),
                "tp must be 1 for the architecture 'matching_pursuit'",
            ),
        ],
    )
    def test_what_cannot_be_split_is_refused(self, changes, mesh, message):
        cfg = config(**changes).resolved(torch.device("cpu"))
        with pytest.raises(ValueError, match=message):
            check_split(cfg, mesh)

    def test_dense_rows_are_for_row_adam(self, no_type_checker):
        with pytest.raises(ValueError, match="exchange must be 'auto' or 'pairs' for kind 'adam'"):
            config(kind="adam", exchange="rows")
        with pytest.raises(ValueError, match="exchange must be one of"):
            config(exchange="all")

    def test_processes_that_were_not_started(self, tmp_path):
        run = LanguageModelRun(out=tmp_path / "out", dp=2, tp=2, device="cpu")
        with pytest.raises(ValueError, match="torchrun --nproc-per-node 4 -m fastsae train"):
            train_on_language_model(run)
        with pytest.raises(ValueError, match="dp must be None with distribute 'layers', got 2"):
            LanguageModelRun(out=tmp_path, dp=2, distribute="layers")

    @pytest.mark.parametrize(
        ("given", "processes", "shape"),
        [
            ({}, (1, 1), (1, 1)),
            ({}, (8, 8), (1, 8)),
            ({}, (16, 8), (2, 8)),
            ({"dp": 4}, (8, 8), (4, 2)),
            ({"tp": 2}, (8, 8), (4, 2)),
            ({"stream": True, "model_ranks": 2}, (8, 8), (1, 6)),
            ({"stream": True, "model_ranks": 2, "dp": 3}, (8, 8), (3, 2)),
        ],
    )
    def test_a_dictionary_is_split_inside_a_machine(self, tmp_path, given, processes, shape):
        assert LanguageModelRun(out=tmp_path, **given).mesh_shape(*processes) == shape

    def test_ranges_cover_everything_once(self):
        for n, parts in ((10, 3), (7, 7), (128, 4), (90, 4)):
            found = [i for part in range(parts) for i in range_of(n, parts, part)]
            assert found == list(range(n))
            assert [len(c) for c in torch.arange(n).chunk(parts)] == [
                len(range_of(n, parts, part)) for part in range(parts)
            ]

    def test_one_process_sends_nothing(self):
        trainer = Trainer(config(sae=standard_config()), device="cpu")
        trainer.advance(torch.randn(64, 16))
        assert not trainer.mesh.sent and not Parts(Mesh(), "rows").splits_rows
