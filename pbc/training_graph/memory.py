"""Memory of a derived step: its graphs walked in the order in which an engine runs them.

What is frozen is not counted: it is there when the network is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.bundle.optimizers import NEW, OPTIMIZERS
from pbc.ir.graph import PARAMETER, graph_inputs, graph_outputs, output_nodes, placeholders
from pbc.ir.levels import LevelGraphs
from pbc.training_graph.names import LABELS, SAVED, SMOOTHING
from pbc.training_graph.pool import Chunk, Pool

aten = torch.ops.aten

# The peak has settled when so many steps in a row found room in what there was; no network that
# was tried took half of the most.
_SETTLED_STEPS = 4
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


def step_memory(level: LevelGraphs, batch: int, classes: int) -> dict[str, StepMemory]:
    """Return what a training iteration at a level holds, by optimizer.

    level: with its derived step. batch: samples of a mini-batch. classes: of an open head.
    """
    assert level.forward is not None
    forward = _Walk(level.forward, batch, classes)
    found = {}
    for name, graph in sorted(level.updates.items()):
        update = _Walk(graph, batch, classes)
        theta = {**forward.parameters, **update.parameters}
        held = {
            "parameters": sum(theta.values()),
            "features": forward.features,
            "saved": sum(size for made, size in forward.results.items() if made.startswith(SAVED)),
            "gradients": sum(update.results.get(NEW + parameter, 0) for parameter in theta),
            "state": sum(theta.values()) * len(OPTIMIZERS[name].state),
        }
        given = held["parameters"] + held["state"]
        peak = held["features"] + _peak(forward, update, given)
        found[name] = StepMemory(**held, workspace=peak - sum(held.values()))
    return found


def tensor_bytes(graph: GraphModule, batch: int, classes: int) -> dict[str, int]:
    """Return the sizes of what a graph returns, by the names that an engine knows."""
    return _Walk(graph, batch, classes).results


def _peak(forward: _Walk, update: _Walk, given: int) -> int:
    """Return what steps hold in bytes, the first beside the parameters and state it was given.

    Those that it makes are of the pool, which holds more than what is in use at any time: sizes do
    not always fit into one another. So it grows for some steps, each of which finds other chunks
    taken by what the one before it left.
    """
    pool = Pool()
    old: list[Chunk] = []
    peaks = [0]
    for _ in range(_MOST_STEPS):
        saved = forward.run(pool)
        new = update.run(pool)
        for chunk in (*saved, *old):
            pool.release(chunk)
        peaks.append(max(peaks[-1], pool.total_bytes + (0 if old else given)))
        old = new
        if len(peaks) > _SETTLED_STEPS and len(set(peaks[-_SETTLED_STEPS:])) == 1:
            break
    return peaks[-1]


class _Walk:
    """A graph with the sizes of its tensors, which runs without their numbers."""

    def __init__(self, graph: GraphModule, batch: int, classes: int) -> None:
        inputs = dict(zip(graph_inputs(graph), placeholders(graph), strict=True))
        theta = {name: node for name, node in inputs.items() if PARAMETER in node.meta}
        self._symbols: dict[Any, int] = {}
        # θ first: it has no batch, and what is left has.
        for nodes, count in ((theta, classes), (inputs, batch)):
            for node in nodes.values():
                for size in node.meta["val"].shape:
                    if isinstance(size, torch.SymInt):
                        self._symbols.setdefault(size.node.expr, count)
        self._nodes = list(graph.graph.nodes)
        self._bytes = {node: self._size(node) for node in self._nodes if node.op != "output"}
        self._owners = _owners(self._nodes)
        self.parameters = {name: self._bytes[node] for name, node in theta.items()}
        self.features = sum(
            self._bytes[node]
            for name, node in inputs.items()
            if name not in theta and name not in (LABELS, SMOOTHING)
        )
        results = zip(graph_outputs(graph), output_nodes(graph), strict=True)
        self.results = {name: self._bytes[node] for name, node in results}

    def _size(self, node: Node) -> int:
        """Bytes of a tensor; none of a number, or of several tensors, which others take apart."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return 0
        sizes = [
            int(size.node.expr.subs(self._symbols)) if isinstance(size, torch.SymInt) else size
            for size in value.shape
        ]
        return prod(sizes) * value.dtype.itemsize

    def _read(self, node: Node) -> set[Node]:
        return {self._owners[n] for n in node.all_input_nodes if n in self._owners}

    def run(self, pool: Pool) -> list[Chunk]:
        """Hold each tensor from its operator to its last reader; return those of the results.

        Nothing is computed in place but a ReLU behind a convolution, which is one operator with it:
        onnxruntime's arithmetic writes beside what it reads.
        """
        readers = Counter(owner for node in self._nodes for owner in self._read(node))
        chunks: dict[Node, Chunk] = {}
        for node in self._nodes[:-1]:  # what the last one reads is returned
            read = self._read(node)
            readers.subtract(read)
            done = {source for source in read if not readers[source]}
            if _is_fused(node) and node.all_input_nodes[0] in done:
                chunks[node] = chunks.pop(node.all_input_nodes[0])
                done.remove(node.all_input_nodes[0])
            elif node in self._owners and self._owners[node] == node:
                beside = [pool.allocate(size) for size in self._workspace(node)]
                chunks[node] = pool.allocate(self._bytes[node])
                for chunk in beside:
                    pool.release(chunk)
            if node in chunks and not readers[node]:
                done.add(node)
            for source in done:
                pool.release(chunks.pop(source))
        return list(chunks.values())

    def _workspace(self, node: Node) -> list[int]:
        """Return what an operator holds beside its result while it works: a hard swish is two."""
        return [self._bytes[node]] if node.target == aten.hardswish.default else []


def _owners(nodes: Sequence[Node]) -> dict[Node, Node]:
    """Whose memory each tensor lies in, of those that the graph makes each time that it runs."""
    owners: dict[Node, Node] = {}
    varying: set[Node] = set()
    for node in nodes:
        if node.op == "placeholder":
            varying.add(node)
        # What depends on frozen tensors alone is worked out once, when the graph is loaded.
        if node.op != "call_function" or varying.isdisjoint(node.all_input_nodes):
            continue
        varying.add(node)
        if node.target not in _VIEWS:
            owners[node] = node
        elif (source := node.all_input_nodes[0]) in owners:
            owners[node] = owners[source]
    return owners


def _is_fused(node: Node) -> bool:
    """Return whether a ReLU is computed by the convolution before it."""
    source = node.all_input_nodes[0] if node.target == aten.relu.default else None
    return source is not None and source.target == aten.convolution.default
