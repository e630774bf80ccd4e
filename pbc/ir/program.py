"""`Program`: the unit of compilation that every pass takes and returns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.graph_name import POLICY, GraphName
from pbc.bundle.ladder import MACS
from pbc.data import InputSpec
from pbc.ir.graph import graph_text, output_node, parameter_names
from pbc.ir.levels import MODEL, LevelGraphs, LevelPlan
from pbc.ir.rewrite import copy_graph
from pbc.runtime.costs import LevelCost
from pbc.target import Target

if TYPE_CHECKING:
    from pbc.ir.calibration import Calibration
    from pbc.ir.dims import Dims


@dataclass(frozen=True)
class Request:
    """The wishes of whoever compiles, whatever the model turns out to be.

    strategy: its text, such as `last-k:3`. blocks: a glob over the modules that it counts, None
    where pbc finds them. batch: samples per mini-batch on the device.
    class_names, class_count: those that are expected; training takes its photos' own. work: a
    folder in which long passes keep what lets them resume. command: for the provenance.
    """

    target: Target
    engine: str
    strategy: str = "linear-probe"
    blocks: str | None = None
    batch: int = 8
    seed: int = 0
    class_names: tuple[str, ...] | None = None
    class_count: int | None = None
    work: Path | None = None
    command: str = ""


@dataclass(frozen=True)
class Head:
    """The classifier that is always trained.

    parameters: the name of each of its parameters, whose first axis is the classes, and the width
    of the layer that it belongs to, from which its first values are drawn. Two heads that are
    averaged, a 1×1 convolution and a weight given by parts are all of this form.
    fixed: how many classes the graphs are bound to; None where the device decides.
    """

    parameters: Mapping[str, int]
    fixed: int | None = None

    def classes_in(self, theta: Mapping[str, Tensor]) -> int:
        """Return how many classes there are at these values of the trainable parameters."""
        return next(len(theta[name]) for name in self.parameters if name in theta)


@dataclass(frozen=True)
class Block:
    """A part that the network repeats: its name, its values, and how many of them train."""

    name: str
    values: int
    trained: int


@dataclass(frozen=True)
class Network:
    """The network that is compiled: where it came from, what it takes, and what it answers.

    weights: a file's name, `default` or `random`. example: float32 [batch, channels, height,
    width], preprocessed; `reference`: the original module's logits for it. blocks: in the order in
    which they run.
    """

    name: str
    weights: str
    weights_sha256: str | None
    input: InputSpec
    head: Head
    example: Tensor
    reference: Tensor
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Policy:
    """The network that says how cheap a level a sample tolerates, and how far to trust it.

    graph: a view to a fidelity for each proxy. report: what was measured of it, for the manifest.
    margins: for each proxy, how much its predicted fidelity is lowered for confidence.
    """

    graph: GraphModule
    report: Mapping[str, Any]
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Program:
    """A network on its way to a bundle: graphs, the parameters they share, and what is known.

    trainable: the names of the parameters that the strategy trains; `parameters`: these by name,
        at their initial values, once they are marked; the same names and shapes at every level.
    model: the captured graph, until it is split. levels: what it is split into, level 0 first.
        Frozen tensors are a graph module's own parameters and buffers; a trainable parameter is a
        placeholder whose meta[PARAMETER] is its name.
    plans: the proxies that are planned and not made yet. cost_model: what costs come from.
    dims: which dimensions may shrink, of level 0 before its batch norms were folded.
    costs: what a sample costs at each level on this machine; empty where nothing was measured.
    accuracy_map: (fidelity, points of accuracy lost), ascending in fidelity; empty where unknown.
    mixes: by kind of head (level, share of the samples there, points lost), of aligned levels.
    memory: bytes that training holds, by optimizer and by what they hold; None where unknown.
    checks: what was verified, for the manifest. notes: what the user should know, one line each.
    history: the passes that ran. artifacts: the bundle's files, once lowered.
    """

    request: Request
    network: Network
    trainable: frozenset[str]
    model: GraphModule | None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    levels: tuple[LevelGraphs, ...] = ()
    plans: tuple[LevelPlan, ...] = ()
    cost_model: str = MACS
    costs: tuple[LevelCost, ...] = ()
    dims: Dims | None = None
    calibration: Calibration | None = None
    policy: Policy | None = None
    accuracy_map: tuple[tuple[float, float], ...] = ()
    mixes: Mapping[str, tuple[tuple[int, float, float], ...]] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, int]] | None = None
    checks: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    artifacts: Mapping[str, bytes] = field(default_factory=dict)

    def copy(self) -> Program:
        """Return a program whose graphs and tables can be changed without touching this one.

        Tensors stay shared: a pass that changes one replaces it.
        """
        policy = self.policy
        return replace(
            self,
            model=None if self.model is None else copy_graph(self.model),
            levels=tuple(level.copy() for level in self.levels),
            policy=None if policy is None else replace(policy, graph=copy_graph(policy.graph)),
            parameters=dict(self.parameters),
            checks=copy.deepcopy(self.checks),
        )

    @property
    def open_axes(self) -> dict[str, int]:
        """The axis that counts classes, by parameter; none where the graphs bind it."""
        if self.network.head.fixed is not None:
            return {}
        return dict.fromkeys(self.network.head.parameters, 0)

    @property
    def graphs(self) -> Mapping[GraphName, GraphModule]:
        """All graphs by name, to read: the model, the policy, then level by level."""
        found = {} if self.model is None else {MODEL: self.model}
        if self.policy is not None:
            found[POLICY] = self.policy.graph
        for number, level in enumerate(self.levels):
            found |= {role.at(number): graph for role, graph in level.graphs.items()}
        return MappingProxyType(found)

    def logits(self, level: int, images: Tensor) -> Tensor:
        """Return [batch, classes] at the initial parameters; before the split, the model's."""
        if self.model is None:
            return self.levels[level].logits(images, self.parameters)
        theta = [self.parameters[name] for name in parameter_names(self.model)]
        logits: Tensor = self.model(images, *theta)[0]
        return logits

    def text(self) -> str:
        """Return the whole program as stable text, for golden tests and --dump-ir."""
        graphs = sorted(self.graphs.items(), key=lambda item: str(item[0]))
        return "\n\n".join(graph_text(name, graph) for name, graph in graphs)

    def check(self) -> None:
        """Raise ValueError where the program is not well formed (a pass is at fault)."""
        for name, graph in self.graphs.items():
            graph.graph.lint()
            outputs = output_node(graph).args[0]
            if not isinstance(outputs, (tuple, list)):
                raise ValueError(f"graph {name} returns {outputs}; graphs return a tuple")
            missing = [p for p in parameter_names(graph) if p not in self.parameters]
            if missing:
                raise ValueError(
                    f"graph {name} reads trainable parameters that are not there: {missing}"
                )
        for number, level in enumerate(self.levels):
            if level.sent != level.read:
                raise ValueError(
                    f"level {number}: the prefix sends {level.sent}, the body reads {level.read}"
                )
