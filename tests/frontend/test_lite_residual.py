"""TinyTL's lite residual modules: how they start, what they are made of, what they save."""

from __future__ import annotations

import pytest
import torch
from networks import captured, settled, split
from torch import nn

from pbc.errors import PbcError
from pbc.frontend.lite_residual import SHARE, LiteModule
from pbc.ir.levels import LevelGraphs
from pbc.testing import assert_gradients, eager_gradients, gradients, make_program
from pbc.training_graph.autodiff import differentiate
from pbc.training_graph.memory import StepMemory, step_memory
from pbc.training_graph.optimizers import with_update


class Deep(nn.Module):
    """Wide enough that modules need not be narrower than their blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.blocks = nn.Sequential(*[Bottleneck() for _ in range(2)])
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Conv2d(32, 128, 3, padding=1)
        self.narrow = nn.Conv2d(128, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.narrow(torch.relu(self.widen(x)))
        return x + y


def memory(strategy: str, batch: int = 8) -> StepMemory:
    program = split(Deep, strategy)
    gradient = differentiate(program.levels[0].body, program.open_axes)
    level = LevelGraphs(
        body=program.levels[0].body,
        forward=gradient.forward,
        updates={"sgd": with_update(gradient.backward, "sgd")},
    )
    return step_memory(level, batch, classes=10)["sgd"]


def test_the_model_starts_unchanged() -> None:
    module, program = captured(Deep, "lite-residual")
    biases = {name for name, _ in settled(Deep()).named_parameters() if name.endswith("bias")}
    assert {name for name in program.trainable if ".lite." not in name} == biases | {"fc.weight"}
    with torch.no_grad():
        untouched = settled(Deep())(program.network.example)
        assert torch.equal(module(program.network.example), untouched)
    split_program = split(Deep, "lite-residual")
    assert_gradients(
        gradients(split_program), eager_gradients(module, split_program), tolerance=2e-3
    )


def test_a_module_is_as_the_paper_draws_it() -> None:
    lite = LiteModule([2, 16, 20, 20], [2, 24, 10, 10], share=1.0)
    shapes = {name: tuple(weight.shape) for name, weight in lite.named_parameters()}
    assert shapes == {
        "grouped.weight": (16, 8, 5, 5),  # two groups
        "norm.weight": (16,),
        "norm.bias": (16,),
        "narrow.weight": (24, 16, 1, 1),
        "last_norm.weight": (24,),
        "last_norm.bias": (24,),
    }
    assert (lite.norm.num_groups, lite.last_norm.num_groups) == (2, 3)
    nn.init.ones_(lite.last_norm.weight)
    assert lite(torch.randn(2, 16, 20, 20), torch.zeros(2, 24, 10, 10)).shape == (2, 24, 10, 10)


@pytest.mark.parametrize(("size", "kernel"), [(20, 5), (9, 3), (4, 1), (2, 1), (1, 1)])
def test_a_kernel_is_no_larger_than_the_map(size: int, kernel: int) -> None:
    lite = LiteModule([2, 16, size, size], [2, 16, size, size], share=1.0)
    assert lite.grouped.kernel_size == (kernel, kernel)
    x = torch.randn(2, 16, size, size)
    assert lite(x, x).shape == x.shape


def test_all_modules_have_a_tenth_of_the_weights_at_most() -> None:
    module = captured(Deep, "lite-residual").module
    sizes = {name: weight.numel() for name, weight in module.named_parameters()}
    inside = sum(size for name, size in sizes.items() if ".lite." in name)
    assert 0 < inside <= SHARE * (sum(sizes.values()) - inside)


def test_what_blocks_save_is_counted_by_hand() -> None:
    """At 16x16 pixels maps are 8x8, and 4x4 in the modules, of 32 channels everywhere."""
    of_one, of_two = memory("lite-residual", 1), memory("lite-residual", 2)
    mask = 128 * 8 * 8  # of the ReLU between the frozen convolutions
    floats = 4 * 32 * 4 * 4  # what the two convolutions and the two norms read
    statistics = 2 * (4 + 4)  # a mean and a deviation for each group
    head = 32 + 10
    assert of_two.saved - of_one.saved == 2 * mask + 2 * 4 * (floats + statistics) + 4 * head + 10


def test_it_takes_a_fraction_of_what_full_training_takes() -> None:
    def held(strategy: str) -> int:
        found = memory(strategy)
        return found.saved + found.gradients + found.state

    assert held("full") >= 4 * held("lite-residual")


def test_blocks_without_maps_are_refused_by_name() -> None:
    with pytest.raises(PbcError, match=r"block blocks.0 takes and returns .* lite-residual needs"):
        make_program(Tokens(), "lite-residual")


class Tokens(nn.Module):
    """Blocks on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3)]
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        logits: torch.Tensor = self.fc(self.blocks(tokens).mean(1))
        return logits
