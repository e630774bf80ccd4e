"""The TVM engine: inference, and training by the step graphs that the compiler derived.

All it needs on the device is tvm_ffi, the TVM runtime, one shared library of 3 MB, and numpy; for a
GPU, the runtime's part for that too. Frozen tensors, θ, the optimizer's state, and what a forward
keeps for its update are then in the GPU's memory; images, features and losses cross over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from pbc.bundle import Bundle
from pbc.bundle.graph_name import BODY, GraphName
from pbc.errors import PbcError
from pbc.runtime.engines import Shapes
from pbc.runtime.engines.alignment import aligned_copy, aligned_zeros
from pbc.runtime.engines.derived import DerivedExecutable
from pbc.runtime.engines.tvm.devices import CPU, GPU, Device, use_gpu
from pbc.runtime.engines.tvm.library import (
    Graph,
    Library,
    Tensor,
    loaded,
    runtime,
    runtime_identity,
    runtime_path,
    tensor,
    use_threads,
)
from pbc.util import strict_json
from pbc.util.artifacts import Artifacts, default_folder
from pbc.util.processor import cores, cpu_identity, missing_flags
from pbc.util.shapes import ShapeError, check, dict_of, integer, list_of, record, text

_FORMAT = 1
_CALL = record(
    {
        "function": text(),
        "inputs": list_of(text(), most=2**16),
        "outputs": list_of(text(), most=2**16),
        "tensors": list_of(text(), most=2**18),
        "setup": list_of(text(), most=2**18),
    }
)
_CALLS = record(
    {
        "format": integer(),
        "machine": text(),
        "flags": list_of(text(), most=1024),
        "graphs": dict_of(_CALL, most=4096),
    },
    {"sm": integer(1, 10_000)},
    more=True,
)

_T = TypeVar("_T")

_log = logging.getLogger("pbc")

# By what is in them. The runtime does not give back all that loading one takes.
_executables: dict[str, Any] = {}


class TvmEngine:
    """Run bundles with the TVM runtime."""

    name = "tvm"

    def version(self) -> str:
        """Name the code that the libraries call: their own is part of the bundle."""
        libc = " ".join(platform.libc_ver())
        return f"{runtime_identity()} with {libc} on {cpu_identity()}"

    def load(self, bundle: Bundle, *, threads: int | None = None) -> TvmExecutable:
        return TvmExecutable(bundle, threads)


class TvmExecutable(DerivedExecutable):
    """A bundle's graphs, each loaded when it is first run."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        runtime()
        super().__init__(bundle)
        self._threads = threads or cores()
        self._loader = _Loader(bundle)
        self._hyperparameters: dict[str, tuple[np.ndarray, Tensor]] = {}

    def foresee(self, inputs: Shapes) -> None:
        # Which shapes a library takes is known to it alone. What it refuses, it has not read.
        zeros = {name: aligned_zeros(shape, np.float32) for name, shape in inputs.items()}
        self._run(str(BODY.at(0)), zeros)

    def _run(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        graph = self._loader.graph(name)
        for given in graph.inputs:
            if given not in values:
                raise PbcError(
                    f"graph {name} of {self._bundle.path} reads {given!r}, which this pbc does not "
                    "know: upgrade pbc"
                )
        use_threads(self._threads)
        outputs: dict[str, Any] = graph.run({**values, **self._constant(values)})
        return outputs

    def _constant(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Hyperparameters where the graphs read them: most are the same at every step."""
        scalars = {n: v for n, v in values.items() if isinstance(v, np.ndarray) and not v.ndim}
        for name, value in scalars.items():
            if name not in self._hyperparameters or self._hyperparameters[name][0] != value:
                self._hyperparameters[name] = value, self._placed(value)
        return {name: self._hyperparameters[name][1] for name in scalars}

    def _placed(self, value: np.ndarray) -> Tensor:
        return Tensor(self._loader.device.placed(tensor(value)))

    def _require(self, name: str) -> None:
        self._loader.require(name)

    def _feature(self, value: np.ndarray) -> Any:
        return self._placed(value)

    def _kept(self, value: np.ndarray) -> Any:
        return self._placed(aligned_copy(value, np.float32))


# ---- loading a graph -----------------------------------------------------------------------


class _Loader:
    """Loads a bundle's libraries and weights when they are first read; what is the same is shared.

    Both are unpacked into the folder of artifacts. From there weights are mapped: what several
    processes read is in memory once, and may leave it when memory is short.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        file = bundle.manifest.get("calls")
        if not isinstance(file, str):
            raise PbcError(
                f"{bundle.path} does not say how its graphs are called; compile it again"
            )
        facts = bundle.json(file)
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
            raise PbcError(
                f"{bundle.path} calls its graphs by format {str(found)[:20]}; this pbc knows "
                f"{_FORMAT}: upgrade pbc"
            )
        try:
            check(facts, _CALLS)
        except ShapeError as error:
            raise PbcError(f"{bundle.path}: {file} is not valid: {error}") from error
        self._calls: dict[str, dict[str, Any]] = facts["graphs"]
        self._refuse_other_machines(facts)
        self.device = self._device(facts)
        self._libraries: dict[str, Library] = {}
        self._weights: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, Any] = {}
        self._graphs: dict[str, Graph] = {}
        self._contents: dict[str, Graph] = {}

    def _refuse_other_machines(self, facts: Mapping[str, Any]) -> None:
        """Code for another CPU would end the process, and say nothing."""
        built, own = str(facts["machine"]), platform.machine()
        # A 32-bit system may run on a 64-bit kernel, and name that.
        if built != own and not (built == "arm" and own.startswith(("arm", "aarch64"))):
            raise PbcError(
                f"{self._bundle.path} is built for {built}, this machine is {own}: compile for it "
                "(pbc targets)"
            )
        missing = missing_flags(facts["flags"])
        if missing:
            raise PbcError(
                f"{self._bundle.path} is built for a CPU with {', '.join(missing)}, which this one "
                "lacks: compile for it (pbc targets)"
            )

    def _device(self, facts: Mapping[str, Any]) -> Device:
        """The device of the tensors; a GPU is prepared for the bundle's kernels."""
        if "sm" not in facts:
            return CPU
        try:
            use_gpu(int(facts["sm"]), Path(runtime_path()))
        except PbcError as error:
            raise PbcError(
                f"{self._bundle.path} is built for an NVIDIA GPU of sm_{facts['sm']}: {error}"
            ) from error
        return GPU

    def require(self, name: str) -> None:
        """Refuse a graph that the bundle does not have."""
        if name in self._bundle.manifest["graphs"] and name in self._calls:
            return
        reason = ""
        if GraphName.parse(name).trains:
            reason = ": it cannot train with these options; compile the model again"
        raise PbcError(f"{self._bundle.path} has no graph {name}{reason}")

    def graph(self, name: str) -> Graph:
        graph = self._graphs.get(name)
        if graph is None:
            self.require(name)
            call, file = self._calls[name], self._bundle.manifest["graphs"][name]
            key = json.dumps([self._bundle.sha256(file), call])
            if key not in self._contents:
                self._contents[key] = self._loaded(file, call)
            graph = self._graphs[name] = self._contents[key]
        return graph

    def _loaded(self, file: str, call: Mapping[str, Any]) -> Graph:
        library = self._library(file)
        try:
            return library.graph(
                call["function"],
                call["inputs"],
                call["outputs"],
                [self._tensor(place) for place in call["tensors"]],
                [self._mapped(place) for place in call["setup"]],
            )
        except AttributeError as error:
            raise PbcError(
                f"{file} of {self._bundle.path} has no function {call['function']}; compile the "
                "model again"
            ) from error

    def _library(self, file: str) -> Library:
        sha256 = self._bundle.sha256(file)
        if sha256 not in self._libraries:
            try:
                if sha256 not in _executables:
                    _executables[sha256] = self._unpacked(file, loaded)
                self._libraries[sha256] = Library(_executables[sha256], self.device)
            except (RuntimeError, OSError, AttributeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise PbcError(
                    f"{self._bundle.path}: the TVM runtime cannot load {file}: {reason}"
                ) from error
        return self._libraries[sha256]

    def _tensor(self, place: str) -> Any:
        """A frozen tensor where graphs read it, once for all of them."""
        if place not in self._tensors:
            self._tensors[place] = self.device.placed(self._mapped(place))
        return self._tensors[place]

    def _mapped(self, place: str) -> Any:
        file, _, key = place.partition("#")
        if file not in self._weights:
            try:
                found = self._unpacked(file, _views)
            except (SafetensorError, ValueError, KeyError) as error:
                raise PbcError(f"{self._bundle.path}: {file} holds no tensors: {error}") from error
            self._weights[file] = {name: tensor(value) for name, value in found.items()}
        if key not in self._weights[file]:
            raise PbcError(f"{self._bundle.path}: {file} has no tensor {key[:80]!r}")
        return self._weights[file][key]

    def _unpacked(self, file: str, load: Callable[[Path], _T]) -> _T:
        """Return what `load` makes of a file of the bundle."""
        name = PurePosixPath(file).name

        def write(folder: Path) -> None:
            (folder / name).write_bytes(self._bundle.read(file))

        key = hashlib.sha256(f"{name} {self._bundle.sha256(file)}".encode()).hexdigest()
        try:
            sha256 = {name: self._bundle.sha256(file)}
            return load(Artifacts(default_folder()).get(key, write, sha256) / name)
        except OSError as error:
            _tell_once(f"unpacked files are not kept: {error.strerror or error}")
        try:
            with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
                write(Path(folder))
                return load(Path(folder) / name)
        except OSError as error:
            raise PbcError(
                f"no folder has room for {file} of {self._bundle.path}: {error.strerror or error}; "
                "PBC_CACHE or TMPDIR can name one"
            ) from error


def _views(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, each a view of the mapped file."""
    content = np.memmap(path, np.uint8, mode="c")
    with safe_open(path, framework="numpy"):  # verifies header, types, shapes and places
        begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = strict_json.loads(content[8:begin].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, row in header.items():
        start, end = (begin + offset for offset in row["data_offsets"])
        dtype = np.dtype(safetensors.numpy._TYPES[row["dtype"]])
        tensors[name] = np.asarray(content[start:end]).view(dtype).reshape(row["shape"])
    return tensors


@cache
def _tell_once(message: str) -> None:
    _log.warning(message)
