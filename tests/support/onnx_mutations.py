"""Mutations of ONNX models by their structure: operators, attributes, shapes, constants, places."""

from __future__ import annotations

import random

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPERATORS = (
    "Abs", "Add", "And", "ArgMax", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip",
    "Concat", "ConstantOfShape", "Conv", "ConvTranspose", "CumSum", "DepthToSpace", "Div",
    "Einsum", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements",
    "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GridSample", "Identity", "LRN",
    "LayerNormalization", "LogSoftmax", "MatMul", "Max", "MaxPool", "Mod", "Mul", "Neg",
    "NonZero", "OneHot", "Pad", "Pow", "RandomNormal", "Range", "ReduceMean", "ReduceSum",
    "Relu", "Reshape", "Resize", "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign",
    "Size", "Slice", "Softmax", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Tile",
    "TopK", "Transpose", "Trilu", "Unsqueeze", "Where", "Loop", "If", "NoSuchOperator",
)  # fmt: skip
_NUMBERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 64, 4096, 10**6, 2**31, 2**40, 2**63 - 1)
_BOMBS = ((10**5, 10**5), (36_000, 36_000), (1 << 40,), (20_000, 20_000), (8, 10**9))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change one to three places of a model."""
    model = onnx.load_model_from_string(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        chance.choice(_KINDS)(model, chance)
    return bytes(model.SerializeToString())


def _operator(model: ModelProto, chance: random.Random) -> None:
    node = chance.choice(model.graph.node)
    node.op_type = chance.choice(OPERATORS)
    if chance.random() < 0.1:
        node.domain = chance.choice(("com.microsoft", "ai.onnx.ml", "x"))


def _removed(model: ModelProto, chance: random.Random) -> None:
    if len(model.graph.node) > 1:
        del model.graph.node[chance.randrange(len(model.graph.node))]


def _twice(model: ModelProto, chance: random.Random) -> None:
    model.graph.node.add().CopyFrom(chance.choice(model.graph.node))


def _input(model: ModelProto, chance: random.Random) -> None:
    node = chance.choice(model.graph.node)
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    names += [tensor.name for tensor in model.graph.initializer] + ["", "nowhere"]
    if node.input and chance.random() < 0.8:
        node.input[chance.randrange(len(node.input))] = chance.choice(names)
    else:
        node.input.append(chance.choice(names))


def _attribute(model: ModelProto, chance: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes or chance.random() < 0.2:
        name = chance.choice(("axis", "group", "strides", "pads", "kernel_shape", "to", "perm"))
        value = chance.choice((chance.choice(_NUMBERS), [chance.choice(_NUMBERS)] * 2))
        chance.choice(model.graph.node).attribute.append(helper.make_attribute(name, value))
        return
    attribute = chance.choice(chance.choice(nodes).attribute)
    if attribute.ints:
        attribute.ints[chance.randrange(len(attribute.ints))] = chance.choice(_NUMBERS)
    elif chance.random() < 0.2:
        attribute.ints.extend([chance.choice(_NUMBERS)] * chance.choice((1, 2, 9)))
    else:
        attribute.i = chance.choice(_NUMBERS)
        attribute.f = chance.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30))


def _constant(model: ModelProto, chance: random.Random) -> None:
    tensors = list(model.graph.initializer)
    if not tensors:
        return
    tensor = chance.choice(tensors)
    kind = chance.randrange(4)
    if kind == 0 and tensor.dims:
        tensor.dims[chance.randrange(len(tensor.dims))] = chance.choice(_NUMBERS)
    elif kind == 1:
        tensor.data_type = chance.randrange(24)
    elif kind == 2 and tensor.external_data:
        entry = chance.choice(tensor.external_data)
        entry.value = chance.choice(("../x", "/etc/passwd", "0", str(2**62), "-1", "", "x" * 999))
    elif tensor.data_type == TensorProto.INT64 and len(tensor.raw_data) >= 8:
        place = 8 * chance.randrange(len(tensor.raw_data) // 8)
        number = chance.choice(_NUMBERS).to_bytes(8, "little", signed=True)
        tensor.raw_data = tensor.raw_data[:place] + number + tensor.raw_data[place + 8 :]
    else:
        tensor.raw_data = tensor.raw_data[: chance.randrange(9)]


def _bomb(model: ModelProto, chance: random.Random) -> None:
    """Put something huge in front of what a node reads."""
    nodes = [node for node in model.graph.node if node.input]
    if not nodes:
        return
    node = chance.choice(nodes)
    place = chance.randrange(len(node.input))
    read, made = node.input[place], f"bomb_{len(model.graph.node)}"
    shape = np.array(chance.choice(_BOMBS), np.int64)
    kind = chance.randrange(5)
    constants = [numpy_helper.from_array(shape, f"{made}/shape")]
    if kind == 0:
        nodes = [helper.make_node("ConstantOfShape", [f"{made}/shape"], [f"{made}/a"])]
    elif kind == 1:
        nodes = [helper.make_node("Expand", [read, f"{made}/shape"], [f"{made}/a"])]
    elif kind == 2:
        nodes = [helper.make_node("Concat", [read, read], [f"{made}/0"], axis=0)]
        nodes += [
            helper.make_node("Concat", [f"{made}/{n}"] * 2, [f"{made}/{n + 1}"], axis=0)
            for n in range(40)
        ]
        nodes.append(helper.make_node("Identity", [f"{made}/40"], [f"{made}/a"]))
    elif kind == 3:
        size = np.array([4000, 4000], np.int64)
        constants = [numpy_helper.from_array(size, f"{made}/shape")]
        nodes = [helper.make_node("ConstantOfShape", [f"{made}/shape"], [f"{made}/0"])]
        nodes += [
            helper.make_node("MatMul", [f"{made}/{n}"] * 2, [f"{made}/{n + 1}"]) for n in range(40)
        ]
        nodes.append(helper.make_node("Identity", [f"{made}/40"], [f"{made}/a"]))
    else:
        times = np.full(chance.randrange(1, 5), chance.choice(_NUMBERS), np.int64)
        constants = [numpy_helper.from_array(times, f"{made}/shape")]
        nodes = [helper.make_node("Tile", [read, f"{made}/shape"], [f"{made}/a"])]
    model.graph.initializer.extend(constants)
    at = list(model.graph.node).index(node)
    if chance.random() < 0.5:  # beside what is read, so that it is computed and nothing fails
        node.input[place] = f"{made}/a"
    else:
        model.graph.output.append(onnx.ValueInfoProto(name=f"{made}/a"))
    for number, new in enumerate(nodes):
        model.graph.node.insert(at + number, new)


def _shape(model: ModelProto, chance: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output]
    value = chance.choice(values)
    dims = value.type.tensor_type.shape.dim
    if dims and chance.random() < 0.7:
        chance.choice(dims).dim_value = chance.choice(_NUMBERS)
    elif chance.random() < 0.5:
        value.type.tensor_type.elem_type = chance.randrange(24)
    else:
        value.name = chance.choice(("x", "nowhere", "\x1b[2J", ""))


_KINDS = (
    _operator, _removed, _twice, _input, _input, _attribute, _attribute, _constant, _constant,
    _bomb, _shape,
)  # fmt: skip
