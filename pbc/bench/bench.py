"""`pbc bench`, as a script would call it: photos and a bundle in, results out."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import pbc
from pbc import plugins
from pbc.bench import photos, sweep, tuning
from pbc.bench.cells import Cell, Work
from pbc.bench.energy import find_meter
from pbc.bench.match import GROUP, Plan, play
from pbc.bench.results import REFERENCE, Standing, standings
from pbc.bundle.ladder import BFLOAT16, Ladder
from pbc.data import Samples
from pbc.errors import PbcError, UsageError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.meter import peak_memory_bytes
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.parameters import labelled_as, labelled_for
from pbc.runtime.runtime import Runtime
from pbc.util.extras import missing
from pbc.util.processor import cpu_name

RIVALS = ("full", "pet", "pet-bf16", "pet-cache", "piebridge", "pbc-nocache", "pbc")
FORMAT = 1
_QUICK_EPOCHS = 5
_QUICK_TRAIN, _QUICK_TEST = 240, 120

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What `pbc bench` takes besides the bundle and the photos.

    train: what every rival trains with; None for batch is the bundle's, for the learning rate that
    it is tuned. optional: a rival whose packages are not installed is left out with a note, not
    refused. quick: one seed, few epochs and photos, one epoch of full training.
    policy_bundles: bundles by name for the sweep over policies' data.
    """

    train: TrainOptions = field(default_factory=TrainOptions)
    test: Path | None = None
    rivals: tuple[str, ...] = RIVALS
    optional: bool = True
    seeds: int = 3
    epochs_of: Mapping[str, int] = field(default_factory=dict)
    rate_of: Mapping[str, float] = field(default_factory=dict)
    weights: Path | None = None
    torch_compile: bool = True
    quick: bool = False
    sweeps: tuple[str, ...] = ()
    policy_bundles: Mapping[str, Path] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        if self.seeds < 1:
            raise UsageError(f"--seeds is {self.seeds}; expected 1 or more")
        if self.resume and self.overwrite:
            raise UsageError("--resume and --overwrite exclude each other")
        if not self.rivals:
            raise UsageError(f"--rivals names nobody; expected some of {', '.join(RIVALS)}")
        for option, given in (("epochs", self.epochs_of), ("lr", self.rate_of)):
            for name, value in given.items():
                if name not in self.rivals:
                    raise UsageError(
                        f"--{option}-of names {name!r}, which does not play "
                        f"(rivals: {', '.join(self.rivals)})"
                    )
                if not value > 0:
                    raise UsageError(f"--{option}-of {name} is {value:g}; it must be above 0")


@dataclass(frozen=True)
class Results:
    """All that a bench found; JSON-able through `to_json`.

    about: bundle, data, protocol and machine, as facts to show. ladder: the manifest's levels.
    energy: the meter's name. notes: what a reader must know to read the figures right.
    """

    about: Mapping[str, Mapping[str, Any]]
    ladder: Sequence[Mapping[str, Any]]
    standings: Sequence[Standing]
    sweeps: Sequence[sweep.Study]
    cells: Sequence[Cell]
    notes: Sequence[str]
    peak_memory_bytes: int
    energy: str

    def standing(self, rival: str) -> Standing | None:
        """Return how a rival did; None if it did not play."""
        return next((s for s in self.standings if s.rival == rival), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **{name: dict(facts) for name, facts in self.about.items()},
            "levels": [dict(level) for level in self.ladder],
            "rivals": {standing.rival: standing.to_json() for standing in self.standings},
            "sweeps": {study.name: study.to_json() for study in self.sweeps},
            "notes": list(self.notes),
            "peak_memory_bytes": self.peak_memory_bytes,
            "energy_meter": self.energy,
            "cells": [cell.to_json() for cell in self.cells],
        }


def bench(bundle: Path, data: Path, options: Options, folder: Path, tell: Tell) -> Results:
    """Play the match that the options describe, keeping every cell in `folder`.

    tell: takes a line whenever there is news. Raises PbcError for what the user can fix, and
    KeyboardInterrupt as it comes: what was finished is kept.
    """
    runtime = Runtime.open(bundle)
    for name in options.rivals:
        plugins.find(GROUP, name)
    options, not_installed = _installed(options)
    for line in not_installed:
        tell(line)
    sweep.check(options.sweeps, runtime, options.policy_bundles)
    # It is the whole process's: whoever is timed, is timed with it.
    keep_freed_memory()
    train, test, origin = photos.train_and_test(data, options.test, runtime.spec, lambda *_: None)
    train = labelled_for(runtime.bundle, train)
    test = labelled_as(train.classes, test)
    options = _quick(options) if options.quick else options
    batch = options.train.batch or int(runtime.bundle.manifest["batch"])
    if options.quick:
        train = _few(train, _QUICK_TRAIN, batch)
        test = _few(test, _QUICK_TEST, 1)
    on_disk = [
        name for name, part in (("training", train), ("test", test)) if not photos.in_memory(part)
    ]
    if options.train.threads is not None:
        runtime.engine.load(runtime.bundle, threads=options.train.threads)  # for everybody
    work = Work(folder)
    with Output(folder).locked():
        identity = _identity(runtime, train, test, options, batch)
        work.begin(identity, resume=options.resume, overwrite=options.overwrite)
        rate = _rate(runtime, train, options, batch, work, tell)
        chosen = replace(options.train, batch=batch, learning_rate=rate.value)
        plan = Plan(
            options.rivals,
            options.seeds,
            chosen,
            options.epochs_of,
            options.rate_of,
            options.weights,
            options.torch_compile,
        )
        # An engine that runs on a GPU says so; none that pbc brings does.
        meter = find_meter(uses_gpu=getattr(runtime.engine, "uses_gpu", False))
        outcome = play(plan, runtime, train, test, work, meter, tell)
        studies = [
            sweep.study(name, plan, runtime, train, test, work, options.policy_bundles, tell)
            for name in options.sweeps
        ]
    ranked = standings(plan, outcome)
    if not ranked:
        raise PbcError(f"nobody could play: {'; '.join(_left_out(outcome.left_out))}")
    about = {
        "bundle": _about_bundle(runtime, bundle, len(train.classes)),
        "data": {
            "name": data.name,
            "train_samples": len(train),
            "test_samples": len(test),
            "classes": len(train.classes),
            "test_photos": origin,
        },
        "protocol": {
            "seeds": plan.seeds,
            "epochs": chosen.epochs,
            "batch": batch,
            "optimizer": chosen.optimizer,
            **({"momentum": chosen.momentum} if chosen.optimizer == "sgd" else {}),
            "weight_decay": chosen.weight_decay,
            "label_smoothing": chosen.label_smoothing,
            "learning_rate": rate.value,
            "learning_rate_from": rate.reason,
            "rates_of_their_own": dict(plan.rate_of),
            "quick": options.quick,
        },
        "machine": _about_machine(options.train.threads),
    }
    notes = [
        *_notes(runtime, ranked, options),
        *(
            f"not all {name} photos stay decoded in 4 GiB of memory: every rival decodes the "
            "others whenever it reads them"
            for name in on_disk
        ),
        *sweep.notes(options.sweeps, runtime, options.policy_bundles),
        *not_installed,
        *_left_out(outcome.left_out),
    ]
    return Results(
        about,
        runtime.bundle.manifest["levels"],
        ranked,
        studies,
        [cell for cells in outcome.cells.values() for cell in cells],
        notes,
        peak_memory_bytes(),
        meter.name,
    )


def _installed(options: Options) -> tuple[Options, list[str]]:
    """Leave out the rivals whose packages are not installed, with a line per package."""
    without: dict[str, list[str]] = {}
    for name in options.rivals:
        needs = _needs(name)
        if needs is not None and not options.optional:
            raise PbcError(f"rival {name} needs {needs}, or leave it out of --rivals")
        if needs is not None:
            without.setdefault(needs, []).append(name)
    lines = [
        f"{', '.join(names)} are left out: they need {needs}"
        if len(names) > 1
        else f"{names[0]} is left out: it needs {needs}"
        for needs, names in without.items()
    ]
    gone = {name for names in without.values() for name in names}
    playing = tuple(name for name in options.rivals if name not in gone)
    if not playing:
        raise PbcError(f"nobody could play: {'; '.join(lines)}")
    return replace(options, rivals=playing), lines


def _needs(rival: str) -> str | None:
    """Return the package that a rival's module misses, and how to install it."""
    try:
        plugins.load(GROUP, rival)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "pbc":
            raise  # not a package that somebody could install
        return missing(error) or f"{error.name}, which is not installed"
    except PbcError:
        return None  # a broken plugin: the match tells why it is left out
    return None


def _quick(options: Options) -> Options:
    """Shorten: one seed, few epochs, one epoch of full training unless told otherwise."""
    epochs = min(options.train.epochs, _QUICK_EPOCHS)
    full = {"full": 1} if "full" in options.rivals else {}
    return replace(
        options,
        seeds=1,
        train=replace(options.train, epochs=epochs),
        epochs_of={**full, **options.epochs_of},
    )


def _few(samples: Samples, most: int, multiple: int) -> Samples:
    """Return at most so many samples, of every class alike, a multiple of whole batches."""
    if len(samples) <= most:
        return samples
    per_class = max(1, most // len(samples.classes))
    some = photos.first_of_each(samples, per_class, seed=0)
    whole = len(some) // multiple * multiple
    return photos.subset(some, np.linspace(0, len(some) - 1, whole).astype(int)) if whole else some


def _rate(
    runtime: Runtime, train: Samples, options: Options, batch: int, work: Work, tell: Tell
) -> tuning.Rate:
    """Return the learning rate: as told, as found before the interruption, or tuned now."""
    if options.train.learning_rate is not None:
        return tuning.Rate(options.train.learning_rate, "as told")
    known = work.remembered("learning-rate")
    if known is None:
        found = tuning.tune(runtime, train, options.train, batch, tell)
        known = {"value": found.value, "reason": found.reason}
        work.remember("learning-rate", known)
        tell(f"learning rate {found.value:g}: {found.reason}")
    return tuning.Rate(known["value"], known["reason"])


def _identity(
    runtime: Runtime, train: Samples, test: Samples, options: Options, batch: int
) -> dict[str, Any]:
    """Return all that decides the results of a match; more seeds and sweeps may be added to one."""
    return {
        "bundle": runtime.bundle.digest,
        "train": train.digest(),
        "test": test.digest(),
        "rivals": list(options.rivals),
        "epochs": options.train.epochs,
        "batch": batch,
        "epochs_of": dict(options.epochs_of),
        "lr_of": dict(options.rate_of),
        "torch_compile": options.torch_compile,
        "options": {**options.train.deciding(), "batch": batch},
    }


def _about_bundle(runtime: Runtime, path: Path, classes: int) -> dict[str, Any]:
    manifest = runtime.bundle.manifest
    return {
        "name": path.name,
        "digest": runtime.bundle.digest,
        "model": manifest["model"],
        "strategy": manifest["strategy"],
        "engine": f"{manifest['engine']} ({runtime.engine.version()})",
        "input": "x".join(str(side) for side in manifest["input"]["shape"]),
        "cost_model": manifest.get("cost_model", "macs"),
        "trained_values": sum(
            math.prod(size or classes for size in shape)
            for shape in manifest["parameters"].values()
        ),
    }


def _about_machine(threads: int | None) -> dict[str, Any]:
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads if threads is not None else os.environ.get("OMP_NUM_THREADS", "default"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "pbc": pbc.__version__,
    }


def _notes(runtime: Runtime, ranked: Sequence[Standing], options: Options) -> list[str]:
    """Say what the figures alone would hide."""
    notes = []
    manifest = runtime.bundle.manifest
    if options.quick:
        notes.append(
            "--quick: one seed, few epochs and photos; it shows that everything runs, "
            "not what is worth what"
        )
    notes += [
        f"{standing.rival} ran {standing.epochs} of {standing.planned} epochs: its time is "
        "extrapolated from them, its accuracy is that after them"
        for standing in ranked
        if standing.extrapolated
    ]
    if sweep.ships_means(runtime.bundle):
        notes.append(
            "the bundle's policy does not beat each level's mean fidelity on held-out images: "
            "the means are shipped, and every photo gets the same level"
        )
    by_name = {standing.rival: standing for standing in ranked}
    routed = by_name.get("pbc-nocache")
    if routed is not None and len(manifest["levels"]) > 1:
        visits = np.sum(np.array(routed.levels), axis=0)
        if visits[1:].sum() == 0:
            notes.append(
                "nothing was routed to a proxy: no level is faithful enough for the bound, "
                "so that pbc without a cache runs level 0"
            )
        if REFERENCE in routed.faster and routed.faster[REFERENCE].mean <= 1:
            notes.append(
                "the ladder does not pay here: routed training without a cache is "
                f"{routed.faster[REFERENCE].mean:.2f}x as fast as PET at level 0"
            )
    ladder = Ladder.from_json(manifest["levels"], manifest.get("cost_model", "macs"))
    notes += precision_notes(ladder, ranked)
    told: dict[str, list[str]] = {}
    for standing in ranked:
        for text in standing.facts.get("notes", []):
            told.setdefault(text, []).append(standing.rival)
    return notes + [f"{', '.join(names)}: {text}" for text, names in told.items()]


def precision_notes(ladder: Ladder, ranked: Sequence[Standing]) -> list[str]:
    """Say who computed at levels in bfloat16: a part of that gain is precision's alone."""
    used: dict[tuple[int, ...], list[str]] = {}
    for standing in ranked:
        visits = np.sum(np.array(standing.levels), axis=0)
        levels = tuple(
            level
            for level in np.flatnonzero(visits).tolist()
            if len(visits) > 1 and ladder.precision(level) == BFLOAT16
        )
        if levels:
            used.setdefault(levels, []).append(standing.rival)
    return [
        f"{', '.join(names)}: level{'s' if len(levels) > 1 else ''} "
        f"{', '.join(map(str, levels))} computed in bfloat16; "
        "pet-bf16 is what that precision alone gives"
        for levels, names in used.items()
    ]


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    return [f"{name} is left out: {reason}" for name, reason in reasons.items()]
