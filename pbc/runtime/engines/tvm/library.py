"""Libraries that TVM built, in the TVM runtime: tvm_ffi and one shared library, no compiler."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pbc.errors import PbcError
from pbc.runtime.engines.alignment import aligned
from pbc.runtime.engines.tvm.devices import CPU, Device, in_numpy
from pbc.util.extras import install

RUNTIME_VARIABLE = "PBC_TVM_RUNTIME"
_ANY_CORE = 1
_RUNTIME = "libtvm_runtime.so"

# Pools of threads belong to the thread that runs a graph; so does what was said to them.
_pools = threading.local()


@cache
def runtime() -> Any:
    """Load the TVM runtime, once; return the module tvm_ffi."""
    # They are read when the first pool is made. Bound to cores, its threads, and ours with them,
    # could not make way for whatever else runs there.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # How often its idle threads yield before they sleep, and before the process may end: by default
    # 300,000 times, which is a tenth of a second, or minutes where other programs want the cores.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
    path = runtime_path()
    try:
        with _without("torch"):
            import tvm_ffi
    except ImportError as error:
        raise PbcError(
            f"the tvm engine needs tvm_ffi, which is not installed: {install('device-tvm')}"
        ) from error
    try:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise PbcError(f"the TVM runtime {path} cannot be loaded: {error}") from error
    return tvm_ffi


@cache
def runtime_path() -> str:
    """Find the TVM runtime: where $PBC_TVM_RUNTIME says, in the wheel of apache-tvm, or a system's.

    Looking into the wheel imports nothing of it.
    """
    named = os.environ.get(RUNTIME_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise PbcError(f"{RUNTIME_VARIABLE} is {named}, which is no file; {_how()}")
        return named
    wheel = importlib.util.find_spec("tvm")
    for folder in (wheel.submodule_search_locations or []) if wheel else []:
        path = Path(folder) / "lib" / _RUNTIME
        if path.is_file():
            return str(path)
    found = ctypes.util.find_library("tvm_runtime")
    if found is None:
        raise PbcError(f"the tvm engine needs {_RUNTIME}, which is not installed: {_how()}")
    return found


def _how() -> str:
    return f"pip install 'apache-tvm>=0.27,<0.28', or let {RUNTIME_VARIABLE} name the file"


@cache
def runtime_identity() -> str:
    """Return the versions of the runtime's two parts; the one has none but its content."""
    path = Path(runtime_path())
    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:  # found by name alone
        content = str(path)
    return f"tvm runtime {content}, tvm_ffi {runtime().__version__}"


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Hide a package from what is imported inside the block, unless it is there already.

    tvm_ffi imports torch where it finds it, for a use that is not ours: 200 MB and seconds.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def use_threads(count: int) -> None:
    """Let the graphs that this thread runs from now on use this many threads."""
    if getattr(_pools, "threads", None) == count:
        return
    # For the pool that is not made yet, and for the one that is.
    os.environ["TVM_NUM_THREADS"] = str(count)
    runtime().get_global_func("runtime.config_threadpool")(_ANY_CORE, count)
    _pools.threads = count


def loaded(path: Path) -> Any:
    """Load a library's file, which is needed no longer then."""
    return runtime().load_module(str(path))


class Library:
    """A loaded library, ready to run on a device."""

    def __init__(self, executable: Any, device: Device = CPU) -> None:
        self._device = device
        self._machine = executable["vm_load_executable"]()
        self._machine["vm_initialization"](*device.initialization())

    def graph(
        self,
        function: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        tensors: Sequence[Any],
        setup: Sequence[Any],
    ) -> Graph:
        """One of the library's functions, with the frozen tensors that it reads."""
        placed = self._device.placed
        held = [placed(tensor(value)) for value in tensors]
        if setup:
            read = [placed(tensor(value)) for value in setup]
            held += list(self._machine[f"{function}_setup"](*read))
        return Graph(self._machine[function], inputs, outputs, held, self._device)


class Graph:
    """A function of a library, called by names."""

    def __init__(
        self,
        function: Any,
        inputs: Sequence[str],
        outputs: Sequence[str],
        held: Sequence[Any],
        device: Device = CPU,
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._function, self._held, self._device = function, held, device

    def run(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Feed what the graph reads, arrays or tensors; every output has memory of its own."""
        given = [self._device.placed(tensor(values[name])) for name in self.inputs]
        results = self._function(*given, *self._held)
        return {n: Tensor(value) for n, value in zip(self.outputs, results, strict=True)}


class Tensor:
    """A tensor of the runtime that holds on to its memory."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def numpy(self) -> np.ndarray:
        """View its memory; of a GPU's, a copy."""
        return in_numpy(self.value)


def tensor(value: Any) -> Any:
    """Return the runtime's own tensor; of an array, a view wherever that is possible."""
    if isinstance(value, Tensor):
        return value.value
    if isinstance(value, np.ndarray):
        return runtime().from_dlpack(aligned(value))
    return value
