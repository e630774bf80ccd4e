"""What an engine computes from a bundle, stage by stage: the same script on the board and here.

    python stages.py BUNDLE OUT.npz

Prints what it ran on, what is installed there and what was imported, for the test to see that
nothing heavier than the engine took part.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters
from pbc.runtime.runtime import Runtime

IMAGES = 3
STEPS = 2
# At these a step moves θ by far more than float32's rounding of θ.
RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}


def results(bundle: Path) -> dict[str, np.ndarray]:
    """Return every tensor that crosses the border between runtime and engine, by a name that tells.

    Two steps of each optimizer at each level, since the first finds its state empty. Of parameters
    it is what the steps changed, which would drown in the parameters themselves.
    """
    runtime = Runtime.open(bundle)
    manifest = runtime.bundle.manifest
    classes = len(manifest["classes"])
    random = np.random.Generator(np.random.PCG64(0))
    images = random.uniform(-2, 2, (IMAGES, *runtime.spec.shape)).astype(np.float32)
    labels = random.integers(classes, size=IMAGES)
    executable = runtime.engine.load(runtime.bundle, threads=1)
    found: dict[str, np.ndarray] = {}
    if manifest.get("policy") is not None:
        shape = (IMAGES, *manifest["policy"]["view"])
        views = random.uniform(-1, 1, shape).astype(np.float32)
        found["policy"] = executable.policy(views)
    parameters = initial_parameters(runtime.bundle, classes, 0)
    for level in range(len(manifest["levels"])):
        executable.start(parameters, Objective())
        features = executable.prefix(level, images)
        found |= {f"prefix {level}: {name}": value for name, value in features.items()}
        found[f"body {level}: logits"] = executable.logits(level, features)
        for optimizer, rate in RATES.items():
            step = f"step {level} {optimizer}"
            objective = Objective(optimizer, rate, weight_decay=0.1, label_smoothing=0.1)
            executable.start(parameters, objective)
            for number in range(STEPS):
                losses, _ = executable.forward(level, features, labels)
                found[f"{step}: losses {number}"] = losses
                executable.update()
            for name, value in executable.parameters().items():
                found[f"{step}: movement of {name}"] = value - parameters[name]
            state = executable.optimizer_state()
            found |= {f"{step}: {name}": value for name, value in state.items()}
    return found


def main() -> None:
    """Write the results, and print what this process is."""
    np.savez(sys.argv[2], **results(Path(sys.argv[1])))  # type: ignore[arg-type]
    facts = {
        "machine": platform.machine(),
        "installed": sorted({found.name.lower() for found in metadata.distributions()}),
        "imported": sorted({name.partition(".")[0] for name in sys.modules}),
    }
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
