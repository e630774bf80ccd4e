"""Load a bundle's graphs, optimised for this CPU once, with weights that are mapped and shared."""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from pbc.bundle import Bundle
from pbc.bundle.graph_name import GraphName
from pbc.errors import PbcError, reason_of
from pbc.runtime.engines.alignment import ALIGNMENT
from pbc.runtime.engines.onnxruntime import weights as onnx_weights
from pbc.runtime.engines.onnxruntime.bounds import Bounds
from pbc.runtime.engines.onnxruntime.cut import Operator, cut, operators, output_names
from pbc.runtime.engines.onnxruntime.external import check_external
from pbc.runtime.engines.onnxruntime.node_times import node_ms
from pbc.runtime.engines.onnxruntime.session import (
    CPU,
    ERRORS,
    SessionGraph,
    providers,
    session_options,
)
from pbc.util.artifacts import Artifacts, default_folder
from pbc.util.processor import cpu_identity

_GRAPH_FILE = "graph.onnx"
_WEIGHTS_FILE = "weights.bin"
_SHARED_SUFFIX = ".safetensors"
# Smaller tensors stay in the graph's file: onnxruntime refuses to load one without any.
_EXTERNAL_BYTES = 1024
# Counts up where entries of an older pbc would not do.
_ENTRY_FORMAT = 3
# How a graph says where a kernel's own layout of a weight lies: MatMul+HASH|OFFSET;LENGTH;CHECKSUM
_PREPACKED = re.compile(rb"\+\d+((?:\|\d+;\d+;\d+)+)")

_log = logging.getLogger("pbc")


def version() -> str:
    """Name everything whose change could change a result's last bit."""
    return f"onnxruntime {onnxruntime.__version__} on {cpu_identity()}"


class GraphLoader:
    """Makes sessions of a bundle's graphs; graphs of the same content share one.

    A graph with weights is optimised for this CPU once, and kept: from there its weights are
    mapped, laid out as the kernels want them. ResNet-50 is ready in a sixth of the time, most of
    which goes into verifying the file, and eight graphs that read its weights hold 181 MB (PSS)
    where they held 936. A step's two graphs read frozen weights from the bundle's own file, mapped
    once: half of what ViT-B's would take. A graph without weights is loaded as it is.
    """

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._bundle = bundle
        self._threads = threads
        self._batched = ("x", "view", "labels", *bundle.manifest["features"])
        self._providers = providers(bundle)
        self._graphs: dict[str, SessionGraph] = {}
        self._contents: dict[str, SessionGraph] = {}
        self._outputs: dict[str, tuple[str, ...]] = {}
        self._files: dict[tuple[int, int], np.ndarray] = {}
        self._shared: list[OrtValue] = []  # sessions read them, and do not hold on to them

    def require(self, name: str) -> None:
        """Refuse a graph that the bundle does not have."""
        if self._bundle.has_graph(name):
            return
        reason = ""
        if GraphName.parse(name).trains:
            reason = ": it cannot train with these options; compile the model again"
        raise PbcError(f"{self._bundle.path} has no graph {name}{reason}")

    def graph(self, name: str) -> SessionGraph:
        graph = self._graphs.get(name)
        if graph is None:
            self.require(name)
            key = self._key(name)
            if key not in self._contents:
                bounds = self.bounds(name)
                session = self._session(name, key)
                self._contents[key] = SessionGraph(session, self._title(name), bounds)
            graph = self._graphs[name] = self._contents[key]
        return graph

    def bounds(self, name: str) -> Bounds:
        """Return the bounds of a graph that need not be loaded."""
        self.require(name)
        trains = GraphName.parse(name).trains
        return Bounds(self._model(name), self._title(name), self._batched, trains=trains)

    def outputs(self, name: str) -> list[str]:
        """Return the names of all that a graph of the bundle returns."""
        return output_names(self._bundle.read(self._bundle.graph_file(name)))

    def select(self, name: str, outputs: Sequence[str] | None) -> list[str]:
        """Have a graph compute some of its outputs alone, or all again; return what it reads."""
        if outputs is None:
            self._outputs.pop(name, None)
        else:
            self._outputs[name] = tuple(outputs)
        # What it was is let go of, as is whoever shares it: it is kept, and soon loaded again.
        if name in self._graphs:
            old = self._graphs[name]
            self._graphs = {n: graph for n, graph in self._graphs.items() if graph is not old}
            self._contents = {key: g for key, g in self._contents.items() if g is not old}
        model = self._bundle.read(self._bundle.graph_file(name))
        return cut(model, output_names(model) if outputs is None else outputs)[1]

    def profiled(
        self, name: str, values: Mapping[str, Any], runs: int
    ) -> tuple[dict[str, float], list[Operator]]:
        """Run a graph so often; return the least milliseconds of its nodes, and these, in order."""
        with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
            options = self._options(name)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            optimised = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(optimised)
            session = self._open(self._unpack(name, Path(folder)), options)
            graph = SessionGraph(session, name, self.bounds(name))
            for _ in range(runs):
                graph.run(values)
            profile = Path(session.end_profiling())
            return node_ms(profile), operators(optimised.read_bytes())

    def _title(self, name: str) -> str:
        return f"graph {name} of {self._bundle.path}"

    def _model(self, name: str) -> bytes:
        """Return the graph, cut to what was selected of it."""
        model = self._bundle.read(self._bundle.graph_file(name))
        return cut(model, self._outputs[name])[0] if name in self._outputs else model

    def _weights(self, name: str) -> list[str]:
        return self._bundle.weight_files(name) or []

    def _key(self, name: str) -> str:
        """Return the hash of all that decides what a graph becomes on this device."""
        sha256 = self._bundle.sha256
        parts = [sha256(self._bundle.graph_file(name))]
        # The graph says by what names it reads its weights.
        parts += [f"{PurePosixPath(file).name} {sha256(file)}" for file in self._weights(name)]
        parts += [f"format {_ENTRY_FORMAT}", version(), *self._providers]
        parts += [f"returns {output}" for output in self._outputs.get(name, ())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _session(self, name: str, key: str) -> Any:
        if not self._weights(name):
            return self._plain(name, None)
        if self._providers != (CPU,):
            # What other providers make of a graph cannot be written down.
            return self._from_temporary_folder(name)
        try:
            artifacts = Artifacts(default_folder())
            try:
                return self._optimised(name, artifacts.get(key, partial(self._make, name)))
            except ERRORS:
                # Not damaged, that was looked at: onnxruntime cannot read what it wrote, such as
                # kernels of int8 depthwise convolutions with a part of no length.
                artifacts.discard(key)
                plain = partial(self._make, name, prepacked=False)
                return self._optimised(name, artifacts.get(key, plain))
        except (OSError, *ERRORS) as error:
            session = self._from_temporary_folder(name)
            _tell_once(f"optimised graphs are not kept: {_first_line(error)}")
            return session

    def _make(self, name: str, folder: Path, prepacked: bool = True) -> None:
        """Write the graph and its weights as onnxruntime's optimiser leaves them for this CPU.

        prepacked: with kernels' own layouts of the weights, where these can be read where they lie.
        """
        with tempfile.TemporaryDirectory(dir=folder) as source:
            model = self._unpack(name, Path(source))
            if GraphName.parse(name).trains:
                self._open(model, self._saving(name, folder, prepacked=False))
                onnx_weights.share(folder / _GRAPH_FILE, folder / _WEIGHTS_FILE, model)
                return
            # As the kernels repack them, weights need no copy (ignored before 1.21). But kernels
            # read them by aligned loads, and a tensor of any length may lie in front of them.
            if prepacked:
                self._open(model, self._saving(name, folder, prepacked=True))
                if not _misaligned((folder / _GRAPH_FILE).read_bytes()):
                    return
                (folder / _WEIGHTS_FILE).unlink()
            self._open(model, self._saving(name, folder, prepacked=False))

    def _saving(self, name: str, folder: Path, prepacked: bool) -> Any:
        options = self._options(name)
        options.optimized_model_filepath = str(folder / _GRAPH_FILE)
        for entry, value in {
            "optimized_model_external_initializers_file_name": _WEIGHTS_FILE,
            "optimized_model_external_initializers_min_size_in_bytes": str(_EXTERNAL_BYTES),
            "save_external_prepacked_constant_initializers": str(int(prepacked)),
        }.items():
            options.add_session_config_entry(f"session.{entry}", value)
        return options

    def _optimised(self, name: str, folder: Path) -> Any:
        options = self._options(name, optimised=True)
        shared = {file.name for file in folder.iterdir() if file.suffix == _SHARED_SUFFIX}
        if shared:
            weights = onnx_weights.outside((folder / _GRAPH_FILE).read_bytes())
            for tensor, weight in weights.items():
                if weight.place.file in shared:
                    options.add_initializer(tensor, self._mapped(folder, weight))
        return self._open(folder / _GRAPH_FILE, options)

    def _mapped(self, folder: Path, weight: onnx_weights.Weight) -> Any:
        """Return a frozen tensor in the one mapping of its file: graphs would each map it again."""
        file = folder / weight.place.file
        status = file.stat()
        key = status.st_dev, status.st_ino  # entries that share a file link to it
        if key not in self._files:
            self._files[key] = np.memmap(file, np.uint8, "c")
        start = weight.place.offset
        content = self._files[key][start : start + weight.place.length]
        array = np.asarray(content.view(weight.dtype).reshape(weight.shape))
        self._shared.append(OrtValue.ortvalue_from_numpy(array))
        return self._shared[-1]

    def _from_temporary_folder(self, name: str) -> Any:
        """Load as it is, from files that are needed until it is loaded."""
        try:
            with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
                return self._plain(name, Path(folder))
        except OSError as error:
            raise PbcError(
                f"no folder has room for the weights of {self._bundle.path}: "
                f"{error.strerror or error}; PBC_CACHE or TMPDIR can name one"
            ) from error

    def _plain(self, name: str, folder: Path | None) -> Any:
        file = self._bundle.graph_file(name)
        model: Path | bytes
        if folder is None:
            model = self._model(name)
            self._check(name, model)  # what is loaded from bytes has no files beside it
        else:
            model = self._unpack(name, folder)
        try:
            return self._open(model, self._options(name))
        except ERRORS as error:
            raise PbcError(
                f"{self._bundle.path}: onnxruntime {onnxruntime.__version__} cannot load {file}: "
                f"{_first_line(error)}"
            ) from error

    def _unpack(self, name: str, folder: Path) -> Path:
        """Put a graph and its weights side by side; return the graph."""
        graph = self._bundle.graph_file(name)
        model = self._model(name)
        self._check(name, model)
        (folder / PurePosixPath(graph).name).write_bytes(model)
        for file in self._weights(name):
            (folder / PurePosixPath(file).name).write_bytes(self._bundle.read(file))
        return folder / PurePosixPath(graph).name

    def _check(self, name: str, model: bytes) -> None:
        """Refuse a graph that reads files which the manifest does not name for it."""
        graph = self._bundle.graph_file(name)
        sizes = {
            PurePosixPath(file).name: self._bundle.size_bytes(file) for file in self._weights(name)
        }
        names = [*sizes, PurePosixPath(graph).name]
        try:
            if len(set(names)) != len(self._weights(name)) + 1:
                raise ValueError("two of its files have one name")
            check_external(model, sizes)
        except ValueError as error:
            raise PbcError(f"{self._bundle.path}: cannot load {graph}: {error}") from error

    def _options(self, name: str, optimised: bool = False) -> Any:
        options = session_options(self._threads, optimised)
        if GraphName.parse(name).trains:
            # A layout of its own would be a copy for each graph. A step multiplies by a weight for
            # many rows at once, and laying it out each time is little beside that.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _open(self, model: Path | bytes, options: Any) -> Any:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=list(self._providers))


def _misaligned(graph: bytes) -> bool:
    """Return whether a saved graph has repacked weights at an address that kernels cannot read."""
    places = b"".join(_PREPACKED.findall(graph)).split(b"|")[1:]
    return any(int(place.partition(b";")[0]) % ALIGNMENT for place in places)


@cache
def _tell_once(message: str) -> None:
    _log.warning(message)


def _first_line(error: BaseException) -> str:
    """Return what onnxruntime or the system says, without the code in front."""
    return reason_of(error).rpartition("[ONNXRuntimeError] : ")[2]
