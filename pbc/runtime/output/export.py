"""A personal model as one file that other programs read.

ONNX: prefix and body of one level joined, with the trained parameters, for any ONNX runtime.
Safetensors: the trained parameters alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pbc import __version__
from pbc.bundle import Bundle
from pbc.errors import PbcError, UsageError
from pbc.runtime.engines.onnxruntime import wire as onnx_wire
from pbc.runtime.output.personal import deployed_level, stored
from pbc.util.atomic import replace_bytes, replacing

SUFFIXES = (".onnx", ".safetensors")
# A protobuf message ends below 2 GiB; a tensor's name and shape need far less than the rest.
_LARGEST_BYTES = 2**31 - 2**20
_THETA = "θ"


def export(root: Path | str, path: Path | str, *, level: int | None = None) -> None:
    """Write the personal model of a folder to a file, in the format that its suffix says.

    level: which of the bundle's networks an ONNX file holds; by default the one that it runs at.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"cannot tell a format from {path.name!r}; end it in .onnx or .safetensors"
        )
    if path.suffix == ".safetensors" and level is not None:
        raise UsageError("all levels share the trained parameters; --level is for .onnx files")
    bundle, model, theta = stored(root)
    if path.suffix == ".safetensors":
        replace_bytes(path, safetensors.numpy.save(theta, _facts(bundle, model)))
    else:
        _write_onnx(path, bundle, model, theta, deployed_level(model) if level is None else level)


def _facts(bundle: Bundle, model: Mapping[str, Any]) -> dict[str, str]:
    """Return what a program needs beside the numbers: labels by index, how to prepare an image."""
    return {
        "pbc.version": __version__,
        "pbc.model": bundle.manifest["model"],
        "pbc.bundle": bundle.digest,
        "pbc.classes": json.dumps(model["classes"], ensure_ascii=False),
        "pbc.input": json.dumps(bundle.manifest["input"], sort_keys=True),
    }


def _write_onnx(
    path: Path,
    bundle: Bundle,
    model: Mapping[str, Any],
    theta: Mapping[str, np.ndarray],
    level: int,
) -> None:
    graphs = bundle.manifest.get("export")
    if not graphs:
        raise PbcError(
            f"{bundle.path} was compiled for the {bundle.manifest['engine']} engine and holds no "
            "ONNX graphs; compile the model with --engine onnxruntime and train that, "
            "or export the trained parameters alone as .safetensors"
        )
    if str(level) not in graphs:
        raise UsageError(f"no level {level}; this model has levels 0 to {len(graphs) - 1}")
    graph = bundle.read(graphs[str(level)]["file"])
    tensors: dict[str, str] = graphs[str(level)]["tensors"]
    facts = {**_facts(bundle, model), "pbc.level": str(level)}
    with replacing(path) as file:
        size_bytes = file.write(graph) + file.write(onnx_wire.metadata(facts))
        for source, keys in _by_file(tensors).items():
            held = theta if source == _THETA else bundle.tensors(source)
            for name, key in keys.items():
                if key not in held:
                    raise PbcError(f"{bundle.path}: {source} has no tensor {key!r} to export")
                size_bytes += held[key].nbytes
                if size_bytes > _LARGEST_BYTES:
                    raise PbcError(
                        f"cannot write {path}: the network is larger than the 2 GiB that an ONNX "
                        "file holds; --level with a higher number exports a smaller one"
                    )
                file.write(onnx_wire.initializer(name, held[key]))


def _by_file(tensors: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Group {name: "file#key" or θ} as {file: {name: key}}: one file is in memory at a time."""
    sources: dict[str, dict[str, str]] = {}
    for name, source in sorted(tensors.items()):
        file, _, key = (_THETA, "", name) if source == _THETA else source.partition("#")
        sources.setdefault(file, {})[name] = key
    return sources
