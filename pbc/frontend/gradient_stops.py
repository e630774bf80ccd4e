"""Gradient stops: what a model's forward keeps from gradients becomes `detach` nodes.

torch.export keeps `x.detach()` and turns `with torch.no_grad()` into a region of its own, which its
decompositions then take for granted; the other spellings it drops or cannot trace. All of them
mean one thing: the value goes on, and the gradient does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from pbc.errors import PbcError
from pbc.frontend.user_code import where_called

aten = torch.ops.aten
_READ_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_WRITE_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


@contextmanager
def spelt_out() -> Iterator[None]:
    """Let torch.export see every way to stop a gradient as one of the two that it knows.

    `tensor.data` is `tensor.detach()`, torch.inference_mode is torch.no_grad, and a checkpoint is
    what it computes. Raises PbcError where a forward writes to `.data` or differentiates by itself.
    """
    with ExitStack() as stack:
        stack.enter_context(_DataIsDetach())
        stack.enter_context(_replaced(torch.inference_mode, "__enter__", _enter_no_grad))
        stack.enter_context(_replaced(torch.inference_mode, "__exit__", _leave_no_grad))
        stack.enter_context(without_checkpoints())
        yield


def without_checkpoints() -> AbstractContextManager[None]:
    """Let a reentrant checkpoint be what it computes.

    It computes without gradients, to do it again later: that means less memory and nothing else.
    """
    return _replaced(CheckpointFunction, "apply", staticmethod(_computed))


class _DataIsDetach(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func == _READ_DATA:
            return args[0].detach()
        if func == _WRITE_DATA:
            raise PbcError(
                f"writing to .data in forward{where_called()} cannot be kept: a graph's operators "
                "do not change a value without its gradient; write it with detach(), as in "
                "x + (f(x) - x).detach()"
            )
        if func == torch.autograd.grad:
            raise PbcError(
                f"forward computes a gradient of its own (torch.autograd.grad{where_called()}), "
                "which no graph of a bundle does; write out the derivative"
            )
        return func(*args, **(kwargs or {}))


def _enter_no_grad(region: Any) -> None:
    region.gradients_before = torch.is_grad_enabled()
    # Outside of inference_mode(False) alone: that leaves gradients as they are.
    if region.mode:
        torch.set_grad_enabled(False)


def _leave_no_grad(region: Any, *_: object) -> None:
    if region.mode:
        torch.set_grad_enabled(region.gradients_before)


def _computed(function: Callable[..., Any], _preserve: bool, *arguments: Any) -> Any:
    return function(*arguments)


@contextmanager
def _replaced(owner: type, name: str, value: object) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def as_nodes(graph: GraphModule) -> None:
    """Detach what regions without gradients put out, in a graph of torch.export's, in place."""
    for module in list(graph.modules()):
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if node.target is aten.detach_.default:
                # Functionalisation takes it for a value that did not change.
                node.target = aten.detach.default
            elif node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
                enabled, region = node.args[:2]
                if not enabled:
                    _detach_outputs(module.get_submodule(region.target))
        module.recompile()
        if module is not graph:
            # Region by region, like the graph itself: its nodes say what line they come from.
            module.forward = torch.fx.Interpreter(module).run


def _detach_outputs(region: Any) -> None:
    output = region.graph.output_node()
    results = []
    for result in output.args[0]:
        # What a region only hands on was made outside of it.
        if result.op == "call_function" and isinstance(result.meta.get("val"), torch.Tensor):
            with region.graph.inserting_before(output):
                stopped = region.graph.call_function(aten.detach.default, (result,))
            stopped.meta = dict(result.meta)
            results.append(stopped)
        else:
            results.append(result)
    output.args = (tuple(results),)
    region.recompile()
