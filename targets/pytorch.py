"""Lower to the PyTorch engine: declarative JSON graphs and safetensors weights, no pickle."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pbc.errors import PbcError
from pbc.lowering import Candidate
from pbc.passes.fold_batch_norm import fold
from pbc.program import (
    PARAMETER,
    POLICY,
    Program,
    get_tensor,
    op_name,
    output_nodes,
    tensor_names,
)
from pbc.runtime.graph import FORMAT
from pbc.runtime.ops import OPS

# Enough turns for the fastest of them to be undisturbed, on a machine that does other things too.
ROUNDS = 12
WARM_UP = 2


class PyTorchLowering:
    """Write each graph as data; tensors that levels share are stored once."""

    def graph_file(self, graph: str) -> str:
        return f"graphs/{graph.replace('/', '-')}.json"

    def requires(self) -> dict[str, str]:
        return {"torch": ">=2.9,<2.14"}

    def lower(self, program: Program) -> dict[str, bytes]:
        stored: dict[tuple[str, bytes], str] = {}
        weights: dict[str, dict[str, Tensor]] = {}
        files: dict[str, bytes] = {}
        for name, graph in sorted(program.graphs.items(), key=lambda item: _by_level(item[0])):
            file = weight_file(name)
            sources = {}
            for tensor_name in tensor_names(graph):
                tensor = get_tensor(graph, tensor_name).detach()
                tensor = tensor.clone(memory_format=torch.contiguous_format)
                key = (f"{tensor.dtype}{list(tensor.shape)}", _digest(tensor))
                if key not in stored:
                    stored[key] = f"{file}#{tensor_name}"
                    weights.setdefault(file, {})[tensor_name] = tensor
                sources[tensor_name] = stored[key]
            data = graph_json(name, graph, sources)
            files[self.graph_file(name)] = json.dumps(
                data, indent=None, separators=(",", ":")
            ).encode()
        for file, tensors in weights.items():
            files[file] = safetensors.torch.save(tensors)
        return files

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        images = program.example[:1].expand(program.batch, -1, -1, -1)
        images = images.contiguous(memory_format=torch.channels_last)
        runs = []
        for candidate in candidates:
            # Prefix before body, folded as the device runs them; copies, since layouts change.
            graphs = [copy.deepcopy(graph) for _, graph in sorted(candidate.items(), reverse=True)]
            for graph in graphs:
                fold(graph)
                graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            runs.append([(graph, program.parameter_values(graph)) for graph in graphs])
        best = [math.inf] * len(runs)
        with torch.inference_mode():
            for turn in range(WARM_UP + ROUNDS):
                for number, run in enumerate(runs):
                    start = time.perf_counter()
                    values: tuple[Tensor, ...] = (images,)
                    for graph, theta in run:
                        values = graph(*values, *theta)
                    elapsed = time.perf_counter() - start
                    if turn >= WARM_UP:
                        best[number] = min(best[number], elapsed * 1000)
        return best


def weight_file(graph: str) -> str:
    """Prefix and body of a level share a file, so that a device loads only the levels it uses."""
    return (
        f"weights/{POLICY if graph == POLICY else 'level-' + graph.rpartition('/')[2]}.safetensors"
    )


def _by_level(graph: str) -> tuple[int, str]:
    return (-1 if graph == POLICY else int(graph.rpartition("/")[2]), graph)


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.numpy().tobytes()).digest()


def graph_json(name: str, graph: GraphModule, sources: dict[str, str]) -> dict[str, Any]:
    """The declarative form of a graph (pbc/runtime/graph.py reads it).

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
                raise _unsupported(node)
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
    raise _unsupported(node)


def _unsupported(node: Node) -> PbcError:
    """Name the operator and the line of the model that it comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = f" in {stack[-1][0]}" if stack and stack[-1][0] else ""
    trace = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if "File" in line
    ]
    line = f" ({trace[-1].rpartition(', in ')[0]})" if trace else ""
    return PbcError(
        f"operator {op_name(node)}{module}{line} is not supported by the pytorch engine; "
        "replace it in the model, or add it to pbc/runtime/ops.py"
    )
