"""Fold frozen batch norms into the layer before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pbc.ir.program import Program
from pbc.ir.rewrite import fuse_batch_norms


@dataclass(frozen=True)
class FoldBatchNorm:
    """Turn a frozen convolution or linear layer and its frozen batch norm into one layer.

    Before::

        %conv2d = conv2d(%x, @conv1.weight)
        %batch_norm = batch_norm(%conv2d, @bn1.weight, @bn1.bias, @bn1.running_mean, …)
        %relu = relu(%batch_norm)

    After, with other weights::

        %conv2d = conv2d(%x, @conv1.weight_folded, @conv1.weight_folded_bias)
        %relu = relu(%conv2d)

    Does nothing where the layer's output is read elsewhere too, or where a weight, bias, scale or
    shift is trained.
    """

    stage: ClassVar[str] = "fold"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        for level in program.levels:
            for graph in level.graphs.values():
                fuse_batch_norms(graph)
        return program
