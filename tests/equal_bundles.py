"""Two installations of pbc compile the same models; their bundles must say and hold the same.

For changes that move code and must not move behaviour:

    python tests/equal_bundles.py OLD/.venv/bin/pbc NEW/.venv/bin/pbc

Compiles with fixed seeds and steps for two targets and all engines, and compares every entry of
the two bundles: bytes first; where they differ, graphs with their values numbered in order (a name
is no behaviour), tensors by name and bytes, the manifest without what names the compilation. Exit
code 1 where something else differs.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click
import onnx
import safetensors.numpy

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("generic-arm64", "generic-x86-64")
ENGINES = ("pytorch", "onnxruntime", "tvm")
SMALL = ("examples/custom_model.py:factory", "random", "3x64x64")
MOBILE = ("mobilenet_v3_large", "examples/weights/mobilenet_v3_large.safetensors", "3x96x96")
CASES = (
    (SMALL, "linear-probe", 2, TARGETS, ENGINES),
    (SMALL, "last-k:2", 1, TARGETS[:1], ENGINES),
    (SMALL, "norm", 1, TARGETS[1:], ENGINES),
    (MOBILE, "linear-probe", 1, TARGETS[:1], ENGINES),
)
# They name the compilation, not what it made.
UNCOMPARED = {"digest", "files", "provenance"}


def main(old: str, new: str) -> int:
    different = 0
    for (model, weights, shape), strategy, levels, targets, engines in CASES:
        for target in targets:
            for engine in engines:
                label = f"{model} {strategy} {target} {engine}"
                arguments = [
                    "compile", model, "--weights", weights, "--input", shape,
                    "--strategy", strategy, "--levels", str(levels), "--ladder", "even",
                    "--align-steps", "2",
                    "--calibration", "examples/calibration", "--seed", "3", "--classes", "10",
                    "--target", target, "--engine", engine,
                ]  # fmt: skip
                with tempfile.TemporaryDirectory() as folder:
                    entries = [
                        compiled(pbc, arguments, Path(folder) / name)
                        for pbc, name in ((old, "old.pbc"), (new, "new.pbc"))
                    ]
                found = differences(*entries)
                different += bool(found)
                click.echo(f"{'DIFFERENT' if found else 'equal':9}  {label}")
                for line in found:
                    click.echo(f"           {line}")
    return 1 if different else 0


def compiled(pbc: str, arguments: list[str], bundle: Path) -> dict[str, bytes]:
    """The entries of the bundle that one installation makes."""
    command = [pbc, *arguments, "-o", str(bundle)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(bundle) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def differences(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """One line for each entry that is not the same."""
    lines = [f"{name}: only one bundle has it" for name in sorted(old.keys() ^ new.keys())]
    manifests = [json.loads(entries["manifest.json"]) for entries in (old, new)]
    renamed = [dict(_numbered(manifest["features"])) for manifest in manifests]
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            one, other = (
                _content(name, entries[name], names)
                for entries, names in zip((old, new), renamed, strict=True)
            )
            if one != other:
                lines.append(f"{name}: {_difference(one, other)}")
    return lines


def _numbered(features: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"feature {number}") for number, name in enumerate(features)]


def _content(name: str, data: bytes, features: dict[str, str]) -> Any:
    """An entry without the names of values."""
    if name.endswith(".safetensors"):
        tensors = safetensors.numpy.load(data)
        return {key: hashlib.sha256(t.tobytes()).hexdigest() for key, t in sorted(tensors.items())}
    if name.endswith(".onnx"):
        return _onnx(onnx.load_model_from_string(data))
    if name.endswith(".so"):
        # TVM orders the terms of an address by where they lie in memory: the same installation
        # makes libraries that differ in a few instructions. Their functions and sizes are equal.
        return [len(data), sorted(re.findall(rb"__tvm_ffi\w+", data))]
    if not name.endswith(".json"):
        return hashlib.sha256(data).hexdigest()
    value = json.loads(data)
    if name == "manifest.json":
        value = {key: item for key, item in value.items() if key not in UNCOMPARED}
    if name.startswith("graphs/"):
        value = _graph(value)
    return _renamed(value, features)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def _graph(graph: dict[str, Any]) -> dict[str, Any]:
    """A declarative graph with its values numbered in order."""
    order = [*graph["inputs"], *graph["tensors"], *(node["name"] for node in graph["nodes"])]
    names = {name: f"%{number}" for number, name in enumerate(dict.fromkeys(order))}
    outputs = [names[value] for value in graph["outputs"].values()]
    return _renamed({**graph, "outputs": outputs}, names)  # type: ignore[no-any-return]


def _onnx(model: Any) -> list[Any]:
    """An ONNX model's nodes with their values numbered in order, and its tensors by name."""
    graph = model.graph
    order = [*(i.name for i in graph.input), *(i.name for i in graph.initializer)]
    order += [output for node in graph.node for output in node.output]
    names = {name: f"%{number}" for number, name in enumerate(dict.fromkeys(order))}
    nodes = [
        [node.op_type, [names.get(i, i) for i in node.input], [names[o] for o in node.output],
         sorted(a.SerializeToString(deterministic=True).hex() for a in node.attribute)]
        for node in graph.node
    ]  # fmt: skip
    tensors = [hashlib.sha256(t.SerializeToString(deterministic=True)).hexdigest()
               for t in graph.initializer]  # fmt: skip
    return [nodes, tensors, [names.get(o.name, o.name) for o in graph.output]]


def _difference(one: Any, other: Any, path: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        told = [f"only one has {path}.{key}" for key in sorted(one.keys() ^ other.keys())]
        told += [
            _difference(one[key], other[key], f"{path}.{key}")
            for key in sorted(one.keys() & other.keys())
            if one[key] != other[key]
        ]
        return "; ".join(told)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                return _difference(a, b, f"{path}[{number}]")
    shown = [re.sub(r"\s+", " ", str(value))[:100] for value in (one, other)]
    return f"{path}: {shown[0]} | {shown[1]}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
