"""Levels at which a bundle and a user's bounds let samples run: those above the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pbc.bundle.ladder import SGD, Ladder
from pbc.runtime.options import TrainOptions
from pbc.runtime.routing.audit import Finding
from pbc.runtime.routing.fidelity_floor import fidelity_floor, lost_at
from pbc.runtime.routing.mixes import drawn, largest_share
from pbc.runtime.schedulers import Fallback, Mix

# A mix that so few samples make up is not worth its difference from level 0.
LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Routing:
    """The outcome for n samples.

    levels: int64[n], each sample's difficulty: the cheapest level it tolerates.
    allowed: bool[n, levels], every level at which it may run.
    """

    levels: np.ndarray
    allowed: np.ndarray


@dataclass(frozen=True)
class Routes:
    """The levels that a manifest's ladder and the options of a run leave open.

    head: how the run makes its head, SGD or CLOSED; mixes are measured for each.
    """

    manifest: Mapping[str, Any]
    ladder: Ladder
    options: TrainOptions
    head: str = SGD

    @property
    def floor(self) -> float:
        """Return the fidelity below which nobody runs."""
        return fidelity_floor(self.manifest, self.options)[0]

    @property
    def note(self) -> str | None:
        """Return what the user should know about the floor, where one decides anything."""
        proxies = routable(self.ladder, 0.0)[1:].any()
        if not self.options.routing or not proxies or self.fixed is not None:
            return None
        return fidelity_floor(self.manifest, self.options)[1]

    @property
    def policy(self) -> Mapping[str, Any] | None:
        """Return what the manifest says about the policy."""
        return self.manifest.get("policy")

    @property
    def ships_means(self) -> bool:
        """Return whether the policy predicts no better than each level's mean: none is needed."""
        report = (self.policy or {}).get("report") or {}
        return bool(report.get("shipped") == "means")

    @property
    def fixed(self) -> int | None:
        """Return the one level that all samples run at, where the options say so."""
        return self.options.fixed_level

    def usable(self, floor: float, findings: tuple[Finding, ...] = ()) -> np.ndarray:
        """Return bool[levels]: what any sample may use at a floor, after an audit."""
        if self.fixed is not None:
            return np.asarray(np.arange(len(self.ladder)) == self.fixed)
        if not self.options.routing:
            return np.asarray(np.arange(len(self.ladder)) == 0)
        usable = routable(self.ladder, floor, self.options.max_level)
        for finding in findings:
            usable[finding.level] &= finding.kept
        return usable

    def usable_ever(self, findings: tuple[Finding, ...] = ()) -> np.ndarray:
        """Return bool[levels]: what any sample may use, also if a time budget lowers the floor."""
        return self.usable(min([self.floor, *self._lower_floors()]), findings)

    def levels_in_use(self) -> list[int]:
        """Return the levels that any sample may run at, by the floor or by a mix."""
        floor_keeps = np.flatnonzero(self.usable_ever()).tolist()
        return sorted({*floor_keeps, *self.mixed_levels()})

    def mixed_levels(self, findings: tuple[Finding, ...] = ()) -> list[int]:
        """Return the levels that a share of the samples may use, whatever the floor."""
        return [mix.level for mix in self.mixes(1, findings)]

    def mixes(self, samples: int, findings: tuple[Finding, ...]) -> tuple[Mix, ...]:
        """Return for every level the largest share of n samples there that keeps the bound.

        What the bundle expects to be lost grows with what the audit found: by how much less
        faithful the level is to these samples, and by what a head loses on the audited ones.
        """
        options = self.options
        rows = (self.manifest.get("mixes") or {}).get(self.head, ())
        if not options.routing or self.fixed is not None or options.fidelity_floor is not None:
            return ()
        usable = routable(self.ladder, 0.0, options.max_level)
        for finding in findings:
            usable[finding.level] &= finding.kept
        worse = {found.level: self._worse(found, rows) for found in findings}
        found = []
        for level in np.flatnonzero(usable)[1:].tolist():
            losses = sorted(
                (share, lost * worse.get(level, 1.0)) for at, share, lost in rows if at == level
            )
            share, lost = largest_share(losses, options.max_accuracy_loss)
            if share >= LEAST_SHARE:
                allowed = drawn(samples, len(self.ladder), level, share, options.seed)
                found.append(Mix(allowed, level, share, lost))
        return tuple(found)

    def _worse(self, finding: Finding, rows: Sequence[Sequence[float]]) -> float:
        """Return by what factor a level loses more here than it was measured to, at least 1."""
        fidelity = self.ladder.levels[finding.level].fidelity
        whole = max((lost for at, _, lost in rows if at == finding.level), default=0.0)
        return finding.worse_than(1.0 if fidelity is None else fidelity, whole)

    def route(
        self, predicted: np.ndarray, findings: tuple[Finding, ...], floor: float | None = None
    ) -> Routing:
        """Route by f[n, N] predictions; at a lower floor than the bound's without margins."""
        if self.fixed is not None:
            allowed = np.tile(self.usable(0.0), (len(predicted), 1))
            return Routing(np.full(len(predicted), self.fixed), allowed)
        if floor is None:
            floor = self.floor
            if not self.ships_means and "margins" in (self.policy or {}):
                predicted = predicted - np.array((self.policy or {})["margins"])
        return route(predicted, self.usable(floor, findings), floor)

    def fallbacks(
        self, predicted: np.ndarray, findings: tuple[Finding, ...]
    ) -> tuple[Fallback, ...]:
        """Return what a time budget may fall back to, the most faithful first."""
        points = self.manifest.get("accuracy_map")
        return tuple(
            Fallback(
                self.route(predicted, findings, floor).allowed,
                floor,
                lost_at(points, floor) if points else None,
            )
            for floor in self._lower_floors()
        )

    def _lower_floors(self) -> list[float]:
        """Return the fidelities of the levels below the floor; none below an explicit one."""
        options = self.options
        if options.time_budget is None or options.fidelity_floor is not None:
            return []
        if self.fixed is not None:
            return []
        usable = routable(self.ladder, 0.0, options.max_level)
        fidelities = {
            level.fidelity
            for level in self.ladder.levels[1:]
            if usable[level.level] and level.fidelity is not None and level.fidelity < self.floor
        }
        return sorted(fidelities, reverse=True)


def routable(ladder: Ladder, floor: float, max_level: int | None = None) -> np.ndarray:
    """Return bool[levels]: level 0, and what is aligned and faithful enough on held-out images."""
    fidelities = [level.fidelity for level in ladder.levels]
    faithful = [fidelity is not None and fidelity >= floor for fidelity in fidelities]
    within = np.arange(len(ladder)) <= (len(ladder) if max_level is None else max_level)
    return np.array([True, *faithful[1:]]) & within


def route(predicted: np.ndarray, usable: np.ndarray, floor: float) -> Routing:
    """Send each sample to the largest level that it and the ladder allow.

    predicted: f[n, N], the fidelity of levels 1…N that each sample can be trusted to have.
    usable: bool[levels], see `routable`.
    """
    allowed = np.ones((len(predicted), len(usable)), dtype=bool)
    allowed[:, 1:] = predicted >= floor
    allowed &= usable
    cheapest = len(usable) - 1 - allowed[:, ::-1].argmax(axis=1)
    return Routing(cheapest.astype(np.int64), allowed)
