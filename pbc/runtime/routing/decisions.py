"""Decisions of a run that are made once, before its first step, and kept in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pbc.runtime.costs import Costs
from pbc.runtime.output.checkpoint import Checkpoint
from pbc.runtime.routing.audit import Finding
from pbc.util.shapes import anything, check, flag, list_of


@dataclass(frozen=True)
class Decisions:
    """Facts about device and samples; from the checkpoint when a run is resumed.

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
    def load(cls, checkpoint: Checkpoint, levels: int, samples: int) -> Decisions:
        """Read what `facts` and `arrays` put into a checkpoint; raises ValueError and the like."""
        costs = checkpoint.facts["costs"]
        predicted = checkpoint.part("decisions").get("predicted")
        if predicted is not None and predicted.shape != (samples, levels - 1):
            raise ValueError(f"predicted fidelities are of the shape {list(predicted.shape)}")
        if predicted is not None and np.isnan(predicted).any():
            raise ValueError("a predicted fidelity is not a number")
        check(checkpoint.facts.get("cache", True), flag, "cache")
        check(checkpoint.facts["audit"], list_of(anything, most=levels), "audit")
        return cls(
            predicted,
            Costs.from_json(costs, levels) if costs is not None else None,
            tuple(Finding.from_json(found) for found in checkpoint.facts["audit"]),
            checkpoint.facts.get("cache", True),
        )
