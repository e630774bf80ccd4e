"""Kill trainings and compilations at random moments (SIGKILL); say whether the same bits come out.

    python tests/fuzz/kills.py --engine pytorch --train 60 --compile 20 --seed 0

Each life is a process forked from one that has loaded the engine, so that most of it is training.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import subjects
from tqdm import tqdm

from pbc.bundle import Bundle

import forked  # isort: skip  # of tests/support, which subjects puts on the path
import tiny  # isort: skip

_OPTIONS = ({"--cache": "disk"}, {"--cache": "ram", "--optimizer": "adam"}, {"--cache": "off"})


@dataclass
class Killer:
    """Runs commands that die and come again. deaths: so far."""

    folder: Path
    chance: random.Random
    deaths: int = 0

    def whole(self, words: Sequence[object]) -> float:
        """Run a command to its end; return how long that took."""
        start = time.monotonic()
        ended = forked.run(words, self.folder / "printed")
        if ended.status != 0:
            raise RuntimeError(ended.printed)
        return time.monotonic() - start

    def killed(self, words: Sequence[object], seconds: float) -> bool:
        """Run a command, and kill it within this time if it has not ended; whether it was."""
        child = forked.start(words, self.folder / "printed")
        time.sleep(self.chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        ended = forked.end(child, self.folder / "printed")
        self.deaths += ended.signal == "SIGKILL"
        if ended.signal != "SIGKILL" and ended.status != 0:
            raise RuntimeError(ended.printed)
        return ended.signal == "SIGKILL"


def train(engine: str, kills: int, killer: Killer) -> tuple[int, int]:
    """Kill trainings so often; return how many were killed, and how many ended at other bits."""
    folder = killer.folder
    photos = tiny.photos(folder / "photos", 8)
    contents = subjects.bundles(engine, folder)
    trainings = different = 0
    while killer.deaths < kills:
        bundle = subjects.write(folder / "b.pbc", contents[trainings % len(contents)])
        costs = tiny.costs(folder / "costs.json", len(bundle.manifest["levels"]))
        options = [word for pair in killer.chance.choice(_OPTIONS).items() for word in pair]
        words = ["train", bundle.path, photos, "--epochs", 8, "--threads", 1, "--costs", costs,
                 "--checkpoint-seconds", 0, "--head", "sgd", "--lr", 0.1, "--val", "none",
                 *options]  # fmt: skip
        if not trainings:
            subjects.warm([[*words, "-o", folder / "first"]])
        whole, out = folder / "whole", folder / "out"
        seconds = killer.whole([*words, "-o", whole])
        for _ in range(6):
            if not killer.killed([*words, "-o", out, "--resume"], 0.7 * seconds):
                break
        killer.whole([*words, "-o", out, "--resume"])
        trainings += 1
        different += _left(whole) != _left(out)
        for done in (whole, out):
            shutil.rmtree(done)
    return trainings, different


def _left(out: Path) -> tuple[bytes, set[str]]:
    """Return what a training left: the parameters, and the names of its files."""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return (out / "trainable.safetensors").read_bytes(), names


def compile_(engine: str, kills: int, killer: Killer) -> tuple[int, int]:
    """Kill compilations so often; return how many there were, and how many gave other bits."""
    folder = killer.folder
    net = subjects.network(folder)
    whole, path = folder / "whole.pbc", folder / "killed.pbc"
    words = subjects.compile_words(net, engine, "linear-probe", whole)
    # Threads would be lost in a fork: tqdm's, and those of an engine that finds several cores.
    tqdm.monitor_interval = 0
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    subjects.warm([words])
    seconds = killer.whole(words)
    rounds = different = 0
    while killer.deaths < kills:
        again = subjects.compile_words(net, engine, "linear-probe", path)
        while killer.deaths < kills and killer.killed(again, 1.1 * seconds):
            # What is there is whole, or nothing is.
            different += path.exists() and _compiled(path) != _compiled(whole)
        killer.whole(again)
        rounds += 1
        different += _compiled(path) != _compiled(whole)
        path.unlink()
    return rounds, different


def _compiled(path: Path) -> dict[str, bytes]:
    """Return the files of a whole bundle.

    Without libraries: TVM orders the stores of a shape by where its objects lie in memory.
    """
    made = Bundle.open(path)
    made.verify()
    names = made.manifest["files"]
    return {name: b"" if name.endswith(".so") else made.read(name) for name in names}


def main() -> int:
    """Run as a program: print how often was killed, and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="pytorch", choices=subjects.ENGINES)
    parser.add_argument("--train", type=int, default=60, metavar="KILLS")
    parser.add_argument("--compile", type=int, default=20, metavar="KILLS")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    different = 0
    for what, kills, run in (
        ("trainings", options.train, train),
        ("compilations", options.compile, compile_),
    ):
        if not kills:
            continue
        folder = Path(tempfile.mkdtemp(prefix="pbc-kills-"))
        subjects.environment(folder)
        killer = Killer(folder, random.Random(f"{what} {options.engine} {options.seed}"))
        try:
            count, wrong = run(options.engine, kills, killer)
        finally:
            shutil.rmtree(folder)
        sys.stdout.write(
            f"{options.engine}: {killer.deaths} kills of {count} {what}; {wrong} ended at other "
            "bits\n"
        )
        sys.stdout.flush()
        different += wrong
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
