"""The PyTorch engine: runs a bundle's declarative graphs with torch's own operators."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pbc.bundle import Bundle
from pbc.bundle.optimizers import BETA_MEAN, BETA_SQUARE, EPSILON
from pbc.errors import PbcError
from pbc.runtime.engines import Arrays
from pbc.runtime.engines.pytorch.graph import Argument, DType, Graph, Slot, Step, parse
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.objective import Objective

__all__ = ["OPS", "PyTorchEngine", "PyTorchExecutable"]

# Graphs are exported from contiguous tensors and run on channels_last ones, where a view can be
# impossible; a reshape is a view wherever that works.
_RENAMED = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}
_CONVOLUTIONS = frozenset(
    ("aten.conv2d.default", "aten.conv2d.padding", "aten.convolution.default")
)


class PyTorchEngine:
    """Run bundles with PyTorch on the CPU."""

    name = "pytorch"

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def load(self, bundle: Bundle, *, threads: int | None = None) -> PyTorchExecutable:
        if threads is not None:
            torch.set_num_threads(threads)
        return PyTorchExecutable(bundle)


class PyTorchExecutable:
    """A bundle's graphs, each read, verified and resolved when it is first run."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._programs: dict[str, _Program] = {}
        self._contents: dict[str, _Program] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._theta: dict[str, Tensor] = {}
        self._objective = Objective()
        self._optimizer: _Optimizer = _Sgd({}, self._objective)
        self._loss: Tensor | None = None

    def policy(self, views: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            outputs = self._program("policy").run({"view": torch.from_numpy(views)})
        return _to_numpy(outputs["fidelity"])

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        graph = f"prefix/{level}"
        if graph not in self._bundle.manifest["graphs"]:
            return {"x": images}
        with torch.inference_mode():
            outputs = self._program(graph).run({"x": torch.from_numpy(images)})
        return {name: _to_numpy(value) for name, value in outputs.items()}

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        with torch.inference_mode():
            return _to_numpy(self._body(level, features))

    def start(self, parameters: Arrays, objective: Objective) -> None:
        self._objective = objective
        self._theta = {
            name: torch.tensor(value, dtype=torch.float32).requires_grad_()
            for name, value in parameters.items()
        }
        self._optimizer = _OPTIMIZERS[objective.optimizer](self._theta, objective)
        self._loss = None

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        logits = self._body(level, features)
        losses = cross_entropy(
            logits,
            torch.from_numpy(labels),
            reduction="none",
            label_smoothing=self._objective.label_smoothing,
        )
        self._loss = losses.mean()
        return losses.detach().numpy(), logits.detach().numpy()

    def update(self) -> None:
        assert self._loss is not None, "update() follows forward()"
        loss, self._loss = self._loss, None
        gradients = torch.autograd.grad(loss, list(self._theta.values()), allow_unused=True)
        with torch.no_grad():
            self._optimizer.step(gradients)

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: value.detach().numpy().copy() for name, value in self._theta.items()}

    def optimizer_state(self) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in self._optimizer.state().items()}

    def load_optimizer_state(self, state: Arrays) -> None:
        own = self._optimizer.state()
        if own.keys() != state.keys():
            raise PbcError("the optimizer state is not of this optimizer and these parameters")
        for name, value in own.items():
            value.copy_(torch.from_numpy(state[name]))

    def _body(self, level: int, features: Arrays) -> Tensor:
        inputs = {name: torch.from_numpy(value) for name, value in features.items()}
        inputs.update(self._theta)
        return self._program(f"body/{level}").run(inputs)["logits"]

    def _program(self, name: str) -> _Program:
        program = self._programs.get(name)
        if program is None:
            # Made in inference mode, a frozen tensor could not take part in a backward later.
            with torch.inference_mode(False):
                program = self._programs[name] = self._load(name)
        return program

    def _load(self, name: str) -> _Program:
        """Read a graph; levels whose files are the same share one program."""
        bundle = self._bundle
        file = bundle.manifest["graphs"].get(name)
        if file is None:
            raise PbcError(f"{bundle.path} has no graph {name}")
        content = bundle.sha256(file)
        if content not in self._contents:
            graph = parse(bundle.json(file), OPS, f"{bundle.path}: {file}")
            self._contents[content] = _Program(graph, self._tensor)
        return self._contents[content]

    def _tensor(self, file: str, key: str) -> Tensor:
        """Read one frozen tensor; a file is read once, and its tensors are shared by all graphs."""
        tensors = self._tensors.get(file)
        if tensors is None:
            arrays = self._bundle.tensors(file)
            tensors = self._tensors[file] = {
                name: _from_frozen(array) for name, array in arrays.items()
            }
        if key not in tensors:
            raise PbcError(f"{self._bundle.path}: {file} has no tensor {key!r}")
        return tensors[key]


def _to_numpy(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.numpy()
    return array


def _from_frozen(array: np.ndarray) -> Tensor:
    """Copy a stored array; float16 is a storage format only, everything computes in float32."""
    return torch.tensor(array.astype(np.float32) if array.dtype == np.float16 else array)


# ---- running a graph -----------------------------------------------------------------------

_Values = list[Any]


class _Program:
    """A graph with its operators and frozen tensors resolved once."""

    def __init__(self, graph: Graph, tensor: Callable[[str, str], Tensor]) -> None:
        weights = {
            step.args[1]
            for step in graph.steps
            if step.op in _CONVOLUTIONS and len(step.args) > 1
            if isinstance(step.args[1], Slot)
        }
        # None leaves all as it is.
        self._lower: torch.dtype | None = None
        if graph.precision != "float32":
            self._lower = getattr(torch, graph.precision)
        self._initial: _Values = [None] * graph.slot_count
        for slot, (file, key) in graph.tensors.items():
            value = _rounded(self._lower, tensor(file, key))
            if slot in weights and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            self._initial[slot.index] = value
        self._inputs = [(name, slot.index) for name, slot in graph.inputs.items()]
        self._outputs = [(name, slot.index) for name, slot in graph.outputs.items()]
        self._calls = [_resolve(step) for step in graph.steps]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self._initial.copy()
        for name, index in self._inputs:
            values[index] = _rounded(self._lower, inputs[name])
        for function, fill, kwargs, output, dead in self._calls:
            values[output] = function(*fill(values), **kwargs)
            for index in dead:
                values[index] = None
        if self._lower is None:
            return {name: values[index] for name, index in self._outputs}
        return {name: values[index].float() for name, index in self._outputs}


def _rounded(precision: torch.dtype | None, value: Tensor) -> Tensor:
    """Round a tensor of reals; whatever else it is stays."""
    return value if precision is None or not value.is_floating_point() else value.to(precision)


_Fill = Callable[[_Values], list[Any]]
_Call = tuple[Callable[..., Any], _Fill, dict[str, Any], int, tuple[int, ...]]


def _resolve(step: Step) -> _Call:
    dead = tuple(slot.index for slot in step.dead)
    function = _function(step.op)
    kwargs = {key: _constant(value) for key, value in step.kwargs.items()}
    if any(_reads(value) for value in step.kwargs.values()):
        return _with_keywords(function, step), lambda values: [values], {}, step.output.index, dead
    return function, _filler(step.args), kwargs, step.output.index, dead


def _function(op: str) -> Callable[..., Any]:
    module, _, name = _RENAMED.get(op, op).partition(".")
    if module == "operator":
        function: Callable[..., Any] = getattr(operator, name)
        return function
    packet, _, overload = name.partition(".")
    try:
        function = getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError as error:
        raise PbcError(f"torch {torch.__version__} has no operator {op}") from error
    return function


def _with_keywords(function: Callable[..., Any], step: Step) -> Callable[[_Values], Any]:
    """Call with values among the keywords: rare, so it needs no shortcut."""
    fill, names = _filler(step.args), tuple(step.kwargs)
    fill_keywords = _filler(list(step.kwargs.values()))
    return lambda values: function(
        *fill(values), **dict(zip(names, fill_keywords(values), strict=True))
    )


def _filler(template: list[Argument]) -> _Fill:
    """Return the function from all values to the argument list."""
    constants = [_constant(argument) for argument in template]
    direct = [(at, slot.index) for at, slot in enumerate(template) if isinstance(slot, Slot)]
    nested = [
        (at, _filler(argument))
        for at, argument in enumerate(template)
        if isinstance(argument, list) and _reads(argument)
    ]

    def fill(values: _Values) -> list[Any]:
        arguments = constants.copy()
        for at, index in direct:
            arguments[at] = values[index]
        for at, inner in nested:
            arguments[at] = inner(values)
        return arguments

    return fill


def _reads(argument: Argument) -> bool:
    if isinstance(argument, list):
        return any(_reads(item) for item in argument)
    return isinstance(argument, Slot)


def _constant(argument: Argument) -> Any:
    if isinstance(argument, list):
        return [_constant(item) for item in argument]
    if isinstance(argument, DType):
        return getattr(torch, argument.name)
    return None if isinstance(argument, Slot) else argument


# ---- optimizers ----------------------------------------------------------------------------
# The arithmetic of torch.optim to the bit. Its classes import torch's compiler at the first step:
# one second and 76 MB that a device does not have to spare.

_Gradients = tuple[Tensor | None, ...]


class _Optimizer(Protocol):
    def step(self, gradients: _Gradients) -> None: ...

    def state(self) -> dict[str, Tensor]: ...


class _Sgd:
    """torch.optim.SGD."""

    def __init__(self, parameters: dict[str, Tensor], objective: Objective) -> None:
        self._parameters = parameters
        self._objective = objective
        self._momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: _Gradients) -> None:
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            if gradient is not None:
                if self._objective.weight_decay:
                    gradient = gradient.add(parameter, alpha=self._objective.weight_decay)
                momentum = self._momentum[name].mul_(self._objective.momentum).add_(gradient)
                parameter.add_(momentum, alpha=-self._objective.learning_rate)

    def state(self) -> dict[str, Tensor]:
        return {f"momentum/{name}": value for name, value in self._momentum.items()}


class _Adam:
    """torch.optim.Adam, or AdamW, with the default betas and epsilon."""

    def __init__(self, parameters: dict[str, Tensor], objective: Objective) -> None:
        self._parameters = parameters
        self._objective = objective
        self._step = torch.zeros((), dtype=torch.int64)
        self._mean = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self._square = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def step(self, gradients: _Gradients) -> None:
        rate, decay = self._objective.learning_rate, self._objective.weight_decay
        self._step += 1
        count = int(self._step)
        step_size = rate / (1 - BETA_MEAN**count)
        correction = (1 - BETA_SQUARE**count) ** 0.5
        for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True):
            if gradient is not None:
                if decay and self._objective.optimizer == "adamw":
                    parameter.mul_(1 - rate * decay)
                elif decay:
                    gradient = gradient.add(parameter, alpha=decay)
                mean = self._mean[name].lerp_(gradient, 1 - BETA_MEAN)
                square = self._square[name].mul_(BETA_SQUARE)
                square.addcmul_(gradient, gradient, value=1 - BETA_SQUARE)
                denominator = (square.sqrt() / correction).add_(EPSILON)
                parameter.addcdiv_(mean, denominator, value=-step_size)

    def state(self) -> dict[str, Tensor]:
        return {
            "step": self._step,
            **{f"exp_avg/{name}": value for name, value in self._mean.items()},
            **{f"exp_avg_sq/{name}": value for name, value in self._square.items()},
        }


_OPTIMIZERS: dict[str, Callable[[dict[str, Tensor], Objective], _Optimizer]] = {
    "sgd": _Sgd,
    "adam": _Adam,
    "adamw": _Adam,
}
