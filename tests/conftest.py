import pytest
import torch


@pytest.fixture(autouse=True)
def _same_every_time():
    """One seed a test, and NaN in every uninitialised tensor so that an unwritten output fails."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
