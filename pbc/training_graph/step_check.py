"""Verify a derived training step against torch: autograd's gradients, torch.optim's updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.graph_name import FORWARD, GraphName, update
from pbc.bundle.optimizers import BETA_MEAN, BETA_SQUARE, NEW, OPTIMIZERS
from pbc.errors import PbcError
from pbc.ir.graph import graph_inputs, parameter_names
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import in_float64
from pbc.ir.runner import InFloat32, Runner, tensor
from pbc.training_graph.names import LABELS, LOSSES

STEPS = 5
TOLERANCE = 1e-4
# A lowered step has float32 alone, in which one ReLU whose input is zero but for rounding may be
# on in one engine and off in another: more than TOLERANCE is told. More than this in most steps, as
# a wrong kernel has it, is refused, unless torch's own float32 is nearly as far from float64.
LOWERED_TOLERANCE = 1e-2

# Neither zero nor one, so that every term shows.
MOMENTUM, SMOOTHING_SHARE = 0.9, 0.1
# Of the parameters' own size, per step: few networks blow up, and rounding stays rounding. Where
# torch itself does, as deep untrained ones may, the steps are made smaller.
CHANGES = (1e-2, 1e-3, 1e-4)
# Of the gradients' root mean square.
_NO_GRADIENT = 1e-2

Tensors = Mapping[str, Tensor]


def step_errors(
    body: GraphModule,
    parameters: Tensors,
    batches: Sequence[tuple[Tensors, Tensor]],
    runner: Runner,
    optimizers: Sequence[str] = tuple(OPTIMIZERS),
) -> dict[str, tuple[float, ...]]:
    """Return by optimizer, of each step, the largest relative error of any parameter or state.

    There is a step for each batch.

    body: takes features and parameters in their order of placeholders. batches: features by name,
    and labels int64 [b]. Every step starts from where torch is, so that a network that amplifies
    rounding does not pass for a wrong derivative. A tensor's error is the largest difference of one
    of its values, against its largest value; that of the losses counts likewise. State counts since
    it is made of gradients alone, which a small step hides in the rounding of a parameter. Raises
    PbcError where torch's own steps, however small, make what is not finite.
    """
    return {name: _errors(body, parameters, batches, runner, name) for name in optimizers}


def _errors(
    body: GraphModule,
    parameters: Tensors,
    batches: Sequence[tuple[Tensors, Tensor]],
    runner: Runner,
    optimizer: str,
) -> tuple[float, ...]:
    for change in CHANGES:
        found = _errors_at(change, body, parameters, batches, runner, optimizer)
        if found is not None:
            return found
    raise PbcError(
        "torch's own training step of this network makes numbers that are not finite, of images "
        "drawn at random: look for a root, a logarithm or a quotient of zero"
    )


def _errors_at(
    change: float,
    body: GraphModule,
    parameters: Tensors,
    batches: Sequence[tuple[Tensors, Tensor]],
    runner: Runner,
    optimizer: str,
) -> tuple[float, ...] | None:
    """The errors of steps that change parameters by so much; None where torch's own blow up."""
    theta = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    settings = _settings(change, optimizer, body, theta, *batches[0])
    rule = _torch_optimizer(optimizer, list(theta.values()), settings)
    found = []
    for number, (features, labels) in enumerate(batches, 1):
        known: dict[str, Tensor] = {**features, **_state(optimizer, rule, theta), LABELS: labels}
        known |= {name: value.detach().clone() for name, value in theta.items()}
        corrections = {
            "mean_correction": 1 - BETA_MEAN**number,
            "square_correction": 1 - BETA_SQUARE**number,
        }
        dtype = next(iter(theta.values())).dtype
        known |= {
            name: torch.tensor(value, dtype=dtype)
            for name, value in (settings | corrections).items()
        }
        known |= _run(runner, FORWARD, known)
        # What the step leaves out stays where it is.
        new = {name: known[name] for name in theta} | {
            name.removeprefix(NEW): value
            for name, value in _run(runner, update(optimizer), known).items()
        }
        losses = _losses(body, {**features, **theta}, labels)
        rule.zero_grad()
        losses.mean().backward()
        rule.step()
        expected = {**theta, **_state(optimizer, rule, theta)}
        if not all(value.isfinite().all() for value in (losses, *expected.values())):
            return None
        errors = [_relative(known[LOSSES], losses, 1e-6)]
        for name, value in new.items():
            # A gradient that is zero but for rounding has no digits to compare.
            least = 1e-6 if name in theta else _NO_GRADIENT * settings["epsilon"]
            if name.startswith("exp_avg_sq/"):
                least = least**2
            errors.append(_relative(value, expected[name], least))
        found.append(float(torch.tensor(errors, dtype=torch.float64).max()))  # keeps a NaN
    return tuple(found)


def worst(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return by optimizer the largest error of any step; NaN where one is."""
    return {
        name: float(torch.tensor(found, dtype=torch.float64).max())
        for name, found in errors.items()
    }


def usual(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return by optimizer the error that most steps keep, their median; NaN where one is."""
    return {
        name: float(torch.tensor(found, dtype=torch.float64).median())
        for name, found in errors.items()
    }


def step_error_beside_float64(
    body: GraphModule,
    parameters: Tensors,
    batches: Sequence[tuple[Tensors, Tensor]],
    runner: Runner,
) -> float:
    """Return what most steps of a runner in float32 are off from torch's in float64."""
    exact = [(doubled(features), labels) for features, labels in batches]
    found = step_errors(in_float64(body), doubled(parameters), exact, InFloat32(runner))
    return max(usual(found).values())


def doubled(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors in float64."""
    return {name: value.double() for name, value in tensors.items()}


def _state(
    optimizer: str, rule: torch.optim.Optimizer, theta: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """State of torch's optimizer, under our names; zeros before its first step."""
    of_torch = {"momentum": "momentum_buffer"}
    return {
        f"{part}/{name}": rule.state[value]
        .get(of_torch.get(part, part), torch.zeros_like(value))
        .detach()
        .clone()
        for part in OPTIMIZERS[optimizer].state
        for name, value in theta.items()
    }


def _losses(body: GraphModule, inputs: Tensors, labels: Tensor) -> Tensor:
    (logits,) = body(*[inputs[name] for name in graph_inputs(body)])
    return torch.nn.functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=SMOOTHING_SHARE
    )


def _settings(
    change: float,
    optimizer: str,
    body: GraphModule,
    parameters: Tensors,
    features: Tensors,
    labels: Tensor,
) -> dict[str, float]:
    """Hyperparameters of the size of this body's values and gradients.

    Adam's usual epsilon, 1e-8, is below the rounding of a gradient: where that is zero but for
    rounding (the bias of an attention's keys, say), two right implementations move by up to the
    learning rate in any direction. The gradients' own size is an epsilon that hides no error.
    """
    theta = list(parameters.values())
    loss = _losses(body, {**features, **parameters}, labels).mean()
    gradients = [g for g in torch.autograd.grad(loss, theta, allow_unused=True) if g is not None]
    size, slope = _root_mean_square(theta), _root_mean_square(gradients)
    # Adam's step per value is about the rate, whatever the gradient.
    rate = change * size if optimizer.startswith("adam") else change * size / slope
    return {
        "learning_rate": rate,
        "momentum": MOMENTUM,
        # AdamW's is multiplied by the rate, which would hide it in the tolerance.
        "weight_decay": change / rate if optimizer == "adamw" else change * slope / size,
        "label_smoothing": SMOOTHING_SHARE,
        "epsilon": slope,
    }


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    total = sum(float(tensor.detach().square().sum()) for tensor in tensors)
    return float((total / sum(tensor.numel() for tensor in tensors)) ** 0.5)


def _torch_optimizer(
    name: str, parameters: list[Tensor], settings: Mapping[str, float]
) -> torch.optim.Optimizer:
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    if name == "sgd":
        return torch.optim.SGD(parameters, rate, settings["momentum"], weight_decay=decay)
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(parameters, rate, eps=settings["epsilon"], weight_decay=decay)


def _relative(value: Tensor, expected: Tensor, least: float) -> float:
    difference = (value.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(least))


def _run(runner: Runner, role: GraphName, values: Tensors) -> dict[str, Tensor]:
    """Run one graph on torch's tensors, given as arrays: every engine takes those."""
    arrays = {name: value.detach().numpy() for name, value in values.items()}
    # A copy: an engine may use its memory again.
    return {name: tensor(v).clone() for name, v in runner.run(role, arrays).items()}


def starting_parameters(program: Program, level: LevelGraphs) -> dict[str, Tensor]:
    """Return what a body reads of θ, f32, at the values that a device would begin with."""
    head = program.network.head.parameters
    generator = torch.Generator().manual_seed(program.request.seed)
    theta = {}
    for name in parameter_names(level.body):
        value = program.parameters[name].detach()
        if name in head and program.network.head.fixed is None:
            bound = head[name] ** -0.5
            shape = (_OPEN_CLASSES, *value.shape[1:])
            value = (2 * torch.rand(shape, generator=generator) - 1) * bound
        theta[name] = value
    return theta


# Where the device decides how many classes there are, any count checks as well as another.
_OPEN_CLASSES = 5


def random_batches(
    program: Program, level: LevelGraphs, classes: int
) -> list[tuple[Tensors, Tensor]]:
    """Return features of random images by name, and random labels int64 [b], for each step."""
    generator = torch.Generator().manual_seed(program.request.seed)
    batches: list[tuple[Tensors, Tensor]] = []
    for number in range(STEPS):
        count = 2 + number % 2  # no batch size is special
        images = torch.randn(count, *program.network.input.shape, generator=generator)
        with torch.no_grad():
            features = level.features(images)
        batches.append((features, torch.randint(classes, (count,), generator=generator)))
    return batches
