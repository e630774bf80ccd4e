"""Sparse back-propagation: what trains, its gradients beside the dense layer's, what it saves."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from networks import settled
from torch import Tensor, nn

from pbc.errors import PbcError, UsageError
from pbc.frontend import strategy
from pbc.frontend.capture import EXAMPLE_BATCH
from pbc.ir.graph import graph_inputs, graph_outputs, output_nodes, shape_of
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.scheme.scheme import Scheme
from pbc.scheme.sparse import SelectedChannels
from pbc.testing import (
    assert_gradients,
    eager_gradients,
    gradients,
    make_program,
    run_passes,
    with_request,
)
from pbc.training_graph.autodiff import differentiate
from pbc.training_graph.memory import StepMemory, step_memory
from pbc.training_graph.names import LABELS, SMOOTHING
from pbc.training_graph.optimizers import with_update

SCHEME = "sparse:b3,widen=1/4,depthwise=1/2,narrow=1/8,grouped=1,hidden=1/2"
AXES = {"widen": 1, "depthwise": 0, "narrow": 1, "hidden": 1}


class Net(nn.Module):
    """Every kind of layer that can train in part, and one of two groups, which cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.widen = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, 2, 1, groups=32, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.narrow = nn.Conv2d(32, 24, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=2)
        self.hidden = nn.Linear(24, 20)
        self.fc = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.widen(torch.relu(self.stem(x)))))
        x = nn.functional.hardswish(self.norm2(self.depthwise(x)))
        x = torch.relu(self.grouped(self.norm3(self.narrow(x))))
        logits: Tensor = self.fc(torch.relu(self.hidden(x.mean((2, 3)))))
        return logits


def derived_gradients(program: Program) -> dict[str, Tensor]:
    """The gradients of the derived step, of the loss of `pbc.testing.gradients`."""
    level, example = program.levels[0], program.network.example
    gradient = differentiate(level.body, program.open_axes)
    labels = torch.arange(len(example)) % 10
    known = {**level.features(example), **program.parameters, LABELS: labels}
    known[SMOOTHING] = torch.zeros(())
    for graph in (gradient.forward, gradient.backward):
        results = graph(*[known[name] for name in graph_inputs(graph)])
        known |= dict(zip(graph_outputs(graph), results, strict=True))
    return {name: known[name] for name in gradient.parameters}


@pytest.fixture(scope="module")
def program() -> Program:
    return make_program(settled(Net()), SCHEME, passes=(MarkTrainable(), SplitPrefix()))


def test_the_biases_of_the_last_layers_and_parts_of_weights_train(program: Program) -> None:
    parts = {f"{name}.parametrizations.weight.original" for name in AXES}
    biases = {"norm3.bias", "grouped.bias", "hidden.bias"}
    assert program.trainable == parts | biases | {"grouped.weight", "fc.weight", "fc.bias"}
    sizes = {name: list(program.parameters[name].shape) for name in parts}
    assert sizes["widen.parametrizations.weight.original"] == [32, 4, 3, 3]
    assert sizes["depthwise.parametrizations.weight.original"] == [16, 1, 3, 3]
    assert sizes["narrow.parametrizations.weight.original"] == [24, 4, 1, 1]
    assert sizes["hidden.parametrizations.weight.original"] == [20, 12]


def test_the_model_starts_unchanged(program: Program) -> None:
    with torch.no_grad():
        expected = settled(Net())(program.network.example)
    assert torch.equal(program.network.reference, expected)


@pytest.mark.parametrize("of", [gradients, derived_gradients])
def test_gradients_are_the_dense_ones_sliced(program: Program, of: object) -> None:
    module = settled(Net())
    names = {name: f"{name}.parametrizations.weight.original" for name in AXES}
    dense_names = (program.trainable - set(names.values())) | {f"{name}.weight" for name in names}
    dense = eager_gradients(module, replace(program, trainable=frozenset(dense_names)))
    for name, axis in AXES.items():
        weight = module.get_parameter(f"{name}.weight")
        chosen = SelectedChannels(weight, axis, program.parameters[names[name]].shape[axis])
        dense[names[name]] = dense.pop(f"{name}.weight").index_select(axis, chosen.index)
    assert callable(of)
    assert_gradients(of(program), dense, tolerance=1e-5)


def test_those_of_largest_norm_train() -> None:
    weight = torch.zeros(2, 5, 1, 1)
    weight[:, [1, 3, 4]] = torch.tensor([3.0, -4.0, 1.0]).reshape(1, 3, 1, 1)
    assert SelectedChannels(weight, 1, 2).index.tolist() == [1, 3]


@pytest.mark.parametrize("engine", ["onnxruntime", "tvm"])
def test_engines_train_it(program: Program, engine: str) -> None:
    if engine == "tvm":
        pytest.importorskip("tvm")
    before = with_request(program, engine=engine)
    after = run_passes(before, FoldBatchNorm(), DeriveTrainStep(), Lower())
    for check in ("train_step", "lowered_train_step"):
        assert max(after.checks[check]["0"].values()) < 1e-5, check


class Chain(nn.Module):
    """Convolutions and ReLUs on maps of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)
        self.one = nn.Conv2d(32, 64, 3, padding=1)
        self.two = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.three = nn.Conv2d(64, 32, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(torch.relu(self.stem(x))))
        x = torch.relu(self.three(torch.relu(self.two(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def memory(text: str, batch: int) -> StepMemory:
    program = make_program(settled(Chain()), text, passes=(MarkTrainable(), SplitPrefix()))
    gradient = differentiate(program.levels[0].body, program.open_axes)
    level = LevelGraphs(
        body=program.levels[0].body,
        forward=gradient.forward,
        updates={"sgd": with_update(gradient.backward, "sgd")},
    )
    return step_memory(level, batch, classes=10)["sgd"]


@pytest.mark.parametrize("share", ["1/8", "1/4", "1/2"])
def test_what_is_saved_of_an_input_is_counted_by_hand(share: str) -> None:
    """Beside what biases save: of `two` and `three`, a share of 64 channels of 8x8 positions."""
    batch, part = 4, 64 * Fraction(share)
    bare = memory("sparse:b3", batch)
    found = memory(f"sparse:b3,two={share},three={share}", batch)
    assert found.saved - bare.saved == batch * 2 * part * 8 * 8 * 4
    weights = 4 * part * (3 * 3 + 32)
    assert found.gradients - bare.gradients == weights
    assert found.state - bare.state == weights


@pytest.mark.parametrize("share", ["1/4", "1"])
def test_a_part_of_the_operations_is_done(share: str) -> None:
    """Of the product behind a weight's gradient: of 1x1, outputs by positions by what trains."""
    program = make_program(settled(Chain()), f"sparse:b1,three={share}")
    body = run_passes(program, MarkTrainable(), SplitPrefix()).levels[0].body
    gradient = differentiate(body, program.open_axes)
    results = dict(zip(gradient.parameters, output_nodes(gradient.backward), strict=True))
    (theta,) = (node for name, node in results.items() if name.startswith("three.") and "w" in name)
    while theta.target != torch.ops.aten.mm.default:
        (theta,) = theta.all_input_nodes
    outputs, positions = shape_of(theta.all_input_nodes[0])
    assert outputs * positions == 32 * EXAMPLE_BATCH * 8 * 8
    assert shape_of(theta) == (32, int(64 * Fraction(share)))


def test_no_weight_is_saved() -> None:
    one, other = memory("sparse:b3,two=1/4", 1), memory("sparse:b3,two=1/4", 2)
    assert 0 <= 2 * one.saved - other.saved <= 8  # a number or two of no batch


def test_a_scheme_reads_as_it_is_written() -> None:
    text = "b12,features.3.conv=1/4,0=1,fc1=1/8"
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert scheme.fractions["features.3.conv"] == Fraction(1, 4)
    assert str(Scheme.parse("fc1=1/2")) == "b0,fc1=1/2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparse", "or a scheme, such as sparse:b12,features.3.conv=1/4"),
        ("sparse:conv=1/3", "'conv=1/3' of a sparse scheme is neither bK"),
        ("sparse:conv=1/2,b3", "'b3' of a sparse scheme is neither bK"),
        ("sparse:b1,conv=1/2,conv=1", "has layer 'conv' twice"),
    ],
)
def test_what_is_no_scheme_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        strategy.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparse:b7", "Net has 6 layers before its head; .* the biases of the last 7"),
        ("sparse:b1,widn=1/2", "no layer named 'widn'; did you mean 'widen'?"),
        ("sparse:b1,grouped=1/2", "layer grouped has 2 groups: all of its weight trains, or none"),
        ("sparse:b1,fc=1/2", "no layer named 'fc'"),
    ],
)
def test_what_the_network_has_not_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(PbcError, match=words):
        make_program(Net(), text)
