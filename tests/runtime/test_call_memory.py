"""However many photos the runtime puts into a call, what it takes stays within bounds."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import tiny_onnx
from onnx import helper, numpy_helper

from pbc import bundle
from pbc.bundle import Bundle
from pbc.data import ImageFolder
from pbc.runtime.engines import guarded
from pbc.runtime.runtime import Runtime

ENGINES = ("pytorch", "onnxruntime")
PHOTOS = 42
# A photo's 3 KiB become 50 MiB, and those once more.
TILES = 130
MOST_BYTES = 1 << 30
# The peak as the process knows it: what its parent had when it forked counts in what wait tells.
MEASURED = """
import sys
from pbc.cli import main
try:
    sys.exit(main())
finally:
    print(open("/proc/self/status").read())
"""


def contents(engine: str, kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a bundle whose level 0 tiles its images, in the prefix or in the step."""
    options: dict[str, Any] = {"fidelities": (), "policy": False, "batch": PHOTOS}
    if engine == "onnxruntime":
        manifest, files = tiny_onnx.contents(kind, **options)
        for name in ("prefix-0",) if kind == "probe" else ("body-0", "forward-0"):
            files[f"onnx/{name}.onnx"] = _tiling(files[f"onnx/{name}.onnx"])
        return manifest, files
    manifest, files = tiny.contents(kind, **options)
    name = f"graphs/{'prefix' if kind == 'probe' else 'body'}-0.json"
    graph = json.loads(files[name])
    # What grows with the trained bias, a backward of the exponential reads.
    source = "@conv" if kind == "whole" else "@x"
    graph["nodes"][1:1] = [
        tiny.node("tiled", "aten.repeat.default", source, [1, 1, TILES, TILES]),
        tiny.node("grown", "aten.exp.default", "@tiled"),
        tiny.node("one", "aten.mean.default", "@grown"),
        tiny.node("none", "aten.mul.Scalar", "@one", 0.0),
        tiny.node("sum", "aten.add.Tensor", "@conv", "@none"),
    ]
    graph["nodes"][6]["args"] = [{"ref": "sum"}]
    assert graph["nodes"][6]["name"] == "relu"
    files[name] = json.dumps(graph).encode()
    return manifest, files


def _tiling(model: bytes) -> bytes:
    """Add what is tiled, times nothing, to the last result; a step saves it, too."""
    proto = onnx.load_model_from_string(model)
    graph = proto.graph
    repeats = np.array([1, 1, TILES, TILES], np.int64)
    graph.initializer.append(numpy_helper.from_array(repeats, "repeats"))
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    identity = next(node for node in graph.node if node.output[0] in ("flat", "logits"))
    added = [
        helper.make_node("Tile", ["x", "repeats"], ["saved/tiled"]),
        helper.make_node("ReduceMean", ["saved/tiled"], ["one"], keepdims=0),
        helper.make_node("Mul", ["one", "nothing"], ["none"]),
        helper.make_node("Add", [identity.input[0], "none"], ["sum"]),
    ]
    identity.input[0] = "sum"
    nodes = [*list(graph.node)[:-1], *added, graph.node[-1]]
    nodes.sort(key=lambda node: node is identity)
    del graph.node[:]
    graph.node.extend(nodes)
    if any(node.output[0] == "losses" for node in nodes):
        graph.output.append(helper.make_tensor_value_info("saved/tiled", 1, ["b", 3, None, None]))
    made: bytes = proto.SerializeToString()
    return made


def train(made: Bundle, photos: Path, out: Path, *words: str) -> tuple[int, str, int]:
    """Run `pbc train` in a process that may take 2 GiB; return status, errors and peak bytes."""
    command = ["train", str(made.path), str(photos), "-o", str(out), "--epochs", "1", *words]
    with (out.parent / "errors").open("wb") as errors:
        process = subprocess.run(
            [sys.executable, "-c", MEASURED, *command, "--threads", "1", "--val", "none"],
            stdout=subprocess.PIPE,
            stderr=errors,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (2 * MOST_BYTES,) * 2),
        )
    peak = int(re.findall(rb"VmHWM:\s*(\d+) kB", process.stdout)[-1]) * 1024
    return process.returncode, (out.parent / "errors").read_text(), peak


@pytest.mark.parametrize("engine", ENGINES)
def test_a_call_of_many_photos_is_made_in_parts(engine: str, tmp_path: Path) -> None:
    made = bundle.write(tmp_path / "m.pbc", *contents(engine, "probe"))
    photos = tiny.photos(tmp_path / "photos", PHOTOS // 3)
    status, text, peak = train(made, photos, tmp_path / "mine")
    assert status == 0, text
    assert peak < MOST_BYTES
    runtime = Runtime.open(made.path)
    images = ImageFolder.open(photos, runtime.spec).images(np.arange(PHOTOS))
    executable = guarded.load(runtime.engine, made, threads=1)
    whole = executable.prefix(0, images)["flat"]
    alone = [executable.prefix(0, images[at : at + 1])["flat"] for at in range(PHOTOS)]
    np.testing.assert_allclose(whole, np.concatenate(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mini_batch_that_does_not_fit_is_refused(engine: str, tmp_path: Path) -> None:
    made = bundle.write(tmp_path / "m.pbc", *contents(engine, "whole"))
    photos = tiny.photos(tmp_path / "photos", PHOTOS // 3)
    status, text, peak = train(made, photos, tmp_path / "mine")
    assert status == 1
    assert text.count("error:") == 1, text
    assert "a smaller --batch needs less" in text
    assert peak < MOST_BYTES
    status, text, peak = train(made, photos, tmp_path / "small", "--batch", "1")
    assert status == 0, text
