"""Fold a movement of data, such as a transposed weight, into the product that reads it.

Fusion leaves a transposition in front of a matrix product as a function of its own, which writes
the whole weight again at every call. The product can as well read where the weight lies.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar, TensorLoad, Var
from tvm_ffi import structural_map

from pbc.targets.tvm.cpu.stages import (
    NotRegularError,
    Stage,
    inline,
    is_product,
    loads,
    read_stages,
    replace_loads,
    substitute,
)


def fold_moves(module: tvm.IRModule) -> tvm.IRModule:
    """Each product reads the tensors themselves; movements that nothing reads any more are gone."""
    folder = _Folder(module)
    for name, function in module.functions.items():
        if isinstance(function, relax.Function):
            folder.builder_.update_func(name, folder.visit_expr(function))
    return relax.transform.DeadCodeElimination()(folder.builder_.get())


@relax.expr_functor.mutator
class _Folder(relax.PyExprMutator):  # type: ignore[misc]
    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.module = module
        self.folded: dict[tuple[Any, ...], GlobalVar] = {}

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        if not _calls_function(call):
            return call
        name, arguments = call.args[0], list(call.args[1].fields)
        for place, argument in enumerate(arguments):
            while (folded := self._fold(name, place, argument)) is not None:
                name, argument = folded
                arguments[place] = argument
        if name.same_as(call.args[0]):
            return call
        return relax.Call(
            call.op, [name, relax.Tuple(arguments), *call.args[2:]], call.attrs, call.ty_args
        )

    def _fold(self, name: GlobalVar, place: int, argument: Any) -> tuple[GlobalVar, Any] | None:
        """The function that reads what a movement reads, and that tensor."""
        bound = self.lookup_binding(argument) if isinstance(argument, relax.Var) else None
        if bound is None or not _calls_function(bound) or not bound.args[1].fields:
            return None
        key = (name, place, bound.args[0])
        source = bound.args[1].fields[0]
        if key not in self.folded:
            functions = self.builder_.get()
            merged = merge(functions[name], place, functions[bound.args[0]])
            if merged is None:
                return None
            self.folded[key] = self.builder_.add_func(merged, name.name_hint)
        return self.folded[key], source


def _calls_function(call: Any) -> bool:
    return (
        isinstance(call, relax.Call)
        and call.op == tvm.ir.Op.get("relax.call_tir")
        and isinstance(call.args[0], GlobalVar)
    )


def merge(reader: tirx.PrimFunc, place: int, mover: tirx.PrimFunc) -> tirx.PrimFunc | None:
    """`reader` with the movement of one of its inputs folded in; None where it does not fit."""
    param = reader.params[place]
    if not tirx.is_buffer_var(param) or not _reads_products(reader, param):
        return None
    move = _movement(mover)
    if move is None:
        return None
    sizes: dict[Any, Any] = {}
    for mine, its in zip(param.shape, move.buffer.shape, strict=True):
        if isinstance(its, Var):
            sizes[its] = mine
        elif not tvm.sym.Analyzer().can_prove_equal(substitute(its, sizes), mine):
            return None
    value = substitute(move.value, sizes)
    source = value.source
    shape = [substitute(extent, sizes) for extent in source.shape]
    moved = tirx.decl_buffer(shape, source.dtype, name=param.name)

    def at(indices: Any) -> Any:
        places = dict(zip((axis.var for axis in move.axes), indices, strict=True))
        return moved[tuple(substitute(index, places) for index in value.indices)]

    def region(area: Any) -> Any:
        if not area.source.same_as(param):
            return area
        return tirx.BufferRegion(moved, [tvm.ir.Range(0, extent) for extent in shape])

    body = structural_map(replace_loads(reader.body, param, at), [(tvm.ir.TensorRegion, region)])
    params = [moved if at_place == place else p for at_place, p in enumerate(reader.params)]
    return tirx.PrimFunc(params, body, reader.ret_type, reader.attrs)


def _reads_products(function: tirx.PrimFunc, param: Any) -> bool:
    """Whether nothing but products of matrices reads a parameter."""
    try:
        stages = inline(read_stages(function), function.params)
    except NotRegularError:
        return False
    readers = [s for s in stages if any(load.source.same_as(param) for load in loads(s.value))]
    return bool(readers) and all(is_product(stage) for stage in readers)


def _movement(function: Any) -> Stage | None:
    """The one stage of a function that only moves values of its first parameter."""
    if not isinstance(function, tirx.PrimFunc):
        return None
    try:
        stages = inline(read_stages(function), function.params)
    except NotRegularError:
        return None
    if len(stages) != 1 or stages[0].reduced or not isinstance(stages[0].value, TensorLoad):
        return None
    found = loads(stages[0].value)
    return stages[0] if len(found) == 1 and found[0].source.same_as(function.params[0]) else None
