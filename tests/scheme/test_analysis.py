"""What layers are worth: measured by the command, resumed, in processes, or by Fisher's score."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from networks import settled
from test_sparse import Chain

from pbc.cli import main
from pbc.data import InputSpec
from pbc.frontend import models
from pbc.scheme.analysis import AnalysisOptions, analyse, gains_of
from pbc.scheme.contributions import Contributions
from pbc.scheme.fisher import fisher
from pbc.scheme.sparse import SelectedChannels
from pbc.scheme.subject import Learning, Subject

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.wide = nn.Conv2d(16, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.wide(torch.relu(self.stem(x))))).mean((2, 3)))


def factory(num_classes=10):
    return Net(num_classes)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.photos(tmp_path_factory.mktemp("photos"), 10)


@pytest.fixture(scope="module")
def subject(photos: Path) -> Subject:
    spec = InputSpec((3, 16, 16), models.IMAGENET_MEAN, models.IMAGENET_STD)
    source = models.given(settled(Chain()), "Chain", spec)
    torch.manual_seed(0)
    return Subject.open(source, photos, None)


def test_a_share_learns_as_the_strategy_would(subject: Subject) -> None:
    """The masked weight moves as θ of the strategy does, whole epochs long."""
    layer = next(layer for layer in subject.layers if layer.name == "three")
    weight, head = layer.module.weight.detach(), subject.candidate(())
    candidate = subject.candidate(("three.weight",))
    chosen = SelectedChannels(weight, 1, layer.count(Fraction(1, 4)))
    mask = torch.zeros(64).index_fill(0, chosen.index, 1.0).reshape(1, 64, 1, 1)
    learning = Learning(epochs=2)
    moved = candidate.learnt({}, learning, {"three.weight": mask})["three.weight"]
    others = mask.expand_as(weight) == 0
    assert torch.equal(moved[others], weight[others])
    assert not torch.equal(moved, weight)

    theta = {"fc.weight": head.theta["fc.weight"], "fc.bias": head.theta["fc.bias"]}
    theta["part"] = chosen.right_inverse(weight)
    theta = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    rule = torch.optim.SGD(list(theta.values()), learning.learning_rate, momentum=0.9)
    order, labels = np.random.default_rng(learning.seed), candidate.train.labels
    for _ in range(learning.epochs):
        rows = order.permutation(len(labels))
        for first in range(0, len(rows), learning.batch):
            batch = rows[first : first + learning.batch]
            rule.zero_grad()
            values = {**theta, "three.weight": chosen(theta["part"])}
            logits = candidate._logits(candidate.train, batch, values)
            torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
            rule.step()
    torch.testing.assert_close(moved, chosen(theta["part"]), rtol=1e-5, atol=1e-6)


def test_kept_features_change_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subject.candidate(()).theta
    kept = gains_of("two", subject, start, 0.0, Learning(epochs=1))
    monkeypatch.setattr("pbc.scheme.subject._MOST_BYTES", 0)
    assert gains_of("two", subject, start, 0.0, Learning(epochs=1)) == kept


def test_a_fisher_score_is_the_mean_of_squared_gradients(subject: Subject) -> None:
    start = subject.candidate(()).theta
    layers, biases = fisher(subject, start, subject.layers)
    total = 0.0
    candidate = subject.candidate(("three.weight", "three.bias"))
    for photo in range(len(subject.train)):
        found = candidate.gradients({**candidate.theta, **start}, photo)
        total += float(found["three.weight"].square().sum()) / len(subject.train)
    assert layers["three"][Fraction(1)] == pytest.approx(total, rel=1e-4)
    shares = list(layers["three"].values())
    assert shares == sorted(shares)
    assert list(biases.values()) == sorted(biases.values())


def test_the_command_measures_plots_and_goes_on(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "net.py").write_text(SOURCE)
    model, output = f"{tmp_path / 'net.py'}:factory", tmp_path / "found.json"
    words = ["analyze", model, str(photos), "--weights", "random", "--input", "3x16x16"]
    words += ["--epochs", "1", "-o", str(output)]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, [*words, "--html", str(page)])
    assert result.exit_code == 0, result.output
    found = Contributions.open(output)
    assert list(found.layers) == ["stem", "wide"]
    assert list(found.biases) == [1, 2]
    assert "wide, 1/4" in page.read_text()

    parts = found.to_json()
    del parts["layers"]["stem"], parts["biases"]["2"]
    output.write_text(json.dumps({**parts, "layers": {"wide": parts["layers"]["wide"]}}))
    options = AnalysisOptions(
        weights="random", shape=(3, 16, 16), learning=Learning(epochs=1), jobs=2
    )
    assert analyse(model, photos, output, options) == found

    other = CliRunner().invoke(main, [*words, "--epochs", "2"])
    assert other.exit_code == 1
    assert "is of other epochs (1, now 2); remove it, or choose another -o" in other.output
    fast = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "fast.json"), "--fast"])
    assert fast.exit_code == 0, fast.output
    assert "it ranks, and is no accuracy" in fast.output.replace("\n", " ")
    wrong = CliRunner().invoke(main, [*words, "--jobs", "0"])
    assert wrong.exit_code == 2


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(Exception, match="--photos is 0; expected 1 or more"):
        replace(AnalysisOptions(), photos=0)
