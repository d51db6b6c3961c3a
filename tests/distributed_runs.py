"""What several processes do together; each result is a file that a test reads.

python distributed_runs.py FOLDER RANK WORLD PORT WHAT

WHAT is `parity` (every mesh of so many processes, every case), `long` (all steps of every case, and
again to the same bits), `hang` or `kill`. The tests import `run` for the same cases by one process.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastsae
from distributed_cases import (
    CASES,
    CHECKPOINTED,
    MESHES,
    OF_FOUR,
    STEPS,
    TWICE,
    B,
    batches,
    run_config,
    steps_of,
)
from fastsae.distributed.assembly import latent_axis
from fastsae.distributed.export import write_shards
from fastsae.distributed.mesh import Mesh, join_processes, leave_processes
from fastsae.distributed.shards import LatentShards
from fastsae.saes import sharding
from fastsae.training.group import TrainerGroup
from fastsae.training.trainer import Trainer
from fastsae_kernels import RowGrad, batch_topk_encode, topk_encode
from training_runs import D, config, sparse_rows


def dense_gradient(grads: list[RowGrad], shape: torch.Size) -> torch.Tensor:
    total = torch.zeros(shape)
    for grad in grads:
        total += grad.block(0, shape[0])
    return total


def whole(trainer: Trainer, name: str, t: torch.Tensor) -> torch.Tensor:
    """A tensor of the state, of all shards."""
    axis = latent_axis(trainer.sae, name)
    if axis is None:
        return t.clone()
    rows = t.movedim(axis, 0).contiguous()
    return torch.cat(trainer.mesh.gather_ragged(rows, "tp")).movedim(0, axis)


def step_and_look(trainer: Trainer, batch: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """One step; its loss, code and gradient as the optimizer got them."""
    found: dict[str, Any] = {}
    combine = trainer.optimizer.combine

    def look() -> None:
        combine()
        sae, parts = trainer.sae, trainer.optimizer._parts
        for name, p in sae.named_parameters():
            grads = getattr(p, "row_grads", None)
            if grads is not None:
                rows = p.t() if name == "W_enc" else p
                owned = rows[parts.owned(len(rows))]
                gradient = dense_gradient(grads, owned.shape)
                if parts.splits_rows:
                    gradient = torch.cat(trainer.mesh.gather_ragged(gradient, "dp"))
                gradient = gradient.t() if name == "W_enc" else gradient
            else:
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
            found[f"gradient of {name}"] = whole(trainer, name, gradient)

    trainer.optimizer.combine = look
    loss = trainer.step(*batch)
    trainer.optimizer.combine = combine
    mesh = trainer.mesh
    for name, value in {"loss": loss.total.detach(), **loss.terms}.items():
        found[name] = mesh.mean(value, "dp")
    if loss.code is not None:
        code = loss.code
        dense = code._replace(groups=None).to_dense(len(trainer.sae.latents))
        across = torch.cat(mesh.gather_ragged(dense.t().contiguous(), "tp")).t()
        found["code"] = mesh.gather(across.contiguous(), "dp").flatten(0, 1)
    return found


def run(case: str, mesh: Mesh | None, steps: int = STEPS) -> dict[str, Any]:
    trainer = Trainer(run_config(case), device="cpu", mesh=mesh)
    mesh = trainer.mesh
    drawn = batches(case)[:steps]
    trainer.initialise(*drawn[0])
    # AuxK has something to do from the first step on.
    latents = torch.tensor([*trainer.sae.latents])
    trainer.dead.since_fired[latents < trainer.cfg.sae.d_sae // 3] = 10_000
    found: dict[str, Any] = {"losses": []}
    for number, batch in enumerate(drawn):
        size = B // mesh.size
        mine = tuple(t[mesh.rank * size : (mesh.rank + 1) * size] for t in batch)
        if number == 0:
            found["first"] = step_and_look(trainer, mine)
        else:
            mesh.sent.clear()
            trainer.step(*mine)
        found["sent"] = dict(mesh.sent)
        found["losses"].append(float(trainer._total))
    found["fired"] = whole(trainer, "b_enc", trainer.dead.fired)
    found["weights"] = {
        name: whole(trainer, name, t.detach()) for name, t in trainer.sae.state_dict().items()
    }
    return found


def integers(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=g).float()


def selections(mesh: Mesh) -> dict[str, Any]:
    """Codes of small integers, which every order of summation gives the same, full of ties."""
    d, f, b = 6, 22, 16
    found: dict[str, Any] = {}
    for name, shift in (("ties", 0), ("first shard wins", 1), ("last shard wins", -1)):
        x, W, bias = integers(1, b, d), integers(2, d, f), integers(3, f)
        if shift:
            bias[:5] += 40 * (shift > 0)
            bias[-3:] += 40 * (shift < 0)
        shards = LatentShards(mesh, f)
        mine = slice(shards.latents.start, shards.latents.stop)
        rows = x[mesh.part * b // mesh.dp : (mesh.part + 1) * b // mesh.dp]
        weights = (W[:, mine].t().contiguous().t(), bias[mine])
        for k in (1, 3, 9, 22):
            for kind, encode in (("topk", topk_encode), ("batch", batch_topk_encode)):
                code = encode(rows, *weights, k, shards=shards)
                dense = code.to_dense(len(shards.latents))
                across = torch.cat(mesh.gather_ragged(dense.t().contiguous(), "tp")).t()
                found[f"{name}, {kind}, {k}"] = mesh.gather(across.contiguous(), "dp").flatten(0, 1)
        found[name] = (x @ W + bias).relu()
    return found


def disagreements(mesh: Mesh) -> list[str]:
    """What each process says where their configurations differ."""
    said = ""
    try:
        Trainer(config(seed=mesh.rank), device="cpu", mesh=mesh)
    except ValueError as error:
        said = str(error)
    return mesh_objects(mesh, said)


def bad_rows(mesh: Mesh) -> list[str]:
    """The same where one process's rows hold NaN."""
    trainer = Trainer(run_config("topk"), device="cpu", mesh=mesh)
    rows = torch.randn(B // mesh.size, D)
    trainer.initialise(rows)
    rows[0, 0] = torch.nan if mesh.rank else 0.0
    said = ""
    try:
        trainer.advance(rows)
    except ValueError as error:
        said = str(error)
    return mesh_objects(mesh, said)


def start_of(mesh: Mesh | None) -> torch.Tensor:
    """[parts of the batch, F, D]: everyone's W_dec where each process has a sample of its own."""
    trainer = Trainer(run_config("topk"), device="cpu", mesh=mesh)
    mesh, block = trainer.mesh, sharding.BLOCK
    sharding.BLOCK = 7  # no shard ends where a block does
    try:
        trainer.initialise(sparse_rows(60 - 10 * mesh.rank, seed=mesh.rank))
    finally:
        sharding.BLOCK = block
    return mesh.gather(whole(trainer, "W_dec", trainer.sae.W_dec.detach()), "dp")


def mesh_objects(mesh: Mesh, mine: Any) -> list[Any]:
    everyone: list[Any] = [None] * mesh.size
    dist.all_gather_object(everyone, mine)
    return everyone


def my_batches(mesh: Mesh, case: str):
    size = B // mesh.size
    for batch in batches(case):
        yield batch[0][mesh.rank * size : (mesh.rank + 1) * size]


def fit(
    case: str, mesh: Mesh | None, out: Path, stop_before: int = STEPS, at: Any = None
) -> Trainer:
    """Train with checkpoints, from the newest one if there is one.

    Args:
        at: called with each step's number before it.
    """
    cfg = replace(run_config(case), checkpoint=fastsae.CheckpointConfig(every=4, keep=9))
    trainer = Trainer(cfg, device="cpu", mesh=mesh, out=out)
    trainer.resume()

    def drawn():
        for number, x in enumerate(my_batches(trainer.mesh, case)):
            if number >= trainer.steps_done:
                if at is not None:
                    at(number)
                if number == stop_before:
                    raise KeyboardInterrupt
                yield x

    try:
        trainer.fit(drawn(), sample=batches(case)[0][0])
    except KeyboardInterrupt:
        trainer.settle()
    return trainer


def checkpoints(folder: Path, mesh: Mesh) -> None:
    """Runs that other meshes go on with, one that goes on with theirs, exports of both kinds."""
    for case in CHECKPOINTED[dist.get_world_size()]:
        out = folder / f"{case.replace('/', '+')}-{mesh.dp}x{mesh.tp}"
        trainer = fit(case, mesh, out)
        trainer.write_sae(out / "sae")
        write_shards(trainer.export(), mesh, out / "in-parts", largest_file=1)
        alone = folder / f"{case.replace('/', '+')}-alone"
        if mesh.is_first:
            shutil.copytree(alone, out / "taken-over")
        mesh.any(False)
        fit(case, mesh, out / "taken-over").write_sae(out / "taken-over" / "sae")


def side_by_side(folder: Path, mesh: Mesh) -> None:
    """Two SAEs that save at the same steps."""
    cases = {"a": "topk", "b": "topk-without-norms"}
    often = fastsae.CheckpointConfig(every=3)
    cfgs = {n: replace(run_config(case), checkpoint=often) for n, case in cases.items()}
    out = folder / f"side-by-side-{mesh.dp}x{mesh.tp}"
    TrainerGroup(cfgs, device="cpu", out=out, mesh=mesh).fit(my_batches(mesh, "topk"))


def parity(folder: Path, world: int) -> None:
    for dp, tp in MESHES[world]:
        mesh = Mesh(dp, tp)
        results: dict[str, Any] = {}
        for case in CASES if world == 2 else OF_FOUR:
            results[case] = found = run(case, mesh, steps_of(case, world))
            if case in TWICE[world]:
                found["same_twice"] = same_bits(case, mesh, found["weights"])
        results["selections"] = selections(mesh)
        results["disagreements"] = disagreements(mesh)
        results["bad rows"] = bad_rows(mesh)
        results["start"] = start_of(mesh)
        checkpoints(folder, mesh)
        side_by_side(folder, mesh)
        if mesh.is_first:
            torch.save(results, folder / f"{dp}x{tp}.pt")


def same_bits(case: str, mesh: Mesh, weights: dict[str, torch.Tensor]) -> bool:
    """Whether a run that is repeated ends with these weights."""
    again = run(case, mesh)["weights"]
    return all(torch.equal(t, again[name]) for name, t in weights.items())


def long(folder: Path, world: int) -> None:
    for dp, tp in MESHES[world]:
        mesh = Mesh(dp, tp)
        results: dict[str, Any] = {}
        for case in CASES if world == 2 else OF_FOUR:
            results[case] = found = run(case, mesh)
            found["same_twice"] = same_bits(case, mesh, found["weights"])
        if mesh.is_first:
            torch.save(results, folder / f"{dp}x{tp}.pt")


def hang(folder: Path, mesh: Mesh) -> None:
    """The last process stops answering; the others say so."""
    last = mesh.rank == mesh.size - 1
    try:
        fit("topk", mesh, folder / "run", at=lambda n: time.sleep(16) if last and n == 3 else None)
    except RuntimeError as error:
        (folder / f"said-{mesh.rank}").write_text(f"{type(error).__name__}: {error}")


def kill(folder: Path, mesh: Mesh) -> None:
    """At each of the first attempts the process and the step that `kills.json` says."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    kills = json.loads((folder / "kills.json").read_text())

    def at(number: int) -> None:
        if attempt < len(kills) and kills[attempt] == [mesh.rank, number]:
            (folder / f"killed-{attempt}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = fit("topk/rows", mesh, folder / "run", at=at)
    trainer.write_sae(folder / "sae")


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[-1]
    if len(sys.argv) == 6:
        rank, world, port = sys.argv[2:5]
        os.environ |= {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    world = join_processes(timeout_seconds=8 if what == "hang" else 120)
    if what in ("parity", "long"):
        {"parity": parity, "long": long}[what](folder, world)
    else:
        {"hang": hang, "kill": kill}[what](folder, Mesh(world // 2, 2))
    if what == "hang":
        os._exit(0)
    leave_processes()
