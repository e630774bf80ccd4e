"""Lower to the PyTorch engine: declarative JSON graphs and safetensors weights, no pickle."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.bundle.ladder import BFLOAT16, FLOAT32
from pbc.errors import PbcError
from pbc.ir.program import (
    PARAMETER,
    POLICY,
    Program,
    body,
    get_tensor,
    op_name,
    output_nodes,
    prefix,
    tensor_names,
)
from pbc.lower.lowering import Candidate, unsupported
from pbc.lower.weights import TensorStore, by_level, weight_file
from pbc.passes.fold_batch_norm import fold
from pbc.proxies.fidelity import precision_of
from pbc.runtime.engines.pytorch.graph import FORMAT
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.target import Target

WEIGHTS = "weights"
ROUNDS = 6
# How many of the device's mini-batches may share one call of the prefix.
PREFIX_BATCHES = (1, 2, 4)


class PyTorchLowering:
    """Write each graph as data; tensors that levels share are stored once."""

    precisions: ClassVar[tuple[str, ...]] = (BFLOAT16,)
    derives_steps: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    def graph_file(self, graph: str) -> str:
        return f"graphs/{graph.replace('/', '-')}.json"

    def requires(self) -> dict[str, str]:
        return {"torch": ">=2.9,<2.14"}

    def check(self, target: Target) -> None:
        pass

    def notes(self) -> tuple[str, ...]:
        return ()

    def lower(self, program: Program) -> dict[str, bytes]:
        store = TensorStore()
        files: dict[str, bytes] = {}
        for name, graph in sorted(program.graphs.items(), key=lambda item: by_level(item[0])):
            file = weight_file(WEIGHTS, name)
            sources = {
                tensor_name: str(store.add(file, tensor_name, get_tensor(graph, tensor_name)))
                for tensor_name in tensor_names(graph)
            }
            data = graph_json(name, graph, sources, _precision(program, name))
            files[self.graph_file(name)] = json.dumps(
                data, indent=None, separators=(",", ":")
            ).encode()
        return {**files, **store.files()}

    def try_graphs(self, program: Program, graphs: Mapping[str, GraphModule]) -> None:
        for name, graph in graphs.items():
            graph_json(name, graph, dict.fromkeys(tensor_names(graph), ""))

    def contents(self, program: Program) -> dict[str, Any]:
        weights = {}
        for name in program.graphs:
            sources = json.loads(program.artifacts[self.graph_file(name)])["tensors"].values()
            weights[name] = sorted({source.partition("#")[0] for source in sources})
        return {"weights": weights}

    def step(self, program: Program, level: int) -> None:
        return None

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        # The fastest of several turns counts: this machine does other things too.
        runs = [_Visit(program, candidate) for candidate in candidates]
        for turn in range(ROUNDS):
            for run in runs:
                run.measure(warm_up=turn == 0)
        return [run.latency_ms() for run in runs]


class _Visit:
    """Measures one training visit: the prefix forward, the body forward and backward."""

    def __init__(self, program: Program, candidate: Candidate) -> None:
        self._batch = program.batch
        self._graphs = {}
        for name, graph in candidate.graphs.items():
            # Folded as the device runs it; a copy, since layouts and precisions change.
            graph = copy.deepcopy(graph)
            fold(graph)
            graph.to(_dtype(candidate.precisions[name]), memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._graphs[name] = (graph, _dtype(candidate.precisions[name]))
        image = program.example[:1]
        sizes = [self._batch * times for times in PREFIX_BATCHES]
        self._images = {size: _channels_last(image.expand(size, -1, -1, -1)) for size in sizes}
        self._theta = [
            value.detach().requires_grad_() for value in program.parameter_values(self._body[0])
        ]
        self._features = [
            _channels_last(feature.clone()) for feature in self._prefix(self._images[self._batch])
        ]
        # Seconds per sample; the prefix by how many share a call.
        self._prefix_seconds = dict.fromkeys(sizes, math.inf)
        self._body_seconds = math.inf

    @property
    def _body(self) -> tuple[GraphModule, torch.dtype]:
        return self._graphs[body(0)]

    def measure(self, warm_up: bool) -> None:
        if prefix(0) in self._graphs:
            for size, images in self._images.items():
                start = time.perf_counter()
                self._prefix(images)
                seconds = (time.perf_counter() - start) / size
                if not warm_up:
                    self._prefix_seconds[size] = min(seconds, self._prefix_seconds[size])
        graph, dtype = self._body
        start = time.perf_counter()
        values = [value.to(dtype) for value in (*self._features, *self._theta)]
        logits = graph(*values)[0].float()
        torch.autograd.grad(logits.square().mean(), self._theta, allow_unused=True)
        if not warm_up:
            seconds = (time.perf_counter() - start) / self._batch
            self._body_seconds = min(seconds, self._body_seconds)

    def _prefix(self, images: Tensor) -> list[Tensor]:
        if prefix(0) not in self._graphs:
            return [images]
        graph, dtype = self._graphs[prefix(0)]
        with torch.no_grad():
            return [feature.float() for feature in graph(images.to(dtype))]

    def latency_ms(self) -> float:
        prefix_seconds = 0.0
        if prefix(0) in self._graphs:
            prefix_seconds = min(self._prefix_seconds.values())
        return (prefix_seconds + self._body_seconds) * self._batch * 1000


def _dtype(precision: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def _channels_last(images: Tensor) -> Tensor:
    if images.dim() != 4:
        return images.contiguous()
    return images.contiguous(memory_format=torch.channels_last)


def _precision(program: Program, graph: str) -> str:
    if graph == POLICY:
        return FLOAT32
    level = int(graph.rpartition("/")[2])
    return precision_of(program, graph, program.ladder.precision(level))


def graph_json(
    name: str, graph: GraphModule, sources: dict[str, str], precision: str = FLOAT32
) -> dict[str, Any]:
    """The declarative form of a graph (pbc/runtime/engines/pytorch/graph.py reads it).

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
    outputs = {node.name: names[node] for node in output_nodes(graph)}
    if name.startswith("body/"):
        (logits,) = output_nodes(graph)
        outputs = {"logits": names[logits]}
    elif name == POLICY:
        (fidelity,) = output_nodes(graph)
        outputs = {"fidelity": names[fidelity]}
    return {
        "format": FORMAT,
        "precision": precision,
        "inputs": inputs,
        "outputs": outputs,
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
