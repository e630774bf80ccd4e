"""Slicing a graph: its proxy under a plan, with sliced tensors and rewritten sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

from pbc.ir.dims import Axis, Dims, Variable, atoms, size
from pbc.ir.graph import get_tensor, op_name, put_tensor, tensor_names
from pbc.ir.levels import Keep


def slice_graph(graph: GraphModule, dims: Dims, keep: Keep, *, shapes: bool = True) -> GraphModule:
    """Return the proxy of a level-0 graph: sliced tensors, rewritten sizes, the same node names.

    Tensors that the plan does not touch are shared with the given graph. An empty plan gives the
    same outputs bit for bit. shapes: bring every node's meta["val"] up to date; a trial that is
    only run does without, which is most of the time that slicing takes.
    """
    sizes = {dims.variables[name]: len(index) for name, index in keep.items()}
    root = torch.nn.Module()
    for name in tensor_names(graph):
        tensor = get_tensor(graph, name)
        if dims.touched(name, keep):
            sliced = dims.slice(name, tensor, keep)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            tensor = torch.nn.Parameter(sliced, requires_grad=False) if is_parameter else sliced
        put_tensor(root, name, tensor)
    new = Graph()
    values: dict[Node, Node] = {}
    resizer = _Resizer(dims, new, sizes)
    for node in graph.graph.nodes:
        copied = new.node_copy(node, lambda old: values[old])
        copied.name = node.name
        copied.meta = dict(node.meta)
        values[node] = copied
        if node.op == "call_function" and sizes:
            resizer.resize(node, copied)
    proxy = GraphModule(root, new)
    proxy.graph.eliminate_dead_code()
    proxy.recompile()
    if sizes and shapes:
        refresh_shapes(proxy)
    return proxy


def refresh_shapes(graph: GraphModule) -> None:
    """Bring every node's meta["val"] up to date with its inputs', the batch still symbolic."""
    _Shapes(graph).run_on_placeholders()


class _Shapes(torch.fx.Interpreter):
    """Brings meta["val"] of every node up to date, with the batch still symbolic."""

    def run_on_placeholders(self) -> None:
        values = [node.meta["val"] for node in self.graph.nodes if node.op == "placeholder"]
        self.mode = values[0].fake_mode
        # The dispatcher keeps symbolic sizes symbolic in operators that torch composes of others.
        with self.mode, enable_python_dispatcher(), torch.no_grad():
            self.run(*values)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            value = self.mode.from_tensor(value, static_shapes=True)
        n.meta["val"] = value
        return value


_CONVOLUTIONS = tuple(
    f"aten.conv{rank}d.{kind}" for rank in (1, 2, 3) for kind in ("default", "padding")
)


@dataclass(frozen=True)
class _Resizer:
    """Rewrites the sizes that an operator carries as constants."""

    dims: Dims
    graph: Graph
    sizes: Mapping[Variable, int]

    def new_size(self, axis: Axis) -> int:
        return math.prod(self.sizes.get(v, v.size) for v in atoms(axis) if v is not self.dims.batch)

    def shrinks(self, axis: Axis) -> bool:
        return any(v in self.sizes for v in atoms(axis))

    def resize(self, old: Node, new: Node) -> None:
        axes = self.dims.axes.get(old.name)
        if axes is None:
            return
        name = op_name(old)
        if name in ("aten.split.Tensor", "aten.split_with_sizes.default"):
            self.resize_pieces(old, new)
        elif name == "aten.unflatten.int":
            sizes: Any = old.args[2]
            axis_index: Any = old.args[1]
            along = axis_index % (len(axes) - len(sizes) + 1)
            parts = axes[along : along + len(sizes)]
            new.args = (*new.args[:2], [self.new_size(axis) for axis in parts])
        elif name in ("aten.reshape.default", "aten.view.default", "aten.expand.default"):
            shape = [
                self.entry(entry, axis, new) if self.shrinks(axis) and entry != -1 else entry
                for entry, axis in zip(new.args[1], axes, strict=True)  # type: ignore[arg-type]
            ]
            new.args = (new.args[0], shape, *new.args[2:])
        elif name == "aten.layer_norm.default":
            count = len(old.args[1])  # type: ignore[arg-type]
            new.args = (new.args[0], [self.new_size(a) for a in axes[-count:]], *new.args[2:])
        elif name in _CONVOLUTIONS and len(old.args) > 6 and old.args[6] != 1:
            source, weight = (self.dims.axes[node.name] for node in old.all_input_nodes[:2])
            groups = self.new_size(source[1]) // max(self.new_size(weight[1]), 1)
            new.args = (*new.args[:6], groups)
        elif name == "aten.scaled_dot_product_attention.default" and "scale" not in old.kwargs:
            query = self.dims.axes[old.all_input_nodes[0].name]
            # The default scale would follow the pruned head size; the original's must stay.
            new.kwargs = {**new.kwargs, "scale": size(query[-1]) ** -0.5}

    def resize_pieces(self, old: Node, new: Node) -> None:
        """Equal pieces stay so; others are of an axis that never shrinks."""
        source = old.args[0]
        along = old.args[2] if len(old.args) > 2 else 0
        assert isinstance(source, Node)
        assert isinstance(along, int)
        axis = self.dims.axes[source.name][along]
        if not self.shrinks(axis):
            return
        count = len(old.meta["val"])
        extent = self.new_size(axis) // count
        sizes = extent if op_name(old) == "aten.split.Tensor" else [extent] * count
        new.args = (new.args[0], sizes, *new.args[2:])

    def entry(self, entry: Any, axis: Axis, before: Node) -> Any:
        count = self.new_size(axis)
        if self.dims.batch not in atoms(axis):
            return count
        x = next(node for node in self.graph.nodes if node.op == "placeholder")
        with self.graph.inserting_before(before):
            # Names that no node of level 0 has: those keep theirs.
            batch = self.graph.create_node(
                "call_function", torch.ops.aten.sym_size.int, (x, 0), name="resized_batch"
            )
            if count == 1:
                return batch
            return self.graph.create_node(
                "call_function", operator.mul, (batch, count), name="resized"
            )
