"""`pbc bench` from end to end: a match, its files, interruptions, what it refuses."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_net
import pytest
import tiny
from click.testing import CliRunner, Result
from safetensors.numpy import load_file

from pbc import cli
from pbc.bench.cells import Work
from pbc.bench.compare import compare
from pbc.bench.evaluator import Evaluator
from pbc.bench.options import BenchOptions
from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.runtime.options import TrainOptions

QUIET = ("--lr", "0.1", "--no-torch-compile")


def pbc(*args: object) -> Result:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args], prog_name="pbc")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    bench_net.photos(root / "photos")
    bench_net.compiled(root / "net", levels=1)
    return root


@pytest.fixture(scope="module")
def bundle(assets: Path) -> Path:
    return assets / "net" / "linear-probe-1.pbc"


@pytest.fixture(scope="module")
def match(assets: Path, bundle: Path) -> Path:
    """Run every rival for two epochs and two seeds; returns the folder of what was written."""
    out = assets / "match"
    out.mkdir()
    result = pbc(
        "bench", bundle, assets / "photos", "--rivals", "all", "--seeds", "2", "--epochs", "2",
        "--epochs-of", "full=1", "--accuracy-budgets", "--head", "sgd",
        "--work", out / "work", *QUIET,
        "-o", out / "r.json", "--html", out / "r.html", "--csv", out / "r.csv",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (out / "stdout").write_text(result.stdout)
    (out / "stderr").write_text(result.stderr)
    return out


def loaded(match: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((match / "r.json").read_text())
    return content


def lines_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_every_rival_runs_in_turn(match: Path) -> None:
    lines = [line for line in (match / "stderr").read_text().splitlines() if "epoch" in line]
    rivals = {"full", "pbc", "pbc-nocache", "pet", "pet-bf16", "pet-cache", "piebridge"}
    rivals |= {"pet-cache-closed", "prunetrain", "full-derived"}
    # Full training was told to run one epoch, and a closed form needs no second.
    assert len(lines) == 2 * (2 * len(rivals) - 2)
    first = {line.split()[4] for line in lines[: len(rivals)]}
    assert first == rivals
    assert set(loaded(match)["rivals"]) == rivals


def test_a_rival_may_have_a_strategy_of_its_own(assets: Path, bundle: Path, tmp_path: Path) -> None:
    """Its bundle is compiled for it once, and what it trains is what that strategy trains."""
    work = tmp_path / "work"
    given = (
        "bench", bundle, assets / "photos", "--rivals", "pbc,pbc@last-k:1,pet@last-k:1",
        "--seeds", "1", "--epochs", "2", "--work", work, *QUIET, "--json",
    )  # fmt: skip
    result = pbc(*given)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("compiling bench_example_net.py:factory for last-k:1") == 1
    assert set(json.loads(result.stdout)["rivals"]) == {"pbc", "pbc@last-k:1", "pet@last-k:1"}
    trained = load_file(work / "states" / "pet@last-k:1-0.safetensors")
    assert not trained  # what a rival went on from is not kept beyond its last epoch
    other = Bundle.open(work / "bundles" / "last-k:1.pbc")
    assert other.manifest["strategy"] == "last-k:1"
    assert {name.partition(".")[0] for name in other.manifest["parameters"]} == {"fc", "stem"}
    again = pbc(*given, "--resume")
    assert again.exit_code == 0, again.output
    assert "compiling" not in again.stderr


def test_every_rival_may_get_the_rate_that_suits_it(
    assets: Path, bundle: Path, tmp_path: Path
) -> None:
    given = (
        "bench", bundle, assets / "photos", "--rivals", "pet,full-derived", "--seeds", "1",
        "--epochs", "2", "--tune-epochs", "1", "--lr-of", "full-derived=0.02", "--no-torch-compile",
        "--work", tmp_path / "work", "--json",
    )  # fmt: skip
    result = pbc(*given)
    assert result.exit_code == 0, result.output
    (told,) = [line for line in result.stderr.splitlines() if "learning rate" in line]
    tried = re.fullmatch(r"pet: learning rate (\S+) \((.+)\)", told)
    assert tried is not None
    accuracies = dict(pair.split(": ") for pair in tried[2].split(", "))
    assert list(accuracies) == ["0.001", "0.003", "0.01", "0.03"]
    assert float(accuracies[tried[1]][:-1]) == max(float(a[:-1]) for a in accuracies.values())
    protocol = json.loads(result.stdout)["protocol"]
    assert protocol["rates_of_their_own"] == {"full-derived": 0.02, "pet": float(tried[1])}
    assert not list((tmp_path / "work").glob("trial-*"))
    again = pbc(*given[:-1], "--resume")
    assert "learning rate" not in again.stderr
    assert f"sgd at 0.01 (pet {float(tried[1]):g}, full-derived 0.02)" in again.stdout


def test_the_memory_of_each_rival_is_measured_by_itself(
    assets: Path, bundle: Path, tmp_path: Path
) -> None:
    given = (
        "bench", bundle, assets / "photos", "--rivals", "pet,pbc@last-k:1", "--seeds", "1",
        "--epochs", "1", "--work", tmp_path / "work", "--memory", *QUIET,
        "-o", tmp_path / "r.json", "--html", tmp_path / "r.html",
    )  # fmt: skip
    result = pbc(*given)
    assert result.exit_code == 0, result.output
    rivals = json.loads((tmp_path / "r.json").read_text())["rivals"]
    sizes = {name: rival["facts"]["training_memory_bytes"] for name, rival in rivals.items()}
    assert all(0 < size < 2**30 for size in sizes.values())
    assert "memory of training" in result.stdout
    assert result.stderr.count("measuring the memory of") == 2
    assert "memory of training, MiB" in (tmp_path / "r.html").read_text()
    again = pbc(*given, "--resume")
    assert again.exit_code == 0, again.output
    assert "measuring the memory" not in again.stderr


@pytest.mark.parametrize(
    ("rival", "message"),
    [
        ("pbc@nosuch", "no strategy named 'nosuch'"),
        ("pbc@", "no strategy named ''"),
        ("nosuch@full", "no rival named 'nosuch'"),
        ("pbc@last-k:0", "last-k:0"),
        ("pbc@last-k:../../x", "last-k:"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(
    assets: Path, bundle: Path, tmp_path: Path, rival: str, message: str
) -> None:
    result = pbc(
        "bench", bundle, assets / "photos", "--rivals", rival, "--seeds", "1", "--epochs", "2",
        "--work", tmp_path / "work", *QUIET,
    )  # fmt: skip
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert not list(tmp_path.glob("**/*.pbc"))


def test_every_cell_is_in_the_json_and_in_the_log(match: Path) -> None:
    cells = loaded(match)["cells"]
    logged = lines_of(match / "work" / "cells.jsonl")

    def key(cell: dict[str, Any]) -> tuple[str, int, int]:
        return cell["rival"], cell["seed"], cell["epoch"]

    assert sorted(cells, key=key) == sorted(logged, key=key)
    for cell in cells:
        assert cell["seconds"] == pytest.approx(sum(cell["stage_seconds"].values()))
        assert 0 <= cell["accuracy"] <= 1
        assert sum(cell["levels"]) <= 30
        reached = [seconds for seconds, _ in cell["marks"]]
        assert reached == sorted(reached)
        assert all(0 < seconds <= cell["seconds"] for seconds in reached)
        assert not reached or cell["epoch"] == 1
    marked = {cell["rival"] for cell in cells if cell["marks"]}
    assert marked >= {"full", "pet", "pet-cache", "pbc"}


def test_the_tables_say_what_is_extrapolated(match: Path) -> None:
    printed = (match / "stdout").read_text()
    assert "full (1 of 2 epochs, time extrapolated)" in printed
    assert "its time is extrapolated" in printed
    assert "peak memory of the process" in printed
    content = loaded(match)
    assert f"energy: {content['energy_meter']}" in printed
    metered = content["energy_meter"] != "no energy meter on this machine"
    assert all((cell["energy_joules"] is not None) == metered for cell in content["cells"])
    assert "99 % of full" in printed
    said = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "label_smoothing": 0.0}
    assert said.items() <= content["protocol"].items()
    rows = list(csv.reader((match / "r.csv").read_text().splitlines()))
    assert rows[0] == ["", "Ours", "PET", "FTAll"]
    assert [row[0] for row in rows[1:]] == ["Time", "Acc.", "Epochs run"]
    assert rows[3][1:] == ["2 of 2", "2 of 2", "1 of 2"]


def test_json_agrees_with_the_csv(match: Path) -> None:
    rivals = loaded(match)["rivals"]
    rows = list(csv.reader((match / "r.csv").read_text().splitlines()))
    for column, name in enumerate(("pbc", "pet", "full"), 1):
        hours = rivals[name]["seconds"]["mean"] / 3600
        assert float(rows[1][column]) == pytest.approx(hours, rel=1e-3)
        assert float(rows[2][column]) == pytest.approx(
            100 * rivals[name]["accuracy"]["mean"], abs=0.01
        )
    assert rivals["pet-cache"]["facts"]["cache_bytes"] == 30 * 32 * 4
    assert rivals["pbc"]["facts"]["cache_bytes"] > 0
    assert not rivals["pbc-nocache"]["facts"]["cache_bytes"]
    assert rivals["pet"]["faster_than"]["pet"]["mean"] == 1


def test_the_report_is_one_file(match: Path) -> None:
    page = (match / "r.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") >= 3
    assert "prefers-color-scheme: dark" in page
    for section in (
        "Time to an accuracy", "Whole runs", "Accuracy over time", "Routing",
        "Where the time goes", "Notes",
    ):  # fmt: skip
        assert f"<h2>{section}" in page


# ---- interruptions ---------------------------------------------------------------------------


def options(assets: Path, **more: Any) -> BenchOptions:
    """Decide by given costs: two benches that measure would not route alike."""
    costs = tiny.costs(assets / "costs.json", levels=2)
    train = TrainOptions(epochs=3, learning_rate=0.1, checkpoint_seconds=1e9, costs=costs)
    return BenchOptions(train=train, seeds=2, torch_compile=False, **more)


def learnt(results: Any) -> list[tuple[Any, ...]]:
    """Return what must not depend on an interruption: all but the times."""
    return [(c.rival, c.seed, c.epoch, c.levels, c.loss, c.accuracy) for c in results.cells]


@pytest.fixture(scope="module")
def undisturbed(assets: Path, bundle: Path) -> Any:
    return compare(
        bundle, assets / "photos", options(assets), assets / "undisturbed", lambda _: None
    )


@pytest.mark.parametrize("cells", [1, 8, 17, 26])
def test_a_resumed_bench_ends_like_an_undisturbed_one(
    assets: Path, bundle: Path, undisturbed: Any, tmp_path: Path, cells: int
) -> None:
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        compare(bundle, assets / "photos", options(assets), work, bench_net.stop_after(cells))
    lines: list[str] = []
    resumed = compare(bundle, assets / "photos", options(assets, resume=True), work, lines.append)
    assert learnt(resumed) == learnt(undisturbed)
    assert sum(line.startswith("seed ") for line in lines) == 44 - cells


def test_a_resumed_bench_counts_no_preparation_twice(
    assets: Path, bundle: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    one = options(assets, rivals=("pbc", "pet-cache"))
    with pytest.raises(KeyboardInterrupt):
        compare(bundle, assets / "photos", one, work, bench_net.stop_after(2))
    again = options(assets, rivals=("pbc", "pet-cache"), resume=True)
    resumed = compare(bundle, assets / "photos", again, work, lambda _: None)
    second = [cell for cell in resumed.cells if cell.epoch == 2 and cell.seed == 0]
    assert len(second) == 2
    for cell in second:
        assert cell.stage_seconds["prefix"] < 1e-4


def test_the_evaluation_is_in_no_rivals_time(
    assets: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = Evaluator.accuracy

    def slow(self: Evaluator, parameters: Any) -> float:
        time.sleep(0.5)
        return accuracy(self, parameters)

    monkeypatch.setattr(Evaluator, "accuracy", slow)
    results = compare(
        bundle,
        assets / "photos",
        options(assets, rivals=("pbc", "pet")),
        tmp_path / "w",
        lambda _: None,
    )
    later = [cell for cell in results.cells if cell.epoch > 1]
    assert len(later) == 8
    assert all(cell.seconds < 0.4 for cell in later)


def test_a_killed_bench_goes_on(assets: Path, bundle: Path, tmp_path: Path) -> None:
    words = [
        "bench", str(bundle), str(assets / "photos"), "--rivals", "pet,pet-cache,full",
        "--seeds", "1", "--epochs", "40", "--work", str(tmp_path / "work"), *QUIET,
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", "from pbc.cli import main; main()", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    log = tmp_path / "work" / "cells.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = log.read_text().count("\n")
    assert 5 <= before < 120
    result = pbc(*words, "--resume")
    assert result.exit_code == 0, result.output
    cells = lines_of(log)
    assert sorted((c["rival"], c["epoch"]) for c in cells) == sorted(
        (rival, epoch + 1) for rival in ("pet", "pet-cache", "full") for epoch in range(40)
    )


def test_ctrl_c_says_how_to_go_on(
    assets: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbc.cli.bench._tell", bench_net.stop_after(2))
    words = ["bench", bundle, assets / "photos", "--rivals", "pet", "--epochs", "3"]
    result = pbc(*words, "--work", tmp_path / "w", *QUIET)
    assert result.exit_code == 130
    assert "--resume goes on from here" in result.stderr


# ---- what it refuses -------------------------------------------------------------------------


def first(assets: Path, bundle: Path, work: Path) -> Callable[..., Result]:
    def run(*more: str | Path, rivals: str = "pet", epochs: int = 1) -> Result:
        return pbc(
            "bench", bundle, assets / "photos", "--rivals", rivals, "--epochs", str(epochs),
            "--seeds", "1", "--work", work, *QUIET, *more,
        )  # fmt: skip

    assert run().exit_code == 0
    return run


def test_another_bench_is_never_mixed_in(assets: Path, bundle: Path, tmp_path: Path) -> None:
    run = first(assets, bundle, tmp_path / "work")
    refused = run()
    assert refused.exit_code == 1
    assert "holds a bench already: --resume goes on with it" in refused.stderr
    refused = run("--resume", epochs=2)
    assert refused.exit_code == 1
    assert "it was started with epochs 1, not 2; --overwrite starts again" in refused.stderr
    refused = run("--resume", "--seeds", "1", rivals="pet,pet-cache")
    assert "it was started with rivals" in refused.stderr
    (tmp_path / "other").mkdir()
    tiny.photos(tmp_path / "other", 8, seed=5)
    refused = pbc(
        "bench", bundle, tmp_path / "other", "--rivals", "pet", "--epochs", "1", "--seeds", "1",
        "--work", tmp_path / "work", *QUIET, "--resume",
    )  # fmt: skip
    assert "it was started with another training data" in refused.stderr
    assert run("--resume").exit_code == 0
    more = run("--resume", "--seeds", "2")  # another seed is another cell, not another bench
    assert "seed 1  epoch 1/1  pet" in more.stderr
    assert "seed 0" not in more.stderr
    assert run("--overwrite", epochs=2).exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rivals", "pet,pett"], "no rival named 'pett'; did you mean 'pet'?"),
        (["--rivals", ","], "--rivals is empty"),
        (["--seeds", "0"], "--seeds is 0; expected 1 or more"),
        (["--epochs-of", "full=2", "--rivals", "pet"], "--epochs-of names 'full'"),
        (["--epochs-of", "pet"], "--epochs-of is 'pet'; expected NAME=VALUE"),
        (["--epochs-of", "pet=none"], "--epochs-of pet is 'none'; expected a whole number"),
        (["--lr-of", "pet=high"], "--lr-of pet is 'high'; expected a number"),
        (["--lr-of", "pet=-1"], "--lr-of pet is -1; it must be above 0"),
        (["--rivals", "pet", "--accuracy-budgets"], "--accuracy-budgets needs 'full'"),
        (["--momentum", "1"], "the momentum is 1.0; it must be at least 0 and below 1"),
        (["--weight-decay", "-1"], "the weight decay is -1.0; it must be at least 0"),
        (["--sweep", "level"], "no sweep named 'level'; did you mean 'levels'?"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["-o", "/no/such/folder/r.json"], "the folder of /no/such/folder/r.json"),
    ],
)
def test_bad_options_are_one_line(
    assets: Path, bundle: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    result = pbc("bench", bundle, assets / "photos", "--work", tmp_path / "w", *QUIET, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_a_rival_that_cannot_run_is_left_out(
    assets: Path, tmp_path: Path, install_plugin: Callable[..., None]
) -> None:
    moved = bench_net.compiled(tmp_path / "net")
    (tmp_path / "net" / "bench_example_net.py").unlink()
    result = pbc(
        "bench", moved.path, assets / "photos", "--rivals", "pet,pbc", "--epochs", "1",
        "--seeds", "1", "-o", tmp_path / "r.json", "--work", tmp_path / "w", *QUIET,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "pet is left out: no model file" in result.stderr
    content = json.loads((tmp_path / "r.json").read_text())
    assert list(content["rivals"]) == ["pbc"]
    assert any("pet is left out" in note for note in content["notes"])
    alone = pbc(
        "bench", moved.path, assets / "photos", "--rivals", "pet", "--epochs", "1",
        "--work", tmp_path / "alone", *QUIET,
    )  # fmt: skip
    assert alone.exit_code == 1
    assert "error: no rival could run: pet is left out" in alone.stderr


RIVAL = '''
import numpy as np
from pbc.bench.rival import EpochTimes


class Lazy:
    """Does nothing at all."""

    def __init__(self, setting):
        self.setting = setting
        self.epoch = 0

    def prepare(self, state):
        self.epoch = 0 if state is None else int(state["epoch"][0])

    def run_epoch(self):
        self.epoch += 1
        return EpochTimes(0.5, {"forward": 0.5}, (len(self.setting.samples),), 1.0)

    def parameters(self):
        return None

    def evaluate(self, samples):
        return 0.25

    def state(self):
        return {"epoch": np.array([self.epoch])}

    def facts(self):
        return {"notes": ["slept well"]}
'''


def test_a_rival_without_its_package(
    assets: Path,
    bundle: Path,
    tmp_path: Path,
    install_plugin: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "import a_package_that_does_not_exist\n" + RIVAL
    install_plugin("acme", "[pbc.rivals]\nlazy = acme_plugin:Lazy\n", source)
    words = ("bench", bundle, assets / "photos", "--epochs", "1", "--seeds", "1", *QUIET)
    refused = pbc(*words, "--rivals", "lazy,pbc", "--work", tmp_path / "a")
    assert refused.exit_code == 1
    needs = "a_package_that_does_not_exist, which is not installed"
    assert f"error: rival lazy needs {needs}, or leave it out of --rivals" in refused.stderr
    # It was not asked for by name: the rivals whose packages are installed run.
    monkeypatch.setattr("pbc.cli.bench.RIVALS", ("lazy", "pbc"))
    report = tmp_path / "r.json"
    result = pbc(*words, "--work", tmp_path / "b", "-o", report, "--json")
    assert result.exit_code == 0, result.output
    said = f"lazy is left out: it needs {needs}"
    assert said in result.stderr.splitlines()
    content = json.loads(report.read_text())
    assert json.loads(result.stdout) == content
    assert f"wrote {report}" in result.stderr
    assert list(content["rivals"]) == ["pbc"]
    assert content["notes"].count(said) == 1


def test_a_diverged_rival_is_left_out(
    assets: Path, bundle: Path, tmp_path: Path, install_plugin: Callable[..., None]
) -> None:
    source = RIVAL.replace("samples),), 1.0)", 'samples),), float("nan"))')
    install_plugin("acme", "[pbc.rivals]\nlazy = acme_plugin:Lazy\n", source)
    result = pbc(
        "bench", bundle, assets / "photos", "--rivals", "lazy,pet", "--epochs", "1",
        "--seeds", "1", "-o", tmp_path / "r.json", "--work", tmp_path / "w", *QUIET,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = "lazy is left out: the loss of seed 0, epoch 1 is nan; --lr-of lazy=X"
    assert said in result.stderr
    assert "NaN" not in (tmp_path / "r.json").read_text()
    assert list(loaded(tmp_path)["rivals"]) == ["pet"]


def test_another_distribution_may_bring_a_rival(
    assets: Path, bundle: Path, tmp_path: Path, install_plugin: Callable[..., None]
) -> None:
    install_plugin("acme", "[pbc.rivals]\nlazy = acme_plugin:Lazy\n", RIVAL)
    result = pbc(
        "bench", bundle, assets / "photos", "--rivals", "lazy", "--epochs", "2", "--seeds", "1",
        "-o", tmp_path / "r.json", "--work", tmp_path / "w", *QUIET,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lazy = json.loads((tmp_path / "r.json").read_text())["rivals"]["lazy"]
    assert lazy["seconds"]["mean"] == 1.0
    assert lazy["accuracy"]["mean"] == 0.25
    assert "note: lazy: slept well" in result.stdout


def test_the_learning_rate_is_tuned_once(assets: Path, bundle: Path, tmp_path: Path) -> None:
    words = ["bench", bundle, assets / "photos", "--rivals", "pet-cache", "--epochs", "1",
             "--seeds", "1", "--work", tmp_path / "w", "--no-torch-compile"]  # fmt: skip
    result = pbc(*words)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("validation accuracy") == 3
    assert "tuned for PET on 6 of the training photos" in result.stderr
    again = pbc(*words, "--resume")
    assert again.exit_code == 0, again.output
    assert "validation accuracy" not in again.stderr


def test_a_damaged_state_is_one_line(assets: Path, bundle: Path, tmp_path: Path) -> None:
    run = first(assets, bundle, tmp_path / "work")
    (tmp_path / "work" / "states" / "pet-0.safetensors").write_bytes(b"nothing")
    refused = run("--resume")
    assert refused.exit_code == 1
    assert "is damaged" in refused.stderr
    with pytest.raises(PbcError, match="--overwrite starts again"):
        Work(tmp_path / "work").load("pet", 0)
