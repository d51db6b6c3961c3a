"""Files that are either the old ones or the new ones, never half of each."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; what was written there takes its place when all went well.

    One rename: a file replaces the old one, a folder needs its name to be free.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; `path` is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OSError(
            error.errno, f"path must be in a folder that can be written to, got {path}: {error}"
        ) from error
    try:
        temporary = folder / path.name
        yield temporary
        (folder / "ordinary").touch()
        mode = (folder / "ordinary").stat().st_mode
        for written in [temporary, *temporary.rglob("*")]:
            if written.is_file():
                written.chmod(mode)  # safetensors lets nobody but the owner read
            _sync(written)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        if isinstance(error, OSError) and error.filename is not None:
            raise
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"could not be written, {error}", str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


SAVED = ".saved"
"""Folder whose files are a complete save and come before those of the same name beside it."""


@contextmanager
def replacing_together(folder: Path) -> Iterator[Path]:
    """A temporary folder; the files written there take their places in `folder` all at once.

    One rename of the temporary folder, to `.saved`, makes them the ones that `current` finds; then
    each is moved to its own name. After a kill between the moves the next save completes them.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; all files are as they were.
    """
    _move_saved(folder)
    with replacing(folder / SAVED) as temporary:
        temporary.mkdir()
        yield temporary
    _move_saved(folder)


def current(path: Path) -> Path:
    """Where the file is that `replacing_together` wrote last: at `path`, but for a kill."""
    saved = path.parent / SAVED / path.name
    return saved if saved.is_file() else path


def _move_saved(folder: Path) -> None:
    saved = folder / SAVED
    if saved.is_dir():
        for file in saved.iterdir():
            os.replace(file, folder / file.name)
        _sync(folder)
        saved.rmdir()


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def _sync(path: Path) -> None:
    """Make what was written survive a power cut, not only the process."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
