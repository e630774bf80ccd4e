"""Schedules for GPUs, without one: their loops run in turn on the host and compute the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pbc import plugins
from pbc.util import progress

tvm = pytest.importorskip("tvm")
relax = pytest.importorskip("tvm.relax")
gpu = pytest.importorskip("pbc.targets.tvm.cuda.schedule")
tvm_schedules = pytest.importorskip("pbc.targets.tvm.schedule_attributes")
functions = tvm_schedules.functions
in_turn = pytest.importorskip("gpu_schedules").in_turn

BATCH = 3  # what runs where the module leaves the number of images open
LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 * 1024}
TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_62", **LIMITS}, host={"kind": "llvm"})

Build = Callable[..., Any]


def fused(build: Build, *shapes: tuple[int | str, ...]) -> Any:
    """A few operators as relax leaves them before functions get their schedules."""
    builder = relax.BlockBuilder()
    rows = tvm.tirx.Var("rows", "int64")
    sizes = [[rows if size == "rows" else size for size in shape] for shape in shapes]
    arguments = [
        relax.Var(f"argument_{index}", relax.TensorType(shape, "float32"))
        for index, shape in enumerate(sizes)
    ]
    with builder.function("main", arguments):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(build(*arguments)))
        builder.emit_func_output(out)
    return tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    )(builder.get())


def convolution(x: Any, weight: Any, bias: Any) -> Any:
    return relax.op.nn.relu(relax.op.nn.conv2d(x, weight, padding=1) + bias)


def depthwise(x: Any, weight: Any) -> Any:
    return relax.op.nn.conv2d(x, weight, padding=1, strides=2, groups=8)


def excitation(x: Any, weight: Any, image: Any) -> Any:
    return relax.op.sigmoid(relax.op.nn.conv2d(x, weight)) * image


def product(x: Any, weight: Any) -> Any:
    return relax.op.matmul(x, weight)


def mean(x: Any) -> Any:
    return relax.op.mean(x, axis=[2, 3])


def softmax(x: Any) -> Any:
    return relax.op.nn.softmax(x)


def transposed(x: Any) -> Any:
    return relax.op.permute_dims(x, [1, 0])


CASES: dict[str, tuple[str, Build, tuple[tuple[int | str, ...], ...]]] = {
    "convolution": (
        "Matmul",
        convolution,
        (("rows", 5, 7, 7), (12, 5, 3, 3), (1, 12, 1, 1)),
    ),
    "depthwise": ("Fallback", depthwise, (("rows", 8, 9, 9), (8, 1, 3, 3))),
    "excitation": (
        "Fallback",
        excitation,
        (("rows", 6, 1, 1), (20, 6, 1, 1), ("rows", 20, 5, 5)),
    ),
    "product": ("Matmul", product, (("rows", 33), (33, 18))),
    "one row": ("Reduction", product, ((1, 64), (64, 96))),
    "mean": ("Reduction", mean, (("rows", 9, 6, 6),)),
    "softmax": ("GeneralReduction", softmax, (("rows", 40),)),
    "transposed": ("Transpose", transposed, ((48, 36),)),
}


def computed(function: Any) -> list[np.ndarray]:
    """The function's arguments after it ran on the host, from the same random numbers each time."""
    random = np.random.default_rng(0)
    values = [
        random.standard_normal(
            [int(size) if isinstance(size, tvm.tirx.IntImm) else BATCH for size in argument.shape]
        ).astype(np.float32)
        for argument in function.params
    ]
    tensors = [tvm.runtime.tensor(value.copy()) for value in values]
    named = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    tvm.compile(named, target=tvm.target.Target("llvm"))["main"](*tensors)
    results = [tensor.numpy().copy() for tensor in tensors]
    assert not np.array_equal(results[-1], values[-1])
    return results


@pytest.mark.parametrize("case", CASES)
def test_a_schedule_computes_what_the_function_did(case: str) -> None:
    rule, build, shapes = CASES[case]
    module = fused(build, *shapes)
    before = module.script()
    scheduled = functions(gpu.schedule_gpu(module, TARGET))
    assert module.script() == before
    assert scheduled.keys() == functions(module).keys()
    assert rule in {function.attrs[tvm_schedules.RULE] for function in scheduled.values()}
    for name, function in functions(module).items():
        assert "threadIdx.x" in scheduled[name].script()
        for found, wanted in zip(
            computed(in_turn(scheduled[name])), computed(function), strict=True
        ):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_rule_that_raises_is_passed_over_and_said() -> None:
    _, build, shapes = CASES["excitation"]
    found = tvm_schedules.refusals(gpu.schedule_gpu(fused(build, *shapes), TARGET))
    ((name, words),) = found.items()
    assert "conv2d" in name
    assert re.fullmatch(
        r"scheduled by Fallback, because of Matmul: .*not properly inlined\.", words
    )
    _, build, shapes = CASES["convolution"]
    assert tvm_schedules.refusals(gpu.schedule_gpu(fused(build, *shapes), TARGET)) == {}


def test_what_is_scheduled_already_stays() -> None:
    _, build, shapes = CASES["product"]
    once = gpu.schedule_gpu(fused(build, *shapes), TARGET)
    assert gpu.schedule_gpu(once, TARGET).script() == once.script()


def test_each_function_is_reported() -> None:
    _, build, shapes = CASES["product"]
    module = fused(build, *shapes)
    told: list[tuple[str, float, str]] = []
    with progress.reporting_to(lambda *words: told.append(words)):
        gpu.schedule_gpu(module, TARGET)
    assert {words[2] for words in told} == functions(module).keys()
    assert told[-1][:2] == ("schedule-gpu", 1.0)


def test_the_pass_is_installed_for_cuda_alone() -> None:
    installed = plugins.load("pbc.tvm_schedules", "schedule-gpu")
    assert installed is gpu.schedule_gpu
    assert installed.kinds == ("cuda",)
