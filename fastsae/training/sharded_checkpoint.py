"""A checkpoint of several processes: each writes what it holds, any number of others reads it.

The folder is one of `torch.distributed.checkpoint`, with the run's `trainer_state.json` beside.
Tensors are in it as those of the whole dictionary, one latent a row, so that neither the mesh that
wrote it nor the one that reads it shows.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, Replicate, Shard

from fastsae.distributed.assembly import by_latent, latent_axis
from fastsae.distributed.mesh import Mesh
from fastsae.training.checkpoint import STATE, owns_rows, under

if TYPE_CHECKING:
    from fastsae.training.trainer import Trainer


class SavesBehind:
    """Checkpoints that are written while the training goes on, one at a time."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        # Of its own: what another thread sends must not meet what the training sends.
        ranks = [*range(mesh.size)]  # others may be beside, which save nothing
        group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._pending: Future[Any] | None = None
        self._renamed: Future[None] | None = None

    def start(self, tensors: dict[str, Tensor], state: dict[str, Any], path: Path) -> None:
        """Copy the tensors and have them written; `path` appears once all have written."""
        self.wait()
        temporary = path.with_name(f".{path.name}.saving")
        self.mesh.on_first(partial(_empty_folder, temporary, state))
        made = async_save(tensors, checkpoint_id=temporary, process_group=self._group)
        assert isinstance(made, Future)
        self._pending = made
        if self.mesh.is_first:
            self._renamed = Future()
            made.add_done_callback(partial(self._appear, temporary, path, self._renamed))

    def _appear(
        self,
        temporary: Path,
        path: Path,
        renamed: "Future[None]",
        written: "Future[Any]",
    ) -> None:
        """On rank 0, whose part is done when everybody's is."""
        try:
            written.result()
            os.replace(temporary, path)
            renamed.set_result(None)
        except BaseException as error:  # handed to the one that waits
            renamed.set_exception(error)

    def wait(self) -> None:
        """Until what was started is on disk.

        Raises:
            OSError: on every process, where one could not write.
        """
        if self._pending is None:
            return
        failed: BaseException | None = None
        for future in (self._pending, self._renamed):
            if future is not None:
                failed = failed or future.exception()
        self._pending = self._renamed = None
        if self.mesh.any(failed is not None):  # and nobody looks for it before it is there
            reason = failed or "another process could not write its part"
            raise OSError(f"checkpoint could not be written, {reason}") from failed


def _empty_folder(temporary: Path, state: dict[str, Any]) -> None:
    for left_by_a_kill in temporary.parent.glob(".step-*"):
        shutil.rmtree(left_by_a_kill)
    temporary.mkdir(parents=True)
    (temporary / STATE).write_text(json.dumps(state, indent=2))


def tensors_of(trainer: "Trainer") -> dict[str, Tensor]:
    """All that a resumed run needs, as `torch.distributed.checkpoint` takes it."""
    found = {f"sae.{n}": placed(trainer, n, t) for n, t in trainer.sae.state_dict().items()}
    for name, parameter in trainer.sae.named_parameters():
        owned = owns_rows(trainer, name)
        for key, t in trainer.optimizer.state[parameter].items():
            found[f"optimizer.{name}.{key}"] = (
                t.reshape(()) if t.ndim == 0 else placed(trainer, name, t, owned=owned)
            )
    for name, t in trainer.dead.state_dict().items():
        found[f"dead.{name}"] = t if t.ndim == 0 else placed(trainer, "b_enc", t)
    return found | {f"scaling.{n}": t for n, t in trainer.scaling.state_dict().items()}


def placed(trainer: "Trainer", name: str, t: Tensor, *, owned: bool = False) -> Tensor:
    """`t`, this process's part of a tensor like the parameter `name`, within the whole of it.

    Args:
        owned: whether it holds the rows that this process updates only.
    """
    t, mesh = t.detach(), trainer.mesh
    if latent_axis(trainer.sae, name) is None:
        return t
    rows = t if owned else by_latent(name, t)
    if mesh.size == 1:
        return rows
    shape = torch.Size([trainer.cfg.sae.d_sae, *rows.shape[1:]])
    return DTensor.from_local(
        rows,
        mesh.by_latent,
        [Shard(0), Shard(0) if owned else Replicate()],
        run_check=False,
        shape=shape,
        stride=rows.stride() if rows.ndim > 1 else (1,),
    )


def load(trainer: "Trainer", path: Path) -> None:
    """Read tensors into a trainer on any mesh."""
    found = FileSystemReader(path).read_metadata().state_dict_metadata
    recorded = {n: m for n, m in found.items() if isinstance(m, TensorStorageMetadata)}
    for name, parameter in trainer.sae.named_parameters():
        trainer.optimizer.state[parameter] = {
            key: _room(trainer, name, parameter, torch.Size(m.size), m.properties.dtype)
            for key, m in under(f"optimizer.{name}.", recorded).items()
        }
    tensors = tensors_of(trainer)  # those of the SAE and the optimizer are read in place
    for name, m in recorded.items():
        if name.startswith("scaling."):  # only a fit, or a file, knows their sizes
            tensors[name] = torch.zeros(m.size, dtype=m.properties.dtype, device=trainer.device)
    try:
        with warnings.catch_warnings():  # that one process is meant, which it is
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load_tensors(
                tensors,
                checkpoint_id=path,
                process_group=trainer.mesh.group("world"),
                no_dist=trainer.mesh.size == 1,
            )
    except CheckpointException as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    for prefix, part in (("dead.", trainer.dead), ("scaling.", trainer.scaling)):
        state = under(prefix, tensors).items()
        part.load_state_dict({k: t.to_local() if isinstance(t, DTensor) else t for k, t in state})


def _room(
    trainer: "Trainer", name: str, parameter: Tensor, size: torch.Size, dtype: torch.dtype
) -> Tensor:
    """An empty tensor of a parameter's state, as this process keeps it."""
    if len(size) == 0:
        device = parameter.device if trainer.optimizer.counts_on_device else "cpu"
        return torch.zeros((), dtype=dtype, device=device)
    if latent_axis(trainer.sae, name) is None:
        return torch.zeros(size, dtype=dtype, device=parameter.device)
    n_rows = len(trainer.sae.latents)
    owned = owns_rows(trainer, name)
    if owned:
        n_rows = len(range(n_rows)[trainer.parts.owned(n_rows)])
    rows = torch.zeros(n_rows, *size[1:], dtype=dtype, device=parameter.device)
    return rows if owned else by_latent(name, rows)
