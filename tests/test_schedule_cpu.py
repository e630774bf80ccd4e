"""The CPU schedule: each rule computes what torch does, on odd sizes and for every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

tvm = pytest.importorskip("tvm")

from tvm import relax, tirx  # noqa: E402
from tvm.tirx.stmt import ForKind  # noqa: E402
from tvm_ffi import structural_equal, structural_walk  # noqa: E402

from pbc.passes.schedule_cpu import RULES, schedule, schedule_cpu  # noqa: E402
from pbc.tir.dots import dots  # noqa: E402
from pbc.tir.loops import Processor, Sink  # noqa: E402
from pbc.tir.moves import fold_moves  # noqa: E402
from pbc.tir.panels import panels, read_matrices, turn  # noqa: E402
from pbc.tir.simple import elementwise, reduction  # noqa: E402
from pbc.tir.stages import inline, read_stages  # noqa: E402

Size = int | str
Write = Callable[..., Any]

HOST = {"kind": "llvm", "mcpu": tvm.get_global_func("tvm.codegen.llvm.GetHostCPUName")()}
WIDE = Processor(lanes=16, registers=32)
BATCHES = (1, 2, 5)
op = relax.op


def network(write: Write, shapes: Sequence[Sequence[Size]]) -> Any:
    """A module up to fusion; a size "b" is open."""
    builder = relax.BlockBuilder()
    batch = tirx.Var("b", "int64")
    arguments = [
        relax.Var(f"input_{at}", relax.TensorType(_sizes(shape, batch), "float32"))
        for at, shape in enumerate(shapes)
    ]
    with builder.function("main", arguments):
        with builder.dataflow():
            result = builder.emit_output(write(builder.emit, *arguments))
        builder.emit_func_output(result)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    return tvm.transform.Sequential(passes)(builder.get())


def _sizes(shape: Sequence[Size], batch: Any) -> list[Any]:
    return [batch if size == "b" else size for size in shape]


def run(module: Any, target: Any) -> Callable[..., np.ndarray[Any, Any]]:
    from tvm.relax.backend.cpu_generic.pipeline import dataflow_lower_passes, finalize_passes

    with target:
        passes = [*dataflow_lower_passes(target), *finalize_passes(target)]
        module = tvm.transform.Sequential(passes)(module)
    machine = relax.VirtualMachine(
        tvm.compile(module, target=target, relax_pipeline=None), tvm.cpu()
    )

    def call(*inputs: torch.Tensor) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = machine["main"](
            *(tvm.runtime.tensor(tensor.numpy()) for tensor in inputs)
        ).numpy()
        return result

    return call


def functions(module: Any) -> list[Any]:
    return [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]


def convolution(**options: Any) -> tuple[Write, Write]:
    def write(emit: Write, x: Any, weight: Any) -> Any:
        strides, padding = options.get("stride", 1), options.get("padding", 0)
        groups = options.get("groups", 1)
        product = op.nn.conv2d(x, weight, strides=strides, padding=padding, groups=groups)
        return emit(op.nn.relu(emit(product)))

    return write, lambda x, weight: functional.relu(functional.conv2d(x, weight, **options))


def layer(emit: Write, x: Any, weight: Any) -> Any:
    return emit(op.nn.gelu(emit(op.matmul(x, emit(op.permute_dims(weight))))))


LAYER = (layer, lambda x, weight: functional.gelu(x @ weight.T))
PRODUCT = (lambda emit, x, weight: emit(op.matmul(x, weight)), lambda x, weight: x @ weight)

# name: (in relax, in torch), shapes
CASES: dict[str, tuple[tuple[Write, Write], list[Sequence[Size]]]] = {
    "one-by-one": (convolution(), [("b", 24, 8, 8), (40, 24, 1, 1)]),
    "odd convolution": (convolution(padding=1), [("b", 5, 7, 9), (11, 5, 3, 3)]),
    "strided convolution": (convolution(stride=2, padding=1), [("b", 6, 16, 16), (16, 6, 3, 3)]),
    "depthwise": (convolution(stride=2, padding=2, groups=12), [("b", 12, 9, 8), (12, 1, 5, 5)]),
    "grouped": (convolution(padding=1, groups=3), [("b", 12, 8, 8), (9, 4, 3, 3)]),
    "one pixel": (convolution(), [("b", 40, 1, 1), (12, 40, 1, 1)]),
    "tokens": (LAYER, [("b", 65, 48), (40, 48)]),
    "odd tokens": (LAYER, [("b", 33, 19), (37, 19)]),
    "samples": (LAYER, [("b", 48), (37, 48)]),
    "odd samples": (LAYER, [("b", 35), (37, 35)]),
    "product": (PRODUCT, [("b", 13, 20), (20, 37)]),
    "open rows": (PRODUCT, [("b", 20), (20, 37)]),
    "batched product": (PRODUCT, [("b", 3, 13, 20), ("b", 3, 20, 17)]),
    "attention scores": (
        (
            lambda emit, x, y: emit(op.matmul(x, emit(op.permute_dims(y, [0, 1, 3, 2])))),
            lambda x, y: x @ y.transpose(2, 3),
        ),
        [("b", 3, 17, 20), ("b", 3, 17, 20)],
    ),
    "weight gradient": (
        (
            lambda emit, x, y: emit(op.matmul(emit(op.permute_dims(x)), y)),
            lambda x, y: x.T @ y,
        ),
        [("b", 20), ("b", 37)],
    ),
    "softmax": (
        (lambda emit, x: emit(op.nn.softmax(x)), lambda x: x.softmax(-1)),
        [("b", 5, 37)],
    ),
    "layer norm": (
        (
            lambda emit, x, scale, shift: emit(op.nn.layer_norm(x, scale, shift, axes=[-1])),
            lambda x, scale, shift: functional.layer_norm(x, (37,), scale, shift),
        ),
        [("b", 5, 37), (37,), (37,)],
    ),
    "max pool": (
        (
            lambda emit, x: emit(op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1))),
            lambda x: functional.max_pool2d(x, 3, 2, 1),
        ),
        [("b", 5, 17, 16)],
    ),
    "mean": (
        (lambda emit, x: emit(op.mean(x, [2, 3], True)), lambda x: x.mean((2, 3), True)),
        [("b", 5, 7, 9)],
    ),
    "sum over samples": ((lambda emit, x: emit(op.sum(x, [0])), lambda x: x.sum(0)), [("b", 37)]),
    "bias gradient": (
        (lambda emit, x: emit(op.sum(x, [0, 2, 3])), lambda x: x.sum((0, 2, 3))),
        [("b", 6, 5, 4)],
    ),
    "transposed convolution": (
        (
            lambda emit, x, weight: emit(
                op.nn.conv2d_transpose(x, weight, strides=2, padding=1, output_padding=1)
            ),
            lambda x, weight: functional.conv_transpose2d(x, weight, None, 2, 1, 1),
        ),
        [("b", 6, 5, 4), (6, 9, 3, 3)],
    ),
}


# The processor that runs the test; and for a case of each rule, one with the narrowest vectors.
NARROW = {"kind": "llvm"}
NARROW_CASES = ("odd convolution", "depthwise", "odd tokens", "odd samples", "layer norm")


@pytest.mark.parametrize(
    ("name", "facts"),
    [*((name, HOST) for name in CASES), *((name, NARROW) for name in NARROW_CASES)],
)
def test_computes_what_torch_does(name: str, facts: dict[str, Any]) -> None:
    (write, reference), shapes = CASES[name]
    target = tvm.target.Target(facts)
    call = run(schedule_cpu(network(write, shapes), target), target)
    torch.manual_seed(0)
    for batch in BATCHES:
        inputs = [torch.randn([batch if n == "b" else int(n) for n in shape]) for shape in shapes]
        expected = reference(*inputs).numpy()
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(call(*inputs), expected, rtol=1e-5, atol=1e-5)


RULE_OF = {
    "one-by-one": panels,
    "odd convolution": panels,
    "tokens": panels,
    "batched product": panels,
    "one pixel": dots,
    "samples": dots,
    "depthwise": reduction,
    "mean": reduction,
}


@pytest.mark.parametrize("name", RULE_OF)
def test_each_product_finds_its_rule(name: str) -> None:
    (write, _), shapes = CASES[name]
    found = []
    for function in functions(fold_moves(network(write, shapes))):
        for stage in inline(read_stages(function), function.params):
            if stage.reduced:
                sink = Sink(stage, None)
                found.append(next(rule for rule in RULES if rule(stage, sink, WIDE) is not None))
    assert found == [RULE_OF[name]]


def test_threads_and_vectors_are_used_for_what_no_product_is() -> None:
    module = network(lambda emit, x: emit(op.nn.gelu(x)), [("b", 96, 64)])
    (function,) = functions(module)
    kinds: set[int] = set()
    structural_walk(
        schedule(function, WIDE).body, [(tirx.For, lambda loop: kinds.add(int(loop.kind)))]
    )
    assert {ForKind.PARALLEL, ForKind.VECTORIZED} <= kinds
    stage = inline(read_stages(function), function.params)[0]
    assert elementwise(stage, Sink(stage, None), WIDE) is not None


def test_a_transposed_weight_is_read_where_it_lies() -> None:
    module = network(layer, [("b", 65, 48), (40, 48)])
    before, after = functions(module), functions(fold_moves(module))
    assert len(after) == len(before) - 1
    (product,) = (
        matrices
        for function in after
        for stage in inline(read_stages(function), function.params)
        if (matrices := read_matrices(stage)) is not None
    )
    assert [int(n) for n in product.column_load.source.shape] == [40, 48]
    turned = turn(product, WIDE)
    assert turned.turned
    assert turned.width == 65


def test_a_transposition_that_others_read_stays() -> None:
    def write(emit: Write, x: Any, weight: Any) -> Any:
        turned = emit(op.permute_dims(weight))
        return emit(relax.Tuple([emit(op.matmul(x, turned)), turned]))

    module = network(write, [("b", 48), (40, 48)])
    assert len(functions(fold_moves(module))) == len(functions(module))


EDGES = [
    -np.inf,
    -110,
    -88,
    -87,
    -9,
    -4,
    -1e-6,
    -0.0,
    0.0,
    1e-6,
    4,
    9,
    88,
    88.7,
    89,
    np.inf,
    np.nan,
]


@pytest.mark.parametrize("name", ["exp", "erf", "tanh", "sigmoid"])
def test_functions_in_vectors_agree_with_torch(name: str) -> None:
    values = np.concatenate([np.linspace(-90, 90, 2001), np.linspace(-6, 6, 2001), EDGES])
    x = torch.from_numpy(values.astype(np.float32))
    module = network(lambda emit, x: emit(getattr(op, name)(x)), [(len(x),)])
    target = tvm.target.Target(HOST)
    expected = getattr(torch, name)(x).numpy()
    with np.errstate(all="ignore"):
        actual = run(schedule_cpu(module, target), target)(x)
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-37)


SUM_AND_ROOT = """
# from tvm.script import tirx as T
@T.prim_func(s_tir=True)
def written(x: T.Buffer((4, 40)), total: T.Buffer((4,)), root: T.Buffer((4,))):
    for row, at in T.grid(4, 40):
        with T.sblock("total"):
            v_row, v_at = T.axis.remap("SR", [row, at])
            with T.init():
                total[v_row] = T.float32(0)
            total[v_row] = total[v_row] + x[v_row, v_at]
    for row in range(4):
        with T.sblock("root"):
            v_row = T.axis.remap("S", [row])
            root[v_row] = T.sqrt(total[v_row])
"""
RUNNING_SUM = """
# from tvm.script import tirx as T
@T.prim_func(s_tir=True)
def written(x: T.Buffer((40,)), total: T.Buffer((40,))):
    for at in range(40):
        with T.sblock("total"):
            v_at = T.axis.opaque(40, at)
            total[v_at] = x[v_at] + T.if_then_else(v_at > 0, total[v_at - 1], T.float32(0))
"""


def run_written(text: str, *arrays: np.ndarray[Any, Any]) -> tuple[Any, Any, list[Any]]:
    """A function before and after its schedule, and its arguments once it has run."""
    function = tvm.script.from_source(text).with_attr("global_symbol", "written")
    scheduled = schedule(function, WIDE)
    module = tvm.compile(tvm.IRModule({"written": scheduled}), target=tvm.target.Target(HOST))
    arguments = [tvm.runtime.tensor(array) for array in arrays]
    module["written"](*arguments)
    return function, scheduled, [argument.numpy() for argument in arguments]


def test_a_sum_that_is_also_a_result_is_stored() -> None:
    x = np.arange(160, dtype=np.float32).reshape(4, 40)
    empty = np.zeros(4, np.float32)
    function, scheduled, (_, total, root) = run_written(SUM_AND_ROOT, x, empty, empty)
    assert not structural_equal(function, scheduled)
    np.testing.assert_allclose(total, x.sum(1), rtol=1e-6)
    np.testing.assert_allclose(root, np.sqrt(x.sum(1)), rtol=1e-6)


def test_what_is_not_regular_is_left_alone() -> None:
    x = np.arange(40, dtype=np.float32)
    function, scheduled, (_, total) = run_written(RUNNING_SUM, x, np.zeros_like(x))
    assert structural_equal(function, scheduled)
    np.testing.assert_allclose(total, x.cumsum())


def test_a_reshape_stays_one() -> None:
    module = network(lambda emit, x: emit(op.reshape(x, (6, 4))), [(8, 3)])
    (function,) = functions(module)
    assert schedule(function, WIDE).same_as(function)


def test_the_pass_is_for_processors() -> None:
    assert vars(schedule_cpu)["kinds"] == ("llvm",)
