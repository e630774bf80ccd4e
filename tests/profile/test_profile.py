"""`pbc profile`: what it measures, what it compares with, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_net
import pytest
import tiny
import tiny_onnx
from click.testing import CliRunner, Result
from guarded import ALLOWED, FORBIDDEN, imported, third_party

from pbc import cli, compiler
from pbc.bundle import Bundle, write
from pbc.data import InputSpec
from pbc.errors import PbcError, UsageError
from pbc.profile import inputs, measure, memory, processes, turns
from pbc.profile.options import ProfileOptions
from pbc.profile.task import LOADING, PBC, STAGES, TRAINING, Task
from pbc.profile.turns import Side, in_turn
from pbc.util.extras import install

QUICK = ("--rounds", "2", "--threads", "1")


def pbc(*args: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args], prog_name="pbc")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module", autouse=True)
def _one_later_load() -> Iterator[None]:
    """Every load is a process; one shows all that three would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_LATER_LOADS", 1)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that PyTorch can rebuild, for ONNX Runtime, level 0 alone."""
    folder = tmp_path_factory.mktemp("net")
    source = folder / "profiled_net.py"
    source.write_text(bench_net.SOURCE)
    options = compiler.CompileOptions(
        engine="onnxruntime", weights="random", shape=(3, 16, 16), levels=0, batch=bench_net.BATCH
    )
    return compiler.compile(f"{source}:factory", folder / "net.pbc", options).path


@pytest.fixture(scope="module")
def measured(bundle: Path) -> dict[str, Any]:
    """What the command wrote for that bundle, against eager PyTorch, and what it printed."""
    out = bundle.parent / "profile.json"
    result = pbc("profile", bundle, *QUICK, "--against", "torch", "--no-compile", "-o", out)
    assert result.exit_code == 0, result.output
    return {"printed": result.stdout, **json.loads(out.read_text())}


def task(bundle: Path, kind: str, **facts: Any) -> Task:
    digest = Bundle.open(bundle).digest
    known = {"levels": (0,), "batch": 4, "classes": 10, "threads": 1, "rounds": 2}
    return Task(kind, str(bundle), digest, **{**known, "optimizer": "sgd", **facts})


def test_every_side_is_timed_at_every_stage(measured: dict[str, Any]) -> None:
    (run,) = measured["runs"]
    assert list(run["sides"]) == ["level 0", "eager"]
    for side in run["sides"].values():
        assert list(side["prefix"]) == ["4", "8", "16", "32"]
        for times in (*side["prefix"].values(), side["forward"], side["update"], side["step"]):
            assert 0 < times["min"] <= times["median"]
        assert side["step"]["min"] >= side["forward"]["min"] + side["update"]["min"]
    assert "logits" in run["sides"]["level 0"]


def test_ratios_are_those_of_the_least_times(measured: dict[str, Any]) -> None:
    (run,) = measured["runs"]
    ours, torch = run["sides"]["level 0"], run["sides"]["eager"]
    found = run["ratios"]["level 0"]

    def prefix(side: dict[str, Any]) -> float:
        return min(float(times["min"]) for times in side["prefix"].values())

    assert found["prefix"] == pytest.approx(prefix(torch) / prefix(ours))
    assert found["step"] == pytest.approx(torch["step"]["min"] / ours["step"]["min"])
    assert f"{found['total']:.2f}x" in measured["printed"]


def test_level_costs_are_per_sample_and_say_where(measured: dict[str, Any], bundle: Path) -> None:
    (costs,) = measured["level_costs"]
    (run,) = measured["runs"]
    side = run["sides"]["level 0"]
    assert costs["bundle_digest"] == Bundle.open(bundle).digest
    assert (costs["schema"], costs["threads"], costs["batch"]) == (1, 1, 4)
    assert "onnxruntime" in costs["engine_version"]
    (row,) = costs["levels"]
    assert row["update_ms"] == pytest.approx(side["update"]["min"] / 4)
    assert side["prefix"][str(row["chunk"])]["min"] == row["prefix_ms"]


def test_loading_and_memory_are_of_fresh_processes(measured: dict[str, Any]) -> None:
    process = measured["process"]
    for load in (process["first_load"], process["later_load"]):
        parts = ("open_seconds", "engine_seconds", "load_seconds")
        assert load["total_seconds"] == pytest.approx(sum(load[part] for part in parts))
        assert load["peak_rss_bytes"] >= (load["pss_bytes"] or 0) > 0
    trained = process["training"]
    assert list(trained) == ["pbc", "eager"]
    # This process holds torch: were its peak inherited, pbc's would be no smaller.
    assert trained["pbc"]["peak_rss_bytes"] < 0.7 * trained["eager"]["peak_rss_bytes"]
    assert "torch.compile was not tried" in measured["notes"]


@pytest.mark.parametrize(("engine", "kind"), [("onnxruntime", "whole"), ("pytorch", "probe")])
def test_levels_are_compared_with_level_0(tmp_path: Path, engine: str, kind: str) -> None:
    made = tiny_onnx if engine == "onnxruntime" else tiny
    path = made.write(tmp_path / "m.pbc", kind).path
    photos = tiny.photos(tmp_path / "photos", 2)
    result = pbc("profile", path, *QUICK, "--against", "none", "--data", photos, "--levels", "0,2",
                 "--optimizer", "adam", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["protocol"]["classes"] == 3
    (run,) = content["runs"]
    assert list(run["sides"]) == ["level 0", "level 2"]
    assert bool(run["sides"]["level 0"]["prefix"]) == (kind == "probe")
    ratio = run["ratios"]["level 2"]["step"]
    steps = [side["step"]["min"] for side in run["sides"].values()]
    assert ratio == pytest.approx(steps[0] / steps[1])
    assert "level 0" not in run["ratios"]  # there is nothing to compare it with
    assert set(content["process"]["later_load"]["level_ms"]) == {"0", "2"}


def test_pytorch_is_left_out_where_its_network_cannot_be_rebuilt(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "m.pbc").path
    result = pbc("profile", path, *QUICK, "--levels", "0")
    assert result.exit_code == 0, result.output
    assert "note: PyTorch is left out" in result.stdout
    assert "does not say which model" in result.stdout
    asked = pbc("profile", path, *QUICK, "--against", "torch")
    assert asked.exit_code == 1
    assert "does not say which model" in asked.stderr.splitlines()[-1]


def test_pytorch_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    against, notes = measure._against(ProfileOptions())
    assert not against
    assert install("device-torch") in notes[0]
    with pytest.raises(PbcError, match="--against torch needs torch, which is not installed"):
        measure._against(ProfileOptions(against="torch"))


def test_torch_is_compiled_for_every_stage(bundle: Path) -> None:
    torch_stages = pytest.importorskip("pbc.profile.torch_stages")
    opened = Bundle.open(bundle)
    pixels = inputs.noise(InputSpec.from_json(opened.manifest["input"]), 8)
    asked = task(bundle, STAGES, torch=True, compile=True)
    found, notes = torch_stages.sides(asked, opened, pixels, (4,))
    assert notes == []
    assert [side.name for side in found] == ["eager", "torch.compile"]
    eager, compiled = (side.prefix[4]() for side in found)
    for value, other in zip(eager, compiled, strict=True):
        assert value.numpy() == pytest.approx(other.numpy(), abs=1e-4)


def test_the_sides_take_turns_and_warm_ups_do_not_count() -> None:
    calls: list[str] = []

    def side(name: str) -> Side:
        def call(stage: str) -> turns.Call:
            return lambda: calls.append(f"{name} {stage}")

        return Side(name, {2: call("prefix")}, call("forward"), call("update"), call("logits"))

    found = in_turn([side("a"), side("b")], rounds=4)
    prefixes = [call.split()[0] for call in calls if call.endswith("prefix")]
    assert prefixes == ["a", "b", "b", "a"] * (len(prefixes) // 4) + ["a", "b"] * (
        len(prefixes) % 4 // 2
    )
    assert len(prefixes) > 2 * 4
    steps = [call.split()[1] for call in calls if call.startswith("a") and "ate" in call]
    assert steps
    assert all("update" in step for step in steps)
    assert set(found) == {"a", "b"}
    assert list(found["a"]) == ["prefix", "forward", "update", "step", "logits"]


@pytest.mark.parametrize(
    ("step_ms", "turn_count", "steps_a_turn"), [(1.0, 3 + 2, 1 + 3), (2000.0, 1 + 2, 1)]
)
def test_long_steps_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, step_ms: float, turn_count: int, steps_a_turn: int
) -> None:
    calls: list[str] = []

    def timed(call: Any) -> float:
        call()
        return step_ms / 2

    def side(name: str) -> Side:
        def call(stage: str) -> Any:
            return lambda: calls.append(f"{name} {stage}")

        return Side(name, {2: call("prefix")}, call("forward"), call("update"), call("logits"))

    monkeypatch.setattr(turns, "milliseconds", timed)
    found = in_turn([side("a"), side("b")], rounds=2)
    assert found["a"]["step"] == {"min": step_ms, "median": step_ms}
    assert calls.count("a prefix") == calls.count("b prefix") == turn_count
    # Whether a step is long is known after the first turn.
    assert calls.count("a forward") == 4 + (turn_count - 1) * steps_a_turn
    assert calls.count("b logits") == calls.count("b forward") == calls.count("b update")


@pytest.mark.parametrize(
    ("grows_by", "steps"),
    [([100, 50], 5), ([100] * 6, 9), ([100] * 50, memory.MOST_STEPS)],
)
def test_memory_is_measured_until_it_has_settled(
    monkeypatch: pytest.MonkeyPatch, grows_by: list[int], steps: int
) -> None:
    done: list[None] = []
    monkeypatch.setattr(memory, "peak_bytes", lambda: 10 + sum(grows_by[: len(done)]))
    assert memory.until_settled(lambda: done.append(None)) == steps
    assert len(done) == steps


def test_pbc_is_measured_without_the_compiler_or_torch(tmp_path: Path) -> None:
    names = imported("import pbc.profile.worker, pbc.profile.measure, pbc.cli.profile")
    assert third_party(names) <= ALLOWED | {"pbc"}
    path = tiny_onnx.write(tmp_path / "m.pbc").path
    for kind in (STAGES, LOADING, TRAINING):
        facts = json.dumps(task(path, kind, who=PBC).to_json())
        names = imported(
            f"import json; from pbc.profile import task, worker; "
            f"worker._KINDS[{kind!r}](task.Task.from_json(json.loads({facts!r})))",
            forbidden=FORBIDDEN - {"onnxruntime"},
        )
        assert not names & (FORBIDDEN - {"onnxruntime"})


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "m.pbc").path
    for args, words in (
        (["--levels", "0,9"], "--levels has 9;"),
        (["--levels", "one"], "--levels is 'one'; expected whole numbers, like 0,1"),
        (["--threads", "0"], "--threads has 0; each must be at least 1"),
        (["--threads", ","], "--threads is ','; expected whole numbers, like 0,1"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--optimizer", "sdg"], "did you mean 'sgd'?"),
        (["--against", "troch"], "did you mean 'torch'?"),
        (["-o", str(tmp_path / "no" / "p.json")], "does not exist"),
    ):
        result = pbc("profile", path, *args)
        assert result.exit_code == 2, args
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
    with pytest.raises(UsageError, match="--batch is 0"):
        ProfileOptions(batch=0)


def test_errors_of_the_measuring_process_come_back_as_one_line(tmp_path: Path) -> None:
    manifest, files = tiny_onnx.contents()
    del manifest["graphs"]["update/0/adam"]
    path = write(tmp_path / "m.pbc", manifest, files).path
    result = pbc("profile", path, *QUICK, "--against", "none", "--optimizer", "adam")
    assert result.exit_code == 1
    assert "has no graph update/0/adam" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in listed.split()]


def _running(process: int) -> bool:
    """Return whether a process is there and not only waiting for its parent to notice its end."""
    try:
        facts = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return facts.rpartition(")")[2].split()[0] not in "XZ"


def test_ctrl_c_while_a_process_is_started_ends_that_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(start(*args, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    task = Task(STAGES, str(tmp_path), "", (0,), 4, 3, 1, 1, "sgd")
    with pytest.raises(KeyboardInterrupt):
        processes.measured(task, os.environ)
    assert started[0].returncode == -signal.SIGKILL


def test_ctrl_c_ends_it_and_its_processes(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "m.pbc").path
    command = [sys.executable, "-c", "from pbc.cli import main; main()", "profile", str(path),
               "--rounds", "100000000", "--threads", "1", "--against", "none"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any(line.startswith("stages") for line in process.stderr)
        for _ in range(10_000):
            children = _children(process.pid)
            if children:
                break
            time.sleep(0.002)
        assert children
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)  # on a busy machine
        assert process.returncode == 130
        assert errors.strip() == "interrupted: nothing was kept"
    finally:
        process.kill()
    for _ in range(200):
        if not any(_running(child) for child in children):
            break
        time.sleep(0.05)
    assert not any(_running(child) for child in children)
