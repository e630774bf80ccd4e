from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, captured, split
from torch import Tensor, nn

from pbc.errors import PbcError
from pbc.frontend.capture import capture
from pbc.ir.fold_constants import fold_constants
from pbc.ir.graph import graph_text, op_name, origin, parameter_names, tensor_names
from pbc.testing import graph_of, make_program

SHAPE = (3, 16, 16)


class Functional(nn.Module):
    """A model that is one function of the image and a linear layer."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def test_in_place_operators_dropout_and_copies_are_gone() -> None:
    def forward(module: Functional, x: Tensor) -> Tensor:
        y = x.clone()
        y += 1
        y.relu_().mul_(2)
        y = nn.functional.dropout(y, 0.5, module.training)
        y[:, 0] = 0
        logits: Tensor = module.fc(pooled(y.contiguous()).view(-1, 3))
        return logits

    module = Functional(forward)
    graph = capture(module, SHAPE)
    operators = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    for operator in operators:
        assert not operator.partition(".")[2].partition(".")[0].endswith("_"), operator
    assert not {"aten.clone.default", "aten.dropout.default", "aten.view.default"} & set(operators)
    x = torch.randn(5, *SHAPE)
    untouched = x.clone()
    assert torch.allclose(graph(x)[0], module(x))
    assert torch.equal(x, untouched)


@pytest.mark.parametrize("share", [2, 3])
def test_parts_as_long_as_the_batch_are_slices(share: int) -> None:
    def forward(module: Functional, x: Tensor) -> Tensor:
        views = [x.roll(number, 3) * (1 + number) for number in range(share)]
        parts = module.fc(pooled(torch.cat(views))).chunk(share)
        logits: Tensor = parts[0] - parts[-1]
        return logits

    module = Functional(forward)
    graph = capture(module, SHAPE)
    # The ONNX exporter cannot fold a split whose length is the batch.
    assert "aten.split.Tensor" not in [op_name(node) for node in graph.graph.nodes]
    for batch in (1, 2, 5):
        x = torch.randn(batch, *SHAPE)
        assert torch.allclose(graph(x)[0], module(x))


@pytest.mark.parametrize("kind", [ConvNet, AttentionNet])
def test_any_batch_runs(kind: Kind) -> None:
    module, program = captured(kind)
    for batch in (1, 2, 5):
        x = torch.randn(batch, *SHAPE)
        with torch.no_grad():
            assert torch.allclose(program.logits(0, x), module(x), atol=1e-6)


def test_tensors_keep_the_module_s_names_and_memory() -> None:
    module, program = captured(ConvNet)
    graph = graph_of(program, "model")
    assert tensor_names(graph)[:3] == ["conv1.weight", "bn1.weight", "bn1.bias"]
    for name, tensor in module.state_dict().items():
        if name in tensor_names(graph):
            assert tensor.data_ptr() == graph.state_dict()[name].data_ptr()


def test_the_text_is_the_same_in_every_run() -> None:
    module = captured(AttentionNet).module
    first, second = (graph_text("model", capture(module, SHAPE)) for _ in range(2))
    assert first == second


def test_symbols_of_the_batch_are_called_b() -> None:
    def forward(module: Functional, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2).reshape(-1, 3)
        logits: Tensor = module.fc(rows).reshape(-1, 256, 4).mean(1)
        return logits

    text = graph_text("model", capture(Functional(forward), SHAPE))
    assert "%reshape_1: [256*b, 3]" in text


@pytest.mark.parametrize("bounds", [(0, 0.5), (-0.5, 1), (None, 1)])
def test_bounds_of_values_are_of_one_type(bounds: tuple[float | None, float]) -> None:
    low, high = bounds
    graph = capture(Functional(lambda module, x: module.fc(pooled(x).clamp(low, high))), SHAPE)
    (clamp,) = (n for n in graph.graph.nodes if n.name.startswith("clamp"))
    assert {type(bound) for bound in clamp.args[1:]} <= {float, type(None)}


def data_dependent(module: Functional, x: Tensor) -> object:
    return module.fc(pooled(x)) if float(x.sum()) > 0 else module.fc(-pooled(x))


def fixed_batch(module: Functional, x: Tensor) -> object:
    return module.fc(pooled(x)) + torch.zeros(13, 4)


def quantised(module: Functional, x: Tensor) -> object:
    return module.fc(torch.fake_quantize_per_tensor_affine(pooled(x), 0.1, 0, -128, 127))


def in_numpy(module: Functional, x: Tensor) -> object:
    raise ValueError("this model\nneeds two lines to say so")


@pytest.mark.parametrize("function", [data_dependent, fixed_batch, in_numpy, quantised])
def test_a_model_that_cannot_be_captured_is_one_clear_line(function: Callable[..., object]) -> None:
    with pytest.raises(PbcError) as caught:
        capture(Functional(function), SHAPE)
    message = str(caught.value)
    assert message.startswith("Functional cannot be captured for inputs of shape (3, 16, 16): ")
    assert "\n" not in message


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = self.fc(pooled(x + y))
        return logits


def test_a_model_of_two_inputs() -> None:
    with pytest.raises(PbcError, match="TwoInputs cannot be captured") as caught:
        capture(TwoInputs(), SHAPE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda module, x: (module.fc(pooled(x)), pooled(x)), 2),
        (lambda module, x: {"out": module.fc(pooled(x)), "aux": pooled(x)}, 2),
    ],
)
def test_a_model_that_returns_several_values(function: Callable[..., object], count: int) -> None:
    with pytest.raises(PbcError, match=f"returns {count} values; pbc trains one logits tensor"):
        capture(Functional(function), SHAPE)


class Regions(nn.Module):
    """Parts in other precisions and without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv(x).sin()
        with torch.no_grad():
            z = y.float().cos()
        logits: Tensor = self.fc((y.float() + z).mean((2, 3)))
        return logits


def test_every_operator_knows_its_line_in_regions_too() -> None:
    graph = capture(Regions(), (3, 8, 8))
    origins = {
        op_name(node): origin(node) for node in graph.graph.nodes if node.op == "call_function"
    }
    assert all("test_capture.py" in where for where in origins.values())
    first = Regions.forward.__code__.co_firstlineno
    assert f'", line {first + 2})' in origins["aten.sin.default"]
    assert f'", line {first + 4})' in origins["aten.cos.default"]
    assert origins["aten.conv2d.default"].startswith(" in conv (")


def test_a_forward_for_one_number_of_images_is_told() -> None:
    loops = Functional(lambda module, x: module.fc(torch.stack([pooled(i[None])[0] for i in x])))
    with pytest.raises(PbcError, match="made for one number of images"):
        capture(loops, SHAPE)


class Filtered(nn.Module):
    """A filter of frequencies, as global filter networks have it (Rao et al., 2021)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.fc = nn.Linear(16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.view_as_complex(self.weight) if not self.weight.is_complex() else self.weight
        back = torch.fft.irfft2(torch.fft.rfft2(x) * scale, s=x.shape[-2:])
        logits: Tensor = self.fc(back.mean(1).flatten(1))
        return logits


def test_complex_numbers_pass_through_and_are_not_stored() -> None:
    module = Filtered(torch.randn(3, 16, 9, 2))
    graph = fold_constants(capture(module, SHAPE), {"fc.weight", "fc.bias"})
    assert not any(value.is_complex() for value in graph.state_dict().values())
    x = torch.randn(2, *SHAPE)
    assert torch.allclose(graph(x)[0], module(x), atol=1e-5)
    whole = Filtered(torch.randn(3, 16, 9, dtype=torch.complex64))
    with pytest.raises(PbcError, match=r"^Filtered has weight in complex64, .*view_as_complex"):
        capture(whole, SHAPE)


class Keywords(nn.Module):
    """Modules named like keywords of Python, and a forward of any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Linear(8, 4), "global": nn.Linear(8, 4)})
        self.add_module("not", nn.Conv2d(3, 8, 3))

    def forward(self, *images: Tensor) -> Tensor:
        x = self.get_submodule("not")(*images).mean((2, 3))
        scores: Tensor = self.heads["class"](x) + self.heads["global"](x)
        return scores


def test_names_may_be_keywords_and_a_forward_may_take_any_number_of_inputs() -> None:
    net = Keywords()
    graph = capture(net, (3, 16, 16))
    assert {"heads.class.weight", "not.weight"} <= set(tensor_names(graph))
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(graph(x)[0], net(x))


class Named(nn.Module):
    """A network with a tensor of this name behind a layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.register_parameter(name, nn.Parameter(torch.ones(8)))
        self.last = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.last(self.conv(x).relu()) * self.get_parameter(self.name)[:, None, None]
        logits: Tensor = self.fc(maps.mean((2, 3)))
        return logits


@pytest.mark.parametrize("name", ["x", "labels", "loss", "momentum", "learning_rate", "feature_0"])
@pytest.mark.parametrize("strategy", ["full", "linear-probe"])
def test_a_parameter_called_as_an_input_of_graphs_is_told(name: str, strategy: str) -> None:
    with pytest.raises(PbcError, match=f"has a tensor called '{name}'.*such as own_{name}"):
        make_program(Named(name), strategy)


class Listed(Named):
    """The same in a list, whose first is called feature.0."""

    def __init__(self) -> None:
        super().__init__("scale")
        self.feature = nn.ParameterList([self.scale])


def test_a_node_of_a_tensor_gives_up_the_name_of_a_feature() -> None:
    torch.manual_seed(0)
    module = Listed().eval()
    del module.scale
    module.name = "feature.0"
    program = split(lambda: module, "bias")
    level, images = program.levels[0], torch.randn(2, *SHAPE)
    theta = [program.parameters[title].detach() for title in parameter_names(level.body)]
    (logits,) = level.body(*level.features(images).values(), *theta)
    assert torch.allclose(logits, module(images), atol=1e-6)
