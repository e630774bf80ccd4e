"""Lower to ONNX: models for stock onnxruntime, their weights beside them, shared by all levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.ir.program import (
    Program,
    body,
    copy_graph,
    get_tensor,
    graph_inputs,
    graph_outputs,
    prefix,
    step_forward,
    step_update,
    tensor_names,
)
from pbc.lower.lowering import Candidate
from pbc.lower.visit import Visit, latencies_ms
from pbc.lower.weights import (
    Stored,
    TensorStore,
    by_level,
    byte_ranges,
    level_of,
    unused,
    weight_file,
)
from pbc.passes.fold_batch_norm import fold
from pbc.target import Target

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto
    from onnxruntime import InferenceSession

    from pbc.targets.onnxruntime.convert import Converter

# One folder for all: a model may not name a file of weights outside its own.
FOLDER = "onnx"
# Smaller tensors stay in the model: most are scales, shifts and biases of a few numbers.
INLINE_BYTES = 1024
THETA = "θ"


class OnnxRuntimeLowering:
    """Write each graph as an ONNX model; tensors that levels share are stored once."""

    precisions: ClassVar[tuple[str, ...]] = ("int8",)
    derives_steps: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")

    def __init__(self) -> None:
        self._converter: Converter | None = None

    def graph_file(self, graph: str) -> str:
        return f"{FOLDER}/{graph.replace('/', '-')}.onnx"

    def requires(self) -> dict[str, str]:
        return {"onnxruntime": ">=1.20"}

    def check(self, target: Target) -> None:
        pass

    def notes(self) -> tuple[str, ...]:
        return ()

    def lower(self, program: Program) -> dict[str, bytes]:
        from pbc.targets.onnxruntime.convert import joined, with_tensors

        store = TensorStore()
        parts = {
            name: _Part(name, program.graphs[name], names)
            for name, names in _tensor_names(program).items()
        }
        models = {}
        for name, part in parts.items():
            models[name] = self._model(program, name, part.graph, part.tensors)
            part.store(store)
        files = store.files()
        # Only now is it known where in its file a tensor comes to lie.
        ranges = {file: byte_ranges(data) for file, data in files.items()}
        for name, part in parts.items():
            complete = with_tensors(models[name], part.initializers(ranges))
            files[self.graph_file(name)] = complete.SerializeToString(deterministic=True)
        for level in program.levels:
            kinds = [name for name in (prefix(level), body(level)) if name in parts]
            small = {proto.name: proto for name in kinds for proto in parts[name].small()}
            model = joined(models.get(prefix(level)), models[body(level)], small.values())
            files[_export_file(level)] = model.SerializeToString(deterministic=True)
        return files

    def contents(self, program: Program) -> dict[str, Any]:
        import onnx

        from pbc.targets.onnxruntime.convert import source, unresolved

        artifacts = program.artifacts
        keys = {
            (file, offset): key
            for file, data in artifacts.items()
            if file.endswith(".safetensors")
            for key, (offset, _) in byte_ranges(data).items()
        }
        weights: dict[str, list[str]] = {}
        stored: dict[int, dict[str, Stored]] = {}
        for name in program.graphs:
            model = onnx.load_model_from_string(artifacts[self.graph_file(name)])
            where = {tensor.name: source(tensor) for tensor in model.graph.initializer}
            outside = {name: place for name, place in where.items() if place is not None}
            found = {
                tensor: Stored(f"{FOLDER}/{location}", keys[f"{FOLDER}/{location}", offset])
                for tensor, (location, offset) in outside.items()
            }
            weights[name] = sorted({place.file for place in found.values()})
            stored.setdefault(level_of(name), {}).update(found)
        export = {}
        for level in program.levels:
            file = _export_file(level)
            names = unresolved(onnx.load_model_from_string(artifacts[file]).graph)
            tensors = {name: str(stored[level].get(name, THETA)) for name in names}
            export[str(level)] = {"file": file, "tensors": tensors}
        return {"weights": weights, "export": export}

    def step(self, program: Program, level: int) -> _Step:
        return _Step(self, program, level)

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        return latencies_ms(
            [
                Visit(_Runner(self, program, candidate), program, candidate)
                for candidate in candidates
            ]
        )

    def session(self, program: Program, name: str, graph: GraphModule) -> InferenceSession:
        """A session like the device's, with the graph's tensors in it."""
        from onnxruntime import InferenceSession

        from pbc.runtime.engines.onnxruntime.engine import session_options
        from pbc.targets.onnxruntime.convert import inline, with_tensors

        names = tensor_names(graph)
        model = self._model(program, name, graph, names)
        tensors = [inline(tensor, get_tensor(graph, tensor)) for tensor in names]
        return InferenceSession(
            with_tensors(model, tensors).SerializeToString(),
            session_options(None),
            providers=["CPUExecutionProvider"],
        )

    def try_graphs(self, program: Program, graphs: Mapping[str, GraphModule]) -> None:
        for name, graph in graphs.items():
            self._model(program, name, graph, tensor_names(graph))

    def _model(
        self, program: Program, name: str, graph: GraphModule, tensors: Sequence[str]
    ) -> ModelProto:
        from pbc.targets.onnxruntime.convert import Converter

        self._converter = self._converter or Converter()
        head = [name for name in (program.head.weight, program.head.bias) if name is not None]
        open_head = program.class_count is None
        return self._converter(name, graph, tensors, head, open_head=open_head)


class _Part:
    """One graph with the names of its frozen tensors, and where they are stored."""

    def __init__(self, name: str, graph: GraphModule, names: dict[str, str]) -> None:
        self.graph = graph
        self._file = weight_file(FOLDER, name)
        self._values = {new: get_tensor(graph, old) for old, new in names.items()}
        self._stored: dict[str, Stored] = {}

    @property
    def tensors(self) -> list[str]:
        """What the model calls the tensors, in the order of `tensor_names`."""
        return list(self._values)

    def store(self, store: TensorStore) -> None:
        for name, tensor in self._values.items():
            if tensor.nbytes >= INLINE_BYTES:
                self._stored[name] = store.add(self._file, name, tensor)

    def small(self) -> list[TensorProto]:
        from pbc.targets.onnxruntime.convert import inline

        return [inline(n, value) for n, value in self._values.items() if n not in self._stored]

    def initializers(self, ranges: dict[str, dict[str, tuple[int, int]]]) -> list[TensorProto]:
        from pbc.targets.onnxruntime.convert import external

        outside = [
            external(
                name,
                self._values[name],
                stored.file.removeprefix(f"{FOLDER}/"),
                *ranges[stored.file][stored.key],
            )
            for name, stored in self._stored.items()
        ]
        return [*self.small(), *outside]


class _Step:
    """A level's derived step in onnxruntime, torch tensors in and out."""

    def __init__(self, lowering: OnnxRuntimeLowering, program: Program, level: int) -> None:
        self._lowering, self._program, self._level = lowering, program, level
        self._sessions: dict[str, InferenceSession] = {}

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(step_forward(self._level), inputs)

    def update(self, optimizer: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(step_update(self._level, optimizer), inputs)

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if name not in self._sessions:
            graph = self._program.graphs[name]
            self._sessions[name] = self._lowering.session(self._program, name, graph)
        session = self._sessions[name]
        feeds = {given.name: inputs[given.name].numpy() for given in session.get_inputs()}
        results = session.run(None, feeds)
        names = (output.name for output in session.get_outputs())
        return {n: torch.from_numpy(r) for n, r in zip(names, results, strict=True)}


def _export_file(level: int) -> str:
    return f"{FOLDER}/export-{level}.onnx"


def _tensor_names(program: Program) -> dict[str, dict[str, str]]:
    """For each graph, in the order of levels, what its model calls its frozen tensors.

    Their own names, with a number where another tensor, input or output of the level has it: the
    level's graphs become one model when they are exported.
    """
    order = sorted(program.graphs, key=by_level)
    taken: dict[int, set[str]] = {}
    for name in order:
        graph = program.graphs[name]
        level = taken.setdefault(level_of(name), {"logits", "probabilities"})
        level.update(graph_inputs(graph), graph_outputs(name, graph))
    known: dict[int, list[tuple[str, str, Tensor]]] = {level: [] for level in taken}
    names: dict[str, dict[str, str]] = {}
    for name in order:
        graph, level_ = program.graphs[name], level_of(name)
        names[name] = {}
        for own in tensor_names(graph):
            tensor = get_tensor(graph, own)
            same = [new for old, new, t in known[level_] if old == own and _equal(t, tensor)]
            new = same[0] if same else unused(own, taken[level_])
            if not same:
                taken[level_].add(new)
                known[level_].append((own, new, tensor))
            names[name][own] = new
    return names


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())


# ---- measuring -----------------------------------------------------------------------------


class _Runner:
    """Runs a candidate's graphs, folded as the device runs them."""

    def __init__(
        self, lowering: OnnxRuntimeLowering, program: Program, candidate: Candidate
    ) -> None:
        self._sessions = {}
        for name, graph in candidate.graphs.items():
            folded = copy_graph(graph)
            fold(folded)
            self._sessions[name] = lowering.session(program, name, folded)

    def reads(self, graph: str) -> list[str]:
        return [given.name for given in self._sessions[graph].get_inputs()]

    def run(self, graph: str, values: Mapping[str, Any]) -> dict[str, Any]:
        session = self._sessions[graph]
        results = session.run(None, {name: values[name] for name in self.reads(graph)})
        names = (output.name for output in session.get_outputs())
        return dict(zip(names, results, strict=True))
