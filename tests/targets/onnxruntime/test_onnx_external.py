"""An ONNX graph reads the files that its manifest names for it, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_onnx
from onnx import TensorProto, helper

from pbc import bundle
from pbc.errors import PbcError
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.runtime.engines.onnxruntime.external import check_external

SIZES = {"w.safetensors": 100}


def tensor(**place: str) -> onnx.TensorProto:
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    made.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        made.external_data.add(key=key, value=value)
    return made


def model(*tensors: onnx.TensorProto, inside: onnx.TensorProto | None = None) -> bytes:
    nodes = [helper.make_node("Add", ["x", "w"], ["flat"])]
    if inside is not None:
        nodes.append(helper.make_node("Constant", [], ["c"], value=inside))
    x = helper.make_tensor_value_info("x", 1, ["b", 4])
    flat = helper.make_tensor_value_info("flat", 1, ["b", 4])
    graph = helper.make_graph(nodes, "g", [x], [flat], list(tensors))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = made.SerializeToString()
    return content


def test_weights_inside_their_file() -> None:
    place = {"location": "w.safetensors", "offset": "84", "length": "16"}
    check_external(model(tensor(**place)), SIZES)
    check_external(model(onnx.numpy_helper.from_array(np.zeros(4, "f4"), "w")), {})


@pytest.mark.parametrize(
    "place",
    [
        {"location": "/etc/passwd", "offset": "0", "length": "16"},
        {"location": "../w.safetensors", "offset": "0", "length": "16"},
        {"location": "other", "offset": "0", "length": "16"},
        {"location": "w.safetensors", "offset": "85", "length": "16"},
        {"location": "w.safetensors", "offset": "-1", "length": "16"},
        {"location": "w.safetensors", "offset": "0"},
        {"location": "w.safetensors", "length": "16"},
        {"location": "w.safetensors", "offset": "0", "length": "9" * 30},
        {"location": "w.safetensors", "offset": "0", "length": "16", "basepath": "/"},
        {},
    ],
)
def test_any_other_place_is_refused(place: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="a tensor"):
        check_external(model(tensor(**place)), SIZES)
    held = onnx.numpy_helper.from_array(np.zeros(4, "f4"), "w")
    with pytest.raises(ValueError, match="a tensor"):
        check_external(model(held, inside=tensor(**place)), SIZES)


def test_a_key_twice_and_a_subgraph() -> None:
    twice = tensor(location="w.safetensors", offset="0", length="16")
    twice.external_data.add(key="location", value="/etc/passwd")
    with pytest.raises(ValueError, match="a tensor says 'location'"):
        check_external(model(twice), SIZES)
    graph = onnx.ModelProto.FromString(model(tensor(location="/etc/passwd"))).graph
    branch = helper.make_node("If", ["x"], ["y"], then_branch=graph, else_branch=graph)
    outer = helper.make_model(helper.make_graph([branch], "g", [], []))
    with pytest.raises(ValueError, match="a tensor lies in '/etc/passwd'"):
        check_external(outer.SerializeToString(), SIZES)


@pytest.mark.parametrize("cut", [1, 10, 40, -1])
def test_what_is_cut_short(cut: int) -> None:
    with pytest.raises(ValueError, match=r"no ONNX model|a tensor lies"):
        check_external(model(tensor(location="w.safetensors"))[:cut] + b"\x3a\xff", SIZES)


@pytest.mark.parametrize("place", ["secret.bin", "../secret.bin"])
def test_a_graph_without_weights_reads_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "work").mkdir()
    for folder in (tmp_path, tmp_path / "work"):
        (folder / "secret.bin").write_bytes(np.arange(4, dtype="f4").tobytes())
    monkeypatch.chdir(tmp_path / "work")
    manifest, files = tiny_onnx.contents()
    graph = manifest["graphs"]["prefix/0"]
    files[graph] = model(tensor(location=place, offset="0", length="16"))
    changed = {**manifest, "weights": {**manifest["weights"], "prefix/0": []}}
    made = bundle.write(tmp_path / "b.pbc", changed, files)
    with pytest.raises(PbcError, match=f"cannot load .*: a tensor lies in '{place}'"):
        OnnxRuntimeEngine().load(made, threads=1).prefix(0, np.zeros((1, 3, 16, 16), "f4"))
