"""The ONNX Runtime engine computes and trains as PyTorch does, and keeps what it optimised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import tiny_onnx
from killing import killed_until_done
from onnx import helper

from pbc import bundle
from pbc.bundle import Bundle
from pbc.data import ImageFolder
from pbc.errors import PbcError
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.engines.onnxruntime import loader as loader_module
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.runtime.engines.onnxruntime.session import providers, session_options
from pbc.runtime.engines.pytorch.engine import PyTorchEngine
from pbc.runtime.events import Report
from pbc.runtime.objective import Objective
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime
from pbc.util.artifacts import Artifacts
from pbc.util.processor import cpu_identity

LABELS = np.array([0, 1, 2, 1, 0])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of optimised graphs for each test."""
    loader_module._tell_once.cache_clear()
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(count: int = 5) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
    return tiny.SPEC.normalise(pixels)


def theta(kind: str = "probe", classes: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    values = {
        "head.weight": random.normal(size=(classes, tiny.CHANNELS)).astype(np.float32),
        "head.bias": random.normal(size=classes).astype(np.float32),
    }
    if kind == "whole":
        values["b"] = np.linspace(-0.1, 0.1, tiny.CHANNELS, dtype=np.float32)
    return values


def load(path: Path, kind: str = "probe", **options: Any) -> Executable:
    return opened(tiny_onnx.write(path / "m.pbc", kind, **options))


def opened(source: Bundle) -> Executable:
    engine: Engine = OnnxRuntimeEngine()
    return engine.load(source, threads=1)


def torch_twin(path: Path, kind: str = "probe") -> Executable:
    return PyTorchEngine().load(tiny.write(path / "torch.pbc", kind))


def changed(
    path: Path, files: Mapping[str, bytes], *, without: str = "", kind: str = "probe"
) -> Executable:
    """A bundle with other content in some files, or without the graphs of some name."""
    manifest, contents = tiny_onnx.contents(kind)
    for name in [name for name in manifest["graphs"] if without and name.startswith(without)]:
        del contents[manifest["graphs"].pop(name)]
    return opened(bundle.write(path / "c.pbc", manifest, {**contents, **files}))


def assert_close(value: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


# ---- results -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probe", "maps"])
@pytest.mark.parametrize("level", [0, 2])
def test_features_and_logits_are_those_of_pytorch(tmp_path: Path, kind: str, level: int) -> None:
    ours, twin = load(tmp_path, kind), torch_twin(tmp_path, kind)
    for executable in (ours, twin):
        executable.start(theta(), Objective())
    for batch in (images(), images(1), np.asfortranarray(images(2))):
        features, expected = ours.prefix(level, batch), twin.prefix(level, batch)
        assert features.keys() == expected.keys()
        for name, value in features.items():
            assert value.dtype == np.float32
            assert_close(value, expected[name])
        # The twin's maps are views of NHWC memory, as cached features are.
        logits = twin.logits(level, expected)
        assert_close(ours.logits(level, expected), logits)


def test_without_a_prefix_the_image_is_the_feature(tmp_path: Path) -> None:
    batch = images()
    features = load(tmp_path, "whole").prefix(1, batch)
    assert list(features) == ["x"]
    assert features["x"] is batch


def test_the_policy_predicts_a_fidelity_per_proxy(tmp_path: Path) -> None:
    views = np.stack([np.full((3, 4, 4), value, np.float32) for value in (-2, 0, 2)])
    expected = torch_twin(tmp_path).policy(views)
    assert_close(load(tmp_path).policy(views), expected)


@pytest.mark.parametrize(
    "objective",
    [
        Objective("sgd", 0.05),
        Objective("sgd", 0.05, momentum=0.5, weight_decay=0.1, label_smoothing=0.2),
        Objective("adam", 0.05),
        Objective("adam", 0.05, weight_decay=0.1),
        Objective("adamw", 0.05, weight_decay=0.1, label_smoothing=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["probe", "maps", "whole"])
def test_training_is_that_of_pytorch(tmp_path: Path, kind: str, objective: Objective) -> None:
    ours, twin = load(tmp_path, kind), torch_twin(tmp_path, kind)
    for executable in (ours, twin):
        executable.start(theta(kind), objective)
    for step in range(12):
        count = 5 - step % 2  # another batch size every time
        batch, level = images(count), step % 3
        losses, logits = ours.forward(level, ours.prefix(level, batch), LABELS[:count])
        expected = twin.forward(level, twin.prefix(level, batch), LABELS[:count])
        assert_close(losses, expected[0], 1e-4)
        assert_close(logits, expected[1], 1e-4)
        if step % 4 != 3:  # a skipped backward
            ours.update()
            twin.update()
    for mine, other in (
        (ours.parameters(), twin.parameters()),
        (ours.optimizer_state(), twin.optimizer_state()),
    ):
        assert list(mine) == list(other)
        for name, value in mine.items():
            assert value.dtype == other[name].dtype
            assert_close(value, other[name], 1e-4)
    assert not np.array_equal(ours.parameters()["head.bias"], theta(kind)["head.bias"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_optimizer_carries_on_from_its_state(tmp_path: Path, optimizer: str) -> None:
    one, two = load(tmp_path), load(tmp_path)
    features, objective = one.prefix(0, images()), Objective(optimizer, 0.1, weight_decay=0.01)
    one.start(theta(), objective)

    def step(executable: Executable) -> None:
        executable.forward(0, features, LABELS)
        executable.update()

    step(one)
    two.start(one.parameters(), objective)
    two.load_optimizer_state(one.optimizer_state())
    for executable in (one, two):
        step(executable)
        step(executable)
    for get in ("parameters", "optimizer_state"):
        mine, other = getattr(one, get)(), getattr(two, get)()
        assert {n: v.tobytes() for n, v in mine.items()} == {
            n: v.tobytes() for n, v in other.items()
        }


def test_a_state_that_is_not_of_these_parameters_is_refused(tmp_path: Path) -> None:
    executable = load(tmp_path)
    executable.start(theta(), Objective("sgd"))
    sgd = executable.optimizer_state()
    executable.start(theta(classes=4), Objective("sgd"))
    with pytest.raises(PbcError, match="not of this optimizer and these parameters"):
        executable.load_optimizer_state(sgd)
    executable.start(theta(), Objective("adam"))
    with pytest.raises(PbcError, match="not of this optimizer and these parameters"):
        executable.load_optimizer_state(sgd)


def test_a_parameter_that_a_graph_does_not_return_stays(tmp_path: Path) -> None:
    initial = {**theta(), "unread": np.arange(3, dtype=np.float32)}
    executable = load(tmp_path)
    executable.start(initial, Objective())
    executable.forward(0, executable.prefix(0, images()), LABELS)
    executable.update()
    assert executable.parameters()["unread"].tolist() == [0, 1, 2]
    assert list(executable.parameters()) == list(initial)
    assert not executable.optimizer_state()["momentum/unread"].any()


def test_what_comes_out_is_a_copy(tmp_path: Path) -> None:
    executable = load(tmp_path)
    given = theta()
    executable.start(given, Objective("sgd", 0.1))
    given["head.bias"][:] = 9
    executable.parameters()["head.bias"][:] = 9
    executable.optimizer_state()["momentum/head.bias"][:] = 9
    assert executable.parameters()["head.bias"].tolist() == theta()["head.bias"].tolist()
    assert not executable.optimizer_state()["momentum/head.bias"].any()
    features = executable.prefix(0, images())
    expected = features["flat"].copy()
    losses, logits = executable.forward(0, features, LABELS)
    kept = losses.copy(), logits.copy()
    for _ in range(3):
        executable.forward(0, executable.prefix(1, images()), LABELS)
        executable.update()
    for value, before in zip((features["flat"], losses, logits), (expected, *kept), strict=True):
        np.testing.assert_array_equal(value, before)


def test_where_an_array_lies_changes_no_bit(tmp_path: Path) -> None:
    graph = tiny_onnx.Graph()
    mean = graph.op("ReduceMean", graph.takes("flat", ["b", "n"]), graph.constant([1]))
    graph.gives("logits", mean, ["b", 1])
    executable = changed(tmp_path, {"onnx/body-0.onnx": graph.model()})
    values = np.random.default_rng(0).normal(size=(7, 1089)).astype(np.float32)
    found = set()
    for shift in range(0, 64, 4):
        memory = np.zeros(values.nbytes + 128, np.uint8)
        start = -memory.ctypes.data % 64 + shift
        moved = memory[start : start + values.nbytes].view(np.float32).reshape(values.shape)
        moved[...] = values
        found.add(executable.logits(0, {"flat": moved}).tobytes())
    assert len(found) == 1


# ---- a whole training ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assets")
    tiny.photos(root / "photos", 10)
    tiny.costs(root / "costs.json")
    for kind in ("probe", "maps", "whole"):
        tiny_onnx.write(root / f"{kind}.onnx.pbc", kind)
        tiny.write(root / f"{kind}.torch.pbc", kind)
    return root


def fit(assets: Path, name: str, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train to the end; return the lines of the metrics."""
    report = settings.pop("report", lambda event: None)
    options = {"epochs": 4, "learning_rate": 0.1, "costs": assets / "costs.json", **settings}
    runtime = Runtime.open(assets / f"{name}.pbc")
    samples = ImageFolder.open(assets / "photos", runtime.spec)
    runtime.fit(samples, TrainOptions(**options), out, resume=True, report=report)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("probe", {"cache": "ram"}),
        ("maps", {"cache": "disk", "optimizer": "adamw", "learning_rate": 0.02}),
        ("whole", {"optimizer": "adam", "learning_rate": 0.02, "weight_decay": 0.01}),
    ],
)
def test_losses_are_those_of_pytorch(
    assets: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    lines = {
        engine: fit(assets, f"{kind}.{engine}", tmp_path / engine, epochs=6, **settings)
        for engine in ("onnx", "torch")
    }
    ours, expected = ([line["loss"] for line in found[:6]] for found in lines.values())
    assert len(ours) == 6
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    assert [line["levels"] for line in lines["onnx"][:6]] == [
        line["levels"] for line in lines["torch"][:6]
    ]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("probe", {"cache": "off"}),
        ("maps", {"cache": "disk", "optimizer": "adam"}),
        ("whole", {"optimizer": "adamw", "weight_decay": 0.01}),
    ],
)
def test_a_run_killed_at_many_steps_resumes_to_the_same_bits(
    assets: Path, tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    settings = {**settings, "checkpoint_seconds": 0.0}
    name, out = f"{kind}.onnx", tmp_path / "killed"
    whole = fit(assets, name, tmp_path / "whole", **settings)

    def train(report: Report) -> list[dict[str, Any]]:
        return fit(assets, name, out, report=report, **settings)

    resumed = killed_until_done(train, 3, (1, 14))
    model = "trainable.safetensors"
    assert (out / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    for key in ("epoch", "loss", "levels", "steps", "skipped_updates"):
        assert [line.get(key) for line in whole] == [line.get(key) for line in resumed]


DIGEST = """
import hashlib, sys
import numpy as np
from pbc.bundle import Bundle
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.runtime.objective import Objective

executable = OnnxRuntimeEngine().load(Bundle.open(sys.argv[1]), threads=1)
random = np.random.default_rng(1)
executable.start({
    "head.weight": random.normal(size=(3, 8)).astype(np.float32),
    "head.bias": random.normal(size=3).astype(np.float32),
}, Objective("adamw", 0.05))
x = random.normal(size=(5, 3, 16, 16)).astype(np.float32)
for _ in range(20):
    executable.forward(0, executable.prefix(0, x), np.array([0, 1, 2, 1, 0]))
    executable.update()
state = {**executable.parameters(), **executable.optimizer_state()}
print(hashlib.sha256(b"".join(value.tobytes() for value in state.values())).hexdigest())
"""


def test_optimised_now_earlier_or_never_is_the_same_to_the_bit(
    assets: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    digests = [
        subprocess.run(
            [sys.executable, "-c", DIGEST, str(assets / "maps.onnx.pbc")],
            env={**os.environ, "PBC_CACHE": str(folder)},
            capture_output=True,
            check=True,
        ).stdout
        for folder in (cache, cache, tmp_path / "file")
    ]
    assert len(digests[0]) == 65
    assert len(set(digests)) == 1


def test_memory_does_not_grow(tmp_path: Path) -> None:
    executable = load(tmp_path, "whole")
    executable.start(theta("whole"), Objective("adam", 0.01))
    batch, labels = images(256), np.zeros(256, np.int64)

    def steps(count: int) -> int:
        for step in range(count):
            executable.forward(step % 3, {"x": batch}, labels)
            if step % 5:
                executable.update()
            executable.optimizer_state()
        return tiny_onnx.resident_bytes()

    before = steps(20)
    # A leak of what one step saves would be 100 MB.
    assert steps(200) - before < 8 * 2**20


PEAKS = """
import sys
import numpy as np
from pbc.profile.memory import peak_bytes
from pbc.bundle import Bundle
from pbc.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from pbc.runtime.objective import Objective
from pbc.runtime.parameters import initial_parameters

bundle, count = Bundle.open(sys.argv[1]), 20_000
executable = OnnxRuntimeEngine().load(bundle, threads=1)
executable.start(initial_parameters(bundle, 3, 0), Objective("sgd", 0.01))
images = np.random.default_rng(0).normal(size=(count, 3, 16, 16)).astype(np.float32)
for _ in range(4):
    executable.forward(0, {"x": images}, np.zeros(count, np.int64))
    saved = executable._pending[1]
    print(sum(value.numpy().nbytes for name, value in saved.items() if name.startswith("saved/")))
    del saved
    executable.update()
    print(peak_bytes())
"""


def test_a_step_reuses_the_memory_of_the_last(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "m.pbc", "whole").path
    run = subprocess.run(
        [sys.executable, "-c", PEAKS, str(path)], capture_output=True, check=True, text=True
    )
    saved, first, *_, last = (int(line) for line in run.stdout.split())
    assert saved > 40 * 10**6
    assert last - first < saved / 4


# ---- loading -------------------------------------------------------------------------------


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/graph.onnx"))


def test_a_level_is_loaded_when_it_is_first_used(tmp_path: Path, cache: Path) -> None:
    executable = load(tmp_path)
    assert not cache.exists()
    executable.prefix(0, images())
    assert len(entries(cache)) == 1
    executable.prefix(1, images())
    executable.prefix(1, images())
    assert len(entries(cache)) == 2


def test_graphs_of_the_same_content_share_a_session(tmp_path: Path) -> None:
    executable = OnnxRuntimeEngine().load(tiny_onnx.write(tmp_path / "m.pbc"), threads=1)
    executable.start(theta(), Objective())
    for level in range(3):
        executable.forward(level, executable.prefix(level, images()), LABELS)
        executable.update()
    # Three prefixes; one step for all, since the probe's bodies are the same.
    assert len(executable._loader._contents) == 5


def test_a_level_is_verified_when_it_is_first_made(tmp_path: Path, cache: Path) -> None:
    folder = tiny_onnx.write(tmp_path / "m", as_folder=True).path
    opened(Bundle.open(folder)).prefix(0, images())
    for level in (0, 1):
        weights = folder / tiny_onnx.WEIGHTS.format(level)
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    # Made before from the bytes that the manifest names: nothing is read from the bundle.
    opened(Bundle.open(folder)).prefix(0, images())
    with pytest.raises(PbcError, match=r"damaged: the sha256 of onnx/level-1"):
        opened(Bundle.open(folder)).prefix(1, images())
    assert len(entries(cache)) == 1


def test_an_entry_that_cannot_be_loaded_is_made_again(tmp_path: Path, cache: Path) -> None:
    expected = load(tmp_path).prefix(0, images())["flat"]
    (graph,) = entries(cache)
    good = graph.read_bytes()
    graph.write_bytes(good[:100])
    assert load(tmp_path).prefix(0, images())["flat"].tobytes() == expected.tobytes()
    assert graph.read_bytes() == good
    # Whole by its complete marker, but nothing that onnxruntime can read.
    key = graph.parent.name
    store = Artifacts(cache)
    store.discard(key)

    def nonsense(folder: Path) -> None:
        (folder / "graph.onnx").write_bytes(b"nonsense")

    store.get(key, nonsense)
    assert load(tmp_path).prefix(0, images())["flat"].tobytes() == expected.tobytes()
    assert graph.read_bytes() == good


def test_a_folder_that_takes_no_entries_costs_time_and_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(tmp_path).prefix(1, images())["flat"]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PBC_CACHE", str(tmp_path / "file"))
    executable = load(tmp_path)
    executable.prefix(0, images())
    assert executable.prefix(1, images())["flat"].tobytes() == expected.tobytes()
    (record,) = caplog.records
    assert record.message.startswith("optimised graphs are not kept: [Errno")
    # And there is no other room either.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(PbcError, match=r"no folder has room for the weights of .*TMPDIR can name"):
        load(tmp_path).prefix(0, images())


def test_a_disk_that_is_full_while_an_entry_is_made(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(tmp_path).prefix(0, images())["flat"]

    def full(path: Path, data: bytes) -> int:
        if cache in path.parents:
            raise OSError(28, "No space left on device")
        with path.open("wb") as file:
            return file.write(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    loaded = opened(Bundle.open(tmp_path / "m.pbc"))
    assert loaded.prefix(0, images())["flat"].tobytes() == expected.tobytes()
    assert not caplog.records
    loaded.prefix(1, images())
    (record,) = caplog.records
    assert record.message.endswith("No space left on device")
    assert len(entries(cache)) == 1
    assert len(list(cache.iterdir())) == 2  # an entry, and the secret of its seal


@pytest.mark.parametrize("name", ["prefix-0", "body-0"])
def test_a_file_that_is_no_graph(tmp_path: Path, name: str) -> None:
    executable = changed(tmp_path, {f"onnx/{name}.onnx": b"nonsense"})
    executable.start(theta(), Objective())
    graph = name.replace("-", "/")
    words = rf"graph {graph} of .*c\.pbc cannot be loaded: it is no ONNX model, or cut short$"
    with pytest.raises(PbcError, match=words):
        executable.logits(0, executable.prefix(0, images()))


def test_an_operator_that_onnxruntime_does_not_have(tmp_path: Path) -> None:
    graph = tiny_onnx.Graph()
    graph.takes("flat", ["b", 8])
    graph.nodes.append(helper.make_node("Teleport", ["flat"], ["there"], domain="acme"))
    graph.gives("logits", "there", ["b", 8])
    model = onnx.load_from_string(graph.model())
    model.opset_import.add(domain="acme", version=1)
    executable = changed(tmp_path, {"onnx/body-0.onnx": model.SerializeToString()})
    words = r"graph body/0 of .*c\.pbc cannot be loaded: it has an operator of 'acme'$"
    with pytest.raises(PbcError, match=words):
        executable.logits(0, {"flat": np.zeros((1, 8), np.float32)})


def test_weights_that_are_too_short(tmp_path: Path) -> None:
    executable = changed(tmp_path, {tiny_onnx.WEIGHTS.format(0): b"\0" * 16})
    with pytest.raises(PbcError, match=r"cannot load onnx/prefix-0\.onnx: "):
        executable.prefix(0, images())


def test_an_input_that_this_pbc_does_not_know(tmp_path: Path) -> None:
    graph = tiny_onnx.Graph()
    graph.gives("logits", graph.takes("temperature", []), [])
    executable = changed(tmp_path, {"onnx/body-0.onnx": graph.model()})
    with pytest.raises(PbcError, match="reads 'temperature', which this pbc does not know"):
        executable.logits(0, {"flat": np.zeros((1, 8), np.float32)})


@pytest.mark.parametrize("without", ["forward/", "update/", "update/0/adamw"])
def test_a_bundle_that_cannot_train(tmp_path: Path, without: str) -> None:
    executable = changed(tmp_path, {}, without=without)
    executable.start(theta(), Objective("adamw"))
    features = executable.prefix(0, images())
    executable.logits(0, features)
    with pytest.raises(PbcError, match=f"has no graph {without}.*compile the model again"):
        executable.forward(0, features, LABELS)


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PbcError, match=r"has no graph policy$"):
        load(tmp_path, policy=False).policy(images())


def test_execution_providers_are_those_of_the_target_that_are_here(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, files = tiny_onnx.contents()
    wanted = "CUDAExecutionProvider,AzureExecutionProvider, CPUExecutionProvider"
    manifest["target"] = {"name": "board", "tags": {"onnxruntime_providers": wanted}}
    source = bundle.write(tmp_path / "m.pbc", manifest, files)
    available = ["AzureExecutionProvider", "CPUExecutionProvider"]
    if available != onnxruntime.get_available_providers():
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available[1:])
    assert providers(source) == tuple(
        name for name in available if name in onnxruntime.get_available_providers()
    )
    expected = load(tmp_path / "cpu").prefix(0, images())["flat"]
    made = len(entries(cache))
    assert_close(opened(source).prefix(0, images())["flat"], expected)
    assert len(entries(cache)) == made  # what other providers make is not kept


def test_waiting_threads_sleep() -> None:
    options = session_options(2)
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    for pool in ("intra", "inter"):
        key = f"session.{pool}_op.allow_spinning"
        assert options.get_session_config_entry(key) == "0"
    assert session_options(None).intra_op_num_threads >= 1


def test_the_version_names_what_decides_the_last_bit() -> None:
    version = OnnxRuntimeEngine().version()
    assert onnxruntime.__version__ in version
    assert cpu_identity() in version
    assert "\n" not in version


def test_the_engine_imports_no_compiler(assets: Path, cache: Path) -> None:
    code = DIGEST + "\nassert not {'torch', 'onnx', 'sympy', 'torch_pruning'} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code, str(assets / "probe.onnx.pbc")],
        env={**os.environ, "PBC_CACHE": str(cache)},
        capture_output=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr.decode()


def test_repacked_weights_lie_where_kernels_can_read_them(tmp_path: Path) -> None:
    """Of two odd tensors, the first pushes the second's repacked form to an odd address."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(25, 2401)).astype(np.float32) for name in ("u", "w")}
    nodes = [onnx.helper.make_node("MatMul", ["x", name], [f"{name}_out"]) for name in weights]
    graph = onnx.helper.make_graph(
        nodes,
        "products",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 25])],
        [
            onnx.helper.make_tensor_value_info(f"{n}_out", onnx.TensorProto.FLOAT, ["b", 2401])
            for n in weights
        ],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m")
    bundle = tiny_onnx.write(tmp_path / "tiny.pbc")
    loader = loader_module.GraphLoader(bundle, 1)
    loader._unpack = lambda name, folder: tmp_path / "m"  # type: ignore[method-assign]
    made = tmp_path / "made"
    made.mkdir()
    loader._open(tmp_path / "m", loader._saving("products", made, prepacked=True))
    if not loader_module._misaligned((made / "graph.onnx").read_bytes()):
        pytest.skip("this onnxruntime aligns what it saves")
    loader._make("products", made)
    assert not loader_module._misaligned((made / "graph.onnx").read_bytes())
    batch = random.normal(size=(8, 25)).astype(np.float32)
    for found, weight in zip(
        loader._optimised("products", made).run(None, {"x": batch}), weights.values(), strict=True
    ):
        np.testing.assert_allclose(found, batch @ weight, rtol=1e-4, atol=1e-4)
