"""A disk that fails at a call of choice: what is refused below a folder, in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Python tells before it makes these calls; an exception of whoever is told is theirs.
_TOLD = frozenset(
    ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.listdir",
     "os.scandir", "os.link", "os.truncate", "os.utime", "shutil.rmtree", "fcntl.flock")
)  # fmt: skip
# Of these, which have a handle and no path, it does not tell.
_PATCHED = ("fsync", "ftruncate", "fchmod", "posix_fallocate", "copy_file_range")


class FailingDisk:
    """Counts calls below a folder, and fails the n-th with an error of choice.

    From then on all fail (`lasting`), as on a disk that is full or gone, or that one alone.
    """

    def __init__(self, root: Path, number: int, error: int, *, lasting: bool) -> None:
        self._root, self._error, self._lasting = str(root), error, lasting
        self._left = number

    @property
    def failed(self) -> bool:
        """Whether the n-th call was made."""
        return self._left <= 0

    def told(self, *places: Any) -> None:
        """Take a call on these paths or handles."""
        if any(self._below(place) for place in places):
            self._left -= 1
            if self._left == 0 or (self._left < 0 and self._lasting):
                raise OSError(self._error, os.strerror(self._error))

    def _below(self, place: Any) -> bool:
        if isinstance(place, int) and not isinstance(place, bool):
            try:
                place = Path(f"/proc/self/fd/{place}").readlink()
            except OSError:
                return False
        return isinstance(place, str | Path) and str(place).startswith(self._root)


_current: FailingDisk | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _current is not None and event in _TOLD:
        _current.told(*args[:2])


sys.addaudithook(_audit)  # for good, so that it has to be this cheap


@contextmanager
def failing(disk: FailingDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a disk fail inside the block."""
    global _current

    def told(call: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            disk.told(*args[:2])
            return call(*args, **kwargs)

        return replaced

    with monkeypatch.context() as patch:
        for name in _PATCHED:
            patch.setattr(os, name, told(getattr(os, name)))
        _current = disk
        try:
            yield
        finally:
            _current = None
