"""Memory of a derived step: what its engine runs of its graphs, in order, in a pool.

What is frozen is not counted: it is there when the network is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.bundle.graph_name import FORWARD, GraphName, update
from pbc.bundle.optimizers import NEW, OPTIMIZERS
from pbc.ir.graph import PARAMETER, graph_inputs, graph_outputs, output_nodes, placeholders
from pbc.ir.levels import LevelGraphs
from pbc.training_graph.names import LABELS, SAVED, SMOOTHING
from pbc.training_graph.operations import Operation, run
from pbc.training_graph.pool import Chunk, Pool

aten = torch.ops.aten

Recorded = Mapping[GraphName, Sequence[Operation]]
"""By role, what an engine ran of a graph."""

# The peak has settled when so many steps in a row found room in what there was; no network that
# was tried took half of the most.
_SETTLED_STEPS = 8
_MOST_STEPS = 64

# What these return lies where the tensor lies that they read.
_VIEWS = frozenset(
    (
        aten.alias.default,
        aten.detach.default,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.view.default,
    )
)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training holds at its peak beside the loaded network, by what they hold.

    parameters: θ. features: of a mini-batch. saved: what a forward keeps for its update. gradients:
    of all parameters. state: the optimizer's. workspace: the rest of the peak, that is what
    operators work on meanwhile, and new values beside old ones.
    """

    parameters: int
    features: int
    saved: int
    gradients: int
    state: int
    workspace: int

    @property
    def peak(self) -> int:
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        return {f"{name}_bytes": size for name, size in {**asdict(self), "peak": self.peak}.items()}


def step_memory(
    level: LevelGraphs, batch: int, classes: int, recorded: Recorded | None = None
) -> dict[str, StepMemory]:
    """Return what a training iteration at a level holds, by optimizer.

    level: with its derived step. batch: samples of a mini-batch. classes: of an open head.
    recorded: what the engine runs of the step's graphs at that batch, where it was seen to.
    """
    assert level.forward is not None
    recorded = recorded or {}
    forward = _Sizes(level.forward, batch, classes)
    forward_operations = recorded.get(FORWARD) or forward.operations()
    found = {}
    for name, graph in sorted(level.updates.items()):
        backward = _Sizes(graph, batch, classes)
        theta = {**forward.parameters, **backward.parameters}
        held = {
            "parameters": sum(theta.values()),
            "features": forward.features,
            "saved": sum(size for made, size in forward.results.items() if made.startswith(SAVED)),
            "gradients": sum(backward.results.get(NEW + parameter, 0) for parameter in theta),
            "state": sum(theta.values()) * len(OPTIMIZERS[name].state),
        }
        peak = held["features"] + _peak(
            (forward_operations, forward.results),
            (recorded.get(update(name)) or backward.operations(), backward.results),
            held["parameters"] + held["state"],
        )
        found[name] = StepMemory(**held, workspace=peak - sum(held.values()))
    return found


def tensor_bytes(graph: GraphModule, batch: int, classes: int) -> dict[str, int]:
    """Return the sizes of what a graph returns, by the names that an engine knows."""
    return _Sizes(graph, batch, classes).results


def input_shapes(graph: GraphModule, batch: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a graph reads."""
    return _Sizes(graph, batch, classes).inputs


def _peak(
    forward: tuple[Sequence[Operation], Collection[str]],
    backward: tuple[Sequence[Operation], Collection[str]],
    given: int,
) -> int:
    """Return what steps hold in bytes, of which the first finds the parameters and state given.

    Those that it makes are of the pool, which holds more than what is in use at any time: sizes do
    not always fit into one another. So it grows for some steps, each of which finds other chunks
    taken by what the one before it left, and the first of which also what was given.
    """
    pool = Pool(held_bytes=given)
    old: list[Chunk] | None = None
    taken: list[int] = []
    for _ in range(_MOST_STEPS):
        saved = run(*forward, pool)
        new = run(*backward, pool)
        for chunk in (*saved, *(old or ())):
            pool.release(chunk)
        if old is None:
            pool.spare_bytes = given
        old = new
        taken.append(pool.total_bytes - pool.spare_bytes)
        if len(taken) > _SETTLED_STEPS and len(set(taken[-_SETTLED_STEPS:])) == 1:
            break
    return pool.total_bytes


class _Sizes:
    """A graph with the sizes of its tensors.

    inputs: shapes. parameters, results: bytes by name. features: bytes of all.
    """

    def __init__(self, graph: GraphModule, batch: int, classes: int) -> None:
        inputs = dict(zip(graph_inputs(graph), placeholders(graph), strict=True))
        theta = {name: node for name, node in inputs.items() if PARAMETER in node.meta}
        self._symbols: dict[Any, int] = {}
        self._values: dict[Any, int] = {}
        # θ first: it has no batch, and what is left has.
        for nodes, count in ((theta, classes), (inputs, batch)):
            for node in nodes.values():
                for size in node.meta["val"].shape:
                    if isinstance(size, torch.SymInt):
                        self._symbols.setdefault(size.node.expr, count)
        self._nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self._bytes = {node: self._size(node) for node in self._nodes}
        self.inputs = {name: self._shape(node.meta["val"]) for name, node in inputs.items()}
        self.parameters = {name: self._bytes[node] for name, node in theta.items()}
        self.features = sum(
            self._bytes[node]
            for name, node in inputs.items()
            if name not in theta and name not in (LABELS, SMOOTHING)
        )
        self._results = dict(zip(graph_outputs(graph), output_nodes(graph), strict=True))
        self.results = {name: self._bytes[node] for name, node in self._results.items()}

    def _shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(
            self._value(size.node.expr) if isinstance(size, torch.SymInt) else size
            for size in value.shape
        )

    def _value(self, expression: Any) -> int:
        """The number that it stands for; of few expressions, of which each takes long."""
        if expression not in self._values:
            self._values[expression] = int(expression.subs(self._symbols))
        return self._values[expression]

    def _size(self, node: Node) -> int:
        """Bytes of a tensor; none of a number, or of several tensors, which others take apart."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return 0
        return prod(self._shape(value)) * value.dtype.itemsize

    def operations(self) -> list[Operation]:
        """Return what an engine is expected to run, in the order of the graph.

        Nothing is computed in place but a ReLU behind a convolution, which is one operator with it:
        onnxruntime's arithmetic writes beside what it reads.
        """
        titles = {node: name for name, node in self._results.items()}
        name = {node: titles.get(node, node.name) for node in self._nodes}
        found = []
        varying: set[Node] = set()
        for node in self._nodes:
            if node.op == "placeholder":
                varying.add(node)
            # What depends on frozen tensors alone is worked out once, when the graph is loaded.
            if node.op != "call_function" or varying.isdisjoint(node.all_input_nodes):
                continue
            varying.add(node)
            lies_within = node.target in _VIEWS or _is_fused(node)
            found.append(
                Operation(
                    reads={name[read] for read in node.all_input_nodes},
                    makes={name[node]: self._bytes[node]},
                    within=name[node.all_input_nodes[0]] if lies_within else None,
                    # A hard swish is two operators.
                    workspace_bytes=self._bytes[node] * (node.target == aten.hardswish.default),
                )
            )
        return found


def _is_fused(node: Node) -> bool:
    """Return whether a ReLU is computed by the convolution before it, which nobody else reads."""
    if node.target != aten.relu.default:
        return False
    (source,) = node.all_input_nodes
    return source.target == aten.convolution.default and len(source.users) == 1
