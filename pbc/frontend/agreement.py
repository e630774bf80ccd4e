"""Agreement: a captured graph beside the user's own module, logits and gradients.

Whoever checks a derived step compares it with autograd of the captured graph; that the graph itself
means what the module meant is checked here, once, right after capture.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from pbc.errors import PbcError, reason_of
from pbc.frontend.gradient_stops import without_checkpoints
from pbc.frontend.user_code import where_called
from pbc.ir.graph import origin, output_node
from pbc.ir.rewrite import ancestors, in_float64
from pbc.runtime.engines.pytorch.group_norm import mend_group_norm

TOLERANCE = 1e-4
"""Largest difference, relative to a tensor's largest value."""

_BATCH = 2
# A gradient this much smaller than the largest is zero but for rounding.
_NO_GRADIENT = 1e-6
# Gradients of several sizes, for hooks and backwards that clip them.
_SIZES = (1.0, 1e4, 1e-4)

_REGISTER_HOOK = torch.Tensor.register_hook

aten = torch.ops.aten


def confirm(
    name: str,
    module: nn.Module,
    graph: GraphModule,
    shape: tuple[int, int, int],
    trainable: Collection[str],
) -> tuple[str, ...]:
    """Compare a captured graph with the module that it was captured from, on random images.

    name: the model's, for messages. Logits, and the gradient of every trainable parameter of a
    random function of them, agree to TOLERANCE in float32, or else in float64 (a ReLU whose input
    is zero but for rounding goes either way). An image's logits do not depend on the others in its
    batch.

    Returns notes: what trains in name only, since the model stops its gradient. Raises PbcError
    where they differ, naming the first parameter and what in the model a graph cannot keep, and
    where nothing of the model can be trained.
    """
    mend_group_norm()
    images = torch.randn(_BATCH, *shape, generator=torch.Generator().manual_seed(_BATCH))
    watch = _Watch(module)
    names = _names_in_graph(module, graph, trainable)
    with only_requiring(module, names):
        with watch:
            eager = _eager(module, images, names)
        found = _graph(graph, images, trainable)
        _check_logits(name, eager.logits, found.logits)
        _check_rows(name, module, images, eager.logits)
        sizes = _SIZES if watch.suspects else _SIZES[:1]
        try:
            wrong = _first_difference(eager, found, sizes)
        except RuntimeError as error:
            raise PbcError(
                f"{name} cannot be trained in PyTorch either: {reason_of(error)}; freeze "
                "everything before it, or replace it in the model"
            ) from error
        if wrong and not watch.suspects and _agree_in_float64(module, graph, images, names):
            wrong = None
        if wrong is None:
            return _without_gradient(name, graph, eager)
        gradient = eager.gradients(1.0)[wrong[0]]
    if gradient is not None and not gradient.isfinite().all():
        raise PbcError(
            f"the gradient of {wrong[0]} in {name} is not finite in PyTorch either, of images "
            "drawn at random: look for a root, a logarithm or a quotient of zero"
        )
    raise PbcError(_difference(name, *wrong, watch.suspects))


class _Run:
    """Logits of one forward, and gradients of the trainable parameters that took part."""

    def __init__(self, logits: Tensor, leaves: Mapping[str, Tensor]) -> None:
        self.logits = logits.detach()
        self._logits, self._leaves = logits, leaves

    def gradients(self, size: float) -> dict[str, Tensor | None]:
        """By parameter, of a random function of the logits whose slope is of the given size."""
        if not self._logits.requires_grad or not self._leaves:
            return dict.fromkeys(self._leaves)
        random = torch.Generator().manual_seed(_BATCH)
        slope = torch.randn(self.logits.shape, generator=random).to(self.logits.dtype) * size
        gradients = torch.autograd.grad(
            self._logits, list(self._leaves.values()), slope, retain_graph=True, allow_unused=True
        )
        return dict(zip(self._leaves, gradients, strict=True))


def _eager(module: nn.Module, images: Tensor, names: Collection[str]) -> _Run:
    """The module itself, not a copy: whatever is attached to its parameters takes part."""
    leaves = {name: p for name, p in _parameters(module).items() if name in names}
    with without_checkpoints(), torch.enable_grad():
        return _Run(module.eval()(images), leaves)


def _names_in_graph(module: nn.Module, graph: GraphModule, trainable: Collection[str]) -> set[str]:
    """The trainable parameters; of one that layers share, the name that the graph knows it by."""
    parameters = _parameters(module)
    known = {id(parameters[name]) for name in _parameters(graph) if name in parameters}
    return {
        name
        for name, parameter in parameters.items()
        if name in trainable and (name in _parameters(graph) or id(parameter) not in known)
    }


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


@contextmanager
def only_requiring(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let these parameters of a module require gradients and no others, for the time being."""
    leaves = {id(p) for name, p in _parameters(module).items() if name in names}
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in leaves)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _graph(graph: GraphModule, images: Tensor, trainable: Collection[str]) -> _Run:
    leaves = {
        name: parameter.detach().requires_grad_()
        for name, parameter in _parameters(graph).items()
        if name in trainable
    }
    with torch.enable_grad():
        (logits,) = functional_call(graph, leaves, (images,))
    return _Run(logits, leaves)


# ---- comparing -----------------------------------------------------------------------------


def _check_logits(name: str, eager: Tensor, found: Tensor) -> None:
    if not eager.isfinite().all():
        raise PbcError(f"the logits of {name} are not finite, of images drawn at random")
    error = _relative(found, eager, 1.0)
    if not error <= TOLERANCE:
        raise PbcError(
            f"the logits of {name} differ by {error:.1e} (relative; at most {TOLERANCE:.0e}) from "
            "those of its captured graph: its forward depends on more than the image, such as "
            "random numbers, a counter or the batch size"
        )


def _check_rows(name: str, module: nn.Module, images: Tensor, logits: Tensor) -> None:
    """Refuse batch statistics: what was computed of an image is kept, whatever shared its batch."""
    with torch.no_grad():
        alone = module(images[:1].expand_as(images).contiguous())[:1]
    error = _relative(alone, logits[:1], 1.0)
    # Where an image lies in its batch may decide how its products are added up.
    if not error <= 10 * TOLERANCE:
        with torch.no_grad():
            again = module(images)
        if not _relative(again, logits, 1.0) <= TOLERANCE:
            raise PbcError(
                f"the logits of {name} change from call to call: it keeps a state, such as a "
                "counter, which the graphs of a bundle do not"
            )
        raise PbcError(
            f"the logits of {name} for an image depend on the other images of its batch (by "
            f"{error:.1e}, relative): a norm that uses its batch's statistics in eval mode, or a "
            "mean over the batch; give batch norms track_running_stats=True"
        )


def _first_difference(eager: _Run, found: _Run, sizes: Sequence[float]) -> tuple[str, float] | None:
    """The first parameter whose gradients differ by more than TOLERANCE, and by how much."""
    for size in sizes:
        expected, got = eager.gradients(size), found.gradients(size)
        largest = max((float(g.abs().max()) for g in expected.values() if g is not None), default=0)
        for name, gradient in expected.items():
            other = got.get(name)
            if gradient is None:
                # A gradient of zeros moves nothing either.
                error = 0.0 if other is None else float(other.abs().max()) / size
            else:
                least = max(largest * _NO_GRADIENT, torch.finfo(torch.float32).tiny)
                zeros = torch.zeros_like(gradient)
                error = _relative(zeros if other is None else other, gradient, least)
            if not error <= TOLERANCE:
                return name, error
    return None


def _relative(value: Tensor, expected: Tensor, least: float) -> float:
    if value.shape != expected.shape:
        return float("inf")
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(least))


def _agree_in_float64(
    module: nn.Module, graph: GraphModule, images: Tensor, names: Collection[str]
) -> bool:
    """Whether they agree where rounding does not matter; False where that cannot be computed."""
    images = images.double()
    try:
        eager = _eager(copy.deepcopy(module).double(), images, names)
        found = _graph(in_float64(graph), images, names)
    except Exception:  # a module may be made for float32 alone, in any way: then float32 has spoken
        return False
    return _first_difference(eager, found, _SIZES[:1]) is None


# ---- saying so -----------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Lists what in a module changes gradients in ways that no graph of operators keeps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.suspects: dict[str, None] = {}
        for title, part in module.named_modules():
            hooks = (*part._backward_hooks.values(), *part._backward_pre_hooks.values())
            for hook in hooks:
                self._add(f"the backward hook {_name_of(hook)} of {title or 'the model'}", "")
        for title, parameter in module.named_parameters():
            for hook in (getattr(parameter, "_backward_hooks", None) or {}).values():
                self._add(f"the hook {_name_of(hook)} of {title}", "")

    def _add(self, what: str, where: str) -> None:
        self.suspects[what + where] = None

    def __enter__(self) -> _Watch:
        self._apply: Any = vars(torch.autograd.Function)["apply"]
        apply = self._apply.__func__

        def watched(function: Any, *args: Any, **kwargs: Any) -> Any:
            self._add(f"the backward of {function.__name__}", where_called())
            return apply(function, *args, **kwargs)

        torch.autograd.Function.apply = classmethod(watched)  # type: ignore[assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.autograd.Function.apply = self._apply  # type: ignore[method-assign]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func == _REGISTER_HOOK:
            hook = args[1] if len(args) > 1 else (kwargs or {}).get("hook")
            self._add(f"the hook {_name_of(hook)}", where_called())
        return func(*args, **(kwargs or {}))


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__name__", type(hook).__name__))


def _difference(name: str, parameter: str, error: float, suspects: Collection[str]) -> str:
    gradient = (
        f"the gradient of {parameter} would differ by {error:.1e} (relative) from that of {name} "
        "in PyTorch"
    )
    if not suspects:
        return (
            f"{gradient}: a graph of operators does not keep how its forward changes gradients, "
            "such as a value changed in place under no_grad, or no_grad in autocast; write it "
            "with detach()"
        )
    first, *others = suspects
    more = f" (nor {len(others)} more like it)" if others else ""
    return (
        f"{first} cannot be kept{more}: {gradient}; write it with detach(), as in "
        "x + (f(x) - x).detach(), or freeze everything before it"
    )


def _without_gradient(name: str, graph: GraphModule, eager: _Run) -> tuple[str, ...]:
    """Notes on the trainable parameters that no gradient reaches, in PyTorch either."""
    gradients = eager.gradients(1.0)
    still = [title for title, gradient in gradients.items() if gradient is None]
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    still = [title for title in still if title in used]
    if not still:
        return ()
    stops = [node for node in ancestors([output_node(graph)]) if node.target is aten.detach.default]
    places = sorted({origin(node).strip() for node in stops} - {""})
    where = f" {places[0]}" if places else ""
    if len(still) == len(gradients):
        raise PbcError(
            f"{name} gives none of its trainable parameters a gradient: it is stopped{where} "
            "(detach, no_grad or inference_mode)"
        )
    more = f" and {len(still) - 1} more" if len(still) > 1 else ""
    return (
        f"{still[0]}{more} will not move, as in PyTorch: the model stops their gradient{where}",
    )
