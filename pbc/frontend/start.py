"""The start of a compilation: a model is loaded, given its strategy and captured."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pbc.bundle.optimizers import OPTIMIZERS
from pbc.errors import PbcError, reason_of
from pbc.frontend import head, models, strategy
from pbc.frontend.agreement import confirm
from pbc.frontend.capture import capture
from pbc.frontend.open_classes import open_classes
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.fold_constants import fold_constants
from pbc.ir.levels import IMAGES
from pbc.ir.program import Head, Network, Program, Request
from pbc.ir.rewrite import copy_graph
from pbc.ir.split import FEATURE
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.training_graph.names import LABELS, LOGITS, LOSS, LOSSES, SMOOTHING

# What graphs read and return beside features; a user's tensor goes by its own name in them.
_OF_GRAPHS = frozenset({IMAGES, LABELS, SMOOTHING, LOSS, LOSSES, LOGITS}).union(
    *(facts.scalars for facts in OPTIMIZERS.values())
)


def begin(
    model: str | models.Source,
    request: Request,
    *,
    weights: str = models.DEFAULT,
    shape: tuple[int, int, int] | None = None,
    resize: str | None = None,
    operators: Collection[str] = OPS,
) -> Program:
    """Load a model, apply the strategy and capture it: the program that passes start from.

    model: its name, or a module with its facts; what a strategy inserts stays in that module.
    weights, shape, resize: for a name, see pbc.frontend.models.load. operators: those that the
    engine has; others are taken apart where torch can. Raises PbcError for a model that does not
    run, is damaged, or is no classifier.
    """
    chosen = strategy.parse(request.strategy)
    source = loaded(model, weights, shape, request.seed, resize)
    torch.manual_seed(request.seed)
    example = torch.randn(2, *source.input.shape)
    if request.class_count is not None:
        source = resized(source, request.class_count, example)
    traced = prepared(source, chosen, example, request.blocks)
    reference = _scores(traced, source)
    trainable, frozen = _trained(chosen, traced)
    _refuse_names_of_graphs(source)
    graph = capture(source.module, source.input.shape, trainable, operators)
    graph = fold_constants(graph, trainable)
    unreached = confirm(source.name, source.module, graph, source.input.shape, trainable)
    graph, fixed, bound = _with_open_classes(graph, traced.head, request.class_count)
    network = Network(
        name=source.name,
        weights=source.weights,
        weights_sha256=source.weights_sha256,
        input=source.input,
        head=replace(traced.head, fixed=fixed),
        example=example,
        reference=reference,
        blocks=traced.described(trainable),
    )
    return Program(
        request=request,
        network=network,
        trainable=trainable,
        model=graph,
        notes=(*_notes(source), *frozen, *unreached, *bound),
    )


def _refuse_names_of_graphs(source: models.Source) -> None:
    """Raise PbcError where a graph would have one name for two, a user's tensor and its own."""
    for name, _ in (*source.module.named_parameters(), *source.module.named_buffers()):
        number = name.removeprefix(FEATURE)
        if name in _OF_GRAPHS or (number != name and number.isdigit()):
            raise PbcError(
                f"{source.name} has a tensor called {name!r}, as pbc's graphs call an input or "
                f"output of theirs; give the attribute another name, such as own_{name}"
            )


def _with_open_classes(
    graph: GraphModule, found: Head, count: int | None
) -> tuple[GraphModule, int | None, tuple[str, ...]]:
    """Return the graph for any number of classes; where that cannot be, for this one, and a note.

    Raises PbcError where it cannot be and no count is known.
    """
    opened = copy_graph(graph)
    try:
        open_classes(opened, found)
    except PbcError as error:
        if count is None:
            raise
        return graph, count, (f"the bundle is for {count} classes alone: {error}",)
    return opened, None, ()


def prepared(
    source: models.Source,
    chosen: strategy.Strategy,
    example: Tensor,
    blocks: str | None,
) -> TracedNetwork:
    """Read a network and insert what the strategy trains, in place.

    Raises PbcError for a model that does not run.
    """

    def read() -> TracedNetwork:
        network = TracedNetwork.of(source.module, source.head, example, blocks)
        before = _shapes(source.module)
        chosen.insert(network, example)
        inserted = _shapes(source.module) != before
        return network.again(example) if inserted else network

    return models.run(read, source.name, source.input.shape)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.named_parameters()}


def resized(source: models.Source, count: int, example: Tensor) -> models.Source:
    """Give the head another number of classes, in place or in the network built anew for it.

    Raises PbcError where something else counts on its own number.
    """
    module, found = source.module, source.head
    before = len(module.get_parameter(next(iter(found.parameters))))
    if count == before:
        return source
    head.resize(module, found, count)
    try:
        with torch.no_grad():
            module(example)
    except Exception as error:  # it ran before: whatever it raises is of the other number
        again = models.rebuilt(source, count)
        if again is not None:
            return again
        state = module.state_dict()
        sized = [n for n, t in state.items() if before in t.shape and n not in found.parameters]
        beside = f"; {sized[0]} has the former number too" if sized else ""
        raise PbcError(
            f"{source.name} does not run with {count} classes in place of its {before}: "
            f"{reason_of(error)}{beside}"
        ) from error
    return source


def loaded(
    model: str | models.Source,
    weights: str,
    shape: tuple[int, int, int] | None,
    seed: int,
    resize: str | None,
) -> models.Source:
    """Return a model's source, loaded if it is a name (see pbc.frontend.models.load)."""
    if isinstance(model, models.Source):
        return model
    return models.load(model, weights, shape, seed, resize)


def _notes(source: models.Source) -> tuple[str, ...]:
    if source.weights != models.RANDOM:
        return source.notes
    random = "random weights: costs are real, fidelity and accuracy mean nothing"
    return (*source.notes, random)


def _scores(network: TracedNetwork, source: models.Source) -> Tensor:
    """The class scores of the example, or why there are none."""
    scores, name = network.trace.output, source.name
    classes = len(source.module.get_parameter(next(iter(source.head.parameters))))
    if not isinstance(scores, Tensor) or scores.shape != (2, classes):
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PbcError(
            f"{name} puts out {found} for two images with a head of {classes} classes "
            f"({', '.join(source.head.parameters)}): its code counts on another number of classes"
        )
    if not torch.isfinite(scores).all():
        raise PbcError(
            f"{name} puts out values that are not finite: its weights ({source.weights}) "
            "are damaged"
        )
    return scores


def _trained(
    chosen: strategy.Strategy, network: TracedNetwork
) -> tuple[frozenset[str], tuple[str, ...]]:
    """What trains: of the strategy's choice and the head, whatever the network reads; notes.

    A parameter that the model itself freezes (requires_grad) stays so, as in torch.
    """
    head = frozenset(network.head.parameters)
    names = (chosen.trainable(network) | head) & frozenset(network.trace.read)
    still = [
        name
        for name, parameter in network.module.named_parameters()
        if name in names - head and not parameter.requires_grad
    ]
    if not still:
        return names, ()
    more = f" and {len(still) - 1} more" if len(still) > 1 else ""
    return names - frozenset(still), (
        f"{still[0]}{more} will not move, as in PyTorch: the model has them frozen "
        "(requires_grad=False)",
    )
