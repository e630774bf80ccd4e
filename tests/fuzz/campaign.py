"""Run commands on mutated bundles, personal models and photos; say what is not as it must be.

    python tests/fuzz/campaign.py --engine pytorch --bundles 5000 --models 1000 --seed 0

Each case is a process forked from one that has loaded the engine: it starts at once, and has its
own limits and its own end. A case is named by engine, number and seed, and made again from these:
`--only 17` runs one bundle, and prints what it prints.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import subjects

import forked  # isort: skip  # of tests/support, which subjects puts on the path
import mutations  # isort: skip
import tiny  # isort: skip

CPU_SECONDS = 5.0
MEMORY_BYTES = 1 << 30
LONGEST = 500
_PERSONAL = ("model.json", "checkpoint.safetensors", "trainable.safetensors", "metrics.jsonl")
_CACHED_BYTES = 256 << 20


@dataclass(frozen=True)
class Fault:
    """A case that did not end as it must."""

    case: str
    what: str


@dataclass
class Campaign:
    """Cases of one engine in one folder, and what they took at most."""

    engine: str
    seed: int
    folder: Path
    cases: int = 0
    statuses: Counter[int | None] = field(default_factory=Counter)
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    echo: bool = False

    def __post_init__(self) -> None:
        """Write what is mutated, and run all commands once, here."""
        subjects.environment(self.folder)
        self.photos = tiny.photos(self.folder / "photos", 2)
        self.more = tiny.photos(self.folder / "more", 4)  # enough for a head in closed form
        self.contents = subjects.bundles(self.engine, self.folder)
        whole = subjects.write(self.folder / "whole.pbc", self.contents[-1])
        self.costs = tiny.costs(self.folder / "costs.json", len(whole.manifest["levels"]))
        self.train = ["train", whole.path, self.photos, "-o", self.folder / "mine", "--threads", 1,
                      "--val", "none", "--costs", self.costs]  # fmt: skip
        first = [*self.train, "--epochs", 1]
        looks = [self._eval(), self._predict(self.photos / "red/000.png")]
        ways = self._ways(whole.path, self.folder / "out")
        subjects.warm([*ways, first, [*first, "--resume"], *looks])
        self.personal = {name: (self.folder / "mine" / name).read_bytes() for name in _PERSONAL}

    def bundles(self, numbers: Sequence[int]) -> Iterator[Fault]:
        """Look into, train or audit a mutated bundle each."""
        path = self.folder / "b.pbc"
        out = self.folder / "out"
        for number in numbers:
            case, chance = self._case("bundle", number)
            mutations.write_bundle(path, *self.contents[number % len(self.contents)], chance)
            yield from self._faults(case, chance.choice(self._ways(path, out)))
            shutil.rmtree(out, ignore_errors=True)

    def models(self, numbers: Sequence[int]) -> Iterator[Fault]:
        """Use, or train on, a personal model each of which one file is mutated."""
        for number in numbers:
            case, chance = self._case("model", number)
            for other, data in self.personal.items():
                (self.folder / "mine" / other).write_bytes(data)
            name = chance.choice(_PERSONAL)
            changed = mutations.file(name, self.personal[name], chance)
            (self.folder / "mine" / name).write_bytes(changed)
            resumed = [*self.train, "--epochs", 2, "--resume"]
            look = self._predict(self.photos / "red/000.png")
            yield from self._faults(f"{case}: {name}", chance.choice([look, self._eval(), resumed]))

    def pictures(self, numbers: Sequence[int]) -> Iterator[Fault]:
        """Recognise a mutated photo each."""
        for other, data in self.personal.items():
            (self.folder / "mine" / other).write_bytes(data)
        for number in numbers:
            case, chance = self._case("photo", number)
            format_ = chance.choice(mutations.FORMATS)
            path = self.folder / f"photo.{format_}"
            path.write_bytes(mutations.photo(format_, chance))
            yield from self._faults(f"{case}: {format_}", self._predict(path))
            path.unlink()

    def _ways(self, bundle: Path, out: Path) -> list[list[object]]:
        """Return the commands that use a bundle: by steps, by a head in closed form, by attacks."""
        options = ["-o", out, "--threads", 1, "--overwrite", "--costs", self.costs]
        return [
            ["inspect", bundle],
            ["train", bundle, self.photos, *options, "--epochs", 1, "--val", "none"],
            ["train", bundle, self.more, *options, "--epochs", 2, "--optimizer", "adam"],
            ["audit", bundle, self.more, "--batch", "1,2", "--rounds", 1, "--threads", 1],
        ]

    def _predict(self, photo: Path) -> list[object]:
        return ["predict", self.folder / "mine", photo, "--threads", 1]

    def _eval(self) -> list[object]:
        return ["eval", self.folder / "mine", self.photos, "--threads", 1]

    def _case(self, kind: str, number: int) -> tuple[str, random.Random]:
        case = f"{self.engine} {kind} {number} of seed {self.seed}"
        return case, random.Random(case)

    def _faults(self, case: str, words: Sequence[object]) -> list[Fault]:
        ended = forked.run(words, self.folder / "printed")
        self.cases += 1
        self.statuses[ended.status] += 1
        self.cpu_seconds = max(self.cpu_seconds, ended.cpu_seconds)
        self.peak_bytes = max(self.peak_bytes, ended.peak_bytes)
        self._empty_cache()
        if self.echo:
            sys.stdout.write(f"{' '.join(map(str, words))}\n{ended}\n{ended.printed}\n")
        return [Fault(case, what) for what in faults(ended)]

    def _empty_cache(self) -> None:
        cache = self.folder / "cache"
        if self.cases % 50 == 0:
            size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            if size > _CACHED_BYTES:
                shutil.rmtree(cache)


def faults(ended: forked.Ended) -> list[str]:
    """Return what is wrong with how a command ended, in a line each."""
    found = []
    text = ended.printed.strip()
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if ended.signal:
        found.append(f"ended by {ended.signal} after {ended.cpu_seconds:.1f} s: {text[-200:]!r}")
    elif "Traceback" in text:
        found.append("a traceback: " + text.splitlines()[-1][:200])
    elif ended.status not in (0, 1, 2):
        found.append(f"exit {ended.status}: {text[-200:]!r}")
    elif ended.status and (len(errors) != 1 or not text.splitlines()[-1].startswith("error:")):
        found.append(f"{len(errors)} lines of error: {text[-300:]!r}")
    for line in errors:
        if len(line) > LONGEST:
            found.append(f"a line of {len(line)} characters: {line[:200]!r}")
        if not line.isprintable():
            found.append(f"unprintable characters: {line!r}")
        if "not enough memory" in line:
            found.append(f"no bound was met before memory was short: {line}")
    if not all(char.isprintable() or char in "\n\t" for char in text):
        found.append(f"characters that act on a terminal: {text[-300:]!r}")
    if ended.cpu_seconds > CPU_SECONDS:
        found.append(f"{ended.cpu_seconds:.1f} s of CPU: {text[-200:]!r}")
    if ended.peak_bytes > MEMORY_BYTES:
        found.append(f"{ended.peak_bytes / 2**20:.0f} MiB: {text[-200:]!r}")
    return found


def main() -> int:
    """Run as a program: print the faults, and how many cases there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="pytorch", choices=subjects.ENGINES)
    parser.add_argument("--bundles", type=int, default=5000)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--photos", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this bundle alone, and print all of it")
    options = parser.parse_args()
    # What was found until then is told when a limit of time is reached, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="pbc-fuzz-"))
    count = 0
    try:
        campaign = Campaign(options.engine, options.seed, folder)
        if options.only is not None:
            campaign.echo = True
            cases = campaign.bundles([options.only])
        else:
            cases = _all(campaign, options)
        for fault in cases:
            count += 1
            sys.stdout.write(f"{fault.case}: {fault.what}\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write("ended before all cases were run\n")
    finally:
        shutil.rmtree(folder)
    ends = ", ".join(f"{n} end with {s}" for s, n in sorted(campaign.statuses.items(), key=str))
    sys.stdout.write(
        f"{options.engine}, seed {options.seed}: {campaign.cases} commands ({ends}); at most "
        f"{campaign.cpu_seconds:.1f} s of CPU, {campaign.peak_bytes / 2**20:.0f} MiB; "
        f"{count} faults\n"
    )
    return 1 if count else 0


def _all(campaign: Campaign, options: argparse.Namespace) -> Iterator[Fault]:
    yield from campaign.bundles(range(options.bundles))
    yield from campaign.models(range(options.models))
    yield from campaign.pictures(range(options.photos))


if __name__ == "__main__":
    sys.exit(main())
