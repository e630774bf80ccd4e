"""Tiny networks that the tests of passes compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import tiny
import torch
from torch import Tensor, nn

from pbc import bundle, compiler
from pbc.bundle import Bundle
from pbc.data import InputSpec
from pbc.ir.calibration import Calibration
from pbc.ir.program import Program
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import make_program, retarget, run_passes, with_request


class ConvNet(nn.Module):
    """Two convolutions with batch norms, pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """A residual block with a hidden width of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, hidden, 1)
        self.up = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.up(torch.relu(self.down(x)))
        return x + up


class ResidualNet(nn.Module):
    """A stem and three residual blocks; the hidden widths are free, the stream may be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.blocks = nn.Sequential(*[Block(16, 32) for _ in range(3)])
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class AttentionNet(nn.Module):
    """Patches, one attention block with a fused qkv, one MLP, a classifier."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 64)
        self.down = nn.Linear(64, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = self.attend(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        logits: Tensor = self.head(x.mean(1))
        return logits

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)


class MaskedNet(AttentionNet):
    """Attention with a bias for each head and pair of the four positions, as of Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, 4, 4))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, self.bias)


class ChannelsLastNet(nn.Module):
    """A stem, then blocks with the channels behind the positions, as in Swin and ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*[ChannelsLastBlock(16, 32) for _ in range(3)])
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).permute(0, 2, 3, 1))
        logits: Tensor = self.fc(x.mean((1, 2)))
        return logits


class ChannelsLastBlock(nn.Module):
    """A residual MLP over the last axis."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + down


def settled(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with repeatable weights, and batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            elif name.endswith(("running_var", "weight")):
                tensor.copy_(1 + 0.3 * noise.clamp(-2, 2))
            else:
                tensor.copy_(0.1 * noise)
    return module.eval()


Kind = Callable[[], nn.Module]
"""A class of this file: networks are captured once for each."""


class Captured(NamedTuple):
    """An eager module and the program that was captured from it."""

    module: nn.Module
    program: Program


@cache
def captured(kind: Kind, strategy: str = "linear-probe") -> Captured:
    module = settled(kind())
    return Captured(module, make_program(module, strategy))


@cache
def split(kind: Kind, strategy: str = "linear-probe") -> Program:
    """Captured, marked and split."""
    return run_passes(captured(kind, strategy).program, MarkTrainable(), SplitPrefix())


@cache
def analysed(kind: Kind, strategy: str = "linear-probe") -> Program:
    return run_passes(split(kind, strategy), IndependentDims())


@cache
def pruned(kind: Kind, strategy: str = "linear-probe", levels: int = 2) -> Program:
    """With proxies that no calibration data aligned; sizes are multiples of 4."""
    plan = PlanLevels(levels=levels, min_cost=0.2, rounding=4)
    return run_passes(analysed(kind, strategy), plan, PruneDims())


def compiled(folder: Path, kind: Kind, strategy: str, engine: str) -> Bundle:
    """A bundle in this folder, of two levels, with its training step where the engine wants one."""
    path = folder / f"{kind.__name__}-{strategy}-{engine}.pbc".replace(":", "-")
    if path.exists():
        return Bundle.open(path)
    program = with_request(pruned(kind, strategy, levels=1), engine=engine)
    program = run_passes(program, FoldBatchNorm(), DeriveTrainStep(), Lower())
    return bundle.write(path, *compiler.package(program))


def trained(program: Program, names: Iterable[str]) -> Program:
    """The captured program with exactly these parameters to train, marked and split."""
    return run_passes(retarget(program, "by hand", names), MarkTrainable(), SplitPrefix())


def calibration(folder: Path, spec: InputSpec, per_class: int = 60) -> Calibration:
    """Noisy photos of three colours, decoded, in a fixed order."""
    return Calibration.open(tiny.photos(folder, per_class), spec, seed=0)
