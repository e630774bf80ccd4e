"""Blocks: the parts that a network repeats, in the order in which they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from torch import nn

from pbc.errors import PbcError
from pbc.frontend.trace import LAYOUT, Call, Trace, Value


def blocks(trace: Trace, head: Iterable[str]) -> tuple[str, ...]:
    """Names of the blocks of a network, in the order of execution.

    head: the names of the head's parameters. A layer is a product of data and a weight; a unit is
    a module with one layer (a convolution with its norm and activation), a composite has several.
    A stage runs similar modules one after the other and adds nothing of its own: two or more
    composites of a kind (of any, in a nn.Sequential) that hold half of its layers, directly or in
    the child that holds half of them; or two or more units in a nn.Sequential or in a module of
    which the network has only one. Whatever holds more than half of a network's layers is a stage
    too, and what holds the head. A block is a composite that is no stage, found from the outside
    in, or a unit of a stage of units. A stage of layers alone has its layers for blocks.
    """
    return tuple(dict.fromkeys(call.name for call in _Search(trace, frozenset(head)).found()))


def matching(trace: Trace, pattern: str) -> tuple[str, ...]:
    """Names of the modules that run and match a glob, in the order of execution.

    A module inside one that matches is a part of that block, whatever its own name: `layers.*` are
    the layers. Raises PbcError where none matches.
    """
    names = dict.fromkeys(call.name for call in trace.calls() if call.name)
    matched = [name for name in names if fnmatchcase(name, pattern)]
    found = tuple(name for name in matched if not any(name.startswith(f"{m}.") for m in matched))
    if not found:
        tops = ", ".join(call.name for call in trace.root.calls[:8] if call.name)
        raise PbcError(
            f"--blocks {pattern!r}, a glob, matches no module that the network runs; its outermost "
            f"ones are {tops or 'none'}"
        )
    return found


class _Search:
    """The search for blocks from the outside in."""

    def __init__(self, trace: Trace, head: frozenset[str]) -> None:
        self._trace = trace
        self._layers = _layers(trace, head)
        self._heads = _readers(trace, head)
        self._total = self._count(trace.root)
        self._kinds = Counter(
            kind for kind in {call.name: self._kind(call) for call in trace.calls()}.values()
        )
        self._own = {self._kind(call) for call in trace.calls() if _has_own_result(call)}

    def found(self) -> list[Call]:
        return self._blocks(self._trace.root) or self._alone(self._trace.root)

    def _blocks(self, call: Call) -> list[Call]:
        """The blocks inside a stage."""
        units = self._similar(call, least=1) and not self._similar(call, least=2)
        found = []
        for child in self._children(call):
            if self._is_stage(child):
                inside = self._blocks(child)
                found += inside or ([] if self._holds_head(child) else self._alone(child))
            elif self._count(child) > 1 or (units and self._is_unit(child)):
                found.append(self._unwrapped(child))
        return found

    def _unwrapped(self, call: Call) -> Call:
        """The one module that a nn.Sequential holds."""
        children = self._children(call)
        while type(call.module) is nn.Sequential and len(children) == 1:
            (call,) = children
            children = self._children(call)
        return call

    def _alone(self, call: Call) -> list[Call]:
        """The layers of a network that has nothing else, without those around the head."""
        found = []
        for child in self._children(call):
            if self._count(child) == 1:
                found.append(self._unwrapped(child))
            elif not self._holds_head(child):
                found += self._alone(child)
        return found

    def _is_stage(self, call: Call) -> bool:
        if self._holds_head(call):
            return True
        if 2 * self._count(call) > self._total and self._count(call) > 1 and call.calls:
            return True
        if self._kind(call) in self._own:
            return False
        if self._similar(call, least=2):
            return True
        only = self._kinds[self._kind(call)] == 1 or type(call.module) is nn.Sequential
        return only and self._similar(call, least=1)

    def _similar(self, call: Call, least: int) -> bool:
        """Whether it runs modules of a kind in a chain, of `least` layers each and half of all."""
        children = self._children(call)
        candidates = [child for child in children if child.calls and self._count(child) >= least]
        for group in self._groups(call, candidates, least):
            layers = sum(map(self._count, group))
            if len(group) > 1 and 2 * layers >= self._count(call) and _in_chain(children, group):
                return True
        share = 2 if least > 1 else 1
        return any(
            share * self._count(child) >= self._count(call)
            and self._kind(child) not in self._own
            and self._similar(child, least)
            for child in children
        )

    def _groups(self, call: Call, candidates: list[Call], least: int) -> list[list[Call]]:
        """Modules of a kind; whatever several composites a nn.Sequential holds are of one."""
        if type(call.module) is nn.Sequential and least > 1:
            return [candidates]
        kinds = dict.fromkeys(map(self._kind, candidates))
        return [[c for c in candidates if self._kind(c) == kind] for kind in kinds]

    def _is_unit(self, call: Call) -> bool:
        return self._count(call) == 1 and bool(call.calls)

    def _children(self, call: Call) -> list[Call]:
        return [child for child in call.calls if self._count(child) or self._holds_head(child)]

    def _kind(self, call: Call) -> object:
        """What makes modules similar: their class; containers are as their children are."""
        if isinstance(call.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return type(call.module), frozenset(type(child.module) for child in call.calls)
        return type(call.module)

    def _count(self, call: Call) -> int:
        """How many layers, besides the head's, run inside."""
        return self._layers[call.last] - self._layers[call.first]

    def _holds_head(self, call: Call) -> bool:
        return self._heads[call.last] > self._heads[call.first]


def _has_own_result(call: Call) -> bool:
    """Whether what a module puts out is made by an operator of its own, as a residual sum is.

    Concatenation counts as none: a dense block puts its layers' outputs together.
    """
    inner = {value for child in call.calls for value in child.outputs}
    if not call.calls or not call.outputs:
        return False
    waiting = list(call.outputs)
    while waiting:
        value = waiting.pop()
        if value in inner:
            return False
        if value.made_by is not None and value.made_by.word == "cat":
            waiting += value.made_by.inputs
        elif value.made_by is not None and value.made_by.word in LAYOUT:
            waiting += value.made_by.inputs[:1]
    return True


def _layers(trace: Trace, head: frozenset[str]) -> list[int]:
    """How many layers ran before each operator, the head's left out."""
    readers = _readers(trace, head)
    counts = [0]
    for operator in trace.operators:
        of_head = readers[operator.number + 1] > readers[operator.number]
        counts.append(counts[-1] + (operator.is_layer and not of_head))
    return counts


def _readers(trace: Trace, names: frozenset[str]) -> list[int]:
    """How many operators that read one of these parameters, as they are or derived, ran before."""
    derived: set[Value] = set()
    counts = [0]
    for operator in trace.operators:
        reads = any(value.name in names or value in derived for value in operator.inputs)
        if reads and all(value.constant for value in operator.results):
            derived.update(operator.results)
        counts.append(counts[-1] + reads)
    return counts


def _in_chain(children: Sequence[Call], group: Sequence[Call]) -> bool:
    """Whether each of the group runs on what the child before it put out.

    Three of a kind may have operators of their parent between them: a residual sum.
    """
    direct = all(
        set(map(_origin, before.outputs)) & set(map(_origin, after.inputs))
        for before, after in pairwise(children)
        if after in group
    )
    return direct or (len(group) > 2 and _follow(group))


def _follow(group: Sequence[Call]) -> bool:
    """Whether each of the group depends on the one before."""
    for before, after in pairwise(group):
        reached = set(before.outputs)
        wanted = set(after.inputs)
        waiting = list(wanted)
        while waiting and not wanted & reached:
            value = waiting.pop()
            made = value.made_by
            if made is not None and made.number >= before.last - 1:
                new = [v for v in made.inputs if v not in wanted]
                wanted.update(new)
                waiting += new
        if not wanted & reached:
            return False
    return True


def _origin(value: Value) -> Value:
    """What a value is but for its layout."""
    while value.made_by is not None and value.made_by.word in LAYOUT:
        (value,) = value.made_by.inputs[:1]
    return value
