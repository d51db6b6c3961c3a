"""Optional dependencies, imported where they are used and named when they are absent."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra of fastsae brings it.

    Raises:
        ImportError: the module's distribution is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(
            f"{module} is not installed: it comes with `pip install 'fastsae-triton[{extra}]'`"
        ) from error
