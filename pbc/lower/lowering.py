"""Lowering: what makes an engine's artifacts of a program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.bundle.graph_name import GraphName
from pbc.errors import PbcError
from pbc.ir.graph import GRADIENT, op_name, origin
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.runner import Runner
from pbc.lower.iteration import IterationTimer, measure
from pbc.proxies.fidelity import dtype_of, in_precision
from pbc.runtime.costs import LevelCost
from pbc.target import Target
from pbc.training_graph.memory import Recorded


class Lowering(ABC):
    """Makes the files that an engine executes of a program.

    One object lowers one program: what it builds to measure or to check it need not build again.
    """

    refusals: ClassVar[tuple[type[Exception], ...]] = ()
    """What its engine raises where it cannot run a graph, if that is no RuntimeError."""

    @abstractmethod
    def lower(self, program: Program) -> dict[str, bytes]:
        """Return the graph and weight files; raises PbcError for an operator it cannot run."""

    @abstractmethod
    def contents(self, program: Program) -> dict[str, Any]:
        """Return what the manifest says about the artifacts of a lowered program.

        `weights`: for each graph, the files of weights that it reads. `export`, if the engine has a
        form that others read: for each level, the file and where its tensors come from.
        """

    @abstractmethod
    def graph_file(self, graph: GraphName) -> str:
        """Return the name of the bundle's file that holds the graph."""

    @abstractmethod
    def runner(self, program: Program, level: LevelGraphs) -> Runner:
        """Return what runs the graphs of a level, of the program or a trial, as a device will.

        Of an engine that derives no steps, running the body differentiates it too.
        """

    def prefix(self, program: Program, level: LevelGraphs) -> Callable[[Tensor], Sequence[Tensor]]:
        """Return what computes a level's prefix of many images, float32 in and out.

        Levels are judged by that: it is to be fast, and as near to the device as can be here.
        """
        assert level.prefix is not None
        dtype = dtype_of(level.precision)
        graph = in_precision(level.prefix, dtype)
        return lambda images: [value.float() for value in graph(images.to(dtype))]

    def check(self, target: Target) -> None:  # noqa: B027 - most can lower to any target
        """Raise PbcError for a target that it cannot lower to here; before anything takes long."""

    def operators(self) -> Collection[str] | None:
        """Return the operators that the engine has; None where it has those of PyTorch's.

        Capture takes apart what is not among them, where torch can.
        """
        return None

    def try_graphs(self, program: Program, graphs: Mapping[GraphName, GraphModule]) -> None:  # noqa: B027 - what takes long to convert is not tried
        """Convert graphs and forget them; raises PbcError for an operator that it cannot run."""

    def recorded_step(self, program: Program, level: LevelGraphs, classes: int) -> Recorded | None:
        """Return what its engine runs of a derived step; None where that is not known to it.

        The step is of the program's batch, and of so many classes where these are open.
        """
        return None

    def notes(self) -> tuple[str, ...]:
        """Return what whoever compiles must know of the files, beside what they hold."""
        return ()

    def latency_ms(self, program: Program, levels: Sequence[LevelGraphs]) -> list[float]:
        """Return milliseconds of one training iteration, all levels measured interleaved.

        That is the prefix forward, at the batch size that suits it best (features do not depend on
        what shares a batch), and the body forward and backward.
        """
        return [timer.latency_ms() for timer in self._timed(program, levels)]

    def level_costs(self, program: Program, levels: Sequence[LevelGraphs]) -> list[LevelCost]:
        """Return the parts of such an iteration, per sample."""
        return [timer.cost() for timer in self._timed(program, levels)]

    def _timed(self, program: Program, levels: Sequence[LevelGraphs]) -> list[IterationTimer]:
        timers = [IterationTimer(self.runner(program, level), program, level) for level in levels]
        measure(timers)
        return timers


@runtime_checkable
class Tunes(Protocol):
    """A lowering that can tune, too, where measuring finds faster code than rules do."""

    def untunable(self, target: Target) -> str | None:
        """Return why its code for a target cannot be measured here, and what to do; else None."""

    def tune(self, program: Program, seconds: float) -> dict[str, Any]:
        """Search for so long; what is lowered from now on has what is faster.

        Measurements are kept in the program's folder for work: with no seconds it uses those.
        Returns what the manifest says about it, and `notes` for whoever compiles.
        """


def unsupported(node: Node, engine: str, remedy: str) -> PbcError:
    """The error for an operator that an engine lacks, with the line of the model it comes from."""
    if GRADIENT in node.meta:
        remedy = f"freeze everything before it, {remedy}"
    return PbcError(
        f"operator {op_name(node)}{origin(node)} is not supported by the {engine} engine; {remedy}"
    )
