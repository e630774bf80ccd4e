"""Fail every call on a training's folder in turn, down to each write; say what does not go on.

    python tests/fuzz/disk.py --engine pytorch

What fails is the C library's call, whoever makes it: Python, numpy or an engine. Each training has
to end with one line or whole, and to end at the same bits when it is resumed.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import subjects

import tiny  # isort: skip  # of tests/support, which subjects puts on the path

from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime

ERRORS = ("EIO", "ENOSPC", "EROFS", "ESTALE")
_LIBRARY = "PBC_FAILING_CALLS"


class Disk:
    """A folder whose n-th call fails, and from then on all (`lasting`) or that one alone."""

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)
        self._library = ctypes.CDLL(os.environ[_LIBRARY])
        self._library.failing_seen.restype = ctypes.c_long

    def fails(self, number: int, code: int, *, lasting: bool) -> None:
        """Fail the n-th call from now on; 0 for none, which counts them."""
        self._library.failing_arm(self._root, ctypes.c_long(number), code, int(lasting))

    def heals(self) -> int:
        """Fail nothing any more; return how many calls there were."""
        seen = int(self._library.failing_seen())
        self._library.failing_arm(b"", ctypes.c_long(0), 0, 0)
        return seen


def faults(engine: str, folder: Path, errors: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong, and at last how much was tried."""
    path = subjects.write(folder / "m.pbc", subjects.bundles(engine, folder)[0]).path
    runtime = Runtime.open(path)
    samples = ImageFolder.open(tiny.photos(folder / "photos", 2), runtime.spec)
    costs = tiny.costs(folder / "costs.json", len(runtime.bundle.ladder))
    options = TrainOptions(epochs=2, learning_rate=0.1, cache="disk", costs=costs, threads=1)
    out, disk = folder / "out", Disk(folder / "out")
    runtime.fit(samples, options, folder / "whole")
    whole = (folder / "whole" / "trainable.safetensors").read_bytes()
    disk.fails(0, 0, lasting=False)
    runtime.fit(samples, options, out)
    calls, refused = disk.heals(), 0
    for number in range(1, calls + 1):
        for name in errors:
            code = getattr(errno, name)
            for lasting in (False, True):
                case = f"call {number} with {name}, lasting {lasting}"
                shutil.rmtree(out)
                disk.fails(number, code, lasting=lasting)
                try:
                    runtime.fit(samples, options, out, resume=True)
                    said = None
                except PbcError as error:
                    said = str(error)
                except Exception as error:
                    said = None
                    yield f"{case}: {type(error).__name__}: {error}"
                finally:
                    disk.heals()
                if said is not None:
                    refused += 1
                    if "\n" in said or os.strerror(code) not in said:
                        yield f"{case}: it says {said!r}"
                try:
                    runtime.fit(samples, options, out, resume=True)
                    Personal.open(out)
                    if (out / "trainable.safetensors").read_bytes() != whole:
                        yield f"{case}: resumed to other bits"
                except Exception as error:
                    yield f"{case}: resuming: {type(error).__name__}: {error}"
    sys.stdout.write(
        f"{engine}: each of {calls} calls failed by {', '.join(errors)}, once and for good: "
        f"{refused} of {2 * len(errors) * calls} trainings refused\n"
    )


def main() -> int:
    """Run as a program: print the faults, and how much was tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="pytorch", choices=subjects.ENGINES)
    parser.add_argument("--errors", nargs="+", default=ERRORS, choices=ERRORS)
    options = parser.parse_args()
    if _LIBRARY not in os.environ:
        return _preloaded()
    folder = Path(tempfile.mkdtemp(prefix="pbc-disk-"))
    count = 0
    try:
        subjects.environment(folder)
        for fault in faults(options.engine, folder, options.errors):
            count += 1
            sys.stdout.write(f"{fault}\n")
            sys.stdout.flush()
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(f"{count} faults\n")
    return 1 if count else 0


def _preloaded() -> int:
    """Compile what fails calls, and run this program with it."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "failing_calls.so"
        source = Path(__file__).with_name("failing_calls.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), _LIBRARY: str(library)}
        command = [sys.executable, *sys.argv]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
