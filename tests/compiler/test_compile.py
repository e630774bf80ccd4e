"""`pbc compile` and `pbc inspect` on the weights and photos that come with the sources."""

from __future__ import annotations

import errno
import json
import pickle
import pickletools
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from click.testing import CliRunner, Result
from killing import Killed
from networks import ConvNet

from pbc import cli, compiler
from pbc.bundle import Bundle
from pbc.compiler import CompileOptions
from pbc.errors import UsageError
from pbc.ir import pipeline
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.pipeline import PassPipeline
from pbc.ir.program import Program
from pbc.lower.engine_choice import choose_engine
from pbc.proxies import distillation
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.objective import Objective
from pbc.target import load_target
from pbc.testing import graph_of, make_program, rungs
from pbc.util.progress import reporting_to
from pbc.util.sizes import memory_text

MODEL = "mobilenet_v3_large"

ORIGIN = ".m.pbc.origin.json"
"""Where the model came from, beside the bundle."""


def pbc(*args: str | Path | int) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], prog_name="pbc")


def json_of(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def weights(examples: Path) -> Path:
    return examples / "weights" / "mobilenet_v3_large.safetensors"


@pytest.fixture(scope="module")
def few(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fifth of the calibration images: decoding them all takes longer than aligning."""
    folder = tmp_path_factory.mktemp("calibration")
    for photo in sorted((examples / "calibration").iterdir())[::5]:
        shutil.copy(photo, folder)
    return folder


class Run:
    """One compilation through the command line, with the program that it lowered."""

    def __init__(self, result: Result, path: Path, program: Program) -> None:
        self.result, self.path, self.program = result, path, program


@pytest.fixture(scope="module")
def compiled(
    weights: Path, few: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    path = tmp_path_factory.mktemp("compiled") / "m.pbc"
    kept: list[Program] = []
    run = PassPipeline.run

    def keep(self: PassPipeline, program: Program, dump: Path | None = None) -> Program:
        kept.append(run(self, program, dump))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassPipeline, "run", keep)
        result = pbc(
            "compile", MODEL, "--weights", weights, "--target", "host", "--engine", "pytorch",
            "--input", "3x64x64",
            "--levels", "2", "--ladder", "even", "--align-steps", "2", "--calibration", few,
            "--data", examples / "photos" / "train", "-o", path,
            "--dump-ir", path.parent / "ir",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return Run(result, path, kept[-1])


# ---- a whole compilation ---------------------------------------------------------------------


def test_it_says_what_it_did(compiled: Run, examples: Path) -> None:
    output = compiled.result.stdout
    assert "aligned" in output
    assert f"next: pbc train {compiled.path} PHOTOS -o OUT" in output
    manifest = Bundle.open(compiled.path).manifest
    names = sorted(folder.name for folder in (examples / "photos" / "train").iterdir())
    assert (manifest["classes"], manifest["class_count"]) == (names, None)
    assert [row["status"] for row in manifest["levels"]] == ["original", "aligned", "aligned"]
    assert manifest["cost_model"] == "latency"
    assert all(row["latency_ms"] > 0 for row in manifest["levels"])
    assert all(-1 <= row["fidelity"] <= 1 for row in manifest["levels"])
    assert manifest["checks"]["level_0_error"] <= 1e-4
    assert manifest["provenance"]["weights"] == "mobilenet_v3_large.safetensors"
    assert manifest["provenance"]["passes"][0] == "mark-trainable"
    assert manifest["policy"]["view"] == [3, 32, 32]


def test_no_trace_of_the_work_is_left(compiled: Run) -> None:
    assert sorted(path.name for path in compiled.path.parent.iterdir()) == [ORIGIN, "ir", "m.pbc"]
    dumped = sorted(path.name for path in (compiled.path.parent / "ir").iterdir())
    assert dumped[0] == "00-mark-trainable.txt"
    assert dumped[-1].endswith("-lower.txt")
    assert "graph prefix/2 takes" in (compiled.path.parent / "ir" / dumped[-1]).read_text()


def test_the_engine_computes_the_program_at_every_level(compiled: Run) -> None:
    program = compiled.program
    engine = PyTorchEngine().load(Bundle.open(compiled.path))
    parameters = {name: value.numpy() for name, value in program.parameters.items()}
    engine.start(parameters, Objective(learning_rate=0.1))
    images = program.network.example
    for level in range(len(program.levels)):
        logits = engine.logits(level, engine.prefix(level, images.numpy()))
        with torch.no_grad():
            expected = program.logits(level, images).numpy()
        # The program's graphs are in float32 always.
        rounded = rungs(program).precision(level) != "float32"
        tolerance = 0.05 if rounded else 1e-4
        assert np.abs(logits - expected).max() <= tolerance * max(1, np.abs(expected).max()), level


def test_inspect_shows_everything(compiled: Run) -> None:
    result = pbc("inspect", compiled.path)
    assert result.exit_code == 0, result.output
    for words in (
        "mobilenet_v3_large (weights: mobilenet_v3_large.safetensors)",
        "3x64x64",
        "linear-probe: 12,810 trainable values in 2 tensors",
        "host (engine pytorch)",
        "cost (latency)",
        "policy: predicts fidelity from 32x32 views",
        "weights/level-0.safetensors",
    ):
        assert words in result.stdout
    manifest = json_of(pbc("inspect", compiled.path, "--json"))
    assert manifest == Bundle.open(compiled.path).manifest


def test_inspect_shows_dimensions_with_reasons(compiled: Run) -> None:
    result = pbc("inspect", compiled.path, "--dims")
    assert "29 of 30 dimensions are trainable-independent; they scale" in result.stdout
    assert "classifier.3.weight is trained" in result.stdout
    table = json_of(pbc("inspect", compiled.path, "--dims", "--json"))
    assert len(table["dimensions"]) == 30
    (fixed,) = [row for row in table["dimensions"] if not row["independent"]]
    assert fixed["reason"] == "classifier.3.weight is trained"


def test_inspect_refuses_a_damaged_bundle(compiled: Run, tmp_path: Path) -> None:
    data = bytearray(compiled.path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.pbc").write_bytes(data)
    result = pbc("inspect", tmp_path / "m.pbc")
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_nothing_in_a_bundle_is_a_pickle_and_loading_one_runs_none(
    compiled: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(compiled.path) as archive:
        for name in archive.namelist():
            assert name.endswith((".json", ".safetensors")), name
            data = archive.read(name)
            (json.loads if name.endswith(".json") else safetensors.numpy.load)(data)
            with pytest.raises(ValueError):  # noqa: PT011, the words are Python's
                list(pickletools.genops(data))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.export, "load", refuse)
    monkeypatch.setattr("torch.serialization.load", refuse)
    opened = Bundle.open(compiled.path)
    opened.verify()
    engine = PyTorchEngine().load(opened)
    engine.start({n: p.numpy() for n, p in compiled.program.parameters.items()}, Objective())
    images = np.zeros((1, 3, 64, 64), np.float32)
    for level in (0, 1, 2):
        engine.logits(level, engine.prefix(level, images))
    assert engine.policy(np.zeros((1, 3, 32, 32), np.float32)).shape == (1, 2)


# ---- one option at a time --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def custom(examples: Path) -> list[str | Path]:
    """The small model of the examples, which compiles in a moment."""
    return [
        "compile", f"{examples / 'custom_model.py'}:factory", "--weights", "random",
        "--input", "3x32x32", "--target", "generic-arm64", "--engine", "pytorch",
    ]  # fmt: skip


def test_a_dry_run_plans_and_writes_nothing(here: Path, custom: list[str | Path]) -> None:
    result = pbc(*custom, "--levels", "3", "--dry-run")
    assert result.exit_code == 0, result.output
    for words in (
        "passes: mark-trainable, ",
        "engine: pytorch",
        "level 3: ",
        "nothing was tried or written",
    ):
        assert words in result.stdout
    plan = json_of(pbc(*custom, "--levels", "3", "--dry-run", "--json"))
    costs = [row["cost"] for row in plan["levels"]]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) == 4
    sizes = [plan["file_bytes"][f"level {level}"] for level in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    assert list(here.iterdir()) == []


def test_the_plan_is_what_is_built(here: Path, custom: list[str | Path]) -> None:
    plan = json_of(pbc(*custom, "--levels", "2", "--dry-run", "--json"))
    manifest = json_of(pbc(*custom, "--levels", "2", "--json"))
    assert manifest["levels"] == plan["levels"]
    assert manifest["provenance"]["passes"] == plan["passes"]
    assert sorted(path.name for path in here.iterdir()) == [
        ".factory.pbc.origin.json",
        "factory.pbc",
    ]


def test_a_dry_run_foretells_the_memory_of_training(here: Path, custom: list[str | Path]) -> None:
    chosen = [*custom[:-1], "onnxruntime", "--levels", "0", "--strategy", "last-k:1"]
    foretold = json_of(pbc(*chosen, "--dry-run", "--json"))["memory"]
    assert sorted(foretold) == ["adam", "adamw", "sgd"]
    recorded = json_of(pbc(*chosen, "--json"))["memory"]
    for optimizer, expected in foretold.items():
        found = dict(recorded[optimizer])
        # What onnxruntime made of the graphs decides no more than what it works in.
        assert found.pop("peak_bytes") == pytest.approx(expected.pop("peak_bytes"), rel=0.25)
        del found["workspace_bytes"], expected["workspace_bytes"]
        assert found == expected
    words = " ".join(pbc("inspect", "factory.pbc").stdout.split())
    assert f"sgd {memory_text(recorded['sgd']['peak_bytes'])} at the peak (parameters" in words
    assert json_of(pbc(*custom, "--levels", "0", "--dry-run", "--json"))["memory"] is None


def test_without_calibration_levels_are_unaligned_and_it_says_so(
    here: Path, custom: list[str | Path]
) -> None:
    result = pbc(*custom, "--levels", "2", "-o", "m.pbc")
    assert result.exit_code == 0, result.output
    assert "note: no --calibration: proxies stay unaligned" in result.stdout
    assert "note: random weights: costs are real" in result.stdout
    manifest = Bundle.open(here / "m.pbc").manifest
    assert [row["status"] for row in manifest["levels"]] == ["original"] + 2 * ["unaligned"]
    assert [row["fidelity"] for row in manifest["levels"]] == [1.0, None, None]
    assert manifest["policy"] is None
    assert (manifest["classes"], manifest["class_count"]) == (None, None)
    assert "classes" in pbc("inspect", "m.pbc").stdout


def test_a_board_whose_engine_is_not_there_gets_another(
    here: Path, install_plugin: Callable[..., None]
) -> None:
    board = (
        "from dataclasses import replace\n"
        "from pbc.target import load_target\n"
        "board = replace(load_target('generic-arm64'), name='acme-one', engine='acme',\n"
        "    engines=('acme', 'pytorch'), requires={'python': '>=3.10', 'libc': 'glibc>=2.28'},\n"
        "    needs={'pytorch': {'torch': '>=2.10', 'swap': '1 GiB'}})\n"
    )
    install_plugin("acme", "[pbc.targets]\nacme-one = acme_plugin:board\n", board)
    result = pbc(
        "compile", "resnet50", "--target", "acme-one", "--weights", "random",
        "--input", "3x64x64", "--levels", "1", "-o", "m.pbc",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "acme-one prefers engine acme, which is not installed: using pytorch" in result.stdout
    opened = Bundle.open(here / "m.pbc")
    opened.verify()
    assert opened.manifest["engine"] == "pytorch"
    requires = opened.manifest["requires"]
    assert requires["python"] == ">=3.10"
    assert requires["torch"].endswith(",>=2.10")  # what the engine asks for, and the board
    wanted = {**requires, **opened.manifest["by_hand"]}
    listed = "; ".join(f"{name} {words}" for name, words in wanted.items())
    assert "swap 1 GiB" in listed
    for shown in (result.stdout, pbc("inspect", "m.pbc").stdout):
        assert listed in shown
    assert opened.manifest["cost_model"] == "macs"
    assert opened.manifest["target"]["name"] == "acme-one"


def test_an_engine_that_the_board_s_facts_rule_out_is_refused(here: Path) -> None:
    board = replace(load_target("generic-arm64"), engine="tvm", engines=("tvm",))
    with pytest.raises(UsageError, match="'pytorch' does not run on generic-arm64, which allows t"):
        choose_engine(board, "pytorch")
    result = pbc("compile", "resnet50", "--target", "jetson-tx2", "--engine", "pytorch")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "engine 'pytorch' does not run on jetson-tx2: torch>=2.9 has wheels for glibc" in line
    assert list(here.glob("*.pbc")) == []


def test_nothing_to_prune_is_one_note_and_level_0(here: Path, custom: list[str | Path]) -> None:
    result = pbc(*custom, "--strategy", "norm", "--axes", "width", "-o", "m.pbc")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("leaves nothing to prune") == 1
    assert len(Bundle.open(here / "m.pbc").manifest["levels"]) == 1


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--engine", "tensorrt"], 2, "no engine named 'tensorrt' (available: "),
        (["--engine", "pytorhc"], 2, "no engine named 'pytorhc'; did you mean 'pytorch'?"),
        (["--target", "jetson-tx3"], 2, "no target named 'jetson-tx3'; did you mean 'jetson-tx2'?"),
        (["--strategy", "last-k"], 2, "strategy 'last-k' needs a positive whole number"),
        (["--strategy", "last-k:9"], 1, "SmallResNet has 4 blocks"),
        (["--with", "prun"], 2, "no pass named 'prun'; did you mean 'prune-dims'?"),
        (["--levels", "-1"], 2, "--levels is -1; expected 0 (no proxies) or more"),
        (["--min-cost", "1.5"], 2, "--min-cost is 1.5; expected between 0 and 1"),
        (["--batch", "0"], 2, "--batch is 0; expected 1 or more"),
        (["--classes", "1"], 2, "--classes is 1; expected 2 or more"),
        (["--input", "64x64"], 2, "--input is '64x64'; expected CHANNELSxHEIGHTxWIDTH"),
        (["--input", "3x0x64"], 2, "--input is '3x0x64'"),
        (["--weights", "nowhere.safetensors"], 1, "no weights file nowhere.safetensors"),
        (["--data", "nowhere"], 1, "no data at nowhere"),
        (["--calibration", "nowhere"], 1, "no data at nowhere"),
        (["-o", "nowhere/m.pbc"], 1, "the folder nowhere of nowhere/m.pbc does not exist"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    here: Path, custom: list[str | Path], options: list[str], exit_code: int, message: str
) -> None:
    result = pbc(*custom, *options)
    assert result.exit_code == exit_code, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("  ")]
    assert line.startswith("error: ")
    assert message in line
    assert not [path for path in here.iterdir() if path.suffix == ".pbc"]


def test_the_class_count_must_be_that_of_the_data(
    here: Path, custom: list[str | Path], examples: Path
) -> None:
    data = examples / "photos" / "train"
    count = len(list(data.iterdir()))
    result = pbc(*custom, "--data", data, "--classes", count + 1)
    assert result.exit_code == 2
    assert f"--classes is {count + 1}, but {data} has {count} class folders" in result.stderr
    manifest = json_of(pbc(*custom, "--classes", "7", "--levels", "0", "--json", "-o", "m.pbc"))
    assert (manifest["classes"], manifest["class_count"]) == (None, None)
    assert list(here.glob("*.pbc")) == [here / "m.pbc"]


def test_too_few_calibration_images(here: Path, custom: list[str | Path], few: Path) -> None:
    (here / "photos").mkdir()
    for photo in sorted(few.iterdir())[:3]:
        shutil.copy(photo, here / "photos")
    result = pbc(*custom, "--calibration", "photos")
    assert result.exit_code == 1
    assert "photos has 3 readable images; calibration needs at least 20" in result.stderr


def test_a_full_disk_leaves_the_old_file(
    here: Path, custom: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pbc(*custom, "--levels", "0", "-o", "m.pbc").exit_code == 0
    old = (here / "m.pbc").read_bytes()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pbc.util.atomic.os.fsync", full)
        result = pbc(*custom, "--levels", "0", "--seed", "1", "-o", "m.pbc")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert (here / "m.pbc").read_bytes() == old
    assert sorted(path.name for path in here.iterdir()) == [ORIGIN, "m.pbc"]


def test_the_same_seed_gives_the_same_bundle(here: Path, custom: list[str | Path]) -> None:
    """Another seed gives other random weights."""
    digests = []
    for seed in ("0", "0", "1"):
        manifest = json_of(pbc(*custom, "--levels", "1", "--seed", seed, "--json"))
        digests.append(manifest["files"]["weights/level-0.safetensors"]["sha256"])
    assert digests[0] == digests[1] != digests[2]


def test_a_script_does_what_the_command_does(here: Path, examples: Path) -> None:
    """In a fresh interpreter, through the names that `import pbc` gives."""
    script = (
        "import pbc, sys; from pbc.compiler import CompileOptions\n"
        "options = CompileOptions(weights='random', shape=(3, 32, 32), levels=1,\n"
        "    target='generic-arm64')\n"
        "print(pbc.compile(sys.argv[1], 'm.pbc', options).manifest['model'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, f"{examples / 'custom_model.py'}:factory"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("custom_model.py:factory")
    Bundle.open(here / "m.pbc").verify()


# ---- interruption ----------------------------------------------------------------------------


def stop_after(steps: int) -> Callable[[str, float, str], None]:
    count = 0

    def stop(stage: str, fraction: float, text: str) -> None:
        nonlocal count
        count += stage == "align" and ", step " in text
        if count == steps:
            raise Killed

    return stop


def test_an_interrupted_compilation_continues_to_the_same_bundle(
    here: Path, examples: Path, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)
    options = CompileOptions(
        weights="random", shape=(3, 32, 32), levels=2, calibration=few, align_steps=6,
        target="generic-arm64", engine="pytorch", without=("learn-policy",), ladder="even",
    )  # fmt: skip
    model = f"{examples / 'custom_model.py'}:factory"
    whole = compiler.compile(model, here / "whole.pbc", options)
    with pytest.raises(Killed), reporting_to(stop_after(9)):
        compiler.compile(model, here / "m.pbc", options)
    assert not (here / "m.pbc").exists()
    assert list((here / ".m.pbc.work").iterdir())
    steps: list[str] = []
    with reporting_to(lambda stage, fraction, text: steps.append(text) if text else None):
        resumed = compiler.compile(model, here / "m.pbc", options)
    assert len([text for text in steps if ", step " in text]) < 6
    assert resumed.digest == whole.digest
    left = [ORIGIN, ".whole.pbc.origin.json", "m.pbc", "whole.pbc"]
    assert sorted(path.name for path in here.iterdir()) == left


def test_what_alignment_learned_is_what_is_shipped(compiled: Run) -> None:
    """Proxies differ from slices of the original: they were trained."""
    program = compiled.program
    assert pipeline.equivalence_error(program) <= 1e-4
    # The first level may be the original in another precision, which needs no alignment.
    original, proxy = (
        graph_of(program, f"prefix/{level}") for level in (0, len(program.levels) - 1)
    )
    stem = next(name for name in tensor_names(original) if name.startswith("features.0.0.weight"))
    whole, trained = get_tensor(original, stem), get_tensor(proxy, stem)
    assert not any(torch.equal(row, other) for row in trained for other in whole)


def test_a_precision_that_is_slower_as_it_runs_is_planned_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow: list[Any] = []
    program = make_program(ConvNet())

    def run(self: PassPipeline, program: Program, dump: Path | None = None) -> Program:
        chosen = dict(self.passes)
        assert (
            vars(chosen["plan-levels"])["slow_precisions"]
            == vars(chosen["choose-levels"])["slow_precisions"]
        )
        slow.append(vars(chosen["plan-levels"])["slow_precisions"])
        if len(slow) == 1:
            raise pipeline.PlanAgain("int8", 1.22)
        return program

    monkeypatch.setattr(PassPipeline, "run", run)
    told: list[str] = []
    monkeypatch.setattr(compiler, "tell", told.append)
    compiler.lowered(program, CompileOptions(levels=2))
    assert slow == [(), ("int8",)]
    assert told == ["int8 takes 1.22 of level 0's time as it will run: planning again without"]
