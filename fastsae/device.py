"""Where a run computes."""

from pathlib import Path

import torch

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; anything else is taken at its word.

    Raises:
        RuntimeError: an NVIDIA driver is present but the installed torch cannot use it.
        ValueError: the device asked for is not one, or not available.
    """
    if str(device) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if _NVIDIA_DRIVER.exists():
            raise RuntimeError(
                f"device 'auto' found an NVIDIA driver that torch {torch.__version__} cannot use; "
                "install a CUDA build of torch (or `make demo TORCH=system` to use the one you "
                "have), or pass device='cpu' to run on the CPU on purpose"
            )
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto' or a torch device, got {device!r}") from error
    absent = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if absent.get(resolved.type, False):
        raise ValueError(f"device must be available, got {device!r} and torch {torch.__version__}")
    return resolved
