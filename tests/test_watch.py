"""What a process says of the others when a collective fails: two meshes on one store."""

import pytest
import torch.distributed as dist

from fastsae.distributed import watch
from fastsae.distributed.mesh import Mesh
from fastsae.distributed.watch import ProcessLost, watched

LOST = RuntimeError("Connection closed by peer [127.0.0.1]:1")


@pytest.fixture
def store(monkeypatch):
    kept = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(kept.port))
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.1)
    return kept


def member(rank: int, calls: int = 0) -> Mesh:
    """Of two, as far as the watch sees."""
    mesh = Mesh()
    mesh.dp, mesh.rank, mesh.calls = 2, rank, calls
    return mesh


def verdict(mesh: Mesh) -> str:
    with pytest.raises(ProcessLost) as lost, watched(mesh, lambda: 5):
        raise LOST
    return str(lost.value)


def test_an_error_of_its_own_is_what_the_others_say(store):
    with pytest.raises(ValueError), watched(member(1), lambda: 3):
        raise ValueError("activations must be finite, got nan")
    said = verdict(member(0))
    assert said.startswith("ended in an error: rank 1 (pid")
    assert "at step 3: ValueError: activations must be finite, got nan; resume" in said
    assert "dead" not in said


def test_a_process_behind_and_a_dead_one(store):
    with watched(member(1, calls=4), lambda: 2):
        assert verdict(member(0, calls=5)).startswith("behind: rank 1 (pid")
    assert verdict(member(0, calls=5)).startswith("dead: rank 1 (pid")


def test_an_attempt_before_this_one_says_nothing(store, monkeypatch):
    with pytest.raises(ValueError), watched(member(1), lambda: 3):
        raise ValueError("of the first attempt")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "of the first attempt" not in verdict(member(0))
