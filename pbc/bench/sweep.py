"""The sensitivity studies: number of proxies, the policy's training data, few-shot training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pbc.bench import photos
from pbc.bench.cells import Work
from pbc.bench.energy import NoMeter
from pbc.bench.match import MatchPlan, run_match
from pbc.bench.standings import REFERENCE, Spread, standings
from pbc.bundle import Bundle
from pbc.bundle.trust import open_trusted
from pbc.data import Samples
from pbc.errors import PbcError, UsageError, suggest
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.runtime import Runtime

STUDIES = {
    "levels": "Number of proxies allowed",
    "policy-data": "Where the policy's predictions come from",
    "shots": "Photos per class",
}
SHOTS = (1, 2, 4, 8, 16)
_SHIPPED = "shipped"
_RIVALS = (REFERENCE, "pbc-nocache", "pbc")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One rival at one value: final accuracy, seconds, and how much faster than PET there."""

    value: str
    rival: str
    accuracy: Spread
    seconds: Spread
    faster: Spread | None

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "rival": self.rival,
            "accuracy": self.accuracy.to_json(),
            "seconds": self.seconds.to_json(),
            "faster_than_pet": self.faster and self.faster.to_json(),
        }


@dataclass(frozen=True)
class Study:
    """One sweep: `values` in order, and a point per value and rival."""

    name: str
    title: str
    values: tuple[str, ...]
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "values": list(self.values),
            "points": [point.to_json() for point in self.points],
        }


@dataclass(frozen=True)
class Variation:
    """The plan, the runtime and the training photos at one value of a study."""

    value: str
    plan: MatchPlan
    runtime: Runtime
    train: Samples


def check(names: tuple[str, ...], runtime: Runtime, bundles: Mapping[str, Path]) -> None:
    """Refuse a study that does not exist, or that the bundle or the other ones cannot serve."""
    if bundles and "policy-data" not in names:
        raise UsageError("--bundle is for --sweep policy-data, which is not asked for")
    for name in names:
        if name not in STUDIES:
            raise UsageError(suggest("sweep", name, STUDIES))
        if name != "shots" and len(runtime.bundle.manifest["levels"]) == 1:
            raise PbcError(f"--sweep {name} needs a bundle with proxies; this one has level 0 only")
    if "policy-data" not in names:
        return
    if not bundles and runtime.bundle.manifest.get("policy") is None:
        raise PbcError("--sweep policy-data needs a bundle with a policy, or --bundle NAME=PATH …")
    for name, path in bundles.items():
        if name == _SHIPPED or "/" in name:
            raise UsageError(f"--bundle names {name!r}; expected a name other than {_SHIPPED!r}")
        other = Runtime.open(path)
        if other.spec != runtime.spec or (
            other.bundle.manifest["parameters"] != runtime.bundle.manifest["parameters"]
        ):
            raise PbcError(f"--bundle {name}: {path} is not of the same model and strategy")


def notes(names: tuple[str, ...], runtime: Runtime, bundles: Mapping[str, Path]) -> list[str]:
    """Say where a study compares nothing."""
    if "policy-data" not in names:
        return []
    compared = {_SHIPPED: runtime.bundle}
    compared |= {name: open_trusted(path) for name, path in bundles.items()}
    means = [name for name, bundle in compared.items() if ships_means(bundle)]
    if bundles and means:
        return [
            f"sweep policy-data: {', '.join(means)} predict with each level's mean, not a policy"
        ]
    if means:
        return [
            "sweep policy-data compares nothing: the bundle ships each level's mean, so that "
            "shipped, means and shuffled route alike"
        ]
    return []


def ships_means(bundle: Bundle) -> bool:
    """Return whether the bundle's policy is each level's mean fidelity."""
    policy = bundle.manifest.get("policy")
    return policy is not None and policy.get("report", {}).get("shipped") == "means"


def study(
    name: str,
    plan: MatchPlan,
    runtime: Runtime,
    train: Samples,
    test: Samples,
    work: Work,
    bundles: Mapping[str, Path],
    tell: Tell,
) -> Study:
    """Run a small match for every value of a study."""
    plan = replace(plan, rivals=_RIVALS, epochs_of={}, rate_of={})
    variations = {
        "levels": lambda: _levels(plan, runtime, train),
        "policy-data": lambda: _policies(plan, runtime, train, bundles),
        "shots": lambda: _shots(plan, runtime, train),
    }[name]()
    points: list[Point] = []
    for variation in variations:
        tell(f"sweep {name}: {variation.value}")
        # Another bundle under the same name is another study, not a refusal after the match.
        digest = variation.runtime.bundle.digest[:12]
        part = Work(work.root / "states" / "sweep" / f"{name}-{variation.value}-{digest}")
        part.begin({"value": variation.value}, resume=True, overwrite=False)
        outcome = run_match(
            variation.plan, variation.runtime, variation.train, test, part, NoMeter(), tell
        )
        points += [
            Point(
                variation.value,
                standing.rival,
                standing.accuracy,
                standing.seconds,
                standing.faster.get(REFERENCE),
            )
            for standing in standings(variation.plan, outcome)
        ]
    values = tuple(variation.value for variation in variations)
    return Study(name, STUDIES[name], values, tuple(points))


def _levels(plan: MatchPlan, runtime: Runtime, train: Samples) -> list[Variation]:
    count = len(runtime.bundle.manifest["levels"])
    return [
        Variation(
            str(most), replace(plan, options=replace(plan.options, max_level=most)), runtime, train
        )
        for most in range(count)
    ]


def _shots(plan: MatchPlan, runtime: Runtime, train: Samples) -> list[Variation]:
    most = int(np.bincount(train.labels).max())
    return [
        Variation(str(count), plan, runtime, photos.first_of_each(train, count, seed=0))
        for count in SHOTS
        if count <= most
    ]


# ---- policies ------------------------------------------------------------------------------


def _policies(
    plan: MatchPlan, runtime: Runtime, train: Samples, bundles: Mapping[str, Path]
) -> list[Variation]:
    """Compare the shipped policy with its means and with predictions that know no photo.

    With bundles given, compare theirs instead: the same model compiled with other images.
    """
    if bundles:
        found = [Variation(name, plan, Runtime.open(path), train) for name, path in bundles.items()]
        return [Variation(_SHIPPED, plan, runtime, train), *found]
    shuffled = replace(runtime, engine=ShuffledPolicy(runtime.engine))
    return [
        Variation(_SHIPPED, plan, runtime, train),
        Variation("means", plan, replace(runtime, bundle=_with_means(runtime.bundle)), train),
        Variation("shuffled", plan, shuffled, train),
    ]


def _with_means(bundle: Bundle) -> Bundle:
    """Return the bundle as if its policy were each level's mean fidelity."""
    policy = bundle.manifest["policy"]
    changed = {**policy, "report": {**policy.get("report", {}), "shipped": "means"}}
    return replace(bundle, manifest={**bundle.manifest, "policy": changed})


class ShuffledPolicy:
    """Engine whose policy's answers are dealt out at random: right on average, for no photo."""

    def __init__(self, engine: Engine) -> None:
        self.name = engine.name
        self._engine = engine

    def version(self) -> str:
        return self._engine.version()

    def load(self, bundle: Bundle, *, threads: int | None = None) -> Executable:
        executable = self._engine.load(bundle, threads=threads)
        ask = executable.policy
        random = np.random.Generator(np.random.PCG64(0))

        def policy(views: np.ndarray) -> np.ndarray:
            answers: np.ndarray = random.permutation(ask(views))
            return answers

        executable.policy = policy  # type: ignore[method-assign]
        return executable
