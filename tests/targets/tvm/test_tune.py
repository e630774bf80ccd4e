"""Tuning keeps what is measured to be faster, goes on where it stopped, and changes no number."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from networks import ConvNet, pruned

pytest.importorskip("tvm")

import tvm

from pbc import cli, compiler
from pbc.bundle.graph_name import PREFIX
from pbc.errors import UsageError
from pbc.ir.program import Program
from pbc.ir.work import TRIALS, clear
from pbc.lower.engine_choice import require_tuning
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import CHECK, TUNING, Lower
from pbc.target import load_target
from pbc.targets.tvm.build import this_machine
from pbc.targets.tvm.cpu.schedule import schedule_cpu
from pbc.targets.tvm.lowering import TvmLowering
from pbc.targets.tvm.tuning.records import Record, Records
from pbc.targets.tvm.tuning.trial import Trials
from pbc.targets.tvm.tuning.tune import WHOLE
from pbc.testing import graph_of, run_passes, with_request
from pbc.util.progress import reporting_to

RECORD = Record("a", {"tile": [4, 2]}, "c0de", 1.0, 2.0)


# ---- records --------------------------------------------------------------------------------


def test_records_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "work" / TRIALS
    Records(file).add(RECORD)
    records = Records(file)
    assert records.find("a", {"tile": [4, 2]}) == RECORD
    assert RECORD.gain == 2.0
    assert records.find("a", {}) is None
    assert records.find("b", {"tile": [4, 2]}) is None
    assert records.damaged == 0


@pytest.mark.parametrize(
    "damage",
    [b'{"key": "a", "sett', b"\xff\xfe", b"[]", b"{}", b'{"key": 1}', b"null"],
)
def test_damaged_records_are_dropped(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / TRIALS
    Records(file).add(RECORD)
    whole = file.read_bytes()
    file.write_bytes(whole + damage)
    records = Records(file)
    assert records.damaged == 1
    assert records.find(RECORD.key, RECORD.settings) == RECORD
    assert file.read_bytes() == whole
    other = {**asdict(RECORD), "seconds": "fast"}
    file.write_bytes(json.dumps(other).encode() + b"\n" + whole)
    assert Records(file).damaged == 1


def test_records_outlive_the_rest_of_the_work(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "align-0.safetensors").touch()
    (work / TRIALS).touch()
    clear(work)
    assert [file.name for file in work.iterdir()] == [TRIALS]
    (work / TRIALS).unlink()
    clear(work)
    assert not work.exists()
    clear(work)


# ---- trials ---------------------------------------------------------------------------------


TEXT = """
# from tvm.script import tirx as T
@T.prim_func(s_tir=True)
def function(x: T.Buffer((T.int64(64),), "float32"), y: T.Buffer((T.int64(64),), "float32")):
    {}
"""
LOOP = """for i in range(T.int64(64)):
        with T.sblock("add"):
            at = T.axis.spatial(T.int64(64), i)
            y[at] = x[at] + T.float32({})"""


def function(body: str) -> str:
    return str(tvm.ir.save_json(tvm.script.from_source(TEXT.format(body))))


def adding(number: float) -> str:
    return function(LOOP.format(number))


def calling(name: str) -> str:
    """A function that calls one of the C library, which takes nothing."""
    return function(f'T.evaluate(T.call_extern("int32", "{name}"))')


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    with Trials(this_machine().facts) as process:
        yield process


TENSORS = [((64,), "float32"), ((64,), "float32")]


def test_a_trial_times_both(trials: Trials) -> None:
    answer = trials.run(adding(1), adding(1), TENSORS, outputs=1)
    assert set(answer) == {"seconds", "baseline"}
    assert 0 < answer["seconds"] < 1
    assert 0 < answer["baseline"] < 1


def test_what_computes_something_else_is_no_candidate(trials: Trials) -> None:
    answer = trials.run(adding(1), adding(1.01), TENSORS, outputs=1)
    assert answer == {"failure": "computes something else"}


def test_a_candidate_that_does_not_build_is_none(trials: Trials) -> None:
    answer = trials.run(adding(1), calling("no_such_function"), TENSORS, outputs=1)
    assert set(answer) == {"failure"}
    assert answer["failure"]


def test_a_crash_ends_one_trial(trials: Trials) -> None:
    answer = trials.run(adding(1), calling("abort"), TENSORS, outputs=1)
    assert answer == {"failure": "crashed (-6)"}
    assert "seconds" in trials.run(adding(1), adding(1), TENSORS, outputs=1)


def test_a_candidate_that_hangs_is_ended(trials: Trials) -> None:
    trials.start()
    process = trials.pid
    answer = trials.run(adding(1), calling("pause"), TENSORS, outputs=1, limit=2.0)
    assert answer == {"failure": "no answer in time"}
    assert process is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


# ---- programs -------------------------------------------------------------------------------


@cache
def derived() -> Program:
    program = with_request(pruned(ConvNet, levels=1), engine="tvm", target=load_target("host"))
    return run_passes(program, FoldBatchNorm(), DeriveTrainStep())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trials of a compilation that was interrupted after a few.

    Each counts as faster, whatever it was: what is built of it must be right all the same.
    """
    folder = tmp_path_factory.mktemp("work")
    program = with_request(derived(), work=folder)
    seen: set[str] = set()

    def stop(stage: str, fraction: float, text: str) -> None:
        if stage == "tune":
            seen.add(text.partition(" trials")[0])
        if len(seen) > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reporting_to(stop):
        Lower(tune=5.0)(program)
    flatter(folder)
    return folder


@pytest.fixture(scope="module")
def lowered(work: Path) -> Program:
    """Made of these trials alone, and of one comparison of the libraries, an honest one."""
    return Lower(tune=0.0)(with_request(derived(), work=work))


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / TRIALS).read_text().splitlines()]


def is_trial(record: Any) -> bool:
    return bool(record["settings"]) and record["settings"] != WHOLE


def flatter(folder: Path) -> None:
    """Let all that was measured, of other code than the rules' own, be twice as fast as that."""
    found = records(folder)
    own = {record["key"]: record["code"] for record in found if not record["settings"]}
    for record in found:
        if (
            record["settings"]
            and not record["failure"]
            and own.get(record["key"]) != record["code"]
        ):
            record["seconds"] = record["baseline"] / 2
    text = "".join(json.dumps(record) + "\n" for record in found)
    (folder / TRIALS).write_text(text)


def test_an_interrupted_search_keeps_its_trials(work: Path) -> None:
    assert sum(is_trial(record) for record in records(work)) >= 2
    assert [path.name for path in work.iterdir()] == [TRIALS]
    assert Records(work / TRIALS).damaged == 0


def test_the_manifest_says_what_was_tuned(lowered: Program) -> None:
    found = compiler.package(lowered)[0]["checks"]["tuning"]
    assert set(found) == {"seconds", "trials", "functions", "faster", "share", "levels"}
    assert found["functions"] > 4
    assert list(found["levels"]) == ["0", "1"]
    for level in found["levels"].values():
        assert 0 < level["after_ms"] <= level["before_ms"]
    assert any("tuned" in note and "functions" in note for note in lowered.notes)
    assert max(lowered.checks[CHECK]["0"].values()) <= 1e-4


def test_what_was_measured_is_used_and_computes_the_same(
    work: Path, lowered: Program, tmp_path: Path
) -> None:
    first = lowered.checks[TUNING]
    assert first["trials"] == 0
    assert first["faster"] >= 1
    shutil.copy(work / TRIALS, tmp_path)
    flatter(tmp_path)  # the libraries too
    kept = records(tmp_path)
    with (tmp_path / TRIALS).open("a") as file:
        file.write('{"key": \n')
    program = with_request(derived(), work=tmp_path)
    fast, plain = TvmLowering(), TvmLowering()
    found = fast.tune(program, 0.0)
    assert records(tmp_path) == kept
    for fact in ("trials", "functions", "faster", "share"):
        assert found[fact] == first[fact]
    assert f"1 damaged line of {TRIALS} was dropped" in found["notes"]
    level = found["levels"]["0"]
    assert level["after_ms"] == pytest.approx(level["before_ms"] / 2, abs=0.01)
    images = np.random.default_rng(0).normal(size=(5, 3, 16, 16)).astype(np.float32)
    mine, others = (
        side.runner(program, program.levels[0]).run(PREFIX, {"x": images}) for side in (fast, plain)
    )
    for name, value in others.items():
        np.testing.assert_allclose(mine[name].numpy(), value.numpy(), rtol=1e-4, atol=1e-5)


def test_each_choice_computes_the_same(trials: Trials) -> None:
    """Of the rules of the CPU schedule, on a convolution."""
    from pbc.targets.tvm.build import legalized, scheduled
    from pbc.targets.tvm.tuning.schedule_search import Use, calls

    where = this_machine()
    lowering = TvmLowering()
    module, _ = lowering.converted(derived(), {"prefix": graph_of(derived(), "prefix/0")})
    tunable = schedule_cpu.tunable
    plain = scheduled(module, where)
    prepared = tunable.prepare(legalized(module, where))
    called = {call.function: call for call in calls(prepared, {"prefix": Use(1.0, 3, 4)})}
    (name,) = [name for name in called if "conv2d1" in name]
    for knob, values in tunable.choices(where.target).items():
        for value in values[:2]:
            variant = tunable.variant(prepared[name], where.target, {knob: value})
            own, other = (tvm.ir.save_json(function) for function in (plain[name], variant))
            answer = trials.run(own, other, called[name].arguments, 1)
            assert "seconds" in answer, (knob, value, answer)


# ---- refusals -------------------------------------------------------------------------------


def test_a_board_is_not_tuned_for_here() -> None:
    with pytest.raises(UsageError, match=r"--tune measures on this machine.*raspberry-pi-5"):
        require_tuning(load_target("raspberry-pi-5"), "tvm")
    require_tuning(load_target("host"), "tvm")


def test_an_engine_without_code_of_its_own_is_refused() -> None:
    for engine in ("pytorch", "onnxruntime"):
        with pytest.raises(UsageError, match=f"nothing for engine '{engine}'.*: tvm$"):
            require_tuning(load_target("host"), engine)


def test_the_command_refuses_before_it_loads_the_model(tmp_path: Path) -> None:
    for options, words in (
        (["--engine", "pytorch", "--tune", "1"], "engines with code to tune: tvm"),
        (["--engine", "tvm", "--target", "jetson-tx2", "--tune", "1"], "--target host"),
        (["--engine", "tvm", "--tune", "-1"], "--tune"),
    ):
        command = ["compile", "no/such/model.py:factory", *options, "-o", str(tmp_path / "m.pbc")]
        result = CliRunner().invoke(cli.main, command)
        assert result.exit_code == 2, result.output
        assert words in result.output
        assert not list(tmp_path.iterdir())
