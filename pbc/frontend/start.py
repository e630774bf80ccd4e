"""The start of a compilation: a model is loaded, given its strategy and captured."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pbc import plugins
from pbc.errors import PbcError, reason_of
from pbc.frontend import models, strategy
from pbc.frontend.agreement import confirm
from pbc.frontend.capture import capture
from pbc.ir.fold_constants import fold_constants
from pbc.ir.program import MODEL, Head, Program, Provenance, Request
from pbc.lower.lowering import Knows
from pbc.runtime.engines.pytorch.ops import OPS


def begin(
    model: str | models.Source,
    request: Request,
    *,
    weights: str = models.DEFAULT,
    shape: tuple[int, int, int] | None = None,
    command: str = "",
) -> Program:
    """Load a model, apply the strategy and capture it: the program that passes start from.

    model: its name, or a module with its facts; what a strategy inserts stays in that module.
    weights, shape: for a name, see pbc.frontend.models.load. command: for the provenance. Raises
    PbcError for a model that does not run, is damaged, or is no classifier.
    """
    chosen = strategy.parse(request.strategy)
    source = _loaded(model, weights, shape, request.seed)
    module = source.module
    torch.manual_seed(request.seed)
    if request.class_count is not None:
        _resize_classifier(module, source.classifier, request.class_count)
    example = torch.randn(2, *source.input.shape)
    reference = _run_with(chosen, source, example)
    head = _head(source, reference)
    trainable = chosen.trainable(module, source.classifier)
    graph = capture(module, source.input.shape, trainable, _operators(request.engine))
    graph = fold_constants(graph, trainable)
    unreached = confirm(source.name, module, graph, source.input.shape, trainable)
    return Program(
        graphs={MODEL: graph},
        strategy=request.strategy,
        trainable=trainable,
        target=request.target,
        engine=request.engine,
        input=source.input,
        head=head,
        example=example,
        reference=reference,
        provenance=Provenance(source.name, source.weights, source.weights_sha256, command),
        batch=request.batch,
        seed=request.seed,
        class_names=request.class_names,
        class_count=request.class_count,
        notes=(*_notes(source), *unreached),
    )


def _loaded(
    model: str | models.Source, weights: str, shape: tuple[int, int, int] | None, seed: int
) -> models.Source:
    if isinstance(model, models.Source):
        return model
    return models.load(model, weights, shape, seed)


def _operators(engine: str) -> Collection[str]:
    """Those that an engine has, by name."""
    lowering = plugins.load("pbc.lowerings", engine)()
    return lowering.operators() if isinstance(lowering, Knows) else OPS


def _notes(source: models.Source) -> tuple[str, ...]:
    if source.weights != models.RANDOM:
        return ()
    return ("random weights: costs are real, fidelity and accuracy mean nothing",)


def _run_with(chosen: strategy.Strategy, source: models.Source, example: Tensor) -> Tensor:
    """Insert what the strategy trains; the logits for the example, or why there are none."""
    with torch.no_grad():
        try:
            chosen.insert(source.module, example)
            reference = source.module.eval()(example)
        except PbcError:
            raise
        except Exception as error:  # whatever a model raises, it is the model that failed
            raise PbcError(
                f"{source.name} does not run on inputs of shape {list(source.input.shape)}: "
                f"{reason_of(error)}"
            ) from error
    if not isinstance(reference, Tensor):
        raise PbcError(
            f"{source.name} returns a {type(reference).__name__}; pbc trains models that return "
            "one tensor of logits"
        )
    if not torch.isfinite(reference).all():
        raise PbcError(
            f"{source.name} puts out values that are not finite: its weights ({source.weights}) "
            "are damaged"
        )
    return reference


def _head(source: models.Source, logits: Tensor) -> Head:
    """The facts of the classifier; PbcError where the last linear layer is none."""
    classifier = source.module.get_submodule(source.classifier)
    assert isinstance(classifier, nn.Linear)
    if logits.shape != (2, classifier.out_features):
        raise PbcError(
            f"{source.name} puts out {list(logits.shape)} for two images, but its last linear "
            f"layer {source.classifier} has {classifier.out_features} outputs; "
            "pbc trains classifiers"
        )
    return Head(
        f"{source.classifier}.weight",
        None if classifier.bias is None else f"{source.classifier}.bias",
        classifier.in_features,
    )


def _resize_classifier(module: nn.Module, name: str, count: int) -> None:
    old = module.get_submodule(name)
    assert isinstance(old, nn.Linear)
    owner, _, leaf = name.rpartition(".")
    new = nn.Linear(old.in_features, count, bias=old.bias is not None)
    setattr(module.get_submodule(owner), leaf, new)
