"""The folder of a personal model: its files, and the lock of whoever writes there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.util.atomic import cannot_write, replacing, sync_folder
from pbc.util.files import opened

_LOCK_POLL_SECONDS = 0.2

_CHUNK_BYTES = 1 << 20
_BUNDLE = "bundle.pbc"


@dataclass(frozen=True)
class Output:
    """`OUT/`: the model to keep, and beside it what was derived from the user's photos."""

    root: Path
    # Digests of the bundles whose copy was looked at already: that reads all of it.
    _adopted: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def model(self) -> Path:
        """Facts: which bundle, classes, options, results; written last."""
        return self.root / "model.json"

    @property
    def bundle(self) -> Path:
        """The bundle that the model personalises, a copy."""
        return self.root / _BUNDLE

    @property
    def trainable(self) -> Path:
        """The trained parameters, head included."""
        return self.root / "trainable.safetensors"

    @property
    def checkpoint(self) -> Path:
        """State from which a killed run goes on."""
        return self.root / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON line per epoch."""
        return self.root / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """What the model got right and wrong on photos that it was not trained on."""
        return self.root / "validation.json"

    @property
    def costs(self) -> Path:
        """Costs of a sample at each level on this device; `--costs` reads it."""
        return self.root / "costs.json"

    @property
    def cache(self) -> Path:
        """Folder of cached features."""
        return self.root / "cache"

    @property
    def fleet(self) -> Path:
        """Folder of what a device of a fleet keeps beside its checkpoint."""
        return self.root / "fleet"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.root / "tensorboard"

    @contextmanager
    def locked(self, *, wait_seconds: float = 0.0) -> Iterator[None]:
        """Create the folder and keep every other run out of it; a killed run's lock is free.

        wait_seconds: for a run that is there to end; raises PbcError where it does not.
        Whatever the system refuses to do in the folder meanwhile becomes a PbcError.
        """
        lock = self.root / ".lock"
        new = not self.root.exists()
        _refuse_links(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise PbcError(cannot_write(lock, error)) from error
        try:
            try:
                _lock(handle, wait_seconds)
            except BlockingIOError as error:
                raise PbcError(f"another run is training in {self.root}; wait for it") from error
            except OSError as error:
                raise PbcError(
                    f"cannot lock {lock}: {error.strerror or error}; its file system may have no "
                    "locks: -o names a folder elsewhere"
                ) from error
            for path in self.root.glob(".*.tmp"):  # a write that a kill cut short
                _remove(path)
            yield
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise PbcError(
                f"cannot go on in {self.root}: {error.strerror or error}{where}"
            ) from error
        finally:
            with suppress(OSError):
                # A run that failed before it had anything to keep.
                if new and {path.name for path in self.root.iterdir()} <= {lock.name, _BUNDLE}:
                    _remove(self.bundle)
                    lock.unlink()
                    self.root.rmdir()
            with suppress(OSError):
                os.close(handle)

    @property
    def holds_run(self) -> bool:
        """Whether a model or a checkpoint is here."""
        return self.checkpoint.exists() or self.model.exists()

    def written_at(self) -> tuple[int, ...]:
        """Return when checkpoint and model were written, which tells one run from the next."""
        return tuple(
            path.stat().st_mtime_ns for path in (self.checkpoint, self.model) if path.exists()
        )

    def begin(self, bundle: Bundle, *, overwrite: bool) -> bool:
        """Take the folder for a new run; refuses one that holds a run unless told to overwrite it.

        Returns whether one is here: it stays until `clear`, when the new one has something to keep.
        Else the bundle's copy is here already.
        """
        earlier = self.holds_run
        if earlier and not overwrite:
            raise PbcError(
                f"{self.root} holds a run already: --resume goes on with it, "
                "--overwrite starts again, -o names another folder"
            )
        self._discard(self.cache)  # by its own keys the new run might find features there
        if not earlier:
            self.clear()
            self.adopt(bundle)
        elif self._has(bundle):
            self._adopted.add(bundle.digest)
        else:
            bundle.verify()
        return earlier

    def clear(self) -> None:
        """Remove the run that is here; first of all, as a folder is never half of two runs."""
        self._discard(self.model, self.checkpoint, self.trainable, self.validation)

    @staticmethod
    def _discard(*paths: Path) -> None:
        try:
            for path in paths:
                _remove(path)
        except OSError as error:
            raise PbcError(f"cannot remove {path}: {error.strerror or error}") from error

    def adopt(self, bundle: Bundle) -> None:
        """Put a copy of the bundle beside the model.

        Not a link: where the bundle is overwritten in place, the model would be without its own.
        Every file is read first: the run itself may not, where what it needs of one is kept on this
        device, and the model would then have a damaged copy.
        """
        if bundle.digest in self._adopted and self.bundle.exists():
            return
        if not self._has(bundle):
            bundle.verify()
            self._copy(bundle)
        self._adopted.add(bundle.digest)

    def _copy(self, bundle: Bundle) -> None:
        try:
            _remove(self.bundle)
            if bundle.path.is_dir():
                self._copy_folder(bundle)
                return
            with replacing(self.bundle, mode=0o644) as file, opened(bundle.path) as source:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
        except OSError as error:
            raise PbcError(cannot_write(self.bundle, error)) from error

    def _copy_folder(self, bundle: Bundle) -> None:
        """Copy what the manifest names, and nothing else; the folder appears when it is whole."""
        new = self.root / ".bundle.tmp"
        _remove(new)
        for name in bundle.entries:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            with opened(bundle.path / name, follow=False) as source, (new / name).open("wb") as to:
                shutil.copyfileobj(source, to, _CHUNK_BYTES)
                to.flush()
                os.fsync(to.fileno())
        new.rename(self.bundle)
        sync_folder(self.root)

    def _has(self, bundle: Bundle) -> bool:
        if not self.bundle.exists():
            return False
        try:
            own = Bundle.open(self.bundle)
            if own.digest != bundle.digest:
                return False
            own.verify()
        except PbcError:  # what a kill left of a copy
            return False
        return True

    def is_run(self) -> bool:
        """Say whether a training run wrote into this folder."""
        return any(path.exists() for path in (self.model, self.checkpoint, self.root / ".lock"))

    def forget(self, *, model: bool) -> list[Path]:
        """Remove what was derived from the user's photos, the model too if asked; say what."""
        private = [
            self.cache,
            self.fleet,
            self.checkpoint,
            self.metrics,
            self.validation,
            self.tensorboard,
        ]
        kept = [self.model, self.trainable, self.bundle, self.costs, self.root / ".lock"]
        wanted = [*private, *(kept if model else ())]
        gone = [path for path in wanted if path.exists()]
        for path in gone:
            _remove(path)
        if model and self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()
        return gone


def _refuse_links(root: Path) -> None:
    """Raise PbcError for a link in the folder: it may come from anybody, and lead anywhere.

    What is written through one, or cut to size, would be a file elsewhere.
    """
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            if (path := Path(folder, name)).is_symlink():
                raise PbcError(f"{path} is a link; nothing is written through one: remove it")


def _lock(handle: int, wait_seconds: float) -> None:
    """Lock an open file; raises BlockingIOError where another has it all that time."""
    until = monotonic() + wait_seconds
    while monotonic() < until:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        sleep(_LOCK_POLL_SECONDS)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
