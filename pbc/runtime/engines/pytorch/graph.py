"""Read the declarative graph of a bundle: JSON in, a checked list of calls over numbered slots out.

    {"format": 2, "precision": "float32", "inputs": ["x"], "outputs": {"flatten": "flatten"},
     "tensors": {"c0": "weights/level-0.safetensors#features.0.0.weight"},
     "nodes": [{"name": "conv2d", "op": "aten.conv2d.default",
                "args": [{"ref": "x"}, {"ref": "c0"}, null, [1, 1]], "kwargs": {}}]}

An argument is null, a bool, a number, a string, a list of arguments, {"ref": name},
{"dtype": "float32"} or {"float": "inf" | "-inf" | "nan"}. Nothing is evaluated.

precision is what the graph computes in: a graph in bfloat16 rounds its inputs and its tensors, and
hands its outputs over in float32, so that levels of any precision share one file of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

from pbc.errors import PbcError
from pbc.util.shapes import (
    ShapeError,
    anything,
    check,
    dict_of,
    integer,
    list_of,
    one_of,
    record,
    text,
)

FORMAT = 2
PRECISIONS = ("float32", "bfloat16")
DTYPES = frozenset(
    (
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "bfloat16",
        "float16",
        "float32",
        "float64",
    )
)
_NODE = record(
    {
        "name": text(),
        "op": text(),
        "args": list_of(anything, most=4096),
        "kwargs": dict_of(anything, most=64),
    }
)
_GRAPH = record(
    {
        "format": integer(),
        "precision": one_of(*PRECISIONS),
        "inputs": list_of(text(), most=2**16),
        "outputs": dict_of(text(), most=2**16),
        "tensors": dict_of(text(), most=2**18),
        "nodes": list_of(_NODE, most=2**18),
    }
)
_LARGEST = 2**63
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class Slot:
    """The place of a value while the graph runs."""

    index: int


@dataclass(frozen=True)
class DType:
    """An element type by its numpy name."""

    name: str


Argument: TypeAlias = "bool | int | float | str | Slot | DType | list[Argument] | None"


@dataclass(frozen=True)
class OperatorCall:
    """One operator call; the slots in `dead`, its own maybe, are not read by any later call."""

    name: str
    op: str
    args: list[Argument]
    kwargs: dict[str, Argument]
    output: Slot
    dead: tuple[Slot, ...]


@dataclass(frozen=True)
class DeclaredGraph:
    """Operator calls in order over `slot_count` slots; `tensors` maps a slot to (file, key)."""

    precision: str
    inputs: dict[str, Slot]
    outputs: dict[str, Slot]
    tensors: dict[Slot, tuple[str, str]]
    calls: tuple[OperatorCall, ...]
    slot_count: int


def parse(data: Any, ops: frozenset[str], where: str) -> DeclaredGraph:
    """Check a decoded JSON graph and number its values; raises PbcError, naming `where`."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PbcError(
            f"{where} has format {found}; this pbc reads format {FORMAT}: compile the model again"
        )
    try:
        check(data, _GRAPH)
    except ShapeError as error:
        raise PbcError(f"{where} is not valid: {error}") from error
    slots: dict[str, Slot] = {}

    def define(name: str) -> Slot:
        if name in slots:
            raise PbcError(f"{where} defines {name!r} twice")
        return slots.setdefault(name, Slot(len(slots)))

    inputs = {name: define(name) for name in data["inputs"]}
    tensors: dict[Slot, tuple[str, str]] = {}
    for name, source in data["tensors"].items():
        file, sharp, key = source.partition("#")
        if not sharp:
            raise PbcError(f"{where}: tensor {name!r} is {source!r}; expected file#key")
        tensors[define(name)] = (file, key)
    calls = []
    for node in data["nodes"]:
        if node["op"] not in ops:
            raise PbcError(f"{where}: {node['name']!r} uses {node['op']!r}, which is not allowed")
        at = f"{where}: {node['name']!r}"
        args = [_argument(value, slots, at) for value in node["args"]]
        kwargs = {key: _argument(value, slots, at) for key, value in node["kwargs"].items()}
        calls.append((node["name"], node["op"], args, kwargs, define(node["name"])))
    outputs = {}
    for name, source in data["outputs"].items():
        if source not in slots:
            raise PbcError(f"{where}: output {name!r} is {source!r}, which no node defines")
        outputs[name] = slots[source]
    dead = _dead_after(
        # With its own: a result that nothing reads is dead at once.
        [_slots([*args, *kwargs.values(), output]) for _, _, args, kwargs, output in calls]
    )
    kept = set(outputs.values()) | set(tensors)
    resolved = tuple(
        OperatorCall(*call, tuple(slot for slot in slots_dead if slot not in kept))
        for call, slots_dead in zip(calls, dead, strict=True)
    )
    return DeclaredGraph(data["precision"], inputs, outputs, tensors, resolved, len(slots))


def _argument(value: Any, slots: dict[str, Slot], where: str) -> Argument:
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise PbcError(f"{where} has a whole number beyond 64 bits")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_argument(item, slots, where) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if isinstance(content, str):
            if kind == "ref" and content in slots:
                return slots[content]
            if kind == "dtype" and content in DTYPES:
                return DType(content)
            if kind == "float" and content in _FLOATS:
                return _FLOATS[content]
    shown = repr(value)[:80]
    raise PbcError(f"{where} has the argument {shown}, which is not a value of this format")


def _slots(arguments: list[Argument]) -> set[Slot]:
    found: set[Slot] = set()
    for argument in arguments:
        if isinstance(argument, Slot):
            found.add(argument)
        elif isinstance(argument, list):
            found |= _slots(argument)
    return found


def _dead_after(reads: list[set[Slot]]) -> list[list[Slot]]:
    """Return for every call the slots that it is the last to read."""
    seen: set[Slot] = set()
    dead: list[list[Slot]] = []
    for read in reversed(reads):
        dead.append(sorted(read - seen, key=lambda slot: slot.index))
        seen |= read
    return dead[::-1]
