"""Keep what was derived once and should not be derived again at each start, in verified entries.

A folder per entry, named by a key that covers all that decides its content: what an engine makes of
a bundle for this device, a package that a deployment sends. Entries are never changed: they are
made beside, renamed into place, and verified each time before they are used, against a marker that
is written last. Nothing in them comes from the user's photos.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pbc.util import strict_json

_COMPLETE = "entry.json"
_CHUNK_BYTES = 1 << 20
_ABANDONED_SECONDS = 24 * 3600.0
_SHARED_BYTES = 1 << 16
_LIMIT_BYTES = 4 * 2**30
_ATTEMPTS = 5


def default_folder() -> Path:
    """Return $PBC_CACHE, or pbc's folder in the user's cache; OSError where there is neither."""
    own = os.environ.get("PBC_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if Path(shared).is_absolute():  # the specification wants any other ignored
        return Path(shared) / "pbc"
    try:
        return Path.home() / ".cache" / "pbc"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "no home folder; PBC_CACHE can name one") from error


@dataclass(frozen=True)
class Artifacts:
    """The entries under one folder; several processes may use it at once.

    limit_bytes: where all entries together are larger, those go that were not used the longest.
    """

    root: Path
    limit_bytes: int = _LIMIT_BYTES

    def get(self, key: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of a key's entry, made by `make` in an empty folder if there is none.

        A damaged entry is replaced. Raises OSError where the folder cannot hold it.
        """
        entry = self.root / key
        if _is_complete(entry):
            with suppress(OSError):  # a read-only cache serves, but nothing is pruned there
                os.utime(entry / _COMPLETE)
            return entry
        self.discard(key)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=self.root))
        try:
            make(new)
            self._share(new)
            _mark_complete(new)
            self._install(new, key)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        self._prune(keep=entry)
        return entry

    def _install(self, new: Path, key: str) -> None:
        """Give a finished entry its name, unless another process was faster.

        Of several that met the same damaged entry, one may remove what another has just made.
        """
        entry = self.root / key
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                new.rename(entry)
                return
            except OSError:
                if _is_complete(entry):
                    return
                if not attempts_left:
                    raise
            self.discard(key)

    def discard(self, key: str) -> None:
        """Remove a key's entry; whoever has mapped its files keeps them."""
        entry = self.root / key
        if entry.exists():
            # Renamed first: nobody finds an entry of which a part is gone.
            doomed = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=self.root))
            with suppress(FileNotFoundError):
                entry.rename(doomed / "entry")
            shutil.rmtree(doomed, ignore_errors=True)

    def _entries(self) -> list[Path]:
        return [
            path.parent for path in self.root.glob(f"*/{_COMPLETE}") if path.parent.suffix != ".tmp"
        ]

    def _share(self, new: Path) -> None:
        """Let large files that another entry has too be one on the disk, and in memory if mapped.

        The graphs of a level read the same weights: what a step and a prediction make of them is
        often the same to the byte.
        """
        own = {file.name: _facts(file) for file in new.iterdir()}
        for entry in self._entries():
            with suppress(OSError, ValueError, AttributeError):
                known = strict_json.load(entry / _COMPLETE)
                for name, facts in own.items():
                    if known.get(name) == facts and int(facts[0]) >= _SHARED_BYTES:
                        twin = new / f"{name}.twin"
                        os.link(entry / name, twin)
                        if _facts(twin) == facts:
                            twin.replace(new / name)
                        twin.unlink(missing_ok=True)

    def _prune(self, keep: Path) -> None:
        """Remove what is too much, the least recently used first, and what a kill left behind."""
        for folder in self.root.glob(".*.tmp"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
        used = []
        for entry in self._entries():
            with suppress(OSError):
                size_bytes = sum(file.stat().st_size for file in entry.iterdir())
                used.append(((entry / _COMPLETE).stat().st_mtime_ns, size_bytes, entry))
        total = sum(size_bytes for _, size_bytes, _ in used)
        for _, size_bytes, entry in sorted(used):
            if total > self.limit_bytes and entry != keep:
                self.discard(entry.name)
                total -= size_bytes


def _mark_complete(folder: Path) -> None:
    facts = {file.name: _facts(file) for file in sorted(folder.iterdir())}
    (folder / _COMPLETE).write_text(json.dumps(facts))


def _is_complete(folder: Path) -> bool:
    try:
        facts = strict_json.load(folder / _COMPLETE)
        return bool(facts) and all(_facts(folder / name) == known for name, known in facts.items())
    except (OSError, ValueError, AttributeError):
        return False


def _facts(file: Path) -> list[str | int]:
    """Return size and sha256 of a file."""
    digest, size_bytes = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return [size_bytes, digest.hexdigest()]
