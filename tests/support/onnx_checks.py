"""Runs ONNX models in stock onnxruntime, and compares them with the graphs they were made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY, PREFIX
from pbc.ir.graph import get_tensor, tensor_names
from pbc.ir.program import Program
from pbc.targets.onnxruntime.convert import Converter, inline, with_tensors
from pbc.testing import graph_of


def session(graph: GraphModule, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Stock onnxruntime on the model, with the graph's frozen tensors in it."""
    complete = with_tensors(model, (inline(n, get_tensor(graph, n)) for n in tensor_names(graph)))
    onnx.checker.check_model(complete, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        complete.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(
    runner: onnxruntime.InferenceSession, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    names = [given.name for given in runner.get_inputs()]
    outputs = [output.name for output in runner.get_outputs()]
    results = runner.run(None, {name: values[name] for name in names})
    return dict(zip(outputs, results, strict=True))


def converted(program: Program, name: str, converter: Converter) -> onnxruntime.InferenceSession:
    head = program.network.head.parameters
    open_head = program.network.head.fixed is None
    graph = graph_of(program, name)
    return session(graph, converter(name.partition("/")[0], graph, None, head, open_head=open_head))


def assert_logits(program: Program, level: int, tolerance: float) -> None:
    """Prefix and body in onnxruntime against the program, at several batch sizes."""
    converter = Converter()
    names = [str(role.at(level)) for role in (PREFIX, BODY) if role.at(level) in program.graphs]
    runners = [converted(program, name, converter) for name in names]
    theta = {name: value.detach().numpy() for name, value in program.parameters.items()}
    generator = torch.Generator().manual_seed(level)
    for batch in (1, 2, 5):
        images = torch.randn(batch, *program.network.input.shape, generator=generator)
        values = {"x": images.numpy(), **theta}
        for runner in runners:
            values.update(run(runner, values))
        with torch.no_grad():
            expected = program.logits(level, images).numpy()
        error = np.abs(values["logits"] - expected).max()
        assert values["logits"].shape == expected.shape
        assert error <= tolerance * max(1.0, np.abs(expected).max()), f"batch {batch}: {error:.1e}"
