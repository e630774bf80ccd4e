"""`pbc bench` as a function: a bundle and photos in, results out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pbc import plugins
from pbc.bench import photos, strategies, sweep, tuning
from pbc.bench.about import about_bundle, about_machine
from pbc.bench.cells import Work
from pbc.bench.energy import find_meter
from pbc.bench.match import MatchPlan, Outcome, run_match, trial
from pbc.bench.memory import training_bytes
from pbc.bench.notes import bench_notes, left_out
from pbc.bench.options import BenchOptions
from pbc.bench.results import Results
from pbc.bench.rival import GROUP, strategy_of, way
from pbc.bench.standings import standings
from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.allocator import keep_freed_memory
from pbc.runtime.meter import peak_memory_bytes
from pbc.runtime.objective import default_rate
from pbc.runtime.output.folder import Output
from pbc.runtime.parameters import labelled_as, labelled_for
from pbc.runtime.runtime import Runtime
from pbc.util.extras import missing

_QUICK_EPOCHS = 5
_QUICK_TRAIN, _QUICK_TEST = 240, 120

Tell = Callable[[str], None]


def compare(bundle: Path, data: Path, options: BenchOptions, folder: Path, tell: Tell) -> Results:
    """Run the match that the options describe, keeping every cell in `folder`.

    tell: takes a line whenever there is news. Raises PbcError for what the user can fix, and
    KeyboardInterrupt as it comes: what was finished is kept.
    """
    runtime = Runtime.open(bundle)
    for name in options.rivals:
        plugins.find(GROUP, way(name))
        if "@" in name:
            plugins.find("pbc.strategies", name.partition("@")[2].partition(":")[0])
    options, not_installed = _installed(options)
    for line in not_installed:
        tell(line)
    sweep.check(options.sweeps, runtime, options.policy_bundles)
    # A setting of the whole process: every rival is timed with it.
    keep_freed_memory()
    train, test, origin = photos.train_and_test(data, options.test, runtime.spec, tell)
    train = labelled_for(runtime.bundle, train)
    test = labelled_as(train.classes, test)
    options = _quick(options) if options.quick else options
    # The rate is that of the mini-batches, tuned where none was given.
    batch = options.train.for_bundle(runtime.bundle).samples_per_batch
    if options.quick:
        train = _few(train, _QUICK_TRAIN, batch)
        test = _few(test, _QUICK_TEST, 1)
    on_disk = [name for name, part in (("training", train), ("test", test)) if not part.in_memory]
    if options.train.threads is not None:
        runtime.engine.load(runtime.bundle, threads=options.train.threads)  # for every rival
    work = Work(folder)
    with Output(folder).locked():
        identity = _identity(runtime, train, test, options, batch)
        work.begin(identity, resume=options.resume, overwrite=options.overwrite)
        rate = _rate(runtime, train, options, batch, work, tell)
        chosen = replace(options.train, batch=batch, learning_rate=rate.value)
        runtimes, not_compiled = strategies.runtimes(
            options.rivals, runtime, work, options.weights, tell
        )
        plan = MatchPlan(
            tuple(name for name in options.rivals if name not in not_compiled),
            options.seeds,
            chosen,
            options.epochs_of,
            options.rate_of,
            options.weights,
            options.torch_compile,
        )
        if options.tune_epochs is not None:
            tuned = _tuned(plan, runtime, runtimes, train, options.tune_epochs, work, tell)
            plan = replace(plan, rate_of={**tuned, **plan.rate_of})
        # An engine that runs on a GPU says so; none that pbc brings does.
        meter = find_meter(uses_gpu=getattr(runtime.engine, "uses_gpu", False))
        outcome = run_match(plan, runtime, train, test, work, meter, tell, runtimes)
        if options.memory:
            outcome = _with_memory(outcome, plan, runtime, runtimes, train, work, tell)
        studies = [
            sweep.study(name, plan, runtime, train, test, work, options.policy_bundles, tell)
            for name in options.sweeps
        ]
    reasons = {**not_compiled, **outcome.left_out}
    ranked = standings(plan, outcome)
    if not ranked:
        raise PbcError(f"no rival could run: {'; '.join(left_out(reasons))}")
    about = {
        "bundle": about_bundle(runtime, bundle, len(train.classes)),
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
        "machine": about_machine(options.train.threads),
    }
    notes = [
        *bench_notes(runtime, ranked, options),
        *(
            f"not all {name} photos stay decoded in 4 GiB of memory: every rival decodes the "
            "others whenever it reads them"
            for name in on_disk
        ),
        *sweep.notes(options.sweeps, runtime, options.policy_bundles),
        *not_installed,
        *left_out(reasons),
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


def _installed(options: BenchOptions) -> tuple[BenchOptions, list[str]]:
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
    remaining = tuple(name for name in options.rivals if name not in gone)
    if not remaining:
        raise PbcError(f"no rival could run: {'; '.join(lines)}")
    return replace(options, rivals=remaining), lines


def _needs(rival: str) -> str | None:
    """Return the package that a rival's module misses, and how to install it."""
    try:
        strategy_of(rival)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "pbc":
            raise  # not a package that could be installed
        return missing(error) or f"{error.name}, which is not installed"
    except PbcError:
        return None  # a broken plugin: the match tells why it is left out
    return None


def _quick(options: BenchOptions) -> BenchOptions:
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
    """Return at most `most` samples, all classes alike, a whole multiple of `multiple`."""
    if len(samples) <= most:
        return samples
    per_class = max(1, most // len(samples.classes))
    some = photos.first_of_each(samples, per_class, seed=0)
    whole = len(some) // multiple * multiple
    if not whole:
        return some
    return photos.in_memory(some.subset(np.linspace(0, len(some) - 1, whole).astype(int)))


def _rate(
    runtime: Runtime, train: Samples, options: BenchOptions, batch: int, work: Work, tell: Tell
) -> tuning.Rate:
    """Return the learning rate: as told, as found before the interruption, or tuned now."""
    if options.train.learning_rate is not None:
        return tuning.Rate(options.train.learning_rate, "as told")
    if options.tune_epochs is not None:
        return tuning.Rate(default_rate(options.train.optimizer), "the default, or a rival's own")
    known = work.remembered("learning-rate")
    if known is None:
        found = tuning.tune(runtime, train, options.train, batch, tell)
        known = {"value": found.value, "reason": found.reason}
        work.remember("learning-rate", known)
        tell(f"learning rate {found.value:g}: {found.reason}")
    return tuning.Rate(known["value"], known["reason"])


def _tuned(
    plan: MatchPlan,
    runtime: Runtime,
    runtimes: Mapping[str, Runtime],
    train: Samples,
    epochs: int,
    work: Work,
    tell: Tell,
) -> dict[str, float]:
    """Return rates by rival, as found before an interruption or now; none where one is told."""
    known: dict[str, float] | None = work.remembered("learning-rates")
    if known is not None:
        return known
    options = replace(plan.options, epochs=epochs)

    def tried(name: str, rate: float, learnt: Samples, held_out: Samples) -> tuple[float, float]:
        own = runtimes.get(name, runtime)
        at_rate = replace(plan, options=options, rate_of={name: rate})
        with TemporaryDirectory(dir=work.root, prefix="trial-") as folder:
            return trial(name, at_rate, own, learnt, held_out, Path(folder))

    open_rivals = [name for name in plan.rivals if name not in plan.rate_of]
    found = tuning.tune_each(open_rivals, tried, train, options.optimizer, tell)
    work.remember("learning-rates", found)
    return found


def _with_memory(
    outcome: Outcome,
    plan: MatchPlan,
    runtime: Runtime,
    runtimes: Mapping[str, Runtime],
    train: Samples,
    work: Work,
    tell: Tell,
) -> Outcome:
    """Add to each rival's facts what its training takes, as known from before or measured now."""
    known: dict[str, int | None] = work.remembered("memory") or {}
    for name in outcome.facts:
        if name not in known:
            tell(f"measuring the memory of {name}")
            own = runtimes.get(name, runtime)
            known[name] = training_bytes(name, plan.setting(name, 0, own, train, work.root))
            work.remember("memory", known)
    facts = {
        name: {**of_rival, "training_memory_bytes": known[name]}
        for name, of_rival in outcome.facts.items()
    }
    return replace(outcome, facts=facts)


def _identity(
    runtime: Runtime, train: Samples, test: Samples, options: BenchOptions, batch: int
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
        "tune_epochs": options.tune_epochs,
        "torch_compile": options.torch_compile,
        "options": {**options.train.deciding(), "batch": batch},
    }
