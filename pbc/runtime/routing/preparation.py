"""Preparation of a run: decide who runs where, audit that on the user's photos, fill the cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from pbc.runtime.costs import Costs
from pbc.runtime.features.cache import FeatureCache, open_cache
from pbc.runtime.features.keys import level_key
from pbc.runtime.features.source import Features
from pbc.runtime.features.stores import DiskFullError
from pbc.runtime.routing.audit import Finding, audit, chosen
from pbc.runtime.routing.context import RunContext
from pbc.runtime.routing.decisions import Decisions
from pbc.runtime.routing.prepared import Prepared
from pbc.runtime.routing.survey import Survey
from pbc.runtime.schedulers import SchedulerInput
from pbc.util.processor import cores


@dataclass(frozen=True)
class Preparation:
    """The way from a context to a run that is ready to begin."""

    context: RunContext

    def __call__(self, known: Decisions | None) -> Prepared:
        """Decide, measuring what is not `known`.

        The executable must have been started; its parameters are overwritten afterwards.
        """
        context = self.context
        if context.routes.note is not None and known is None:
            context.note(context.routes.note)
        decisions = known or Survey(context).decide()
        try:
            prepared = self._schedule(decisions, self._open_cache(decisions))
        except DiskFullError as error:
            prepared = self._without_cache(decisions, error)
        prepared = self._audit(prepared)
        if known is None:
            for note in prepared.scheduler.notes:
                context.note(note)
        return prepared

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
                    self.context.note(note)
            return uncached
        return prepared

    # ---- the schedule ----------------------------------------------------------------------

    def _schedule(self, decisions: Decisions, cache: FeatureCache | None) -> Prepared:
        context, options = self.context, self.context.options
        costs, findings, predicted = decisions.costs, decisions.findings, decisions.predicted
        if predicted is None:
            predicted = np.full((len(context.samples), len(context.ladder) - 1), -np.inf)
        routing = context.routes.route(predicted, findings)
        views, mixed = context.views, context.bundle.shares_body
        # Without costs features are made mini-batch by mini-batch at one level, unless none are.
        grouped = not mixed or (costs is None and not (cache is not None and cache.complete))
        given = SchedulerInput(
            levels=routing.levels,
            allowed=routing.allowed,
            batch=context.batch,
            seed=options.seed,
            alpha=options.alpha if options.skip else None,
            grouped=grouped,
            epochs=options.epochs,
            skips_samples=options.skip,
            cached=self._cached(cache),
            views=views.count,
            costs=costs,
            time_budget_ms=options.time_budget and options.time_budget * 1e3,
            mixes=context.routes.mixes(len(context.samples), findings),
            fallbacks=context.routes.fallbacks(predicted, findings),
        )
        scheduler = context.scheduler_class(given)
        # Without a prefix there is nothing to be ahead with.
        ahead = costs is not None and context.bundle.has_prefix
        features = Features(
            views,
            context.executable,
            context.meter,
            cache,
            np.tile(scheduler.levels, views.count),
            mixed,
            functools.partial(self._chunk, costs),
            padded=ahead,
            made=context.made,
        )
        return Prepared(decisions, context.routes.floor, scheduler, features, not grouped, ahead)

    def _chunk(self, costs: Costs | None, level: int) -> int:
        if costs is None:
            return self.context.batch
        wanted = self.context.options.prefix_batch or costs.chunk(level)
        # A call for fewer is filled up: more than there are would be work for nothing.
        return min(wanted, len(self.context.samples), self.context.photos_at_once)

    def _cached(self, cache: FeatureCache | None) -> np.ndarray | None:
        """Return bool[n]: of which samples the cache has a row for every view."""
        if cache is None:
            return None
        cached = cache.slots.reshape(-1, len(self.context.samples)) >= 0
        return np.asarray(cached.all(axis=0))

    # ---- the audit -------------------------------------------------------------------------

    def _audit(self, prepared: Prepared) -> Prepared:
        """Audit the levels in use that were not yet, and let others serve where one was refused.

        A scheduler that asks for no costs moves samples by rules of its own: nothing is audited.
        """
        if prepared.decisions.costs is None or not self.context.bundle.has_prefix:
            return prepared
        while levels := self._to_audit(prepared):
            try:
                findings = tuple(self._audit_level(prepared, level) for level in levels)
            except DiskFullError as error:
                prepared = self._without_cache(prepared.decisions, error)
                continue
            decisions = prepared.decisions
            decisions = replace(decisions, findings=(*decisions.findings, *findings))
            prepared = self._schedule(decisions, prepared.features.cache)
        return prepared

    def _to_audit(self, prepared: Prepared) -> list[int]:
        """Return the levels that serve enough samples and were not audited yet.

        None where everything runs at one level: nothing has to be like level 0 then.
        """
        if self.context.routes.fixed is not None:
            return []
        done = {0, *(finding.level for finding in prepared.decisions.findings)}
        levels = set(np.unique(prepared.scheduler.levels).tolist()) - done
        return [level for level in sorted(levels) if len(self._chosen(prepared, level))]

    def _chosen(self, prepared: Prepared, level: int) -> np.ndarray:
        chunk = prepared.features.chunk_of(level)
        return chosen(prepared.scheduler.levels, level, chunk, self.context.options.seed)

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

        with self.context.meter.only("audit"):
            labels = self.context.samples.labels[samples]
            found = audit(level, samples, labels, floor, compute, features.chunk_of(level))
        if not found.kept:
            self.context.note(
                f"level {level} is not used: its fidelity on {found.samples} of these "
                f"images is {found.fidelity:.3f}, below the floor of {floor:.3f}"
            )
        return found

    def _audit_floor(self, prepared: Prepared, level: int) -> float:
        """Return the floor that routing held a level to: a time budget may have lowered it.

        None holds a level that a mix uses: its share goes by what is lost (Routes.mixes).
        """
        mix = prepared.scheduler.mix
        if mix is not None and mix.level == level:
            return 0.0
        fidelity = self.context.ladder.levels[level].fidelity
        assert fidelity is not None, "an unaligned level serves nobody"
        return min(prepared.floor, fidelity)

    # ---- the cache -------------------------------------------------------------------------

    def _open_cache(self, decisions: Decisions) -> FeatureCache | None:
        """Return the cache if there is to be one; raises DiskFullError."""
        context, options = self.context, self.context.options
        if options.cache == "off":
            return None
        if not context.bundle.has_prefix:
            context.note(
                f"--cache {options.cache} is off: with {context.bundle.manifest['strategy']} "
                "nothing is frozen before the first trainable layer"
            )
            return None
        if not decisions.room:
            context.note("the cache stays off: the disk had no room when this run began")
            return None
        cache = open_cache(context.bundle, options, len(context.views), context.output.cache)
        if cache is None:
            context.note(f"the cache is off: no sample fits in {options.cache_mb} MiB")
        return cache

    def _cache_rows(self, features: Features, rows: np.ndarray) -> None:
        """Compute what the cache lacks of int64[m] rows; raises DiskFullError."""
        context = self.context
        if features.cache is None:
            return
        threads = context.options.threads or cores()
        engine = f"{context.engine.name} {context.engine.version()} {threads} threads"
        key = level_key(context.bundle, context.samples.spec, engine, context.options.cache_dtype)

        def progress(done: int, total: int) -> None:
            context.meter.lap("cache")
            context.progress("caching", done, total)

        features.cache.fill(
            rows,
            features.levels,
            features.views.contents(),
            features.chunk_of,
            functools.lru_cache(key),
            features.compute,
            progress,
        )
        context.meter.lap("cache")

    def _without_cache(self, decisions: Decisions, error: DiskFullError) -> Prepared:
        self.context.note(f"training goes on without the cache: {error}")
        return self._schedule(replace(decisions, room=False), None)
