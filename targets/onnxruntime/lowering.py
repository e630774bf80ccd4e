"""Lower to ONNX: models for stock onnxruntime, their weights beside them, shared by all levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto
from onnxruntime import InferenceSession
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY, FORWARD, PREFIX, SAVED, GraphName, update
from pbc.ir.graph import (
    get_tensor,
    graph_inputs,
    graph_outputs,
    placeholders,
    shape_of,
    tensor_names,
)
from pbc.ir.levels import IMAGES, LevelGraphs
from pbc.ir.program import Program
from pbc.ir.rewrite import in_sequence, with_tensor_names
from pbc.ir.runner import Values
from pbc.ir.split import FEATURE
from pbc.lower.lowering import Lowering
from pbc.lower.merge_low_rank import merge_low_rank
from pbc.lower.weights import Stored, TensorStore, byte_ranges, unused, weight_file
from pbc.runtime.engines.onnxruntime.bounds import Bounds
from pbc.runtime.engines.onnxruntime.session import session_options
from pbc.targets.onnxruntime.convert import (
    REFUSALS,
    Converter,
    external,
    inline,
    joined,
    source,
    unresolved,
    with_tensors,
)
from pbc.targets.onnxruntime.recording import record
from pbc.training_graph.memory import Recorded, input_shapes
from pbc.training_graph.names import LABELS

# One folder for all: a model may not name a file of weights outside its own.
FOLDER = "onnx"
# Smaller tensors stay in the model: most are scales, shifts and biases of a few numbers.
INLINE_BYTES = 1024
THETA = "θ"
# Inputs that have a photo in each row, as features have.
_BATCHED = (IMAGES, LABELS, "view")

# Planning, trying and lowering meet graphs of the same structure, and exporting takes seconds.
_convert = Converter()


class OnnxRuntimeLowering(Lowering):
    """Write each graph as an ONNX model; tensors that levels share are stored once."""

    refusals: ClassVar = REFUSALS

    def graph_file(self, graph: GraphName) -> str:
        return f"{FOLDER}/{str(graph).replace('/', '-')}.onnx"

    def lower(self, program: Program) -> dict[str, bytes]:
        store = TensorStore()
        graphs = program.graphs
        parts = {
            name: _Part(name, graphs[name], names) for name, names in _tensor_names(program).items()
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
        for level in range(len(program.levels)):
            names = [name for name in (PREFIX.at(level), BODY.at(level)) if name in parts]
            small = {proto.name: proto for name in names for proto in parts[name].small()}
            model = self._exported(program, level, models, parts, small.values())
            files[_export_file(level)] = model.SerializeToString(deterministic=True)
        return files

    def _exported(
        self,
        program: Program,
        level: int,
        models: Mapping[GraphName, ModelProto],
        parts: Mapping[GraphName, _Part],
        small: Iterable[TensorProto],
    ) -> ModelProto:
        """Return a level's prefix and body as one model, with what was trained apart merged."""
        prefix, body = PREFIX.at(level), BODY.at(level)
        if prefix in parts:
            whole = in_sequence(parts[prefix].renamed(), parts[body].renamed())
        else:
            whole = parts[body].renamed()
        merged = merge_low_rank(whole)
        if merged is whole:
            return joined(models.get(prefix), models[body], small)
        model = self._model(program, body, merged, tensor_names(merged))
        return joined(None, model, small)

    def contents(self, program: Program) -> dict[str, Any]:
        artifacts = program.artifacts
        keys = {
            (file, offset): key
            for file, data in artifacts.items()
            if file.endswith(".safetensors")
            for key, (offset, _) in byte_ranges(data).items()
        }
        weights: dict[str, list[str]] = {}
        stored: dict[int | None, dict[str, Stored]] = {}
        for name in program.graphs:
            model = onnx.load_model_from_string(artifacts[self.graph_file(name)])
            where = {tensor.name: source(tensor) for tensor in model.graph.initializer}
            outside = {tensor: place for tensor, place in where.items() if place is not None}
            found = {
                tensor: Stored(f"{FOLDER}/{location}", keys[f"{FOLDER}/{location}", offset])
                for tensor, (location, offset) in outside.items()
            }
            weights[str(name)] = sorted({place.file for place in found.values()})
            stored.setdefault(name.level, {}).update(found)
        export = {}
        for level in range(len(program.levels)):
            file = _export_file(level)
            missing = unresolved(onnx.load_model_from_string(artifacts[file]).graph)
            tensors = {tensor: str(stored[level].get(tensor, THETA)) for tensor in missing}
            export[str(level)] = {"file": file, "tensors": tensors}
        return {"weights": weights, "export": export}

    def runner(self, program: Program, level: LevelGraphs) -> _Sessions:
        return _Sessions(self, program, level)

    def prefix(self, program: Program, level: LevelGraphs) -> Callable[[Tensor], Sequence[Tensor]]:
        session = self.session(program, PREFIX, level.fused().graphs[PREFIX])
        name = session.get_inputs()[0].name
        return lambda images: [
            torch.from_numpy(v) for v in session.run(None, {name: images.numpy()})
        ]

    def session(self, program: Program, name: GraphName, graph: GraphModule) -> InferenceSession:
        """Return a session like the device's, with the graph's tensors in it."""
        model = self._complete(program, name, graph)
        return InferenceSession(
            model.SerializeToString(), session_options(None), providers=["CPUExecutionProvider"]
        )

    def _complete(self, program: Program, name: GraphName, graph: GraphModule) -> ModelProto:
        """Return the graph's model with its tensors in it."""
        names = tensor_names(graph)
        tensors = [inline(tensor, get_tensor(graph, tensor)) for tensor in names]
        return with_tensors(self._model(program, name, graph, names), tensors)

    def recorded_step(self, program: Program, level: LevelGraphs, classes: int) -> Recorded:
        assert level.forward is not None
        known: dict[str, np.ndarray] = {}
        found = {}
        for role, graph in [(FORWARD, level.forward)] + [
            (update(name), graph) for name, graph in level.updates.items()
        ]:
            shapes = input_shapes(graph, program.request.batch, classes)
            for name, node in zip(graph_inputs(graph), placeholders(graph), strict=True):
                dtype = str(node.meta["val"].dtype).removeprefix("torch.")
                known.setdefault(name, np.ones(shapes[name], dtype))
            known[LABELS] = np.zeros_like(known[LABELS])
            found[role], results = record(self._complete(program, role, graph), known)
            known |= {name: value for name, value in results.items() if name.startswith(SAVED)}
        return found

    def try_graphs(self, program: Program, graphs: Mapping[GraphName, GraphModule]) -> None:
        for name, graph in graphs.items():
            self._model(program, name, graph, tensor_names(graph))

    def _model(
        self, program: Program, name: GraphName, graph: GraphModule, tensors: Sequence[str]
    ) -> ModelProto:
        head = program.network.head.parameters
        open_head = program.network.head.fixed is None
        model = _convert(name.kind, graph, tensors, head, open_head=open_head)
        inputs = dict(zip(graph_inputs(graph), map(shape_of, placeholders(graph)), strict=True))
        frozen = zip(tensors, tensor_names(graph), strict=True)
        inputs |= {new: tuple(get_tensor(graph, old).shape) for new, old in frozen}
        # A device refuses what it cannot foresee, or what would take too much there.
        rows = [given for given in inputs if given in _BATCHED or given.startswith(FEATURE)]
        title = f"graph {name}"
        Bounds(model.SerializeToString(), title, rows, trains=name.trains).check(inputs)
        return model


class _Sessions:
    """Runs the graphs of a level in onnxruntime, batch norms fused; made when they are needed."""

    def __init__(self, lowering: OnnxRuntimeLowering, program: Program, level: LevelGraphs) -> None:
        self._lowering, self._program = lowering, program
        self._graphs = level.fused().graphs
        self._sessions: dict[GraphName, InferenceSession] = {}

    def _session(self, role: GraphName) -> InferenceSession:
        if role not in self._sessions:
            graph = self._graphs[role]
            self._sessions[role] = self._lowering.session(self._program, role, graph)
        return self._sessions[role]

    def inputs(self, role: GraphName) -> list[str]:
        return [given.name for given in self._session(role).get_inputs()]

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        session = self._session(role)
        results = session.run(None, {name: values[name] for name in self.inputs(role)})
        names = (output.name for output in session.get_outputs())
        return dict(zip(names, results, strict=True))


class _Part:
    """One graph with the names of its frozen tensors, and where they are stored."""

    def __init__(self, name: GraphName, graph: GraphModule, names: dict[str, str]) -> None:
        self.graph = graph
        self._file = weight_file(FOLDER, name)
        self._values = {new: get_tensor(graph, old) for old, new in names.items()}
        self._stored: dict[str, Stored] = {}

    @property
    def tensors(self) -> list[str]:
        """The model's names of the tensors, in the order of `tensor_names`."""
        return list(self._values)

    def renamed(self) -> GraphModule:
        """Return the graph with its tensors called as in the model."""
        names = dict(zip(tensor_names(self.graph), self.tensors, strict=True))
        return with_tensor_names(self.graph, names)

    def store(self, store: TensorStore) -> None:
        for name, tensor in self._values.items():
            if tensor.nbytes >= INLINE_BYTES:
                self._stored[name] = store.add(self._file, name, tensor)

    def small(self) -> list[TensorProto]:
        return [inline(n, value) for n, value in self._values.items() if n not in self._stored]

    def initializers(self, ranges: dict[str, dict[str, tuple[int, int]]]) -> list[TensorProto]:
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


def _export_file(level: int) -> str:
    return f"{FOLDER}/export-{level}.onnx"


def _tensor_names(program: Program) -> dict[GraphName, dict[str, str]]:
    """For each graph, in the order of levels, what its model calls its frozen tensors.

    Their own names, with a number where another tensor, input or output of the level has it: the
    level's graphs become one model when they are exported.
    """
    taken: dict[int | None, set[str]] = {}
    for name, graph in program.graphs.items():
        level = taken.setdefault(name.level, {"logits", "probabilities"})
        level.update(graph_inputs(graph), graph_outputs(graph))
    known: dict[int | None, list[tuple[str, str, Tensor]]] = {level: [] for level in taken}
    names: dict[GraphName, dict[str, str]] = {}
    for name, graph in program.graphs.items():
        names[name] = {}
        for own in tensor_names(graph):
            tensor = get_tensor(graph, own)
            same = [n for old, n, t in known[name.level] if old == own and _equal(t, tensor)]
            new = same[0] if same else unused(own, taken[name.level])
            if not same:
                taken[name.level].add(new)
                known[name.level].append((own, new, tensor))
            names[name][own] = new
    return names


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
