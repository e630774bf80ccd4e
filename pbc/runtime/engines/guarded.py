"""Load and run a bundle's graphs so that whatever is wrong with them is said of the bundle.

Graphs are content from elsewhere: an operator given too few arguments, or shapes that do not meet,
fail in the engine, deep inside a framework. What comes out is compared with what the manifest says
before anything else reads it. A call that only infers, and would take too much memory, is made in
halves: no result depends on the photos beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np

from pbc.bundle import Bundle, trust
from pbc.bundle.graph_name import PREFIX
from pbc.errors import PbcError, reason_of
from pbc.runtime.engines import Arrays, Engine, Executable, NodeTimes, Shapes
from pbc.runtime.engines.bounds import TooManyPhotosError
from pbc.runtime.engines.forwarding import ForwardingExecutable
from pbc.runtime.objective import Objective
from pbc.util.processor import check_threads

_LONGEST = 200
# The name of a result that has none.
_ONE = ""


def load(engine: Engine, bundle: Bundle, *, threads: int | None = None) -> Executable:
    """Make a bundle executable if it may be; raises PbcError whatever is wrong with it.

    Raises UsageError for a number of threads that is none, or too many here.
    """
    trust.require(bundle)
    check_threads(threads)
    with _saying(bundle, "it cannot be loaded"):
        return GuardedExecutable(bundle, engine.load(bundle, threads=threads))


class GuardedExecutable(ForwardingExecutable):
    """An executable whose failures and results are looked at."""

    def __init__(self, bundle: Bundle, executable: Executable) -> None:
        super().__init__(executable)
        self._bundle = bundle
        self._features = {name: tuple(sizes) for name, sizes in bundle.manifest["features"].items()}
        self._proxies = len(bundle.manifest["levels"]) - 1
        self._classes = 0

    def foresee(self, inputs: Shapes) -> None:
        with _saying(self._bundle, "the body of level 0 cannot be run"):
            super().foresee(inputs)

    def policy(self, views: np.ndarray) -> np.ndarray:
        with _saying(self._bundle, "its policy cannot be run"):
            fidelity = _in_parts(
                lambda part: {_ONE: self._executable.policy(views[part])}, 0, len(views)
            )[_ONE]
        self._expect("its policy returns", fidelity, (len(views), self._proxies))
        return fidelity

    def prefix(self, level: int, images: np.ndarray) -> dict[str, np.ndarray]:
        with _saying(self._bundle, f"the prefix of level {level} cannot be run"):
            features = _in_parts(
                lambda part: self._executable.prefix(level, images[part]), 0, len(images)
            )
        if self._bundle.has_graph(PREFIX.at(level)):
            missing = self._features.keys() - features.keys()
            if missing:
                raise PbcError(
                    f"{self._bundle.path}: the prefix of level {level} does not return "
                    f"{min(missing)!r}, which the manifest names"
                )
            for name, sizes in self._features.items():
                what = f"the prefix of level {level} returns {name!r}"
                self._expect(what, features[name], (len(images), *sizes))
        return features

    def logits(self, level: int, features: Arrays) -> np.ndarray:
        with _saying(self._bundle, f"the body of level {level} cannot be run"):
            logits = _in_parts(
                lambda part: {_ONE: self._executable.logits(level, _rows(features, part))},
                0,
                _count(features),
            )[_ONE]
        self._expect_logits(level, features, logits)
        return logits

    def start(self, parameters: Arrays, objective: Objective) -> None:
        # An open head's parameters begin with the class count.
        for name in self._bundle.manifest["head"]:
            if name in parameters:
                self._classes = len(parameters[name])
        with _saying(self._bundle, "its parameters cannot be set"):
            super().start(parameters, objective)

    def forward(
        self, level: int, features: Arrays, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        with _saying(self._bundle, f"the body of level {level} cannot be run"):
            losses, logits = super().forward(level, features, labels)
        self._expect(f"the body of level {level} returns losses", losses, (len(labels),))
        self._expect_logits(level, features, logits)
        return losses, logits

    def update(self) -> None:
        with _saying(self._bundle, "it cannot be trained"):
            super().update()

    def gradients(self) -> dict[str, np.ndarray]:
        with _saying(self._bundle, "it cannot be trained"):
            return super().gradients()

    def select(self, names: Collection[str] | None) -> None:
        if names is not None:
            unknown = sorted(set(names) - self._bundle.manifest["parameters"].keys())
            if unknown or not names:
                wrong = f"no {unknown[0]!r}" if unknown else "nothing"
                raise PbcError(f"{self._bundle.path} has {wrong} to train among what was selected")
        with _saying(self._bundle, "it cannot be trained"):
            super().select(names)

    def node_times(self) -> NodeTimes:
        with _saying(self._bundle, "its operators cannot be timed"):
            return super().node_times()

    def _expect_logits(self, level: int, features: Arrays, logits: np.ndarray) -> None:
        classes = self._classes or logits.shape[-1]
        what = f"the body of level {level} returns logits"
        self._expect(what, logits, (_count(features), classes))

    def _expect(self, what: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
        if value.shape != shape or value.dtype.kind != "f":
            raise PbcError(
                f"{self._bundle.path}: {what} of {value.dtype} {list(value.shape)}; "
                f"expected float32 {list(shape)}"
            )


def _count(features: Arrays) -> int:
    return len(next(iter(features.values())))


def _rows(features: Arrays, part: slice) -> dict[str, np.ndarray]:
    return {name: value[part] for name, value in features.items()}


def _in_parts(
    call: Callable[[slice], dict[str, np.ndarray]], begin: int, end: int
) -> dict[str, np.ndarray]:
    """Make a call of the photos from `begin` to `end`, or of halves where it takes too much."""
    try:
        return call(slice(begin, end))
    except TooManyPhotosError:
        middle = (begin + end) // 2
    parts = [_in_parts(call, begin, middle), _in_parts(call, middle, end)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def _saying(bundle: Bundle, what: str) -> Iterator[None]:
    """Turn any failure inside into one line about the bundle."""
    try:
        yield
    except PbcError:
        raise
    except MemoryError as error:
        raise PbcError(f"{bundle.path}: {what}: there is not enough memory") from error
    except ModuleNotFoundError:
        raise
    except OSError as error:
        raise PbcError(f"{bundle.path}: {what}: {error.strerror or error}") from error
    except Exception as error:
        reason = reason_of(error)[:_LONGEST]
        raise PbcError(f"{bundle.path}: {what}: {reason}") from error
