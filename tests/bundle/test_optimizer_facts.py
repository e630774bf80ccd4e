"""Facts about optimizers are one set, whichever engine computes by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_onnx

from pbc.bundle.optimizers import OPTIMIZERS, bias_corrections, state_names
from pbc.errors import PbcError
from pbc.runtime.engines import Executable
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.engines.pytorch.optimizers import OPTIMIZERS as ARITHMETIC
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters


def executables(root: Path) -> list[Executable]:
    pytorch, onnx = tiny.write(root / "t.pbc"), tiny_onnx.write(root / "o.pbc")
    return [PyTorchEngine().load(pytorch), OnnxRuntimeEngine().load(onnx)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_engines_keep_the_state_that_the_facts_name(tmp_path: Path, optimizer: str) -> None:
    theta = initial_parameters(tiny.write(tmp_path / "m.pbc"), 3, 0)
    for executable in executables(tmp_path):
        executable.start(theta, Objective(optimizer))
        state = executable.optimizer_state()
        kept = {name: value for name, value in state.items() if name != "step"}
        assert ("step" in state) == OPTIMIZERS[optimizer].counts_steps
        assert list(kept) == [name for name, _ in state_names(optimizer, theta)]
        for name, parameter in state_names(optimizer, theta):
            assert kept[name].shape == theta[parameter].shape
            assert not kept[name].any()


def test_a_state_of_other_shapes_is_refused_and_not_broadcast(tmp_path: Path) -> None:
    theta = initial_parameters(tiny.write(tmp_path / "m.pbc"), 3, 0)
    for executable in executables(tmp_path):
        executable.start(theta, Objective("sgd"))
        state = {name: value[:1] for name, value in executable.optimizer_state().items()}
        with pytest.raises(PbcError, match="not of this optimizer and these parameters"):
            executable.load_optimizer_state(state)


def test_every_optimizer_has_its_arithmetic() -> None:
    assert ARITHMETIC.keys() == OPTIMIZERS.keys()


def test_corrections_keep_their_digits() -> None:
    mean, square = bias_corrections(1)
    assert (mean, square) == pytest.approx((0.1, 0.001), rel=1e-12)
    assert np.float32(1) - np.float32(0.999) != np.float32(square)
