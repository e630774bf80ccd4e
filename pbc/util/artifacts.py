"""Keep what was derived once and should not be derived again at each start, in verified entries.

A folder per entry, named by a key that covers all that decides its content: what an engine makes of
a bundle for this device, a package that a deployment sends. Entries are never changed: they are
made beside, renamed into place, and verified each time before they are used: copies against what
the bundle's manifest says, what was derived against a marker that is written last. The marker bears
a seal, made with a secret of this folder's owner; a folder that others may write to is not used.
Nothing in them comes from the user's photos.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbc.util import strict_json
from pbc.util.files import read_bytes

_COMPLETE = "entry.json"
_SECRET, _SECRET_BYTES = "seal.secret", 32
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

    def get(
        self, key: str, make: Callable[[Path], None], sha256: Mapping[str, str] | None = None
    ) -> Path:
        """Return the folder of a key's entry, made by `make` in an empty folder if there is none.

        sha256: of the files that an entry of copies has, as its source says.
        A damaged entry is replaced. Raises OSError where the folder cannot hold it, or others may
        write to it.
        """
        entry = self.root / key
        self._refuse_shared()
        if self._is_complete(entry) and _holds(entry, sha256):
            with suppress(OSError):  # a read-only cache serves, but nothing is pruned there
                os.utime(entry / _COMPLETE)
            return entry
        self.discard(key)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._refuse_shared()
        new = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=self.root))
        try:
            make(new)
            self._share(new)
            if not _holds(new, sha256):
                raise OSError(errno.EIO, "what was written is not what is read")
            self._mark_complete(new, key)
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
                if self._is_complete(entry):
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
            with suppress(OSError, ValueError, AttributeError, LookupError, TypeError):
                known = strict_json.load(entry / _COMPLETE)["files"]
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

    def _refuse_shared(self) -> None:
        """Raise OSError for a folder in which somebody else may put what is run from there."""
        try:
            status = self.root.stat()
        except FileNotFoundError:
            return
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
            raise OSError(errno.EPERM, f"{self.root} can be written by others", str(self.root))

    def _mark_complete(self, folder: Path, key: str) -> None:
        facts = {file.name: _facts(file) for file in sorted(folder.iterdir())}
        marker = {"files": facts, "seal": self._seal(key, facts, self._secret(make=True))}
        (folder / _COMPLETE).write_text(json.dumps(marker))

    def _is_complete(self, entry: Path) -> bool:
        try:
            marker = strict_json.load(entry / _COMPLETE)
            facts = marker["files"]
            seal = self._seal(entry.name, facts, self._secret())
            return (
                bool(facts)
                and hmac.compare_digest(seal, marker["seal"])
                and all(_facts(entry / name) == known for name, known in facts.items())
            )
        except (OSError, ValueError, AttributeError, LookupError, TypeError):
            return False

    def _seal(self, key: str, facts: Mapping[str, Any], secret: bytes) -> str:
        text = json.dumps([key, facts], sort_keys=True)
        return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()

    def _secret(self, *, make: bool = False) -> bytes:
        """Return the secret of seals; raises OSError where it is not this user's alone."""
        path = self.root / _SECRET
        if make and not path.exists():
            handle, name = tempfile.mkstemp(prefix=".", suffix=".secret", dir=self.root)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_SECRET_BYTES))
            with suppress(FileExistsError):  # another process was faster
                os.link(name, path)
            Path(name).unlink()
        status = path.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise OSError(errno.EPERM, f"{path} is not its owner's alone", str(path))
        secret = read_bytes(path, _SECRET_BYTES, follow=False)
        if len(secret) != _SECRET_BYTES:
            raise OSError(errno.EIO, f"{path} is cut short; remove it", str(path))
        return secret


def _holds(folder: Path, sha256: Mapping[str, str] | None) -> bool:
    """Return whether an entry of copies has these files, with this content."""
    if sha256 is None:
        return True
    names = {file.name for file in folder.iterdir()} - {_COMPLETE}
    return names == sha256.keys() and all(_facts(folder / n)[1] == sha256[n] for n in names)


def _facts(file: Path) -> list[str | int]:
    """Return size and sha256 of a file."""
    digest, size_bytes = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return [size_bytes, digest.hexdigest()]
