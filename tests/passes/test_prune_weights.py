from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import ResidualNet, calibration, pruned

from pbc.ir.graph import get_tensor
from pbc.ir.program import Program
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.prune_weights import DENSE, PruneWeights
from pbc.proxies.compression import weight_names
from pbc.testing import assert_unchanged, graph_of, run_passes


@pytest.fixture(scope="module")
def program() -> Program:
    return run_passes(pruned(ResidualNet), FoldBatchNorm())


def test_the_smallest_of_each_layer_become_zero(program: Program) -> None:
    after = assert_unchanged(PruneWeights(share=0.25), program)
    before, graph = graph_of(program, "prefix/0"), graph_of(after, "prefix/0")
    assert weight_names(graph)
    for name in weight_names(graph):
        old, new = get_tensor(before, name), get_tensor(graph, name)
        zero = new == 0
        assert float(zero.float().mean()) == pytest.approx(0.25, abs=1e-3)
        assert torch.equal(new[~zero], old[~zero])
        assert float(old[zero].abs().max()) <= float(old[~zero].abs().min())
    assert DENSE in after.notes
    assert after.checks["compression"] == {"prune-weights": {"fidelity": None}}


def test_one_threshold_for_all_layers(program: Program) -> None:
    after = PruneWeights(share=0.5, everywhere=True)(program)
    graphs = [graph for level in after.levels for graph in level.frozen]
    zeros = [get_tensor(g, name).flatten() == 0 for g in graphs for name in weight_names(g)]
    assert float(torch.cat(zeros).float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert len({round(float(z.float().mean()), 3) for z in zeros}) > 1


def test_training_brings_level_0_back_and_zeros_stay(program: Program, tmp_path: Path) -> None:
    data = calibration(tmp_path, program.network.input, per_class=12)
    calibrated = replace(program, calibration=data)
    plain = PruneWeights(share=0.7, align_steps=4)(calibrated)
    trained = PruneWeights(share=0.7, align_steps=160)(calibrated)
    found = [p.checks["compression"]["prune-weights"]["fidelity"] for p in (plain, trained)]
    assert found[0] < found[1] < 1
    before, graph = graph_of(plain, "prefix/0"), graph_of(trained, "prefix/0")
    for name in weight_names(graph):
        zero = get_tensor(graph, name) == 0
        assert torch.equal(zero, get_tensor(before, name) == 0)
        assert not torch.signbit(get_tensor(graph, name)[zero]).any()  # a bit each, when packed
