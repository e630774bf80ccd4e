"""A hand-made bundle and photos of three colours: what the device side is tested with.

The networks are a convolution, a mean over the image, and a linear head; the proxies' convolutions
are perturbed. No compiler and no engine is needed to write one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from pbc import bundle
from pbc.bundle import Bundle
from pbc.data import InputSpec

COLOURS = {"blue": (0.1, 0.2, 0.9), "green": (0.2, 0.9, 0.1), "red": (0.9, 0.1, 0.2)}
SPEC = InputSpec((3, 16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CHANNELS = 8
PIXELS = 3 * 16 * 16
WEIGHTS = "weights/level-{}.safetensors"

Json = dict[str, Any]


def photos(
    root: Path, per_class: int = 6, seed: int = 0, classes: Sequence[str] = tuple(COLOURS)
) -> Path:
    """Write noisy photos of each colour into class folders, some dim and some bright."""
    random = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            colour = np.array(COLOURS[name]) * random.uniform(0.3, 1.0)
            pixels = np.clip(colour + random.normal(0, 0.08, (20, 24, 3)), 0, 1)
            image = Image.fromarray((255 * pixels).astype(np.uint8))
            image.save(root / name / f"{index:03}.png")
    return root


def node(name: str, op: str, *args: Any, **kwargs: Any) -> Json:
    """One node; an argument like "@x" refers to the value x."""

    def encode(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("@"):
            return {"ref": value[1:]}
        return [encode(item) for item in value] if isinstance(value, list) else value

    return {
        "name": name,
        "op": op,
        "args": [encode(value) for value in args],
        "kwargs": {key: encode(value) for key, value in kwargs.items()},
    }


def graph(
    inputs: Sequence[str],
    outputs: Mapping[str, str],
    tensors: Mapping[str, str],
    nodes: Sequence[Json],
) -> Json:
    return {
        "format": 2,
        "precision": "float32",
        "inputs": list(inputs),
        "outputs": dict(outputs),
        "tensors": dict(tensors),
        "nodes": list(nodes),
    }


_CONV = [
    node("conv", "aten.conv2d.default", "@x", "@w", "@b", [2, 2], [1, 1]),
    node("relu", "aten.relu.default", "@conv"),
]
_POOL = [
    node("pool", "aten.adaptive_avg_pool2d.default", "@relu", [1, 1]),
    node("flat", "aten.view.default", "@pool", [-1, CHANNELS]),
]
_HEAD = node("logits", "aten.linear.default", "@flat", "@head.weight", "@head.bias")
THETA = ["head.weight", "head.bias"]


def _frozen(level: int) -> dict[str, str]:
    file = WEIGHTS.format(level)
    return {"w": f"{file}#conv.weight", "b": f"{file}#conv.bias"}


def _probe(level: int) -> tuple[Json, Json]:
    """Everything frozen is in the prefix; all levels share the body."""
    prefix = graph(["x"], {"flat": "flat"}, _frozen(level), [*_CONV, *_POOL])
    return prefix, graph(["flat", *THETA], {"logits": "logits"}, {}, [_HEAD])


def _maps(level: int) -> tuple[Json, Json]:
    """The prefix sends a feature map; the body pools it."""
    prefix = graph(["x"], {"map": "relu"}, _frozen(level), _CONV)
    body = [node("pool", "aten.adaptive_avg_pool2d.default", "@map", [1, 1]), _POOL[1], _HEAD]
    return prefix, graph(["map", *THETA], {"logits": "logits"}, {}, body)


def _bodies(level: int) -> tuple[Json, Json]:
    """Each level scales the features in its own body."""
    prefix = graph(["x"], {"flat": "flat"}, _frozen(level), [*_CONV, *_POOL])
    scale = {"s": f"{WEIGHTS.format(level)}#scale"}
    nodes = [
        node("scaled", "aten.mul.Tensor", "@flat", "@s"),
        node("logits", "aten.linear.default", "@scaled", "@head.weight", "@head.bias"),
    ]
    return prefix, graph(["flat", *THETA], {"logits": "logits"}, scale, nodes)


def _whole(level: int) -> tuple[None, Json]:
    """The convolution's bias trains: there is no prefix."""
    frozen = {"w": f"{WEIGHTS.format(level)}#conv.weight"}
    nodes = [*_CONV, *_POOL, _HEAD]
    return None, graph(["x", "b", *THETA], {"logits": "logits"}, frozen, nodes)


def _pixels(level: int) -> tuple[Json, Json]:
    """The pixels are the features: many more than photos, as a real network's are."""
    flat = node("flat", "aten.reshape.default", "@x", [-1, PIXELS])
    prefix = graph(["x"], {"flat": "flat"}, {}, [flat])
    return prefix, graph(["flat", *THETA], {"logits": "logits"}, {}, [_HEAD])


_KINDS = {"pixels": _pixels, "probe": _probe, "maps": _maps, "bodies": _bodies, "whole": _whole}


def _policy() -> Json:
    """Bright images tolerate level 1, very bright ones level 2."""
    nodes = [
        node("rows", "aten.reshape.default", "@view", [-1, 48]),
        node("mean", "aten.mean.dim", "@rows", [1], True),
        node("steep", "aten.linear.default", "@mean", "@w", "@b"),
        node("fidelity", "aten.sigmoid.default", "@steep"),
    ]
    file = "weights/policy.safetensors"
    tensors = {"w": f"{file}#weight", "b": f"{file}#bias"}
    return graph(["view"], {"fidelity": "fidelity"}, tensors, nodes)


def contents(
    kind: str = "probe",
    *,
    classes: Sequence[str] | None = None,
    class_count: int | None = None,
    fidelities: Sequence[float | None] = (0.97, 0.93),
    policy: bool = True,
    promised: bool = False,
    accuracy_map: Sequence[Sequence[float]] | None = ((0.9, 0.5), (1.0, 0.0)),
    mixes: Mapping[str, Sequence[Sequence[float]]] | None = None,
    batch: int = 4,
) -> tuple[Json, dict[str, bytes]]:
    """Return the manifest and the files of a bundle of level 0 and its proxies.

    promised: the policy is one that ships the levels' own fidelities for every sample.
    """
    random = np.random.default_rng(7)
    weight = random.normal(0, 0.5, (CHANNELS, 3, 3, 3)).astype(np.float32)
    bias = random.normal(0, 0.1, CHANNELS).astype(np.float32)
    files: dict[str, bytes] = {}
    graphs: dict[str, str] = {}

    def add(name: str, content: Json) -> None:
        graphs[name] = f"graphs/{name.replace('/', '-')}.json"
        files[graphs[name]] = json.dumps(content).encode()

    for level in range(len(fidelities) + 1):
        noise = 0.1 * level
        tensors = {
            "conv.weight": weight + noise * random.normal(0, 1, weight.shape).astype(np.float32),
            "conv.bias": bias,
            "scale": np.array([1 + 0.1 * level], np.float32),
        }
        files[WEIGHTS.format(level)] = safetensors.numpy.save(tensors)
        prefix, body = _KINDS[kind](level)
        if prefix is not None:
            add(f"prefix/{level}", prefix)
        add(f"body/{level}", body)
    if policy:
        add("policy", _policy())
        count = len(fidelities)
        steep = {
            "weight": np.full((count, 1), 8, np.float32),
            "bias": np.linspace(8, 4, count, dtype=np.float32),
        }
        files["weights/policy.safetensors"] = safetensors.numpy.save(steep)
    width = PIXELS if kind == "pixels" else CHANNELS
    parameters: dict[str, list[int | None]] = {
        "head.weight": [None, width],
        "head.bias": [None],
    }
    trainable = {}
    if kind == "whole":
        parameters["b"] = [CHANNELS]
        trainable["b"] = bias
    files["trainable.safetensors"] = safetensors.numpy.save(trainable)
    features = {
        "maps": {"map": [CHANNELS, 8, 8]},
        "whole": {"x": list(SPEC.shape)},
        "pixels": {"flat": [PIXELS]},
    }.get(kind, {"flat": [CHANNELS]})
    levels = [_level(0, 1.0, "original")]
    for number, fidelity in enumerate(fidelities, 1):
        levels.append(_level(number, fidelity, "unaligned" if fidelity is None else "aligned"))
    manifest = {
        "model": "tiny",
        "strategy": "linear-probe",
        "engine": "pytorch",
        "target": {"name": "host"},
        "requires": {},
        "input": SPEC.to_json(),
        "batch": batch,
        "classes": list(classes) if classes is not None else None,
        "class_count": class_count,
        "head": {"head.weight": width, "head.bias": width},
        "parameters": parameters,
        "features": features,
        "cost_model": "macs",
        "levels": levels,
        "accuracy_map": accuracy_map and [list(point) for point in accuracy_map],
        "mixes": {kind: [list(mix) for mix in rows] for kind, rows in (mixes or {}).items()},
        "policy": {"view": [3, 4, 4], "report": {"shipped": "means"} if promised else {}}
        if policy
        else None,
        "graphs": graphs,
        "trainable": "trainable.safetensors",
        "checks": {},
        "notes": [],
        "provenance": {"weights": "random", "pbc": "0", "torch": "0", "command": "tiny"},
    }
    return manifest, files


def _level(number: int, fidelity: float | None, status: str) -> Json:
    return {
        "level": number,
        "cost": 1 - 0.2 * number,
        "latency_ms": None,
        "macs": 1e5 * (1 - 0.2 * number),
        "fidelity": fidelity,
        "status": status,
        "precision": "float32",
        "resolution": None,
        "accuracy_loss": None,
    }


def costs(path: Path, levels: int = 3) -> Path:
    """Write costs to decide by, so that two runs decide alike: each level saves a fifth."""
    rows = [
        {
            "prefix_ms": 1 - 0.2 * level,
            "chunk": 16,
            "forward_ms": 0.1,
            "backward_ms": 0.1,
            "measured": True,
        }
        for level in range(levels)
    ]
    shared = {"decode_ms": 0.01, "gather_ms": 0.01, "policy_ms": 0.01}
    path.write_text(json.dumps({"levels": rows, **shared}))
    return path


def write(path: Path, kind: str = "probe", *, as_folder: bool = False, **options: Any) -> Bundle:
    """Write the bundle that `contents` describes."""
    manifest, files = contents(kind, **options)
    return bundle.write(path, manifest, files, as_folder=as_folder)
