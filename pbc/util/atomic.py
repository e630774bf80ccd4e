"""Replace a file in one step: whoever looks sees the old one or the new one, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pbc.errors import PbcError


@contextmanager
def replacing(path: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error.

    The bytes go to a temporary file in the same folder (a rename is atomic only within one file
    system), are fsynced, renamed, and the folder is fsynced, so that a kill or a power cut at any
    moment leaves the old file or the new one. On failure the temporary file goes and `path` is
    untouched; what the operating system refuses (a full disk) becomes a PbcError.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise PbcError(cannot_write(path, error)) from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # a disk that refused the write may refuse this too
                temporary.unlink(missing_ok=True)


def replace_bytes(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write `data` to `path` through `replacing`."""
    with replacing(path, mode=mode) as file:
        file.write(data)


def cannot_write(path: Path, error: OSError) -> str:
    """Return one line for a refused write: the path, the reason, and that nothing was lost."""
    kept = ""
    with suppress(OSError):  # of a disk that fails, nothing is known
        kept = "; the file that was there is unchanged" if path.exists() else ""
    return f"cannot write {path}: {error.strerror or error}{kept}"


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
