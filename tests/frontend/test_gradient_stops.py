"""Ways in which a forward changes gradients: each is kept, or refused by name and line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from pbc.errors import PbcError
from pbc.ir.graph import graph_inputs, graph_outputs, op_name
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.passes.try_engine import TryEngine
from pbc.testing import graph_of, make_program, run_passes, with_request
from pbc.training_graph.autodiff import differentiate


class Net(nn.Module):
    """A convolution, something in between, a classifier."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.between = between
        self.register_buffer("seen", torch.zeros(8))
        self.fc = nn.Linear(8, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.stem(x)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.between(self, x))
        return logits


def straight_through(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return f + (torch.round(f * 8) / 8 - f).detach()


def read_data(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return f / (1 + f.data.amax(1, keepdim=True))


def without_gradients(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    with torch.no_grad():
        scale = f.square().sum(1, keepdim=True)
    return f / (scale + 1)


@torch.no_grad()
def largest(f: Tensor) -> Tensor:
    return f.amax(1, keepdim=True)


def decorated(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return f / (largest(f) + 1)


def switched_off(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    scale = f.amax(1, keepdim=True)
    torch.set_grad_enabled(before)
    return f / (scale + 1)


def enabled_again(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    with torch.no_grad():
        scale = f.amax(1, keepdim=True)
        with torch.enable_grad():
            f = f * scale
        scale = scale * f.mean(1, keepdim=True)
    return f / (scale + 1)


def for_inference(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    with torch.inference_mode():
        scale = f.amax(1, keepdim=True)
    return f / (scale.clone() + 1)


def scaled(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return 0.1 * f + 0.9 * f.detach()


def detached_in_place(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    g = f * 2
    g.detach_()
    return f + g


def weight_detached(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return f + linear(f, net.stem.weight.detach().flatten(1)[:, :8])


def checkpointed(net: Net, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(net.features, x, use_reentrant=False)
    return result


def checkpointed_reentrantly(net: Net, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(torch.tanh, net.features(x), use_reentrant=True)
    return result


class Swish(torch.autograd.Function):
    """A backward of its own that is the derivative, to save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        result: Tensor = gradient * s * (1 + x * (1 - s))
        return result


def own_derivative(net: Net, x: Tensor) -> Tensor:
    result: Tensor = Swish.apply(net.features(x))  # type: ignore[no-untyped-call]
    return result


def listening(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    if f.requires_grad:
        f.register_hook(lambda gradient: None)
    return f


KEPT = [
    straight_through,
    read_data,
    without_gradients,
    decorated,
    switched_off,
    enabled_again,
    for_inference,
    scaled,
    detached_in_place,
    weight_detached,
    checkpointed,
    checkpointed_reentrantly,
    own_derivative,
    listening,
]


def gradients_of(logits: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    logits.square().sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(gradient is not None for gradient in gradients.values())
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("between", KEPT)
def test_gradients_are_the_module_s_own(between: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Net(between)
    program = make_program(net, "full")
    assert not program.notes
    x = torch.randn(5, 3, 16, 16)
    expected = gradients_of(net(x), dict(net.named_parameters()))
    graph = graph_of(program, "model")
    # They share the module's memory.
    leaves = {name: p.requires_grad_() for name, p in graph.named_parameters()}
    found = gradients_of(graph(x)[0], leaves)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_what_the_module_has_frozen_stays_and_is_said() -> None:
    net = Net(scaled)
    net.stem.requires_grad_(False)
    net.fc.requires_grad_(False)
    program = make_program(net, "full")
    assert program.trainable == {"fc.weight", "fc.bias"}  # a head always trains
    (note,) = program.notes
    assert note.startswith("stem.weight and 1 more will not move, as in PyTorch: the model has ")


def test_a_detach_on_the_way_to_nothing_that_trains_is_no_node() -> None:
    for strategy, expected in (("full", True), ("linear-probe", False)):
        graph = graph_of(make_program(Net(straight_through), strategy), "model")
        names = [op_name(node) for node in graph.graph.nodes]
        assert ("aten.detach.default" in names) is expected


class Shared(Net):
    """Two convolutions that share their weight, under two names."""

    def __init__(self) -> None:
        super().__init__(straight_through)
        self.again = nn.Conv2d(8, 8, 3)
        self.first = nn.Conv2d(8, 8, 3)
        self.first.weight = self.again.weight

    def features(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(torch.relu(self.stem(x))))
        return torch.relu(self.again(y)).mean((2, 3))


def test_a_weight_that_layers_share_is_one_parameter() -> None:
    program = make_program(Shared(), "full", passes=[MarkTrainable()])
    assert sum(name.endswith(("again.weight", "first.weight")) for name in program.parameters) == 1


# ---- refused -------------------------------------------------------------------------------


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def own_backward(net: Net, x: Tensor) -> Tensor:
    result: Tensor = Round.apply(net.features(x))  # type: ignore[no-untyped-call]
    return result


class Clip(torch.autograd.Function):
    """The identity, but for gradients that are large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(-100, 100)


def clipping_backward(net: Net, x: Tensor) -> Tensor:
    result: Tensor = Clip.apply(net.features(x))  # type: ignore[no-untyped-call]
    return result


def doubling_hook(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    if f.requires_grad:
        f.register_hook(lambda gradient: gradient * 2)
    return f


def clamped_data(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    f.data = f.data.clamp(0, 0.1)
    return f


def under_autocast(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        scale = f @ net.stem.weight.flatten(1)[:, :8]
    return f / (1 + scale.float().square().mean(1, keepdim=True))


def in_place_without_gradients(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    with torch.no_grad():
        f.mul_(0.5)
    return f


REFUSED = [
    (own_backward, "backward of Round"),
    (clipping_backward, "backward of Clip"),
    (doubling_hook, "hook <lambda>"),
]


@pytest.mark.parametrize(("between", "what"), REFUSED)
def test_what_cannot_be_kept_is_refused_by_name_and_line(
    between: Callable[[Net, Tensor], Tensor], what: str
) -> None:
    lines = range(between.__code__.co_firstlineno, between.__code__.co_firstlineno + 5)
    with pytest.raises(PbcError, match=f"the {what}") as caught:
        make_program(Net(between), "full")
    message = str(caught.value)
    assert "\n" not in message
    assert "stem.weight" in message
    assert "detach()" in message
    assert any(f'{__file__}", line {line})' in message for line in lines), message


def test_writing_to_data_is_refused_by_its_line() -> None:
    line = clamped_data.__code__.co_firstlineno + 2
    with pytest.raises(PbcError, match=rf"writing to \.data .* line {line}\) cannot be kept"):
        make_program(Net(clamped_data), "full")


@pytest.mark.parametrize("between", [in_place_without_gradients, under_autocast])
def test_what_torch_export_loses_is_refused(between: Callable[[Net, Tensor], Tensor]) -> None:
    with pytest.raises(PbcError, match=r"gradient of stem\.weight would differ by .* in place"):
        make_program(Net(between), "full")


def test_a_gradient_in_forward_is_refused_by_its_line() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        with torch.enable_grad():
            f = net.features(x).requires_grad_()
            (slope,) = torch.autograd.grad(f.square().sum(), f, create_graph=True)
        return f + slope

    line = between.__code__.co_firstlineno + 3
    with pytest.raises(PbcError, match=rf"torch\.autograd\.grad.* line {line}\)"):
        make_program(Net(between), "full")


def test_control_flow_of_torch_s_own_is_refused_by_its_line() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        f = net.features(x)
        return torch.as_tensor(torch.cond(f.sum() > 0, lambda y: y * 2, lambda y: y - 1, (f,)))

    line = between.__code__.co_firstlineno + 2
    with pytest.raises(PbcError, match=f"calls torch's cond .* line {line}\\)"):
        make_program(Net(between))


def test_hooks_that_were_there_before_are_named() -> None:
    net = Net(straight_through)

    def halve(gradient: Tensor) -> Tensor:
        return gradient / 2

    net.stem.weight.register_hook(halve)
    with pytest.raises(PbcError, match=r"the hook halve of stem\.weight cannot be kept"):
        make_program(net, "full")


@pytest.mark.parametrize(("between", "what"), REFUSED)
def test_what_is_frozen_may_change_gradients(
    between: Callable[[Net, Tensor], Tensor], what: str
) -> None:
    make_program(Net(between), "linear-probe")


def stopped(net: Net, x: Tensor) -> Tensor:
    return net.features(x).detach()


def test_parameters_that_no_gradient_reaches_are_noted_with_the_line() -> None:
    program = make_program(Net(stopped), "full")
    (note,) = program.notes
    assert note.startswith("stem.weight and 1 more will not move, as in PyTorch: ")
    assert f'{__file__}", line {Net.forward.__code__.co_firstlineno + 1})' in note


def test_a_model_that_nothing_trains_is_refused() -> None:
    class Frozen(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(PbcError, match="gives none of its trainable parameters a gradient"):
        make_program(Frozen(straight_through), "full")


def test_what_has_no_gradient_in_pytorch_is_refused() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        result: Tensor = torch.special.zeta(net.features(x).sigmoid() + 1.5, 2.0)
        return result

    make_program(Net(between), "linear-probe")
    with pytest.raises(PbcError, match=r"Net cannot be trained in PyTorch either: the derivative"):
        make_program(Net(between), "full")


# ---- more than a function of the image ------------------------------------------------------


def always_dropping(net: Net, x: Tensor) -> Tensor:
    return nn.functional.dropout(net.features(x), 0.5, training=True)


def noisy(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return f + torch.rand_like(f)


def item(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    return f * f.max().item()


def counting(net: Net, x: Tensor) -> Tensor:
    f = net.features(x)
    assert isinstance(net.seen, Tensor)
    net.seen.add_(1)
    return f / net.seen


def counting_in_python(net: Net, x: Tensor) -> Tensor:
    calls: int = getattr(net, "calls", 0) + 1
    setattr(net, "calls", calls)  # noqa: B010, a name that nn.Module does not know
    return net.features(x) * calls


def across_the_batch(net: Net, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(net.features(x), None, None, training=True)


@pytest.mark.parametrize(
    ("between", "what"),
    [
        (always_dropping, r"draws random numbers in forward \(aten\.dropout\.default"),
        (noisy, r"draws random numbers in forward \(aten\.rand_like\.default"),
        (item, r"reads a tensor's value in forward"),
        (counting, r"changes its seen in forward"),
        (counting_in_python, r"change from call to call"),
        (across_the_batch, r"depend on the other images of its batch"),
    ],
)
def test_more_than_a_function_of_the_image_is_refused_in_one_line(
    between: Callable[[Net, Tensor], Tensor], what: str
) -> None:
    with pytest.raises(PbcError, match=what) as caught:
        make_program(Net(between))
    assert "\n" not in str(caught.value)


def test_dropout_that_is_off_and_a_counter_that_nothing_reads_are_nothing() -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        assert isinstance(net.seen, Tensor)
        net.seen.add_(1)
        f = nn.functional.dropout(net.features(x), 0.5, training=net.training)
        return nn.functional.dropout(f, 0.0, training=True)

    program = make_program(Net(between))
    assert len(graph_of(program, "model")(torch.zeros(2, 3, 16, 16))) == 1


def test_control_flow_on_values_is_one_line_and_no_screen(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def between(net: Net, x: Tensor) -> Tensor:
        f = net.features(x)
        return f * 2 if f.mean() > 0 else f

    line = between.__code__.co_firstlineno + 2
    with pytest.raises(PbcError, match=f"by the values of a tensor, .* line {line}\\)"):
        make_program(Net(between))
    captured = capfd.readouterr()
    assert not captured.out + captured.err


# ---- every engine ---------------------------------------------------------------------------


@pytest.mark.parametrize("between", [straight_through, without_gradients, scaled, stopped])
def test_a_derived_step_stops_there_too(between: Callable[[Net, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Net(between)
    program = make_program(net, "full", passes=[MarkTrainable(), SplitPrefix()])
    gradient = differentiate(program.levels[0].body, {"fc.weight": 0, "fc.bias": 0})
    labels = torch.tensor([0, 1, 2, 3, 0])
    known = {"x": torch.randn(5, 3, 16, 16), "labels": labels, "label_smoothing": torch.tensor(0.0)}
    known |= program.parameters
    for name, graph in (("forward/0", gradient.forward), ("update/0/sgd", gradient.backward)):
        results = graph(*[known[title] for title in graph_inputs(graph)])
        known |= dict(zip(graph_outputs(graph), results, strict=True)) | {
            title: known[title] for title in program.parameters if name == "forward/0"
        }
    loss = nn.functional.cross_entropy(net(known["x"]), labels)
    parameters = dict(net.named_parameters())
    expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    moved = {n: g for n, g in zip(parameters, expected, strict=True) if g is not None}
    assert sorted(gradient.parameters) == sorted(moved)
    for name, value in moved.items():
        torch.testing.assert_close(known[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["onnxruntime", "tvm"])
def test_engines_of_derived_steps_run_it(engine: str) -> None:
    net = Net(straight_through)
    program = make_program(net, "full", passes=[MarkTrainable(), SplitPrefix()])
    program = with_request(program, engine=engine)
    program = run_passes(program, TryEngine(), IndependentDims(), DeriveTrainStep(), Lower())
    assert program.artifacts
    # Lower verifies the lowered step beside torch's; what it saw:
    assert max(program.checks["lowered_train_step"]["0"].values()) < 1e-4
