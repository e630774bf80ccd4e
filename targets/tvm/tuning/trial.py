"""Trials: two schedules of one function beside each other, in a process that may crash or hang.

The process is this file, run as a module: it reads requests and writes answers, a line of JSON
each. It imports no torch, and is ended with all its threads when it does not answer in time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from pbc.errors import PbcError
from pbc.util.processor import cores

START_SECONDS = 180.0
"""Time that the process may take to import TVM."""

TRIAL_SECONDS = 30.0
"""Time that a trial may take: a candidate that LLVM cannot digest in that time is none."""

TOLERANCE = 1e-4
"""Largest difference of two schedules' results, relative to the largest: sums are reordered."""

SAMPLE_SECONDS = 1e-4
MEASURED_SECONDS = 0.2
LEAST_ROUNDS, MOST_ROUNDS = 6, 200
WORTH_CONFIRMING = 0.97
HOPELESS = 1.5
READY = "ready"
THREADS = "TVM_NUM_THREADS"

Argument = tuple[Sequence[int], str]
"""The shape and the type of a tensor."""


class Trials:
    """Runs trials in a process of their own; a new one takes over where one crashed or hung."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        """facts: TVM's description of this machine's CPU."""
        self._facts = dict(facts)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process now; else the first trial does."""
        self._started()

    def run(
        self,
        baseline: str,
        candidate: str,
        arguments: Sequence[Argument],
        outputs: int,
        limit: float = TRIAL_SECONDS,
    ) -> dict[str, Any]:
        """Time two functions, given as TVM's JSON; the last arguments are what they put out.

        The answer has `seconds` and `baseline`, or `failure`: one line that says what happened.
        After `limit` seconds that is «no answer in time».
        """
        process = self._started()
        request = {
            "baseline": baseline,
            "candidate": candidate,
            "arguments": [[list(shape), dtype] for shape, dtype in arguments],
            "outputs": outputs,
        }
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it crashed of shows when it is read
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return self._answer(process, limit)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            threads = {THREADS: str(cores()), "TVM_BIND_THREADS": "0"}
            # A session of its own: Ctrl-C is ours to handle, and all of it can be ended at once.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pbc.targets.tvm.tuning.trial", json.dumps(self._facts)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **threads},
                start_new_session=True,
            )
            answer = self._answer(self._process, START_SECONDS)
            if READY not in answer:
                raise PbcError(f"the process for trials does not start: {answer['failure']}")
        assert self._process is not None
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], limit: float) -> dict[str, Any]:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], limit)
        line = process.stdout.readline() if readable else b""
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._end()
        return {"failure": f"crashed ({process.returncode})" if readable else "no answer in time"}

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


# ---- in the process -------------------------------------------------------------------------


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM would load it, for no use here
    import tvm

    target = tvm.target.Target(json.loads(sys.argv[1]))
    _say(answers, {READY: True})
    for line in sys.stdin:
        signal.alarm(round(2 * TRIAL_SECONDS))  # ends this, should nobody be there to do it
        try:
            answer = _trial(json.loads(line), target)
        except Exception as error:  # whatever a candidate's build raises, it is its failure
            answer = {"failure": first_line(error)}
        signal.alarm(0)
        _say(answers, answer)


def _say(answers: IO[str], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def first_line(error: Exception) -> str:
    """The message of an exception, in short."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _trial(request: Mapping[str, Any], target: Any) -> dict[str, Any]:
    import numpy as np
    import tvm

    random = np.random.default_rng(0)
    values = [_value(random, *argument) for argument in request["arguments"]]
    inputs = len(values) - request["outputs"]
    runs, results = [], []
    for name in ("baseline", "candidate"):
        function = _built(request[name], target)
        mine = [tvm.runtime.tensor(value) for value in values[inputs:]]
        given = [tvm.runtime.tensor(value) for value in values[:inputs]]
        runs.append(functools.partial(function, *given, *mine))
        runs[-1]()
        results.append([tensor.numpy() for tensor in mine])
    for expected, got in zip(*results, strict=True):
        largest = float(np.max(np.abs(expected), initial=1e-30))
        if not np.allclose(got, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
            return {"failure": "computes something else"}
    baseline, seconds = _fastest(runs, HOPELESS)
    if seconds < WORTH_CONFIRMING * baseline:
        # The fastest of many trials is often the luckiest: what looks good has to do it again.
        again, other = _fastest(runs, HOPELESS)
        if other / again > seconds / baseline:
            baseline, seconds = again, other
    return {"baseline": baseline, "seconds": seconds}


@functools.lru_cache(maxsize=32)
def _built(code: str, target: Any) -> Callable[..., None]:
    import tvm

    function = tvm.ir.load_json(code).with_attr("global_symbol", "main")
    library = tvm.compile(tvm.IRModule({"main": function}), target=target)
    built: Callable[..., None] = library["main"]
    return built


def _value(random: Any, shape: Sequence[int], dtype: str) -> Any:
    """Numbers that no function makes infinite; indices that are in range."""
    import numpy as np

    if "float" in dtype:
        return random.uniform(0.1, 1.0, shape).astype(dtype)
    return np.zeros(shape, dtype)


def _fastest(runs: Sequence[Callable[[], None]], hopeless: float) -> list[float]:
    """Seconds per call of each, in turn: what disturbs one disturbs the others.

    Ends early where the second takes `hopeless` times as long as the first.
    """
    # With one thread everything is computed by this one, and what it waits for is not its own.
    clock = time.thread_time if os.environ[THREADS] == "1" else time.perf_counter
    start = time.perf_counter()
    runs[0]()
    once = time.perf_counter() - start
    repeats = max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))
    best = [float("inf")] * len(runs)
    start = time.perf_counter()
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > MEASURED_SECONDS:
            break
        if turn >= 2 and best[1] > hopeless * best[0]:
            break
        for place, run in enumerate(runs):
            before = clock()
            for _ in range(repeats):
                run()
            best[place] = min(best[place], (clock() - before) / repeats)
    return best


if __name__ == "__main__":
    main()
