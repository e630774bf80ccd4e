"""The PyTorch network that a bundle was compiled from, rebuilt from the bundle's provenance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import cross_entropy

from pbc.bundle import Bundle, trust
from pbc.errors import PbcError
from pbc.frontend import head, models, start, strategy
from pbc.frontend.origin import Origin, search_path, weights_named
from pbc.ir.graph import PARAMETER, placeholders
from pbc.ir.program import Request
from pbc.ir.rewrite import tensors_to_inputs
from pbc.ir.split import split_at_parameters
from pbc.lower.engine_choice import DEFAULT_ENGINE
from pbc.runtime.objective import Objective
from pbc.target import load_target

Features = tuple[Tensor, ...]
Call = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Parts:
    """The network cut where the first trainable parameter is read, as by hand.

    frozen: images to a tuple of features; None where nothing comes before the trainable part.
    body: its inputs are the features and θ, in the order of `inputs`: (name, whether it is of θ).
    theta: values of the right shapes. shape: of an image, (channels, height, width).
    """

    frozen: GraphModule | None
    body: GraphModule
    inputs: tuple[tuple[str, bool], ...]
    theta: Mapping[str, Tensor]
    shape: tuple[int, int, int]


@functools.lru_cache(maxsize=1)
def parts(bundle_path: Path, digest: str, weights: Path | None, classes: int) -> Parts:
    """Return the network's parts in eval mode and channels_last, no gradient on frozen tensors.

    digest: the bundle's, so that another bundle at the same path is never mistaken for it.
    Raises PbcError where the network cannot be rebuilt.
    """
    bundle = _open(bundle_path, digest)
    source = _source(bundle, weights)
    host = load_target("host")
    request = Request(
        target=host,
        engine=DEFAULT_ENGINE,  # torch itself
        strategy=bundle.manifest["strategy"],
        blocks=bundle.manifest.get("blocks_pattern"),
        seed=bundle.manifest["provenance"]["seed"],
        class_count=classes,
    )
    program = start.begin(source, request)
    assert program.model is not None  # it was just captured
    theta = tensors_to_inputs(program.model, program.trainable)
    frozen, body = split_at_parameters(program.model)
    if sorted(theta) != sorted(bundle.manifest["parameters"]):
        raise PbcError(
            f"the rebuilt {source.name} trains other parameters than {bundle_path}; "
            "compile the bundle again with this pbc"
        )
    inputs = tuple(
        (node.meta.get(PARAMETER, node.name), PARAMETER in node.meta) for node in placeholders(body)
    )
    return Parts(
        None if frozen is None else _channels_last(frozen),
        _channels_last(body),
        inputs,
        theta,
        _shape(bundle),
    )


def module(bundle: Bundle, weights: Path | None, theta: dict[str, np.ndarray]) -> nn.Module:
    """Return the eager module with its classifier and insertions, θ set to the given values."""
    source = _source(bundle, weights)
    torch.manual_seed(bundle.manifest["provenance"]["seed"])
    chosen = strategy.parse(bundle.manifest["strategy"])
    example = torch.zeros(2, *source.input.shape)
    if bundle.manifest["class_count"] is not None:
        source = start.resized(source, bundle.manifest["class_count"], example)
    network = source.module
    start.prepared(source, chosen, example, bundle.manifest.get("blocks_pattern"))
    for name, value in theta.items():
        head.replace_parameter(network, name, torch.from_numpy(value.copy()))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _channels_last(graph: GraphModule) -> GraphModule:
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _open(path: Path, digest: str) -> Bundle:
    bundle = Bundle.open(path)
    if bundle.digest != digest:
        raise PbcError(f"{path} changed while it was in use; start again")
    return bundle


def _shape(bundle: Bundle) -> tuple[int, int, int]:
    channels, height, width = bundle.manifest["input"]["shape"]
    return channels, height, width


def found(bundle: Bundle, weights: Path | None) -> tuple[str, str]:
    """Return the model and the very weights of a bundle, by the names that `pbc compile` takes.

    weights: a file, or a folder to look in. Raises PbcError where they are not found.
    """
    known = bundle.manifest["provenance"]
    if not known.get("model"):
        raise PbcError(f"{bundle.path} does not say which model it was compiled from")
    named, digest = known["weights"], known["weights_sha256"]
    if models.is_program(known["model"]) and trust.configured() is None:
        trust.refuse_unvouched(f"{bundle.path} would be rebuilt by the program {known['model']!r}")
    origin = Origin.load(bundle.path, bundle.digest)
    model = origin.model or known["model"]
    if digest is None:
        return model, named
    places = [weights] if weights is not None else _places(bundle, origin)
    for path in weights_named(named, digest, places):
        return model, str(path)
    there = weights is not None and weights.is_file()
    refused = f"{weights} holds other weights" if there else f"no file {named} was found"
    raise PbcError(
        f"{known['model']} cannot be rebuilt: {refused}; "
        f"--weights names the file {named} that the bundle was compiled from"
    )


def _source(bundle: Bundle, weights: Path | None) -> models.Source:
    """Load the model with the very weights of the bundle."""
    model, named = found(bundle, weights)
    return models.load(model, named, _shape(bundle), bundle.manifest["provenance"]["seed"])


def _places(bundle: Bundle, origin: Origin) -> list[Path]:
    """Return where the weights may be: the search path, where they were, beside the bundle."""
    before = [Path(origin.weights)] if origin.weights else []
    return [*search_path(), *before, bundle.path.parent]


def without_gradient(call: Call, bfloat16: bool) -> Call:
    """Return the frozen prefix as PET runs it: nothing is recorded, features are float32."""

    def run(images: Tensor) -> Features:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return tuple(value.float() for value in call(images))

    return run


def logits(parts: Parts, call: Call, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
    """Call a body with its inputs in its own order."""
    values = iter(features)
    (result,) = call(
        *(theta[name] if of_theta else next(values) for name, of_theta in parts.inputs)
    )
    answer: Tensor = result
    return answer


def not_compiled(error: Exception) -> str:
    """Say in a line that torch.compile failed; what it raises is torch's own affair."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return f"torch.compile is not possible here ({type(error).__name__}: {reason})"


def optimizer(objective: Objective, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return torch's own optimizer for the objective of all rivals."""
    rate, decay = objective.learning_rate, objective.weight_decay
    if objective.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=rate, momentum=objective.momentum, weight_decay=decay)
    if objective.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def loss(objective: Objective, logits: Tensor, labels: np.ndarray) -> Tensor:
    """Return the mean cross-entropy of a mini-batch."""
    return cross_entropy(
        logits, torch.from_numpy(labels), label_smoothing=objective.label_smoothing
    )


def optimizer_arrays(optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Flatten the optimizer's state to arrays named `optimizer/INDEX/KEY`."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"optimizer/{index}/{key}": value.numpy().copy()
        for index, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_arrays(optimizer: torch.optim.Optimizer, arrays: dict[str, np.ndarray]) -> None:
    """Set what `optimizer_arrays` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, key = rest.partition("/")
            state.setdefault(int(index), {})[key] = torch.from_numpy(value.copy())
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
