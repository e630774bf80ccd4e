"""What each choice of a scheme takes of memory, read off one derived gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from pbc.bundle.optimizers import OPTIMIZERS
from pbc.ir.graph import graph_inputs, graph_outputs, output_nodes, placeholders
from pbc.ir.program import Program
from pbc.ir.rewrite import ancestors
from pbc.lower.manifest import expected_classes, training_memory
from pbc.scheme.layers import Layer
from pbc.scheme.scheme import Scheme
from pbc.training_graph.autodiff import Gradient, differentiate
from pbc.training_graph.memory import tensor_bytes
from pbc.training_graph.names import SAVED
from pbc.training_graph.optimizers import with_update

OPTIMIZER = "sgd"
"""For whose state budgets are: the one that trains where none is asked for."""
_EXTRA = ("saved", "gradients", "state")


def everything(found: Sequence[Layer]) -> Scheme:
    """Return the scheme in which of every layer something trains, half where a part can."""
    half = {layer.name: layer.fractions[-2:][0] for layer in found}
    return Scheme(len(found), half)


@dataclass(frozen=True)
class Costs:
    """Bytes that training holds, as far as they add up: saved, gradients, optimizer state.

    bases: with the head and the biases of the last k layers, for k = 0, 1, … layers: beside that,
    with a share of a layer's weight, where all layers behind it train their biases.
    """

    bases: tuple[int, ...]
    layers: Mapping[str, Mapping[Fraction, int]]

    @classmethod
    def of(cls, program: Program, found: Sequence[Layer]) -> Costs:
        """Read them off the gradient of a program that trains `everything` of these layers.

        What a gradient reads of what is saved is needed by whatever scheme has it. A part of a
        weight takes a part of that: the channels that it reads, and as much of its gradient.
        """
        gradient = differentiate(program.levels[0].body, program.open_axes)
        reads = _Reads(program, gradient)
        head = set(program.network.head.parameters)
        trained = set(head)
        bases = [reads.bytes_of(trained)]
        layers: dict[str, Mapping[Fraction, int]] = {}
        chosen = everything(found).fractions
        for layer in reversed(found):
            if layer.bias is not None:
                trained.add(layer.bias)
            bases.append(reads.bytes_of(trained))
            part = chosen[layer.name]
            theta = f"{layer.name}.weight"
            if part < 1:
                theta = f"{layer.name}.parametrizations.weight.original"
            own = reads.bytes_of(trained | {theta}) - bases[-1]
            layers[layer.name] = {
                share: own * layer.count(share) // layer.count(part) for share in layer.fractions
            }
        return cls(tuple(bases), layers)


class _Reads:
    """Which of the saved tensors each parameter's gradient reads, and the sizes of both."""

    def __init__(self, program: Program, gradient: Gradient) -> None:
        sizes = program.request.batch, expected_classes(program)
        self._saved = tensor_bytes(gradient.forward, *sizes)
        self._gradients = tensor_bytes(gradient.backward, *sizes)
        inputs = placeholders(gradient.backward)
        names = dict(zip(inputs, graph_inputs(gradient.backward), strict=True))
        results = zip(
            graph_outputs(gradient.backward), output_nodes(gradient.backward), strict=True
        )
        self._reads = {
            parameter: {
                names[node]
                for node in ancestors([result])
                if node in names and names[node].startswith(SAVED)
            }
            for parameter, result in results
        }

    def bytes_of(self, parameters: Iterable[str]) -> int:
        """Bytes of what is saved for these, their gradients and the optimizer's state."""
        # The logits reach a parameter that no gradient does, too: it takes nothing.
        reached = [name for name in parameters if name in self._reads]
        saved = set[str]().union(*(self._reads[name] for name in reached))
        copies = 1 + len(OPTIMIZERS[OPTIMIZER].state)
        return sum(self._saved[name] for name in saved) + copies * sum(
            self._gradients[name] for name in reached
        )


def taken(program: Program) -> Mapping[str, int]:
    """Return what training a program takes by the memory model: `extra` and `peak` bytes."""
    level = program.levels[0]
    gradient = differentiate(level.body, program.open_axes)
    updates = {OPTIMIZER: with_update(gradient.backward, OPTIMIZER)}
    level = replace(level, forward=gradient.forward, updates=updates)
    memory = training_memory(replace(program, levels=(level,)))
    assert memory is not None
    found = memory[OPTIMIZER]
    extra = sum(found[f"{part}_bytes"] for part in _EXTRA)
    return {"extra": extra, "peak": found["peak_bytes"]}
