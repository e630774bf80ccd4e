"""Declared shape of a manifest, and the bounds of what a bundle may make a device hold.

Sizes that no file of the bundle backs, such as a head's, are bounded here, before memory is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pbc.bundle.ladder import BFLOAT16, FLOAT32, INT8, LATENCY, MACS, PROFILE
from pbc.bundle.packing import MOST_RATIO
from pbc.util.shapes import (
    Shape,
    ShapeError,
    anything,
    check,
    dict_of,
    flag,
    integer,
    list_of,
    maybe,
    number,
    one_of,
    record,
    text,
)

MOST_FILES = 4096
_MOST_LEVELS = 64
_MOST_CLASSES = 1 << 20
_MOST_BATCH = 1 << 20
MOST_HEAD_VALUES = 1 << 26
_MOST_FEATURE_VALUES = 1 << 26
_MOST_PIXELS = 1 << 24
_MOST_VIEW_VALUES = 1 << 18
_GRAPH = re.compile(r"policy|(?:prefix|body|forward|update)/\d{1,3}(?:/[a-z_]+)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _matching(pattern: re.Pattern[str], expected: str) -> Shape:
    def shape(value: Any, at: str) -> None:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ShapeError(f"{at} is {str(value)[:60]!r}; expected {expected}")

    return shape


_SIZE = integer(1, 2**31)
_SIZES = list_of(_SIZE, most=8)
_NAME = text(1024)
_GRAPH_NAME = _matching(_GRAPH, "a graph's name, like body/0")
_LEVEL_NAME = _matching(re.compile(r"\d{1,3}"), "the number of a level")

_FILES = dict_of(
    record({"sha256": _matching(_SHA256, "a sha256"), "size_bytes": integer()}), most=MOST_FILES
)

_INPUT = record(
    {
        "shape": list_of(integer(1, 2**16), 3, 3),
        "mean": list_of(number(), 1, 3),
        "std": list_of(number(), 1, 3),
        "resize": _NAME,
        "interpolation": _NAME,
    },
    {"crop_pct": number(0.01, 10)},
)
_LEVEL = record(
    {
        "level": integer(0, _MOST_LEVELS),
        "cost": number(1e-9),
        "latency_ms": maybe(number(0)),
        "macs": number(0),
        "fidelity": maybe(number(-1, 1.000001)),
        "status": _NAME,
        "precision": one_of(FLOAT32, BFLOAT16, INT8),
        "resolution": maybe(list_of(integer(1, 2**16), 2, 2)),
        "accuracy_loss": maybe(number()),
    },
    {"merged_tokens": integer(0, 2**16)},
)
_BLOCK = record({"name": _NAME, "values": integer(), "trained": integer()}, more=True)
_TARGET = record(
    {"name": _NAME},
    {
        "arch": maybe(_NAME),
        "memory_bytes": maybe(integer()),
        "tags": dict_of(text()),
        "requires": dict_of(text()),
    },
    more=True,
)
_FLOOR = record(
    {
        "floor": number(),
        "right": number(),
        "off_by_one_at_most": number(),
        "violations": number(),
        "mean_cost": number(),
    },
    more=True,
)
_PREDICTOR = record({}, {"floors": list_of(_FLOOR, most=1024)}, more=True)
_REPORT = record(
    {},
    {
        "shipped": one_of("means", "network"),
        "held_out_samples": integer(),
        "network": maybe(
            record(
                {},
                {
                    "explained_variance": list_of(number(), 1, _MOST_LEVELS),
                    "floors": list_of(_FLOOR, most=1024),
                },
                more=True,
            )
        ),
        "means": _PREDICTOR,
        "cost_share": maybe(number()),
        "mixes": list_of(list_of(number(), 2, 2), most=1024),
    },
    more=True,
)
_POLICY = record(
    {"view": list_of(integer(1, 1024), 3, 3), "report": _REPORT},
    {"margins": list_of(number(), most=_MOST_LEVELS)},
)
_COST = record(
    {
        "prefix_ms": number(),
        "chunk": integer(1, _MOST_BATCH),
        "forward_ms": number(),
        "backward_ms": number(),  # a difference: noise can make it less than nothing
        "measured": flag,
    }
)
_COSTS = record({"machine": text(), "levels": list_of(_COST, 1, _MOST_LEVELS)}, more=True)
_SELF_TEST_LEVEL = record(
    {
        "before": list_of(number(), 1, 64),
        "after": list_of(number(), 1, 64),
        "learning_rate": number(0),
        "tolerance": number(0),
    },
    more=True,
)
_SELF_TEST_POLICY = record(
    {"fidelity": list_of(list_of(number(), most=_MOST_LEVELS), 1, 64), "tolerance": number(0)},
    more=True,
)
_EXPORT = record({"file": _NAME, "tensors": dict_of(text(2048))})
_HELD = ("parameters", "features", "saved", "gradients", "state", "workspace", "peak")
_MEMORY = record({f"{name}_bytes": integer() for name in _HELD}, more=True)

MANIFEST: Shape = record(
    {
        "schema": integer(),
        "digest": _matching(_SHA256, "a sha256"),
        "files": _FILES,
        "model": text(),
        "strategy": text(1 << 16),  # that of sparse back-propagation names its layers
        "engine": _NAME,
        "target": _TARGET,
        "requires": dict_of(anything, most=256),
        "input": _INPUT,
        "batch": integer(1, _MOST_BATCH),
        "head": dict_of(_SIZE, most=16),
        "parameters": dict_of(list_of(maybe(_SIZE), most=8), most=2**16),
        "features": dict_of(_SIZES, most=4096),
        "levels": list_of(_LEVEL, 1, _MOST_LEVELS),
        "graphs": dict_of(_NAME, most=MOST_FILES, key=_GRAPH_NAME),
        "trainable": _NAME,
    },
    {
        "packed": _FILES,
        "by_hand": dict_of(text(), most=256),
        "serial": integer(),
        "classes": maybe(list_of(text(1024), 1, _MOST_CLASSES)),
        "class_count": maybe(integer(1, _MOST_CLASSES)),
        "blocks": list_of(_BLOCK, most=2**16),
        "blocks_pattern": maybe(text()),
        "cost_model": one_of(MACS, LATENCY, PROFILE),
        "costs": maybe(_COSTS),
        "policy": maybe(_POLICY),
        "accuracy_map": maybe(list_of(list_of(number(), 2, 2), 1, 2**16)),
        "mixes": dict_of(list_of(list_of(number(0, 2**10), 3, 3), most=2**12), most=8),
        "memory": maybe(dict_of(_MEMORY, most=64)),
        "weights": dict_of(list_of(_NAME, most=MOST_FILES), most=MOST_FILES),
        "calls": _NAME,
        "export": dict_of(_EXPORT, most=_MOST_LEVELS, key=_LEVEL_NAME),
        "checks": dict_of(anything),
        "notes": list_of(text(2**14), most=2**14),
        "provenance": record(
            {},
            {
                "passes": list_of(text()),
                "command": text(2**16),
                **dict.fromkeys(("pbc", "torch", "python", "model", "weights"), text()),
                "weights_sha256": maybe(text()),
            },
            more=True,
        ),
        "self_test": record(
            {"levels": dict_of(_SELF_TEST_LEVEL, most=_MOST_LEVELS, key=_LEVEL_NAME)},
            {"policy": maybe(_SELF_TEST_POLICY)},
            more=True,
        ),
    },
    more=True,
)


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise ShapeError where a manifest is not as declared, or its parts do not fit together."""
    check(manifest, MANIFEST)
    _check_files(manifest)
    _check_sizes(manifest)
    costs, levels = manifest.get("costs"), len(manifest["levels"])
    if costs is not None and len(costs["levels"]) != levels:
        raise ShapeError(f"costs are of {len(costs['levels'])} levels; the ladder has {levels}")
    names, count = manifest.get("classes"), manifest.get("class_count")
    if names is not None and (len(set(names)) != len(names) or count not in (None, len(names))):
        raise ShapeError(f"classes are {len(names)} names, with class_count {count}")


def _check_files(manifest: Mapping[str, Any]) -> None:
    files = manifest["files"]
    named = {
        "trainable": [manifest["trainable"]],
        "graphs": list(manifest["graphs"].values()),
        "calls": [manifest["calls"]] if "calls" in manifest else [],
        "weights": [name for row in manifest.get("weights", {}).values() for name in row],
        "export": [row["file"] for row in manifest.get("export", {}).values()],
    }
    for key, names in named.items():
        for name in names:
            if name not in files:
                raise ShapeError(f"{key} names {name[:60]!r}, which is none of its files")
    for name, facts in manifest.get("packed", {}).items():
        if name not in files:
            raise ShapeError(f"packed names {name[:60]!r}, which is none of its files")
        if facts["size_bytes"] > MOST_RATIO * files[name]["size_bytes"]:
            raise ShapeError(
                f"packed.{name[:60]} claims {facts['size_bytes']} bytes of "
                f"{files[name]['size_bytes']}; at most {MOST_RATIO} times as many are unpacked"
            )
    if "body/0" not in manifest["graphs"]:
        raise ShapeError("graphs has no 'body/0'")


def _check_sizes(manifest: Mapping[str, Any]) -> None:
    _, height, width = manifest["input"]["shape"]
    if height * width > _MOST_PIXELS:
        raise ShapeError(f"input.shape has {height * width} pixels; at most {_MOST_PIXELS} are run")
    if not manifest["features"]:
        raise ShapeError("features is empty; a body reads at least one")
    view = (manifest.get("policy") or {}).get("view", ())
    if math.prod(view) > _MOST_VIEW_VALUES:
        raise ShapeError(
            f"policy.view has {math.prod(view)} values; at most {_MOST_VIEW_VALUES} are looked at"
        )
    for name, sizes in manifest["features"].items():
        if math.prod(sizes) > _MOST_FEATURE_VALUES:
            raise ShapeError(
                f"features.{name[:60]} has {math.prod(sizes)} values a sample; "
                f"at most {_MOST_FEATURE_VALUES} are held"
            )
    if "prefix/0" not in manifest["graphs"] and manifest["features"] != {
        "x": manifest["input"]["shape"]
    }:
        raise ShapeError("without a prefix the features are the images, x; it has others")
    unknown = sorted(manifest["head"].keys() - manifest["parameters"].keys())
    if unknown:
        raise ShapeError(f"head names {unknown[0][:60]!r}, which is none of its parameters")
    least = manifest.get("class_count") or 2
    for name in manifest["head"]:
        sizes = manifest["parameters"][name]
        if not sizes or sizes[0] is not None or None in sizes[1:]:
            raise ShapeError(
                f"parameters.{name[:60]} is {str(sizes)[:60]}; a head begins with its classes, null"
            )
        if least * math.prod(sizes[1:]) > MOST_HEAD_VALUES:
            raise ShapeError(
                f"parameters.{name[:60]} has {least * math.prod(sizes[1:])} values; "
                f"a head has at most {MOST_HEAD_VALUES}"
            )
