"""Lower to the PyTorch engine: declarative JSON graphs and safetensors weights, no pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.bundle.graph_name import GraphName
from pbc.bundle.ladder import FLOAT32
from pbc.errors import PbcError
from pbc.ir.graph import (
    PARAMETER,
    get_tensor,
    graph_inputs,
    graph_outputs,
    op_name,
    output_nodes,
    tensor_names,
)
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.runner import Values, tensor
from pbc.lower.lowering import Lowering, unsupported
from pbc.lower.weights import TensorStore, weight_file
from pbc.proxies.fidelity import precision_of
from pbc.runtime.engines.pytorch.graph import FORMAT, parse
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.engines.pytorch.resolved_graph import ResolvedGraph

WEIGHTS = "weights"


class PyTorchLowering(Lowering):
    """Write each graph as data; tensors that levels share are stored once."""

    def graph_file(self, graph: GraphName) -> str:
        return f"graphs/{str(graph).replace('/', '-')}.json"

    def lower(self, program: Program) -> dict[str, bytes]:
        store = TensorStore()
        files: dict[str, bytes] = {}
        for name, graph in program.graphs.items():
            file = weight_file(WEIGHTS, name)
            sources = {
                tensor_name: str(store.add(file, tensor_name, get_tensor(graph, tensor_name)))
                for tensor_name in tensor_names(graph)
            }
            data = graph_json(graph, sources, _precision(program, name))
            files[self.graph_file(name)] = json.dumps(
                data, indent=None, separators=(",", ":")
            ).encode()
        return {**files, **store.files()}

    def try_graphs(self, program: Program, graphs: Mapping[GraphName, GraphModule]) -> None:
        for graph in graphs.values():
            graph_json(graph, dict.fromkeys(tensor_names(graph), ""))

    def contents(self, program: Program) -> dict[str, Any]:
        weights = {}
        for name in program.graphs:
            sources = json.loads(program.artifacts[self.graph_file(name)])["tensors"].values()
            weights[str(name)] = sorted({source.partition("#")[0] for source in sources})
        return {"weights": weights}

    def runner(self, program: Program, level: LevelGraphs) -> Differentiating:
        return Differentiating(program, level)


class Differentiating:
    """Runs a level's declared graphs as the engine does; a body is differentiated too."""

    def __init__(self, program: Program, level: LevelGraphs) -> None:
        self._graphs: dict[GraphName, ResolvedGraph] = {}
        self._inputs: dict[GraphName, list[str]] = {}
        self._theta = set(program.parameters)
        for role, graph in level.fused().graphs.items():
            names = {name: f"#{name}" for name in tensor_names(graph)}
            precision = precision_of(program.levels[0], role, level.precision)
            declared = parse(graph_json(graph, names, precision), OPS, str(role))
            self._graphs[role] = ResolvedGraph(declared, _reader(graph), str(role))
            self._inputs[role] = graph_inputs(graph)

    def inputs(self, role: GraphName) -> list[str]:
        return self._inputs[role]

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        theta, features = {}, {}
        for name in self.inputs(role):
            value = tensor(values[name])
            if name in self._theta:
                theta[name] = value.requires_grad_()
            else:
                features[name] = value
        with torch.set_grad_enabled(bool(theta)):
            results = self._graphs[role].run(features, theta)
        if theta:
            loss = next(iter(results.values())).square().mean()
            torch.autograd.grad(loss, list(theta.values()), allow_unused=True)
        return {name: value.detach() for name, value in results.items()}


def _reader(graph: GraphModule) -> Callable[[str, str], Tensor]:
    """Return what finds a frozen tensor by its key, like the engine, which knows files too."""
    return lambda file, key: get_tensor(graph, key).detach()


def _precision(program: Program, graph: GraphName) -> str:
    if graph.level is None:
        return FLOAT32
    precision = program.levels[graph.level].precision
    return precision_of(program.levels[0], graph.role, precision)


def graph_json(
    graph: GraphModule, sources: dict[str, str], precision: str = FLOAT32
) -> dict[str, Any]:
    """Return the declarative form of a graph (pbc/runtime/engines/pytorch/graph.py reads it).

    sources: for each frozen tensor, the file and key that it is stored under.
    """
    names: dict[Node, str] = {}
    inputs, tensors, nodes = [], {}, []
    for node in graph.graph.nodes:
        names[node] = node.meta.get(PARAMETER, node.name) if node.op == "placeholder" else node.name
        if node.op == "placeholder":
            inputs.append(names[node])
        elif node.op == "get_attr":
            tensors[node.name] = sources[str(node.target)]
        elif node.op == "call_function":
            if op_name(node) not in OPS:
                raise _lacking(node)
            nodes.append(
                {
                    "name": node.name,
                    "op": op_name(node),
                    "args": [_encode(a, names, node) for a in node.args],
                    "kwargs": {k: _encode(a, names, node) for k, a in node.kwargs.items()},
                }
            )
    titles = zip(graph_outputs(graph), output_nodes(graph), strict=True)
    return {
        "format": FORMAT,
        "precision": precision,
        "inputs": inputs,
        "outputs": {title: names[node] for title, node in titles},
        "tensors": tensors,
        "nodes": nodes,
    }


def _encode(argument: Any, names: dict[Node, str], node: Node) -> Any:
    if isinstance(argument, Node):
        return {"ref": names[argument]}
    if isinstance(argument, (list, tuple)):
        return [_encode(item, names, node) for item in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, (torch.device, torch.layout, torch.memory_format)):
        return None  # the engine runs on one device, and layouts are its own business
    raise _lacking(node)


def _lacking(node: Node) -> PbcError:
    return unsupported(
        node, "pytorch", "replace it in the model, or add it to pbc.runtime.engines.pytorch.ops"
    )
