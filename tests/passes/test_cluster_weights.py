from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ResidualNet, calibration, pruned

from pbc import compiler
from pbc.bundle import write
from pbc.errors import UsageError
from pbc.ir import pipeline
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.program import Program
from pbc.passes.cluster_weights import ClusterWeights
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import Lower
from pbc.passes.prune_weights import PruneWeights
from pbc.proxies.codebooks import codebook, from_codebooks, kmeans, with_codebooks
from pbc.proxies.compression import weight_names
from pbc.testing import assert_unchanged, graph_of, run_passes

UP = "blocks.0.up.weight"


@pytest.fixture(scope="module")
def program() -> Program:
    return run_passes(pruned(ResidualNet), FoldBatchNorm())


@pytest.fixture(scope="module")
def calibrated(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Program:
    data = calibration(tmp_path_factory.mktemp("photos"), program.network.input, per_class=12)
    return replace(program, calibration=data)


# ---- codebooks -------------------------------------------------------------------------------


def lloyd(values: torch.Tensor, count: int) -> torch.Tensor:
    """k-means as the textbook has it."""
    centres = torch.linspace(float(values.min()), float(values.max()), count, dtype=values.dtype)
    for _ in range(100):
        nearest = (values[:, None] - centres).abs().argmin(1)
        means = torch.stack([values[nearest == i].mean() for i in nearest.unique().tolist()])
        if torch.equal(means, centres):
            break
        centres = means
    return centres


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(1, 16), size=st.integers(20, 300))
def test_clusters_are_those_of_the_textbook(seed: int, count: int, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(kmeans(values.sort().values, count), lloyd(values, count))


def test_zeros_that_pruning_made_stay_zero() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.where(weight.abs() > 0.7, weight, torch.zeros(()))
    values, indices = codebook(weight, 3)
    assert len(values) <= 8
    assert bool((values[indices.long()][weight == 0] == 0).all())
    assert bool((values[indices.long()][weight != 0] != 0).float().mean() > 0.9)


def test_a_graph_with_codebooks_computes_the_same_and_sums_gradients(program: Program) -> None:
    graph = graph_of(program, "prefix/0")
    shared = with_codebooks(graph, {UP: 3})
    values = get_tensor(shared, f"{UP}_values")
    indices = get_tensor(shared, f"{UP}_indices").long()
    dense = values.detach()[indices].reshape(get_tensor(graph, UP).shape).requires_grad_()
    torch.testing.assert_close(from_codebooks(shared, [UP])[UP], dense.detach().flatten())
    images = program.network.example
    values.requires_grad_()
    shared(images)[0].square().sum().backward()
    torch.func.functional_call(graph, {UP: dense}, (images,))[0].square().sum().backward()
    assert dense.grad is not None
    sums = torch.zeros(8).index_add_(0, indices, dense.grad.flatten())
    torch.testing.assert_close(values.grad, sums, rtol=1e-4, atol=1e-4 * float(sums.abs().max()))


# ---- the pass --------------------------------------------------------------------------------


def test_layers_share_values_and_everything_else_stays(program: Program) -> None:
    after = assert_unchanged(ClusterWeights(bits=3), program)
    assert after.text() == program.text()
    for before, graph in zip(program.levels[0].frozen, after.levels[0].frozen, strict=True):
        weights = weight_names(before)
        for name in tensor_names(graph):
            old, new = get_tensor(before, name), get_tensor(graph, name)
            if name in weights:
                assert len(new.unique()) <= 8
                assert 0 < float((new - old).norm() / old.norm()) < 0.3
            else:
                assert torch.equal(old, new)
    assert after.checks["compression"] == {"cluster-weights": {"fidelity": None}}
    assert any("no --calibration: cluster-weights was not measured" in n for n in after.notes)
    # Later passes are held to the network as it is now.
    run_passes(after, DeriveTrainStep())


def test_training_brings_level_0_back(calibrated: Program) -> None:
    plain = ClusterWeights(bits=2, align_steps=4)(calibrated)
    trained = ClusterWeights(bits=2, align_steps=160)(calibrated)
    found = [p.checks["compression"]["cluster-weights"]["fidelity"] for p in (plain, trained)]
    assert found[0] < found[1] < 1
    graph = graph_of(trained, "prefix/0")
    assert all(len(get_tensor(graph, name).unique()) <= 4 for name in weight_names(graph))


def test_a_level_of_other_precision_keeps_level_0_s_weights(calibrated: Program) -> None:
    first = calibrated.levels[0]
    levels = (first, replace(first.copy(), precision="bfloat16"))
    after = ClusterWeights(bits=3, align_steps=8)(replace(calibrated, levels=levels))
    for one, two in zip(after.levels[0].frozen, after.levels[1].frozen, strict=True):
        for name in tensor_names(one):
            assert torch.equal(get_tensor(one, name), get_tensor(two, name))


def test_pruned_weights_stay_pruned_and_the_bundle_is_smaller(
    calibrated: Program, tmp_path: Path
) -> None:
    steps = (PruneWeights(share=0.5), ClusterWeights(bits=3, align_steps=8))
    plain, small = calibrated, run_passes(calibrated, *steps)
    weight = get_tensor(graph_of(small, "prefix/0"), UP)
    assert float((weight == 0).float().mean()) >= 0.5
    assert len(weight.unique()) <= 8
    made = [
        write(tmp_path / f"{n}.pbc", *compiler.package(run_passes(p, Lower())))
        for n, p in enumerate((plain, small))
    ]
    assert "packed" not in made[0].manifest
    file = next(iter(made[1].manifest["packed"]))
    assert made[1].manifest["checks"]["compression"].keys() == {"prune-weights", "cluster-weights"}
    stored = [bundle.manifest["files"][file]["size_bytes"] for bundle in made]
    assert stored[1] < stored[0] / 3
    read = made[1].tensors(file)[UP]
    assert torch.equal(torch.from_numpy(read), weight)


def test_options_behind_the_name() -> None:
    chosen = dict(pipeline.build({}, ["cluster-weights:5", "prune-weights:0.3,global"]).passes)
    assert chosen["cluster-weights"] == ClusterWeights(bits=5)
    assert chosen["prune-weights"] == PruneWeights(share=0.3, everywhere=True)
    names = list(chosen)
    assert names.index("prune-weights") < names.index("cluster-weights")
    assert "cluster-weights" not in dict(pipeline.build({}).passes)
    for text, words in (
        ("cluster-weights:9", "expected 1 to 8, for example cluster-weights:4"),
        ("cluster-weights:x", "is no number of bits"),
        ("prune-weights:1.5", r"expected prune-weights:0\.5"),
        ("prune-weights:0.5,all", r"expected prune-weights:0\.5"),
        ("align:3", "'align' takes nothing behind a colon, got '3'"),
    ):
        with pytest.raises(UsageError, match=words):
            pipeline.build({}, [text])
