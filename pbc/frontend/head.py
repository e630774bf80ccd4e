"""The head: which parameters make the class scores, found by data flow; resized, or added."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pbc.errors import PbcError
from pbc.frontend.axes import BINARY, REDUCTIONS, Features, Lost, axis_before, channel_axis
from pbc.frontend.trace import LAYOUT, Operator, Trace, Value
from pbc.ir.program import Head

OPEN_CLASSES = 10
"""How many classes an added head has until training says."""

# Elementwise operators that map each score by itself and the order of scores mostly to itself.
_SCALES = frozenset({
    "abs", "clamp", "clamp_min", "dropout", "exp", "hardtanh", "log", "masked_fill",
    "native_dropout", "neg", "pow", "sqrt",
})  # fmt: skip
_BATCH_NORMS = frozenset({
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
})  # fmt: skip
# Of features from prototypes, the classes by rows.
_DISTANCES = frozenset({"_cdist_forward", "_euclidean_dist"})
_ACTIVATIONS = frozenset({"relu", "hardtanh", "sigmoid", "tanh", "softplus"})
_PROBABILITIES = frozenset({"_softmax", "softmax", "_log_softmax", "log_softmax", "sigmoid"})


@dataclass(frozen=True)
class Found:
    """A head, how many classes it has, and what the user should know of it."""

    head: Head
    classes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Missing:
    """Why the outputs of a network are not the scores of a classifier, in words.

    features: they are known to be something else; else an operator is not known.
    """

    reason: str
    features: bool = True


def find(trace: Trace) -> Found | Missing:
    """Follow the class axis of the outputs back to the parameters whose first axis it is.

    Scores are what linear layers or 1×1 convolutions make: as they are, averaged over heads,
    positions or tokens, scaled, through softmax; their weights may be normalised or given by
    parts. Raises PbcError where such a parameter is also read by another part of the network.
    """
    result = trace.result
    if result is None:
        return Missing(f"it returns {_described(trace.output)}")
    axis = _class_axis(result)
    if axis is None:
        return Missing(f"it puts out {list(result.shape)} for two images, not class scores")
    walk = _Walk(trace.read.keys())
    try:
        walk.scores(result, axis)
    except Lost as lost:
        return Missing(str(lost), isinstance(lost, Features))
    if not walk.widths:
        return Missing("its outputs are made by no linear layer")
    if _depends_on(walk.data, walk.seen):
        return Missing("its outputs are a residual sum")
    _check_not_shared(trace, walk)
    return Found(Head(walk.head()), result.shape[axis], tuple(walk.notes))


def _class_axis(result: Value) -> int | None:
    """The only axis behind the batch that has more than one entry; None where that is not one."""
    if len(result.shape) == 2:
        return 1
    long = [axis for axis, size in enumerate(result.shape) if axis and size > 1]
    return long[0] if len(long) == 1 else None


@dataclass
class _Walk:
    """The way back from the scores.

    known: the network's parameters, which buffers are not. parameters: found so far, with the width
    of the layer that reads each, None for what is added or multiplied afterwards. widths, data: of
    the layers found. seen: the operators on the way.
    """

    known: Collection[str]
    parameters: dict[str, int | None] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    data: list[Value] = field(default_factory=list)
    seen: set[Operator] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    _done: set[tuple[int, int]] = field(default_factory=set)

    def head(self) -> dict[str, int]:
        return {name: width or self.widths[0] for name, width in self.parameters.items()}

    def scores(
        self, value: Value, axis: int, pooled: bool = False, stretched: bool = False
    ) -> None:
        """Follow scores to their layers.

        pooled: they are averaged over positions afterwards. stretched: they are multiplied by a
        constant afterwards, as where a tanh bounds them.
        """
        operator = value.made_by
        if operator is None:
            raise Features("its outputs are its inputs")
        if value.constant:
            raise Features("its outputs do not depend on the image")
        if (id(value), axis) in self._done:
            return
        self._done.add((id(value), axis))
        self.seen.add(operator)
        word, args = operator.word, operator.args
        if word in ("addmm", "baddbmm") and axis == 1:
            self._layer(operator, args[1], args[2], 1, args[0])
        elif word in ("mm", "bmm", "matmul") and axis == len(value.shape) - 1:
            self._layer(operator, args[0], args[1], len(args[1].shape) - 1, None)
        elif word in ("mm", "bmm", "matmul") and axis == len(value.shape) - 2:
            self._layer(operator, args[1], args[0], len(args[0].shape) - 2, None)
        elif word in _DISTANCES and axis == len(value.shape) - 1:
            self._layer(operator, args[0], args[1], len(args[1].shape) - 2, None)
        elif word == "linear" and axis == len(value.shape) - 1:
            self._layer(operator, args[0], args[1], 0, args[2] if len(args) > 2 else None)
        elif word in ("convolution", "mkldnn_convolution") and axis == 1:
            if any(size != 1 for size in args[1].shape[2:]) and any(
                size != 1 for size in value.shape[2:]
            ):
                raise Features(self._at(operator, "a convolution over neighbouring positions"))
            self._layer(operator, args[0], args[1], 0, args[2])
        elif word in _PROBABILITIES:
            if word == "sigmoid" or int(args[1]) % len(value.shape) == axis:
                self._probabilities(operator)
            self.scores(args[0], axis, pooled)
        elif word in _ACTIVATIONS and not pooled and not (word == "tanh" and stretched):
            raise Features(self._at(operator, f"{word}: features, not scores"))
        elif word in BINARY:
            self._binary(operator, value, axis, pooled)
        elif word in _BATCH_NORMS and axis == 1:
            for operand in args[1:3]:  # by class, as its statistics are, which stay
                if isinstance(operand, Value):
                    self._parameter(operand, 0, None)
            self.scores(args[0], axis, pooled)
        elif word == "where":
            for operand in operator.inputs[1:]:
                if not operand.constant and len(operand.shape) == len(value.shape):
                    self.scores(operand, axis, pooled)
        elif word in ("cat", "stack"):
            for operand in args[0]:
                self.scores(operand, axis_before(operator, operand, value, axis), pooled)
        elif word in LAYOUT | _SCALES | _ACTIVATIONS | REDUCTIONS:
            before = axis_before(operator, args[0], value, axis)
            reduced = word in REDUCTIONS
            self.scores(args[0], before, pooled or reduced)
        else:
            kind = Features if _is_pointwise(word) else Lost
            raise kind(self._at(operator, f"`{word}`"))

    def _binary(self, operator: Operator, value: Value, axis: int, pooled: bool) -> None:
        """Follow a sum or product; one of prototypes and features without classes is a layer."""
        with_classes: list[tuple[Value, int]] = []
        others: list[Value] = []
        for operand in operator.inputs:
            at = axis - len(value.shape) + len(operand.shape)
            if at < 0 or operand.shape[at] != value.shape[axis] or _repeated(operand, at):
                others.append(operand)  # no class axis: a temperature, a scale for each image
            else:
                with_classes.append((operand, at))
        features = [other for other in others if not other.constant]
        prototypes = pooled and all(operand.constant for operand, _ in with_classes)
        for operand, at in with_classes:
            if prototypes and features:
                self._layer(operator, features[0], operand, at, None)
            elif operand.constant:
                self._parameter(operand, at, None)
            else:
                constant = all(other.constant and not other.shape for other in others)
                stretched = constant and operator.word in ("mul", "div")
                self.scores(operand, at, pooled, stretched)

    def _layer(
        self, operator: Operator, data: Value, weight: Value, axis: int, bias: Value | None
    ) -> None:
        if not weight.constant:
            raise Lost(self._at(operator, f"`{operator.word}` of two features"))
        width = math.prod(
            size
            for other, size in enumerate(weight.shape)
            if other != axis and not _repeated(weight, other)  # over the batch
        )
        self.widths.append(width)
        self.data.append(data)
        if not self._parameter(weight, axis, width):
            raise Features(self._at(operator, "a weight that does not train"))
        if isinstance(bias, Value):
            self._parameter(bias, len(bias.shape) - 1, width)

    def _parameter(self, value: Value, axis: int, width: int | None) -> bool:
        """Follow a weight back through what it is computed from, to what is stored.

        Returns whether that is a parameter; a buffer does not train.
        """
        if value.name is not None and value.name not in self.known:
            return False
        if value.name is not None:
            if axis != 0:
                raise PbcError(
                    f"the classes are axis {axis} of the head's {value.name} "
                    f"{list(value.shape)}; pbc trains heads whose classes are the first axis, as "
                    "in torch.nn.Linear"
                )
            self.parameters.setdefault(value.name, width)
            return True
        operator = value.made_by
        if operator is None:
            raise Features(f"its outputs are tied to a constant of {value.shape[axis]} entries")
        self.seen.add(operator)
        if operator.word == "_weight_norm_interface":
            found = [self._parameter(operand, axis, width) for operand in operator.inputs]
            return all(found)
        trains = False
        for operand in operator.inputs:
            try:
                before = axis_before(operator, operand, value, axis)
            except Lost:
                continue
            if operand.shape[before] == value.shape[axis]:
                trains |= self._parameter(operand, before, width)
        return trains

    def _probabilities(self, operator: Operator) -> None:
        word = operator.word.lstrip("_")
        if word == "log_softmax":
            note = "the model ends in log_softmax, which the loss takes once more: no difference"
        else:
            note = (
                f"the model puts out probabilities ({word}): the loss takes them as scores, as "
                "torch would; train on what comes before to learn faster"
            )
        self.notes.append(note)

    def _at(self, operator: Operator, what: str) -> str:
        place = f" in {operator.module}" if operator.module else ""
        return f"its outputs come from {what}{place}"


def _is_pointwise(word: str) -> bool:
    """Whether an operator computes each value from those at the same place, as activations do."""
    packet = getattr(torch.ops.aten, word, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _repeated(value: Value, axis: int) -> bool:
    """Whether a value is the same all along an axis, since it was expanded to it."""
    if value.shape[axis] == 1:
        return True
    operator = value.made_by
    if operator is None or operator.word not in BINARY | LAYOUT | _SCALES | REDUCTIONS:
        return False
    for operand in operator.inputs:
        try:
            before = axis_before(operator, operand, value, axis) if operand.shape else None
        except Lost:
            before = None
        # An axis that an operand does not have repeats it, but where the operator made the axis.
        if before is None:
            if operator.word not in BINARY | _SCALES | {"expand"}:
                return False
        elif not _repeated(operand, before):
            return False
    return True


def _depends_on(values: list[Value], operators: set[Operator]) -> bool:
    """Whether a layer reads what was followed as scores: then these are features like others."""
    waiting, reached = list(values), set(values)
    while waiting:
        made = waiting.pop().made_by
        if made is None:
            continue
        if made in operators and not all(value.constant for value in made.results):
            return True
        new = [value for value in made.inputs if value not in reached]
        reached.update(new)
        waiting += new
    return False


def _check_not_shared(trace: Trace, walk: _Walk) -> None:
    """Refuse a head that another part of the network reads too: it could not change its size."""
    derived: dict[Value, str] = {}
    for operator in trace.operators:
        heads = {v.name or derived.get(v) for v in operator.inputs}
        read = sorted(name for name in heads if name is not None and name in walk.parameters)
        if not read:
            continue
        if all(value.constant for value in operator.results):
            derived.update(dict.fromkeys(operator.results, read[0]))
        elif operator not in walk.seen:
            raise PbcError(
                f"the head's {read[0]} is also read by `{operator.word}` in "
                f"{operator.module or 'the network itself'}; a head that changes its size cannot "
                "be shared with another layer"
            )


def _described(output: Any) -> str:
    if isinstance(output, dict):
        keys = ", ".join(map(str, list(output)[:5]))
        return f"a {type(output).__name__} with {keys or 'nothing in it'}"
    return f"a {type(output).__name__}"


def resize(module: nn.Module, head: Head, classes: int) -> None:
    """Give every parameter of the head new values for this many classes, in place.

    Drawn uniformly from ±1/sqrt(width), as torch.nn.Linear does. Counts that the layers and the
    network keep of their classes follow.
    """
    for name, width in head.parameters.items():
        old = module.get_parameter(name)
        bound = 1 / math.sqrt(width)
        new = torch.empty(classes, *old.shape[1:]).uniform_(-bound, bound)
        replace_parameter(module, name, new)


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a parameter of another first axis in this one's place, everywhere it is registered."""
    old = module.get_parameter(name)
    before, after = len(old), len(value)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    for owner in module.modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is old:
                setattr(owner, leaf, new)
                for count in ("out_features", "out_channels"):
                    if getattr(owner, count, None) == before:
                        setattr(owner, count, after)
    for owner in module.modules():
        known = getattr(owner, "num_classes", None)
        if isinstance(known, int) and known == before:
            setattr(owner, "num_classes", after)  # noqa: B010, a name that nn.Module does not have


def add(module: nn.Module, example: Tensor, trace: Trace, reason: str) -> tuple[Head, str]:
    """Add a linear head to a backbone, in place, on its pooled features.

    Returns the head and a note. Raises PbcError where the outputs are no features: more or less
    than one tensor of channels, of channels and tokens, or of channels, height and width.
    """
    result = trace.result
    if result is None or not 2 <= len(result.shape) <= 4 or result.shape[0] != len(example):
        raise PbcError(
            f"the model has no classifier that pbc could find ({reason}), and puts out nothing to "
            "put one on: one tensor [batch, channels], [batch, tokens, channels] or "
            "[batch, channels, height, width]"
        )
    name = "head"
    while hasattr(module, name):
        name = f"added_{name}"
    axis = channel_axis(result)
    width = result.shape[axis]
    append(module, name, PooledLinear(width, axis))
    return (
        Head({f"{name}.weight": width, f"{name}.bias": width}),
        f"the model has no classifier ({reason}): a linear head, {name}, was added on its "
        f"{width} {_POOLED[len(result.shape)]}",
    )


_POOLED = {
    2: "features",
    3: "channels, averaged over tokens",
    4: "channels, averaged over positions",
}


class PooledLinear(nn.Linear):
    """A linear layer on the mean over tokens or positions, where there are any."""

    def __init__(self, width: int, axis: int) -> None:
        super().__init__(width, OPEN_CLASSES)
        self.axis = axis

    def forward(self, features: Tensor) -> Tensor:
        others = [axis for axis in range(1, features.dim()) if axis != self.axis]
        return super().forward(features.mean(others) if others else features)


def append(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Let a layer read what a module puts out, in place, as a child of this name."""
    module.add_module(name, layer)
    if type(module).forward is not nn.Sequential.forward:  # which runs its children as it is
        module.register_forward_hook(lambda owner, inputs, x: getattr(owner, name)(x))
