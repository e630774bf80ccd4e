"""Files that lowering to TVM writes, for this machine and for another."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from functools import cache

import pytest
from networks import ConvNet, pruned

from pbc import compiler
from pbc.errors import PbcError
from pbc.ir.program import Program
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import CHECK, Lower
from pbc.target import Target, load_target
from pbc.targets.tvm.build import platform_of
from pbc.targets.tvm.lowering import CALLS, TvmLowering
from pbc.testing import with_request
from pbc.training_graph.step_check import TOLERANCE

AARCH64, X86_64 = 183, 62


@cache
def lowered() -> Program:
    program = with_request(
        pruned(ConvNet, levels=1), engine="tvm", target=load_target("raspberry-pi-4b")
    )
    return Lower()(DeriveTrainStep()(FoldBatchNorm()(program)))


def test_the_files_of_a_bundle() -> None:
    program = lowered()
    assert sorted(program.artifacts) == [
        "tvm/body-0.so",
        "tvm/body-1.so",
        "tvm/calls.json",
        "tvm/level-0.safetensors",
        "tvm/level-1.safetensors",
        "tvm/prefix-0.so",
        "tvm/prefix-1.so",
    ]
    # The bodies are alike; the prefixes are not.
    assert program.artifacts["tvm/body-0.so"] == program.artifacts["tvm/body-1.so"]
    assert program.artifacts["tvm/prefix-0.so"] != program.artifacts["tvm/prefix-1.so"]


def test_what_the_manifest_says() -> None:
    manifest, _ = compiler.package(lowered())
    assert manifest["requires"]["tvm"] == ">=0.27,<0.28"
    assert manifest["graphs"]["update/1/adam"] == "tvm/body-1.so"
    assert manifest["weights"]["prefix/0"] == ["tvm/level-0.safetensors"]
    assert manifest["weights"]["update/0/sgd"] == []
    assert manifest["calls"] == CALLS
    calls = json.loads(lowered().artifacts[CALLS])
    assert calls["machine"] == "aarch64"
    update = calls["graphs"]["update/0/sgd"]
    assert update["function"] == "update_sgd"
    assert {"fc.weight", "momentum/fc.weight", "learning_rate"} <= set(update["inputs"])
    assert set(update["outputs"]) >= {"new/fc.weight", "new/momentum/fc.weight"}


def test_libraries_are_for_the_board_and_its_c_library() -> None:
    for file in ("tvm/prefix-0.so", "tvm/body-0.so"):
        content = lowered().artifacts[file]
        assert content[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", content, 18) == (AARCH64,)
        wanted = [tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_([\d.]+)", content)]
        assert max(wanted, default=(0,)) <= (2, 28)


def test_the_lowered_step_is_checked_on_the_host_s_build() -> None:
    errors = lowered().checks[CHECK]
    assert list(errors) == ["0"]  # level 1's is the same
    assert set(errors["0"]) == {"adam", "adamw", "sgd"}
    assert max(errors["0"].values()) <= TOLERANCE


def test_latency_is_measured_of_a_level_and_of_a_trial() -> None:
    program = lowered()
    trial = replace(program.levels[0], forward=None, updates={})
    text = program.text()
    measured = TvmLowering().latency_ms(program, [program.levels[1], trial])
    assert len(measured) == 2
    assert all(0 < latency < float("inf") for latency in measured)
    assert program.text() == text


def test_what_is_known_of_a_board_decides_the_code() -> None:
    tx2 = platform_of(load_target("jetson-tx2"))
    assert tx2.facts["mcpu"] == "cortex-a57"
    assert tx2.linked == "aarch64-linux-gnu.2.27"
    assert tx2.flags() == []
    assert "avx2" in platform_of(load_target("generic-x86-64")).flags()


def test_a_board_without_glibc_is_refused() -> None:
    with pytest.raises(PbcError, match=r"cannot link for android-arm64 .*compile with another"):
        platform_of(load_target("android-arm64"))
    unknown = Target("odd", "", "any", "tvm", ("tvm",))
    with pytest.raises(PbcError, match="target odd does not say what its CPU is"):
        platform_of(unknown)
