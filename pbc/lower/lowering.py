"""What a lowering is: how a program becomes an engine's artifacts."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch.fx import GraphModule, Node

from pbc.errors import PbcError
from pbc.ir.program import GRADIENT, Program, op_name, origin
from pbc.target import Target
from pbc.training_graph.step_check import Step


@dataclass(frozen=True)
class Candidate:
    """One trial level: its `prefix/0` (where there is one) and `body/0`, and their precisions.

    Once steps are derived, `forward/0` and `update/0/sgd` too.
    """

    graphs: Mapping[str, GraphModule]
    precisions: Mapping[str, str]


class Lowering(Protocol):
    """Entry point group `pbc.lowerings`, under the engine's name.

    precisions: the cheaper ones that its engine computes in, the first is tried first.
    derives_steps: whether its engine trains by derived graphs (`forward/k`, `update/k/…`).
    packages: what must be installed here to lower; naming them imports none of them.
    """

    precisions: ClassVar[tuple[str, ...]]
    derives_steps: ClassVar[bool]
    packages: ClassVar[tuple[str, ...]]

    def check(self, target: Target) -> None:
        """Raise PbcError for a target that it cannot lower to here; before anything takes long."""

    def lower(self, program: Program) -> dict[str, bytes]:
        """The bundle's graph and weight files; raises PbcError for an operator it cannot run."""

    def notes(self) -> tuple[str, ...]:
        """What whoever compiles must know of the files that this made, beside what they hold."""

    def contents(self, program: Program) -> dict[str, Any]:
        """What the manifest says about the artifacts of a lowered program.

        `weights`: for each graph, the files of weights that it reads. `export`, if the engine has a
        form that others read: for each level, the file and where its tensors come from.
        """

    def graph_file(self, graph: str) -> str:
        """The name of the bundle's file that holds the graph of this name."""

    def requires(self) -> dict[str, str]:
        """What the device must have installed to run the artifacts, by name."""

    def step(self, program: Program, level: int) -> Step | None:
        """What runs a level's derived step as the device will, None where none is derived."""

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        """Milliseconds of one training visit of a batch, all candidates measured interleaved.

        That is the prefix forward, at the batch size that suits it best (features do not depend on
        what shares a batch), and the body forward and backward.
        """


@runtime_checkable
class Tunes(Protocol):
    """What a lowering offers besides, where measuring finds faster code than rules do."""

    def untunable(self, target: Target) -> str | None:
        """Why its code for a target cannot be measured here, with what to do; None if it can."""

    def tune(self, program: Program, seconds: float) -> dict[str, Any]:
        """Search for so long; what is lowered from now on has what is faster.

        Measurements are kept in the program's folder for work: with no seconds it uses those.
        Returns what the manifest says about it, and `notes` for whoever compiles.
        """


@runtime_checkable
class Knows(Protocol):
    """What a lowering offers besides, where its engine has fewer operators than PyTorch's has."""

    def operators(self) -> Collection[str]:
        """By name; capture takes apart what is not among them, where torch can."""


@runtime_checkable
class Tries(Protocol):
    """What a lowering offers besides, where it can tell in seconds what its engine lacks."""

    def try_graphs(self, program: Program, graphs: Mapping[str, GraphModule]) -> None:
        """Convert graphs and forget them; raises PbcError for an operator that it cannot run."""


def missing_packages(lowering: type[Lowering]) -> list[str]:
    """Those of the lowering's packages that are not installed here."""
    return [name for name in lowering.packages if importlib.util.find_spec(name) is None]


def unsupported(node: Node, engine: str, remedy: str) -> PbcError:
    """The error for an operator that an engine lacks, with the line of the model it comes from."""
    if GRADIENT in node.meta:
        remedy = f"freeze everything before it, {remedy}"
    return PbcError(
        f"operator {op_name(node)}{origin(node)} is not supported by the {engine} engine; {remedy}"
    )
