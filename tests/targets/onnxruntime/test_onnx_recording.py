"""What onnxruntime ran of a graph, beside the graph."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pbc.targets.onnxruntime.recording import record

BATCH = 6


def model() -> onnx.ModelProto:
    """Return (x · w) and which of its values are positive, as rows and as one row."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Exp", ["product"], ["grown"]),
        helper.make_node("Reshape", ["grown", "flat"], ["row"]),
        helper.make_node("Greater", ["row", "zero"], ["mask"]),
        helper.make_node("Split", ["product"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Add", ["left", "right"], ["sum"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [
            helper.make_tensor_value_info("mask", TensorProto.BOOL, None),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, None),
        ],
        [
            numpy_helper.from_array(np.ones((8, 4), np.float32), "w"),
            numpy_helper.from_array(np.array([-1]), "flat"),
            numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_operators_are_recorded_with_the_bytes_of_the_batch() -> None:
    x = np.arange(8 * BATCH, dtype=np.float32).reshape(BATCH, 8) / 100
    operations, results = record(model(), {"x": x, "unread": x})
    sizes = {name: size for op in operations for name, size in op.makes.items()}
    expected = {"product": 16, "grown": 16, "row": 16, "mask": 4, "left": 8, "right": 8, "sum": 8}
    assert sizes == {name: BATCH * size for name, size in expected.items()}
    assert {op.within for op in operations if "row" in op.makes} == {"grown"}
    assert all(op.within is None for op in operations if "row" not in op.makes)
    np.testing.assert_allclose(results["sum"], 2 * x.sum(1, keepdims=True) * np.ones((1, 2)), 1e-6)
    assert results["mask"].all()
    assert results["mask"].shape == (4 * BATCH,)


def test_each_runs_behind_those_whose_results_it_reads() -> None:
    operations, _ = record(model(), {"x": np.ones((BATCH, 8), np.float32)})
    made = [{"x", "w", "flat", "zero"}]
    for operation in operations:
        made.append(made[-1] | operation.makes.keys())
    assert all(
        set(operation.reads) <= before and not operation.makes.keys() & before
        for operation, (before, _) in zip(operations, pairwise(made), strict=True)
    )
