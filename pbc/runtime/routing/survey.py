"""The survey before a run: what levels cost on this device, and how faithful they are to whom."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from pbc.runtime.costs import Costs, known_costs
from pbc.runtime.routing.audit import Finding
from pbc.runtime.routing.context import RunContext
from pbc.runtime.routing.cost_profiler import CostProfiler, evened
from pbc.runtime.routing.decisions import Decisions
from pbc.runtime.routing.predictions import means, predict
from pbc.util.processor import cores

# The policy is so small that what surrounds a call would cost more than the call.
_POLICY_BATCH = 64


@dataclass(frozen=True)
class Survey:
    """Questions to a run's device and samples."""

    context: RunContext

    def decide(self) -> Decisions:
        """Measure the costs, or read them, and predict fidelities; the costs are written too."""
        context = self.context
        if not context.scheduler_class.cost_aware:
            return Decisions(self.predicted(), None)
        if context.options.costs is not None:
            costs = Costs.load(context.options.costs, len(context.ladder))
            predicted = self.predicted()
        else:
            with context.meter.only("measure"):
                costs = self._costs()
            before = context.meter.seconds["policy"]
            predicted = self.predicted()
            policy_seconds = context.meter.seconds["policy"] - before
            costs = replace(costs, policy_ms=policy_seconds * 1e3 / len(context.samples))
        costs.save(context.output.costs)
        return Decisions(predicted, costs)

    def again(self, decisions: Decisions) -> Decisions:
        """Return what was decided for other samples, with these samples' own fidelities."""
        if decisions.predicted is None:
            return decisions
        return replace(decisions, predicted=self.predicted(decisions.findings))

    def predicted(self, findings: tuple[Finding, ...] = ()) -> np.ndarray | None:
        """Ask the policy about every sample: f32[n, N]; None where no answer would matter."""
        context = self.context
        routes, policy = context.routes, context.routes.policy
        if not context.options.routing or routes.fixed is not None:
            return None
        if policy is None or not routes.usable_ever(findings)[1:].any():
            lacking = "policy" if policy is None else f"proxy of fidelity {routes.floor:.3g}"
            if not routes.mixed_levels(findings):
                context.note(f"the bundle has no {lacking}: every sample runs at level 0")
            return None
        if routes.ships_means:
            return means(context.ladder, len(context.samples))
        _, height, width = policy["view"]
        return predict(
            context.samples,
            context.executable,
            (height, width),
            min(max(context.batch, _POLICY_BATCH), context.photos_at_once),
            context.meter,
            functools.partial(context.progress, "routing"),
        )

    def _costs(self) -> Costs:
        """Return what the compiler measured on this very machine, or measure."""
        context, options = self.context, self.context.options
        known = known_costs(context.bundle.manifest)
        # A call of the prefix, and a mini-batch, of other sizes take other times.
        same = options.prefix_batch is None and context.batch == context.bundle.manifest["batch"]
        if known is None or not same or options.threads not in (None, cores()):
            return self._measured()
        chunks = [evened(level.chunk, len(context.samples)) for level in known]
        levels = [replace(level, chunk=chunk) for level, chunk in zip(known, chunks, strict=True)]
        return Costs(tuple(levels), decode_ms=0.0, gather_ms=0.0, policy_ms=0.0)

    def _measured(self) -> Costs:
        context, options, views = self.context, self.context.options, self.context.views
        prefix = context.bundle.has_prefix
        keeps = options.cache != "off" and prefix
        features = context.bundle.manifest["features"].values()
        return CostProfiler(
            executable=context.executable,
            images=lambda count: views.images(views.rows(0, np.arange(count))),
            labels=context.samples.labels,
            kept=context.made,
            ladder=context.ladder,
            levels=context.routes.levels_in_use(),
            batch=min(context.batch, len(context.samples)),
            chunk=options.prefix_batch,
            most=context.photos_at_once,
            computed=min(options.views, options.epochs) if keeps else options.epochs,
            epochs=options.epochs,
            prefix=prefix,
            bodies=not context.bundle.shares_body,
            width=sum(math.prod(shape) for shape in features),
        ).measure()
