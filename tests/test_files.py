"""Files and folders are the old ones or the new ones; a full disk is said in one sentence."""

import errno
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from fastsae import SAE, DataConfig, OptimizerConfig, TopKConfig, TrainConfig, Trainer
from fastsae.files import replacing, write_json

resource = pytest.importorskip("resource", reason="limits on file sizes are POSIX's")


@contextmanager
def file_size_limit(n_bytes):
    """Writes past `n_bytes` of any file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trainer_with_a_checkpoint(folder):
    sae = TopKConfig(d_in=16, d_sae=2048, k=4)
    optimizer = OptimizerConfig(lr=1e-3)
    data = DataConfig(total_tokens=640, batch_size=64)
    cfg = TrainConfig(sae=sae, data=data, optimizer=optimizer)
    trainer = Trainer(cfg, device="cpu", out=folder)
    trainer.step(torch.randn(64, 16))
    trainer.save()
    trainer.step(torch.randn(64, 16))
    return trainer


def test_what_was_written_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "new" / "folder" / "value.json"
    for value in (1, {"two": 2}):
        write_json(path, value)
    assert path.read_text() == '{\n  "two": 2\n}\n'
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_an_exception_leaves_the_old_file_and_no_temporary(tmp_path, error):
    path = tmp_path / "value.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"key": object()})
    assert path.read_text() == "1\n"


def test_a_folder_whose_name_is_taken_is_refused_and_kept(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")
    assert [p.name for p in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_folder(tmp_path):
    path = tmp_path / "checkpoint"
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert (path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="path must be in a folder that can be written to, got"):
        write_json(tmp_path / "file" / "value.json", 1)


def test_a_full_disk_leaves_the_old_tensors(tmp_path):
    path = tmp_path / "tensors.safetensors"
    save_file({"old": torch.zeros(3)}, path)
    before = path.read_bytes()
    with (
        pytest.raises(OSError, match=r"could not be written, .*File too large.*tensors.safetens"),
        file_size_limit(4096),
        replacing(path) as temporary,
    ):
        save_file({"new": torch.zeros(3000)}, temporary)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_json(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, "old")
    with pytest.raises(OSError, match="value.json") as caught, file_size_limit(4096):
        write_json(path, "new" * 3000)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == '"old"\n'


def test_a_checkpoint_on_a_full_disk_leaves_the_previous_one(mount):
    small_disk = mount("size=1m")
    trainer = trainer_with_a_checkpoint(small_disk)
    with pytest.raises(OSError, match="could not be written, .*No space left on device"):
        trainer.save()
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == ["step-000000001"]
    resumed = Trainer(trainer.cfg, device="cpu", out=small_disk)
    assert resumed.resume() and resumed.steps_done == 1


def test_a_checkpoint_past_a_limit_leaves_the_previous_one(tmp_path):
    trainer = trainer_with_a_checkpoint(tmp_path)
    message = "could not be written, .*File too large"
    with pytest.raises(OSError, match=message), file_size_limit(65_536):
        trainer.save()
    resumed = Trainer(trainer.cfg, device="cpu", out=tmp_path)
    assert resumed.resume() and resumed.steps_done == 1
    assert SAE.load_from_disk(tmp_path / "checkpoints" / "step-000000001").cfg.d_sae == 2048
