"""Stages in PyTorch, eager and compiled, of the network that the bundle was made from."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pbc.bundle import Bundle
from pbc.frontend import original as network
from pbc.frontend.original import Call, Features
from pbc.profile.inputs import labels
from pbc.profile.memory import memory, until_settled
from pbc.profile.task import COMPILED, EAGER, Task
from pbc.profile.turns import Side
from pbc.runtime.parameters import initial_parameters


class _Training:
    """Steps on the same mini-batch; `compute` returns the logits. Compiled, so is the optimizer."""

    def __init__(
        self, task: Task, theta: Mapping[str, Tensor], compute: Call, compiled: bool
    ) -> None:
        self._objective = task.objective
        self._compute = compute
        self._labels = labels(task.batch, task.classes)
        self._optimizer = network.optimizer(task.objective, theta.values())
        step: Call = self._optimizer.step
        self._step = torch.compile(step) if compiled else step
        self._loss: Tensor | None = None

    def forward(self) -> None:
        logits = self._compute()
        self._loss = network.loss(self._objective, logits, self._labels)

    def update(self) -> None:
        assert self._loss is not None
        self._optimizer.zero_grad()
        self._loss.backward()
        self._step()


def sides(
    task: Task, bundle: Bundle, pixels: np.ndarray, sizes: Sequence[int]
) -> tuple[list[Side], list[str]]:
    """Return PyTorch's ways to run, with notes for the reader.

    Raises PbcError where the network cannot be rebuilt.
    """
    torch.set_num_threads(task.threads)
    weights = None if task.weights is None else Path(task.weights)
    parts = network.parts(bundle.path, bundle.digest, weights, task.classes)
    initial = initial_parameters(bundle, task.classes, 0)
    tensor = torch.from_numpy(pixels)
    eager = _side(EAGER, task, parts, initial, tensor, sizes)
    if not task.compile:
        return [eager], ["torch.compile was not tried"]
    compiled = _side(COMPILED, task, parts, initial, tensor, sizes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for prefix in compiled.prefix.values():
                prefix()
            compiled.forward()
            compiled.update()
    except Exception as error:  # no C++ compiler, an operator that it cannot do: torch's own
        return [eager], [network.not_compiled(error)]
    return [eager, compiled], []


def _side(
    name: str,
    task: Task,
    parts: network.Parts,
    initial: Mapping[str, np.ndarray],
    pixels: Tensor,
    sizes: Sequence[int],
) -> Side:
    compiled = name == COMPILED

    def compile_too(graph: Call) -> Call:
        return torch.compile(graph, dynamic=False) if compiled else graph

    images = pixels[: task.batch]
    theta = {key: torch.tensor(value).requires_grad_() for key, value in initial.items()}
    features: Features = (images,)
    prefix: dict[int, Call] = {}
    if parts.frozen is not None:
        frozen = network.without_gradient(compile_too(parts.frozen), False)
        features = frozen(images)

        def of_size(size: int) -> Call:
            return lambda: frozen(pixels[:size])

        prefix = {size: of_size(size) for size in sizes}
    body = compile_too(parts.body)
    training = _Training(
        task, theta, lambda: network.logits(parts, body, features, theta), compiled
    )
    return Side(name, prefix, training.forward, training.update)


def train(task: Task, bundle: Bundle, pixels: np.ndarray) -> dict[str, Any]:
    """Train as PyTorch's users do, in eval mode with all but θ frozen; return the memory.

    The peak counts from the first step on: what rebuilding the network needed is left out.
    """
    torch.set_num_threads(task.threads)
    weights = None if task.weights is None else Path(task.weights)
    initial = initial_parameters(bundle, task.classes, 0)
    module = network.module(bundle, weights, initial).eval().requires_grad_(False)
    named = dict(module.named_parameters())
    theta = {name: named[name].requires_grad_() for name in initial}
    compiled = task.who == COMPILED
    run: Call = torch.compile(module, dynamic=False) if compiled else module
    images = torch.from_numpy(pixels)
    training = _Training(task, theta, lambda: run(images), compiled)
    gc.collect()
    counted = _forget_peak()

    def step() -> None:
        training.forward()
        training.update()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
    except Exception as error:
        if not compiled:
            raise
        return {"note": network.not_compiled(error)}
    return {"steps": 1 + until_settled(step), **memory(), "from_first_step": counted}


def _forget_peak() -> bool:
    """Let the peak of memory begin anew; False where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
