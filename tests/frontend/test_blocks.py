from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from networks import AttentionNet, ConvNet, ResidualNet
from torch import Tensor, nn

from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.frontend import models, strategy
from pbc.frontend.torchvision_shim import import_torchvision
from pbc.frontend.traced_network import TracedNetwork
from pbc.testing import make_program


def read(module: nn.Module, size: int = 32, pattern: str | None = None) -> TracedNetwork:
    spec = InputSpec((3, size, size), models.IMAGENET_MEAN, models.IMAGENET_STD)
    source = models.given(module, "net", spec)
    return TracedNetwork.of(source.module, source.head, torch.randn(2, 3, size, size), pattern)


class Unit(nn.Sequential):
    """A convolution with its norm and activation: one layer."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Unit(width, width), Unit(width, width)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = x + self.two(self.one(x))
        return total


class Stage(nn.Module):
    """A stage as the libraries write it: a downsampling layer and a list of blocks."""

    def __init__(self, a: int, b: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(b) for _ in range(depth))
        self.down = nn.Conv2d(a, b, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class Classifier(nn.Module):
    """Modules run in the order given, whatever the order in which they were made; then a head."""

    def __init__(self, width: int, order: Sequence[str], **parts: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(width, 4)
        for name, part in parts.items():
            self.add_module(name, part)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def staged() -> nn.Module:
    stages = {f"stage{n}": Stage(8 * n, 8 * (n + 1), n + 1) for n in (1, 2)}
    return Classifier(24, ["stem", "stage1", "stage2"], **stages, stem=Unit(3, 8))


def parallel() -> nn.Module:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(Unit(8, 4), Unit(4, 4))
            self.right = nn.Sequential(Unit(8, 4), Unit(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.left(x), self.right(x)], 1)

    names = [f"mixed{n}" for n in range(3)]
    return Classifier(8, ["stem", *names], stem=Unit(3, 8), **{name: Mixed() for name in names})


def dense() -> nn.Module:
    class Dense(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            maps = [x]
            for layer in self.values():
                maps.append(layer(torch.cat(maps, 1)))
            return torch.cat(maps, 1)

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = Unit(width, 8), Unit(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.two(self.one(x))
            return y

    layers = {f"l{n}": Layer(8 + 4 * n) for n in range(3)}
    return Classifier(20, ["stem", "dense"], stem=Unit(3, 8), dense=Dense(layers))


def bottlenecks() -> nn.Module:
    """Blocks of units in a sequence of their own, one of them without a residual sum."""

    class Inverted(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.block = nn.Sequential(Unit(a, 2 * a), Unit(2 * a, b))
            self.same = a == b

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x)
            return x + y if self.same else y

    blocks = nn.Sequential(Unit(3, 8), Inverted(8, 8), Inverted(8, 12), Inverted(12, 12))
    return Classifier(12, ["features"], features=blocks)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ResidualNet, ["blocks.0", "blocks.1", "blocks.2"]),
        (ConvNet, ["conv1", "conv2"]),
        (AttentionNet, ["patch", "qkv", "proj", "up", "down"]),
        (staged, [f"stage{n}.blocks.{i}" for n in (1, 2) for i in range(n + 1)]),
        (parallel, ["mixed0", "mixed1", "mixed2"]),
        (dense, ["dense.l0", "dense.l1", "dense.l2"]),
        (bottlenecks, ["features.1", "features.2", "features.3"]),
        (
            lambda: Classifier(8, ["a"], a=nn.Sequential(Unit(3, 8), Unit(8, 8), Unit(8, 8))),
            ["a.0", "a.1", "a.2"],
        ),
    ],
)
def test_blocks_of_small_networks(kind: Callable[[], nn.Module], expected: list[str]) -> None:
    assert read(kind()).blocks == tuple(expected)


LIBRARY = {
    "torchvision:densenet121": (58, "features.denseblock4.denselayer16"),
    "torchvision:vgg11": (8, "features.18"),
    "torchvision:regnet_y_400mf": (16, "trunk_output.block4.block4-5"),
    "torchvision:shufflenet_v2_x0_5": (16, "stage4.3"),
    "timm:convnext_atto": (12, "stages.3.blocks.1"),
    "timm:levit_128s": (15, "stages.2.blocks.3"),
    "timm:mobilenetv4_conv_small": (16, "blocks.3.5"),
    "timm:edgenext_xx_small": (12, "stages.3.blocks.1"),
    "timm:ghostnet_100": (16, "blocks.8.3"),
    "timm:twins_svt_small": (18, "blocks.3.3"),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_blocks_of_library_networks(name: str) -> None:
    library, _, model = name.partition(":")
    if library == "timm":
        import_torchvision()
        import timm

        module = timm.create_model(model, pretrained=False)
    else:
        module = import_torchvision().models.get_model(model, weights=None)
    blocks = read(module, 224 if model in ("levit_128s", "twins_svt_small") else 64).blocks
    assert (len(blocks), blocks[-1]) == LIBRARY[name]


def test_last_k_goes_by_the_order_of_execution() -> None:
    parts = {
        "neck": nn.Conv2d(8, 8, 1),
        "blocks": nn.Sequential(Residual(8), Residual(8)),
        "stem": Unit(3, 8),
    }
    network = read(Classifier(8, ["stem", "blocks", "neck"], **parts))
    assert network.blocks == ("blocks.0", "blocks.1")
    trained = strategy.parse("last-k:1").trainable(network)
    assert {name.rsplit(".", 1)[0] for name in trained} == {
        "blocks.1.one.0", "blocks.1.one.1", "blocks.1.two.0", "blocks.1.two.1", "neck", "head",
    }  # fmt: skip


def test_a_block_that_runs_again_is_one_block_and_does_not_train_as_the_last() -> None:
    parts = {"a": Residual(8), "b": Residual(8), "stem": Unit(3, 8)}
    network = read(Classifier(8, ["stem", "a", "b", "a"], **parts))
    assert network.blocks == ("a", "b")
    trained = strategy.parse("last-k:1").trainable(network)
    assert {name.split(".")[0] for name in trained} == {"b", "head"}


def test_a_pattern_says_which_modules_are_blocks() -> None:
    network = read(staged(), pattern="stage?")
    assert network.blocks == ("stage1", "stage2")
    trained = strategy.parse("last-k:1").trainable(network)
    assert {name.split(".")[0] for name in trained} == {"stage2", "head"}
    inside = ("stage1.blocks.0", "stage1.blocks.1", "stage2.blocks.0", "stage2.blocks.1")
    assert read(staged(), pattern="stage*.blocks.*").blocks == (*inside, "stage2.blocks.2")
    assert read(staged(), pattern="stage*").blocks == ("stage1", "stage2")
    with pytest.raises(PbcError, match=r"'layer\*', a glob, .* are stem, stage1, stage2"):
        read(staged(), pattern="layer*")


def test_a_program_lists_its_blocks_and_what_of_them_trains() -> None:
    program = make_program(ResidualNet(), "last-k:1")
    assert [(b.name, b.values > 0, b.trained == b.values) for b in program.network.blocks] == [
        ("blocks.0", True, False),
        ("blocks.1", True, False),
        ("blocks.2", True, True),
    ]
    assert program.network.blocks[0].trained == 0
