"""An exported model is one that other programs run, with the very same predictions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.numpy
import tiny
import tiny_onnx
from onnx import numpy_helper

from pbc import __version__, bundle
from pbc.bundle import Bundle
from pbc.cli import main
from pbc.data import ImageFolder, read_image
from pbc.errors import PbcError
from pbc.runtime.engines.onnxruntime import wire as onnx_wire
from pbc.runtime.options import TrainOptions
from pbc.runtime.output import export as export_module
from pbc.runtime.output.export import export
from pbc.runtime.output.personal import Personal
from pbc.runtime.runtime import Runtime
from pbc.util.sizes import size_text

KINDS = ("probe", "whole")


def train(source: Bundle, root: Path, out: Path) -> Path:
    runtime = Runtime.open(source.path)
    samples = ImageFolder.open(root / "photos", runtime.spec)
    options = TrainOptions(epochs=2, learning_rate=0.1, costs=root / "costs.json")
    runtime.fit(samples, options, out)
    return out


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Personal models of each kind and each engine; read only."""
    root = tmp_path_factory.mktemp("assets")
    tiny.photos(root / "photos", 6)
    tiny.costs(root / "costs.json")
    for kind in KINDS:
        train(tiny_onnx.write(root / f"{kind}.pbc", kind), root, root / kind)
    train(tiny.write(root / "torch.pbc"), root, root / "torch")
    return root


@pytest.fixture
def run(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., click.testing.Result]:
    """Run `pbc export` in a fresh folder, with @ standing for the assets."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str, fails: int = 0) -> click.testing.Result:
        words = ["export", *(word.replace("@", f"{assets}/") for word in args)]
        result = click.testing.CliRunner().invoke(main, words)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == fails, result.output
        if fails:
            assert result.stderr.count("\n") == 1, result.stderr
        return result

    return call


Run = Callable[..., click.testing.Result]


def prepared(path: Path, properties: dict[str, str]) -> np.ndarray:
    """What a program that knows the file alone makes of a photo."""
    facts = json.loads(properties["pbc.input"])
    spec = tiny.SPEC.from_json(facts)
    pixels = read_image(path, spec)
    mean, std = (np.array(facts[key], np.float32) for key in ("mean", "std"))
    image: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 2])
def test_stock_onnxruntime_predicts_what_the_personal_model_does(
    assets: Path, tmp_path: Path, kind: str, level: int
) -> None:
    file = tmp_path / "mine.onnx"
    export(assets / kind, file, level=level)
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    classes = json.loads(properties["pbc.classes"])
    personal = Personal.open(assets / kind, threads=1)
    for photo in sorted((assets / "photos").rglob("*.png"))[::5]:
        image = prepared(photo, properties)
        shares, logits = session.run(["probabilities", "logits"], {"x": image})
        assert logits.shape == (1, 3)
        best = personal.predict(read_image(photo, personal.spec), level=level)
        assert best[0][0] == classes[int(shares[0].argmax())]
        for name, share in best:
            assert share == pytest.approx(float(shares[0][classes.index(name)]), abs=1e-5)
    batch = np.repeat(image, 5, axis=0)
    assert session.run(["logits"], {"x": batch})[0].shape == (5, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_a_valid_model_on_its_own(assets: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "mine.onnx"
    export(assets / kind, file)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.name for entry in model.graph.input] == ["x"]
    assert [entry.name for entry in model.graph.output] == ["logits", "probabilities"]
    trained = safetensors.numpy.load_file(assets / kind / "trainable.safetensors")
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    frozen = tiny_onnx.tensors(Bundle.open(assets / f"{kind}.pbc"), 0)
    for name, value in stored.items():
        np.testing.assert_array_equal(value, {**frozen, **trained}.get(name, value))
    assert set(trained) | {"conv.weight"} <= set(stored)


def test_what_else_a_program_needs_is_in_the_metadata(assets: Path, tmp_path: Path) -> None:
    export(assets / "probe", tmp_path / "mine.onnx", level=1)
    model = onnx.load(tmp_path / "mine.onnx")
    assert {entry.key: entry.value for entry in model.metadata_props} == {
        "pbc.version": __version__,
        "pbc.model": "tiny",
        "pbc.bundle": Bundle.open(assets / "probe.pbc").digest,
        "pbc.classes": '["blue", "green", "red"]',
        "pbc.input": json.dumps(tiny.SPEC.to_json(), sort_keys=True),
        "pbc.level": "1",
    }


def test_the_trained_parameters_alone(assets: Path, run: Run) -> None:
    for name in ("probe", "torch"):
        run(f"@{name}", "-o", "mine.safetensors")
        trained = safetensors.numpy.load_file(assets / name / "trainable.safetensors")
        stored = safetensors.numpy.load_file("mine.safetensors")
        assert stored.keys() == trained.keys()
        for key, value in stored.items():
            np.testing.assert_array_equal(value, trained[key])
        with safetensors.safe_open("mine.safetensors", "numpy") as file:
            assert json.loads(file.metadata()["pbc.classes"]) == ["blue", "green", "red"]


def test_the_command(run: Run, tmp_path: Path) -> None:
    result = run("@probe")
    size = (tmp_path / "probe.onnx").stat().st_size
    assert result.stdout == f"wrote probe.onnx ({size_text(size)})\n"
    first = (tmp_path / "probe.onnx").read_bytes()
    run("@probe", "-o", "probe.onnx", "--level", "1")
    assert (tmp_path / "probe.onnx").read_bytes() != first
    assert (tmp_path / "probe.onnx").stat().st_mode & 0o777 == 0o600
    run("@probe", "-o", "probe.onnx", "--level", "0")
    assert (tmp_path / "probe.onnx").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["probe.onnx"]


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["@probe", "-o", "mine.pt"], "from 'mine.pt'; end it in .onnx or .safetensors", 2),
        (["@probe", "-o", "mine"], "from 'mine'; end it in .onnx or .safetensors", 2),
        (["@probe", "-o", "a.safetensors", "--level", "1"], "--level is for .onnx files", 2),
        (["@probe", "--level", "3"], "no level 3; this model has levels 0 to 2", 2),
        (["@probe", "--level", "-1"], "no level -1; this model has levels 0 to 2", 2),
        (["@torch"], "compiled for the pytorch engine and holds no ONNX graphs; compile the", 1),
        (["@photos"], "holds no personal model; pbc train makes one", 1),
        (["@probe", "-o", "@costs.json/mine.onnx"], "cannot write", 1),
    ],
)
def test_what_cannot_be_exported(
    run: Run, tmp_path: Path, words: list[str], message: str, code: int
) -> None:
    result = run(*words, fails=code)
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_network_that_no_file_holds(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.onnx"
    export(assets / "probe", file)
    before = file.read_bytes()
    monkeypatch.setattr(export_module, "_LARGEST_BYTES", len(before) - 500)
    with pytest.raises(PbcError, match="larger than the 2 GiB that an ONNX file holds; --level"):
        export(assets / "probe", file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine.onnx"]


def test_a_tensor_that_is_not_there(assets: Path, tmp_path: Path) -> None:
    manifest, files = tiny_onnx.contents()
    manifest["export"]["0"]["tensors"]["gone"] = f"{tiny_onnx.WEIGHTS.format(0)}#gone"
    source = bundle.write(tmp_path / "m.pbc", manifest, files)
    out = train(source, assets, tmp_path / "out")
    with pytest.raises(PbcError, match=r"onnx/level-0\.safetensors has no tensor 'gone' to export"):
        export(out, tmp_path / "mine.onnx")
    assert not (tmp_path / "mine.onnx").exists()


def test_exporting_needs_no_engine(assets: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pbc.runtime.output.export import export; export(*sys.argv[1:]);"
        "found = {'torch', 'onnx', 'onnxruntime', 'sympy'} & set(sys.modules); assert not found"
    )
    words = [sys.executable, "-c", code, str(assets / "probe"), str(tmp_path / "mine.onnx")]
    subprocess.run(words, check=True)
    assert (tmp_path / "mine.onnx").exists()


# ---- the format ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(onnx_wire.DATA_TYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 300), (1, 2, 3, 4)])
def test_initializers_are_those_of_onnx(dtype: str, shape: tuple[int, ...]) -> None:
    value = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    appended = onnx_wire.initializer("θ/a.b", value)
    (tensor,) = onnx.load_from_string(appended).graph.initializer
    assert tensor.SerializeToString() == numpy_helper.from_array(value, "θ/a.b").SerializeToString()


def test_any_memory_order_is_stored_in_rows() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4).T[::-1]
    (tensor,) = onnx.load_from_string(onnx_wire.initializer("t", value)).graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), value)


def test_what_is_appended_joins_what_was_there() -> None:
    graph = tiny_onnx.Graph()
    graph.gives("y", graph.op("Add", graph.takes("x", [2]), graph.constant(1.0)), [2])
    base = graph.model()
    whole = base + onnx_wire.metadata({"a": "1", "ß": "2" * 300})
    whole += onnx_wire.initializer("t", np.zeros(2, np.float32)) + onnx_wire.metadata({})
    before, after = onnx.load_from_string(base), onnx.load_from_string(whole)
    assert [t.name for t in after.graph.initializer] == ["constant_0", "t"]
    found: dict[str, Any] = {entry.key: entry.value for entry in after.metadata_props}
    assert found == {"a": "1", "ß": "2" * 300}
    del after.metadata_props[:], after.graph.initializer[1:]
    assert after == before
