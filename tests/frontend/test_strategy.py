from __future__ import annotations

import copy
import re

import pytest
import torch
import zoo
from networks import ConvNet, ResidualNet, captured
from torch import Tensor, nn

from pbc.data import InputSpec
from pbc.errors import PbcError, UsageError
from pbc.frontend import models, strategy
from pbc.frontend.traced_network import TracedNetwork
from pbc.testing import (
    assert_gradients,
    eager_gradients,
    gradients,
    graph_of,
    make_program,
    retarget,
)

# What each strategy trains, as patterns over the names of all parameters.
EXPECTED = {
    ("resnet50", "linear-probe"): r"fc\..*",
    ("resnet50", "last-k:2"): r"(layer4\.[12]|fc)\..*",
    ("resnet50", "norm"): r"(.*bn\d\.(weight|bias)|.*downsample\.1\.(weight|bias)|fc\..*)",
    ("resnet50", "bias"): r"(.*\.bias|fc\.weight)",
    ("resnet50", "adapters:2"): r"(layer4\.[12]\.adapter\.(down|up)|fc)\.(weight|bias)",
    ("resnet50", "full"): r".*",
    ("mobilenet_v3_large", "linear-probe"): r"classifier\.3\..*",
    ("mobilenet_v3_large", "last-k:2"): r"(features\.1[456]|classifier)\..*",
    # Conv2dNormActivation: 0 is the convolution, 1 the norm; a squeeze-excite has no norm.
    ("mobilenet_v3_large", "norm"): (
        r"(features\.(0|16)\.1|features\.\d+\.block\.\d\.1|classifier\.3)\.(weight|bias)"
    ),
    ("mobilenet_v3_large", "bias"): r"(.*\.bias|classifier\.3\.weight)",
    ("mobilenet_v3_large", "adapters:2"): r"(features\.1[45]\.adapter\..*|classifier\.3\..*)",
    ("mobilenet_v3_large", "full"): r".*",
    ("vit_b_16", "linear-probe"): r"heads\.head\..*",
    ("vit_b_16", "last-k:2"): r"(encoder\.layers\.encoder_layer_1[01]|encoder\.ln|heads\.head)\..*",
    (
        "vit_b_16",
        "norm",
    ): r"(encoder\.layers\.encoder_layer_\d+\.ln_\d|encoder\.ln|heads\.head)\..*",
    ("vit_b_16", "bias"): r"(.*bias|heads\.head\.weight)",
    ("vit_b_16", "adapters:2"): (
        r"(encoder\.layers\.encoder_layer_1[01]\.adapter|heads\.head)\..*"
    ),
    ("vit_b_16", "full"): r".*",
}


@pytest.mark.parametrize(("model", "text"), EXPECTED)
def test_on_every_architecture(model: str, text: str) -> None:
    """The right parameters train; level 0 and its gradients are the eager module's."""
    module, program = zoo.apply(text, model, zoo.SMALL[model])
    names = [name for name, _ in module.named_parameters()]
    pattern = re.compile(EXPECTED[model, text])
    assert program.trainable == {name for name in names if pattern.fullmatch(name)}
    program = zoo.split(program)
    assert program.parameters.keys() == program.trainable
    with torch.no_grad():
        expected = module(program.network.example)
        logits = program.logits(0, program.network.example)
    assert float((logits - expected).abs().max()) <= 1e-4 * max(1, float(expected.abs().max()))
    assert_gradients(gradients(program), eager_gradients(module, program), tolerance=2e-3)


@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v3_large", "vit_b_16"])
def test_frozen_layers_before_what_trains_are_in_the_prefix(model: str) -> None:
    program = zoo.split(zoo.apply("last-k:2", model, zoo.SMALL[model]).program)
    assert program.levels[0].prefix is not None
    whole = zoo.split(zoo.apply("full", model, zoo.SMALL[model]).program)
    assert whole.levels[0].prefix is None


def test_a_model_starts_as_it_was_under_adapters() -> None:
    module, program = zoo.captured("mobilenet_v3_large", zoo.SMALL["mobilenet_v3_large"])
    adapted = copy.deepcopy(module)
    facts = program.network
    traced = TracedNetwork.of(adapted, facts.head, facts.example)
    strategy.Adapters(2).insert(traced, facts.example)
    with torch.no_grad():
        assert torch.equal(adapted(program.network.example), module(program.network.example))


def test_adapters_suit_what_the_blocks_put_out() -> None:
    image = captured(ResidualNet, "adapters:1").program
    assert "conv2d" in image.text().partition("adapter.down.weight")[0].splitlines()[-1]


class Encoder(nn.Module):
    """Blocks on token sequences: adapters are linear layers there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)
        )
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(x.shape[0], -1, 16)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(x.mean(1))
        return logits


def test_adapters_on_token_sequences() -> None:
    program = make_program(Encoder(), "adapters:1")
    weights = dict(graph_of(program, "model").named_parameters())
    assert weights["layers.1.adapter.down.weight"].shape == (8, 16)
    assert weights["layers.1.adapter.up.weight"].shape == (16, 8)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers(x), x


def test_adapters_need_one_tensor_per_block() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(3)])
            self.layers = nn.Sequential(Pair())
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.layers(self.stem(x))[0].mean((2, 3)))
            return logits

    with pytest.raises(PbcError, match=r"block layers.0 puts out tuple; adapters need one tensor"):
        make_program(Model(), "adapters:1")


def test_a_block_without_positions_is_told_by_its_shape() -> None:
    example = torch.zeros(2, 3, 8, 8)
    pooled = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(PbcError, match=r"block 2 puts out \[2, 3\]; adapters need one tensor"):
        strategy.block_outputs(pooled, ["2"], example)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear-prob", "no strategy named 'linear-prob'; did you mean 'linear-probe'"),
        ("lastk:3", "no strategy named 'lastk'; did you mean 'last-k'"),
        ("", "no strategy named ''"),
        (
            "last-k",
            r"strategy 'last-k' needs a positive whole number: last-k:K, for example last-k:3",
        ),
        ("last-k:", "strategy 'last-k:' needs a positive whole number"),
        ("last-k:0", "strategy 'last-k:0' needs a positive whole number"),
        ("last-k:-1", "strategy 'last-k:-1' needs a positive whole number"),
        ("adapters:two", "strategy 'adapters:two' needs a positive whole number: adapters:N"),
        ("norm:3", "strategy 'norm' takes no argument, got 'norm:3'"),
        ("full:", "strategy 'full' takes no argument, got 'full:'"),
    ],
)
def test_what_cannot_be_meant(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        strategy.parse(text)


@pytest.mark.parametrize("text", ["last-k:4", "adapters:4"])
def test_more_blocks_than_there_are(text: str) -> None:
    message = r"ResidualNet has 3 blocks; the strategy asks for the last 4 \(--blocks PATTERN says"
    with pytest.raises(PbcError, match=message):
        make_program(ResidualNet(), text)


def test_norm_without_a_norm() -> None:
    with pytest.raises(PbcError, match="ResidualNet has no normalisation layer with a scale"):
        make_program(ResidualNet(), "norm")


class BatchNormAct(nn.BatchNorm2d):
    """A norm with its activation inside, as timm's are."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(super().forward(x))
        return activated


class ConvNormAct(nn.Module):
    """A convolution and a norm, called after both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = BatchNormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.bn(self.conv(x))
        return activated


class Pool(nn.Module):
    """Layers that have nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.flatten(self.pool(x))
        return flat


def network(module: nn.Module) -> TracedNetwork:
    spec = InputSpec((3, 16, 16), models.IMAGENET_MEAN, models.IMAGENET_STD)
    source = models.given(module, "net", spec)
    return TracedNetwork.of(source.module, source.head, torch.zeros(2, 3, 16, 16))


def activated() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(ConvNormAct()), Pool(), nn.Linear(8, 4))


def test_a_norm_may_have_its_activation_inside() -> None:
    assert strategy.parse("norm").trainable(network(activated())) == {
        "0.0.bn.weight",
        "0.0.bn.bias",
    }


def test_a_block_has_something_to_train() -> None:
    assert network(activated()).blocks == ("0.0",)
    trainable = strategy.parse("last-k:1").trainable(network(activated()))
    assert "0.0.conv.weight" in trainable


def test_the_classifier_always_trains() -> None:
    for text in ("linear-probe", "last-k:1", "bias", "full"):
        trainable = captured(ResidualNet, text).program.trainable
        assert {"fc.weight", "fc.bias"} <= trainable
    with pytest.raises(ValueError, match="only a program that was not split yet"):
        retarget(zoo.split(captured(ConvNet).program), "norm", [])
