"""Full training by pbc's own step, whole and selected, beside a bundle of any strategy."""

from __future__ import annotations

from typing import Any, ClassVar

from pbc.bench.rivals.own import Pbc


class FullDerived(Pbc):
    """Full training by the step that pbc derives, on the bundle's engine, batch norms frozen."""

    strategy: ClassVar[str] = "full"


class Elastic(FullDerived):
    """ElasticTrainer: of full training, what is worth most within --rho of its time."""

    changes: ClassVar[dict[str, Any]] = {"selector": "elastic"}
