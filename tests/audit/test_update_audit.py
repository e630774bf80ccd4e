"""`pbc audit`: what attacks find on a bundle whose features are many, and what defences hide."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tiny
from click.testing import CliRunner
from guarded import ALLOWED, FORBIDDEN, imported, third_party

from pbc import bundle
from pbc.audit import attack
from pbc.audit.audit import Audit, Row, audit, findings
from pbc.audit.html import html
from pbc.audit.options import AuditOptions
from pbc.cli import main
from pbc.errors import PbcError, UsageError

OPTIONS = AuditOptions(batches=(1, 8, 32), clients=2, rounds=2)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audit")
    tiny.photos(root / "photos", 60)
    tiny.write(root / "m.pbc", "pixels")
    return root


@pytest.fixture(scope="module")
def found(fleet: Path) -> Audit:
    return audit(fleet / "m.pbc", fleet / "photos", OPTIONS)


def row(found: Audit, shared: str, defence: str = "none") -> Row:
    return next(r for r in found.rows if r.shared.startswith(shared) and r.defence == defence)


def test_one_photo_undefended_is_known(found: Audit) -> None:
    alone = row(found, "a gradient of 1 photo")
    assert alone.labels == alone.identified == alone.auc == 1
    assert alone.features is not None
    assert alone.features > 0.999
    assert alone.chance == pytest.approx(1 / 180)


@pytest.mark.parametrize("photos", [8, 32])
def test_one_gradient_gives_its_photos_away(found: Audit, photos: int) -> None:
    assert row(found, f"a gradient of {photos} photos").auc >= 0.99


def test_compression_does_not_hide_one_photo(fleet: Path) -> None:
    options = replace(OPTIONS, batches=(1,), rounds=1, top_k=0.1)
    found = audit(fleet / "m.pbc", fleet / "photos", options)
    assert row(found, "a gradient of 1 photo", "top-k 10 %").auc >= 0.99
    compressed = next(line for line in found.findings if line.startswith("top-k 10 %"))
    assert "a gradient of 1 photo (AUC 1.00 to 1.00)" in compressed.split(" in ")[-1]


def test_noise_hides_members_within_a_class(found: Audit) -> None:
    """On average of the rows: each has some hundred pairs, and so a deviation of its own."""
    rows = [r for r in found.rows if r.defence == "clip 1, noise 0.1" and r.photos > 1]
    values = [r.auc_within for r in rows if r.auc_within is not None]
    assert len(values) == 4
    assert np.mean(values) <= 0.55
    noisy = row(found, "an update", "clip 1, noise 0.1")
    assert row(found, "an update").auc > noisy.auc + 0.1


def test_accuracy_stands_beside_what_a_defence_hides(fleet: Path) -> None:
    options = replace(OPTIONS, batches=(1,), clip=1.0, noise=1000.0)
    found = audit(fleet / "m.pbc", fleet / "photos", options)
    plain, noisy = row(found, "an update"), row(found, "an update", "clip 1, noise 1e+03")
    assert plain.accuracy is not None
    assert noisy.accuracy is not None
    assert plain.accuracy > noisy.accuracy
    assert row(found, "a gradient").accuracy is None


def test_findings_name_where_a_defence_does_not_help(found: Audit) -> None:
    plain = row(found, "a gradient of 1 photo")
    alike, lower = replace(plain, defence="top-k 1 %"), replace(plain, shared="x", auc=0.9)
    rows = [plain, alike, lower, replace(lower, defence="top-k 1 %", auc=0.6)]
    assert findings(rows)[0] == (
        "top-k 1 % lowers membership in x (AUC 0.90 to 0.60); "
        "not in a gradient of 1 photo (AUC 1.00 to 1.00)"
    )
    nowhere = findings(rows[:2])[0]
    assert nowhere.startswith("top-k 1 % lowers membership nowhere: a gradient of 1 photo")


def test_nothing_is_ever_called_safe(found: Audit, fleet: Path) -> None:
    page = html(found)
    assert "safe" not in page.lower()
    assert "safe" not in json.dumps(found.to_json()).lower()
    assert "lower bounds" in page
    assert "<script" not in page


def test_the_same_seed_finds_the_same(found: Audit, fleet: Path) -> None:
    assert audit(fleet / "m.pbc", fleet / "photos", OPTIONS) == found


def test_a_probe_with_fewer_values_than_photos(fleet: Path, tmp_path: Path) -> None:
    """27 values: no regression can tell 180 photos apart, and nothing fails."""
    tiny.write(tmp_path / "small.pbc")
    found = audit(tmp_path / "small.pbc", fleet / "photos", replace(OPTIONS, batches=(32,)))
    assert row(found, "a gradient of 32 photos").identified < 0.9


def test_a_bundle_without_a_prefix(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "photos", 4)
    tiny.write(tmp_path / "m.pbc", "whole")
    found = audit(tmp_path / "m.pbc", tmp_path / "photos", replace(OPTIONS, batches=(1,)))
    assert row(found, "a gradient of 1 photo").identified == 1


def test_features_that_are_not_finite(tmp_path: Path) -> None:
    tiny.photos(tmp_path / "photos", 4)
    manifest, files = tiny.contents()
    weights = safetensors.numpy.load(files[tiny.WEIGHTS.format(0)])
    weights["conv.bias"][:] = np.inf
    files[tiny.WEIGHTS.format(0)] = safetensors.numpy.save(weights)
    made = bundle.write(tmp_path / "m.pbc", manifest, files)
    with pytest.raises(PbcError, match="the prefix of level 0 returns 'flat' that is not finite"):
        audit(made.path, tmp_path / "photos", AuditOptions())


def test_the_command(fleet: Path, tmp_path: Path) -> None:
    args = ["audit", str(fleet / "m.pbc"), str(fleet / "photos"), "--batch", "1,4", "--rounds", "1"]
    args += ["--max-photos", "60", "--clip", "1", "--dp", "2"]
    shown = CliRunner().invoke(main, [*args, "--html", str(tmp_path / "a.html")])
    assert shown.exit_code == 0, shown.output
    assert "a gradient of 4 photos" in shown.output
    assert "clip 1, noise " in shown.output
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    content = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)
    assert content["about"]["epsilon"] == 2
    assert content["about"]["delta"] == pytest.approx(1 / 60)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "some"], "--batch is 'some'; expected whole numbers, like 1,8"),
        (["--batch", "0"], "a gradient of 0 photos; 1 is the least"),
        (["--top-k", "101"], "top-k is 1.01; it is a share of the values"),
        (["--clip", "0"], "the clip is 0.0; it must be above 0"),
        (["--noise", "-1"], "the noise is -1.0; it must be at least 0"),
        (["--dp", "1"], "--dp needs --clip"),
        (["--dp", "0", "--clip", "1"], "ε is 0.0"),
        (["--dp", "1", "--clip", "1", "--noise", "1"], "--dp sets the noise"),
        (["--dp", "1", "--clip", "1", "--top-k", "1"], "--dp covers no --top-k"),
        (["--clients", "0"], "clients is 0; it must be at least 1"),
        (["--html", "nowhere/a.html"], "the folder of nowhere/a.html does not exist"),
    ],
)
def test_what_cannot_be_meant(fleet: Path, args: list[str], message: str) -> None:
    result = CliRunner().invoke(
        main, ["audit", str(fleet / "m.pbc"), str(fleet / "photos"), *args], standalone_mode=False
    )
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_it_needs_no_more_than_a_device_has() -> None:
    names = imported("import pbc.cli.audit", forbidden=FORBIDDEN)
    assert third_party(names) <= ALLOWED | {"pbc"}


# ---- the attacks alone -----------------------------------------------------------------------


@cache
def gradients() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 200)).astype(np.float32)


def test_the_regression_has_the_weights() -> None:
    true = np.zeros(50)
    true[[3, 14, 15]] = 1 / 3
    update = (true @ gradients()).astype(np.float32)
    candidates, photos = attack.Candidates(gradients()), np.arange(50)
    for some in (photos, photos[::-1], photos[:20]):
        for seen in (None, np.ones(200, bool), np.arange(200) < 100):
            found = candidates.weights(some, update, seen)
            np.testing.assert_allclose(found / found.sum(), true[some], atol=1e-4)


def test_the_regression_takes_zeros() -> None:
    candidates, photos = attack.Candidates(gradients()), np.arange(50)
    assert not candidates.weights(photos, np.zeros(200, np.float32)).any()
    assert not attack.Candidates(np.zeros((3, 5))).weights(photos[:3], np.ones(5)).any()


def test_auc_counts_ties_half() -> None:
    member = np.array([True, True, False, False])
    assert attack.auc(np.array([3.0, 2.0, 1.0, 0.0]), member) == 1
    assert attack.auc(np.array([1.0, 1.0, 1.0, 1.0]), member) == 0.5
    assert attack.auc(np.array([1.0, 0.0, 1.0, 0.0]), member) == 0.5
    assert attack.auc(np.ones(2), np.array([True, True])) is None


def test_auc_within_does_not_compare_classes() -> None:
    scores, labels = np.array([9.0, 8.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
    member = np.array([True, False, True, False])
    assert attack.auc(scores, member) == 0.5
    assert attack.auc_within(scores, member, labels) == 0.5
    assert attack.auc_within(scores, np.array([True, True, False, False]), labels) is None


def test_labels_by_counts() -> None:
    labels = np.array([0, 0, 2])
    even = np.full(3, 1 / 3)
    exact = np.bincount(labels, minlength=3) / 3 - even
    assert attack.labels_recovered(exact, even, labels) == 1
    assert attack.labels_recovered(-exact, even, labels) < 1
    assert attack.labels_recovered(np.array([-0.2, 0.5, -0.3]), even, np.array([1])) == 1
