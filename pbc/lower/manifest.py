"""The manifest: what a bundle says about itself, from the program that it was made of."""

from __future__ import annotations

import platform
from typing import Any

import safetensors.torch
import torch

import pbc
from pbc.ir.dims import Dims
from pbc.ir.program import POLICY, Program, body, feature_names, placeholders, shape_of

TRAINABLE = "trainable.safetensors"
DIMS = "dims.json"


def manifest(
    program: Program,
    requires: dict[str, str],
    graph_files: dict[str, str],
    contents: dict[str, Any],
) -> dict[str, Any]:
    """The manifest's own fields (docs/architecture.md, «Bundle»); the writer adds the files.

    contents: what the lowering says about the artifacts.
    """
    head = program.head.parameters
    by_name = {node.name: node for node in placeholders(program.graphs[body(0)])}
    return {
        "model": program.provenance.model,
        "strategy": program.strategy,
        "engine": program.engine,
        "target": program.target.to_json(),
        "requires": requires,
        "input": program.input.to_json(),
        "batch": program.batch,
        "classes": None if program.class_names is None else list(program.class_names),
        "class_count": program.class_count,
        "head": {n: width for n, width in head.items() if n in program.parameters},
        "blocks": [vars(block) for block in program.blocks],
        "blocks_pattern": program.blocks_pattern,
        "parameters": {
            name: [
                None if name in head and axis == 0 else size for axis, size in enumerate(p.shape)
            ]
            for name, p in program.parameters.items()
        },
        "features": {
            name: list(shape_of(by_name[name])[1:])
            for name in feature_names(program.graphs[body(0)])
        },
        "cost_model": program.ladder.cost_model,
        "levels": program.ladder.to_json(),
        "policy": None if POLICY not in program.graphs else policy(program),
        "accuracy_map": [list(point) for point in program.accuracy_map] or None,
        "graphs": graph_files,
        **contents,
        "trainable": TRAINABLE,
        "checks": program.checks,
        "notes": list(program.notes),
        "provenance": {
            "pbc": pbc.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "model": program.provenance.model,
            "weights": program.provenance.weights,
            "weights_sha256": program.provenance.weights_sha256,
            "command": program.provenance.command,
            "seed": program.seed,
            "passes": list(program.history),
        },
    }


def policy(program: Program) -> dict[str, Any]:
    (view,) = placeholders(program.graphs[POLICY])
    return {
        "view": list(shape_of(view)[1:]),
        "report": program.policy_report,
        "margins": list(program.policy_margins),
    }


def trainable_file(program: Program) -> bytes:
    """Initial values of what trains, without the head, which the device sizes and seeds."""
    head = program.head.parameters
    return safetensors.torch.save(
        {n: p.detach().contiguous() for n, p in program.parameters.items() if n not in head}
    )


def dims_table(dims: Dims) -> dict[str, Any]:
    """What `pbc inspect --dims` shows."""
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
