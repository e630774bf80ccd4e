from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, pruned
from onnx_checks import assert_logits, converted, run, session
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from pbc.bundle.optimizers import OPTIMIZERS
from pbc.errors import PbcError
from pbc.frontend.capture import EXAMPLE_BATCH
from pbc.ir.graph import NAME, graph_inputs, graph_outputs, output_node, tensor_names
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.targets.onnxruntime.convert import Converter, check, multiply_once, unresolved
from pbc.testing import graph_of, make_program, run_passes, with_request

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (ConvNet, "linear-probe"),
        (ConvNet, "norm"),
        (ResidualNet, "adapters:2"),
        (AttentionNet, "norm"),
    ],
)
def test_onnxruntime_computes_what_the_graphs_do(kind: Kind, strategy: str) -> None:
    program = run_passes(pruned(kind, strategy), FoldBatchNorm())
    for level in range(len(program.levels)):
        assert_logits(program, level, 1e-5)


def test_a_model_as_text() -> None:
    program = pruned(ConvNet, "norm")
    graph = graph_of(program, "body/0")
    model = Converter()("body", graph, None, ("fc.weight", "fc.bias"), open_head=True)
    text = onnx.printer.to_text(model)
    inputs, _, rest = text.partition(") => ")
    assert inputs.splitlines() == [
        "<",
        "   ir_version: 10,",
        '   opset_import: ["" : 20],',
        '   producer_name: "pbc"',
        ">",
        'body (float[batch,16,16,16] feature_0, float[16] "bn1.weight", float[16] "bn1.bias", '
        'float[24] "bn2.weight", float[24] "bn2.bias", float[classes,24] "fc.weight", '
        'float[classes] "fc.bias", float[16] "bn1.running_mean", float[16] "bn1.running_var", '
        'float[24,16,3,3] "conv2.weight", float[24] "conv2.bias", float[24] "bn2.running_mean", '
        'float[24] "bn2.running_var"',
    ]
    assert rest.startswith("(float[batch,classes] logits)")
    assert [node.op_type for node in model.graph.node] == [
        "BatchNormalization",
        "Relu",
        "Conv",
        "BatchNormalization",
        "Relu",
        "ReduceMean",
        "Gemm",
    ]
    assert "File" not in text  # no line of anybody's code


def test_an_open_head_takes_any_number_of_classes() -> None:
    graph = graph_of(pruned(ConvNet), "body/0")
    head = ("fc.weight", "fc.bias")
    values: dict[str, np.ndarray] = {
        name: np.ones((7, 24), np.float32) for name in graph_inputs(graph)
    }
    values["fc.bias"] = np.arange(7, dtype=np.float32)
    values["feature_0"] = np.ones((3, 24), np.float32)
    opened = session(graph, Converter()("body", graph, None, head, open_head=True))
    assert np.array_equal(run(opened, values)["logits"], np.full((3, 7), 24) + np.arange(7))
    closed = session(graph, Converter()("body", graph, None, head))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="7"):
        run(closed, values)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch's exporter is called with."""
    calls: list[object] = []
    export: Callable[..., object] = torch.onnx.export

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", counted)
    return calls


def test_graphs_of_one_structure_are_exported_once(exports: list[object]) -> None:
    program = run_passes(pruned(ConvNet), FoldBatchNorm())
    graph = graph_of(program, "prefix/0")
    other = graph_of(run_passes(pruned(ConvNet), FoldBatchNorm()), "prefix/0")
    for tensor in other.parameters():
        tensor.data = tensor.data + 1
    converter = Converter()
    one = converter("prefix", graph)
    same = converter("prefix", other, [f"{name}!" for name in tensor_names(other)])
    assert len(exports) == 1
    assert [value.name for value in same.graph.input[1:]] == [
        f"{value.name}!" for value in one.graph.input[1:]
    ]
    assert same.graph.name == "prefix"  # levels of one content have one file's bytes
    images = {"x": program.network.example.numpy()}
    same.CopyFrom(converter("prefix", other))
    for number, (model, source) in enumerate(((one, graph), (same, other))):
        with torch.no_grad():
            expected = source(program.network.example)[0].numpy()
        got = run(session(source, model), images)["feature_0"]
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-4), number
    converter("prefix", graph_of(program, "prefix/1"))  # other widths
    assert len(exports) == 2


# ---- what derivation writes ----------------------------------------------------------------


def traced(module: nn.Module, *shapes: tuple[int, ...]) -> GraphModule:
    """The module's graph for inputs of these shapes, the first axis of the first one open."""
    arguments = tuple(torch.zeros(shape) for shape in shapes)
    open_axes = tuple({0: torch.export.Dim.DYNAMIC} if not n else {} for n in range(len(shapes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch.export says about itself
        exported = torch.export.export(module, arguments, dynamic_shapes=open_axes)
        graph: GraphModule = exported.run_decompositions({}).graph_module
        return graph


class Products(nn.Module):
    """Every way in which one matrix is multiplied with each sample, and one in which it is not."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        batch = x.shape[0]
        right = torch.bmm(x, weight.expand(batch, 6, 6))
        turned = torch.bmm(x, weight.unsqueeze(0).expand(batch, 6, 6).transpose(1, 2))
        left = torch.bmm(weight.t().expand(batch, 6, 6).permute(0, 2, 1), x.transpose(1, 2))
        return right, turned, left, torch.bmm(x, x.transpose(1, 2))


def test_a_matrix_is_not_copied_for_each_sample() -> None:
    graph = traced(Products(), (EXAMPLE_BATCH, 4, 6), (6, 6))
    x, weight = torch.randn(3, 4, 6), torch.randn(6, 6)
    expected = [value.numpy() for value in graph(x, weight)]
    before = Counter(node.target for node in graph.graph.nodes)
    assert (before[aten.bmm.default], before[aten.expand.default]) == (4, 3)
    rewritten = torch.fx.GraphModule(graph, torch.fx.Graph())
    rewritten.graph.output(rewritten.graph.graph_copy(graph.graph, {}))
    rewritten.recompile()
    multiply_once(rewritten)
    after = Counter(node.target for node in rewritten.graph.nodes)
    assert (after[aten.bmm.default], after[aten.expand.default]) == (1, 0)
    assert after[aten.matmul.default] == 3
    for got, wanted in zip(rewritten(x, weight), expected, strict=True):
        assert np.allclose(got.numpy(), wanted, atol=1e-6)
    model = Converter()("products", graph)
    assert "Expand" not in {node.op_type for node in model.graph.node}
    values = {"x": x.numpy(), "weight": weight.numpy()}
    for got, wanted in zip(run(session(graph, model), values).values(), expected, strict=True):
        assert np.allclose(got, wanted, atol=1e-6)


class Attention(nn.Module):
    """Attention within windows of several heads, and of one head that is no axis."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mask = torch.ones(5, 5).tril().bool()
        windows = functional.scaled_dot_product_attention(x, x.flip(3), x * 2, mask)
        return windows, functional.scaled_dot_product_attention(x[:, 0, 0], x[:, 1, 0], x[:, 0, 1])


def test_attention_of_any_number_of_axes() -> None:
    graph = traced(Attention(), (EXAMPLE_BATCH, 2, 3, 5, 4))
    x = torch.randn(3, 2, 3, 5, 4)
    found = run(session(graph, Converter()("attention", graph)), {"x": x.numpy()})
    for got, wanted in zip(found.values(), graph(x), strict=True):
        assert np.allclose(got, wanted.numpy(), atol=1e-5)


class Handed(nn.Module):
    """Returns what it was given, and one value twice."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = x @ weight
        return y, weight, y, x


def test_outputs_have_names_of_their_own() -> None:
    graph = traced(Handed(), (EXAMPLE_BATCH, 6), (6, 6))
    output_node(graph).meta[NAME] = ["saved/y", "new/weight", "copy", "x"]
    model = Converter()("handed", graph)
    values = {
        "x": np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32),
        "weight": np.eye(6, dtype=np.float32),
    }
    got = run(session(graph, model), values)
    assert list(got) == graph_outputs(graph) == ["saved/y", "new/weight", "copy", "x"]
    for name, wanted in zip(got, ["x", "weight", "x", "x"], strict=True):
        assert np.array_equal(got[name], values[wanted]), name


@pytest.mark.parametrize(
    ("kind", "strategy"), [(ConvNet, "linear-probe"), (ResidualNet, "last-k:1")]
)
def test_a_derived_step_moves_as_its_graphs_do(
    exports: list[object], kind: Kind, strategy: str
) -> None:
    """Whatever the optimizer, and its backward is exported once for all of them."""
    program = with_request(pruned(kind, strategy, levels=0), engine="onnxruntime")
    program = DeriveTrainStep()(run_passes(program, FoldBatchNorm()))
    generator = torch.Generator().manual_seed(0)
    values = {name: value.detach() for name, value in program.parameters.items()}
    with torch.no_grad():
        values.update(program.levels[0].features(program.network.example))
    values["labels"] = torch.tensor([3, 8])
    values["label_smoothing"] = torch.tensor(0.1)
    for facts in OPTIMIZERS.values():
        values.update({scalar: torch.tensor(0.1) for scalar in facts.scalars})
    converter = Converter()
    for name in ("forward/0", *(f"update/0/{optimizer}" for optimizer in OPTIMIZERS)):
        graph = graph_of(program, name)
        for given in graph_inputs(graph):
            state, _, parameter = given.partition("/")
            if parameter and state in ("momentum", "exp_avg", "exp_avg_sq"):
                values[given] = torch.rand(values[parameter].shape, generator=generator)
        arrays = {key: value.numpy() for key, value in values.items()}
        got = run(converted(program, name, converter), arrays)
        with torch.no_grad():
            expected = graph(*(values[given] for given in graph_inputs(graph)))
        outputs = dict(zip(graph_outputs(graph), expected, strict=True))
        assert list(got) == list(outputs)
        for key, value in outputs.items():
            assert np.allclose(got[key], value.numpy(), rtol=1e-5, atol=1e-5), key
        values.update(outputs)
    assert len(exports) == 2
    weight = next(iter(program.network.head.parameters))
    assert not torch.equal(values["new/" + weight], values[weight])


# ---- what cannot be converted --------------------------------------------------------------


class Bessel(nn.Module):
    """ONNX knows no Bessel functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        logits: Tensor = self.fc(torch.special.bessel_j0(x.mean((2, 3))))
        return logits


def test_an_operator_that_onnx_lacks_is_named_with_its_line() -> None:
    program = run_passes(make_program(Bessel()), MarkTrainable(), SplitPrefix())
    with pytest.raises(
        PbcError,
        match=r"operator aten.special_bessel_j0.default .*test_onnx_graph.py\", line \d+\) is not "
        r"supported by the onnxruntime engine; replace it in the model, or compile with another",
    ):
        Converter()("prefix", graph_of(program, "prefix/0"))


def test_a_model_that_cannot_run_is_found_out() -> None:
    graph = graph_of(pruned(ConvNet), "body/0")
    model = Converter()("body", graph)
    check(model)
    model.graph.node[-1].op_type = "Gmem"
    with pytest.raises(onnx.checker.ValidationError, match="Gmem"):
        check(model)


def test_what_a_model_reads_and_lacks() -> None:
    graph = graph_of(pruned(ConvNet), "prefix/0")
    model = Converter()("prefix", graph)
    assert unresolved(model.graph) == []
    del model.graph.input[1:]
    assert unresolved(model.graph) == tensor_names(graph)
