"""The CPU schedule: each rule computes what torch does, on odd sizes and for every batch."""

from __future__ import annotations

import re
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

from pbc.targets.tvm.cpu.depthwise import depthwise, read_maps  # noqa: E402
from pbc.targets.tvm.cpu.dots import dots  # noqa: E402
from pbc.targets.tvm.cpu.loops import Processor, Sink  # noqa: E402
from pbc.targets.tvm.cpu.matrices import read_matrices, turn, widen  # noqa: E402
from pbc.targets.tvm.cpu.moves import fold_moves  # noqa: E402
from pbc.targets.tvm.cpu.pads import pads, read_padding  # noqa: E402
from pbc.targets.tvm.cpu.panels import panels  # noqa: E402
from pbc.targets.tvm.cpu.schedule import RULES, ScheduleCpu, schedule, schedule_cpu  # noqa: E402
from pbc.targets.tvm.cpu.simple import elementwise, reduction  # noqa: E402
from pbc.targets.tvm.cpu.stages import inline, read_stages, unfused  # noqa: E402

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
        groups, dilation = options.get("groups", 1), options.get("dilation", 1)
        product = op.nn.conv2d(
            x, weight, strides=strides, padding=padding, dilation=dilation, groups=groups
        )
        return emit(op.nn.relu(emit(product)))

    return write, lambda x, weight: functional.relu(functional.conv2d(x, weight, **options))


def heads_joined(emit: Write, x: Any, weight: Any) -> Any:
    images, heads, tokens, size = x.ty.shape.values
    joined = emit(
        op.reshape(emit(op.permute_dims(x, [0, 2, 1, 3])), (images, tokens, heads * size))
    )
    return layer(emit, joined, weight)


def samples_transposed(emit: Write, x: Any, weight: Any) -> Any:
    """As gradients have it: the batch last, by a transposition and a reshape."""
    images, channels = x.ty.shape.values[:2]
    transposed = emit(op.reshape(emit(op.permute_dims(x, [1, 0, 2, 3])), (channels, images)))
    return emit(op.matmul(weight, transposed))


def images_joined(emit: Write, x: Any, weight: Any) -> Any:
    """As gradients of convolutions have it: the pixels of all images in a row."""
    images, channels, pixels = x.ty.shape.values
    transposed = emit(op.permute_dims(x, [1, 0, 2]))
    return emit(op.matmul(weight, emit(op.reshape(transposed, (channels, images * pixels)))))


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
    "depthwise, every pixel": (
        convolution(padding=1, groups=5),
        [("b", 5, 7, 9), (5, 1, 3, 3)],
    ),
    "depthwise, no border": (convolution(stride=2, groups=6), [("b", 6, 8, 11), (6, 1, 3, 3)]),
    "depthwise, dilated": (
        convolution(padding=2, dilation=2, groups=6),
        [("b", 6, 8, 7), (6, 1, 3, 3)],
    ),
    "depthwise, uneven": (
        convolution(stride=(1, 2), padding=(0, 1), groups=6),
        [("b", 6, 8, 7), (6, 1, 2, 3)],
    ),
    "depthwise, large": (convolution(padding=2, groups=2), [("b", 2, 70, 61), (2, 1, 5, 5)]),
    "depthwise, large steps": (
        convolution(stride=2, padding=1, groups=2),
        [("b", 2, 99, 93), (2, 1, 3, 3)],
    ),
    "small maps": (convolution(), [("b", 24, 4, 4), (40, 24, 1, 1)]),
    "small odd maps": (convolution(padding=1), [("b", 6, 3, 3), (20, 6, 3, 3)]),
    "grouped": (convolution(padding=1, groups=3), [("b", 12, 8, 8), (9, 4, 3, 3)]),
    "one pixel": (convolution(), [("b", 40, 1, 1), (12, 40, 1, 1)]),
    "tokens": (LAYER, [("b", 65, 80), (40, 80)]),
    "few tokens": (LAYER, [("b", 9, 80), (40, 80)]),
    "heads joined": (
        (
            heads_joined,
            lambda x, weight: functional.gelu(x.transpose(1, 2).flatten(2) @ weight.T),
        ),
        [("b", 5, 33, 16), (40, 80)],
    ),
    "samples transposed": (
        (samples_transposed, lambda x, weight: weight @ x.flatten(1).T),
        [("b", 24, 1, 1), (40, 24)],
    ),
    "open columns": (PRODUCT, [(13, 20), (20, "b")]),
    "many open columns": (
        (images_joined, lambda x, weight: weight @ x.transpose(0, 1).flatten(1)),
        [("b", 20, 16), (13, 20)],
    ),
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
    "pad": (
        (
            lambda emit, x: emit(op.nn.pad(emit(op.nn.relu(x)), (0, 0, 1, 0, 2, 1, 3, 19))),
            lambda x: functional.pad(x.relu(), (3, 19, 2, 1, 1, 0)),
        ),
        [("b", 3, 5, 18)],
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
NARROW_CASES = (
    "odd convolution",
    "depthwise",
    "depthwise, large",
    "many open columns",
    "odd tokens",
    "odd samples",
    "layer norm",
)


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
        inputs = [torch.randn(_sizes(shape, batch)) for shape in shapes]
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
    "depthwise": depthwise,
    "depthwise, no border": depthwise,
    "heads joined": panels,
    "many open columns": panels,
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
    module = network(lambda emit, x: emit(op.nn.gelu(x)), [("b", 96, 640)])
    (function,) = functions(module)
    kinds: set[int] = set()
    structural_walk(
        schedule(function, WIDE).body, [(tirx.For, lambda loop: kinds.add(int(loop.kind)))]
    )
    assert {ForKind.PARALLEL, ForKind.VECTORIZED} <= kinds
    stage = inline(read_stages(function), function.params)[0]
    assert elementwise(stage, Sink(stage, None), WIDE) is not None


@pytest.mark.parametrize(("case", "is_transposed"), [("tokens", False), ("few tokens", True)])
def test_a_transposed_weight_is_read_where_it_lies(case: str, is_transposed: bool) -> None:
    (write, _), shapes = CASES[case]
    module = network(write, shapes)
    before, after = functions(module), functions(fold_moves(module))
    assert len(after) == len(before) - 1
    (product,) = (
        matrices
        for function in after
        for stage in inline(read_stages(function), function.params)
        if (matrices := read_matrices(stage)) is not None
    )
    assert [int(n) for n in product.column_load.source.shape] == [40, 80]
    assert turn(product, WIDE).is_transposed is is_transposed


def test_a_transposition_that_others_read_stays() -> None:
    def write(emit: Write, x: Any, weight: Any) -> Any:
        transposed = emit(op.permute_dims(weight))
        return emit(relax.Tuple([emit(op.matmul(x, transposed)), transposed]))

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
    assert schedule_cpu.kinds == ("llvm",)


def test_a_rule_that_raises_leaves_the_function_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(stage: Any, sink: Sink, processor: Processor) -> Any:
        if stage.reduced:
            raise ValueError("no such stage")
        return None

    (write, reference), shapes = CASES["odd convolution"]
    target = tvm.target.Target(HOST)
    module = network(write, shapes)
    (name,) = (v for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc))
    with caplog.at_level("DEBUG", logger="pbc"):
        scheduled = ScheduleCpu(rules=(broken, *RULES))(module, target)
    assert structural_equal(scheduled[name], module[name])
    assert (
        f"schedule-cpu leaves {name.name_hint} as it is: ValueError('no such stage')" in caplog.text
    )
    inputs = [torch.randn(_sizes(shape, 2)) for shape in shapes]
    actual = run(scheduled, target)(*inputs)
    np.testing.assert_allclose(actual, reference(*inputs).numpy(), rtol=1e-5, atol=1e-5)


def stages_of(case: str) -> list[Any]:
    (write, _), shapes = CASES[case]
    return [
        unfused(stage)
        for function in functions(fold_moves(network(write, shapes)))
        for stage in inline(read_stages(function), function.params)
    ]


def test_a_padding_knows_its_bounds() -> None:
    padding = next(found for stage in stages_of("pad") if (found := read_padding(stage)))
    assert padding.bounds == (None, (1, 4), (2, 7), (3, 21))
    assert pads(padding.stage, Sink(padding.stage, None), WIDE) is not None
    assert all(read_padding(stage) is None for stage in stages_of("mean"))


def test_a_depthwise_convolution_knows_its_steps() -> None:
    maps = next(found for stage in stages_of("depthwise, uneven") if (found := read_maps(stage)))
    assert (maps.down.stride, maps.down.kernel, maps.down.reach(7)) == (1, 2, 8)
    assert (maps.across.stride, maps.across.kernel, maps.across.phases) == (2, 3, 2)
    assert maps.across.tap(1) == (1, 0)
    assert maps.across.tap(2) == (0, 1)
    assert all(read_maps(stage) is None for stage in stages_of("grouped"))


def test_a_depthwise_convolution_copies_its_border_itself() -> None:
    (write, _), shapes = CASES["depthwise"]
    (function,) = functions(network(write, shapes))
    scheduled = schedule(function, WIDE)
    names: list[str] = []
    structural_walk(
        scheduled.body, [(tirx.AllocBuffer, lambda found: names.append(found.buffer.name))]
    )
    assert "scratch" in names
    assert "pad_temp" not in names


@pytest.mark.parametrize(("case", "images"), [("small maps", True), ("one-by-one", False)])
def test_small_maps_of_all_images_lie_side_by_side(case: str, images: bool) -> None:
    stage, matrices = next(
        (stage, found) for stage in stages_of(case) if (found := read_matrices(stage))
    )
    assert isinstance(widen(stage, matrices, WIDE).width, int) is not images


def test_what_was_never_fused_is_not_divided() -> None:
    product = next(stage for stage in stages_of("samples transposed") if stage.reduced)
    assert "//" not in str(product.value)
    assert "%" not in str(product.value)


@pytest.mark.parametrize(
    ("write", "shapes"),
    [
        (convolution()[0], [("b", 256, 8, 8), (40, 256, 1, 1)]),
        (convolution(padding=1)[0], [("b", 64, 8, 8), (40, 64, 3, 3)]),
        (layer, [("b", 65, 512), (40, 512)]),
        (layer, [("b", 9, 512), (40, 512)]),
        (layer, [("b", 512), (40, 512)]),
    ],
)
def test_accumulators_stay_in_registers(write: Write, shapes: list[Sequence[Size]]) -> None:
    # In a module with another function LLVM has no proof that nothing else reads their memory.
    module = fold_moves(network(write, shapes))
    other = network(lambda emit, x: emit(op.nn.relu(x)), [(8, 8)])
    written = {
        f"written_{at}": schedule(function, WIDE).with_attr("global_symbol", f"written_{at}")
        for at, function in enumerate([*functions(module), *functions(other)])
    }
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v4"})
    assembly = compiled(tvm.IRModule(written), target)
    blocks = re.split(r"^\S+:|^\s+j\w+\s.*$", assembly, flags=re.MULTILINE)
    loops = [block for block in blocks if block.count("vfmadd") >= 8]
    assert loops
    assert not any(re.search(r"vmov\w+\s+%zmm\d+, .*\(", block) for block in loops)


def compiled(module: Any, target: Any) -> str:
    return str(tvm.compile(module, target=target).mod.inspect_source("s"))


@pytest.mark.parametrize("case", ["odd convolution", "depthwise", "tokens", "samples"])
def test_arm_gets_its_vectors(case: str) -> None:
    board = tvm.target.Target(
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76", "mattr": ["+neon"]}
    )
    (write, _), shapes = CASES[case]
    function = functions(fold_moves(network(write, shapes)))[0]
    scheduled = schedule(function, Processor.of(board)).with_attr("global_symbol", "written")
    assembly = compiled(tvm.IRModule({"written": scheduled}), board)
    assert re.search(r"fmla\s+v\d+\.4s", assembly)
