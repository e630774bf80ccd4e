"""Bundles compiled for TVM train as those compiled for PyTorch do, with the runtime alone."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import networks
import numpy as np
import pytest
from networks import AttentionNet, ConvNet, Kind, ResidualNet
from tiny_onnx import resident_bytes

from pbc.bundle import Bundle
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.runtime.engines import Engine, Executable, guarded
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.engines.tvm import library as tvm_library
from pbc.runtime.engines.tvm.engine import TvmEngine
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import body_inputs, initial_parameters

ENGINES: dict[str, Callable[[], Engine]] = {"tvm": TvmEngine, "pytorch": PyTorchEngine}
CASES: tuple[tuple[Kind, str], ...] = (
    (ConvNet, "linear-probe"),
    (ResidualNet, "adapters:1"),
    (AttentionNet, "norm"),
)
Compile = Callable[[Kind, str, str], Bundle]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return partial(networks.compiled, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True)
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(source: Bundle, count: int) -> np.ndarray:
    shape = source.manifest["input"]["shape"]
    pixels = np.random.default_rng(count).integers(0, 256, (count, *shape[1:], shape[0]))
    return InputSpec.from_json(source.manifest["input"]).normalise(pixels.astype(np.uint8))


def step(executable: Executable, source: Bundle, number: int) -> tuple[np.ndarray, ...]:
    """One forward and, three times of four, its update; levels and batch sizes take turns."""
    level, count = number % len(source.manifest["levels"]), (6, 6, 5, 1)[number % 4]
    features = executable.prefix(level, images(source, count))
    found = executable.forward(level, features, np.arange(count) % 4)
    if number % 4 != 3:
        gradients = executable.gradients()
        executable.update()
        return *found, *gradients.values()
    return found


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_every_step_at_every_level_is_that_of_pytorch(
    compiled: Compile, kind: Kind, strategy: str
) -> None:
    source = compiled(kind, strategy, "tvm")
    ours, twin = (ENGINES[e]().load(compiled(kind, strategy, e), threads=1) for e in ENGINES)
    for objective in (
        Objective("sgd", 0.05, weight_decay=0.01, label_smoothing=0.1),
        Objective("adam", 0.01, weight_decay=0.01),
        Objective("adamw", 0.01, weight_decay=0.1),
    ):
        for executable in (ours, twin):
            executable.start(initial_parameters(source, 4, 0), objective)
        for number in range(12):
            results = [step(executable, source, number) for executable in (ours, twin)]
            for value, other in zip(*results, strict=True):
                np.testing.assert_allclose(value, other, rtol=1e-3, atol=1e-3)
        for get in ("parameters", "optimizer_state"):
            mine, others = getattr(ours, get)(), getattr(twin, get)()
            assert list(mine) == list(others)
            for name, value in mine.items():
                np.testing.assert_allclose(value, others[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_training_goes_on_from_its_state_to_the_same_bits(
    compiled: Compile, threads: int
) -> None:
    source = compiled(ConvNet, "linear-probe", "tvm")
    objective = Objective("adamw", 0.01, weight_decay=0.1)
    whole = TvmEngine().load(source, threads=1)
    whole.start(initial_parameters(source, 4, 0), objective)
    for number in range(12):
        step(whole, source, number)
        if number == 6:
            kept, state = whole.parameters(), whole.optimizer_state()
    second = TvmEngine().load(source, threads=threads)
    second.start(kept, objective)
    second.load_optimizer_state(state)
    for number in range(7, 12):
        step(second, source, number)
    for name, value in whole.parameters().items():
        assert np.array_equal(value, second.parameters()[name]), name


def test_parameters_that_a_library_does_not_take_are_refused_before_there_are_any(
    compiled: Compile,
) -> None:
    source = compiled(ConvNet, "linear-probe", "tvm")
    executable = guarded.load(TvmEngine(), source, threads=1)
    inputs = body_inputs(source, 4)
    executable.foresee(inputs)
    weight = next(name for name in source.manifest["head"] if len(inputs[name]) > 1)
    before = resident_bytes()
    with pytest.raises(PbcError, match="the body of level 0 cannot be run: Check failed"):
        executable.foresee({**inputs, weight: (4, 1 << 26)})  # 1 GiB, were they written
    assert resident_bytes() - before < 64 << 20


def test_where_an_array_lies_changes_no_bit(compiled: Compile) -> None:
    source = compiled(ConvNet, "linear-probe", "tvm")
    executable = TvmEngine().load(source, threads=1)
    batch = images(source, 3)
    moved = np.empty(batch.size + 1, np.float32)[1:].reshape(batch.shape)
    moved[...] = batch
    moved.flags.writeable = False
    first, second = executable.prefix(0, batch), executable.prefix(0, moved)
    assert all(np.array_equal(value, second[name]) for name, value in first.items())


SCRIPT = """
import sys
from pbc.bundle import Bundle
from pbc.runtime.engines.tvm.engine import TvmEngine
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters
import numpy as np

source = Bundle.open(sys.argv[1])
executable = TvmEngine().load(source, threads=1)
executable.start(initial_parameters(source, 4, 0), Objective("adam", 0.01))
images = np.random.default_rng(0).normal(size=(4, *source.manifest["input"]["shape"]))
features = executable.prefix(0, images.astype(np.float32))
losses = []
for step in range(5):
    losses.append(executable.forward(0, features, np.arange(4))[0].mean())
    executable.update()
assert losses[-1] < losses[0], losses
heavy = {"torch", "tvm", "onnx", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_device_trains_with_the_runtime_alone(compiled: Compile, artifacts: Path) -> None:
    source = compiled(ConvNet, "linear-probe", "tvm")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source.path)],
        env={**os.environ, "PBC_CACHE": str(artifacts)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_a_folder_that_takes_nothing_costs_a_note(
    compiled: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "file"))
    source = compiled(ConvNet, "linear-probe", "tvm")
    assert TvmEngine().load(source, threads=1).prefix(0, images(source, 2))


def test_a_bundle_for_another_machine_is_refused(
    compiled: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compiled(ConvNet, "linear-probe", "tvm")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(PbcError, match="is built for x86_64, this machine is riscv64"):
        TvmEngine().load(source)


def test_a_runtime_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tvm_library.runtime_path.cache_clear()
    monkeypatch.setenv(tvm_library.RUNTIME_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(PbcError, match=r"none\.so, which is no file; pip install 'apache-tvm"):
        tvm_library.runtime_path()
    monkeypatch.delenv(tvm_library.RUNTIME_VARIABLE)
    tvm_library.runtime_path.cache_clear()


def test_the_version_names_what_decides_the_last_bit() -> None:
    version = TvmEngine().version()
    assert "tvm_ffi 0.1.14" in version
    assert "\n" not in version


def test_trainings_in_one_process_leave_nothing_behind(compiled: Compile) -> None:
    source = compiled(ConvNet, "linear-probe", "tvm")

    def train() -> None:
        executable = TvmEngine().load(source, threads=1)
        executable.foresee(body_inputs(source, 4))
        executable.start(initial_parameters(source, 4, 0), Objective())
        step(executable, source, 0)
        gc.collect()  # tests make Python look for cycles far more rarely than it does

    gc.freeze()
    for _ in range(5):
        train()
    before = resident_bytes()
    for _ in range(25):
        train()
    gc.unfreeze()
    # 5 MB for a hundred trainings, of which each may load several libraries.
    assert resident_bytes() - before < 25 * 20_000
