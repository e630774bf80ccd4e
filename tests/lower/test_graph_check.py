from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from networks import ConvNet, ResidualNet, split

from pbc.bundle.graph_name import PREFIX
from pbc.bundle.ladder import INT8
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.lower.backend import backend
from pbc.lower.graph_check import bound, graph_errors
from pbc.proxies.quantization import unrounded
from pbc.proxies.trial import rounded
from pbc.testing import with_request


@cache
def in_int8(kind: type) -> tuple[Program, LevelGraphs]:
    program = with_request(split(kind), engine="onnxruntime")
    return program, rounded(replace(program.levels[0], precision=INT8), program.network.example)


def lowered(program: Program, level: LevelGraphs) -> dict[str, float]:
    runner = backend("onnxruntime").lowering().runner(program, level)
    return {str(role): error for role, error in graph_errors(program, level, runner).items()}


@pytest.mark.parametrize("kind", [ConvNet, ResidualNet])
def test_the_bound_of_an_int8_prefix_is_made_of_its_own_rounding(kind: type) -> None:
    program, level = in_int8(kind)
    most = bound(program, level, PREFIX)
    assert 1e-2 <= most < 0.1
    assert lowered(program, level)["prefix"] <= most


@pytest.mark.parametrize("share", [0.8, 1.2])
def test_a_wrong_int8_prefix_does_not_pass(share: float) -> None:
    """One layer's scales are not those that it was given: a fifth off."""
    program, level = in_int8(ResidualNet)
    assert level.prefix is not None
    wrong = level.copy()
    assert wrong.prefix is not None
    scale = next(name for name in tensor_names(wrong.prefix) if name.endswith("_scale"))
    replace_tensor(wrong.prefix, scale, get_tensor(wrong.prefix, scale) * share)
    runner = backend("onnxruntime").lowering().runner(program, wrong)
    assert graph_errors(program, level, runner)[PREFIX] > bound(program, level, PREFIX)


def test_unrounded_keeps_the_ranges() -> None:
    _, level = in_int8(ConvNet)
    assert level.prefix is not None
    exact, images = unrounded(level.prefix), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        (free,), (own,) = exact(images), level.prefix(images)
        (cut,), (cut_too,) = exact(images * 1e6), exact(images * 1e8)
    assert 0 < float((free - own).abs().max()) < 0.1 * float(own.abs().max())
    torch.testing.assert_close(cut, cut_too, rtol=1e-3, atol=1e-3)
