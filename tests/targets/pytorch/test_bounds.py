"""A graph that would take too much, or whose calls do not fit, is refused before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from pbc import bundle
from pbc.errors import PbcError
from pbc.runtime.engines.pytorch import bounds
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.engines.pytorch.graph import parse
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.engines.pytorch.resolved_graph import ResolvedGraph

IMAGES = np.zeros((3, *tiny.SPEC.shape), np.float32)
GOOD: list[dict[str, Any]] = [
    tiny.node("mean", "aten.mean.dim", "@x", [2, 3]),
    tiny.node("flat", "aten.repeat.default", "@mean", [1, 4]),
]


def features(path: Path, nodes: list[dict[str, Any]], output: str = "flat") -> np.ndarray:
    """Run a prefix of these nodes; the manifest promises eight features."""
    manifest, files = tiny.contents(fidelities=(), policy=False)
    graph = tiny.graph(["x"], {"flat": output}, {}, nodes)
    files["graphs/prefix-0.json"] = json.dumps(graph).encode()
    made = bundle.write(path / "m.pbc", manifest, files)
    return PyTorchEngine().load(made).prefix(0, IMAGES)["flat"]


def eight(source: str) -> list[dict[str, Any]]:
    """Eight features per photo that read a value."""
    return [
        tiny.node("mean", "aten.mean.default", source),
        tiny.node("flat", "aten.new_full.default", "@x", [3, 8], "@mean"),
    ]


BOMBS: dict[str, list[dict[str, Any]]] = {
    "10^12 ones": [tiny.node("z", "aten.ones.default", [10**6, 10**6])],
    "5 GB of zeros": [tiny.node("z", "aten.zeros.default", [36000, 36000])],
    "arange": [tiny.node("z", "aten.arange.default", 10**12)],
    "eye": [tiny.node("z", "aten.eye.default", 10**6)],
    "linspace": [tiny.node("z", "aten.linspace.default", 0, 1, 10**12)],
    "repeat": [tiny.node("z", "aten.repeat.default", "@x", [10**4, 10**3, 1, 1])],
    "pad": [tiny.node("z", "aten.constant_pad_nd.default", "@x", [0, 10**9])],
    "upsample": [tiny.node("z", "aten.upsample_nearest2d.vec", "@x", [10**5, 10**5], None)],
    "one hot by masks": [
        tiny.node("o", "aten.ones.default", [10**4, 10**3]),
        tiny.node("z", "aten.nonzero.default", "@o"),
        tiny.node("y", "aten.cat.default", ["@z", "@z", "@z", "@z"], 1),
    ],
    "sum of what is expanded": [
        tiny.node("o", "aten.ones.default", [1, 1]),
        tiny.node("e", "aten.expand.default", "@o", [10**9, 10**9]),
        tiny.node("z", "aten.sum.default", "@e"),
    ],
    "many at once": [
        *(tiny.node(f"z{i}", "aten.ones.default", [6000, 6000]) for i in range(5)),
        tiny.node("z", "aten.cat.default", [f"@z{i}" for i in range(5)]),
    ],
    "products": [
        tiny.node("o", "aten.ones.default", [9000, 9000]),
        *(tiny.node(f"y{i}", "aten.mm.default", "@o", "@o") for i in range(40)),
    ],
    "products inside a layer": [
        tiny.node("o", "aten.ones.default", [8000, 8000]),
        *(tiny.node(f"y{i}", "aten.linear.default", "@o", "@o") for i in range(5)),
    ],
    "a pool of everything": [
        tiny.node("o", "aten.ones.default", [1, 1, 2000, 2000]),
        tiny.node("z", "aten.max_pool2d.default", "@o", [1999, 1999], [1, 1], [999, 999]),
    ],
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_graph_that_takes_too_much(tmp_path: Path, bomb: list[dict[str, Any]]) -> None:
    with pytest.raises(PbcError, match=r"granted|cannot run: .*(overflow|exceed|storage)"):
        features(tmp_path, [*bomb, *eight("@x")])


MISFITS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "power": ([tiny.node("z", "operator.pow", 9, 10**9)], "more than 64 bits"),
    "list": ([tiny.node("z", "operator.mul", [0], 10**9)], "numbers alone"),
    "sum of powers": ([tiny.node("z", "operator.mul", 2**40, 2**40)], "more than 64 bits"),
    "arguments": ([tiny.node("z", "aten.conv2d.default", "@x")], "conv2d"),
    "kind": ([tiny.node("z", "aten.relu.default", "x")], "relu"),
    "shapes": ([tiny.node("z", "aten.mm.default", "@x", "@x")], "2D"),
    "keyword": ([tiny.node("z", "aten.relu.default", "@x", zz=1)], "relu"),
    "division": ([tiny.node("z", "operator.floordiv", 1, 0)], "by zero"),
}


@pytest.mark.parametrize(("nodes", "message"), MISFITS.values(), ids=MISFITS)
def test_calls_that_do_not_fit(tmp_path: Path, nodes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PbcError, match=rf"'z' \(.*\) cannot run: .*{message}"):
        features(tmp_path, [*nodes, *GOOD])


def test_values_that_only_a_real_run_knows(tmp_path: Path) -> None:
    beyond = [
        tiny.node("i", "aten.full.default", [3], 99, dtype={"dtype": "int64"}),
        tiny.node("z", "aten.index_select.default", "@x", 0, "@i"),
    ]
    with pytest.raises(PbcError, match=r"'z' \(aten.index_select.default\) cannot run: "):
        features(tmp_path, [*beyond, *GOOD])


def test_an_output_that_is_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match="output 'flat' is no tensor"):
        features(tmp_path, [tiny.node("n", "operator.add", 1, 2)], output="n")


def test_a_mask_counts_as_if_it_picked_everything() -> None:
    nodes = [
        tiny.node("mask", "aten.gt.Scalar", "@x", 0),
        tiny.node("picked", "aten.index.Tensor", "@x", ["@mask"]),
        tiny.node("total", "aten.sum.default", "@picked"),
    ]
    graph = parse(tiny.graph(["x"], {"total": "total"}, {}, nodes), OPS, "g")
    x = torch.randn(4, 5)
    found = ResolvedGraph(graph, lambda file, key: x, "g").run({"x": x})
    torch.testing.assert_close(found["total"], x[x > 0].sum())


def test_results_that_nothing_reads_are_freed_at_once() -> None:
    nodes = [tiny.node("unread", "aten.relu.default", "@x"), *GOOD]
    graph = parse(tiny.graph(["x"], {"flat": "flat"}, {}, nodes), OPS, "g")
    assert graph.calls[0].dead == (graph.calls[0].output,)


def test_only_memory_counts_and_that_once() -> None:
    x = torch.empty((1000, 10), device="meta")
    views = [x, x.t(), x.expand(5, 1000, 10), [x[:1]]]
    assert bounds.Memory(()).bytes_with(views) == 40_000
    assert bounds.Memory([x]).bytes_with([*views, torch.empty(3, device="meta")]) == 12
