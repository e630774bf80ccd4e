"""Ask a bundle on its device whether it computes what the compiler says it must.

`python -m pbc.runtime.self_test BUNDLE` prints one line of JSON, and ends with 0 where every number
of the manifest's `self_test` is met. Before a new bundle replaces one that works, `pbc deploy` runs
this on the board, with the board's own engine.

Images and labels are made by integers alone, θ is drawn as for a run, and every level is asked for
its samples' losses before and after one step of SGD: what a wrong file, library or kernel spoils in
the prefix, in the body, in its gradient or in the update shows there. The step is scaled by the
compiler so that it takes a fifth of the loss away.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc import plugins
from pbc.bundle import Bundle, trust
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.runtime.engines import Engine, Executable, guarded
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import body_inputs, initial_parameters
from pbc.util.terminal import one_line

IMAGES = 4
OPEN_CLASSES = 5
SEED = 0


@dataclass(frozen=True)
class SelfTest:
    """The distance of each part from what was expected, as a share of what one step changes.

    errors and tolerances: by "level 0", "level 2", "policy".
    """

    errors: Mapping[str, float]
    tolerances: Mapping[str, float]
    seconds: float

    @property
    def failed(self) -> list[str]:
        """Return the parts beyond their tolerance, NaN among them."""
        return [n for n, error in self.errors.items() if not error <= self.tolerances[n]]

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": not self.failed,
            "errors": {name: float(f"{error:.3g}") for name, error in self.errors.items()},
            "tolerances": dict(self.tolerances),
            "seconds": round(self.seconds, 3),
        }


def images(spec: InputSpec, count: int = IMAGES) -> np.ndarray:
    """Return f32[count, C, H, W]: ramps and stripes that differ by sample, normalised."""
    channels, height, width = spec.shape
    sample, row, column, channel = np.ogrid[:count, :height, :width, :channels]
    ramp = row * (3 + 2 * sample) + column * (5 - sample) + 61 * channel * (sample + 1)
    stripes = ((row // 4 + column // (3 + sample) + channel) % 2) * 96
    return spec.normalise(((ramp + stripes) % 256).astype(np.uint8))


def labels(classes: int, count: int = IMAGES) -> np.ndarray:
    """Return i64[count], every class in turn."""
    return np.arange(count, dtype=np.int64) % classes


def views(shape: list[int], count: int = IMAGES) -> np.ndarray:
    """Return f32[count, *shape] between -1 and 1, as the policy reads them."""
    numbers = np.arange(count * int(np.prod(shape)), dtype=np.int64)
    rows: np.ndarray = (numbers * 37 % 101 / 50 - 1).astype(np.float32)
    return rows.reshape(count, *shape)


def classes_of(manifest: Mapping[str, Any]) -> int:
    """Return the number of classes: the bundle's, or a few where the head is open."""
    return int(manifest.get("class_count") or OPEN_CLASSES)


def losses(
    executable: Executable, bundle: Bundle, level: int, learning_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples' losses f32[count] at a level, before and after one step."""
    classes = classes_of(bundle.manifest)
    executable.foresee(body_inputs(bundle, classes))
    pixels = images(InputSpec.from_json(bundle.manifest["input"]))
    objective = Objective("sgd", learning_rate, momentum=0.0)
    executable.start(initial_parameters(bundle, classes, SEED), objective)
    features = executable.prefix(level, pixels)
    before, _ = executable.forward(level, features, labels(classes))
    executable.update()
    after, _ = executable.forward(level, features, labels(classes))
    return before, after


def run(bundle: Bundle, engine: Engine | None = None) -> SelfTest:
    """Verify every file, and compare what the bundle's engine finds here with the manifest."""
    expected = bundle.manifest.get("self_test")
    if not isinstance(expected, dict):
        raise PbcError(f"{bundle.path} has no self-test: compile it again with this pbc")
    start = time.perf_counter()
    bundle.verify()
    engine = engine or plugins.load("pbc.engines", bundle.manifest["engine"])()
    executable = guarded.load(engine, bundle)
    errors: dict[str, float] = {}
    tolerances: dict[str, float] = {}
    for level, numbers in expected["levels"].items():
        found = losses(executable, bundle, int(level), numbers["learning_rate"])
        before, after = (numbers[when] for when in ("before", "after"))
        wanted = _like(found[0], before), _like(found[0], after)
        change = float(np.abs(wanted[1] - wanted[0]).mean())
        # A maximum would lose a NaN.
        errors[f"level {level}"] = float(np.max(np.abs(np.subtract(found, wanted))) / change)
        tolerances[f"level {level}"] = numbers["tolerance"]
    policy, own = expected.get("policy"), bundle.manifest.get("policy")
    if policy is not None and own is not None:
        fidelity = executable.policy(views(own["view"]))
        errors["policy"] = float(np.max(np.abs(fidelity - _like(fidelity, policy["fidelity"]))))
        tolerances["policy"] = policy["tolerance"]
    return SelfTest(errors, tolerances, time.perf_counter() - start)


def _like(found: np.ndarray, wanted: Sequence[Any]) -> np.ndarray:
    """Return the manifest's numbers as an array; raises PbcError unless they are as many."""
    try:
        return np.array(wanted, np.float64).reshape(found.shape)
    except ValueError:
        raise PbcError(f"the self-test has not {list(found.shape)} numbers to compare") from None


def main(path: str, *, signature_alone: bool = False) -> int:
    """Print the outcome of a bundle as JSON, a failure also in words; return the exit status.

    signature_alone: only say who signed it, for which its other files need not be there.
    """
    try:
        bundle = Bundle.open(Path(path), complete=not signature_alone)
        signer = trust.require(bundle)
        outcome = None if signature_alone else run(bundle)
    except PbcError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(f"{error.name} is not installed")
    signed = {} if signer is None else {"serial": signer.serial, "signer": signer.key.name}
    found = {} if outcome is None else outcome.to_json()
    sys.stdout.write(json.dumps({**found, **signed}) + "\n")
    failed = [] if outcome is None else outcome.failed
    if outcome is not None and failed:
        worst = ", ".join(
            f"{name} by {outcome.errors[name]:.2g} (at most {outcome.tolerances[name]:g})"
            for name in failed
        )
        return _refuse(f"the bundle computes other numbers here than it must: {worst}")
    return 0


def _refuse(reason: str) -> int:
    sys.stderr.write(one_line(f"error: {reason}") + "\n")
    return 1


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or (len(sys.argv) == 3 and sys.argv[1] != "--signature"):
        sys.exit("usage: python -m pbc.runtime.self_test [--signature] BUNDLE")
    sys.exit(main(sys.argv[-1], signature_alone=len(sys.argv) == 3))
