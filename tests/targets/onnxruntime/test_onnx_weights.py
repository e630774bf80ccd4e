"""Graphs that onnxruntime optimised read the weights that it left alone from their own files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pbc.runtime.engines.onnxruntime.session import session_options
from pbc.runtime.engines.onnxruntime.weights import Place, moved, outside, share

WIDTH = 64


def model(folder: Path, weights: dict[str, np.ndarray], location: str) -> Path:
    """A product by each of the weights, which lie in one file beside the graph; and a small one."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], [f"{name}_out"]) for name in weights],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDTH])],
        [helper.make_tensor_value_info(f"{n}_out", TensorProto.FLOAT, None) for n in weights],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [helper.make_opsetid("", 20)]
    made = helper.make_model(graph, opset_imports=opset, ir_version=10)
    folder.mkdir(exist_ok=True)
    onnx.save(
        made,
        folder / "graph.onnx",
        save_as_external_data=True,
        location=location,
        size_threshold=1024,
    )
    return folder / "graph.onnx"


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "u": random.normal(size=(WIDTH, 33)).astype(np.float32),
        "w": random.normal(size=(WIDTH, 80)).astype(np.float32),
        "small": random.normal(size=(WIDTH, 2)).astype(np.float32),
    }


def products(graph: Path) -> list[np.ndarray]:
    options = session_options(1)
    session = onnxruntime.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    return list(session.run(None, {"x": np.ones((3, WIDTH), np.float32)}))


def test_what_lies_outside_is_told(tmp_path: Path) -> None:
    given = weights()
    graph = model(tmp_path / "m", given, "weights.bin")
    found = outside(graph.read_bytes())
    assert list(found) == ["u", "w"]
    for name, weight in found.items():
        assert (weight.dtype, weight.shape) == ("float32", given[name].shape)
        assert weight.place.read(graph.parent).tobytes() == given[name].tobytes()


def test_a_model_is_the_same_but_for_what_moved(tmp_path: Path) -> None:
    graph = model(tmp_path / "m", weights(), "weights.bin")
    data = graph.read_bytes()
    assert onnx.load_model_from_string(moved(data, {})) == onnx.load_model_from_string(data)
    place = Place("other.bin", 1 << 40, 7)
    changed = moved(data, {"w": place})
    assert outside(changed)["w"].place == place
    assert outside(changed)["u"] == outside(data)["u"]
    expected = onnx.load_model_from_string(data)
    found = onnx.load_model_from_string(changed)
    for tensor in (*expected.graph.initializer, *found.graph.initializer):
        tensor.ClearField("external_data")
    assert found == expected


@pytest.mark.parametrize("changed", [(), ("u",)])
def test_unchanged_weights_are_read_from_their_own_file(
    tmp_path: Path, changed: tuple[str, ...]
) -> None:
    given = weights()
    source = model(tmp_path / "source", given, "level.safetensors")
    optimised = {name: value + (name in changed) for name, value in given.items()}
    graph = model(tmp_path / "entry", optimised, "weights.bin")
    expected = products(graph)
    share(graph, graph.with_name("weights.bin"), source)
    found = outside(graph.read_bytes())
    assert {name for name, weight in found.items() if weight.place.file == "weights.bin"} == {
        *changed
    }
    own = graph.with_name("weights.bin")
    assert (own.stat().st_size if own.exists() else 0) == sum(given[n].nbytes for n in changed)
    for result, product in zip(products(graph), expected, strict=True):
        np.testing.assert_array_equal(result, product)


def test_a_file_is_not_kept_for_a_small_part_of_it(tmp_path: Path) -> None:
    given = weights()
    source = model(tmp_path / "source", given, "level.safetensors")
    graph = model(tmp_path / "entry", {**given, "w": given["w"] + 1}, "weights.bin")
    before = {file.name: file.read_bytes() for file in graph.parent.iterdir()}
    share(graph, graph.with_name("weights.bin"), source)
    assert {file.name: file.read_bytes() for file in graph.parent.iterdir()} == before
