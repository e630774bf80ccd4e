"""What an ONNX graph would take is foreseen as it is, and too much of it is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from pbc.errors import PbcError
from pbc.runtime.engines.bounds import TooManyPhotosError
from pbc.runtime.engines.onnxruntime.bounds import Bounds
from pbc.runtime.engines.onnxruntime.sizes import RULES, Call

X = np.linspace(-1, 1, 2 * 6 * 8 * 10, dtype=np.float32).reshape(2, 6, 8, 10)
W = np.ones((8, 3, 3, 2), np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


CASES: list[tuple[str, Sequence[np.ndarray | None], dict[str, Any], int]] = [
    ("Add", [X, X[:1, :, :1]], {}, 1),
    ("Where", [X > 0, X[0], X[:, :, :, :1]], {}, 1),
    ("Softmax", [X], {"axis": 1}, 1),
    ("Conv", [X, W], {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}, 1),
    ("Conv", [X, W], {"group": 2, "dilations": [2, 3], "auto_pad": "VALID"}, 1),
    ("Conv", [X, W], {"group": 2, "strides": [3, 2], "auto_pad": "SAME_UPPER"}, 1),
    ("ConvTranspose", [X, W[:6]], {"strides": [2, 3], "output_padding": [1, 0],
                                   "pads": [1, 0, 1, 1]}, 1),
    ("MaxPool", [X], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}, 1),
    ("MaxPool", [X], {"kernel_shape": [1, 2], "strides": [3, 3], "ceil_mode": 1,
                      "pads": [0, 0, 2, 2]}, 1),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}, 1),
    ("GlobalAveragePool", [X], {}, 1),
    ("MatMul", [X, X.transpose(0, 1, 3, 2)[:1]], {}, 1),
    ("MatMul", [X, X[0, 0, 0]], {}, 1),
    ("Gemm", [X[0, 0], X[0, 1]], {"transB": 1}, 1),
    ("Gemm", [X[0, 0], X[0, 1]], {"transA": 1}, 1),
    ("Einsum", [X[0, 0], X[0, 1]], {"equation": "ab,cb->ac"}, 1),
    ("ReduceMean", [X, ints(1, -1)], {"keepdims": 0}, 1),
    ("ReduceSum", [X], {}, 1),
    ("ReduceSum", [X, ints()], {"noop_with_empty_axes": 1}, 1),
    ("ArgMax", [X], {"axis": -1, "keepdims": 0}, 1),
    ("Reshape", [X, ints(0, -1, 4)], {}, 1),
    ("Reshape", [X[:0], ints(3, 0)], {"allowzero": 1}, 1),
    ("Flatten", [X], {"axis": 2}, 1),
    ("Transpose", [X], {"perm": [3, 0, 2, 1]}, 1),
    ("Transpose", [X], {}, 1),
    ("Expand", [X[:, :1], ints(3, 1, 6, 1, 1)], {}, 1),
    ("Tile", [X, ints(1, 2, 3, 1)], {}, 1),
    ("Squeeze", [X[:1, :, :1], ints(0)], {}, 1),
    ("Squeeze", [X[:1, :, :1]], {}, 1),
    ("Unsqueeze", [X, ints(0, -1)], {}, 1),
    ("Concat", [X, X[:, :2]], {"axis": -3}, 1),
    ("Split", [X, ints(2, 4)], {"axis": 1}, 2),
    ("Split", [X], {"axis": 3, "num_outputs": 3}, 3),
    ("Slice", [X, ints(1, -2), ints(9, -100), ints(1, 3), ints(2, -3)], {}, 1),
    ("Slice", [X, ints(1), ints(2)], {}, 1),
    ("Pad", [X, ints(0, 1, 0, 2, 0, 0, 3, 1)], {}, 1),
    ("Pad", [X, ints(1, 2), None, ints(3)], {}, 1),
    ("Gather", [X, ints(1, 2, 0).reshape(3, 1)], {"axis": 2}, 1),
    ("GatherElements", [X, np.zeros((2, 6, 8, 3), np.int64)], {"axis": 3}, 1),
    ("GatherND", [X, np.zeros((2, 4, 2), np.int64)], {"batch_dims": 1}, 1),
    ("Resize", [X, None, floats(1, 1, 1.5, 2.2)], {"mode": "nearest"}, 1),
    ("Resize", [X, None, None, ints(2, 6, 3, 4)], {"mode": "linear"}, 1),
    ("DepthToSpace", [X[:, :4]], {"blocksize": 2}, 1),
    ("SpaceToDepth", [X], {"blocksize": 2}, 1),
    ("OneHot", [ints(1, 2, 0), np.array(4), floats(0, 1)], {"axis": 0}, 1),
    ("ConstantOfShape", [ints(2, 3)], {}, 1),
    ("Range", [np.array(2), np.array(11), np.array(3)], {}, 1),
    ("TopK", [X, ints(3)], {"axis": 1}, 2),
    ("Shape", [X], {"start": 1, "end": -1}, 1),
    ("Size", [X], {}, 1),
    ("GridSample", [X, np.zeros((2, 3, 5, 2), np.float32)], {}, 1),
    ("Col2Im", [np.ones((1, 12, 6), np.float32), ints(4, 3), ints(2, 2)], {}, 1),
    ("LSTM", [X[0, :, :, :3], np.ones((1, 8, 3), np.float32), np.ones((1, 8, 2), np.float32)],
     {"hidden_size": 2}, 3),
    ("LayerNormalization", [X, X[0, 0, 0]], {}, 1),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n][0]}")
def test_a_rule_says_what_the_specification_returns(number: int) -> None:
    op, values, attributes, outputs = CASES[number]
    names = ["" if value is None else f"i{index}" for index, value in enumerate(values)]
    node = helper.make_node(op, names, [f"o{index}" for index in range(outputs)], **attributes)
    given = {name: value for name, value in zip(names, values, strict=True) if name}
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in given.items()
        if value is not None
    ]
    results = [helper.make_tensor_value_info(name, 1, None) for name in node.output]
    graph = helper.make_graph([node], "one", infos, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    expected = [np.shape(result) for result in ReferenceEvaluator(model).run(None, given)]
    call = Call(
        {entry.name: _plain(helper.get_attribute_value(entry)) for entry in node.attribute},
        [None if value is None else value.shape for value in values],
        values,
        outputs,
    )
    assert RULES[op](call)[0] == expected


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value if isinstance(value, str | int | float) else list(value)


def model(
    nodes: Sequence[NodeProto], constants: dict[str, np.ndarray], output: str = "y"
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def chained(op: str, count: int, **attributes: Any) -> list[NodeProto]:
    names = ["x", *(f"v{number}" for number in range(count - 1)), "y"]
    return [
        helper.make_node(op, [one] * 2, [other], **attributes)
        for one, other in itertools.pairwise(names)
    ]


AHEAD: dict[str, tuple[list[NodeProto], dict[str, np.ndarray]]] = {
    "a constant of 10^10": (
        [helper.make_node("ConstantOfShape", ["s"], ["y"])], {"s": ints(10**5, 10**5)},
    ),
    "products of constants": (
        [helper.make_node("ConstantOfShape", ["s"], ["x2"]),
         *[helper.make_node("MatMul", [f"x{n}", f"x{n}"], [f"x{n + 1}"]) for n in range(2, 90)]],
        {"s": ints(4000, 4000)},
    ),
    "a size that is computed": (
        [helper.make_node("Mul", ["s", "s"], ["t"]), helper.make_node("Mul", ["t", "t"], ["u"]),
         helper.make_node("ConstantOfShape", ["u"], ["y"])], {"s": ints(500)},
    ),
    "a range": (
        [helper.make_node("Range", ["a", "b", "c"], ["y"])],
        {"a": np.array(0), "b": np.array(10**12), "c": np.array(1)},
    ),
}  # fmt: skip
LATER: dict[str, tuple[list[NodeProto], dict[str, np.ndarray]]] = {
    "doubled": (chained("Concat", 30, axis=1), {}),
    "expanded": ([helper.make_node("Expand", ["x", "s"], ["y"])], {"s": ints(10**6, 1, 1, 1, 1)}),
    "tiled": ([helper.make_node("Tile", ["x", "s"], ["y"])], {"s": ints(1, 10**6, 1, 1)}),
    "an outer product": (
        [helper.make_node("Reshape", ["x", "a"], ["r"]),
         helper.make_node("Reshape", ["x", "b"], ["c"]),
         helper.make_node("MatMul", ["r", "c"], ["p"]),
         helper.make_node("Unsqueeze", ["p", "z"], ["q"]),
         helper.make_node("Unsqueeze", ["p", "o"], ["s"]),
         helper.make_node("Add", ["q", "s"], ["y"])],
        {"a": ints(-1, 1), "b": ints(1, -1), "z": ints(0), "o": ints(1)},
    ),
    "of three channels, computed as 16": (
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[0, 0, 3000, 3000])],
        {"w": np.ones((3, 3, 1, 1), np.float32)},
    ),
    "padded": (
        [helper.make_node("Pad", ["x", "p"], ["y"])], {"p": ints(0, 0, 0, 0, 0, 0, 0, 10**9)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AHEAD)
def test_constants_that_take_too_much(name: str) -> None:
    with pytest.raises(PbcError, match=r"at most .* are granted"):
        Bounds(model(*AHEAD[name]).SerializeToString(), "graph g")


@pytest.mark.parametrize("name", LATER)
def test_inputs_of_which_too_much_is_made(name: str) -> None:
    bounds = Bounds(model(*LATER[name]).SerializeToString(), "graph g")
    with pytest.raises(PbcError, match=r"at most .* are granted"):
        bounds.check({"x": (2, 3, 16, 16)})


def test_a_call_of_many_photos_may_not_take_more() -> None:
    nodes = [helper.make_node("Tile", ["x", "s"], ["y"])]
    bounds = Bounds(model(nodes, {"s": ints(1, 10**4, 1, 1)}).SerializeToString(), "graph g")
    for photos in (1, 2, 8):
        bounds.check({"x": (photos, 3, 16, 16)})
        bounds.check_call({"x": (photos, 3, 16, 16)})
    bounds.check({"x": (500, 3, 16, 16)})  # in parts it may run
    with pytest.raises(TooManyPhotosError, match="for 500 photos; at most 256 MiB are granted"):
        bounds.check_call({"x": (500, 3, 16, 16)})


def test_photos_of_which_two_are_too_many_run_one_by_one() -> None:
    nodes = [helper.make_node("Tile", ["x", "s"], ["y"])]
    bounds = Bounds(model(nodes, {"s": ints(1, 80_000, 1, 1)}).SerializeToString(), "graph g")
    bounds.check({"x": (2, 3, 16, 16)})
    bounds.check_call({"x": (1, 3, 16, 16)})
    with pytest.raises(TooManyPhotosError, match="469 MiB for 2 photos; at most 256 MiB"):
        bounds.check_call({"x": (2, 3, 16, 16)})


def test_what_grows_faster_than_the_photos() -> None:
    """A product of all photos with each other is small for two."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Transpose", ["f"], ["t"]),
        helper.make_node("MatMul", ["f", "t"], ["p"]),
        helper.make_node("Tile", ["p", "s"], ["y"]),
    ]
    bounds = Bounds(model(nodes, {"s": ints(100, 100)}).SerializeToString(), "graph g")
    bounds.check_call({"x": (32, 3, 16, 16)})
    with pytest.raises(TooManyPhotosError):
        bounds.check_call({"x": (128, 3, 16, 16)})


def test_a_head_of_many_classes_may_not() -> None:
    nodes = [helper.make_node("Tile", ["x", "s"], ["y"])]
    bytes_ = model(nodes, {"s": ints(1, 10**6)}).SerializeToString()
    with pytest.raises(PbcError, match="for 2 photos; at most 512 MiB are granted"):
        Bounds(bytes_, "graph g", batched=["features"]).check({"x": (10**5, 1)})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (helper.make_node("Loop", ["x"], ["y"]), "'Loop', of which pbc does not know how much"),
        (helper.make_node("Mystery", ["x"], ["y"]), "'Mystery', of which pbc does not know"),
        (helper.make_node("Gelu", ["x"], ["y"], domain="x.y"), "an operator of 'x.y'"),
        (helper.make_node("Reshape", ["x", "x"], ["y"]), "a size that depends on values"),
        (helper.make_node("Gemm", ["x", "x"], ["y"]), "'y' cannot be: Gemm"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[0, 1]),
         "its strides is below 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_foreseen(node: NodeProto, said: str) -> None:
    with pytest.raises(PbcError, match=said):
        Bounds(model([node], {}).SerializeToString(), "graph g").check({"x": (2, 3, 16, 16)})
