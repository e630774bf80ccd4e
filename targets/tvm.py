"""Lower to TVM: shared libraries for the target's CPU, their weights beside them."""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.lowering import Candidate
from pbc.passes.fold_batch_norm import fold
from pbc.program import (
    POLICY,
    Program,
    body,
    copy_graph,
    get_tensor,
    graph_inputs,
    graph_outputs,
    prefix,
    step_forward,
    step_update,
)
from pbc.runtime.processor import cores, missing_flags
from pbc.weights import TensorStore, by_level, level_of, weight_file

if TYPE_CHECKING:
    import tvm

    from pbc.runtime.tvm_library import Graph
    from pbc.tvm_build import Platform
    from pbc.tvm_graph import Reads

FOLDER = "tvm"
CALLS = f"{FOLDER}/calls.json"
FORMAT = 1
ROUNDS = 6
# How many of the device's mini-batches may share one call of the prefix.
PREFIX_BATCHES = (1, 2, 4)
# What a measured step takes for scalars: any value does, since none changes the time.
SCALAR = 0.1


class TvmLowering:
    """Build each prefix, and each body with all that trains it, as one shared library.

    The graphs of a body share most of what they compute, above all the updates of the optimizers:
    in one library that is built once. Levels of the same structure are built once too.
    """

    precisions: ClassVar[tuple[str, ...]] = ()
    derives_steps: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("tvm", "tvm_ffi", "ziglang")

    def __init__(self) -> None:
        self._built: list[tuple[str, tvm.IRModule, bytes]] = []

    def graph_file(self, graph: str) -> str:
        if graph == POLICY:
            return f"{FOLDER}/{POLICY}.so"
        kind = "prefix" if graph.startswith("prefix/") else "body"
        return f"{FOLDER}/{kind}-{level_of(graph)}.so"

    def requires(self) -> dict[str, str]:
        return {"tvm": ">=0.27,<0.28", "apache-tvm-ffi": "==0.1.14.post1"}

    def lower(self, program: Program) -> dict[str, bytes]:
        from pbc.tvm_build import platform_of

        where = platform_of(program.target)
        store = TensorStore()
        files: dict[str, bytes] = {}
        calls: dict[str, Any] = {}
        for file, names in self._groups(program).items():
            graphs = {_function(name): program.graphs[name] for name in names}
            files[file], reads = self._library(program, graphs, where)
            for name in names:
                calls[name] = _call(name, program.graphs[name], reads[_function(name)], store)
        machine = where.linked.partition("-")[0]
        facts = {"format": FORMAT, "machine": machine, "flags": where.flags(), "graphs": calls}
        files[CALLS] = json.dumps(facts, indent=1, sort_keys=True).encode()
        return {**files, **store.files()}

    def contents(self, program: Program) -> dict[str, Any]:
        calls = json.loads(program.artifacts[CALLS])["graphs"]
        weights = {
            name: sorted({place.partition("#")[0] for place in call["tensors"] + call["setup"]})
            for name, call in calls.items()
        }
        return {"weights": weights, "calls": CALLS}

    def step(self, program: Program, level: int) -> _Step:
        return _Step(self, program, level)

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        # The fastest of several turns counts: this machine does other things too.
        runs = [_Visit(self, program, candidate) for candidate in candidates]
        for turn in range(ROUNDS):
            for run in runs:
                run.measure(warm_up=turn == 0)
        return [run.latency_ms() for run in runs]

    def loaded(self, program: Program, graphs: Mapping[str, GraphModule]) -> dict[str, Graph]:
        """Graphs of one library, as the device runs them if this machine can, or built for it."""
        from pbc.runtime.tvm_library import Library, use_threads
        from pbc.tvm_build import platform_of, this_machine

        where = platform_of(program.target)
        alike = program.target.local or (
            where.linked.startswith("x86_64-") and platform.machine() == "x86_64"
        )
        if not alike or missing_flags(where.flags()):
            where = this_machine()
        functions = {_function(name): graph for name, graph in graphs.items()}
        content, reads = self._library(program, functions, where)
        with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
            path = Path(folder) / "library.so"
            path.write_bytes(content)
            library = Library(path)
        use_threads(cores())
        return {
            name: library.graph(
                _function(name),
                graph_inputs(graph),
                graph_outputs(name, graph),
                _arrays(graph, reads[_function(name)].tensors),
                _arrays(graph, reads[_function(name)].setup),
            )
            for name, graph in graphs.items()
        }

    def together(self, program: Program, name: str) -> dict[str, GraphModule]:
        """The graphs that share a library with this one."""
        names = self._groups(program)[self.graph_file(name)]
        return {name: program.graphs[name] for name in names}

    def _groups(self, program: Program) -> dict[str, list[str]]:
        """The files, in the order of levels, with the graphs in each."""
        groups: dict[str, list[str]] = {}
        for name in sorted(program.graphs, key=by_level):
            groups.setdefault(self.graph_file(name), []).append(name)
        return groups

    def _library(
        self, program: Program, graphs: Mapping[str, GraphModule], where: Platform
    ) -> tuple[bytes, dict[str, Reads]]:
        from tvm_ffi import structural_equal

        from pbc.tvm_build import build
        from pbc.tvm_graph import convert

        head = [name for name in (program.head.weight, program.head.bias) if name is not None]
        module, reads = convert(graphs, head, open_head=program.class_count is None)
        for platform_key, known, content in self._built:
            if platform_key == where.key() and structural_equal(known, module):
                return content, reads
        content = build(module, where)
        self._built.append((where.key(), module, content))
        return content, reads


def _function(graph: str) -> str:
    """What a graph's function is called: `prefix`, `forward`, `update_sgd`; never its level."""
    kind, _, rest = graph.partition("/")
    return "_".join([kind, *rest.split("/")[1:]])


def _call(name: str, graph: GraphModule, reads: Reads, store: TensorStore) -> dict[str, Any]:
    """What the device must know to call the graph's function."""

    def places(names: Sequence[str]) -> list[str]:
        file = weight_file(FOLDER, name)
        return [str(store.add(file, own, get_tensor(graph, own))) for own in names]

    return {
        "function": _function(name),
        "inputs": graph_inputs(graph),
        "outputs": graph_outputs(name, graph),
        "tensors": places(reads.tensors),
        "setup": places(reads.setup),
    }


def _arrays(graph: GraphModule, names: Sequence[str]) -> list[np.ndarray]:
    return [get_tensor(graph, name).detach().contiguous().numpy() for name in names]


class _Step:
    """A level's derived step in the TVM runtime, torch tensors in and out."""

    def __init__(self, lowering: TvmLowering, program: Program, level: int) -> None:
        self._level = level
        self._graphs = lowering.loaded(program, lowering.together(program, step_forward(level)))

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(step_forward(self._level), inputs)

    def update(self, optimizer: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(step_update(self._level, optimizer), inputs)

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self._graphs[name]
        values = {given: inputs[given].detach().numpy() for given in graph.inputs}
        return {n: torch.from_numpy(np.array(v.numpy())) for n, v in graph.run(values).items()}


# ---- measuring -----------------------------------------------------------------------------


class _Visit:
    """Measures one training visit: the prefix forward, then the derived step or the body forward.

    A candidate of a program that no step is derived of yet has none.
    """

    def __init__(self, lowering: TvmLowering, program: Program, candidate: Candidate) -> None:
        self._batch = program.batch
        self._graphs: dict[str, Graph] = {}
        level = _level_of(program, candidate)
        for first in (prefix(0), body(0)):
            if first not in candidate.graphs:
                continue
            if level is None:
                kinds = [n for n in candidate.graphs if (n == prefix(0)) == (first == prefix(0))]
                graphs = {name: _folded(candidate.graphs[name]) for name in kinds}
                self._graphs.update(lowering.loaded(program, graphs))
            else:
                # The library that the device gets, and that `lower` need not build again.
                own = prefix(level) if first == prefix(0) else body(level)
                loaded = lowering.loaded(program, lowering.together(program, own))
                self._graphs.update({_at_level_0(name): graph for name, graph in loaded.items()})
        update = _update(candidate)
        self._step = [body(0)] if update is None else [step_forward(0), update]
        image = program.example[:1].numpy()
        sizes = [self._batch * times for times in PREFIX_BATCHES]
        self._images = {size: np.repeat(image, size, axis=0) for size in sizes}
        self._values: dict[str, Any] = {
            **{name: value.detach().numpy() for name, value in program.parameters.items()},
            "labels": np.zeros(self._batch, np.int64),
            "x": self._images[self._batch],
        }
        if prefix(0) in self._graphs:
            self._values.update(self._run(prefix(0), self._values))
        # Seconds per sample; the prefix by how many share a call.
        self._prefix_seconds = dict.fromkeys(sizes, math.inf)
        self._step_seconds = math.inf

    def measure(self, warm_up: bool) -> None:
        if prefix(0) in self._graphs:
            for size, images in self._images.items():
                start = time.perf_counter()
                self._run(prefix(0), {"x": images})
                seconds = (time.perf_counter() - start) / size
                if not warm_up:
                    self._prefix_seconds[size] = min(seconds, self._prefix_seconds[size])
        values = dict(self._values)
        start = time.perf_counter()
        for name in self._step:
            values.update(self._run(name, values))
        if not warm_up:
            seconds = (time.perf_counter() - start) / self._batch
            self._step_seconds = min(seconds, self._step_seconds)

    def _run(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        graph = self._graphs[name]
        for given in graph.inputs:
            if given not in values:
                values[given] = self._values[given] = self._stand_in(given, values)
        return graph.run(values)

    @staticmethod
    def _stand_in(name: str, values: Mapping[str, Any]) -> np.ndarray:
        """A scalar, or the optimizer's state, which is called after its parameter."""
        parameter = values.get(name.partition("/")[2])
        return np.array(SCALAR, np.float32) if parameter is None else np.zeros_like(parameter)

    def latency_ms(self) -> float:
        prefix_seconds = 0.0
        if prefix(0) in self._graphs:
            prefix_seconds = min(self._prefix_seconds.values())
        return (prefix_seconds + self._step_seconds) * self._batch * 1000


def _level_of(program: Program, candidate: Candidate) -> int | None:
    """The level of the program that the candidate is; None for a trial."""
    for level in program.levels:
        named = {_at_level_0(n): g for n, g in program.graphs.items() if level_of(n) == level}
        if all(named.get(name) is graph for name, graph in candidate.graphs.items()):
            return level
    return None


def _at_level_0(graph: str) -> str:
    kind, _, rest = graph.partition("/")
    return "/".join([kind, "0", *rest.split("/")[1:]])


def _folded(graph: GraphModule) -> GraphModule:
    """Folded as the device runs it."""
    folded = copy_graph(graph)
    fold(folded)
    return folded


def _update(candidate: Candidate) -> str | None:
    """Any of the candidate's updates: they differ by a few products per parameter."""
    return next((name for name in sorted(candidate.graphs) if name.startswith("update/0/")), None)
