"""Lower to TVM: shared libraries for the target's CPU or GPU, their weights beside them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from pbc.ir.program import (
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
from pbc.lower.lowering import Candidate
from pbc.lower.visit import Visit, at_level_0, latencies_ms, level_of_candidate
from pbc.lower.weights import TensorStore, by_level, level_of, weight_file
from pbc.passes.fold_batch_norm import fold
from pbc.target import Target
from pbc.util.processor import cores

if TYPE_CHECKING:
    import tvm

    from pbc.runtime.engines.tvm.library import Graph
    from pbc.targets.tvm.build import Platform
    from pbc.targets.tvm.convert import Reads

FOLDER = "tvm"
CALLS = f"{FOLDER}/calls.json"
FORMAT = 1


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
        # Functions that a rule could not schedule, by the rules.
        self._fallbacks: dict[str, list[str]] = {}
        self._notes: tuple[str, ...] = ()

    def graph_file(self, graph: str) -> str:
        if graph == POLICY:
            return f"{FOLDER}/{POLICY}.so"
        kind = "prefix" if graph.startswith("prefix/") else "body"
        return f"{FOLDER}/{kind}-{level_of(graph)}.so"

    def requires(self) -> dict[str, str]:
        return {"tvm": ">=0.27,<0.28", "apache-tvm-ffi": "==0.1.14.post1"}

    def check(self, target: Target) -> None:
        from pbc.targets.tvm.build import platform_of

        _ = platform_of(target).target  # a GPU's needs a compiler for its kernels

    def lower(self, program: Program) -> dict[str, bytes]:
        from pbc.targets.tvm.build import platform_of

        where = platform_of(program.target)
        store = TensorStore()
        files: dict[str, bytes] = {}
        calls: dict[str, Any] = {}
        for file, names in self.groups(program).items():
            graphs = {function_of(name): program.graphs[name] for name in names}
            files[file], reads = self._library(program, graphs, where)
            for name in names:
                calls[name] = _call(name, program.graphs[name], reads[function_of(name)], store)
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

    def step(self, program: Program, level: int) -> _Step:
        return _Step(self, program, level)

    def latency_ms(self, program: Program, candidates: Sequence[Candidate]) -> list[float]:
        return latencies_ms([self.visit(program, candidate) for candidate in candidates])

    def visit(self, program: Program, candidate: Candidate) -> Visit:
        return Visit(_Runner(self, program, candidate), program, candidate)

    def loaded(self, program: Program, graphs: Mapping[str, GraphModule]) -> dict[str, Graph]:
        """Graphs of one library, as the device runs them if this machine can, or built for it."""
        from pbc.runtime.engines.tvm.library import Library, use_threads
        from pbc.targets.tvm.build import platform_of, runs_here, this_machine

        target = program.target
        where = platform_of(target) if runs_here(target) else this_machine()
        functions = {function_of(name): graph for name, graph in graphs.items()}
        content, reads = self._library(program, functions, where)
        with tempfile.TemporaryDirectory(prefix="pbc-") as folder:
            path = Path(folder) / "library.so"
            path.write_bytes(content)
            library = Library(path)
        use_threads(cores())
        return {
            name: library.graph(
                function_of(name),
                graph_inputs(graph),
                graph_outputs(name, graph),
                _arrays(graph, reads[function_of(name)].tensors),
                _arrays(graph, reads[function_of(name)].setup),
            )
            for name, graph in graphs.items()
        }

    def together(self, program: Program, name: str) -> dict[str, GraphModule]:
        """The graphs that share a library with this one."""
        names = self.groups(program)[self.graph_file(name)]
        return {name: program.graphs[name] for name in names}

    def _about_fallbacks(self) -> list[str]:
        return [
            f"kernels with the schedule of {rules}, which TVM cannot build for them: "
            + ", ".join(sorted(set(names)))
            for rules, names in self._fallbacks.items()
        ]

    def groups(self, program: Program) -> dict[str, list[str]]:
        """The files, in the order of levels, with the graphs in each."""
        groups: dict[str, list[str]] = {}
        for name in sorted(program.graphs, key=by_level):
            groups.setdefault(self.graph_file(name), []).append(name)
        return groups

    def _library(
        self, program: Program, graphs: Mapping[str, GraphModule], where: Platform
    ) -> tuple[bytes, dict[str, Reads]]:
        from tvm_ffi import structural_equal

        from pbc.targets.tvm.build import compiled, scheduled
        from pbc.targets.tvm.scheduled import fallbacks

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

    def try_graphs(self, program: Program, graphs: Mapping[str, GraphModule]) -> None:
        self.converted(program, {name.replace("/", "_"): graph for name, graph in graphs.items()})

    def converted(
        self, program: Program, graphs: Mapping[str, GraphModule]
    ) -> tuple[tvm.IRModule, dict[str, Reads]]:
        """Graphs, by their functions' names, as one module."""
        from pbc.targets.tvm.convert import convert

        head = [name for name in (program.head.weight, program.head.bias) if name is not None]
        return convert(graphs, head, open_head=program.class_count is None)

    def keep(self, where: Platform, module: tvm.IRModule, content: bytes) -> None:
        """Take this library wherever this module is lowered."""
        self._built.append((where.key(), module, content))

    def untunable(self, target: Target) -> str | None:
        from pbc.targets.tvm.tuning.tune import untunable

        return untunable(target)

    def tune(self, program: Program, seconds: float) -> dict[str, Any]:
        from pbc.targets.tvm.tuning.tune import tune

        return tune(self, program, seconds)


def function_of(graph: str) -> str:
    """What a graph's function is called: `prefix`, `forward`, `update_sgd`; never its level."""
    kind, _, rest = graph.partition("/")
    return "_".join([kind, *rest.split("/")[1:]])


def _call(name: str, graph: GraphModule, reads: Reads, store: TensorStore) -> dict[str, Any]:
    """What the device must know to call the graph's function."""

    def places(names: Sequence[str]) -> list[str]:
        file = weight_file(FOLDER, name)
        return [str(store.add(file, own, get_tensor(graph, own))) for own in names]

    return {
        "function": function_of(name),
        "inputs": graph_inputs(graph),
        "outputs": graph_outputs(name, graph),
        "tensors": places(reads.tensors),
        "setup": places(reads.setup),
    }


def _about_kernels(sm: int, files: Mapping[str, bytes]) -> str:
    """What the libraries hold for a GPU, and what nobody has seen."""
    from pbc.runtime.engines.tvm.cuda_kernels import unpack
    from pbc.targets.tvm.cuda import cubin_elf

    libraries = {data for file, data in files.items() if file.endswith(".so")}
    count = sum(len(cubin_elf.kernels(found.cubin)) for data in libraries for found in unpack(data))
    return (
        f"{count} kernels are compiled for GPUs of sm_{sm}, and were not run: checks ran the same "
        "graphs, built for this machine's CPU"
    )


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


class _Runner:
    """Runs a candidate's graphs: of a level, in the library that the device gets."""

    def __init__(self, lowering: TvmLowering, program: Program, candidate: Candidate) -> None:
        self._graphs: dict[str, Graph] = {}
        level = level_of_candidate(program, candidate)
        for kind in (prefix, body):
            names = [n for n in candidate.graphs if (n == prefix(0)) == (kind is prefix)]
            if not names:
                continue
            if level is None:
                graphs = {name: _folded(candidate.graphs[name]) for name in names}
                self._graphs.update(lowering.loaded(program, graphs))
            else:
                # `lower` need not build it again.
                loaded = lowering.loaded(program, lowering.together(program, kind(level)))
                self._graphs.update({at_level_0(name): graph for name, graph in loaded.items()})

    def reads(self, graph: str) -> Sequence[str]:
        return self._graphs[graph].inputs

    def run(self, graph: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._graphs[graph].run(values))


def _folded(graph: GraphModule) -> GraphModule:
    """Folded as the device runs it."""
    folded = copy_graph(graph)
    fold(folded)
    return folded
