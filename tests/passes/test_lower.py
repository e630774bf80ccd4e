from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, pruned
from torch import Tensor, nn

from pbc import bundle, compiler
from pbc.bundle.graph_name import BODY, PREFIX, GraphName, update
from pbc.errors import PbcError
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.runner import Runner, TorchRunner, Values
from pbc.lower.graph_check import graph_error_beside_float64
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.runtime.costs import LevelCost
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.objective import Objective
from pbc.targets.onnxruntime.lowering import OnnxRuntimeLowering
from pbc.targets.pytorch.lowering import PyTorchLowering
from pbc.testing import (
    assert_same,
    assert_unchanged,
    gradients,
    make_program,
    run_passes,
    rungs,
    with_request,
)


def test_a_graph_becomes_data() -> None:
    before = pruned(ConvNet)
    after = assert_unchanged(Lower(), before)
    assert after.text() == before.text()
    assert rungs(after) == rungs(before)  # nothing is measured for another machine
    assert_same(before, replace(after, artifacts={}))
    assert json.loads(after.artifacts["graphs/body-0.json"]) == {
        "format": 2,
        "precision": "float32",
        "inputs": ["feature_0", "fc.weight", "fc.bias"],
        "outputs": {"logits": "linear"},
        "tensors": {},
        "nodes": [
            {
                "name": "linear",
                "op": "aten.linear.default",
                "args": [{"ref": "feature_0"}, {"ref": "fc.weight"}, {"ref": "fc.bias"}],
                "kwargs": {},
            }
        ],
    }
    graph = json.loads(after.artifacts["graphs/prefix-1.json"])
    assert graph["inputs"] == ["x"]
    assert graph["outputs"] == {"feature_0": "mean"}
    assert graph["tensors"]["conv1_weight"] == "weights/level-1.safetensors#conv1.weight"
    # The levels share this one, so it is stored once.
    assert graph["tensors"]["bn2_weight"] == "weights/level-0.safetensors#bn2.weight"
    stored = safetensors.torch.load(after.artifacts["weights/level-1.safetensors"])
    assert "bn2.weight" not in stored


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (ConvNet, "linear-probe"),
        (ConvNet, "norm"),
        (ResidualNet, "adapters:2"),
        (AttentionNet, "linear-probe"),
    ],
)
def test_the_engine_computes_what_the_program_does(
    tmp_path: Path, kind: Kind, strategy: str
) -> None:
    program = run_passes(pruned(kind, strategy), Lower())
    images = program.network.example.repeat(2, 1, 1, 1).numpy()
    written = bundle.write(tmp_path / "m.pbc", *compiler.package(program))
    engine = PyTorchEngine().load(written)
    engine.start(
        {n: p.numpy() for n, p in program.parameters.items()}, Objective(learning_rate=1.0)
    )
    for level in range(len(program.levels)):
        logits = engine.logits(level, engine.prefix(level, images))
        with torch.no_grad():
            expected = program.logits(level, torch.from_numpy(images)).numpy()
        assert np.abs(logits - expected).max() <= 1e-4 * max(1, np.abs(expected).max())
    # One plain step of SGD at rate 1 subtracts the gradient.
    features = engine.prefix(0, program.network.example.numpy())
    engine.forward(0, features, np.array([0, 1]))
    engine.update()
    wanted = gradients(program)
    for name, value in engine.parameters().items():
        moved = program.parameters[name].numpy() - value
        assert np.abs(moved - wanted[name].numpy()).max() <= 1e-4 * max(
            1, float(wanted[name].abs().max())
        ), name


class Inverting(nn.Module):
    """Nothing on a device can invert."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        products = y[:, :, None] * y[:, None] + torch.eye(8)
        logits: Tensor = self.fc(torch.linalg.inv(products).mean(2))
        return logits


def test_an_operator_that_the_engine_lacks_is_named_with_its_line() -> None:
    program = run_passes(make_program(Inverting()), MarkTrainable(), SplitPrefix())
    with pytest.raises(
        PbcError,
        match=r"operator aten.linalg_inv_ex.default .*test_lower.py\", line \d+\) is not "
        r"supported by the pytorch engine; replace it in the model",
    ):
        run_passes(program, Lower())


def test_on_the_host_costs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(self: object, program: Program, levels: Sequence[LevelGraphs]) -> list[LevelCost]:
        assert [set(level.graphs) for level in levels] == [{PREFIX, BODY}] * 3
        batch = program.request.batch
        return [LevelCost(ms / batch, 16, 1 / batch, 1 / batch, True) for ms in (2.0, 0.0, 1.0)]

    monkeypatch.setattr(PyTorchLowering, "level_costs", costs)
    before = pruned(ConvNet)
    before = with_request(before, target=replace(before.request.target, local=True))
    after = assert_unchanged(Lower(), before)
    assert rungs(after).cost_model == "latency"
    assert [level.latency_ms for level in rungs(after).levels] == [4, 2, 3]
    assert [level.cost for level in rungs(after).levels] == [1, 0.5, 0.75]
    assert [cost.chunk for cost in after.costs] == [16, 16, 16]
    assert after.notes[-1] == (
        "level 2 measures 0.75 of level 0's latency, no cheaper than level 1 (0.50)"
    )
    profiled = replace(before, cost_model="profile")
    assert rungs(Lower()(profiled)) == rungs(profiled)  # a device's profile goes before


def test_latency_is_measured_per_candidate() -> None:
    program = pruned(ConvNet)
    precisions = ("float32", "bfloat16", "float32")
    levels = [replace(lv, precision=p) for lv, p in zip(program.levels, precisions, strict=True)]
    text = program.text()
    measured = PyTorchLowering().latency_ms(program, levels)
    assert len(measured) == 3
    assert min(measured) > 0
    assert program.text() == text


class Shifted:
    """A lowered level of which some graphs end where they should, and a share of that further."""

    def __init__(self, runner: Runner, roles: Sequence[GraphName], share: float) -> None:
        self._runner, self._roles, self._share = runner, roles, share

    def inputs(self, role: GraphName) -> Sequence[str]:
        return self._runner.inputs(role)

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        results = self._runner.run(role, values)
        if role not in self._roles:
            return results
        return {name: value * (1 + self._share) for name, value in results.items()}


def shifted(
    monkeypatch: pytest.MonkeyPatch, roles: Sequence[GraphName], share: float, level: int = 0
) -> None:
    """Have onnxruntime compute something else at one level."""
    right = OnnxRuntimeLowering.runner

    def runner(self: OnnxRuntimeLowering, program: Program, graphs: LevelGraphs) -> Runner:
        made = right(self, program, graphs)
        return Shifted(made, roles, share) if graphs is program.levels[level] else made

    monkeypatch.setattr(OnnxRuntimeLowering, "runner", runner)


def test_a_wrong_lowered_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, [update(name) for name in ("sgd", "adam", "adamw")], 0.05)
    program = DeriveTrainStep()(with_request(pruned(ConvNet, "norm"), engine="onnxruntime"))
    message = (
        r"the training step that onnxruntime runs at level 0 differs from torch's by \d\.\de-02 "
        r"\(relative; at most 1e-02\): compile with another --engine or --strategy"
    )
    with pytest.raises(PbcError, match=message):
        Lower()(program)


def test_a_step_that_one_mini_batch_tells_apart_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ReLU whose input is zero but for rounding goes either way; a wrong kernel does always."""
    right, calls = Shifted.run, []

    def once(self: Shifted, role: GraphName, values: Values) -> dict[str, Any]:
        calls.append(role)
        if calls.count(role) > 1:
            return self._runner.run(role, values)
        return right(self, role, values)

    monkeypatch.setattr(Shifted, "run", once)
    shifted(monkeypatch, [update("adam")], 0.05)
    program = DeriveTrainStep()(with_request(pruned(ConvNet, "norm"), engine="onnxruntime"))
    lowered = Lower()(program)
    assert any("the step of level 0 differs from torch's by 5.0e-02" in n for n in lowered.notes)
    assert lowered.checks["lowered_train_step"]["0"]["adam"] == pytest.approx(0.05, rel=0.01)


def test_rounding_that_the_network_amplifies_is_not_the_engine_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's own float32 is as far from float64 there; what is wrong is much farther."""
    monkeypatch.setattr("pbc.passes.lower.LOWERED_TOLERANCE", 1e-9)
    program = DeriveTrainStep()(with_request(pruned(ConvNet, "norm"), engine="onnxruntime"))
    Lower()(program)
    shifted(monkeypatch, [update("sgd")], 1e-3)
    with pytest.raises(PbcError, match="the training step that onnxruntime runs at level 0"):
        Lower()(program)


@pytest.mark.parametrize(("role", "level"), [(PREFIX, 0), (PREFIX, 2), (BODY, 0)])
def test_a_wrong_lowered_graph_is_refused(
    monkeypatch: pytest.MonkeyPatch, role: GraphName, level: int
) -> None:
    shifted(monkeypatch, [role], 0.05, level)
    program = with_request(pruned(ConvNet), engine="onnxruntime")
    message = (
        rf"what onnxruntime computes for the {role} of level {level} differs from torch's by "
        r"5\.0e-02 \(relative; at most 1e-02 in float32\): compile with another --engine"
    )
    with pytest.raises(PbcError, match=message):
        Lower()(program)


class Amplifying(nn.Module):
    """What float32 rounds off such a number turns its sine by some percent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.fc = nn.Linear(8 * 7 * 7, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.sin(3e5 * self.conv(x)).flatten(1))
        return logits


def test_rounding_that_a_prefix_amplifies_is_told_and_a_wrong_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make_program(Amplifying(), passes=[MarkTrainable(), SplitPrefix()])
    program = with_request(made, engine="onnxruntime")
    level = program.levels[0]
    own = graph_error_beside_float64(program, level, PREFIX, TorchRunner(level))
    assert 1e-2 < own < 0.1
    with monkeypatch.context() as context:
        shifted(context, [PREFIX], 5 * own)
        (note,) = set(Lower()(program).notes) - set(program.notes)
    assert note.startswith("the prefix of level 0 differs from torch's by")
    assert note.endswith("rounding that the network amplifies")
    shifted(monkeypatch, [PREFIX], 20 * own)
    with pytest.raises(PbcError, match="what onnxruntime computes for the prefix of level 0"):
        Lower()(program)


def test_every_level_is_held_against_torch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, [PREFIX], 1e-3, level=1)
    program = with_request(pruned(ConvNet), engine="onnxruntime")
    program = replace(program, levels=(*program.levels, program.levels[2]))
    after = Lower()(program)
    checked = after.checks["lowered_graphs"]
    assert list(checked) == ["0", "1", "2"]  # level 3 is level 2
    assert all(set(errors) == {"prefix", "body"} for errors in checked.values())
    assert checked["0"]["prefix"] < 1e-5
    assert checked["1"]["prefix"] == pytest.approx(1e-3, rel=0.05)
    (note,) = set(after.notes) - set(program.notes)
    assert note == (
        "the prefix of level 1 differs from torch's by 1.0e-03 in float32 "
        "(relative; 1e-04 is usual): rounding that the network amplifies"
    )
