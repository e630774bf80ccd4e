from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from networks import ConvNet, Kind, ResidualNet, pruned, split
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from pbc import bundle, compiler
from pbc.bundle.graph_name import FORWARD, update
from pbc.bundle.optimizers import OPTIMIZERS
from pbc.errors import PbcError
from pbc.ir.graph import (
    NAME,
    get_tensor,
    graph_inputs,
    graph_outputs,
    graph_text,
    output_node,
    output_nodes,
    placeholders,
    tensor_names,
)
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.passes import derive_train_step
from pbc.passes.derive_train_step import CHECK, DeriveTrainStep
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import (
    assert_same,
    assert_text,
    assert_unchanged,
    graph_of,
    make_program,
    run_passes,
    with_request,
)
from pbc.training_graph.autodiff import Gradient, differentiate
from pbc.training_graph.optimizers import with_update
from pbc.training_graph.step_check import TOLERANCE

aten = torch.ops.aten


def on_onnxruntime(program: Program) -> Program:
    return with_request(program, engine="onnxruntime")


def without_step(level: LevelGraphs) -> LevelGraphs:
    return replace(level, forward=None, updates={})


def test_a_linear_probe_becomes_two_graphs() -> None:
    before = on_onnxruntime(split(ConvNet))
    after = assert_unchanged(DeriveTrainStep(), before)
    assert set(after.graphs) == {
        *before.graphs,
        FORWARD.at(0),
        *(update(name).at(0) for name in OPTIMIZERS),
    }
    assert_same(before, replace(after, levels=(without_step(after.levels[0]),)))
    assert_text(
        after,
        """
        graph forward/0 takes
          %feature_0: [b, 24]
          %theta_fc_weight: [classes, 24] = θ[fc.weight]
          %theta_fc_bias: [classes] = θ[fc.bias]
          %labels: [b]
          %label_smoothing: []
        does
          %sym_size_int_4 = sym_size.int(%theta_fc_weight, 0)
          %permute: [24, classes] = permute(%theta_fc_weight, [1, 0])
          %addmm: [b, classes] = addmm(%theta_fc_bias, %feature_0, %permute)
          %_log_softmax: [b, classes] = _log_softmax(%addmm, 1, False)
          %unsqueeze: [b, 1] = unsqueeze(%labels, 1)
          %arange: [classes] = arange.start_step(0, %sym_size_int_4, layout=torch.strided, \
device=cpu, pin_memory=False)
          %eq: [b, classes] = eq.Tensor(%unsqueeze, %arange)
          %scalar_tensor: [] = scalar_tensor(0.0, dtype=torch.float32, layout=torch.strided, \
device=cpu)
          %where: [b, classes] = where.self(%eq, %_log_softmax, %scalar_tensor)
          %sum_1: [b] = sum.dim_IntList(%where, [1])
          %sub: [] = sub.Tensor(%label_smoothing, 1)
          %mul: [b] = mul.Tensor(%sub, %sum_1)
          %mean: [b] = mean.dim(%_log_softmax, [1])
          %mul_1: [b] = mul.Tensor(%label_smoothing, %mean)
          %sub_1: [b] = sub.Tensor(%mul, %mul_1)
          %mean_1: [] = mean(%sub_1)
        returns %mean_1 as loss, %sub_1 as losses, %addmm as logits, \
%_log_softmax as saved/_log_softmax, %eq as saved/eq, %sub as saved/sub
        """,
        "forward/0",
    )
    assert_text(
        after,
        """
        graph update/0/sgd takes
          %feature_0: [b, 24]
          %theta_fc_weight: [classes, 24] = θ[fc.weight]
          %label_smoothing: []
          %_log_softmax: [b, classes]
          %eq: [b, classes]
          %sub: []
          %theta_fc_bias: [classes] = θ[fc.bias]
          %momentum_fc_weight: [classes, 24]
          %momentum_fc_bias: [classes]
          %learning_rate: []
          %momentum: []
          %weight_decay: []
        does
          %sym_size_int_3 = sym_size.int(%feature_0, 0)
          %full: [b] = full([%sym_size_int_3], 1.0, dtype=torch.float32)
          %div: [b] = div.Scalar(%full, %sym_size_int_3)
          %neg: [b] = neg(%div)
          %mul_2: [b] = mul.Tensor(%neg, %label_smoothing)
          %unsqueeze_1: [b, 1] = unsqueeze(%mul_2, 1)
          %sym_size_int_4 = sym_size.int(%theta_fc_weight, 0)
          %div_scalar: [b, 1] = div.Scalar(%unsqueeze_1, %sym_size_int_4)
          %mul_3: [b] = mul.Tensor(%div, %sub)
          %unsqueeze_2: [b, 1] = unsqueeze(%mul_3, 1)
          %expand_1: [b, classes] = expand(%unsqueeze_2, [%sym_size_int_3, %sym_size_int_4])
          %scalar_tensor_1: [] = scalar_tensor(0, dtype=torch.float32, layout=torch.strided, \
device=cpu)
          %where_1: [b, classes] = where.self(%eq, %expand_1, %scalar_tensor_1)
          %add: [b, classes] = add.Tensor(%div_scalar, %where_1)
          %exp: [b, classes] = exp(%_log_softmax)
          %sum_2: [b, 1] = sum.dim_IntList(%add, [1], True)
          %mul_4: [b, classes] = mul.Tensor(%exp, %sum_2)
          %sub_2: [b, classes] = sub.Tensor(%add, %mul_4)
          %permute_1: [classes, b] = permute(%sub_2, [1, 0])
          %mm: [classes, 24] = mm(%permute_1, %feature_0)
          %permute_2: [24, classes] = permute(%mm, [1, 0])
          %sum_3: [1, classes] = sum.dim_IntList(%sub_2, [0], True)
          %view: [classes] = reshape(%sum_3, [-1])
          %permute_3: [classes, 24] = permute(%permute_2, [1, 0])
          %reshape_default: [1, 1] = reshape(%learning_rate, [1, 1])
          %reshape_default_1: [1, 1] = reshape(%momentum, [1, 1])
          %reshape_default_2: [1, 1] = reshape(%weight_decay, [1, 1])
          %mul_tensor: [classes, 24] = mul.Tensor(%theta_fc_weight, %reshape_default_2)
          %add_tensor: [classes, 24] = add.Tensor(%permute_3, %mul_tensor)
          %mul_tensor_1: [classes, 24] = mul.Tensor(%momentum_fc_weight, %reshape_default_1)
          %add_tensor_1: [classes, 24] = add.Tensor(%mul_tensor_1, %add_tensor)
          %mul_tensor_2: [classes, 24] = mul.Tensor(%add_tensor_1, %reshape_default)
          %sub_tensor: [classes, 24] = sub.Tensor(%theta_fc_weight, %mul_tensor_2)
          %reshape_default_3: [1] = reshape(%learning_rate, [1])
          %reshape_default_4: [1] = reshape(%momentum, [1])
          %reshape_default_5: [1] = reshape(%weight_decay, [1])
          %mul_tensor_3: [classes] = mul.Tensor(%theta_fc_bias, %reshape_default_5)
          %add_tensor_2: [classes] = add.Tensor(%view, %mul_tensor_3)
          %mul_tensor_4: [classes] = mul.Tensor(%momentum_fc_bias, %reshape_default_4)
          %add_tensor_3: [classes] = add.Tensor(%mul_tensor_4, %add_tensor_2)
          %mul_tensor_5: [classes] = mul.Tensor(%add_tensor_3, %reshape_default_3)
          %sub_tensor_1: [classes] = sub.Tensor(%theta_fc_bias, %mul_tensor_5)
        returns %sub_tensor as new/fc.weight, %add_tensor_1 as new/momentum/fc.weight, \
%sub_tensor_1 as new/fc.bias, %add_tensor_3 as new/momentum/fc.bias
        """,
        "update/0/sgd",
    )
    for name in ("adam", "adamw"):
        text = graph_text("", graph_of(after, f"update/0/{name}"))
        assert "sqrt(" in text
        assert "%square_correction" in text


def test_an_engine_that_differentiates_by_itself_is_left_to_do_so() -> None:
    before = split(ConvNet)
    assert before.request.engine == "pytorch"
    after = assert_unchanged(DeriveTrainStep(), before)
    assert_same(before, after)
    assert CHECK not in after.checks


# ---- levels --------------------------------------------------------------------------------


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The bodies that are differentiated, one entry each time."""
    bodies = []

    def counted(body: GraphModule, open_axes: dict[str, int]) -> Gradient:
        bodies.append(body)
        return differentiate(body, open_axes)

    monkeypatch.setattr(derive_train_step, "differentiate", counted)
    return bodies


def test_levels_of_one_body_share_a_step(derivations: list[GraphModule]) -> None:
    program = DeriveTrainStep()(on_onnxruntime(pruned(ConvNet, levels=2)))
    assert len(program.levels) == 3
    assert len(derivations) == 1
    assert list(program.checks[CHECK]) == ["0"]
    for level in range(len(program.levels)):
        for role in (FORWARD, *(update(name) for name in OPTIMIZERS)):
            first, own = (program.levels[n].graphs[role] for n in (0, level))
            assert graph_text("", own) == graph_text("", first)
            assert graph_inputs(own) == graph_inputs(first)
            assert graph_outputs(own) == graph_outputs(first)
    # Copies: a pass may change one level's graph.
    assert graph_of(program, "forward/1") is not graph_of(program, "forward/0")


def test_levels_of_other_bodies_have_steps_of_their_own(derivations: list[GraphModule]) -> None:
    before = on_onnxruntime(pruned(ResidualNet, "adapters:2", levels=1))
    program = assert_unchanged(DeriveTrainStep(), before)
    assert len(derivations) == 2
    assert list(program.checks[CHECK]) == ["0", "1"]
    for level in range(len(program.levels)):
        assert set(program.checks[CHECK][str(level)]) == set(OPTIMIZERS)
        forward, body = graph_of(program, f"forward/{level}"), graph_of(program, f"body/{level}")
        shared = set(tensor_names(forward)) & set(tensor_names(body))
        assert "blocks.2.up.weight" in shared
        for name in shared:
            assert get_tensor(forward, name) is get_tensor(body, name)
    widths = {
        get_tensor(graph_of(program, f"forward/{level}"), "blocks.2.up.weight").shape[1]
        for level in range(len(program.levels))
    }
    assert len(widths) == 2
    # What moves is the same at every level.
    moved = {
        tuple(graph_outputs(graph_of(program, f"update/{k}/adam")))
        for k in range(len(program.levels))
    }
    assert len(moved) == 1


def test_the_errors_of_the_check_are_in_the_manifest(tmp_path: Path) -> None:
    program = run_passes(on_onnxruntime(pruned(ConvNet, levels=0)), DeriveTrainStep(), Lower())
    manifest = bundle.write(tmp_path / "net.pbc", *compiler.package(program)).manifest
    (errors,) = manifest["checks"][CHECK].values()
    assert errors == program.checks[CHECK]["0"]
    assert errors.keys() == OPTIMIZERS.keys()
    assert all(0 < error <= TOLERANCE for error in errors.values())


def test_a_closed_head_is_checked_at_its_own_classes() -> None:
    before = on_onnxruntime(split(ConvNet))
    network = replace(before.network, head=replace(before.network.head, fixed=10))
    before = replace(before, network=network)
    after = assert_unchanged(DeriveTrainStep(), before)
    (weight,) = (
        node
        for node in placeholders(graph_of(after, "forward/0"))
        if node.name == "theta_fc_weight"
    )
    assert list(weight.meta["val"].shape) == [10, 24]


# ---- the check -----------------------------------------------------------------------------

Change = Callable[[GraphModule], None]


def after_each(change: Callable[[GraphModule, Node], Node], which: int) -> Change:
    """Put something between the result of this number and whoever takes it."""

    def apply(graph: GraphModule) -> None:
        results = output_nodes(graph)
        with graph.graph.inserting_before(output_node(graph)):
            changed = change(graph, results[which])
        changed.meta["val"] = results[which].meta["val"]
        results[which] = changed
        output_node(graph).args = (tuple(results),)
        graph.recompile()

    return apply


def times(factor: float) -> Callable[[GraphModule, Node], Node]:
    def change(graph: GraphModule, result: Node) -> Node:
        return graph.graph.call_function(aten.mul.Tensor, (result, factor))

    return change


def rolled(graph: GraphModule, result: Node) -> Node:
    """The right values in the wrong places."""
    return graph.graph.call_function(aten.roll.default, (result, [1], [0]))


def forget(scalar: str) -> Change:
    """Let a scalar have no effect."""

    def apply(graph: GraphModule) -> None:
        (node,) = (n for n in placeholders(graph) if n.meta.get(NAME) == scalar)
        with graph.graph.inserting_after(placeholders(graph)[-1]):
            zero = graph.graph.call_function(aten.zeros_like.default, (node,))
        node.replace_all_uses_with(zero, lambda user: user is not zero)
        graph.recompile()

    return apply


def swap_results(one: int, other: int) -> Change:
    def apply(graph: GraphModule) -> None:
        results = output_nodes(graph)
        results[one], results[other] = results[other], results[one]
        output_node(graph).args = (tuple(results),)
        graph.recompile()

    return apply


def swap_inputs(one: str, other: str) -> Change:
    def apply(graph: GraphModule) -> None:
        nodes = {node.meta.get(NAME): node for node in placeholders(graph)}
        nodes[one].meta[NAME], nodes[other].meta[NAME] = other, one

    return apply


def leave_out(which: int) -> Change:
    """Forget that a parameter moves, and its state."""

    def apply(graph: GraphModule) -> None:
        results, names = output_nodes(graph), list(output_node(graph).meta[NAME])
        owner = names[which].removeprefix("new/")
        kept = [i for i, name in enumerate(names) if not name.endswith(owner)]
        output_node(graph).args = (tuple(results[i] for i in kept),)
        output_node(graph).meta[NAME] = [names[i] for i in kept]
        graph.recompile()

    return apply


WRONG_GRADIENTS = {
    "sign": after_each(times(-1.0), 0),
    "scale": after_each(times(1.01), 1),
    "places": after_each(rolled, 1),
    "nan": after_each(times(float("nan")), 1),
}


@pytest.mark.parametrize("how", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_caught(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(body: GraphModule, open_axes: dict[str, int]) -> Gradient:
        gradient = differentiate(body, open_axes)
        WRONG_GRADIENTS[how](gradient.backward)
        return gradient

    monkeypatch.setattr(derive_train_step, "differentiate", wrong)
    with pytest.raises(
        RuntimeError,
        match=r"^the derived step of level 0 under sgd differs from torch's by "
        r"(\d\.\de[+-]\d\d|nan|inf) \(relative; at most 1e-04\)$",
    ):
        DeriveTrainStep()(on_onnxruntime(split(ConvNet)))


def test_wrong_losses_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the losses that are reported: the gradients come from elsewhere."""

    def wrong(body: GraphModule, open_axes: dict[str, int]) -> Gradient:
        gradient = differentiate(body, open_axes)
        after_each(times(1.01), 1)(gradient.forward)
        return gradient

    monkeypatch.setattr(derive_train_step, "differentiate", wrong)
    with pytest.raises(RuntimeError, match=r"level 0 under sgd differs from torch's by 1\.0e-02"):
        DeriveTrainStep()(on_onnxruntime(split(ConvNet)))


class Narrow(nn.Module):
    """Its scale may move by 0.4 % before nothing is finite any more."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        moved = self.scale - 1
        edge = 0 * torch.sqrt(0.004**2 - moved * moved)
        logits: Tensor = self.fc(x.mean((2, 3)) * self.scale) + edge
        return logits


def test_a_network_on_which_torch_blows_up_is_verified_in_smaller_steps() -> None:
    program = zoo.split(make_program(Narrow().eval(), "full"))
    after = DeriveTrainStep()(on_onnxruntime(program))
    assert all(error <= TOLERANCE for error in after.checks[CHECK]["0"].values())


WRONG_UPDATES: list[tuple[str, str, Change]] = [
    ("sgd", "forgotten decay", forget("weight_decay")),
    ("adam", "forgotten decay", forget("weight_decay")),
    ("adamw", "forgotten decay", forget("weight_decay")),
    ("sgd", "forgotten momentum", forget("momentum")),
    ("adam", "forgotten epsilon", forget("epsilon")),
    ("adamw", "swapped new states", swap_results(1, 2)),
    ("adam", "swapped states", swap_inputs("exp_avg/fc.bias", "exp_avg_sq/fc.bias")),
    ("adamw", "swapped corrections", swap_inputs("mean_correction", "square_correction")),
    ("sgd", "swapped scalars", swap_inputs("momentum", "learning_rate")),
    ("adam", "a parameter that stays", leave_out(-3)),
    ("adamw", "nan", after_each(times(float("nan")), 0)),
]


@pytest.mark.parametrize(
    ("optimizer", "change"),
    [(optimizer, change) for optimizer, _, change in WRONG_UPDATES],
    ids=[f"{optimizer}-{how}".replace(" ", "-") for optimizer, how, _ in WRONG_UPDATES],
)
def test_a_wrong_update_is_caught(
    optimizer: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(gradients: GraphModule, name: str) -> GraphModule:
        graph = with_update(gradients, name)
        if name == optimizer:
            change(graph)
        return graph

    monkeypatch.setattr(derive_train_step, "with_update", wrong)
    with pytest.raises(RuntimeError, match=f"the derived step of level 0 under {optimizer} differ"):
        DeriveTrainStep()(on_onnxruntime(split(ConvNet)))


def test_the_level_at_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong(body: GraphModule, open_axes: dict[str, int]) -> Gradient:
        gradient = differentiate(body, open_axes)
        calls.append(body)
        if len(calls) == 2:
            after_each(times(-1.0), 0)(gradient.backward)
        return gradient

    monkeypatch.setattr(derive_train_step, "differentiate", wrong)
    with pytest.raises(
        RuntimeError, match=r"^pass DeriveTrainStep failed: the derived step of level 1 under sgd"
    ):
        run_passes(on_onnxruntime(pruned(ResidualNet, "adapters:2", levels=1)), DeriveTrainStep())


@pytest.mark.parametrize(("kind", "strategy"), [(ConvNet, "norm"), (ResidualNet, "last-k:1")])
def test_what_float32_leaves_open_float64_decides(
    kind: Kind, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference that is rounding is gone in float64; one that is an error stays."""
    monkeypatch.setattr(derive_train_step, "TOLERANCE", 1e-10)
    program = DeriveTrainStep()(on_onnxruntime(split(kind, strategy)))
    assert max(program.checks[CHECK]["0"].values()) <= 1e-10


class Rooted(nn.Module):
    """Roots of zeros, whose slope is infinite, around a ReLU and without one."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.rectified = rectified
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = torch.sqrt(torch.relu(y) if self.rectified else 0 * y)
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def rooted(rectified: bool) -> Program:
    net = make_program(Rooted(rectified), "full", passes=[MarkTrainable(), SplitPrefix()])
    return on_onnxruntime(net)


def test_an_infinite_slope_does_not_pass_a_relu_that_is_off() -> None:
    after = DeriveTrainStep()(rooted(True))
    assert all(error < 1e-4 for error in after.checks[CHECK]["0"].values())


def test_a_network_without_finite_gradients_is_refused() -> None:
    with pytest.raises(PbcError, match=r"the gradient of conv\.weight in Rooted is not finite in"):
        rooted(False)


def test_steps_that_torch_makes_no_numbers_of_are_refused() -> None:
    program = on_onnxruntime(split(ConvNet, "norm")).copy()
    program.parameters["bn1.bias"] = program.parameters["bn1.bias"] * float("inf")
    with pytest.raises(PbcError, match="makes numbers that are not finite, of images drawn at"):
        DeriveTrainStep()(program)
