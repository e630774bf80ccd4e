"""The PyTorch rivals train what the bundle trains."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_net
import numpy as np
import pytest
import torch

from pbc.bench.evaluator import Evaluator
from pbc.bench.rival import Rival, RivalSetting
from pbc.bench.rivals import variants
from pbc.bench.rivals.full import Full
from pbc.bench.rivals.order import batches
from pbc.bench.rivals.own import Pbc
from pbc.bench.rivals.pet import Pet, PetBfloat16, PetCache
from pbc.data import ImageFolder, Samples
from pbc.errors import PbcError
from pbc.frontend import original as network
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import labelled_for
from pbc.runtime.runtime import Runtime

STRATEGIES = ("linear-probe", "norm", "full")  # the last has no prefix
EPOCHS = 3
SGD, ADAM = Objective("sgd", 0.05), Objective("adam", 0.005)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench_net.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module", params=STRATEGIES)
def runtime(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    folder = tmp_path_factory.mktemp("net") / request.param
    return Runtime.open(bench_net.compiled(folder, request.param).path)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return Runtime.open(bench_net.compiled(tmp_path_factory.mktemp("probe")).path)


def samples(runtime: Runtime, photos: Path) -> Samples:
    return labelled_for(runtime.bundle, ImageFolder.open(photos / "train", runtime.spec))


def setting(
    runtime: Runtime,
    photos: Path,
    folder: Path,
    *,
    compiled: bool = False,
    objective: Objective = SGD,
) -> RivalSetting:
    options = TrainOptions(
        epochs=EPOCHS,
        batch=bench_net.BATCH,
        **dataclasses.asdict(objective),
        seed=1,
        routing=False,
        skip=False,
        cache="off",
    )
    return RivalSetting(
        runtime, samples(runtime, photos), options, folder, None, torch_compile=compiled
    )


def losses(rival: Rival) -> list[float]:
    rival.prepare(None)
    return [rival.run_epoch().loss or 0.0 for _ in range(EPOCHS)]


@pytest.mark.parametrize(
    "objective",
    [
        SGD,
        ADAM,
        Objective("sgd", 0.05, momentum=0.5, weight_decay=0.1, label_smoothing=0.2),
        Objective("adam", 0.005, weight_decay=0.1),
        Objective("adamw", 0.005, weight_decay=0.5, label_smoothing=0.2),
    ],
    ids=str,
)
def test_pet_and_pbc_at_level_0_learn_alike(
    runtime: Runtime, photos: Path, tmp_path: Path, objective: Objective
) -> None:
    torchs, own = (
        kind(setting(runtime, photos, tmp_path / kind.__name__, objective=objective))
        for kind in (Pet, Pbc)
    )
    assert losses(torchs) == pytest.approx(losses(own), rel=1e-4)
    theirs, ours = torchs.parameters(), own.parameters()
    assert theirs is not None
    assert ours is not None
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-4)


def test_the_cache_changes_nothing(probe: Runtime, photos: Path, tmp_path: Path) -> None:
    plain, cached = (kind(setting(probe, photos, tmp_path)) for kind in (Pet, PetCache))
    assert losses(plain) == pytest.approx(losses(cached), rel=1e-5)
    assert cached.facts()["cache_bytes"] == 30 * 32 * 4


def test_later_epochs_of_the_cache_run_no_prefix(
    probe: Runtime, photos: Path, tmp_path: Path
) -> None:
    rival = PetCache(setting(probe, photos, tmp_path))
    rival.prepare(None)
    assert rival.facts()["cache_bytes"] == 0  # filling is the first epoch's, to be paid for
    assert rival.run_epoch().stage_seconds["prefix"] > 0
    later = rival.run_epoch().stage_seconds
    assert later["prefix"] == later["decode"] == 0
    assert later["cache"] > 0


def test_bfloat16_is_near_but_not_the_same(probe: Runtime, photos: Path, tmp_path: Path) -> None:
    exact, rounded = (losses(kind(setting(probe, photos, tmp_path))) for kind in (Pet, PetBfloat16))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kind", [PetCache, PetBfloat16])
def test_without_a_prefix_there_is_nothing_to_cache(
    photos: Path, tmp_path: Path, kind: type[Pet]
) -> None:
    runtime = Runtime.open(bench_net.compiled(tmp_path / "net", "full").path)
    with pytest.raises(PbcError, match="with full nothing is frozen before"):
        kind(setting(runtime, photos, tmp_path))


@pytest.mark.parametrize("kind", [Pet, PetCache, Full])
@pytest.mark.parametrize("objective", [SGD, ADAM], ids=str)
def test_a_state_is_all_that_is_needed(
    probe: Runtime,
    photos: Path,
    tmp_path: Path,
    kind: type[Pet | PetCache | Full],
    objective: Objective,
) -> None:
    one = kind(setting(probe, photos, tmp_path, objective=objective))
    one.prepare(None)
    one.run_epoch()
    state = {name: value.copy() for name, value in one.state().items()}
    expected = one.run_epoch().loss
    other = kind(setting(probe, photos, tmp_path, objective=objective))
    other.prepare(state)
    assert other.run_epoch().loss == expected


def test_full_training_changes_every_parameter(
    probe: Runtime, photos: Path, tmp_path: Path
) -> None:
    rival = Full(setting(probe, photos, tmp_path))
    before = rival.state()
    first, *_, last = losses(rival)
    assert last < first
    after = rival.state()
    learnt = [name for name in before if name.endswith(("weight", "bias"))]
    assert learnt
    assert all(not np.array_equal(before[name], after[name]) for name in learnt)
    assert 0 <= rival.evaluate(samples(probe, photos)) <= 1


def test_the_evaluator_agrees_with_the_runtime(
    runtime: Runtime, photos: Path, tmp_path: Path
) -> None:
    own = Pbc(setting(runtime, photos, tmp_path))
    own.prepare(None)
    own.run_epoch()
    test = ImageFolder.open(photos / "test", runtime.spec)
    evaluator = Evaluator(runtime, test, None)
    theta = own.parameters()
    assert evaluator.accuracy(theta) == own.evaluate(test)
    assert evaluator.accuracy(theta) == own.evaluate(test)  # now from what it kept


def test_where_compiling_fails_pet_runs_eagerly(
    probe: Runtime, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        def call(*inputs: object) -> object:
            raise RuntimeError("no C++ compiler\nand more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    rival = Pet(setting(probe, photos, tmp_path, compiled=True))
    eager = Pet(setting(probe, photos, tmp_path))
    assert losses(rival) == losses(eager)
    (note,) = rival.facts()["notes"]
    assert note == "torch.compile is not possible here (RuntimeError: no C++ compiler)"
    assert rival.facts()["variant"] == "eager in calls of 4"


Call = Callable[..., Any]


def slowed(call: Call, **_: object) -> Call:
    def run(*inputs: object) -> object:
        time.sleep(0.02)
        return call(*inputs)

    return run


def remembered(call: Call, **_: object) -> Call:
    """Run once per size, then only answer: faster than anything that computes."""
    known: dict[int, Any] = {}

    def run(images: torch.Tensor) -> Any:
        if len(images) not in known:
            known[len(images)] = call(images)
        return known[len(images)]

    return run


@pytest.mark.parametrize(("compiler", "faster"), [(slowed, "eager"), (remembered, "torch.compile")])
def test_the_faster_variant_runs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Call, faster: str
) -> None:
    runtime = Runtime.open(bench_net.compiled(tmp_path / "net").path)
    monkeypatch.setattr(torch, "compile", compiler)
    rival = Pet(setting(runtime, photos, tmp_path, compiled=True))
    rival.prepare(None)
    assert rival.facts()["variant"] == f"{faster} in calls of 4"
    assert "the fastest ran" in rival.facts()["notes"][0]


@pytest.mark.parametrize(("slow", "fastest"), [((4,), 30), ((30,), 4)])
def test_the_cache_is_filled_in_calls_of_the_fastest_size(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slow: tuple[int, ...],
    fastest: int,
) -> None:
    runtime = Runtime.open(bench_net.compiled(tmp_path / "net").path)
    measured = variants._pass

    def slower(parts: network.Parts, variant: variants.Variant, images: torch.Tensor) -> None:
        measured(parts, variant, images)
        if len(images) in slow:
            time.sleep(0.01 * len(images))

    monkeypatch.setattr(variants, "_pass", slower)
    rival = PetCache(setting(runtime, photos, tmp_path))
    assert rival.facts()["variant"] == f"eager in calls of {fastest}"
    rival.prepare(None)
    assert rival.run_epoch().stage_seconds["prefix"] > 0


def test_the_variant_outlives_an_interruption(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime.open(bench_net.compiled(tmp_path / "net").path)
    rival = PetCache(setting(runtime, photos, tmp_path))
    rival.prepare(None)
    rival.run_epoch()
    began_with = rival.facts()["variant"]
    other = PetCache(setting(runtime, photos, tmp_path))
    other._variant = next(v for v in other._variants if v.label != began_with)
    other.prepare(rival.state())
    assert other.facts()["variant"] == began_with
    assert other.facts()["notes"] == []


def test_other_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bundle = bench_net.compiled(tmp_path / "net")
    known = bundle.manifest["provenance"]
    weights = tmp_path / "w.safetensors"
    module = network.module(bundle, None, {})
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, weights)
    bundle.manifest["provenance"] = {
        **known,
        "weights": "w.safetensors",
        "weights_sha256": "0" * 64,
    }
    with pytest.raises(PbcError, match=r"no file w.safetensors was found; --weights names"):
        network.module(bundle, None, {})
    with pytest.raises(PbcError, match="holds other weights; --weights names the file"):
        network.module(bundle, weights, {})


def test_the_order_visits_everything_once() -> None:
    cut = batches(10, 4, seed=3, epoch=2)
    assert [len(batch) for batch in cut] == [4, 4, 2]
    assert sorted(np.concatenate(cut).tolist()) == list(range(10))
    assert np.array_equal(np.concatenate(cut), np.concatenate(batches(10, 4, 3, 2)))
    assert not np.array_equal(np.concatenate(cut), np.concatenate(batches(10, 4, 3, 1)))
