"""A device's side of a round: what it refuses, what it keeps, what it sends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from pbc.data import ImageFolder, InputSpec
from pbc.data.decoding import Photo
from pbc.errors import PbcError, UsageError
from pbc.fleet.client import Client, open_client
from pbc.fleet.learner import TableLearner
from pbc.fleet.partition import dirichlet
from pbc.fleet.protection import Protection
from pbc.fleet.proximal import Proximal, towards
from pbc.fleet.terms import Terms
from pbc.fleet.vector import flatten, unflatten
from pbc.fleet.wire import decode, encode
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

CLASSES = ("blue", "green", "red")


class Fleet:
    def __init__(self, root: Path) -> None:
        self.root = root
        tiny.photos(root / "photos", 8)
        tiny.write(root / "m.pbc")
        self.runtime = Runtime.open(root / "m.pbc")
        self.bundle = self.runtime.bundle
        self.theta = initial_parameters(self.bundle, 3, 0)
        self.terms = Terms(self.bundle.digest, CLASSES)
        self.options = TrainOptions(
            epochs=1, cache="disk", learning_rate=0.1, costs=tiny.costs(root / "costs.json")
        )

    def device(self, out: str = "out", **changes: Any) -> Client:
        terms = replace(self.terms, **changes)
        return open_client(
            self.root / "m.pbc", self.root / "photos", self.root / out, terms, self.options
        )

    def hashes(self) -> list[bytes]:
        kept = (self.root / "out" / "fleet" / "photos.sha256").read_bytes().partition(b"\n")[2]
        return [kept[i : i + 32] for i in range(0, len(kept), 32)]

    def simulated(self) -> Client:
        samples = ImageFolder.open(self.root / "photos", self.runtime.spec)
        executable = self.runtime.engine.load(self.bundle)
        rows = np.arange(len(samples))
        table = TableLearner(
            executable,
            executable.prefix(0, samples.images(rows)),
            samples.labels,
            rows,
            Objective(learning_rate=0.1),
            4,
            np.random.default_rng(0),
        )
        return Client(self.bundle, CLASSES, table)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.mark.parametrize("kind", ["device", "simulated"])
def test_what_is_sent_is_what_training_changed(fleet: Fleet, kind: str) -> None:
    client = getattr(fleet, kind)()
    losses = []
    theta = fleet.theta
    for _ in range(4):
        arrays, figures = client.answer(theta, fleet.terms)
        update = decode(arrays, 27)
        assert update.any()
        theta = unflatten(flatten(theta, theta) + update, theta)
        losses.append(figures["loss"])
    assert figures["num-examples"] == 24
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["device", "simulated"])
def test_a_fresh_round_has_no_momentum(fleet: Fleet, kind: str) -> None:
    client, terms = getattr(fleet, kind)(), replace(fleet.terms, fresh=True)
    first, second = (decode(client.answer(fleet.theta, terms)[0], 27) for _ in range(2))
    np.testing.assert_allclose(np.linalg.norm(second), np.linalg.norm(first), rtol=0.3)


@pytest.mark.parametrize("kind", ["device", "simulated"])
def test_momentum_is_kept_between_rounds(fleet: Fleet, kind: str) -> None:
    client = getattr(fleet, kind)()
    first, second = (decode(client.answer(fleet.theta, fleet.terms)[0], 27) for _ in range(2))
    assert np.linalg.norm(second) > 1.3 * np.linalg.norm(first)


def test_a_device_that_comes_back_has_its_momentum_and_what_it_did_not_send(fleet: Fleet) -> None:
    protected = replace(fleet.terms, protection=Protection(top_k=0.1))
    staying = fleet.device("staying")
    rounds = [decode(staying.answer(fleet.theta, protected)[0], 27) for _ in range(2)]
    again = [
        decode(fleet.device("leaving").answer(fleet.theta, protected)[0], 27) for _ in range(2)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(rounds, again, strict=True))
    assert np.count_nonzero(rounds[0]) == 3
    assert (fleet.root / "leaving" / "fleet" / "unsent.f32").stat().st_size == 4 * 27


def test_a_device_that_comes_back_decodes_no_photo_that_is_cached(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.device().answer(fleet.theta, fleet.terms)
    decoded: list[str] = []
    photo = InputSpec.photo

    def counted(self: InputSpec, data: bytes, name: str = "") -> Photo:
        decoded.append(name)
        return photo(self, data, name)

    monkeypatch.setattr(InputSpec, "photo", counted)
    fleet.device().answer(fleet.theta, fleet.terms)
    assert not decoded
    # A new one is decoded, and shifts no other.
    image = fleet.root / "photos" / "green" / "003a.png"
    tiny.photos(fleet.root / "more", 1, seed=5, classes=["green"])
    (fleet.root / "more" / "green" / "000.png").rename(image)
    samples = ImageFolder.open(
        fleet.root / "photos", fleet.runtime.spec, known=frozenset(fleet.hashes())
    )
    assert decoded == ["green/003a.png"]
    plain = ImageFolder.open(fleet.root / "photos", fleet.runtime.spec)
    everybody = np.arange(len(plain))
    assert np.array_equal(samples.batch(everybody), plain.batch(everybody))
    assert samples.hashes == plain.hashes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 64}, "the fleet trains the bundle 000000000000, here is "),
        ({"classes": ("red", "green", "blue")}, "the fleet's classes are red, green, blue; here"),
        ({"floor": 0.9}, "the fleet's fidelity floor is 0.9, here it is the bundle's own"),
    ],
)
def test_a_device_refuses_another_fleet(fleet: Fleet, change: dict[str, Any], message: str) -> None:
    client = fleet.simulated()
    with pytest.raises(PbcError, match=message):
        client.answer(fleet.theta, replace(fleet.terms, **change))
    if "classes" not in change:  # the first classes that an open head meets are its own
        with pytest.raises(PbcError, match=message):
            fleet.device(**change)
        assert not (fleet.root / "out").exists()


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        ({"head.weight": np.zeros((3, 8))}, "only the bundle has 'head.bias'"),
        ({"head.weight": np.zeros((3, 9)), "head.bias": np.zeros(3)}, r"expected \[3, 8\]"),
    ],
)
def test_a_device_refuses_other_parameters(
    fleet: Fleet, theta: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(PbcError, match=message):
        fleet.simulated().answer(theta, fleet.terms)


@pytest.mark.parametrize("kind", ["device", "simulated"])
def test_the_proximal_term_keeps_updates_short(fleet: Fleet, kind: str) -> None:
    far, near = (
        np.linalg.norm(decode(getattr(fleet, kind)(**extra).answer(fleet.theta, terms)[0], 27))
        for extra, terms in (
            ({"out": "a"} if kind == "device" else {}, fleet.terms),
            ({"out": "b"} if kind == "device" else {}, replace(fleet.terms, mu=2.0)),
        )
    )
    assert near < 0.7 * far


def test_every_step_is_followed_by_one_towards_the_centre(fleet: Fleet) -> None:
    """Compared with steps that are written out; momentum is not pulled."""
    samples = ImageFolder.open(fleet.root / "photos", fleet.runtime.spec)
    plain = fleet.runtime.engine.load(fleet.bundle)
    proximal, objective = Proximal(fleet.runtime.engine.load(fleet.bundle)), Objective()
    features, labels = plain.prefix(0, samples.images(np.arange(4))), samples.labels[:4]
    centre = {name: value + 1 for name, value in fleet.theta.items()}
    plain.start(fleet.theta, objective)
    proximal.start(fleet.theta, objective)
    proximal.pull(centre, 20.0)
    for _ in range(3):
        for executable in (plain, proximal):
            executable.forward(0, features, labels)
            executable.update()
        state = plain.optimizer_state()
        plain.start(towards(plain.parameters(), centre, 0.2), objective)
        plain.load_optimizer_state(state)
    for name, value in plain.parameters().items():
        np.testing.assert_allclose(proximal.parameters()[name], value, atol=1e-6)
    assert towards({"w": np.ones(1)}, {"w": np.zeros(1)}, 0.75)["w"] == 0.25
    assert towards({"w": np.ones(1)}, {"w": np.zeros(1)}, 2.0)["w"] == 0


def test_terms_travel() -> None:
    terms = Terms("d", CLASSES, 3, 0.9, 0.1, True, Protection(0.01, 1.0, 0.1, float16=True))
    assert Terms.from_config(terms.to_config()) == terms
    sent = json.loads(terms.to_config()["pbc-terms"])
    for config in (
        {},
        {"pbc-terms": "{"},
        {"pbc-terms": "{}"},
        {"pbc-terms": "[1]"},
        {"pbc-terms": "[" * 100_000},
        {"pbc-terms": json.dumps({**sent, "epochs": 10**9})},
        {"pbc-terms": json.dumps({**sent, "clip": float("nan")})},
        {"pbc-terms": json.dumps({**sent, "classes": ["\x1b[2J", "b"]})},
    ):
        with pytest.raises(PbcError, match="the message has no terms of a fleet of pbc"):
            Terms.from_config(config)
    with pytest.raises(UsageError, match="a round of 0 epochs"):
        replace(terms, epochs=0)


@pytest.mark.parametrize("share", [None, 0.01])
@pytest.mark.parametrize("float16", [False, True])
def test_updates_travel(share: float | None, float16: bool) -> None:
    protection = Protection(top_k=share, float16=float16)
    update = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    sent, _ = protection(update, np.zeros_like(update), np.random.default_rng(0))
    arrays = encode(sent, protection)
    assert np.array_equal(decode(arrays, len(update)), sent)
    size = sum(value.nbytes for value in arrays.values())
    assert size == (100_000 if share is None else 1_000) * (
        (2 if float16 else 4) + 2 * (share is not None)
    )


def test_gaps_may_be_wide() -> None:
    update = np.zeros(200_000, np.float32)
    update[[0, 199_999]] = 1
    assert np.array_equal(decode(encode(update, Protection(top_k=1e-5)), 200_000), update)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"an update has the arrays \[\]"),
        ({"update": np.zeros(3)}, r"an update is float64\[3\]; expected \[4\]"),
        ({"update": np.zeros(3, np.float32)}, r"an update is float32\[3\]; expected \[4\]"),
        ({"update": np.full(4, np.nan, np.float32)}, "an update is not finite"),
        ({"update": np.full(4, 1e38, np.float32)}, "moves a value by more than 1e"),
        ({"values": np.ones(2, np.float32), "gaps": np.array([1], np.uint16)}, "other arrays than"),
        ({"values": np.ones(2, np.float32), "gaps": np.array([1, 3], np.uint16)}, "beyond its 4"),
        ({"values": np.ones(2, np.float32), "gaps": np.array([1, 0], np.uint16)}, "or one twice"),
        (
            {"values": np.ones(2, np.float32), "gaps": np.array([1, 1], np.int64)},
            "other arrays than",
        ),
        ({"values": np.ones(9, np.float32), "gaps": np.ones(9, np.uint16)}, "other arrays than"),
    ],
)
def test_what_no_client_sends_is_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PbcError, match=message):
        decode(arrays, 4)


@pytest.mark.parametrize(("clients", "alpha"), [(4, 0.3), (24, 0.01), (1, 1.0)])
def test_photos_are_dealt_once(clients: int, alpha: float) -> None:
    labels = np.repeat(np.arange(3), 8)
    dealt = dirichlet(labels, clients, alpha, 0)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(24))
    assert min(map(len, dealt)) >= 1
    assert all(
        np.array_equal(a, b)
        for a, b in zip(dealt, dirichlet(labels, clients, alpha, 0), strict=True)
    )


def test_a_small_alpha_is_uneven() -> None:
    labels = np.repeat(np.arange(20), 50)

    def classes_of(alpha: float) -> float:
        return float(np.mean([len(np.unique(labels[p])) for p in dirichlet(labels, 10, alpha, 0)]))

    assert classes_of(0.05) < 10 < classes_of(10.0)


@pytest.mark.parametrize(("clients", "alpha"), [(0, 1.0), (25, 1.0), (4, 0.0)])
def test_photos_that_cannot_be_dealt(clients: int, alpha: float) -> None:
    with pytest.raises(UsageError):
        dirichlet(np.zeros(24, np.int64), clients, alpha, 0)
