"""Schedules for a GPU compute a whole training step: on the host, their threads in turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from networks import ConvNet, split

from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import CHECK, Lower
from pbc.target import load_target
from pbc.testing import run_passes, with_request
from pbc.training_graph.step_check import TOLERANCE

tvm = pytest.importorskip("tvm")
tvm_build = pytest.importorskip("pbc.targets.tvm.build")
tvm_schedules = pytest.importorskip("pbc.targets.tvm.schedule_attributes")
in_turn = pytest.importorskip("gpu_schedules").in_turn


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Have libraries for this machine built of a GPU's schedules; the rules that gave them."""
    original = tvm_build.scheduled
    found: set[str] = set()

    def scheduled(module: Any, where: Any) -> Any:
        ready = original(module, replace(where, sm=62))
        functions = tvm_schedules.functions(ready)
        found.update(str(function.attrs[tvm_schedules.RULE]) for function in functions.values())
        ready.update(
            tvm.IRModule({ready.get_global_var(n): in_turn(f) for n, f in functions.items()})
        )
        return ready

    monkeypatch.setattr("pbc.targets.tvm.lowering.scheduled", scheduled)
    return found


def test_every_kernel_of_a_step_computes_what_torch_does(rules: set[str]) -> None:
    program = with_request(
        split(ConvNet, "norm"), engine="tvm", target=load_target("generic-x86-64")
    )  # fmt: skip
    program = run_passes(program, FoldBatchNorm(), DeriveTrainStep(), Lower())
    errors = program.checks[CHECK]["0"]
    assert set(errors) == {"adam", "adamw", "sgd"}
    assert max(errors.values()) <= TOLERANCE
    assert {"Matmul", "Reduction", "Fallback"} <= rules
