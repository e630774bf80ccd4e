"""Reading a graph: its inputs, outputs and tensors by name, its operators, its text."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import pbc.ir.keyword_names  # noqa: F401 - what reads graphs also writes them as code

# A placeholder that stands for a trainable parameter carries the parameter's name under this key.
PARAMETER = "pbc_parameter"
# A placeholder whose outside name is no identifier carries it under this key; an output node does
# so for all that it returns.
NAME = "pbc_name"
# An operator of a gradient has this key; where it says it comes from is what it is the gradient of.
GRADIENT = "pbc_gradient"

# Lines that a traceback has and no user wrote: torch's own, and those of generated code.
_NOT_USERS = (f'File "{Path(torch.__file__).parent}{os.sep}', 'File "<')


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


def graph_outputs(graph: GraphModule) -> list[str]:
    """The names by which an engine knows the graph's outputs, in order."""
    names: list[str] = output_node(graph).meta.get(NAME) or output_names(graph)
    return list(names)


def name_outputs(graph: GraphModule, names: Sequence[str]) -> None:
    """Say what an engine calls the graph's outputs, whatever nodes compute them."""
    output_node(graph).meta[NAME] = list(names)


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
    lines = (line.strip() for line in (node.meta.get("stack_trace") or "").splitlines())
    trace = [
        line for line in lines if line.startswith('File "') and not line.startswith(_NOT_USERS)
    ]
    return module + (f" ({trace[-1].rpartition(', in ')[0]})" if trace else "")


def graph_text(name: object, graph: GraphModule) -> str:
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
    sent = [
        f"%{node}" if title == node else f"%{node} as {title}"
        for node, title in zip(output_names(graph), graph_outputs(graph), strict=True)
    ]
    lines.append(f"returns {', '.join(sent)}")
    return "\n".join(lines)
