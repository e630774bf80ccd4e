"""Training through the command line and the runtime: results, interruptions, bad input."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import safetensors.numpy
import tiny
from killing import Killed, killed_until_done

from pbc import bundle
from pbc.cli import main
from pbc.cli.display import epoch_line, level_shares
from pbc.data import ImageFolder, read_image
from pbc.errors import PbcError, UsageError
from pbc.runtime.evaluation import wilson
from pbc.runtime.events import EpochReport, Event, Report, StepReport
from pbc.runtime.features import cache as feature_cache
from pbc.runtime.loop import Steps
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.checkpoint import Checkpoint
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.util import processor
from pbc.util.extras import install

LR = ("--lr", "0.1")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of each kind, photos to train on and photos to test on; read only."""
    root = tmp_path_factory.mktemp("assets")
    tiny.photos(root / "photos", 10)
    tiny.photos(root / "test", 6, seed=1)
    for kind in ("probe", "maps", "bodies", "whole"):
        tiny.write(root / f"{kind}.pbc", kind)
    tiny.costs(root / "costs.json")
    return root


@pytest.fixture
def run(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a pbc command in a fresh folder, with @ standing for the assets.

    Training decides by the same costs in all tests, so that equal runs end at equal bits.
    """
    monkeypatch.chdir(tmp_path)

    def call(*args: str, fails: int = 0) -> Result:
        if args[0] == "train" and "--costs" not in args:
            args = (*args, "--costs", "@costs.json")
        if args[0] == "train" and "--val" not in args:
            args = (*args, "--val", "none")
        if args[0] == "train" and "--head" not in args:
            args = (*args, "--head", "sgd")  # these tests watch epochs
        words = [word.replace("@", f"{assets}/") for word in args]
        result = click.testing.CliRunner().invoke(main, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == fails, result.output
        if fails == 1:
            assert result.stderr.count("\n") == 1, result.stderr
        return result

    return call


Result = click.testing.Result
Run = Callable[..., Result]


def theta(out: str | Path) -> bytes:
    return (Path(out) / "trainable.safetensors").read_bytes()


def metrics(out: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# ---- results -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_train_eval_predict(run: Run, optimizer: str) -> None:
    lr = "0.2" if optimizer == "sgd" else "0.05"
    result = run(
        "train", "@probe.pbc", "@photos", "--val", "@test", "-o", "mine", "--epochs", "12",
        "--lr", lr, "--optimizer", optimizer, "--no-skip",
    )  # fmt: skip
    assert "epoch 12/12  loss 0." in result.stderr
    report = json.loads(run("eval", "mine", "@test", "--json").stdout)
    assert report["accuracy"] > 0.8
    assert report["count"] == 18
    assert result.stdout.startswith(f"accuracy {report['accuracy']:.2%} on 18 samples (95 %")
    assert "\nwrote mine\nnext:\n  pbc predict mine PHOTO.jpg" in result.stdout
    assert "accuracy" in run("eval", "mine", "@test", "--level", "2").stdout
    (row,) = json.loads(run("predict", "mine", "@photos/red/001.png", "--json").stdout)
    assert row["image"].endswith("red/001.png")
    shares = [entry["probability"] for entry in row["classes"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    table = run("predict", "mine", "@photos/red/001.png", "@photos/blue/001.png", "--top", "1")
    assert "%" in table.stdout


def test_the_folder_of_a_personal_model(run: Run, assets: Path) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "mine", "--epochs", "2", *LR)
    out = Path("mine")
    model = json.loads((out / "model.json").read_text())
    runtime = Runtime.open(assets / "probe.pbc")
    assert model["bundle"] == runtime.bundle.digest
    assert model["classes"] == ["blue", "green", "red"]
    assert model["options"]["learning_rate"] == 0.1
    assert model["batch"] == 4
    assert (out / "bundle.pbc").read_bytes() == (assets / "probe.pbc").read_bytes()
    assert safetensors.numpy.load(theta(out))["head.weight"].shape == (3, tiny.CHANNELS)
    for name in ("model.json", "trainable.safetensors", "checkpoint.safetensors", "metrics.jsonl"):
        assert (out / name).stat().st_mode & 0o777 == 0o600
    lines = metrics(out)
    assert [line.get("epoch") for line in lines] == [1, 2, None]
    assert sum(lines[0]["levels"]) == 30
    assert lines[0]["peak_memory_bytes"] > 0
    assert lines[0]["seconds"] == pytest.approx(sum(lines[0]["stage_seconds"].values()))
    assert lines[-1] == {"final": True, "epochs": 2}


def test_a_bundle_that_is_overwritten_in_place_leaves_the_model_whole(
    run: Run, assets: Path
) -> None:
    shutil.copy(assets / "probe.pbc", "b.pbc")
    run("train", "b.pbc", "@photos", "-o", "mine", "--epochs", "1", *LR)
    with Path("b.pbc").open("r+b") as file:
        file.write(b"something else")
    run("eval", "mine", "@photos")


def test_a_zip_and_a_bundle_folder(run: Run, tmp_path: Path, assets: Path) -> None:
    shutil.make_archive("photos", "zip", assets, "photos")
    tiny.write(tmp_path / "folder", as_folder=True)
    run("train", "folder", "photos.zip", "-o", "a", "--epochs", "1")
    run("train", "@probe.pbc", "@photos", "-o", "b", "--epochs", "1")
    assert theta("a") == theta("b")
    run("eval", "a", "@test")


SETTINGS = [
    ("probe", []),
    ("probe", ["--cache", "ram"]),
    ("probe", ["--cache", "disk", "--optimizer", "adam"]),
    ("probe", ["--optimizer", "adamw", "--weight-decay", "0.1", "--label-smoothing", "0.1"]),
    ("maps", ["--cache", "ram", "--cache-dtype", "float16"]),
    ("bodies", ["--cache", "disk"]),
    ("whole", ["--no-routing"]),
]


@pytest.mark.parametrize(("kind", "options"), SETTINGS)
def test_the_same_seed_gives_the_same_bits(run: Run, kind: str, options: list[str]) -> None:
    for out in ("a", "b"):
        run("train", f"@{kind}.pbc", "@photos", "-o", out, "--epochs", "3", *LR, *options)
    assert theta("a") == theta("b")
    run("train", f"@{kind}.pbc", "@photos", "-o", "c", "--epochs", "3", *options, "--seed", "1")
    assert theta("a") != theta("c")


def test_the_kind_of_cache_changes_no_bit(run: Run) -> None:
    for cache in ("ram", "disk"):
        run("train", "@maps.pbc", "@photos", "-o", cache, "--epochs", "2", *LR, "--cache", cache)
    assert theta("ram") == theta("disk")


def test_without_routing_a_cache_gives_the_accuracy_of_none(run: Run, tmp_path: Path) -> None:
    common = ["--epochs", "2", *LR, "--no-routing", "--no-skip"]
    for cache in ("off", "ram"):
        run("train", "@probe.pbc", "@photos", "-o", cache, *common, "--cache", cache)
    one, two = (safetensors.numpy.load(theta(out)) for out in ("off", "ram"))
    for name, value in one.items():
        np.testing.assert_allclose(value, two[name], atol=1e-5)


@pytest.mark.parametrize(("kind", "routing"), [("maps", False), ("bodies", True)])
def test_a_cache_that_holds_a_part_gives_what_none_gives(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, routing: bool
) -> None:
    def every_third(samples: int, capacity: int, seed: int) -> np.ndarray:
        index = np.arange(samples)
        return np.where(index % 3 == 0, index // 3, -1)

    monkeypatch.setattr(feature_cache, "assign_slots", every_third)
    runtime = Runtime.open(assets / f"{kind}.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    trained = []
    for cache in ("off", "ram", "disk"):
        options = TrainOptions(
            2, 0.1, skip=False, routing=routing, cache=cache, costs=assets / "costs.json"
        )
        runtime.fit(samples, options, tmp_path / cache)
        trained.append(safetensors.numpy.load(theta(tmp_path / cache)))
        stages = metrics(tmp_path / cache)[1]["stage_seconds"]
        assert stages["prefix"] > 0
        assert (stages["cache"] > 0) == (cache != "off")
    for name, value in trained[0].items():
        np.testing.assert_allclose(value, trained[1][name], atol=1e-5)
        np.testing.assert_array_equal(trained[1][name], trained[2][name])


def test_routing_uses_cheaper_levels_and_no_routing_does_not(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    run("train", "@probe.pbc", "@photos", "-o", "b", "--epochs", "1", "--no-routing")
    run("train", "@probe.pbc", "@photos", "-o", "c", "--epochs", "1", "--fidelity-floor", "0.95")
    low = ["--fidelity-floor", "0.3", "--batch", "1"]
    run("train", "@probe.pbc", "@photos", "-o", "d", "--epochs", "1", *low)
    a, b, c, d = (metrics(out)[0]["levels"] for out in "abcd")
    assert sum(a[1:]) > 0
    assert b == [30, 0, 0]
    assert c[2] == 0  # the ladder's level 2 has 0.93
    assert d[2] > 0
    capped = ["--fidelity-floor", "0.3", "--max-level", "1"]
    run("train", "@probe.pbc", "@photos", "-o", "f", "--epochs", "1", *capped)
    assert metrics("f")[0]["levels"][1] > 0
    assert metrics("f")[0]["levels"][2] == 0
    result = run(
        "train", "@probe.pbc", "@photos", "-o", "e", "--epochs", "1", "--fidelity-floor", "0.99"
    )
    assert "the bundle has no proxy of fidelity 0.99: every sample runs at level 0" in result.stderr
    assert metrics("e")[0]["levels"] == [30, 0, 0]


def test_a_bundle_without_a_policy_or_aligned_levels(run: Run, tmp_path: Path) -> None:
    tiny.write(tmp_path / "m.pbc", policy=False)
    result = run("train", "m.pbc", "@photos", "-o", "a", "--epochs", "1")
    assert "the bundle has no policy: every sample runs at level 0" in result.stderr
    tiny.write(tmp_path / "u.pbc", fidelities=(None, None))
    result = run("train", "u.pbc", "@photos", "-o", "b", "--epochs", "1")
    assert "no proxy of fidelity 0.8: every sample" in result.stderr


def test_skipped_updates(run: Run) -> None:
    paper = ["--epochs", "3", *LR, "--scheduler", "piebridge"]
    run("train", "@probe.pbc", "@photos", "-o", "a", *paper)
    run("train", "@probe.pbc", "@photos", "-o", "b", *paper, "--no-skip")
    assert sum(line.get("skipped_updates", 0) for line in metrics("a")) > 0
    assert sum(line.get("skipped_updates", 0) for line in metrics("b")) == 0


def test_skipped_samples(run: Run) -> None:
    epochs = ["--epochs", "12", *LR, "--cache", "off"]
    run("train", "@probe.pbc", "@photos", "-o", "a", *epochs)
    result = run("train", "@probe.pbc", "@photos", "-o", "b", *epochs, "--no-skip")
    skipped = [line["skipped_samples"] for line in metrics("a")[:-1]]
    assert skipped[0] == skipped[10] == skipped[11] == 0
    assert sum(skipped) > 30
    assert all(sum(line["levels"]) + line["skipped_samples"] == 30 for line in metrics("a")[:-1])
    assert "skipped" not in result.stderr
    assert not any(line["skipped_samples"] for line in metrics("b")[:-1])


def test_a_cache_without_a_prefix_is_off_and_says_so(run: Run) -> None:
    result = run("train", "@whole.pbc", "@photos", "-o", "a", "--epochs", "1", "--cache", "ram")
    assert "--cache ram is off: with linear-probe nothing is frozen before" in result.stderr


def test_a_batch_larger_than_the_set_trains_short(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "2", "--batch", "500")
    assert [line.get("steps") for line in metrics("a")] == [1, 1, None]


def test_batches_of_one(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1", "--batch", "1")
    assert metrics("a")[0]["steps"] == 30


def test_a_script_does_what_the_commands_do(run: Run, assets: Path, tmp_path: Path) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "2", *LR)
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    events: list[Event] = []
    options = TrainOptions(epochs=2, learning_rate=0.1, costs=assets / "costs.json")
    result = runtime.fit(samples, options, "b", val=samples, report=events.append)
    assert theta("a") == theta("b")
    steps = [event for event in events if isinstance(event, StepReport)]
    assert [step.step for step in steps] == [*range(1, 9)] * 2
    assert steps[-1].samples == steps[-1].total == 30
    personal = Personal.open("b")
    assert result is not None
    assert personal.evaluate(samples) == result.evaluation
    best = personal.predict(read_image(assets / "photos" / "red" / "000.png", runtime.spec))
    assert {name for name, _ in best} == {"blue", "green", "red"}
    trainer = runtime.trainer(samples, options, "c")
    Path("c").mkdir()
    trainer.prepare()
    while not trainer.finished:
        trainer.run_epoch()
    trainer.finish()
    assert theta("c") == theta("a")


# ---- what it learnt --------------------------------------------------------------------------


def test_a_fifth_is_held_out_and_the_result_told(run: Run, tmp_path: Path) -> None:
    tiny.photos(tmp_path / "mixed", 10)
    for index in range(5):  # green photos among the red ones cannot be told apart
        (tmp_path / "mixed/green" / f"00{index}.png").rename(
            tmp_path / "mixed/red" / f"green{index}.png"
        )
    result = run("train", "@probe.pbc", "mixed", "--val", "0.4", "-o", "mine", "--epochs", "3")
    assert "18 photos to train on, 12 to measure the result on" in result.stderr
    told = json.loads(Path("mine/validation.json").read_text())
    assert Path("mine/validation.json").stat().st_mode & 0o777 == 0o600
    rights = sum(row["right"] for row in told["classes"])
    assert [row["count"] for row in told["classes"]] == [4, 2, 6]
    assert told["accuracy"] == rights / 12
    assert told["interval"] == pytest.approx(wilson(rights, 12))
    assert len(told["wrong"]) == 12 - rights > 0
    for wrong in told["wrong"]:
        assert wrong["class"] != wrong["answer"]
        assert wrong["class"] == Path(wrong["photo"]).parent.name
        answers = json.loads(run("predict", "mine", wrong["photo"], "--json").stdout)
        assert answers[0]["classes"][0]["class"] == wrong["answer"]
        assert answers[0]["classes"][0]["probability"] == pytest.approx(wrong["probability"])
    assert result.stdout.startswith(f"accuracy {rights / 12:.2%} on 12 samples (95 %")
    assert "worst classes: " in result.stdout
    assert f"\n  {told['wrong'][0]['photo']}: taken for {told['wrong'][0]['answer']} (" in (
        result.stdout
    )
    assert "mixed --val none -o mine-all" in result.stdout
    run("forget", "mine")
    assert not Path("mine/validation.json").exists()


def test_without_say_a_fifth_is_held_out(assets: Path, tmp_path: Path) -> None:
    words = command(assets, tmp_path / "mine", "--epochs", "1")
    at = words.index("--val")
    done = subprocess.run(words[:at] + words[at + 2 :], capture_output=True, text=True, check=True)
    assert "24 photos to train on, 6 to measure the result on" in done.stderr
    assert " on 6 samples " in done.stdout


def test_a_resumed_run_holds_out_the_same_photos(run: Run) -> None:
    share = ["--val", "0.2", *LR, "--no-skip"]
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "2", *share)
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "4", "--resume", *share)
    run("train", "@probe.pbc", "@photos", "-o", "b", "--epochs", "4", *share)
    assert theta("a") == theta("b")
    assert Path("a/validation.json").read_text() == Path("b/validation.json").read_text()
    other = ["train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "4", "--resume"]
    assert "with other photos to train on" in run(*other, "--val", "0.4", fails=1).stderr
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1", "--overwrite")
    assert not Path("a/validation.json").exists()


@pytest.mark.parametrize("val", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_share_that_is_none(run: Run, val: str) -> None:
    result = run("train", "@probe.pbc", "@photos", "-o", "a", "--val", val, fails=2)
    assert f"{val} is no share of the photos" in result.stderr
    assert not Path("a").exists()


def test_classes_too_small_to_hold_any_out(run: Run) -> None:
    tiny.photos(Path("few"), 2)
    result = run("train", "@probe.pbc", "few", "-o", "a", "--val", "0.2", "--epochs", "1")
    assert "accuracy not measured: no class has enough photos" in result.stdout
    assert not Path("a/validation.json").exists()


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(9, 10, 0.5958, 0.9821), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 1, 0.2065, 1.0)],
)
def test_the_interval_is_wilson_s(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


# ---- interruptions -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [
    ("probe", {}),
    ("probe", {"cache": "ram"}),
    ("maps", {"cache": "disk", "optimizer": "adam"}),
    ("bodies", {"cache": "ram", "cache_dtype": "float16"}),
    ("whole", {"optimizer": "adam"}),
])  # fmt: skip
@pytest.mark.parametrize("every", [0.0, 0.005])
def test_a_run_killed_at_many_steps_resumes_to_the_same_bits(
    assets: Path, tmp_path: Path, kind: str, options: dict[str, Any], every: float
) -> None:
    runtime = Runtime.open(assets / f"{kind}.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    settings = TrainOptions(
        epochs=4,
        learning_rate=0.1,
        checkpoint_seconds=every,
        costs=assets / "costs.json",
        **options,
    )
    runtime.fit(samples, settings, tmp_path / "whole")
    out = tmp_path / "killed"

    def train(report: Report) -> None:
        runtime.fit(samples, settings, out, resume=True, report=report)

    killed_until_done(train, 3, (1, 14))
    assert theta(out) == theta(tmp_path / "whole")
    whole, resumed = metrics(tmp_path / "whole"), metrics(out)
    for key in ("epoch", "loss", "levels", "steps", "skipped_updates", "skipped_samples"):
        assert [line.get(key) for line in whole] == [line.get(key) for line in resumed]


def command(assets: Path, out: Path, *options: str) -> list[str]:
    words = ["train", str(assets / "maps.pbc"), str(assets / "photos"), "-o", str(out)]
    code = "from pbc.cli import main; main()"
    return [sys.executable, "-c", code, *words, "--lr", "0.1", "--checkpoint-seconds", "0",
            "--cache", "disk", "--epochs", "30", "--alpha", "0.5", "--head", "sgd",
            "--costs", str(assets / "costs.json"), "--val", "none", *options]  # fmt: skip


def test_kill_9_at_random_moments(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    kills, moments = 0, random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(
            command(assets, out, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = (out / "checkpoint.safetensors").stat().st_mtime_ns if out.exists() else None
        while process.poll() is None:
            try:
                # Not before this life has come to write: importing takes longer than training.
                if (out / "checkpoint.safetensors").stat().st_mtime_ns != before:
                    break
            except FileNotFoundError:
                pass
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    runtime = Runtime.open(assets / "maps.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    options = TrainOptions(
        epochs=30,
        learning_rate=0.1,
        cache="disk",
        alpha=0.5,
        checkpoint_seconds=1e9,
        costs=assets / "costs.json",
    )
    runtime.fit(samples, options, out, resume=True)
    runtime.fit(samples, options, tmp_path / "whole")
    assert theta(out) == theta(tmp_path / "whole")
    assert len(metrics(out)) == 31
    assert not list(out.glob(".*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_exits_with_130(
    assets: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    words = command(assets, out, "--checkpoint-seconds", "1000", "--epochs", "100000")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("epoch 1/")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "the same command with --resume goes on from here" in stderr
    assert "Traceback" not in stderr
    facts = Checkpoint.load(out / "checkpoint.safetensors").facts
    assert facts["epoch"] >= 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_two_steps_loses_nothing(
    assets: Path, tmp_path: Path, number: signal.Signals
) -> None:
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    handler = signal.getsignal(number)
    settings = TrainOptions(
        epochs=2, learning_rate=0.1, checkpoint_seconds=1e9, costs=assets / "costs.json"
    )
    runtime.fit(samples, settings, tmp_path / "whole")

    def press(event: Event) -> None:
        if isinstance(event, StepReport) and (event.epoch, event.step) == (2, 3):
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        runtime.fit(samples, settings, tmp_path / "out", report=press)
    facts = Checkpoint.load(tmp_path / "out" / "checkpoint.safetensors").facts
    assert (facts["epoch"], facts["step"]) == (1, 3)
    runtime.fit(samples, settings, tmp_path / "out", resume=True)
    assert theta(tmp_path / "out") == theta(tmp_path / "whole")
    assert signal.getsignal(number) is handler


def test_training_in_another_thread(assets: Path, tmp_path: Path) -> None:
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    thread = threading.Thread(
        target=runtime.fit, args=(samples, TrainOptions(epochs=1), tmp_path / "out")
    )
    thread.start()
    thread.join()
    assert (tmp_path / "out" / "model.json").exists()


def test_resuming_a_finished_run_changes_nothing_and_more_epochs_go_on(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "3", "--no-skip")
    before = theta("a")
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "3", "--no-skip", "--resume")
    assert theta("a") == before
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "5", "--no-skip", "--resume")
    run("train", "@probe.pbc", "@photos", "-o", "b", "--epochs", "5", "--no-skip")
    assert theta("a") == theta("b")
    assert [line.get("epoch") for line in metrics("a")] == [1, 2, 3, 4, 5, None]
    fewer = ["--epochs", "4", "--no-skip", "--resume"]
    result = run("train", "@probe.pbc", "@photos", "-o", "a", *fewer, fails=1)
    assert "cannot resume a: 5 epochs are done already, not 4" in result.stderr


def test_resuming_something_else_names_the_difference(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    for change, message in (
        (["@probe.pbc", "@photos", "--seed", "1"], "started with seed 0, not 1"),
        (["@probe.pbc", "@photos", "--batch", "8"], "started with batch 4, not 8"),
        (["@probe.pbc", "@photos", "--lr", "1"], "started with learning_rate 0.01, not 1.0"),
        (["@probe.pbc", "@photos", "--momentum", "0"], "started with momentum 0.9, not 0.0"),
        (["@probe.pbc", "@photos", "--weight-decay", "1"], "started with weight_decay 0.0, not 1"),
        (["@probe.pbc", "@photos", "--label-smoothing", "0.1"], "with label_smoothing 0.0, not 0."),
        (["@probe.pbc", "@test"], "started with other photos to train on"),
        (["@maps.pbc", "@photos"], "started with another bundle"),
    ):
        result = run("train", *change, "-o", "a", "--epochs", "1", "--resume", fails=1)
        assert message in result.stderr


def test_resuming_nothing_starts_at_the_beginning(run: Run) -> None:
    result = run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1", "--resume")
    assert "no checkpoint in a: starting at the beginning" in result.stderr


def test_a_folder_that_holds_a_run_is_not_overwritten_by_accident(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    result = run("train", "@maps.pbc", "@photos", "-o", "a", fails=1)
    assert "a holds a run already: --resume goes on with it" in result.stderr
    run("train", "@maps.pbc", "@photos", "-o", "a", "--epochs", "1", "--overwrite")
    run("train", "@maps.pbc", "@photos", "-o", "b", "--epochs", "1")
    assert theta("a") == theta("b")
    run("eval", "a", "@test")
    assert len(metrics("a")) == 2
    run("train", "@maps.pbc", "@photos", "-o", "a", "--overwrite", "--resume", fails=2)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--costs", "gone.json"], "cannot read gone.json", 1),
        (["--scheduler", "pie"], "no scheduler named 'pie'", 2),
        (["--selector", "elastc"], "no selector named 'elastc'", 2),
        (["--selector", "elastic", "--head", "closed"], "a head in closed form has no steps", 2),
        (["--patience", "2", "--val", "none", "--head", "sgd"], "need held-out photos", 2),
    ],
)
def test_a_run_that_cannot_be_leaves_the_one_that_it_was_to_overwrite(
    run: Run, words: list[str], message: str, code: int
) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    before = theta("a")
    result = run("train", "@probe.pbc", "@photos", "-o", "a", "--overwrite", *words, fails=code)
    assert message in result.stderr
    assert theta("a") == before
    run("eval", "a", "@test")


def contents(root: Path) -> dict[str, bytes]:
    """Return what a run is made of; its costs are this device's."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != "costs.json")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_a_run_stays_until_what_overwrites_it_has_something(assets: Path, tmp_path: Path) -> None:
    runtime, other = (Runtime.open(assets / f"{kind}.pbc") for kind in ("probe", "maps"))
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    settings = TrainOptions(
        epochs=2, learning_rate=0.1, checkpoint_seconds=0, costs=assets / "costs.json"
    )
    other.fit(samples, settings, tmp_path / "whole")
    out, earlier, kept, lost = tmp_path / "out", tmp_path / "earlier", 0, 0
    runtime.fit(samples, settings, earlier, val=samples)
    for life in range(1000):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(earlier, out)
        left = life

        def kill(event: Event) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            other.fit(samples, settings, out, overwrite=True, report=kill)
        except Killed:
            if contents(out) == contents(earlier):
                kept += 1
                assert lost == 0
                continue
            lost += 1
            other.fit(samples, settings, out, resume=True)
            assert theta(out) == theta(tmp_path / "whole")
            assert len(metrics(out)) == 3
            assert not (out / "validation.json").exists()
        else:
            break
    assert kept > 2
    assert lost > 2
    assert theta(out) == theta(tmp_path / "whole")


def test_a_run_stays_where_what_was_to_overwrite_it_strays_off(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    before = contents(Path("a"))
    words = ["--cache", "off", "--lr", "1e30", "--overwrite"]
    result = run("train", "@whole.pbc", "@photos", "-o", "a", *words, fails=1)
    assert "and start again with --overwrite; the earlier run is still in a" in result.stderr
    assert contents(Path("a")) == before


def test_ctrl_c_says_which_run_it_leaves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1"]
    run(*words)

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runtime, "fit", interrupted)
    result = run(*words, "--overwrite", fails=130)
    assert result.stderr.splitlines()[-1] == "interrupted: a holds what it held before"


def test_ctrl_c_goes_on_with_the_run_that_overwrites_another(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1"]
    run(*words)

    def press(learner: Steps, *given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return learn(learner, *given)

    learn = Steps.learn
    monkeypatch.setattr(Steps, "learn", press)
    result = run(*words, "--overwrite", fails=130)
    assert "with --resume instead of --overwrite goes on from here" in result.stderr
    facts = Checkpoint.load(Path("a/checkpoint.safetensors")).facts
    assert (facts["epoch"], facts["step"]) == (0, 1)


def test_two_runs_do_not_share_a_folder(assets: Path, tmp_path: Path) -> None:
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)

    def again(event: Event) -> None:
        with pytest.raises(PbcError, match="another run is training in"):
            runtime.fit(samples, TrainOptions(), tmp_path)

    runtime.fit(samples, TrainOptions(epochs=1), tmp_path, report=again)


def test_an_unfinished_run_is_no_personal_model(assets: Path, tmp_path: Path) -> None:
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    with pytest.raises(PbcError, match=r"holds no personal model; pbc train makes one"):
        Personal.open(tmp_path)

    def kill(event: Event) -> None:
        raise Killed

    with pytest.raises(Killed):
        runtime.fit(samples, TrainOptions(routing=False, cache="off"), tmp_path, report=kill)
    with pytest.raises(PbcError, match=r"holds no personal model; finish it with pbc train … --re"):
        Personal.open(tmp_path)


# ---- what goes wrong -----------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(run: Run) -> None:
    result = run(
        "train", "@whole.pbc", "@photos", "-o", "a", "--cache", "off", "--lr", "1e30", fails=1
    )
    assert "the loss is nan in epoch 1, step " in result.stderr
    assert (
        "lower the learning rate (it is 1e+30) and start again with --overwrite; "
        "the last good checkpoint is in a" in result.stderr
    )
    arrays = Checkpoint.load(Path("a/checkpoint.safetensors")).arrays
    assert all(np.isfinite(arrays[name]).all() for name in arrays if name.startswith("theta/"))
    assert not Path("a/model.json").exists()


def test_parameters_that_are_not_finite_are_never_saved(assets: Path, tmp_path: Path) -> None:
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    trainer = runtime.trainer(samples, TrainOptions(), tmp_path)
    trainer.prepare()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    parameters = trainer._executable.parameters()
    parameters["head.bias"][1] = np.inf
    trainer._executable.start(parameters, Objective())
    with pytest.raises(PbcError, match="a parameter is not finite in epoch 1, step 0"):
        trainer.save_checkpoint()
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_telling_and_saving_is_bookkeeping_of_the_epoch_it_belongs_to(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime.open(assets / "probe.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    told, save = 0, Checkpoint.save

    def tell(event: Event) -> None:
        nonlocal told
        if isinstance(event, StepReport):
            told += 1
            time.sleep(0.02)

    def slowly(self: Checkpoint, path: Path) -> None:
        time.sleep(0.5)
        save(self, path)

    options = TrainOptions(1, cache="off", routing=False, scheduler="piebridge")
    trainer = runtime.trainer(samples, options, tmp_path, report=tell)
    trainer.prepare()
    monkeypatch.setattr(Checkpoint, "save", slowly)
    report = trainer.run_epoch()
    (line,) = [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    telling = line["stage_seconds"]["bookkeeping"]
    assert telling > 0.02 * told
    assert report.stage_seconds["bookkeeping"] > telling + 0.5  # no epoch follows
    assert report.seconds == pytest.approx(sum(report.stage_seconds.values()))


def test_a_full_disk_while_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    before = Path("a/checkpoint.safetensors").read_bytes()

    def refuse(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", refuse)
    result = run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "2", "--resume", fails=1)
    assert "No space left on device; the file that was there is unchanged" in result.stderr
    assert Path("a/checkpoint.safetensors").read_bytes() == before


def test_broken_images(run: Run, tmp_path: Path) -> None:
    tiny.photos(tmp_path / "photos", 4)
    (tmp_path / "photos" / "red" / "001.png").write_bytes(b"broken")
    result = run("train", "@probe.pbc", "photos", "--val", "photos", "-o", "a", "--epochs", "1")
    assert result.stderr.count("skipped 1 broken images of 12: red/001.png (cannot identify") == 2
    result = run("train", "@probe.pbc", "photos", "-o", "b", "--strict", fails=1)
    assert "red/001.png of photos is broken" in result.stderr
    assert "red/001.png" in run("eval", "a", "photos").stderr
    assert "is broken" in run("eval", "a", "photos", "--strict", fails=1).stderr
    assert "not an image" in run("predict", "a", "photos/red/001.png", fails=1).stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "no data at nowhere"),
        ("empty", "empty has no class folders"),
        ("hollow", "class folder 'green' of hollow has no images"),
        ("single", "the data has one class, 'red'; two are the least"),
        ("long.zip", "has a name of 1025 characters; 1024 are the most"),
    ],
)
def test_data_that_cannot_be_trained_on(run: Run, data: str, message: str) -> None:
    Path("empty").mkdir()
    tiny.photos(Path("hollow"), 2, classes=["red"])
    Path("hollow/green").mkdir()
    tiny.photos(Path("single"), 2, classes=["red"])
    photo = Path("single/red/000.png").read_bytes()
    with zipfile.ZipFile("long.zip", "w") as archive:  # no folder's name is as long
        for name in ("x" * 1025, "y"):
            archive.writestr(f"{name}/0.png", photo)
    assert message in run("train", "@probe.pbc", data, "-o", "a", fails=1).stderr


def test_classes_that_differ_between_bundle_and_data(run: Run, tmp_path: Path) -> None:
    tiny.write(tmp_path / "named.pbc", classes=["red", "white"])
    result = run("train", "named.pbc", "@photos", "-o", "a", "--epochs", "12", "--lr", "0.2")
    assert (
        "the head is sized for the 3 classes of the data: only the data has 'blue', 'green'; "
        "only the bundle has 'white'"
    ) in result.stderr
    assert json.loads(Path("a/model.json").read_text())["classes"] == ["blue", "green", "red"]
    assert json.loads(run("eval", "a", "@test", "--json").stdout)["accuracy"] > 0.8
    tiny.write(tmp_path / "count.pbc", class_count=4)
    result = run("train", "count.pbc", "@photos", "-o", "b", fails=1)
    assert "the data has 3 classes, and this network's head could be compiled for 4 alone" in (
        result.stderr
    )


def test_the_order_of_a_bundle_s_classes_is_kept(run: Run, tmp_path: Path) -> None:
    tiny.write(tmp_path / "named.pbc", classes=["red", "blue", "green"])
    run("train", "named.pbc", "@photos", "-o", "a", "--epochs", "12", "--lr", "0.2", "--no-skip")
    assert json.loads(Path("a/model.json").read_text())["classes"] == ["red", "blue", "green"]
    assert json.loads(run("eval", "a", "@test", "--json").stdout)["accuracy"] > 0.8


def test_test_data_may_lack_a_class_but_not_add_one(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    tiny.photos(Path("fewer"), 2, classes=["red"])
    assert "on 2 samples" in run("eval", "a", "fewer").stdout
    tiny.photos(Path("more"), 2)
    Path("more/red").rename("more/violet")
    expected = "the model knows no class 'violet'; it has 'blue', 'green', 'red'"
    assert expected in run("eval", "a", "more", fails=1).stderr
    result = run("train", "@probe.pbc", "@photos", "--val", "more", "-o", "b", fails=1)
    assert expected in result.stderr


def test_a_broken_bundle(run: Run, assets: Path) -> None:
    data = (assets / "probe.pbc").read_bytes()
    Path("cut.pbc").write_bytes(data[: len(data) // 2])
    assert "truncated" in run("train", "cut.pbc", "@photos", "-o", "a", fails=1).stderr
    assert "no bundle at gone" in run("train", "gone", "@photos", "-o", "a", fails=1).stderr


def test_a_personal_model_that_was_tampered_with(run: Run, assets: Path) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    Path("a/trainable.safetensors").write_bytes(b"?")
    assert "personal model in a is damaged" in run("eval", "a", "@test", fails=1).stderr
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1", "--overwrite")
    Path("a/bundle.pbc").unlink()
    Path("a/bundle.pbc").write_bytes((assets / "maps.pbc").read_bytes())
    assert "is not the bundle that a was trained" in run("eval", "a", "@test", fails=1).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "adamax"], "no optimizer named 'adamax'; did you mean 'adam'?"),
        (["--momentum", "1"], "the momentum is 1.0; it must be at least 0 and below 1"),
        (["--momentum", "0.5", "--optimizer", "adamw"], "momentum is 0.5, but adamw takes none"),
        (["--weight-decay", "-1"], "the weight decay is -1.0; it must be at least 0 and at most"),
        (["--weight-decay", "inf"], "the weight decay is inf; it must be at least 0 and at most"),
        (["--label-smoothing", "1"], "the label smoothing is 1.0; it must be at least 0 and bel"),
        (["--cache", "dsk"], "no cache named 'dsk'; did you mean 'disk'?"),
        (["--cache-dtype", "int8"], "no cache dtype named 'int8'"),
        (["--scheduler", "pie"], "no scheduler named 'pie'; did you mean 'piebridge'?"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--batch", "0"], "batch is 0; it must be at least 1"),
        (["--lr", "-1"], "the learning rate is -1.0; it must be above 0 and at most 1e+30"),
        (["--lr", "nan"], "the learning rate is nan; it must be above 0 and at most 1e+30"),
        (["--alpha", "-1"], "alpha is -1.0; it must be at least 0"),
        (["--fidelity-floor", "2"], "the fidelity floor is 2.0; it must be in 0…1"),
        (["--seed", "-1"], "the seed is -1; it must be at least 0"),
        (["--max-accuracy-loss", "-1"], "the most accuracy to lose is -1.0 points; it must be at"),
        (["--time-budget", "0"], "the time budget is 0.0 s; it must be above 0"),
        (["--max-level", "-1"], "the cheapest level is -1; it must be at least 0"),
        (["--checkpoint-seconds", "nan"], "the seconds between checkpoints are nan; they must be"),
        (["--deploy-level", "1", "--no-routing"], "the level to deploy is 1, where all photos are"),
        (["--deploy-level", "2", "--max-level", "1"], "but the cheapest level is 1: give one of"),
        (["--augment", "65"], "augment is 65; it must be in 0…64"),
        (["--prefix-batch", "0"], "prefix_batch is 0; it must be at least 1"),
    ],
)
def test_options_that_cannot_be_meant(run: Run, words: list[str], message: str) -> None:
    assert message in run("train", "@probe.pbc", "@photos", "-o", "a", *words, fails=2).stderr


def test_a_level_that_is_not_there(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1")
    result = run("eval", "a", "@test", "--level", "3", fails=2)
    assert "no level 3; this model has levels 0 to 2" in result.stderr


def test_an_engine_that_is_not_installed(run: Run, tmp_path: Path) -> None:
    manifest, files = tiny.contents()
    bundle.write(tmp_path / "m.pbc", {**manifest, "engine": "tensorrt"}, files)
    result = run("train", "m.pbc", "@photos", "-o", "a", fails=2)
    assert "no engine named 'tensorrt'" in result.stderr


def test_tensorboard_is_optional(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = run("train", "@probe.pbc", "@photos", "-o", "a", "--log", "tensorboard", fails=1)
    assert install("tensorboard") in result.stderr


# ---- privacy and display -------------------------------------------------------------------


def test_forget(run: Run) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "a", "--epochs", "1", "--cache", "disk")
    Path("a/.checkpoint.safetensors.x.tmp").write_bytes(b"left by a kill")
    result = run("forget", "a")
    assert "removed a/cache" in result.stdout
    assert {path.name for path in Path("a").iterdir()} == {
        ".lock", "bundle.pbc", "costs.json", "model.json", "trainable.safetensors",
    }  # fmt: skip
    run("eval", "a", "@test")
    assert "nothing to forget in a" in run("forget", "a").stdout
    run("forget", "a", "--all")
    assert not Path("a").exists()
    assert "no folder a" in run("forget", "a", fails=1).stderr


def test_more_threads_than_a_machine_bears_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("train", "@probe.pbc", "@photos", "-o", "mine", "--epochs", "1")
    monkeypatch.setattr(processor, "_THREADS_ANYWHERE", 2)  # a test that fails starts no more
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    for words in (
        ("train", "@probe.pbc", "@photos", "-o", "new"),
        ("eval", "mine", "@test"),
        ("predict", "mine", "@test"),
        ("bench", "@probe.pbc", "@photos", "--work", "new"),
        ("audit", "@probe.pbc", "@photos"),
        ("profile", "@probe.pbc", "--against", "none"),
        ("fleet", "simulate", "@probe.pbc", "@photos", "-o", "new"),
    ):
        result = run(*words, "--threads", "3", fails=2)
        assert result.stderr.splitlines()[-1].endswith("threads is 3; it must be in 1…2"), words
    assert not Path("new").exists()
    with pytest.raises(UsageError, match=r"threads is 1000000; it must be in 1…"):
        processor.check_threads(1_000_000)


def test_the_line_of_an_epoch() -> None:
    report = EpochReport(2, 0.12345, (3, 0, 1), 4, 1, 99.6, 1.0, {}, 0)
    assert epoch_line(report, 12) == (
        "epoch 2/12  loss 0.1235  L0 75% L2 25%  100 samples/s  skipped 1/4 updates"
    )
    skipped = EpochReport(2, 0.12345, (3, 0, 1), 4, 0, 99.6, 1.0, {}, 0, skipped_samples=6)
    assert epoch_line(skipped, 12) == (
        "epoch 2/12  loss 0.1235  L0 75% L2 25%  100 samples/s  skipped 60% of samples"
    )
    assert level_shares((0, 0)) == ""
