"""What an ONNX graph would take, foreseen from the shapes of its inputs before it runs.

Constants alone are looked at before the graph is loaded: onnxruntime computes then what depends on
nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from math import prod

import numpy as np

from pbc.bundle.graph_name import SAVED
from pbc.errors import PbcError, reason_of
from pbc.runtime.engines.bounds import MOST_BYTES, SAMPLES, TOUCH, Calls
from pbc.runtime.engines.onnxruntime.declared import MOST_KNOWN, Node, Shape, parse
from pbc.runtime.engines.onnxruntime.sizes import RULES, Call, Unknown
from pbc.runtime.engines.onnxruntime.small_values import constant, value

_VALUE_BYTES = 4
# Channels that a CPU's convolutions compute together; fewer take as much memory.
_BLOCK = 16
_MALFORMED = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error)


class Bounds:
    """Sizes of a model's values; title: names the graph in what a user reads.

    batched: the inputs that have a photo in each row. trains: whether it is a half of a training
    step, of which all photos of a mini-batch are one call.
    """

    def __init__(
        self,
        model: bytes,
        title: str,
        batched: Collection[str] = ("x",),
        *,
        trains: bool = False,
    ) -> None:
        self._title = title
        self._batched = frozenset(batched)
        self._trains = trains
        try:
            self._graph = parse(model)
        except _MALFORMED as error:
            raise PbcError(f"{title} cannot be loaded: {reason_of(error)}") from error
        unknown = sorted({n.op for n in self._graph.nodes} - RULES.keys() - {"Constant"})
        if unknown:
            raise PbcError(
                f"{title} uses the operator {unknown[0][:40]!r}, of which pbc does not know how "
                "much it takes"
            )
        last: dict[str, int] = {}
        for number, node in enumerate(self._graph.nodes):
            last.update(dict.fromkeys((*node.inputs, *node.outputs), number))
        kept = {*self._graph.outputs, *self._graph.inputs, *self._graph.shapes, ""}
        self._dead: list[list[str]] = [[] for _ in self._graph.nodes]
        for name, number in last.items():
            if name not in kept:
                self._dead[number].append(name)
        self._check({}, Calls.least())

    def photos(self, shapes: Mapping[str, Shape]) -> int:
        """Return how many photos inputs of these shapes have."""
        given = [shapes[name] for name in self._batched & shapes.keys()]
        return max((shape[0] for shape in given if shape), default=1)

    def grows(self, name: str) -> bool:
        """Return whether an input is the larger the more photos a call has."""
        return name in self._batched or name.startswith(SAVED)

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse a graph that no device is to run: one that takes too much for few photos.

        shapes: of its inputs, for any number of photos. Raises PbcError.
        """
        if self._trains:
            # What a forward keeps counts here, and that is of every layer.
            photos = self.photos(shapes)
            self._check(shapes, Calls(photos, MOST_BYTES * photos), complete=True)
            return
        few = {
            name: (SAMPLES, *shape[1:]) if name in self._batched and shape else shape
            for name, shape in shapes.items()
        }
        self._check(few, Calls.least(), complete=True)

    def check_call(self, shapes: Mapping[str, Shape]) -> None:
        """Refuse inputs of these very shapes, for which a call would take too much.

        Raises PbcError; TooManyPhotosError, where fewer photos may fit.
        """
        photos = self.photos(shapes)
        if self._trains or photos > 1:
            calls = Calls.training(photos) if self._trains else Calls.inferring(photos)
            self._check(shapes, calls, complete=True)

    def _check(self, inputs: Mapping[str, Shape], calls: Calls, *, complete: bool = False) -> None:
        given = {name: inputs[name] for name in self._graph.inputs if name in inputs}
        shapes: dict[str, Shape] = {**self._graph.shapes, **given}
        values: dict[str, np.ndarray] = dict(self._graph.values)
        held: dict[str, int] = {}
        live = sum(_VALUE_BYTES * prod(shape) for name, shape in given.items() if self.grows(name))
        work = 0
        for node, dead in zip(self._graph.nodes, self._dead, strict=True):
            where = f"{self._title}: {(node.outputs or ('',))[0][:80]!r}"
            try:
                made, products = _results(node, shapes, values)
            except Unknown:
                if complete:
                    raise PbcError(f"{where} has a size that depends on values") from None
                continue
            except _MALFORMED as error:
                raise PbcError(f"{where} cannot be: {node.op}: {reason_of(error)}") from error
            for name, shape in zip(node.outputs, made, strict=False):
                shapes[name] = shape
                held[name] = _VALUE_BYTES * prod(_laid_out(node.op, shape))
                live += held[name]
            calls.check_bytes(live, where)
            read = sum(prod(shapes[name]) for name in node.inputs if name in shapes)
            work += products + TOUCH * (read + sum(map(prod, made)))
            calls.check_work(work, self._title)
            live -= sum(held.pop(name, 0) for name in dead)


def _laid_out(op: str, shape: Shape) -> Shape:
    """Return the shape of a result as onnxruntime's kernels hold it."""
    if op != "Conv" or len(shape) != 4:
        return shape
    return (shape[0], -(-shape[1] // _BLOCK) * _BLOCK, *shape[2:])


def _results(
    node: Node, shapes: Mapping[str, Shape], values: dict[str, np.ndarray]
) -> tuple[list[Shape], int]:
    """Return the shapes of what an operator makes; what it makes of small values joins them."""
    if node.op == "Constant":
        found = constant(node.attributes)
        if found.size <= MOST_KNOWN:
            values[node.outputs[0]] = found
        return [found.shape], 0
    call = Call(
        node.attributes,
        [shapes.get(name) for name in node.inputs],
        [values.get(name) for name in node.inputs],
        len(node.outputs),
    )
    made, products = RULES[node.op](call)
    if any(size < 0 for shape in made for size in shape):
        raise ValueError(f"a size of {min(size for shape in made for size in shape)}")
    small = value(node.op, call, made[0]) if made else None
    if small is not None and small.size <= MOST_KNOWN:
        values[node.outputs[0]] = small
    return made, products
