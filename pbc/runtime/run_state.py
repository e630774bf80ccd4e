"""The state of a run between two iterations, beside its parameters and decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pbc.runtime.loop import Totals
from pbc.runtime.meter import STAGES
from pbc.util.shapes import (
    ShapeError,
    check,
    flag,
    integer,
    list_of,
    maybe,
    number,
    record,
)

_TOTALS = record(
    {
        "visits": list_of(integer()),
        "iterations": integer(),
        "samples": integer(),
        "loss": number(),
        "skipped_updates": integer(),
        "seconds": record(dict.fromkeys(STAGES, number())),
        "iterating_seconds": number(),
    }
)
_HEAD = record(
    {
        "shrinkage": number(0, 1),
        "sharpness": number(0),
        "left_out_accuracy": maybe(number(0, 1)),
        "left_out_loss": maybe(number()),
        "judged": integer(),
    }
)


@dataclass
class RunState:
    """Counts and sums of a run.

    epoch, step: what is done, whole epochs and iterations of the epoch under way. rounds: begun.
    totals: of the epoch under way. spent_seconds: of the epochs that are done. late: whether the
    time budget ended the run; stopped: whether it had learnt enough. head: how one in closed
    form was found, which its sums tell no more once they are gone.
    """

    totals: Totals
    epoch: int = 0
    step: int = 0
    rounds: int = 0
    spent_seconds: float = 0.0
    late: bool = False
    stopped: bool = False
    head: dict[str, float | int | None] | None = None

    @classmethod
    def at_start(cls, levels: int) -> RunState:
        """Return the state of a run that did nothing, on a ladder of `levels`."""
        return cls(Totals.zero(levels))

    def begin_epoch_again(self) -> None:
        """Forget what was done of the epoch under way."""
        self.step, self.totals = 0, Totals.zero(len(self.totals.visits))

    def end_epoch(self, seconds: float) -> None:
        """Count the epoch under way, which took `seconds` with the preparation before it."""
        self.epoch += 1
        self.spent_seconds += seconds
        self.begin_epoch_again()

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return asdict(self)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], levels: int) -> RunState:
        """Read what `facts` gave, among others, of a ladder of `levels`; raises ShapeError."""
        check(facts["totals"], _TOTALS, "totals")
        if len(facts["totals"]["visits"]) != levels:
            raise ShapeError(f"totals are of {len(facts['totals']['visits'])} levels")
        names = ("epoch", "step", "rounds", "spent_seconds", "late")
        stopped = facts.get("stopped", False)
        check(stopped, flag, "stopped")
        head = facts.get("head")
        check(head, maybe(_HEAD), "head")
        known = {name: facts[name] for name in names}
        return cls(Totals(**facts["totals"]), **known, stopped=stopped, head=head)
