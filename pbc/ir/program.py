"""`Program`: the unit of compilation that every pass takes and returns."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.bundle.ladder import Ladder
from pbc.data import InputSpec
from pbc.target import Target

if TYPE_CHECKING:
    from pbc.ir.calibration import Calibration
    from pbc.ir.dims import Dims

MODEL = "model"
POLICY = "policy"
# A placeholder that stands for a trainable parameter carries the parameter's name under this key.
PARAMETER = "pbc_parameter"
# A placeholder whose outside name is no identifier carries it under this key; an output node does
# so for all that it returns.
NAME = "pbc_name"
# An operator of a gradient has this key; where it says it comes from is what it is the gradient of.
GRADIENT = "pbc_gradient"

_TORCH = f"{Path(torch.__file__).parent}/"


def prefix(level: int) -> str:
    return f"prefix/{level}"


def body(level: int) -> str:
    return f"body/{level}"


def step_forward(level: int) -> str:
    """The derived step's first half: loss and what the second half needs."""
    return f"forward/{level}"


def step_update(level: int, optimizer: str) -> str:
    """The derived step's second half: backward and the optimizer's update."""
    return f"update/{level}/{optimizer}"


@dataclass(frozen=True)
class Head:
    """The classifier that is always trained: the names of its parameters and its input width."""

    weight: str
    bias: str | None
    in_features: int


@dataclass(frozen=True)
class Provenance:
    """Where a program came from, for the manifest."""

    model: str
    weights: str
    weights_sha256: str | None
    command: str = ""


@dataclass(frozen=True)
class Request:
    """What a compilation was asked for, whatever the model turns out to be.

    strategy: its text, such as `last-k:3`. batch: samples per mini-batch on the device.
    class_names, class_count: None where the head is left open. work: a folder in which long passes
    keep what lets them resume.
    """

    target: Target
    engine: str
    strategy: str = "linear-probe"
    batch: int = 8
    seed: int = 0
    class_names: tuple[str, ...] | None = None
    class_count: int | None = None
    work: Path | None = None


@dataclass(frozen=True)
class Program:
    """Named graphs, the trainable parameters they share, and what passes need to work on them.

    graphs: `model` after capture; `prefix/k`, `body/k` after split-prefix and prune-dims;
        `policy` after learn-policy; `forward/k`, `update/k/…` after derive-train-step. Frozen
        tensors are the graph module's own parameters and buffers; a trainable parameter is a
        placeholder whose meta[PARAMETER] is its name.
    parameters: the trainable parameters by name, at their initial values; the same names and
        shapes at every level.
    example: float32 [batch, channels, height, width], preprocessed; `reference`: the original
        module's logits for it.
    strategy: its text, such as `last-k:3`; `trainable`: the names of the parameters it trains.
    sizes, plan: for each level, how large each shrunk dimension is and which of its indices
        stay, by the dimension's name (empty for level 0).
    policy_margins: for each proxy, how much its predicted fidelity is lowered for confidence.
    accuracy_map: (fidelity, points of accuracy lost), ascending in fidelity; empty where unknown.
    work: a folder in which long passes keep what lets them resume.
    artifacts: the bundle's files, once lowered. notes: what the user should know, one line each.
    """

    graphs: dict[str, GraphModule]
    strategy: str
    trainable: frozenset[str]
    target: Target
    engine: str
    input: InputSpec
    head: Head
    example: Tensor
    reference: Tensor
    provenance: Provenance
    batch: int = 8
    seed: int = 0
    parameters: dict[str, Tensor] = field(default_factory=dict)
    ladder: Ladder = field(default_factory=Ladder)
    sizes: tuple[dict[str, int], ...] = ()
    plan: tuple[dict[str, list[int]], ...] = ()
    dims: Dims | None = None
    calibration: Calibration | None = None
    policy_report: dict[str, Any] | None = None
    policy_margins: tuple[float, ...] = ()
    accuracy_map: tuple[tuple[float, float], ...] = ()
    class_names: tuple[str, ...] | None = None
    class_count: int | None = None
    checks: dict[str, Any] = field(default_factory=dict)
    work: Path | None = None
    artifacts: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    history: tuple[str, ...] = ()

    def copy(self) -> Program:
        """A program whose graphs, parameters and tables can be changed without touching this one.

        Tensors stay shared: a pass that changes one replaces it.
        """
        return replace(
            self,
            graphs={name: copy_graph(graph) for name, graph in self.graphs.items()},
            parameters=dict(self.parameters),
            checks=copy.deepcopy(self.checks),
        )

    @property
    def levels(self) -> range:
        """The levels for which there are graphs (0 alone before prune-dims)."""
        return range(sum(name.startswith("body/") for name in self.graphs))

    def features(self, level: int, images: Tensor) -> tuple[Tensor, ...]:
        """What the prefix of a level sends to its body: the images themselves without a prefix."""
        graph = self.graphs.get(prefix(level))
        return (images,) if graph is None else tuple(graph(images))

    def logits(self, level: int, images: Tensor) -> Tensor:
        """[batch, classes]: prefix and body of one level at the initial parameters."""
        if MODEL in self.graphs:
            graph, inputs = self.graphs[MODEL], [images]
        else:
            graph, inputs = self.graphs[body(level)], [*self.features(level, images)]
        logits: Tensor = graph(*inputs, *self.parameter_values(graph))[0]
        return logits

    def parameter_values(self, graph: GraphModule) -> list[Tensor]:
        """The trainable parameters in the order in which the graph takes them."""
        return [self.parameters[name] for name in parameter_names(graph)]

    def text(self) -> str:
        """The whole program as stable text, for golden tests and --dump-ir."""
        return "\n\n".join(graph_text(name, graph) for name, graph in sorted(self.graphs.items()))

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
        if MODEL not in self.graphs:
            for level in self.levels:
                if prefix(level) in self.graphs:
                    sent = output_names(self.graphs[prefix(level)])
                else:
                    sent = ["x"]
                read = feature_names(self.graphs[body(level)])
                if sent != read:
                    raise ValueError(
                        f"level {level}: the prefix sends {sent}, the body reads {read}"
                    )


def copy_graph(graph: GraphModule) -> GraphModule:
    """A graph module of its own that shares the tensors of the given one."""
    memo: dict[int, Any] = {id(t): t for t in (*graph.parameters(), *graph.buffers())}
    new = GraphModule(copy.deepcopy(_bare(graph), memo), copy.deepcopy(graph.graph))
    return new


def _bare(graph: GraphModule) -> torch.nn.Module:
    """The tensors of a graph module in a plain module tree."""
    root = torch.nn.Module()
    for name, tensor in (*graph.named_parameters(), *graph.named_buffers()):
        put_tensor(root, name, tensor)
    return root


def put_tensor(root: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Register a tensor under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def get_tensor(graph: GraphModule, name: str) -> Tensor:
    """The tensor that a get_attr node of this name reads."""
    *path, leaf = name.split(".")
    tensor = getattr(graph.get_submodule(".".join(path)), leaf)
    assert isinstance(tensor, Tensor), name
    return tensor


def tensor_names(graph: GraphModule) -> list[str]:
    """The frozen tensors that the graph reads, in order of their first use."""
    names = (str(node.target) for node in graph.graph.nodes if node.op == "get_attr")
    return list(dict.fromkeys(names))


def placeholders(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def parameter_names(graph: GraphModule) -> list[str]:
    return [node.meta[PARAMETER] for node in placeholders(graph) if PARAMETER in node.meta]


def feature_names(graph: GraphModule) -> list[str]:
    return [node.name for node in placeholders(graph) if PARAMETER not in node.meta]


def output_node(graph: GraphModule) -> Node:
    return graph.graph.output_node()


def output_nodes(graph: GraphModule) -> list[Node]:
    outputs = output_node(graph).args[0]
    assert isinstance(outputs, (tuple, list))
    return [node for node in outputs if isinstance(node, Node)]


def output_names(graph: GraphModule) -> list[str]:
    return [node.name for node in output_nodes(graph)]


def graph_inputs(graph: GraphModule) -> list[str]:
    """The names by which an engine knows the graph's inputs, in order."""
    return [
        node.meta.get(PARAMETER) or node.meta.get(NAME) or node.name for node in placeholders(graph)
    ]


def graph_outputs(name: str, graph: GraphModule) -> list[str]:
    """The names by which an engine knows the outputs of the graph called `name`, in order."""
    if NAME in output_node(graph).meta:
        return list(output_node(graph).meta[NAME])
    if name.startswith("body/"):
        return ["logits"]
    return ["fidelity"] if name == POLICY else output_names(graph)


def made_of(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that they are computed from."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def shape_of(node: Node) -> tuple[int, ...]:
    """The node's shape with the example batch standing for the symbolic one."""
    # int() of a symbolic size would make it a constant in every graph that shares it.
    return tuple(
        size.node.hint if isinstance(size, torch.SymInt) else size
        for size in node.meta["val"].shape
    )


def op_name(node: Node) -> str:
    """`aten.conv2d.default`, `operator.mul`: the name an op has in text and in bundles."""
    if node.target in (
        operator.getitem,
        operator.mul,
        operator.add,
        operator.sub,
        operator.floordiv,
    ):
        return f"operator.{getattr(node.target, '__name__', '')}"
    return str(node.target)


def origin(node: Node) -> str:
    """` in layer1.conv (File "model.py", line 12)`: where in the model an operator comes from.

    The line is the innermost of those outside torch, if there is one.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
    if GRADIENT in node.meta:
        module = f" in the gradient of{module.removeprefix(' in') or ' the model'}"
    trace = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File" in line
    ]
    trace = [line for line in trace if _TORCH not in line] or trace
    return module + (f" ({trace[-1].rpartition(', in ')[0]})" if trace else "")


def graph_text(name: str, graph: GraphModule) -> str:
    """One line per node: `%name: shape = op(arguments)`.

    The batch axis prints as `b`, the open axis of a head as `classes`.
    """
    classes = {
        str(size)
        for node in placeholders(graph)
        if PARAMETER in node.meta
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
    }

    def shape(node: Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ""
        sizes = [
            re.sub(r"\bs\d+\b", lambda found: "classes" if found[0] in classes else "b", str(size))
            for size in value.shape
        ]
        return f": [{', '.join(sizes)}]"

    def value(argument: Any) -> str:
        if isinstance(argument, Node):
            return f"@{argument.target}" if argument.op == "get_attr" else f"%{argument.name}"
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(value(item) for item in argument)}]"
        return str(argument)

    head = []
    for node in placeholders(graph):
        theta = f" = θ[{node.meta[PARAMETER]}]" if PARAMETER in node.meta else ""
        head.append(f"  %{node.name}{shape(node)}{theta}")
    lines = [f"graph {name} takes", *head, "does"]
    for node in graph.graph.nodes:
        if node.op == "call_function":
            arguments = [value(a) for a in node.args]
            arguments += [f"{key}={value(a)}" for key, a in node.kwargs.items()]
            short = op_name(node).removeprefix("aten.").removesuffix(".default")
            lines.append(f"  %{node.name}{shape(node)} = {short}({', '.join(arguments)})")
    lines.append(f"returns {', '.join('%' + node for node in output_names(graph))}")
    return "\n".join(lines)
