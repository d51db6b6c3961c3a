"""What several processes do together; each result is a file that a test reads.

Run as `python distributed_runs.py FOLDER RANK WORLD PORT`: every mesh of that many processes, every
case. Also the reference: the same cases by one process.
"""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training_runs import D, F, config, sparse_rows

import fastsae
from fastsae.distributed import Mesh, join_processes
from fastsae.distributed.assembly import latent_axis
from fastsae.training.trainer import Trainer
from fastsae_kernels import RowGrad

B, STEPS = 64, 20
MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(2, 2), (1, 4), (4, 1)]}
SHAPE: dict[str, Any] = {"d_in": D, "d_sae": F, "normalize_activations": "expected_average_only_in"}
OUT: dict[str, Any] = {"d_in": D, "d_sae": F, "d_out": 12}

SAES = {
    "topk": fastsae.TopKConfig(**SHAPE, k=5),
    # More than a shard of 4 holds, and F that no shard count divides.
    "topk-large-k": fastsae.TopKConfig(**{**SHAPE, "d_sae": 90}, k=40),
    "topk-without-norms": fastsae.TopKConfig(**SHAPE, k=5, rescale_acts_by_decoder_norm=False),
    "abstopk": fastsae.AbsTopKConfig(**SHAPE, k=5),
    "batchtopk": fastsae.BatchTopKConfig(**SHAPE, k=4.5),
    "matryoshka": fastsae.MatryoshkaBatchTopKConfig(**SHAPE, k=5),
    "matryoshka-aux": fastsae.MatryoshkaBatchTopKConfig(
        **SHAPE, k=5, matryoshka_widths=(10, 50), use_matryoshka_aux_loss=True
    ),
    "standard": fastsae.StandardConfig(**SHAPE, l1_coefficient=0.5),
    "standard-p": fastsae.StandardConfig(**SHAPE, l1_coefficient=0.5, lp_norm=1.5),
    "standard-ghosts": fastsae.StandardConfig(**SHAPE, l1_coefficient=3.0, use_ghost_grads=True),
    "jumprelu": fastsae.JumpReLUConfig(**SHAPE, l0_coefficient=0.1),
    "jumprelu-sparse": fastsae.JumpReLUConfig(
        **SHAPE,
        l0_coefficient=0.1,
        jumprelu_init_threshold=0.25,
        jumprelu_bandwidth=0.1,
        jumprelu_sparsity_loss_mode="quadratic",
        target_l0=5.0,
    ),
    "jumprelu-tanh": fastsae.JumpReLUConfig(
        **SHAPE,
        l0_coefficient=0.1,
        jumprelu_sparsity_loss_mode="tanh",
        pre_act_loss_coefficient=0.1,
        frequency_coefficient=0.1,
    ),
    "gated": fastsae.GatedConfig(**SHAPE, l1_coefficient=0.2),
    "transcoder": fastsae.TranscoderConfig(**OUT, l1_coefficient=0.5),
    "skip_transcoder": fastsae.SkipTranscoderConfig(**OUT, l1_coefficient=0.5),
}
CASES: dict[str, dict[str, Any]] = {name: {"sae": sae} for name, sae in SAES.items()} | {
    "topk/rows": {"sae": SAES["topk"], "exchange": "rows"},
    "topk/pairs": {"sae": SAES["topk"], "exchange": "pairs"},
    "topk/micro": {"sae": SAES["topk"], "micro_batch_size": 8, "exchange": "pairs"},
    "topk/micro-rows": {"sae": SAES["topk"], "micro_batch_size": 8, "exchange": "rows"},
    "topk/adam": {"sae": SAES["topk"], "kind": "adam"},
    "topk/unit": {"sae": SAES["topk"], "optimizer": {"unit_norm_decoder": True}},
    "topk/8bit-rows": {
        "sae": SAES["topk"],
        "exchange": "rows",
        "optimizer": {"moments": "8bit"},
    },
    "topk/bf16": {"sae": SAES["topk"], "compute_dtype": "bfloat16", "exchange": "rows"},
    "standard/pairs": {"sae": SAES["standard"], "exchange": "pairs"},
    "jumprelu/pairs": {"sae": SAES["jumprelu-sparse"], "exchange": "pairs"},
}


def run_config(case: str):
    values = {"steps": STEPS, "dead_window": 5 * B, "log_every": 1, **CASES[case]}
    optimizer = {"warm_up_steps": 0, "decay_steps": 0, **values.pop("optimizer", {})}
    return config(optimizer=optimizer, **values)


def batches(case: str):
    """The whole batches of a case: rows, or rows and targets."""
    rows = sparse_rows(STEPS * B, seed=1).split(B)
    if not hasattr(CASES[case]["sae"], "d_out") or CASES[case]["sae"].d_out == D:
        return [(x,) for x in rows]
    mapped = torch.randn(D, 12, generator=torch.Generator().manual_seed(2))
    return [(x, x @ mapped) for x in rows]


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
            if getattr(p, "row_grads", None) is not None:
                rows = p.t() if name == "W_enc" else p
                owned = rows[parts.owned(len(rows))]
                gradient = dense_gradient(p.row_grads, owned.shape)
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


def run(case: str, mesh: Mesh | None) -> dict[str, Any]:
    trainer = Trainer(run_config(case), device="cpu", mesh=mesh)
    mesh = trainer.mesh
    drawn = batches(case)
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
            trainer.step(*mine)
        found["losses"].append(float(trainer._total))
    found["fired"] = whole(trainer, "b_enc", trainer.dead.fired)
    found["weights"] = {
        name: whole(trainer, name, t.detach()) for name, t in trainer.sae.state_dict().items()
    }
    found["sent"] = dict(mesh.sent)
    return found


def run_all(folder: Path, rank: int, world: int) -> None:
    for (dp, tp), case in itertools.product(MESHES[world], CASES):
        mesh = Mesh(dp, tp)
        found = run(case, mesh)
        if case in ("topk", "topk/rows", "batchtopk", "jumprelu"):
            again = run(case, mesh)
            for name, t in found["weights"].items():
                found.setdefault("same_twice", True)
                found["same_twice"] &= torch.equal(t, again["weights"][name])
        if rank == 0:
            torch.save(found, folder / f"{case.replace('/', '+')}-{dp}x{tp}.pt")


if __name__ == "__main__":
    rank, world, port = map(int, sys.argv[2:])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    join_processes(timeout_seconds=120)
    run_all(Path(sys.argv[1]), rank, world)
    dist.destroy_process_group()
