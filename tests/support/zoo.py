"""The three architectures that everything has to work on, captured once per worker."""

from __future__ import annotations

import copy
from functools import cache
from typing import NamedTuple

from torch import nn

from pbc import compiler
from pbc.frontend import models, strategy
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.program import Program
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import TARGET, retarget

Shape = tuple[int, int, int]

SMALL: dict[str, Shape] = {
    "resnet50": (3, 64, 64),
    "mobilenet_v3_large": (3, 64, 64),
    "vit_b_16": (3, 32, 32),
}


class Captured(NamedTuple):
    """An eager module with random weights and the program that was captured from it."""

    module: nn.Module
    program: Program


@cache
def captured(model: str, shape: Shape) -> Captured:
    source = models.load(model, models.RANDOM, shape)
    options = compiler.CompileOptions(
        target=TARGET, engine="pytorch", weights=models.RANDOM, shape=shape
    )
    return Captured(source.module, compiler.start(source, options))


def trained(chosen: strategy.Strategy, module: nn.Module, program: Program) -> frozenset[str]:
    """What a strategy that inserts nothing trains of a module that was captured."""
    network = TracedNetwork.of(module, program.network.head, program.network.example)
    return chosen.trainable(network) | frozenset(program.network.head.parameters)


def apply(text: str, model: str, shape: Shape) -> Captured:
    """The program of a strategy; only one that inserts something needs a capture of its own."""
    module, program = captured(model, shape)
    chosen = strategy.parse(text)
    if not isinstance(chosen, strategy.Adapters):
        return Captured(module, retarget(program, text, trained(chosen, module, program)))
    module = copy.deepcopy(module)
    facts = program.network
    source = models.Source(model, module, facts.input, facts.head, models.RANDOM, None)
    options = compiler.CompileOptions(target=TARGET, engine="pytorch", strategy=text, shape=shape)
    return Captured(module, compiler.start(source, options))


def split(program: Program) -> Program:
    """Marked and split; whether that changes any value is what a test compares."""
    return SplitPrefix()(MarkTrainable()(program))


@cache
def analysed(text: str, model: str, shape: Shape) -> Program:
    return IndependentDims()(split(apply(text, model, shape).program))
