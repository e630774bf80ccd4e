"""Compression of what a bundle ships: frozen weights become others, and level 0 with them.

Which weights: float32 of two axes and more, and of at least 2,048 elements; norms and biases are
few, and suffer most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Parameter

from pbc.bundle.ladder import ALIGNED, INT8
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.proxies import parallel
from pbc.proxies.codebooks import is_large
from pbc.proxies.fidelity import boundary_nodes
from pbc.proxies.sample_fidelity import measured, sample_fidelity

CHECK = "compression"
Change = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Makes new weights of the old ones, by names that mean nothing to it."""


def weight_names(graph: GraphModule) -> list[str]:
    """Return the frozen tensors of a graph that are compressed."""
    tensors = {name: get_tensor(graph, name) for name in tensor_names(graph)}
    return [
        n for n, tensor in tensors.items() if isinstance(tensor, Parameter) and is_large(tensor)
    ]


def replaced(program: Program, change: Change) -> Program:
    """Return the program with the weights of all its levels changed, all at once."""
    program = program.copy()
    places = [
        (f"{number}/{part}/{name}", graph, name)
        for number, level in enumerate(program.levels)
        for part, graph in enumerate(level.frozen)
        if graph is level.body or level.precision != INT8
        for name in weight_names(graph)
    ]
    weights = {key: get_tensor(graph, name).detach() for key, graph, name in places}
    changed = change(weights) if weights else {}
    for key, graph, name in places:
        replace_tensor(graph, name, changed[key])
    return program


def judged(before: Program, after: Program, name: str, notes: Sequence[str] = ()) -> Program:
    """Return the compressed program, with level 0 for its original from here on.

    `checks.compression` gets, by the pass's name, level 0's fidelity to what it was before; null,
    and a note, without calibration data. Aligned levels are measured against the new level 0.
    """
    level0, data = after.levels[0], before.calibration
    fidelity = None
    if data is None:
        notes = (*notes, f"no --calibration: {name} was not measured")
    elif before.levels[0].prefix is not None or boundary_nodes(before.levels[0].body):
        found = parallel.once(lambda: sample_fidelity(before, [level0], data, data.held_out))
        fidelity = float(found.mean())
        notes = (*notes, f"{name}: level 0 has a fidelity of {fidelity:.4f} to what it was before")
    network = replace(after.network, reference=after.logits(0, after.network.example))
    checks = dict(after.checks)
    checks[CHECK] = {**checks.get(CHECK, {}), name: {"fidelity": fidelity}}
    after = replace(after, network=network, checks=checks, notes=(*after.notes, *notes))
    proxies = [level for level in after.levels[1:] if level.status == ALIGNED]
    return after if data is None else measured(after, proxies, data)
