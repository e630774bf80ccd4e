"""Scope: a function of a TVM module while it is being written, a value for each node of a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor
from torch.fx import Node
from tvm import relax, te, tirx
from tvm.sym import Analyzer

from pbc.errors import PbcError
from pbc.ir.graph import op_name, output_node, placeholders
from pbc.lower.lowering import unsupported
from pbc.targets.tvm.decompose import decomposed

Expr = Any
"""Of relax: a tensor. tvm has no types for a type checker."""

Size = Any
"""An int, or an expression of symbols."""

Converter = Callable[..., Any]
"""A function of the scope and an operator's own arguments, its tensors as expressions."""

_REMEDY = "replace it in the model, or compile with another --engine"


class Unsupported(Exception):
    """A variant of an operator that has no conversion; its text says which."""


class Scope:
    """The values of a function's nodes: tensors as expressions, sizes as numbers or expressions.

    kind: what its parameters are called. table: what converts each operator.
    """

    def __init__(
        self, builder: relax.BlockBuilder, kind: str, table: Mapping[Any, Converter]
    ) -> None:
        self.builder = builder
        self.values: dict[Node, Any] = {}
        self._kind = kind
        self._table = table
        self._arguments = 0
        self._symbols: dict[str, Expr] = {}
        self._analyzer = Analyzer()
        self.node: Node

    def function(
        self, name: str, arguments: Sequence[Expr], steps: Iterable[Node], outputs: Iterable[Node]
    ) -> None:
        """Write the function that takes these arguments, and returns these nodes as a tuple."""
        refused: PbcError | None = None
        with self.builder.function(name, list(arguments)):
            with self.builder.dataflow():
                try:
                    for node in steps:
                        self.convert(node)
                    results = [self.values[node] for node in outputs]
                except PbcError as error:
                    # TVM complains on stderr about functions that are left unfinished.
                    refused, results = error, []
                returned = self.builder.emit_output(relax.Tuple(results))
            self.builder.emit_func_output(returned)
        if refused is not None:
            raise refused

    def argument(self, value: Tensor, opened: Collection[int] = ()) -> Expr:
        """A parameter of the function like this tensor, with these axes open too."""
        sizes = [
            self._symbol("classes") if axis in opened and isinstance(size, int) else self.size(size)
            for axis, size in enumerate(value.shape)
        ]
        self._arguments += 1
        kind = relax.TensorType(sizes, dtype_name(value.dtype))
        return relax.Var(f"{self._kind}_{self._arguments}", kind)

    def size(self, size: Any) -> Size:
        return self._expression(size.node.expr) if isinstance(size, torch.SymInt) else int(size)

    def _symbol(self, name: str) -> Expr:
        return self._symbols.setdefault(name, tirx.Var(name, "int64"))

    def _expression(self, expression: sympy.Expr) -> Size:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            return self._symbol(str(expression))
        parts = [self._expression(part) for part in expression.args]
        if isinstance(expression, sympy.Add):
            return sum(parts[1:], start=parts[0])
        if isinstance(expression, sympy.Mul):
            return math.prod(parts[1:], start=parts[0])
        if type(expression).__name__ in ("FloorDiv", "CleanDiv"):
            return self.simple(tirx.floordiv(*parts))
        raise Unsupported(f"a size of {expression}")

    def simple(self, size: Size) -> Size:
        """The size as a number if it is one."""
        if isinstance(size, int):
            return size
        size = self._analyzer.simplify(size)
        return int(size) if isinstance(size, tirx.IntImm) else size

    def equal(self, one: Size, other: Size) -> bool:
        difference = self.simple(one - other)
        return isinstance(difference, int) and difference == 0

    def convert(self, node: Node) -> None:
        """Give a node its value."""
        self.node = node
        converter = self._table.get(node.target)
        if converter is None:
            self._convert_parts(node)
            return
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda old: self.values[old])
        try:
            value = converter(self, *args, **kwargs)
        except Unsupported as reason:
            raise unsupported(node, "tvm", f"not with {reason}: {_REMEDY}") from reason
        self.values[node] = self.emit(value) if isinstance(node.meta["val"], Tensor) else value

    def _convert_parts(self, node: Node) -> None:
        """Give a node the value of what torch makes its operator of."""
        graph = decomposed(node, self._table)
        if graph is None:
            raise unsupported(node, "tvm", _REMEDY)
        sources = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
        for own, source in zip(placeholders(graph), sources, strict=True):
            self.values[own] = self.values[source]
        for part in graph.graph.nodes:
            if part.op == "get_attr":
                tensor = getattr(graph, str(part.target))
                self.values[part] = constant(tensor.numpy(), dtype_name(tensor.dtype))
            elif part.op == "call_function":
                try:
                    self.convert(part)
                except PbcError as reason:
                    raise unsupported(node, "tvm", _REMEDY) from reason
        self.node = node
        result = output_node(graph).args[0]
        self.values[node] = torch.fx.map_arg(result, lambda part: self.values[part])

    def emit(self, value: Expr) -> Expr:
        """Bind the value to a variable, so that its shape is known."""
        if isinstance(value, relax.Var):
            return value
        return self.builder.emit(value)

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Expr:
        """Compute a tensor expression of tensors, in code that is called like the operator.

        A lambda's own name is none that a compiler of CUDA C reads.
        """
        called = op_name(self.node).split(".")[1]
        return self.builder.emit_te(function, *args, primfunc_name_hint=called, **kwargs)

    @property
    def dtype(self) -> str:
        """The type of the current node's result."""
        value = self.node.meta["val"]
        return dtype_name((value if isinstance(value, Tensor) else value[0]).dtype)

    def cast(self, value: Expr, dtype: str) -> Expr:
        if kind_of(value) == dtype:
            return value
        return self.emit(relax.op.astype(value, dtype))

    def operand(self, value: Any, dtype: str) -> Expr:
        """A tensor, a number or a size as a tensor of this type."""
        if is_tensor(value):
            return self.cast(value, dtype)
        if isinstance(value, (bool, int, float)):
            return constant(value, dtype)
        return self.compute(lambda size: te.compute((), lambda: size.astype(dtype)), value)

    def reshape(self, x: Expr, sizes: Sequence[Size]) -> Expr:
        """The tensor in another shape; one size may be -1."""
        sizes = [self.simple(size) for size in sizes]
        if any(isinstance(size, int) and size == -1 for size in sizes):
            known = math.prod(s for s in sizes if not (isinstance(s, int) and s == -1))
            rest = self.simple(tirx.floordiv(count_of(x), known)) if known != 1 else count_of(x)
            sizes = [rest if isinstance(s, int) and s == -1 else s for s in sizes]
        return self.emit(relax.op.reshape(x, sizes))

    def contract(self, sizes: Sequence[Size]) -> list[Size]:
        return [self.simple(size) for size in sizes]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kind_of(x: Expr) -> str:
    """The type of a tensor's values."""
    return str(x.ty.dtype.dtype)


def is_tensor(value: Any) -> bool:
    return isinstance(value, relax.Expr) and isinstance(
        getattr(value, "ty", None), relax.TensorType
    )


def constant(value: Any, dtype: str) -> Expr:
    return relax.const(np.array(value, dtype), dtype)


def zero(x: Any) -> Any:
    """Zero, of the type of a tensor expression's values."""
    return tirx.const(0, x.dtype)


def shape_of(x: Expr) -> list[Size]:
    """The sizes of a tensor."""
    return [int(s) if isinstance(s, tirx.IntImm) else s for s in x.ty.shape.values]


def count_of(x: Expr) -> Size:
    return math.prod(shape_of(x))


def rank_of(x: Expr) -> int:
    return int(x.ty.ndim)


def axes_of(x: Expr, axes: Any) -> list[int]:
    """The axes as numbers from zero; all for None."""
    if axes is None or (isinstance(axes, (list, tuple)) and not axes):
        return list(range(rank_of(x)))
    many = axes if isinstance(axes, (list, tuple)) else [axes]
    return [axis % max(rank_of(x), 1) for axis in many]


def pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, (list, tuple)) else [value]
    return int(first), int(rest[0] if rest else first)


def require(holds: bool, words: str) -> None:
    if not holds:
        raise Unsupported(words)
