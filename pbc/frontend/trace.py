"""Trace: one run of an eager network, as its operators and the modules that they ran in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pbc.errors import PbcError
from pbc.frontend.user_code import where_called

# Operators that multiply by a weight: what counts as a layer of a network.
PRODUCTS = frozenset({
    "addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "convolution", "mkldnn_convolution",
})  # fmt: skip
# Operators that only lay a tensor out anew: axes move, merge or split, values stay.
LAYOUT = frozenset({
    "alias", "clone", "contiguous", "detach", "expand", "lift_fresh", "permute", "reshape",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "_reshape_alias", "_to_copy", "_unsafe_view",
})  # fmt: skip


@dataclass(eq=False)
class Value:
    """A tensor of the run: the network's input, a constant, a named tensor or a result.

    name: of a parameter or buffer. made_by: the operator whose result it is. constant: computed
    from named tensors and constants alone.
    """

    shape: tuple[int, ...]
    name: str | None = None
    made_by: Operator | None = None
    constant: bool = False


@dataclass(eq=False)
class Operator:
    """A call of an ATen operator; in its arguments values stand for tensors.

    word: its name without namespace and overload, without the underscore of an in-place form.
    module: the dotted name of the innermost module that was running.
    """

    number: int
    word: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str
    results: list[Value] = field(default_factory=list)

    @property
    def inputs(self) -> list[Value]:
        """Every value among the arguments, those in lists too."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    @property
    def is_layer(self) -> bool:
        """Whether it multiplies data by a weight."""
        constant = [value.constant for value in self.inputs]
        return self.word in PRODUCTS and any(constant) and not all(constant)


@dataclass(eq=False)
class Call:
    """A module's run: operators first … last - 1, and the calls that ran inside it."""

    name: str
    module: nn.Module
    first: int
    inputs: list[Value]
    last: int = 0
    outputs: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Trace:
    """A run of a network.

    root: the network's own call. read: for each parameter that the run reads, the number of the
    first operator that does. output: what the network returned; result: its value, where that is
    one tensor.
    """

    root: Call
    operators: tuple[Operator, ...]
    read: Mapping[str, int]
    output: Any
    result: Value | None

    def calls(self) -> Iterator[Call]:
        """Every call of a module, outer ones first, in the order of execution."""
        waiting = [self.root]
        while waiting:
            call = waiting.pop()
            yield call
            waiting.extend(reversed(call.calls))


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Run the module in eval mode, without gradients, on a float32 [batch, …] example.

    Whatever the module raises passes through.
    """
    module.eval()
    recorder = _Recorder(module, example)
    fast = torch.backends.mha.get_fastpath_enabled()
    # torch's fused encoder layers would run past their own submodules.
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = [
        register_module_forward_pre_hook(recorder.enter),
        register_module_forward_hook(recorder.leave, always_call=True),
    ]
    try:
        with torch.no_grad(), recorder:
            output = module(example)
    finally:
        for hook in hooks:
            hook.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
    assert recorder.root is not None
    recorder.root.last = len(recorder.operators)
    result = recorder.value(output) if isinstance(output, Tensor) else None
    return Trace(
        recorder.root,
        tuple(recorder.operators),
        recorder.read,
        output,
        result,
    )


class _Recorder(TorchDispatchMode):
    """Record what the dispatcher sees.

    A tensor is known by its place in memory and not by its Python object, which views of the same
    tensor do not share; every tensor is kept, so that no place is used twice.
    """

    supports_higher_order_operators = True  # they are refused, by name

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.read: dict[str, int] = {}
        self.root: Call | None = None
        self._running: list[Call] = []
        self._names = {id(child): name for name, child in module.named_modules()}
        self._values: dict[tuple[Any, ...], Value] = {}
        self._kept: list[Tensor] = [example]
        self._values[_place(example)] = Value(tuple(example.shape))
        self._parameters = {name for name, _ in module.named_parameters()}
        for name, tensor in (*module.named_buffers(), *module.named_parameters()):
            if not torch.nn.parameter.is_lazy(tensor):
                self._values[_place(tensor)] = Value(tuple(tensor.shape), name, constant=True)

    def value(self, tensor: Tensor) -> Value:
        place = _place(tensor)
        if place not in self._values:
            self._kept.append(tensor)
            self._values[place] = Value(tuple(tensor.shape), constant=True)
        return self._values[place]

    def values(self, tree: Any) -> list[Value]:
        return [self.value(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise PbcError(
                f"its forward calls torch's {func.name()}{where_called()}, which no graph of a "
                "bundle has; torch.where chooses between two results"
            )
        kwargs = kwargs or {}
        known_args, known_kwargs = tree_map_only(Tensor, self.value, (args, kwargs))
        results = func(*args, **kwargs)
        operator = Operator(
            len(self.operators),
            _word(func),
            known_args,
            known_kwargs,
            self._running[-1].name if self._running else "",
        )
        constant = all(value.constant for value in operator.inputs)
        for value in operator.inputs:
            if value.name in self._parameters:
                self.read.setdefault(value.name, operator.number)
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._kept.append(result)
                value = Value(tuple(result.shape), made_by=operator, constant=constant)
                self._values[_place(result)] = value
                operator.results.append(value)
        self.operators.append(operator)
        return results

    def enter(self, module: nn.Module, inputs: Any) -> None:
        name = self._names.get(id(module), "")
        call = Call(name, module, len(self.operators), self.values(inputs))
        if self._running:
            self._running[-1].calls.append(call)
        else:
            self.root = call
        self._running.append(call)

    def leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        call = self._running[-1]
        call.last = len(self.operators)
        call.outputs = self.values(outputs)
        if call is not self.root:  # whose own hooks run now, and modules in them
            self._running.pop()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    try:
        storage = tensor.untyped_storage()._cdata
        return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    except (NotImplementedError, RuntimeError):  # a layout without strides
        return (id(tensor),)


def _word(func: Callable[..., Any]) -> str:
    name = str(func).partition(".")[2].partition(".")[0]
    return name.removesuffix("_") if not name.startswith("__") else name
