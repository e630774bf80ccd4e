"""Run commands on mutated bundles and personal models; say what is not one line and a status.

    python tests/fuzz/campaign.py --engine pytorch --bundles 5000 --models 1000 --seed 0

Each case is a process forked from one that has loaded the engine: its own limits, its own end.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import mutations
import tiny
import tiny_onnx

from pbc.bundle import Bundle
from pbc.cli import main as pbc

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30
LONGEST = 500
KINDS = ("probe", "maps", "bodies", "whole")


@dataclass(frozen=True)
class Fault:
    """A case that did not end as it must; again: by its engine, kind, number and seed."""

    case: str
    what: str


def contents(engine: str, kind: str) -> tuple[tiny.Json, dict[str, bytes]]:
    """Return the manifest and the files of a bundle for an engine."""
    return tiny_onnx.contents(kind) if engine == "onnxruntime" else tiny.contents(kind)


def campaign(engine: str, bundles: int, models: int, seed: int) -> Iterator[Fault]:
    """Run every case; yield the faults as they are met."""
    folder = Path(tempfile.mkdtemp(prefix="pbc-fuzz-"))
    try:
        photos = tiny.photos(folder / "photos", 2)
        costs = tiny.costs(folder / "costs.json")
        for number in range(bundles):
            kind = KINDS[number % (3 if engine == "onnxruntime" else 4)]
            kind = "whole" if engine == "onnxruntime" and kind == "bodies" else kind
            case = f"{engine} bundle {kind} {number} of seed {seed}"
            chance = random.Random(case)
            path = folder / "b.pbc"
            mutations.write_bundle(path, *contents(engine, kind), chance)
            words = chance.choice([
                ["inspect", path],
                ["train", path, photos, "-o", folder / "out", "--epochs", 1, "--threads", 1,
                 "--val", "none", "--overwrite", "--costs", costs],
            ])  # fmt: skip
            yield from _faults(case, words, folder)
        yield from _models(engine, models, seed, folder, photos, costs)
    finally:
        shutil.rmtree(folder)


def _models(
    engine: str, models: int, seed: int, folder: Path, photos: Path, costs: Path
) -> Iterator[Fault]:
    if not models:
        return
    bundle = (tiny_onnx if engine == "onnxruntime" else tiny).write(folder / "whole.pbc")
    train = ["train", bundle.path, photos, "-o", folder / "mine", "--threads", 1,
             "--val", "none", "--costs", costs]  # fmt: skip
    yield from _faults("a whole bundle", [*train, "--epochs", 1], folder)
    files = ("model.json", "checkpoint.safetensors", "trainable.safetensors", "metrics.jsonl")
    whole = {name: (folder / "mine" / name).read_bytes() for name in files}
    for number in range(models):
        case = f"{engine} model {number} of seed {seed}"
        chance = random.Random(case)
        name = chance.choice(files)
        for other, data in whole.items():
            (folder / "mine" / other).write_bytes(data)
        (folder / "mine" / name).write_bytes(mutations.file(name, whole[name], chance))
        words = chance.choice([
            ["predict", folder / "mine", photos / "red/000.png", "--threads", 1],
            ["eval", folder / "mine", photos, "--threads", 1],
            [*train, "--epochs", 2, "--resume"],
        ])  # fmt: skip
        yield from _faults(f"{case}: {name}", words, folder)


def _faults(case: str, words: Sequence[object], folder: Path) -> list[Fault]:
    printed = folder / "printed"
    child = os.fork()
    if child == 0:
        _run([str(word) for word in words], printed)
    _, status, used = os.wait4(child, 0)
    errors = printed.read_bytes()
    cpu = used.ru_utime + used.ru_stime
    found = []
    if os.WIFSIGNALED(status):
        found.append(f"ended by {signal.Signals(os.WTERMSIG(status)).name} after {cpu:.1f} s")
    elif os.WEXITSTATUS(status) not in (0, 1, 2):
        found.append(f"exit {os.WEXITSTATUS(status)}")
    text = errors.decode(errors="replace")
    if "Traceback" in text:
        found.append("a traceback: " + text.strip().splitlines()[-1][:200])
    elif found or os.WEXITSTATUS(status):
        lines = [line for line in text.splitlines() if line.startswith("error:")]
        if len(lines) != 1 or len(lines[0]) > LONGEST:
            found.append(f"{len(lines)} lines of error: {text[-300:]!r}")
        if any(not char.isprintable() for line in lines for char in line):
            found.append(f"unprintable characters: {lines[0]!r}")
    if cpu > CPU_SECONDS:
        found.append(f"{cpu:.1f} s of CPU")
    shutil.rmtree(folder / "out", ignore_errors=True)
    return [Fault(case, what) for what in found]


def _run(words: list[str], printed: Path) -> None:
    """Be the command, in a forked process."""
    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY_BYTES, own + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (4 * CPU_SECONDS, 4 * CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 0
    try:
        pbc.main(args=words, prog_name="pbc")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def warm(engine: str, folder: Path) -> None:
    """Import what a run imports, without threads that a fork would lose."""
    import numpy as np

    from pbc import plugins
    from pbc.cli import inspect, train  # noqa: F401

    source = tiny_onnx if engine == "onnxruntime" else tiny
    bundle: Bundle = source.write(folder / "warm.pbc")
    plugins.load("pbc.engines", engine)()
    if engine == "pytorch":
        import torch

        torch.set_num_threads(1)
    assert np.isfinite(1.0)
    assert bundle.has_prefix


def main() -> int:
    """Run as a program: print the faults, and how many cases there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="pytorch", choices=("pytorch", "onnxruntime"))
    parser.add_argument("--bundles", type=int, default=5000)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        warm(options.engine, Path(folder))
    count = 0
    for fault in campaign(options.engine, options.bundles, options.models, options.seed):
        count += 1
        sys.stdout.write(f"{fault.case}: {fault.what}\n")
        sys.stdout.flush()
    sys.stdout.write(
        f"{options.engine}: {options.bundles} bundles, {options.models} models, {count} faults\n"
    )
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
