from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, pruned, settled

from pbc import bundle, compiler
from pbc.bundle import Bundle
from pbc.bundle.graph_name import PREFIX
from pbc.errors import PbcError
from pbc.ir.program import Program
from pbc.lower.engine_choice import choose_engine
from pbc.lower.weights import ALIGNMENT, TensorStore, byte_ranges, safetensors_bytes
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.independent_dims import IndependentDims
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.runtime.features.keys import level_key
from pbc.target import load_target
from pbc.targets.onnxruntime.convert import source
from pbc.targets.onnxruntime.lowering import INLINE_BYTES, THETA, OnnxRuntimeLowering
from pbc.testing import (
    assert_same,
    assert_unchanged,
    graph_of,
    make_program,
    run_passes,
    rungs,
    with_request,
)


def on_onnxruntime(program: Program) -> Program:
    return with_request(FoldBatchNorm()(program), engine="onnxruntime")


@cache
def lowered(kind: Kind, strategy: str) -> Program:
    return Lower()(on_onnxruntime(pruned(kind, strategy)))


@cache
def reduced() -> Program:
    """Three levels that differ in how many pixels they look at."""
    program = make_program(settled(ConvNet()), shape=(3, 64, 64))
    plan = PlanLevels(levels=2, min_cost=0.3, axes=("resolution",))
    steps = (MarkTrainable(), SplitPrefix(), IndependentDims(), plan, PruneDims())
    return Lower()(on_onnxruntime(run_passes(program, *steps)))


@cache
def package(kind: Kind, strategy: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    return compiler.package(lowered(kind, strategy))


def unpacked(folder: Path, program: Program) -> tuple[dict[str, Any], Path]:
    """The manifest, and the folder where the files of the program's bundle lie."""
    manifest, files = compiler.package(program)
    bundle.write(folder / "m.pbc", manifest, files, as_folder=True)
    return manifest, folder / "m.pbc"


def run(path: Path | bytes, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stock onnxruntime on a model and what it reads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runner = onnxruntime.InferenceSession(
        path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"]
    )
    feeds = {given.name: values[given.name] for given in runner.get_inputs()}
    names = [output.name for output in runner.get_outputs()]
    return dict(zip(names, runner.run(None, feeds), strict=True))


def logits(program: Program, level: int, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return program.logits(level, images).numpy()


# ---- the files -----------------------------------------------------------------------------


def test_the_files_of_a_bundle() -> None:
    before = on_onnxruntime(pruned(ConvNet))
    after = assert_unchanged(Lower(), before)
    assert_same(before, replace(after, artifacts={}))
    assert sorted(after.artifacts) == [
        "onnx/body-0.onnx",
        "onnx/body-1.onnx",
        "onnx/body-2.onnx",
        "onnx/export-0.onnx",
        "onnx/export-1.onnx",
        "onnx/export-2.onnx",
        "onnx/level-0.safetensors",
        "onnx/level-1.safetensors",
        "onnx/level-2.safetensors",
        "onnx/prefix-0.onnx",
        "onnx/prefix-1.onnx",
        "onnx/prefix-2.onnx",
    ]
    assert after.artifacts["onnx/body-0.onnx"] == after.artifacts["onnx/body-1.onnx"]
    stored = safetensors.torch.load(after.artifacts["onnx/level-0.safetensors"])
    assert sorted(stored) == ["conv1.weight_folded", "conv2.weight_folded"]
    assert OnnxRuntimeLowering().lower(before) == after.artifacts  # to the byte


def test_what_the_manifest_says() -> None:
    manifest, _ = package(ResidualNet, "adapters:2")
    assert manifest["requires"]["onnxruntime"] == ">=1.20"
    assert manifest["graphs"]["prefix/1"] == "onnx/prefix-1.onnx"
    first, second = "onnx/level-0.safetensors", "onnx/level-1.safetensors"
    assert manifest["weights"]["prefix/0"] == [first]
    assert manifest["weights"]["prefix/1"] == [first, second]  # the stem is level 0's
    assert manifest["export"]["1"]["file"] == "onnx/export-1.onnx"
    tensors = manifest["export"]["1"]["tensors"]
    assert tensors["stem.weight"] == f"{first}#stem.weight"
    assert tensors["blocks.0.up.weight"] == f"{second}#blocks.0.up.weight"
    trained = {name for name, place in tensors.items() if place == THETA}
    assert trained == lowered(ResidualNet, "adapters:2").parameters.keys()


def test_small_tensors_stay_in_the_model_and_large_ones_lie_outside() -> None:
    program = lowered(AttentionNet, "norm")
    files = program.artifacts
    for level in range(len(program.levels)):
        model = onnx.load_model_from_string(files[f"onnx/body-{level}.onnx"])
        for tensor in model.graph.initializer:
            place = source(tensor)
            size = np.prod(list(tensor.dims)) * 4
            assert (place is None) == (size < INLINE_BYTES), tensor.name
            if place is not None:
                location, offset = place
                key = {at: key for key, (at, _) in byte_ranges(files[f"onnx/{location}"]).items()}
                stored = safetensors.torch.load(files[f"onnx/{location}"])[key[offset]]
                assert list(stored.shape) == list(tensor.dims)
                assert offset % ALIGNMENT == 0


def test_levels_of_equal_tensors_share_their_bytes() -> None:
    program = reduced()
    assert [level.resolution for level in rungs(program).levels] == [None, (48, 48), (32, 32)]
    sizes = {name: len(data) for name, data in program.artifacts.items()}
    assert [name for name in sizes if name.endswith(".safetensors")] == ["onnx/level-0.safetensors"]
    manifest, _ = compiler.package(program)
    assert manifest["weights"]["prefix/2"] == ["onnx/level-0.safetensors"]


# ---- what they compute ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(ConvNet, "linear-probe"), (ResidualNet, "adapters:2"), (AttentionNet, "norm")],
)
def test_onnxruntime_runs_an_unpacked_bundle(tmp_path: Path, kind: Kind, strategy: str) -> None:
    program = lowered(kind, strategy)
    manifest, folder = unpacked(tmp_path, program)
    images = program.network.example.repeat(2, 1, 1, 1)[:3]
    theta = {name: value.detach().numpy() for name, value in program.parameters.items()}
    for level in range(len(program.levels)):
        values = {"x": images.numpy(), **theta}
        for name in (f"prefix/{level}", f"body/{level}"):
            path = folder / manifest["graphs"][name]
            onnx.checker.check_model(str(path), full_check=True)
            values.update(run(path, values))
        expected = logits(program, level, images)
        assert np.allclose(values["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_reduced_resolution_level_runs() -> None:
    program = reduced()
    lowering = OnnxRuntimeLowering()
    for level in range(len(program.levels)):
        session = lowering.session(program, PREFIX, graph_of(program, f"prefix/{level}"))
        (features,) = session.run(None, {"x": program.network.example.numpy()})
        with torch.no_grad():
            (expected,) = program.levels[level].features(program.network.example).values()
        assert np.allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "strategy"), [(ConvNet, "linear-probe"), (AttentionNet, "norm"), (ConvNet, "full")]
)
def test_an_export_needs_nothing_but_its_tensors_appended(kind: Kind, strategy: str) -> None:
    program = lowered(kind, strategy)
    manifest, files = package(kind, strategy)
    for level in range(len(program.levels)):
        export = manifest["export"][str(level)]
        base = files[export["file"]]
        named = {tensor.name for tensor in onnx.load_model_from_string(base).graph.initializer}
        assert not named & export["tensors"].keys()
        appended = onnx.ModelProto()
        for name, place in export["tensors"].items():
            if place == THETA:
                value = program.parameters[name].detach()
            else:
                file, _, key = place.partition("#")
                value = safetensors.torch.load(files[file])[key]
            appended.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
        merged = base + appended.SerializeToString()
        onnx.checker.check_model(merged, full_check=True)
        images = program.network.example.repeat(2, 1, 1, 1)[:3]
        got = run(merged, {"x": images.numpy()})
        expected = logits(program, level, images)
        assert list(got) == ["logits", "probabilities"]
        assert np.allclose(got["logits"], expected, rtol=1e-4, atol=1e-5)
        assert np.allclose(got["probabilities"], torch.tensor(expected).softmax(1), atol=1e-5)


def test_a_derived_step_is_lowered_too(tmp_path: Path) -> None:
    program = on_onnxruntime(pruned(ConvNet, levels=1))
    program = Lower()(DeriveTrainStep()(program))
    manifest, folder = unpacked(tmp_path, program)
    assert manifest["graphs"]["update/1/sgd"] == "onnx/update-1-sgd.onnx"
    values: dict[str, np.ndarray] = {
        "x": program.network.example.numpy(),
        "labels": np.array([3, 8]),
        **{name: value.detach().numpy() for name, value in program.parameters.items()},
        **{name: np.array(0.1, np.float32) for name in ("learning_rate", "label_smoothing")},
        **{name: np.array(0, np.float32) for name in ("momentum", "weight_decay")},
    }
    values.update({f"momentum/{n}": np.zeros_like(values[n]) for n in program.parameters})
    for name in ("prefix/1", "forward/1", "update/1/sgd"):
        values.update(run(folder / manifest["graphs"][name], values))
    theta = {n: p.detach().clone().requires_grad_() for n, p in program.parameters.items()}
    features = program.levels[1].features(program.network.example)["feature_0"].detach()
    loss = torch.nn.functional.cross_entropy(
        features @ theta["fc.weight"].t() + theta["fc.bias"],
        torch.tensor([3, 8]),
        label_smoothing=0.1,
    )
    loss.backward()
    assert np.isclose(values["loss"], loss.item(), rtol=1e-5)
    for name, value in theta.items():
        assert value.grad is not None
        moved = (value - 0.1 * value.grad).detach().numpy()
        assert np.allclose(values[f"new/{name}"], moved, rtol=1e-4, atol=1e-6), name


def test_latency_is_measured_per_candidate() -> None:
    program = DeriveTrainStep()(on_onnxruntime(pruned(ConvNet)))
    trials = [replace(level, forward=None, updates={}) for level in program.levels]
    text = program.text()
    measured = OnnxRuntimeLowering().latency_ms(program, [*trials, program.levels[0]])
    assert len(measured) == 4
    assert min(measured) > 0
    assert max(measured) < float("inf")
    assert program.text() == text


# ---- features' keys, and the other lowering ------------------------------------------------


@pytest.mark.parametrize("engine", ["onnxruntime", "pytorch"])
def test_a_level_s_key_covers_the_weights_it_reads(tmp_path: Path, engine: str) -> None:
    program = with_request(FoldBatchNorm()(pruned(ResidualNet)), engine=engine)
    manifest, files = compiler.package(Lower()(program))
    assert all(name in files for names in manifest["weights"].values() for name in names)
    assert manifest["weights"].keys() == {str(name) for name in program.graphs}
    keys = []
    for number, changed in enumerate([None, 0, 1, 2]):
        touched = dict(files)
        if changed is not None:
            (name,) = (n for n in files if n.endswith(f"level-{changed}.safetensors"))
            touched[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        written = bundle.write(tmp_path / f"{number}.pbc", manifest, touched)
        key = level_key(written, program.network.input, "engine 1", "float32")
        keys.append([key(level) for level in range(len(program.levels))])
    same = [[one == other for one, other in zip(row, keys[0], strict=True)] for row in keys[1:]]
    # Level 0's file holds what the others share with it.
    assert same == [[False, False, False], [True, False, True], [True, True, False]]


def test_an_older_bundle_s_key_covers_all_its_files(tmp_path: Path) -> None:
    manifest, files = package(ConvNet, "linear-probe")
    manifest = {key: value for key, value in manifest.items() if key != "weights"}
    spec = lowered(ConvNet, "linear-probe").network.input
    one = bundle.write(tmp_path / "one.pbc", manifest, files)
    other = bundle.write(tmp_path / "other.pbc", manifest, {**files, "dims.json": b"{}"})
    keys = [level_key(b, spec, "engine 1", "float32")(0) for b in (one, other)]
    assert keys[0] != keys[1]


# ---- the store -----------------------------------------------------------------------------


def test_equal_tensors_are_stored_once_and_names_are_unique() -> None:
    store = TensorStore()
    tensor = torch.arange(6.0).reshape(2, 3)
    assert str(store.add("a", "w", tensor)) == "a#w"
    assert str(store.add("b", "v", tensor.clone())) == "a#w"
    assert str(store.add("b", "v", tensor.t())) == "b#v"  # other shape
    assert str(store.add("b", "u", tensor.int())) == "b#u"  # other type
    assert str(store.add("a", "w", tensor + 1)) == "a#w_1"
    files = store.files()
    assert sorted(safetensors.torch.load(files["a"])) == ["w", "w_1"]
    assert torch.equal(safetensors.torch.load(files["b"])["v"], tensor.t())


def test_a_file_of_weights_is_aligned_and_exact() -> None:
    tensors = {
        "a": torch.randn(3),
        "b": torch.randn(16, 3, 3, 3),
        "c": torch.tensor(3.5),
        "d": torch.randn(64),
        "e": torch.randint(-128, 127, (7, 5), dtype=torch.int8),
        "f": torch.tensor([True, False]),
        "g": torch.randn(4, 4).bfloat16(),
        "h": torch.zeros(0, 3),
        "i": torch.arange(4),
    }
    data = safetensors_bytes(tensors)
    loaded = safetensors.torch.load(data)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value), name
    for name, (offset, length) in byte_ranges(data).items():
        if length % ALIGNMENT == 0:
            assert offset % ALIGNMENT == 0, name
        assert offset % tensors[name].element_size() == 0, name
    offset, length = byte_ranges(data)["d"]
    assert data[offset : offset + length] == tensors["d"].numpy().tobytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["c"]["shape"] == []


# ---- choosing the engine -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "android-arm64",
        "generic-arm64",
        "generic-x86-64",
        "host",
        "jetson-agx-orin",
        "jetson-agx-xavier",
        "jetson-orin-nano",
        "raspberry-pi-4b",
        "raspberry-pi-5",
    ],
)
def test_boards_that_onnxruntime_runs_on(name: str) -> None:
    assert choose_engine(load_target(name), "onnxruntime") == ("onnxruntime", ())


def test_the_jetsons_ask_for_their_gpu() -> None:
    for name in ("jetson-agx-orin", "jetson-agx-xavier", "jetson-orin-nano"):
        providers = load_target(name).tags["onnxruntime_providers"]
        assert providers == "CUDAExecutionProvider,CPUExecutionProvider"


def test_an_engine_whose_packages_are_missing_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("onnx", "onnxscript") else find(name, *rest),
    )
    board = load_target("raspberry-pi-5")
    assert choose_engine(board, None) == (
        "pytorch",
        (
            "raspberry-pi-5 prefers engine onnxruntime, which needs onnx, onnxscript: "
            "pip install 'pbc[onnx]': using pytorch",
        ),
    )
    with pytest.raises(
        PbcError,
        match=r"compiling for engine 'onnxruntime' needs onnx, onnxscript: "
        r"pip install 'pbc\[onnx\]'$",
    ):
        choose_engine(board, "onnxruntime")


def test_a_pi_s_bundle_is_onnxruntime_s(tmp_path: Path) -> None:
    source_file = tmp_path / "net.py"
    source_file.write_text(
        "import torch\n\n\ndef net():\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))\n"
    )
    options = compiler.CompileOptions(
        target="raspberry-pi-5", weights="random", shape=(3, 32, 32), levels=1, axes=("width",)
    )
    written = compiler.compile(f"{source_file}:net", tmp_path / "m.pbc", options)
    opened = Bundle.open(written.path)
    opened.verify()
    assert opened.manifest["engine"] == "onnxruntime"
    assert opened.manifest["target"]["arch"] == "aarch64"
    assert "onnx/prefix-0.onnx" in opened.manifest["files"]
