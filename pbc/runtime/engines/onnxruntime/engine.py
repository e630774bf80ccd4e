"""The ONNX Runtime engine: inference, and training by the step graphs that the compiler derived.

All it needs on the device is onnxruntime and numpy.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import ExecutionOrder, GraphOptimizationLevel, OrtValue, SessionOptions
from onnxruntime.capi import onnxruntime_pybind11_state as failures

from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.runtime.engines.derived import ALIGNMENT, DerivedExecutable, aligned
from pbc.runtime.engines.onnxruntime import weights as onnx_weights
from pbc.util.artifacts import Artifacts, default_folder
from pbc.util.processor import cores, cpu_identity

_CPU = "CPUExecutionProvider"
_ERRORS = (
    failures.EPFail,
    failures.EngineError,
    failures.Fail,
    failures.InvalidArgument,
    failures.InvalidGraph,
    failures.InvalidProtobuf,
    failures.NoModel,
    failures.NoSuchFile,
    failures.NotImplemented,
    failures.RuntimeException,
)
"""What onnxruntime raises; the classes have no base of their own."""

_GRAPH_FILE = "graph.onnx"
_WEIGHTS_FILE = "weights.bin"
_SHARED_SUFFIX = ".safetensors"
# What runs in turn at each step, and reads the same frozen weights.
_TRAINING = ("forward/", "update/")
# Smaller tensors stay in the graph's file: onnxruntime refuses to load one without any.
_EXTERNAL_BYTES = 1024
# Counts up where entries of an older pbc would not do.
_ENTRY_FORMAT = 3
# How a graph says where a kernel's own layout of a weight lies: MatMul+HASH|OFFSET;LENGTH;CHECKSUM
_PREPACKED = re.compile(rb"\+\d+((?:\|\d+;\d+;\d+)+)")

_log = logging.getLogger("pbc")


class OnnxRuntimeEngine:
    """Run bundles with ONNX Runtime."""

    name = "onnxruntime"

    def version(self) -> str:
        return f"onnxruntime {onnxruntime.__version__} on {cpu_identity()}"

    def load(self, bundle: Bundle, *, threads: int | None = None) -> OnnxRuntimeExecutable:
        return OnnxRuntimeExecutable(bundle, threads)


class OnnxRuntimeExecutable(DerivedExecutable):
    """A bundle's graphs, each loaded when it is first run."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle)
        self._loader = _Loader(bundle, threads)

    def _run(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._loader.graph(name).run(values)

    def _require(self, name: str) -> None:
        self._loader.require(name)

    def _feature(self, value: np.ndarray) -> Any:
        return aligned(value)

    def _kept(self, value: np.ndarray) -> Any:
        # The OrtValue holds on to its memory.
        return OrtValue.ortvalue_from_numpy(aligned(np.array(value, np.float32)))


# ---- running a graph -----------------------------------------------------------------------


class _Graph:
    """A session, called by names."""

    def __init__(self, session: Any, title: str) -> None:
        self._session = session
        self._title = title
        self._inputs = [entry.name for entry in session.get_inputs()]
        self._outputs = [entry.name for entry in session.get_outputs()]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Feed what the graph reads, arrays or OrtValues; return its outputs as OrtValues.

        The binding is a new one each time: a used one would write into the outputs that it gave.
        """
        binding = self._session.io_binding()
        held = []  # a bound array is read where it is
        for name in self._inputs:
            if name not in values:
                raise PbcError(
                    f"{self._title} reads {name!r}, which this pbc does not know: upgrade pbc"
                )
            value = values[name]
            if isinstance(value, np.ndarray):
                held.append(aligned(value))
                binding.bind_cpu_input(name, held[-1])
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except failures.RuntimeException as error:
            if "allocat" not in str(error):
                raise
            raise PbcError(
                f"not enough memory for {self._title}: a smaller --batch needs less"
            ) from error
        # Each output keeps the binding alive: new parameters would hold on to all that their step
        # had saved, until the next step is over.
        binding.clear_binding_inputs()
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))


# ---- loading a graph -----------------------------------------------------------------------


class _Loader:
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
        self._providers = _providers(bundle)
        self._graphs: dict[str, _Graph] = {}
        self._contents: dict[str, _Graph] = {}
        self._files: dict[tuple[int, int], np.ndarray] = {}
        self._shared: list[OrtValue] = []  # sessions read them, and do not hold on to them

    def require(self, name: str) -> None:
        """Refuse a graph that the bundle does not have."""
        if name in self._bundle.manifest["graphs"]:
            return
        reason = ""
        if name.startswith(("forward/", "update/")):
            reason = ": it cannot train with these options; compile the model again"
        raise PbcError(f"{self._bundle.path} has no graph {name}{reason}")

    def graph(self, name: str) -> _Graph:
        graph = self._graphs.get(name)
        if graph is None:
            self.require(name)
            key = self._key(name)
            if key not in self._contents:
                title = f"graph {name} of {self._bundle.path}"
                self._contents[key] = _Graph(self._session(name, key), title)
            graph = self._graphs[name] = self._contents[key]
        return graph

    def _weights(self, name: str) -> list[str]:
        return list(self._bundle.manifest.get("weights", {}).get(name, ()))

    def _key(self, name: str) -> str:
        """Return the hash of all that decides what a graph becomes on this device."""
        sha256 = self._bundle.sha256
        parts = [sha256(self._bundle.manifest["graphs"][name])]
        # The graph says by what names it reads its weights.
        parts += [f"{PurePosixPath(file).name} {sha256(file)}" for file in self._weights(name)]
        parts += [f"format {_ENTRY_FORMAT}", OnnxRuntimeEngine().version(), *self._providers]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _session(self, name: str, key: str) -> Any:
        if not self._weights(name):
            return self._plain(name, None)
        if self._providers != (_CPU,):
            # What other providers make of a graph cannot be written down.
            return self._from_temporary_folder(name)
        try:
            artifacts = Artifacts(default_folder())
            try:
                return self._optimised(name, artifacts.get(key, partial(self._make, name)))
            except _ERRORS:
                artifacts.discard(key)
                return self._optimised(name, artifacts.get(key, partial(self._make, name)))
        except (OSError, *_ERRORS) as error:
            session = self._from_temporary_folder(name)
            _tell_once(f"optimised graphs are not kept: {_first_line(error)}")
            return session

    def _make(self, name: str, folder: Path) -> None:
        """Write the graph and its weights as onnxruntime's optimiser leaves them for this CPU."""
        with tempfile.TemporaryDirectory(dir=folder) as source:
            model = self._unpack(name, Path(source))
            if name.startswith(_TRAINING):
                self._open(model, self._saving(name, folder, prepacked=False))
                onnx_weights.share(folder / _GRAPH_FILE, folder / _WEIGHTS_FILE, model)
                return
            # As the kernels repack them, weights need no copy (ignored before 1.21). But kernels
            # read them by aligned loads, and a tensor of any length may lie in front of them.
            for prepacked in (True, False):
                self._open(model, self._saving(name, folder, prepacked))
                if not _misaligned((folder / _GRAPH_FILE).read_bytes()):
                    return
                (folder / _WEIGHTS_FILE).unlink()

    def _saving(self, name: str, folder: Path, prepacked: bool) -> Any:
        options = self._options(name, GraphOptimizationLevel.ORT_ENABLE_ALL)
        options.optimized_model_filepath = str(folder / _GRAPH_FILE)
        for entry, value in {
            "optimized_model_external_initializers_file_name": _WEIGHTS_FILE,
            "optimized_model_external_initializers_min_size_in_bytes": str(_EXTERNAL_BYTES),
            "save_external_prepacked_constant_initializers": str(int(prepacked)),
        }.items():
            options.add_session_config_entry(f"session.{entry}", value)
        return options

    def _optimised(self, name: str, folder: Path) -> Any:
        options = self._options(name, GraphOptimizationLevel.ORT_DISABLE_ALL)
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
        file = self._bundle.manifest["graphs"][name]
        model = self._bundle.read(file) if folder is None else self._unpack(name, folder)
        try:
            return self._open(model, self._options(name, GraphOptimizationLevel.ORT_ENABLE_ALL))
        except _ERRORS as error:
            raise PbcError(
                f"{self._bundle.path}: onnxruntime {onnxruntime.__version__} cannot load {file}: "
                f"{_first_line(error)}"
            ) from error

    def _unpack(self, name: str, folder: Path) -> Path:
        """Put a graph and its weights side by side; return the graph."""
        graph = self._bundle.manifest["graphs"][name]
        for file in (graph, *self._weights(name)):
            (folder / PurePosixPath(file).name).write_bytes(self._bundle.read(file))
        return folder / PurePosixPath(graph).name

    def _options(self, name: str, level: Any) -> Any:
        options = session_options(self._threads)
        options.graph_optimization_level = level
        if name.startswith(_TRAINING):
            # A layout of its own would be a copy for each graph. A step multiplies by a weight for
            # many rows at once, and laying it out each time is little beside that.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _open(self, model: Path | bytes, options: Any) -> Any:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(source, options, providers=list(self._providers))


def _misaligned(graph: bytes) -> bool:
    """Whether a saved graph has repacked weights at an address that kernels cannot read."""
    places = b"".join(_PREPACKED.findall(graph)).split(b"|")[1:]
    return any(int(place.partition(b";")[0]) % ALIGNMENT for place in places)


def session_options(threads: int | None) -> Any:
    """Return the options of every session: so many threads, or one for each core."""
    options = SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    # In the order of the graph, in which a gradient is used up before the next one is made.
    options.execution_order = ExecutionOrder.PRIORITY_BASED
    # A plan takes one block per graph and size of batch, which serves nothing else.
    options.enable_mem_pattern = False
    # A session that waits would keep its cores busy, and slow whatever runs beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if _shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


@cache
def _shared_arena() -> bool:
    """Have one pool of memory for the activations of all sessions; False if it cannot be.

    They run one after the other: four networks in turn hold 146 MB so, and 322 MB in pools of
    their own. Shrinking the pool after each run made it hold more.
    """
    info = onnxruntime.OrtMemoryInfo(
        "Cpu",
        onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
        0,
        onnxruntime.OrtMemType.DEFAULT,
    )
    same_as_requested = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1})
    try:
        onnxruntime.create_and_register_allocator(info, same_as_requested)
    except (*_ERRORS, RuntimeError):  # another user of onnxruntime in this process has one
        return False
    return True


def _providers(bundle: Bundle) -> tuple[str, ...]:
    """Return the target's execution providers that this onnxruntime has, in its order."""
    tags = (bundle.manifest.get("target") or {}).get("tags") or {}
    wanted = [name.strip() for name in tags.get("onnxruntime_providers", "").split(",")]
    available = onnxruntime.get_available_providers()
    found = [name for name in wanted if name in available and name != _CPU]
    return (*found, _CPU)


@cache
def _tell_once(message: str) -> None:
    _log.warning(message)


def _first_line(error: BaseException) -> str:
    """Return what onnxruntime or the system says, without the code in front."""
    text = str(error).strip().partition("\n")[0]
    return text.rpartition("[ONNXRuntimeError] : ")[2]
