"""The PyTorch engine computes what torch does, and runs nothing that is not allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch
from torch import nn

from pbc import bundle
from pbc.bundle import Bundle
from pbc.errors import PbcError
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.engines.pytorch.graph import parse
from pbc.runtime.engines.pytorch.ops import OPS
from pbc.runtime.engines.pytorch.resolved_graph import _function
from pbc.runtime.objective import Objective


def images(count: int = 5) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return tiny.SPEC.normalise(pixels)


def theta(classes: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {
        "head.weight": random.normal(size=(classes, tiny.CHANNELS)).astype(np.float32),
        "head.bias": random.normal(size=classes).astype(np.float32),
    }


def load(path: Path, kind: str = "probe", **options: Any) -> Executable:
    engine: Engine = PyTorchEngine()
    return engine.load(tiny.write(path / "m.pbc", kind, **options))


def reference(source: Bundle, level: int) -> nn.Sequential:
    """The same network as torch modules."""
    weights = source.tensors(tiny.WEIGHTS.format(level))
    conv = nn.Conv2d(3, tiny.CHANNELS, 3, 2, 1)
    conv.load_state_dict(
        {
            "weight": torch.tensor(weights["conv.weight"]),
            "bias": torch.tensor(weights["conv.bias"]),
        }
    )
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def custom(path: Path, body: dict[str, Any], files: dict[str, bytes] | None = None) -> Executable:
    """A bundle without a prefix and with this body."""
    manifest, contents = tiny.contents("whole", policy=False)
    contents = {**contents, "graphs/body-0.json": json.dumps(body).encode(), **(files or {})}
    return PyTorchEngine().load(bundle.write(path / "c.pbc", manifest, contents))


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_allowed_operator_exists(op: str) -> None:
    assert callable(_function(op))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_prefix_and_logits_equal_torch(tmp_path: Path, level: int) -> None:
    executable = load(tmp_path)
    executable.start(theta(), Objective(learning_rate=0.1))
    features = executable.prefix(level, images())
    expected = reference(Bundle.open(tmp_path / "m.pbc"), level)(torch.tensor(images()))
    np.testing.assert_allclose(features["flat"], expected.detach().numpy(), atol=1e-6)
    head = theta()
    logits = features["flat"] @ head["head.weight"].T + head["head.bias"]
    np.testing.assert_allclose(executable.logits(level, features), logits, atol=1e-5)


def test_maps_stay_channels_last(tmp_path: Path) -> None:
    features = load(tmp_path, "maps").prefix(0, images())["map"]
    assert features.shape == (5, 8, 8, 8)
    assert features.transpose(0, 2, 3, 1).flags.c_contiguous


def test_without_a_prefix_the_image_is_the_feature(tmp_path: Path) -> None:
    batch = images()
    features = load(tmp_path, "whole").prefix(1, batch)
    assert list(features) == ["x"]
    assert features["x"] is batch


def test_the_policy_predicts_a_fidelity_per_proxy(tmp_path: Path) -> None:
    views = np.stack([np.full((3, 4, 4), value, np.float32) for value in (-2, 0, 2)])
    predicted = load(tmp_path).policy(views)
    expected = 1 / (1 + np.exp(-(8 * np.array([[-2], [0], [2]]) + np.array([8, 4]))))
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)


def torch_optimizer(objective: Objective, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """What a PyTorch user would write for the same words."""
    rate, decay = objective.learning_rate, objective.weight_decay
    if objective.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=objective.momentum, weight_decay=decay)
    if objective.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    return torch.optim.AdamW(parameters, rate, weight_decay=decay)


def gradient_of(parameter: nn.Parameter) -> np.ndarray:
    assert parameter.grad is not None
    gradient: np.ndarray = parameter.grad.numpy()
    return gradient


OBJECTIVES = [
    Objective("sgd", 0.05),
    Objective("sgd", 0.05, momentum=0.0),
    Objective("sgd", 0.05, momentum=0.5, weight_decay=0.1, label_smoothing=0.2),
    Objective("adam", 0.05),
    Objective("adam", 0.05, weight_decay=0.1, label_smoothing=0.2),
    Objective("adamw", 0.05),
    Objective("adamw", 0.05, weight_decay=0.1, label_smoothing=0.2),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("kind", ["probe", "bodies", "whole"])
def test_training_is_torch_optim_to_the_bit(
    tmp_path: Path, kind: str, objective: Objective
) -> None:
    executable = load(tmp_path, kind)
    initial = theta()
    if kind == "whole":
        initial["b"] = np.linspace(-0.1, 0.1, tiny.CHANNELS, dtype=np.float32)
    executable.start(initial, objective)
    network = reference(Bundle.open(tmp_path / "m.pbc"), 0)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = {name: nn.Parameter(torch.tensor(value)) for name, value in initial.items()}
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if kind == "whole":
        network[0].bias = parameters["b"]
    optimizer = torch_optimizer(objective, list(parameters.values()))
    labels = np.array([0, 1, 2, 1, 0])
    for _ in range(5):
        features = executable.prefix(0, images())
        losses, logits = executable.forward(0, features, labels)
        flat = network(torch.from_numpy(images()))
        output = nn.functional.linear(flat, parameters["head.weight"], parameters["head.bias"])
        expected = nn.functional.cross_entropy(
            output,
            torch.tensor(labels),
            reduction="none",
            label_smoothing=objective.label_smoothing,
        )
        assert logits.tobytes() == output.detach().numpy().tobytes()
        assert losses.tobytes() == expected.detach().numpy().tobytes()
        optimizer.zero_grad()
        expected.mean().backward()
        for name, gradient in executable.gradients().items():
            assert gradient.tobytes() == gradient_of(parameters[name]).tobytes()
        optimizer.step()
        executable.update()
    for name, value in executable.parameters().items():
        np.testing.assert_array_equal(value, parameters[name].detach().numpy())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_optimizer_carries_on_from_its_state(tmp_path: Path, optimizer: str) -> None:
    one, two = load(tmp_path), load(tmp_path)
    features, labels = one.prefix(0, images()), np.array([0, 1, 2, 1, 0])
    objective = Objective(optimizer, 0.1, weight_decay=0.01)
    one.start(theta(), objective)

    def step(executable: Executable) -> None:
        executable.forward(0, features, labels)
        executable.update()

    step(one)
    two.start(one.parameters(), objective)
    two.load_optimizer_state(one.optimizer_state())
    for executable in (one, two):
        step(executable)
        step(executable)
    for name, value in one.parameters().items():
        assert value.tobytes() == two.parameters()[name].tobytes()
    assert set(one.optimizer_state()) >= {
        f"{'momentum' if optimizer == 'sgd' else 'exp_avg'}/head.weight"
    }


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    executable = load(tmp_path)
    executable.start(theta(), Objective(learning_rate=0.1))
    state = executable.optimizer_state()
    executable.start(theta(), Objective("adam", 0.1))
    with pytest.raises(PbcError, match="not of this optimizer"):
        executable.load_optimizer_state(state)


def test_parameters_are_copied_out(tmp_path: Path) -> None:
    executable = load(tmp_path)
    executable.start(theta(), Objective(learning_rate=0.1))
    executable.parameters()["head.bias"][:] = 9
    assert executable.parameters()["head.bias"].tolist() == theta()["head.bias"].tolist()


def test_a_level_is_read_and_verified_when_it_is_first_used(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "m", as_folder=True).path
    executable = PyTorchEngine().load(Bundle.open(folder))
    weights = folder / tiny.WEIGHTS.format(1)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    executable.prefix(0, images())
    with pytest.raises(PbcError, match="damaged: the sha256 of weights/level-1"):
        executable.prefix(1, images())


def test_float16_weights_compute_in_float32(tmp_path: Path) -> None:
    manifest, files = tiny.contents()
    name = tiny.WEIGHTS.format(0)
    tensors = safetensors.numpy.load(files[name])
    half = {key: value.astype(np.float16) for key, value in tensors.items()}
    files[name] = safetensors.numpy.save(half)
    executable = PyTorchEngine().load(bundle.write(tmp_path / "m.pbc", manifest, files))
    features = executable.prefix(0, images())["flat"]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, load(tmp_path).prefix(0, images())["flat"], atol=5e-3)


def test_nested_lists_keywords_dtypes_and_special_floats(tmp_path: Path) -> None:
    inf, dtype = {"float": "-inf"}, {"dtype": "float64"}
    nodes = [
        tiny.node("size", "aten.sym_size.int", "@x", 0),
        tiny.node("twice", "operator.mul", "@size", 2),
        tiny.node("both", "aten.cat.default", ["@x", "@x"]),
        tiny.node("rows", "aten.reshape.default", "@both", ["@twice", -1]),
        tiny.node("low", "aten.clamp.default", "@rows", inf),
        tiny.node("wide", "aten.mean.dim", "@low", [1], True, dtype=dtype),
        tiny.node("pair", "aten.split.Tensor", "@wide", 5),
        tiny.node("first", "operator.getitem", "@pair", 0),
        tiny.node("same", "aten.add.Tensor", "@first", "@first", alpha="@twice"),
    ]
    # dtypes and special floats are dicts already: they pass through `node` untouched.
    executable = custom(tmp_path, tiny.graph(["x"], {"logits": "same"}, {}, nodes))
    executable.start({}, Objective())
    logits = executable.logits(0, {"x": images()})
    assert logits.dtype == np.float64
    mean = images().astype(np.float64).mean((1, 2, 3)).reshape(-1, 1)
    np.testing.assert_allclose(logits, mean * 11, atol=1e-9)


def test_outputs_may_be_inputs(tmp_path: Path) -> None:
    executable = custom(tmp_path, tiny.graph(["x"], {"logits": "x"}, {}, []))
    batch = images()
    assert executable.logits(0, {"x": batch}).tobytes() == batch.tobytes()


def test_dead_values_are_freed_and_outputs_are_not() -> None:
    nodes = [
        tiny.node("a", "aten.relu.default", "@x"),
        tiny.node("b", "aten.relu.default", "@a"),
        tiny.node("c", "aten.add.Tensor", "@a", "@b"),
        tiny.node("d", "aten.relu.default", "@c"),
    ]
    graph = parse(tiny.graph(["x"], {"c": "c", "d": "d"}, {}, nodes), OPS, "g")
    names = {slot.index: name for name, slot in graph.inputs.items()}
    names.update({call.output.index: call.name for call in graph.calls})
    assert [[names[slot.index] for slot in call.dead] for call in graph.calls] == [
        ["x"],
        [],
        ["a", "b"],
        [],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "g has format 1; this pbc reads format 2: compile the model again"),
        ({"precision": "int4"}, "precision is 'int4'; expected one of float32, bfloat16"),
        ({"extra": 1}, "g is not valid: it has 'extra', which is not known"),
        ({"outputs": {"y": "z"}}, "output 'y' is 'z', which no node defines"),
        ({"tensors": {"w": "file"}}, "tensor 'w' is 'file'; expected file#key"),
        ({"nodes": [tiny.node("x", "aten.relu.default", "@x")]}, "g defines 'x' twice"),
        ({"nodes": [tiny.node("a", "aten.relu.default", "@y")]}, r"argument {'ref': 'y'}, which"),
        ({"nodes": [tiny.node("a", "aten.relu.default", {"code": "1"})]}, "not a value of this"),
        ({"nodes": [tiny.node("a", "aten.to.dtype", "@x", {"dtype": "str"})]}, "not a value of"),
        ({"nodes": [{"name": "a", "op": "aten.relu.default"}]}, r"nodes\[0\] has no 'args'"),
        ({"nodes": [tiny.node("a", "os.system", "ls")]}, "'a' uses 'os.system', which is not allo"),
        ({"nodes": [tiny.node("a", "aten.from_file.default", "f")]}, "which is not allowed"),
    ],
)
def test_a_graph_that_is_refused(change: dict[str, Any], message: str) -> None:
    data = {**tiny.graph(["x"], {"y": "x"}, {}, []), **change}
    with pytest.raises(PbcError, match=message) as caught:
        parse(data, OPS, "g")
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    body = tiny.graph(["x"], {"logits": "w"}, {"w": f"{tiny.WEIGHTS.format(0)}#gone"}, [])
    executable = custom(tmp_path, body)
    with pytest.raises(PbcError, match=r"level-0\.safetensors has no tensor 'gone'"):
        executable.logits(0, {"x": images()})


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match="has no graph policy"):
        load(tmp_path, policy=False).policy(images())
