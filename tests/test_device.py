import pytest
import torch

from fastsae import device as device_module
from fastsae.device import resolve_device


@pytest.fixture
def no_cuda(monkeypatch):
    """A machine on which torch finds no CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def no_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(device_module, "_NVIDIA_DRIVER", tmp_path / "absent")


@pytest.mark.parametrize(
    "cuda, mps, expected",
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_is_cuda_before_mps_before_the_cpu(monkeypatch, no_driver, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device() == resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("asked", ["cpu", torch.device("cpu")])
def test_a_device_is_taken_at_its_word(asked):
    assert resolve_device(asked) == torch.device("cpu")


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", torch.device("cuda")], ids=str)
def test_cuda_that_is_not_there_is_refused(no_cuda, asked):
    with pytest.raises(ValueError, match="device must be available, got .*cuda.* and torch"):
        resolve_device(asked)


def test_a_driver_that_torch_cannot_use_is_refused(no_cuda, monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version")
    monkeypatch.setattr(device_module, "_NVIDIA_DRIVER", driver)
    with pytest.raises(RuntimeError, match="found an NVIDIA driver that torch .* cannot use"):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_word_that_is_no_device_is_refused():
    with pytest.raises(ValueError, match="device must be .*, got 'gpu'"):
        resolve_device("gpu")
