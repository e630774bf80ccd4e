"""The sensitivity studies of `pbc bench --sweep`, and which photos a bench takes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import bench_net
import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result

from pbc import cli
from pbc.bench.photos import first_of_each, split, train_and_test
from pbc.bench.sweep import ShuffledPolicy, _with_means, notes
from pbc.data import ImageFolder, Samples
from pbc.errors import PbcError
from pbc.runtime.runtime import Runtime


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    bench_net.photos(root / "photos")
    bench_net.compiled(root / "net", levels=1)
    bench_net.compiled(root / "other", levels=1)
    bench_net.compiled(root / "flat")
    return root


def pbc(assets: Path, work: Path, *args: object, bundle: str = "net/linear-probe-1.pbc") -> Result:
    words = [
        "bench", assets / bundle, assets / "photos", "--rivals", "pet", "--epochs", "1",
        "--seeds", "1", "--lr", "0.1", "--no-torch-compile", "--work", work / "w",
        "-o", work / "r.json", "--html", work / "r.html", *args,
    ]  # fmt: skip
    result = CliRunner().invoke(cli.main, [str(word) for word in words], prog_name="pbc")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_all_studies_in_one_run(assets: Path, tmp_path: Path) -> None:
    result = pbc(assets, tmp_path, "--sweep", "levels,policy-data,shots")
    assert result.exit_code == 0, result.output
    sweeps = json.loads((tmp_path / "r.json").read_text())["sweeps"]
    assert sweeps["levels"]["values"] == ["0", "1"]
    assert sweeps["policy-data"]["values"] == ["shipped", "means", "shuffled"]
    assert sweeps["shots"]["values"] == ["1", "2", "4", "8"]  # there are ten photos a class
    for study in sweeps.values():
        assert {(point["value"], point["rival"]) for point in study["points"]} == {
            (value, rival) for value in study["values"] for rival in ("pet", "pbc-nocache", "pbc")
        }
    visits = {
        folder.name.rpartition("-")[0]: [
            json.loads(line)["levels"] for line in (folder / "cells.jsonl").read_text().splitlines()
        ]
        for folder in (tmp_path / "w" / "states" / "sweep").iterdir()
    }
    assert len(visits) == 9
    assert all(sum(levels[1:]) == 0 for levels in visits["levels-0"])
    for count in (1, 2, 4, 8):
        assert max(sum(levels) for levels in visits[f"shots-{count}"]) == 3 * count
    assert "Photos per class" in result.stdout
    assert "Sweep: Photos per class" in (tmp_path / "r.html").read_text()
    again = pbc(assets, tmp_path, "--sweep", "levels,policy-data,shots", "--resume")
    assert again.exit_code == 0, again.output
    assert "seed 0" not in again.stderr  # every cell was there


def test_a_sweep_may_be_added_on_resume(assets: Path, tmp_path: Path) -> None:
    assert pbc(assets, tmp_path).exit_code == 0
    more = pbc(assets, tmp_path, "--sweep", "shots", "--resume")
    assert more.exit_code == 0, more.output
    assert "shots" in json.loads((tmp_path / "r.json").read_text())["sweeps"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bundle", "other=x.pbc"], "--bundle is for --sweep policy-data"),
        (["--sweep", "policy-data", "--bundle", "shipped=x.pbc"], "--bundle names 'shipped'"),
        (["--sweep", "policy-data", "--bundle", "flat={flat}"], "is not of the same model"),
    ],
)
def test_what_a_sweep_needs_is_checked_first(
    assets: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    norm = bench_net.compiled(tmp_path / "norm", "norm").path
    result = pbc(assets, tmp_path, *(word.format(flat=norm) for word in words))
    assert result.exit_code != 0
    assert message in result.stderr
    assert not (tmp_path / "w").exists()


def test_a_policy_that_is_means_is_told(assets: Path) -> None:
    runtime = Runtime.open(assets / "net" / "linear-probe-1.pbc")
    means = replace(runtime, bundle=_with_means(runtime.bundle))
    (note,) = notes(("policy-data",), means, {})
    assert note.startswith("sweep policy-data compares nothing")
    assert notes(("shots",), means, {}) == []


def test_bundles_can_be_compared(assets: Path, tmp_path: Path) -> None:
    other = assets / "other" / "linear-probe-1.pbc"
    result = pbc(assets, tmp_path, "--sweep", "policy-data", "--bundle", f"flowers={other}")
    assert result.exit_code == 0, result.output
    sweeps = json.loads((tmp_path / "r.json").read_text())["sweeps"]
    assert sweeps["policy-data"]["values"] == ["shipped", "flowers"]


def test_a_ladder_is_needed_to_restrict_one(assets: Path, tmp_path: Path) -> None:
    result = pbc(assets, tmp_path, "--sweep", "levels", bundle="flat/linear-probe-0.pbc")
    assert result.exit_code == 1
    assert "--sweep levels needs a bundle with proxies" in result.stderr


def test_shuffled_answers_are_the_same_ones(tmp_path: Path) -> None:
    runtime = Runtime.open(tiny.write(tmp_path / "tiny.pbc").path)
    views = np.random.default_rng(0).normal(size=(40, 3, 4, 4)).astype(np.float32)
    plain = runtime.engine.load(runtime.bundle).policy(views)
    shuffled = ShuffledPolicy(runtime.engine).load(runtime.bundle).policy(views)
    assert not np.array_equal(plain, shuffled)
    assert np.array_equal(np.sort(plain, axis=0), np.sort(shuffled, axis=0))


# ---- photos ----------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return ImageFolder.open(tiny.photos(tmp_path / "p", 9), tiny.SPEC)


def test_a_split_keeps_every_class_on_both_sides(samples: Samples) -> None:
    rest, apart = split(samples, 1 / 3, seed=0)
    assert np.bincount(rest.labels).tolist() == [6, 6, 6]
    assert np.bincount(apart.labels).tolist() == [3, 3, 3]
    assert set(rest.names) | set(apart.names) == set(samples.names)
    assert not set(rest.names) & set(apart.names)
    assert split(samples, 1 / 3, seed=0)[1].names == apart.names
    assert split(samples, 1 / 3, seed=1)[1].names != apart.names


def test_what_does_not_stay_decoded_is_known(tmp_path: Path, samples: Samples) -> None:
    assert samples.in_memory
    most = ImageFolder.open(tmp_path / "p", tiny.SPEC, ram_bytes=26 * samples.decode(0).nbytes)
    assert not most.in_memory
    assert split(most, 1 / 3, seed=0)[0].in_memory


def test_a_subset_is_those_samples(samples: Samples) -> None:
    few = first_of_each(samples, 2, seed=0)
    assert np.bincount(few.labels).tolist() == [2, 2, 2]
    at = [samples.names.index(name) for name in few.names]
    assert np.array_equal(few.batch(np.arange(6)), samples.batch(np.array(at)))
    assert few.hashes == tuple(samples.hashes[index] for index in at)
    assert few.digest() != samples.digest()


def test_where_the_test_photos_come_from(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "pair" / "train", 3)
    tiny.photos(tmp_path / "pair" / "test", 2)
    tiny.photos(tmp_path / "alone", 6)

    def counts(data: str, test: str | None = None) -> tuple[int, int]:
        given = tmp_path / test if test else None
        train, tested, _ = train_and_test(tmp_path / data, given, tiny.SPEC, lambda *_: None)
        return len(train), len(tested)

    assert counts("pair") == (9, 6)
    assert counts("alone") == (12, 6)
    assert counts("alone", "pair/test") == (18, 6)
    tiny.photos(tmp_path / "pair" / "val", 1)
    assert counts("pair") == (9, 6)
    some = sorted((tmp_path / "alone").iterdir())
    for name, folder in zip(("train", "bus"), some, strict=False):  # a class of an unlucky name
        shutil.copytree(folder, tmp_path / "classes" / name)
    assert counts("classes") == (8, 4)
    with pytest.raises(PbcError, match="holds train/ and test/ already"):
        counts("pair", "alone")
    with pytest.raises(PbcError, match="no data at"):
        counts("nothing")
