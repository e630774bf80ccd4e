"""The manifest: a bundle's words about itself, from the program that it was made of."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch

import pbc
from pbc.bundle.requires import told_apart
from pbc.frontend.head import OPEN_CLASSES
from pbc.frontend.origin import without_folder
from pbc.ir.dims import Dims
from pbc.ir.graph import PARAMETER, placeholders, shape_of
from pbc.ir.levels import ladder
from pbc.ir.program import Policy, Program
from pbc.training_graph.memory import Recorded, step_memory
from pbc.util.processor import machine

TRAINABLE = "trainable.safetensors"
DIMS = "dims.json"


def measured_costs(program: Program) -> dict[str, Any] | None:
    """Return what levels cost on this machine, and its name; None if nothing was measured."""
    if not program.costs:
        return None
    return {"machine": machine(), "levels": [asdict(cost) for cost in program.costs]}


def training_memory(
    program: Program, recorded: Recorded | None = None
) -> dict[str, dict[str, int]] | None:
    """Return what training holds at level 0, by optimizer; None where no step is derived.

    For the batch and the classes that are expected: as many as an added head has, if none are.
    recorded: what the engine runs of that step, where it is known.
    """
    level = program.levels[0]
    if level.forward is None:
        return None
    found = step_memory(level, program.request.batch, expected_classes(program), recorded)
    return {optimizer: memory.to_json() for optimizer, memory in found.items()}


def expected_classes(program: Program) -> int:
    """Return for how many classes memory is told."""
    return program.network.head.fixed or program.request.class_count or OPEN_CLASSES


def manifest(
    program: Program,
    requires: dict[str, str],
    graph_files: dict[str, str],
    contents: dict[str, Any],
) -> dict[str, Any]:
    """Return the manifest's own fields (docs/architecture.md, «Bundle»); the writer adds the files.

    contents: what the lowering says about the artifacts.
    """
    request, network = program.request, program.network
    levels = ladder(program.levels, program.cost_model)
    versions, by_hand = told_apart(requires)
    return {
        "model": without_folder(network.name),
        "strategy": request.strategy,
        "engine": request.engine,
        "target": request.target.to_json(),
        "requires": versions,
        "by_hand": by_hand,
        "input": network.input.to_json(),
        "batch": request.batch,
        "classes": None if request.class_names is None else list(request.class_names),
        "class_count": network.head.fixed,
        "head": dict(network.head.parameters),
        "blocks": [vars(block) for block in network.blocks],
        "blocks_pattern": request.blocks,
        "parameters": {
            name: [
                None if name in network.head.parameters and axis == 0 else size
                for axis, size in enumerate(p.shape)
            ]
            for name, p in program.parameters.items()
        },
        "features": {
            node.name: list(shape_of(node)[1:])
            for node in placeholders(program.levels[0].body)
            if PARAMETER not in node.meta
        },
        "cost_model": levels.cost_model,
        "levels": levels.to_json(),
        "costs": measured_costs(program),
        "memory": program.memory,
        "policy": None if program.policy is None else policy(program.policy),
        "accuracy_map": [list(point) for point in program.accuracy_map] or None,
        "mixes": {kind: [list(mix) for mix in found] for kind, found in program.mixes.items()},
        "graphs": graph_files,
        **contents,
        "trainable": TRAINABLE,
        "checks": program.checks,
        "notes": list(program.notes),
        "provenance": {
            "pbc": pbc.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "model": without_folder(network.name),
            "weights": network.weights,
            "weights_sha256": network.weights_sha256,
            "command": request.command,
            "seed": request.seed,
            "passes": list(program.history),
        },
    }


def policy(made: Policy) -> dict[str, Any]:
    """Return what the manifest says about a policy."""
    (view,) = placeholders(made.graph)
    return {
        "view": list(shape_of(view)[1:]),
        "report": made.report,
        "margins": list(made.margins),
    }


def trainable_file(program: Program) -> bytes:
    """Return the initial values of what trains, without the head, which the device seeds."""
    head = program.network.head.parameters
    return safetensors.torch.save(
        {n: p.detach().contiguous() for n, p in program.parameters.items() if n not in head}
    )


def dims_table(dims: Dims) -> dict[str, Any]:
    """Return what `pbc inspect --dims` shows."""
    return {
        "macs": dims.macs(),
        "prunable_share": dims.prunable_share(),
        "operators_without_rule": dims.unknown,
        "dimensions": [
            {
                "name": d.name,
                "size": d.size,
                "kind": d.kind,
                "independent": d.independent,
                "reason": d.reason,
                "tensors": len(d.slots),
            }
            for d in dims.dimensions
        ],
    }
