"""Run a declared graph with torch's own operators, its frozen tensors resolved once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pbc.errors import PbcError, reason_of
from pbc.runtime.engines import Shapes
from pbc.runtime.engines.bounds import Calls, CheckedCalls
from pbc.runtime.engines.pytorch import arithmetic, bounds
from pbc.runtime.engines.pytorch.graph import Argument, DeclaredGraph, DType, OperatorCall, Slot

# Graphs are exported from contiguous tensors and run on channels_last ones, where a view can be
# impossible; a reshape is a view wherever that works.
_RENAMED = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}
_CONVOLUTIONS = frozenset(
    ("aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default")
)

# Of operators whose arguments do not fit them, each other, or into memory.
_MISFITS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    MemoryError,
)

_Values = list[Any]


class ResolvedGraph:
    """A graph with its operators and frozen tensors resolved once.

    tensor: (file, key) to a frozen tensor. where: file and graph, for messages.
    """

    def __init__(
        self, graph: DeclaredGraph, tensor: Callable[[str, str], Tensor], where: str
    ) -> None:
        self._where = where
        # By whether they keep what a backward reads.
        self._checked = {False: CheckedCalls(), True: CheckedCalls()}
        weights = {
            call.args[1]
            for call in graph.calls
            if call.op in _CONVOLUTIONS and len(call.args) > 1
            if isinstance(call.args[1], Slot)
        }
        # None leaves all as it is.
        self._lower: torch.dtype | None = None
        if graph.precision != "float32":
            self._lower = getattr(torch, graph.precision)
        self._initial: _Values = [None] * graph.slot_count
        for slot, (file, key) in graph.tensors.items():
            value = _rounded(self._lower, tensor(file, key))
            if slot in weights and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            self._initial[slot.index] = value
        self._inputs = [(name, slot.index) for name, slot in graph.inputs.items()]
        self._outputs = [(name, slot.index) for name, slot in graph.outputs.items()]
        self._calls = [_resolve(call) for call in graph.calls]
        self._titles = [f"{call.name!r} ({call.op})" for call in graph.calls]

    def run(
        self, batch: Mapping[str, Tensor], parameters: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Return the outputs by name; inputs it does not read are ignored.

        batch: inputs with samples on their first axis. Raises PbcError for a graph that takes too
        much, before it runs, and for calls that do not fit together.
        """
        inputs = {**batch, **parameters}
        self._require(inputs)
        photos = max((len(value) for value in batch.values()), default=0)
        trains = torch.is_grad_enabled() and any(v.requires_grad for v in parameters.values())
        self._checked[trains].require(
            photos, lambda: self._check_calls(batch, parameters, photos, trains=trains)
        )
        values = self._initial.copy()
        for name, index in self._inputs:
            values[index] = _rounded(self._lower, inputs[name])
        at = 0
        try:
            for at, (function, fill, kwargs, output, dead) in enumerate(self._calls):  # noqa: B007
                values[output] = function(*fill(values), **kwargs)
                for index in dead:
                    values[index] = None
        except _MISFITS as error:
            raise self._misfit(at, error) from error
        if self._lower is None:
            return {name: values[index] for name, index in self._outputs}
        return {name: values[index].float() for name, index in self._outputs}

    def foresee(self, batch: Shapes, parameters: Shapes) -> None:
        """Raise PbcError where the graph cannot take reals of these shapes, or takes too much.

        batch: of as many photos as bounds are for.
        """
        self._require({**batch, **parameters})
        given = {name: bounds.of_shape(shape) for name, shape in batch.items()}
        theta = {name: bounds.of_shape(shape) for name, shape in parameters.items()}
        self._check_bounds(given, theta, Calls.least())

    def _check_calls(
        self,
        batch: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        photos: int,
        *,
        trains: bool,
    ) -> None:
        """Raise PbcError where calls of so many photos, or those of few, take too much."""
        theta = {name: bounds.without_memory(value) for name, value in parameters.items()}
        sizes = [Calls.training(photos)] if trains else [Calls.least()]
        if not trains and photos > 1:
            sizes.append(Calls.inferring(photos))
        for calls in sizes:
            given = {n: bounds.of_photos(value, calls.photos) for n, value in batch.items()}
            self._check_bounds(given, theta, calls, trains=trains)

    def _require(self, inputs: Collection[str]) -> None:
        for name, _ in self._inputs:
            if name not in inputs:
                raise PbcError(
                    f"{self._where} reads {name!r}, which this pbc does not know: upgrade pbc"
                )

    def _check_bounds(
        self,
        batch: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        calls: Calls,
        *,
        trains: bool = False,
    ) -> None:
        """Run once without memory; raises PbcError for too much of it, or of work.

        trains: whether what a backward reads is kept.
        """
        values = [
            None if value is None else bounds.without_memory(value) for value in self._initial
        ]
        inputs = {**batch, **parameters}
        memory = bounds.Memory([*values, *parameters.values()])
        at = 0
        try:
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(trains),
                torch.autograd.graph.saved_tensors_hooks(memory.save, _as_saved),
                bounds.Bounded(self._where, calls) as bounded,
            ):
                for name, index in self._inputs:
                    values[index] = _rounded(self._lower, inputs[name])
                for at, (function, fill, kwargs, output, dead) in enumerate(self._calls):
                    bounded.where = f"{self._where}: {self._titles[at]}"
                    values[output] = function(*fill(values), **kwargs)
                    calls.check_bytes(memory.bytes_with(values), bounded.where)
                    for index in dead:
                        values[index] = None
        except _MISFITS as error:
            raise self._misfit(at, error) from error
        for name, index in self._outputs:
            if not isinstance(values[index], Tensor):
                raise PbcError(f"{self._where}: output {name!r} is no tensor")

    def _misfit(self, at: int, error: Exception) -> PbcError:
        return PbcError(f"{self._where}: {self._titles[at]} cannot run: {reason_of(error)}")


def _as_saved(value: Tensor) -> Tensor:
    return value


def _rounded(precision: torch.dtype | None, value: Tensor) -> Tensor:
    """Round a tensor of reals; any other stays."""
    return value if precision is None or not value.is_floating_point() else value.to(precision)


_Fill = Callable[[_Values], list[Any]]
_Call = tuple[Callable[..., Any], _Fill, dict[str, Any], int, tuple[int, ...]]


def _resolve(call: OperatorCall) -> _Call:
    dead = tuple(slot.index for slot in call.dead)
    function = _function(call.op)
    kwargs = {key: _constant(value) for key, value in call.kwargs.items()}
    if any(_reads(value) for value in call.kwargs.values()):
        return _with_keywords(function, call), lambda values: [values], {}, call.output.index, dead
    return function, _filler(call.args), kwargs, call.output.index, dead


def _function(op: str) -> Callable[..., Any]:
    module, _, name = _RENAMED.get(op, op).partition(".")
    if module == "operator":
        return arithmetic.function(name)
    packet, _, overload = name.partition(".")
    try:
        function: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError as error:
        raise PbcError(f"torch {torch.__version__} has no operator {op}") from error
    return function


def _with_keywords(function: Callable[..., Any], call: OperatorCall) -> Callable[[_Values], Any]:
    """Call with values among the keywords: rare, so it needs no shortcut."""
    fill, names = _filler(call.args), tuple(call.kwargs)
    fill_keywords = _filler(list(call.kwargs.values()))
    return lambda values: function(
        *fill(values), **dict(zip(names, fill_keywords(values), strict=True))
    )


def _filler(template: list[Argument]) -> _Fill:
    """Return the function from all values to the argument list."""
    constants = [_constant(argument) for argument in template]
    direct = [(at, slot.index) for at, slot in enumerate(template) if isinstance(slot, Slot)]
    nested = [
        (at, _filler(argument))
        for at, argument in enumerate(template)
        if isinstance(argument, list) and _reads(argument)
    ]

    def fill(values: _Values) -> list[Any]:
        arguments = constants.copy()
        for at, index in direct:
            arguments[at] = values[index]
        for at, inner in nested:
            arguments[at] = inner(values)
        return arguments

    return fill


def _reads(argument: Argument) -> bool:
    if isinstance(argument, list):
        return any(_reads(item) for item in argument)
    return isinstance(argument, Slot)


def _constant(argument: Argument) -> Any:
    if isinstance(argument, list):
        return [_constant(item) for item in argument]
    if isinstance(argument, DType):
        return getattr(torch, argument.name)
    return None if isinstance(argument, Slot) else argument
