"""Record what onnxruntime runs of a graph: its own operators, in its order, with their sizes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, helper
from onnxruntime import InferenceSession

from pbc.runtime.engines.onnxruntime.session import CPU, session_options
from pbc.training_graph.operations import Operation

# Their result is their first input's memory.
_VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
# A convolution in the usual layout lays out what it reads by so much (MLAS: 128 x 128 values), and
# what is small is put where that was, so that it does not break what is large.
_CONVOLUTIONS = frozenset(("Conv", "FusedConv"))
_BLOCKED_LAYOUT = "com.microsoft.nchwc"
_LAID_OUT_BYTES = 64 * 1024
# How the profiler calls the run of a node, and the types of tensors that numpy calls otherwise.
_SUFFIX = "_kernel_time"
_ITEM_BYTES = {"float": 4, "bfloat16": 2, "string": 8}


def record(
    model: ModelProto, values: Mapping[str, np.ndarray]
) -> tuple[list[Operation], dict[str, np.ndarray]]:
    """Run a half of a training step, whose tensors are in the model; return its results as well.

    It is optimised and run as on a device, but for the processor's own layouts.
    """
    with tempfile.TemporaryDirectory(prefix="pbc-") as name:
        folder = Path(name)
        optimised = folder / "optimised.onnx"
        saving = _options(optimised=False)
        saving.optimized_model_filepath = str(optimised)
        saving.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights.bin"
        )
        _session(model.SerializeToString(), saving)
        graph = onnx.load(optimised, load_external_data=False)
        nodes = {f"node {number}": node for number, node in enumerate(graph.graph.node)}
        for title, node in nodes.items():
            node.name = title  # by which the profile calls it
        optimised.write_bytes(graph.SerializeToString())

        profiling = _options(optimised=True)
        profiling.enable_profiling = True
        profiling.profile_file_prefix = str(folder / "profile")
        session = _session(str(optimised), profiling)
        results = session.run(
            None, {given.name: values[given.name] for given in session.get_inputs()}
        )
        events = json.loads(Path(session.end_profiling()).read_text())
    operations = [
        _operation(nodes[event["name"].removesuffix(_SUFFIX)], event["args"]["output_type_shape"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX)
    ]
    outputs = (output.name for output in session.get_outputs())
    return operations, dict(zip(outputs, results, strict=True))


def _operation(node: onnx.NodeProto, results: list[dict[str, list[int]]]) -> Operation:
    sizes = [_bytes(kind, shape) for result in results for kind, shape in result.items()]
    return Operation(
        reads=frozenset(filter(None, node.input)),
        makes=dict(zip(filter(None, node.output), sizes, strict=True)),
        within=node.input[0] if node.op_type in _VIEWS else None,
        workspace_bytes=_LAID_OUT_BYTES if _lays_out(node) else 0,
    )


def _lays_out(node: onnx.NodeProto) -> bool:
    """Return whether it copies the windows that it reads: not where these are single positions."""
    if node.op_type not in _CONVOLUTIONS or node.domain == _BLOCKED_LAYOUT:
        return False
    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    positions: int = prod(given.get("kernel_shape", ()))
    return positions > 1 and given.get("group", 1) == 1


def _bytes(kind: str, shape: list[int]) -> int:
    return prod(shape) * (_ITEM_BYTES.get(kind) or np.dtype(kind).itemsize)


def _options(optimised: bool) -> Any:
    options = session_options(None, optimised)
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _session(model: bytes | str, options: Any) -> InferenceSession:
    return InferenceSession(model, options, providers=[CPU])
