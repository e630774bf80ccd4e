"""What a run decides before its first step: costs, levels, what is cached, who audits whom."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pbc import plugins
from pbc.bundle import Bundle
from pbc.bundle.ladder import Ladder
from pbc.data import Samples
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.events import Note, Report
from pbc.runtime.features.cache import FeatureCache, open_cache
from pbc.runtime.features.keys import level_key
from pbc.runtime.features.lookahead import look_ahead
from pbc.runtime.features.source import Features
from pbc.runtime.features.stores import DiskFullError
from pbc.runtime.features.views import Views
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.checkpoint import Checkpoint
from pbc.runtime.output.folder import Output
from pbc.runtime.routing.audit import Finding, audit, chosen
from pbc.runtime.routing.costs import Bench, Costs
from pbc.runtime.routing.router import means, predict
from pbc.runtime.routing.routes import Routes
from pbc.runtime.schedulers import Batch, Scheduler, Setting


@dataclass(frozen=True)
class Decisions:
    """What was found out about device and samples; from the checkpoint when a run is resumed.

    predicted: f[n, N], every sample's fidelity at levels 1…N; None where all run at level 0.
    costs: None for a scheduler that asks for none. findings: of the audit. room: whether the disk
    had room for the cache: levels and batches depend on what is cached.
    """

    predicted: np.ndarray | None
    costs: Costs | None
    findings: tuple[Finding, ...] = ()
    room: bool = True

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able part."""
        return {
            "costs": self.costs.to_json() if self.costs else None,
            "audit": [finding.to_json() for finding in self.findings],
            "cache": self.room,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays."""
        return {} if self.predicted is None else {"predicted": self.predicted}

    @classmethod
    def load(cls, checkpoint: Checkpoint, levels: int) -> Decisions:
        """Read what `facts` and `arrays` put into a checkpoint."""
        costs = checkpoint.facts["costs"]
        return cls(
            checkpoint.part("policy").get("predicted"),
            Costs.from_json(costs, levels) if costs is not None else None,
            tuple(Finding.from_json(found) for found in checkpoint.facts["audit"]),
            checkpoint.facts.get("cache", True),
        )


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin.

    mixed: whether a mini-batch may hold samples of several levels. ahead: whether the prefix runs
    ahead of the steps, on several mini-batches together.
    """

    decisions: Decisions
    floor: float
    scheduler: Scheduler
    features: Features
    mixed: bool
    ahead: bool

    def levels(self, batch: Batch) -> np.ndarray:
        """Return int64[b], where each sample of a batch runs."""
        if self.mixed:
            levels: np.ndarray = self.scheduler.levels[batch.samples]
            return levels
        return np.full(len(batch.samples), batch.level, dtype=np.int64)

    def fetch(
        self, batches: Sequence[Batch], first: int, epoch: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the features of an epoch's mini-batches from number `first` on."""
        requests = [
            (self.levels(batch), self.features.views.rows(epoch, batch.samples))
            for batch in batches
        ]
        if self.ahead:
            yield from look_ahead(requests, first, self.features)
            return
        for batch, (_, rows) in zip(batches[first:], requests[first:], strict=True):
            yield self.features(batch.level, rows)


@dataclass(frozen=True)
class Preparation:
    """All that the decisions of a run depend on.

    progress: told (stage, done, total); may raise to stop.
    """

    bundle: Bundle
    engine: Engine
    executable: Executable
    ladder: Ladder
    samples: Samples
    options: TrainOptions
    batch: int
    meter: Meter
    output: Output
    report: Report
    progress: Callable[[str, int, int], None]

    def __call__(self, known: Decisions | None) -> Prepared:
        """Decide, measuring what is not `known`.

        The executable must have been started; its parameters are spoilt afterwards.
        """
        options = self.options
        scheduler_class = plugins.load("pbc.schedulers", options.scheduler)
        if self._routes.note is not None and known is None:
            self.report(Note(self._routes.note))
        decisions = known or self._measured(scheduler_class.cost_aware)
        try:
            prepared = self._schedule(scheduler_class, decisions, self._open_cache(decisions))
        except DiskFullError as error:
            prepared = self._without_cache(decisions, error)
        prepared = self._audit(prepared)
        if known is None:
            for note in prepared.scheduler.notes:
                self.report(Note(note))
        return prepared

    def routed_anew(self, decisions: Decisions) -> Decisions:
        """Return what was decided for other samples, with these samples' own fidelities."""
        predicted = None if decisions.predicted is None else self._predicted(decisions.findings)
        return replace(decisions, predicted=predicted)

    def fill(self, prepared: Prepared) -> Prepared:
        """Compute what the cache lacks; without room on the disk the run goes on without it.

        Audited rows come first, in chunks of their own: the audit has computed those already.
        """
        features, audited = prepared.features, self._audited(prepared)
        shown = features.views.shown(prepared.scheduler.epochs)
        try:
            self._cache_rows(features, audited)
            self._cache_rows(features, np.setdiff1d(shown, audited))
        except DiskFullError as error:
            # Other levels may serve where nothing is cached.
            uncached = self._audit(self._without_cache(prepared.decisions, error))
            for note in uncached.scheduler.notes:
                if note not in prepared.scheduler.notes:
                    self.report(Note(note))
            return uncached
        return prepared

    def _cache_rows(self, features: Features, rows: np.ndarray) -> None:
        """Compute what the cache lacks of int64[m] rows; raises DiskFullError."""
        if features.cache is None:
            return
        engine = f"{self.engine.name} {self.engine.version()}"
        key = level_key(self.bundle, self.samples.spec, engine, self.options.cache_dtype)

        def progress(done: int, total: int) -> None:
            self.meter.lap("cache")
            self.progress("caching", done, total)

        features.cache.fill(
            rows,
            features.levels,
            features.views.contents(),
            features.chunk_of,
            functools.lru_cache(key),
            features.compute,
            progress,
        )
        self.meter.lap("cache")

    def _without_cache(self, decisions: Decisions, error: DiskFullError) -> Prepared:
        self.report(Note(f"training goes on without the cache: {error}"))
        scheduler_class = plugins.load("pbc.schedulers", self.options.scheduler)
        return self._schedule(scheduler_class, replace(decisions, room=False), None)

    # ---- what is known ---------------------------------------------------------------------

    @functools.cached_property
    def _routes(self) -> Routes:
        return Routes(self.bundle.manifest, self.ladder, self.options)

    def _measured(self, cost_aware: bool) -> Decisions:
        if not cost_aware:
            return Decisions(self._predicted(), None)
        if self.options.costs is not None:
            costs = Costs.load(self.options.costs, len(self.ladder))
            predicted = self._predicted()
        else:
            with self.meter.only("measure"):
                costs = self._costs(np.flatnonzero(self._routes.usable_ever()).tolist())
            before = self.meter.seconds["policy"]
            predicted = self._predicted()
            policy_ms = (self.meter.seconds["policy"] - before) * 1e3 / len(self.samples)
            costs = replace(costs, policy_ms=policy_ms)
        costs.save(self.output.costs)
        return Decisions(predicted, costs)

    def _costs(self, levels: list[int]) -> Costs:
        options, views = self.options, self._views()
        keeps = options.cache != "off" and self.bundle.has_prefix
        return Bench(
            executable=self.executable,
            images=lambda count: views.images(views.rows(0, np.arange(count))),
            labels=self.samples.labels,
            ladder=self.ladder,
            levels=levels,
            batch=min(self.batch, len(self.samples)),
            chunk=options.prefix_batch,
            computed=min(options.views, options.epochs) if keeps else options.epochs,
            epochs=options.epochs,
            prefix=self.bundle.has_prefix,
            bodies=not self.bundle.shares_body,
            width=sum(math.prod(shape) for shape in self.bundle.manifest["features"].values()),
        ).measure()

    def _predicted(self, findings: tuple[Finding, ...] = ()) -> np.ndarray | None:
        """Ask the policy about every sample; None where no answer would matter."""
        routes, policy = self._routes, self._routes.policy
        if not self.options.routing:
            return None
        if policy is None or not routes.usable_ever(findings)[1:].any():
            what = "policy" if policy is None else f"proxy of fidelity {routes.floor:.3g}"
            self.report(Note(f"the bundle has no {what}: every sample runs at level 0"))
            return None
        if routes.ships_means:
            return means(self.ladder, len(self.samples))
        _, height, width = policy["view"]
        return predict(
            self.samples,
            self.executable,
            (height, width),
            self.batch,
            self.meter,
            functools.partial(self.progress, "routing"),
        )

    # ---- who runs where --------------------------------------------------------------------

    def _schedule(
        self,
        scheduler_class: Callable[[Setting], Scheduler],
        decisions: Decisions,
        cache: FeatureCache | None,
    ) -> Prepared:
        options, costs, findings = self.options, decisions.costs, decisions.findings
        predicted = decisions.predicted
        if predicted is None:
            predicted = np.full((len(self.samples), len(self.ladder) - 1), -np.inf)
        routing = self._routes.route(predicted, findings)
        views, mixed = self._views(), self.bundle.shares_body
        # Without costs features are made mini-batch by mini-batch at one level, unless none are.
        grouped = not mixed or (costs is None and not (cache is not None and cache.complete))
        setting = Setting(
            levels=routing.levels,
            allowed=routing.allowed,
            batch=self.batch,
            seed=options.seed,
            alpha=options.alpha if options.skip else None,
            grouped=grouped,
            epochs=options.epochs,
            rests=options.skip,
            cached=self._cached(cache),
            views=views.count,
            costs=costs,
            time_budget_ms=options.time_budget and options.time_budget * 1e3,
            fallbacks=self._routes.fallbacks(predicted, findings),
        )
        scheduler = scheduler_class(setting)
        # Without a prefix there is nothing to be ahead with.
        ahead = costs is not None and self.bundle.has_prefix
        features = Features(
            views,
            self.executable,
            self.meter,
            cache,
            np.tile(scheduler.levels, views.count),
            mixed,
            functools.partial(self._chunk, costs),
            padded=ahead,
        )
        return Prepared(decisions, self._routes.floor, scheduler, features, not grouped, ahead)

    def _views(self) -> Views:
        return Views(self.samples, self.options.views, self.options.seed)

    def _chunk(self, costs: Costs | None, level: int) -> int:
        if costs is None:
            return self.batch
        return self.options.prefix_batch or costs.chunk(level)

    def _cached(self, cache: FeatureCache | None) -> np.ndarray | None:
        """bool[n]: of which samples the cache holds every view."""
        if cache is None:
            return None
        cached = cache.slots.reshape(-1, len(self.samples)) >= 0
        return np.asarray(cached.all(axis=0))

    def _audit(self, prepared: Prepared) -> Prepared:
        """Audit the levels in use that were not yet, and let others serve where one was refused.

        A scheduler that asks for no costs moves samples by rules of its own: nothing is audited.
        """
        if prepared.decisions.costs is None or not self.bundle.has_prefix:
            return prepared
        scheduler_class = plugins.load("pbc.schedulers", self.options.scheduler)
        while levels := self._to_audit(prepared):
            try:
                findings = tuple(self._audit_level(prepared, level) for level in levels)
            except DiskFullError as error:
                prepared = self._without_cache(prepared.decisions, error)
                continue
            decisions = prepared.decisions
            decisions = replace(decisions, findings=(*decisions.findings, *findings))
            prepared = self._schedule(scheduler_class, decisions, prepared.features.cache)
        return prepared

    def _to_audit(self, prepared: Prepared) -> list[int]:
        """Return the levels that serve enough samples and were not audited yet."""
        done = {0, *(finding.level for finding in prepared.decisions.findings)}
        levels = set(np.unique(prepared.scheduler.levels).tolist()) - done
        return [level for level in sorted(levels) if len(self._chosen(prepared, level))]

    def _chosen(self, prepared: Prepared, level: int) -> np.ndarray:
        chunk = prepared.features.chunk_of(level)
        return chosen(prepared.scheduler.levels, level, chunk, self.options.seed)

    def _audited(self, prepared: Prepared) -> np.ndarray:
        """Return the rows that the audit looked at, given who runs where now."""
        levels = [finding.level for finding in prepared.decisions.findings]
        return np.concatenate(
            [np.empty(0, np.int64), *(self._chosen(prepared, level) for level in levels)]
        )

    def _audit_level(self, prepared: Prepared, level: int) -> Finding:
        features, floor = prepared.features, self._audit_floor(prepared, level)
        samples = self._chosen(prepared, level)
        self._cache_rows(features, samples)

        def compute(number: int, rows: np.ndarray) -> dict[str, np.ndarray]:
            return features.compute(0, rows) if number == 0 else features(number, rows)

        with self.meter.only("audit"):
            found = audit(level, samples, floor, compute, features.chunk_of(level))
        if not found.kept:
            self.report(
                Note(
                    f"level {level} is not used: its fidelity on {found.samples} of these "
                    f"images is {found.fidelity:.3f}, below the floor of {floor:.3f}"
                )
            )
        return found

    def _audit_floor(self, prepared: Prepared, level: int) -> float:
        """Return the floor that routing held a level to: a time budget may have lowered it."""
        fidelity = self.ladder.levels[level].fidelity
        assert fidelity is not None, "an unaligned level serves nobody"
        return min(prepared.floor, fidelity)

    # ---- the cache -------------------------------------------------------------------------

    def _open_cache(self, decisions: Decisions) -> FeatureCache | None:
        """Return the cache if there is to be one; raises DiskFullError."""
        options = self.options
        if options.cache == "off":
            return None
        if not self.bundle.has_prefix:
            self.report(
                Note(
                    f"--cache {options.cache} is off: with {self.bundle.manifest['strategy']} "
                    "nothing is frozen before the first trainable layer"
                )
            )
            return None
        if not decisions.room:
            self.report(Note("the cache stays off: the disk had no room when this run began"))
            return None
        cache = open_cache(self.bundle, options, len(self._views()), self.output.cache)
        if cache is None:
            self.report(Note(f"the cache is off: no sample fits in {options.cache_mb} MiB"))
        return cache
