"""Lower to TVM: shared libraries for the target's CPU or GPU, their weights beside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from torch.fx import GraphModule
from tvm_ffi import structural_equal

from pbc.bundle.graph_name import POLICY, PREFIX, GraphName
from pbc.ir.graph import get_tensor, graph_inputs, graph_outputs
from pbc.ir.levels import LevelGraphs
from pbc.ir.program import Program
from pbc.ir.runner import Values
from pbc.lower.lowering import Lowering
from pbc.lower.weights import TensorStore, weight_file
from pbc.runtime.engines.tvm.cuda_kernels import unpack
from pbc.runtime.engines.tvm.library import Graph, Library, loaded, use_threads
from pbc.target import Target
from pbc.targets.tvm.build import (
    Platform,
    compiled,
    platform_of,
    runs_here,
    scheduled,
    this_machine,
)
from pbc.targets.tvm.convert import Reads, convert, function_of
from pbc.targets.tvm.cuda import cubin_elf
from pbc.targets.tvm.schedule_attributes import fallbacks
from pbc.targets.tvm.tuning.tune import tune, untunable
from pbc.util.processor import cores

FOLDER = "tvm"
CALLS = f"{FOLDER}/calls.json"
FORMAT = 1


class TvmLowering(Lowering):
    """Build each prefix, and each body with all that trains it, as one shared library.

    The graphs of a body share most of what they compute, above all the updates of the optimizers:
    in one library that is built once. Levels of the same structure are built once too.
    """

    def __init__(self) -> None:
        self._built: list[tuple[str, tvm.IRModule, bytes]] = []
        # Functions that a rule could not schedule, by the rules.
        self._fallbacks: dict[str, list[str]] = {}
        self._notes: tuple[str, ...] = ()

    def graph_file(self, graph: GraphName) -> str:
        if graph == POLICY:
            return f"{FOLDER}/{POLICY}.so"
        kind = "prefix" if graph.role == PREFIX else "body"
        return f"{FOLDER}/{kind}-{graph.level}.so"

    def check(self, target: Target) -> None:
        _ = platform_of(target).target  # a GPU's needs a compiler for its kernels

    def lower(self, program: Program) -> dict[str, bytes]:
        where = platform_of(program.request.target)
        store = TensorStore()
        files: dict[str, bytes] = {}
        calls: dict[str, Any] = {}
        for file, names in self.groups(program).items():
            graphs = {function_of(name): program.graphs[name] for name in names}
            files[file], reads = self._library(program, graphs, where)
            for name in names:
                calls[str(name)] = _call(
                    name, program.graphs[name], reads[function_of(name)], store
                )
        machine = where.linked.partition("-")[0]
        facts = {"format": FORMAT, "machine": machine, "flags": where.flags(), "graphs": calls}
        if where.sm is not None:
            facts["sm"] = where.sm
            self._notes = (_about_kernels(where.sm, files), *self._about_fallbacks())
        files[CALLS] = json.dumps(facts, indent=1, sort_keys=True).encode()
        return {**files, **store.files()}

    def notes(self) -> tuple[str, ...]:
        return self._notes

    def contents(self, program: Program) -> dict[str, Any]:
        calls = json.loads(program.artifacts[CALLS])["graphs"]
        weights = {
            name: sorted({place.partition("#")[0] for place in call["tensors"] + call["setup"]})
            for name, call in calls.items()
        }
        return {"weights": weights, "calls": CALLS}

    def runner(self, program: Program, level: LevelGraphs) -> _LibraryRunner:
        return _LibraryRunner(self, program, level)

    def loaded(
        self, program: Program, graphs: Mapping[GraphName, GraphModule]
    ) -> dict[GraphName, Graph]:
        """Graphs of one library, as the device runs them if this machine can, or built for it."""
        target = program.request.target
        where = platform_of(target) if runs_here(target) else this_machine()
        functions = {function_of(name): graph for name, graph in graphs.items()}
        content, reads = self._library(program, functions, where)
        with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
            path = Path(folder) / "library.so"
            path.write_bytes(content)
            library = Library(loaded(path))
        use_threads(cores())
        return {
            name: library.graph(
                function_of(name),
                graph_inputs(graph),
                graph_outputs(graph),
                _arrays(graph, reads[function_of(name)].tensors),
                _arrays(graph, reads[function_of(name)].setup),
            )
            for name, graph in graphs.items()
        }

    def _about_fallbacks(self) -> list[str]:
        return [
            f"kernels with the schedule of {rules}, which TVM cannot build for them: "
            + ", ".join(sorted(set(names)))
            for rules, names in self._fallbacks.items()
        ]

    def groups(self, program: Program) -> dict[str, list[GraphName]]:
        """The files, in the order of levels, with the graphs in each."""
        groups: dict[str, list[GraphName]] = {}
        for name in program.graphs:
            groups.setdefault(self.graph_file(name), []).append(name)
        return groups

    def _library(
        self, program: Program, graphs: Mapping[str, GraphModule], where: Platform
    ) -> tuple[bytes, dict[str, Reads]]:

        module, reads = self.converted(program, graphs)
        for platform_key, known, content in self._built:
            if platform_key == where.key() and structural_equal(known, module):
                return content, reads
        ready = scheduled(module, where)
        for name, rules in fallbacks(ready).items():
            self._fallbacks.setdefault(rules, []).append(name)
        content = compiled(ready, where)
        self.keep(where, module, content)
        return content, reads

    def operators(self) -> Collection[str]:
        from pbc.targets.tvm.operators import TABLE

        # The rest of the table are sizes: Python's own operators.
        return {str(operator) for operator in TABLE}

    def try_graphs(self, program: Program, graphs: Mapping[GraphName, GraphModule]) -> None:
        names = {str(name).replace("/", "_"): graph for name, graph in graphs.items()}
        self.converted(program, names)

    def converted(
        self, program: Program, graphs: Mapping[str, GraphModule]
    ) -> tuple[tvm.IRModule, dict[str, Reads]]:
        """Graphs, by their functions' names, as one module."""
        head = list(program.network.head.parameters)
        return convert(graphs, head, open_head=program.network.head.fixed is None)

    def keep(self, where: Platform, module: tvm.IRModule, content: bytes) -> None:
        """Take this library wherever this module is lowered."""
        self._built.append((where.key(), module, content))

    def untunable(self, target: Target) -> str | None:
        return untunable(target)

    def tune(self, program: Program, seconds: float) -> dict[str, Any]:
        return tune(self, program, seconds)


def _call(name: GraphName, graph: GraphModule, reads: Reads, store: TensorStore) -> dict[str, Any]:
    """Return the facts that a device needs to call the graph's function."""

    def places(names: Sequence[str]) -> list[str]:
        file = weight_file(FOLDER, name)
        return [str(store.add(file, own, get_tensor(graph, own))) for own in names]

    return {
        "function": function_of(name),
        "inputs": graph_inputs(graph),
        "outputs": graph_outputs(graph),
        "tensors": places(reads.tensors),
        "setup": places(reads.setup),
    }


def _about_kernels(sm: int, files: Mapping[str, bytes]) -> str:
    """Return a note about the libraries' kernels, which no GPU has run."""
    libraries = {data for file, data in files.items() if file.endswith(".so")}
    count = sum(len(cubin_elf.kernels(found.cubin)) for data in libraries for found in unpack(data))
    return (
        f"{count} kernels are compiled for GPUs of sm_{sm}, and were not run: checks ran the same "
        "graphs, built for this machine's CPU"
    )


def _arrays(graph: GraphModule, names: Sequence[str]) -> list[np.ndarray]:
    return [get_tensor(graph, name).detach().contiguous().numpy() for name in names]


class _LibraryRunner:
    """Runs the graphs of a level, batch norms fused, in the libraries that the device gets."""

    def __init__(self, lowering: TvmLowering, program: Program, level: LevelGraphs) -> None:
        self._graphs: dict[GraphName, Graph] = {}
        graphs = level.fused().graphs
        for alone in (True, False):
            together = {role: g for role, g in graphs.items() if (role == PREFIX) == alone}
            if together:
                self._graphs.update(lowering.loaded(program, together))

    def inputs(self, role: GraphName) -> Sequence[str]:
        return self._graphs[role].inputs

    def run(self, role: GraphName, values: Values) -> dict[str, Any]:
        return dict(self._graphs[role].run(values))
