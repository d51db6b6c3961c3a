"""Trains from shards and kills itself in its second save, before every change of the disk in turn.

python tests/killed_saving.py ACTIVATIONS OUT EVERY

OUT/whole is what a run leaves in peace. OUT/N is what one leaves that was killed before the N-th
change and then resumed, for every EVERY-th N from 1 to the first change of the third save.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import torch

from fastsae.training import loop
from killed_training import train as train_from_shards

CHANGES = ("fsync", "replace", "rename", "unlink", "rmdir")
"""Functions of `os` that make what was written last, take its place, or go."""


train = partial(train_from_shards, steps=12, checkpoints=4, keep=1)


def before_changes(act: Callable[[], object], saves: range) -> None:
    """Call `act` before each change of the disk, from the beginning of one save to another's."""
    made, save = 0, loop.save_checkpoint
    originals = {name: getattr(os, name) for name in CHANGES}

    def after_act(change, *args, **options):
        act()
        return change(*args, **options)

    def saved(trainer):
        nonlocal made
        made += 1
        for name, change in originals.items():
            setattr(os, name, partial(after_act, change) if made in saves else change)
        return save(trainer)

    loop.save_checkpoint = saved


def in_a_child(work: Callable[[], object]) -> int:
    """The status it ends with."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1]


def counted(activations: Path, out: Path) -> int:
    """Changes of a run's second save, up to the third."""
    changes = count()
    before_changes(lambda: next(changes), range(2, 3))
    train(activations, out)
    return next(changes)


def killed(activations: Path, out: Path, n: int) -> None:
    changes = count(1)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    before_changes(lambda: next(changes) == n and kill(), range(2, 4))
    train(activations, out)


def main(activations: Path, out: Path, every: int) -> None:
    torch.set_num_threads(1)
    reading, writing = os.pipe()
    assert in_a_child(lambda: os.write(writing, bytes([counted(activations, out / "whole")]))) == 0
    n_changes = os.read(reading, 1)[0]
    for n in range(1, n_changes + 2, every):
        status = in_a_child(lambda n=n: killed(activations, out / str(n), n))
        assert os.WIFSIGNALED(status), n
        status = in_a_child(lambda n=n: train(activations, out / str(n)))
        assert status == 0, n


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
