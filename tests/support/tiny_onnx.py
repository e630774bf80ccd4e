"""The hand-made bundles of `tiny`, with the same weights, as the ONNX Runtime engine reads them.

The training steps are written out by hand here, so that the engine is tested without the compiler
and against torch's own arithmetic.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import tiny
from onnx import TensorProto, helper, numpy_helper

from pbc import bundle
from pbc.bundle import Bundle

OPTIMIZERS = ("sgd", "adam", "adamw")
WEIGHTS = "onnx/level-{}.safetensors"
FEATURES = {"probe": "flat", "maps": "map", "whole": "x"}

Shape = Sequence[int | str]


class Graph:
    """Collects nodes; frozen tensors stay outside, in a safetensors file beside the graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def takes(self, name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def gives(self, name: str, value: str, shape: Shape) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.initializers)}"
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def frozen(self, key: str, weights: bytes, file: str) -> str:
        """Refer to a tensor's bytes inside a safetensors file."""
        header_bytes = int.from_bytes(weights[:8], "little")
        facts = json.loads(weights[8 : 8 + header_bytes])[key]
        start, stop = facts["data_offsets"]
        tensor = TensorProto(name=key, data_type=TensorProto.FLOAT, dims=facts["shape"])
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": file, "offset": 8 + header_bytes + start, "length": stop - start}
        for entry, value in place.items():
            tensor.external_data.add(key=entry, value=str(value))
        self.initializers.append(tensor)
        return key

    def model(self) -> bytes:
        graph = helper.make_graph(
            self.nodes, "tiny", self.inputs, self.outputs, initializer=self.initializers
        )
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        serialized: bytes = model.SerializeToString()
        return serialized


class Level:
    """One level's network, piece by piece, into whatever graph needs it."""

    def __init__(self, kind: str, number: int, weights: bytes) -> None:
        self.kind = kind
        self.number = number
        self.weights = weights
        self.theta: dict[str, Shape] = {
            "head.weight": ["classes", tiny.CHANNELS],
            "head.bias": ["classes"],
        }
        if kind == "whole":
            self.theta["b"] = [tiny.CHANNELS]

    def prefix(self) -> bytes:
        graph = Graph()
        relu = self._relu(graph, graph.takes("x", ["b", *tiny.SPEC.shape]))
        if self.kind == "maps":
            graph.gives("map", relu, ["b", tiny.CHANNELS, 8, 8])
        else:
            graph.gives("flat", self._pooled(graph, relu), ["b", tiny.CHANNELS])
        return graph.model()

    def body(self) -> bytes:
        graph = Graph()
        _, _, logits = self._logits(graph)
        graph.gives("logits", logits, ["b", "classes"])
        return graph.model()

    def forward(self) -> bytes:
        graph = Graph()
        relu, flat, logits = self._logits(graph)
        labels = graph.takes("labels", ["b"], TensorProto.INT64)
        smoothing = graph.takes("label_smoothing", [])
        depth = graph.op("Shape", logits, start=1)
        values = graph.op("Cast", graph.constant([0, 1]), to=TensorProto.FLOAT)
        hot = graph.op("OneHot", labels, depth, values)
        kept = graph.op("Sub", graph.constant(1.0), smoothing)
        share = graph.op("Div", smoothing, graph.op("Cast", depth, to=TensorProto.FLOAT))
        target = graph.op("Add", graph.op("Mul", hot, kept), share)
        logarithms = graph.op("LogSoftmax", logits)
        product = graph.op("Mul", target, logarithms)
        summed = graph.op("ReduceSum", product, graph.constant([1]), keepdims=0)
        losses = graph.op("Neg", summed)
        graph.gives("loss", graph.op("ReduceMean", losses, keepdims=0), [])
        graph.gives("losses", losses, ["b"])
        graph.gives("logits", logits, ["b", "classes"])
        graph.gives("saved/shares", graph.op("Softmax", logits), ["b", "classes"])
        graph.gives("saved/target", target, ["b", "classes"])
        if self.kind != "probe":
            graph.gives("saved/flat", flat, ["b", tiny.CHANNELS])
        if self.kind == "whole":
            graph.gives("saved/relu", relu, ["b", tiny.CHANNELS, 8, 8])
        return graph.model()

    def update(self, optimizer: str) -> bytes:
        graph = Graph()
        shares, target = (
            graph.takes(f"saved/{name}", ["b", "classes"]) for name in ("shares", "target")
        )
        flat = graph.takes("flat" if self.kind == "probe" else "saved/flat", ["b", tiny.CHANNELS])
        count = graph.op("Cast", graph.op("Shape", shares, end=1), to=TensorProto.FLOAT)
        gradient = graph.op("Div", graph.op("Sub", shares, target), count)
        theta = {name: graph.takes(name, shape) for name, shape in self.theta.items()}
        gradients = {
            "head.weight": graph.op("Gemm", gradient, flat, transA=1),
            "head.bias": graph.op("ReduceSum", gradient, graph.constant([0]), keepdims=0),
        }
        if self.kind == "whole":
            relu = graph.takes("saved/relu", ["b", tiny.CHANNELS, 8, 8])
            spread = graph.op("MatMul", gradient, theta["head.weight"])
            spread = graph.op("Unsqueeze", spread, graph.constant([2, 3]))
            positive = graph.op("Greater", relu, graph.constant(0.0))
            passed = graph.op("Cast", positive, to=TensorProto.FLOAT)
            passed = graph.op("Div", graph.op("Mul", passed, spread), graph.constant(64.0))
            gradients["b"] = graph.op("ReduceSum", passed, graph.constant([0, 2, 3]), keepdims=0)
        scalars = ["learning_rate", "weight_decay"]
        scalars += ["momentum"] if optimizer == "sgd" else ["mean_correction", "square_correction"]
        for scalar in scalars:
            graph.takes(scalar, [])
        for name, slope in gradients.items():
            step = _sgd if optimizer == "sgd" else _adam
            step(graph, name, slope, self.theta[name], decoupled=optimizer == "adamw")
        return graph.model()

    def export(self) -> tuple[bytes, dict[str, str]]:
        """From images to logits and probabilities, naming tensors that are not there yet."""
        graph = Graph()
        logits = graph.op(
            "Gemm",
            self._pooled(graph, self._relu(graph, graph.takes("x", ["b", *tiny.SPEC.shape]))),
            *("head.weight", "head.bias"),
            transB=1,
        )
        graph.gives("logits", logits, ["b", "classes"])
        graph.gives("probabilities", graph.op("Softmax", logits), ["b", "classes"])
        tensors = {tensor.name: f"{WEIGHTS.format(self.number)}#{tensor.name}"
                   for tensor in graph.initializers}  # fmt: skip
        graph.initializers.clear()
        return graph.model(), {**tensors, **dict.fromkeys(self.theta, "θ")}

    def _relu(self, graph: Graph, x: str) -> str:
        bias = "b" if self.kind == "whole" else self._frozen(graph, "conv.bias")
        weight = self._frozen(graph, "conv.weight")
        return graph.op(
            "Relu", graph.op("Conv", x, weight, bias, strides=[2, 2], pads=[1, 1, 1, 1])
        )

    def _frozen(self, graph: Graph, key: str) -> str:
        return graph.frozen(key, self.weights, Path(WEIGHTS.format(self.number)).name)

    @staticmethod
    def _pooled(graph: Graph, relu: str) -> str:
        return graph.op("Flatten", graph.op("GlobalAveragePool", relu))

    def _logits(self, graph: Graph) -> tuple[str, str, str]:
        """Take features and parameters; return the names of the map, of its mean, of logits."""
        shapes: dict[str, Shape] = {
            "probe": [tiny.CHANNELS],
            "maps": [tiny.CHANNELS, 8, 8],
            "whole": tiny.SPEC.shape,
        }
        relu = flat = graph.takes(FEATURES[self.kind], ["b", *shapes[self.kind]])
        for name, shape in self.theta.items():
            graph.takes(name, shape)
        if self.kind == "whole":
            relu = self._relu(graph, relu)
        if self.kind != "probe":
            flat = self._pooled(graph, relu)
        return relu, flat, graph.op("Gemm", flat, "head.weight", "head.bias", transB=1)


def _sgd(graph: Graph, name: str, gradient: str, shape: Shape, *, decoupled: bool) -> None:
    assert not decoupled
    gradient = graph.op("Add", gradient, graph.op("Mul", "weight_decay", name))
    old = graph.takes(f"momentum/{name}", shape)
    new = graph.op("Add", graph.op("Mul", "momentum", old), gradient)
    graph.gives(f"new/momentum/{name}", new, shape)
    moved = graph.op("Sub", name, graph.op("Mul", "learning_rate", new))
    graph.gives(f"new/{name}", moved, shape)


def _adam(graph: Graph, name: str, gradient: str, shape: Shape, *, decoupled: bool) -> None:
    parameter = name
    if decoupled:
        decay = graph.op("Mul", "learning_rate", "weight_decay")
        parameter = graph.op("Sub", name, graph.op("Mul", decay, name))
    else:
        gradient = graph.op("Add", gradient, graph.op("Mul", "weight_decay", name))
    moments = {}
    for moment, beta, value in (
        ("exp_avg", 0.9, gradient),
        ("exp_avg_sq", 0.999, graph.op("Mul", gradient, gradient)),
    ):
        old = graph.takes(f"{moment}/{name}", shape)
        old, added = (
            graph.op("Mul", graph.constant(share), part)
            for share, part in ((beta, old), (1 - beta, value))
        )
        moments[moment] = graph.op("Add", old, added)
        graph.gives(f"new/{moment}/{name}", moments[moment], shape)
    mean = graph.op("Div", moments["exp_avg"], "mean_correction")
    square = graph.op("Sqrt", graph.op("Div", moments["exp_avg_sq"], "square_correction"))
    change = graph.op("Div", mean, graph.op("Add", square, graph.constant(1e-8)))
    moved = graph.op("Sub", parameter, graph.op("Mul", "learning_rate", change))
    graph.gives(f"new/{name}", moved, shape)


def _policy(weights: bytes) -> bytes:
    graph = Graph()
    view = graph.op("Flatten", graph.takes("view", ["b", 3, 4, 4]))
    mean = graph.op("ReduceMean", view, graph.constant([1]))
    weight, bias = (graph.frozen(key, weights, "policy.safetensors") for key in ("weight", "bias"))
    sigmoid = graph.op("Sigmoid", graph.op("Gemm", mean, weight, bias, transB=1))
    graph.gives("fidelity", sigmoid, ["b", "levels"])
    return graph.model()


def contents(kind: str = "probe", **options: Any) -> tuple[tiny.Json, dict[str, bytes]]:
    """Return the manifest and the files of the bundle that `tiny.contents` makes for PyTorch."""
    manifest, old = tiny.contents(kind, **options)
    files = {"trainable.safetensors": old["trainable.safetensors"]}
    graphs: dict[str, str] = {}
    weights: dict[str, list[str]] = {}
    manifest["export"] = {}

    def add(name: str, model: bytes, *reads: str) -> None:
        graphs[name] = f"onnx/{name.replace('/', '-')}.onnx"
        weights[name] = list(reads)
        files[graphs[name]] = model

    for number in range(len(manifest["levels"])):
        file = WEIGHTS.format(number)
        files[file] = old[tiny.WEIGHTS.format(number)]
        level = Level(kind, number, files[file])
        whole = (file,) if kind == "whole" else ()
        if kind != "whole":
            add(f"prefix/{number}", level.prefix(), file)
        add(f"body/{number}", level.body(), *whole)
        add(f"forward/{number}", level.forward(), *whole)
        for optimizer in OPTIMIZERS:
            add(f"update/{number}/{optimizer}", level.update(optimizer))
        model, tensors = level.export()
        name = f"onnx/export-{number}.onnx"
        files[name] = model
        manifest["export"][str(number)] = {"file": name, "tensors": tensors}
    if "policy" in manifest["graphs"]:
        file = "onnx/policy.safetensors"
        files[file] = old["weights/policy.safetensors"]
        add("policy", _policy(files[file]), file)
    manifest.update(engine="onnxruntime", graphs=graphs, weights=weights)
    return manifest, files


def write(path: Path, kind: str = "probe", *, as_folder: bool = False, **options: Any) -> Bundle:
    """Write the bundle that `contents` describes."""
    manifest, files = contents(kind, **options)
    return bundle.write(path, manifest, files, as_folder=as_folder)


def tensors(source: Bundle, level: int) -> dict[str, np.ndarray]:
    """The frozen tensors of one level."""
    return safetensors.numpy.load(source.read(WEIGHTS.format(level)))


def resident_bytes() -> int:
    """What this process holds in memory now; its peak may have been before the test."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
