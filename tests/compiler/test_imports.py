"""A device has numpy and one engine: what runs there must import nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import light
import pytest
from guarded import ALLOWED, FORBIDDEN, imported, third_party

DEVICE_MODULES = [
    "pbc",
    "pbc.bundle",
    "pbc.cli",
    "pbc.cli.targets",
    "pbc.cli.plugins",
    "pbc.cli.doctor",
    "pbc.cli.train",
    "pbc.data",
    "pbc.errors",
    "pbc.bundle.ladder",
    "pbc.callbacks",
    "pbc.model",
    "pbc.plugins",
    "pbc.runtime",
    "pbc.target",
]


@pytest.mark.parametrize("module", DEVICE_MODULES)
def test_what_runs_on_a_device_is_light(module: str) -> None:
    names = imported(f"import {module}")
    assert third_party(names) <= ALLOWED | {"pbc"}


def test_every_runtime_module_but_the_engines_is_light(root: Path) -> None:
    runtime = root / "pbc" / "runtime"
    engines = runtime / "engines"
    modules = [
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted(runtime.rglob("*.py"))
        if engines not in file.parents or file.name == "__init__.py"
    ]
    assert modules
    names = imported("import " + ", ".join(modules))
    assert third_party(names) <= ALLOWED | {"pbc"}


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["targets"],
        ["passes"],
        ["strategies"],
        ["targets", "--json"],
        ["train", "--help"],
        ["eval", "--help"],
        ["predict", "--help"],
        ["inspect", "--help"],
        ["audit", "--help"],
        ["bench", "--help"],
        ["forget", "--help"],
        ["export", "--help"],
        ["deploy", "--help"],
        ["pack", "--help"],
    ],
)
def test_commands_that_need_no_engine_load_none(args: list[str]) -> None:
    names = imported("from pbc.cli import main; main()", *args)
    assert third_party(names) <= ALLOWED | {"pbc"}


def test_pbcs_own_rivals_and_the_match_are_light() -> None:
    modules = (
        "cells", "compare", "energy", "evaluator", "match", "report.charts", "report.html",
        "rivals.own", "sweep",
    )  # fmt: skip
    names = imported("import " + ", ".join(f"pbc.bench.{module}" for module in modules))
    assert third_party(names) <= ALLOWED | {"pbc"}


# With onnxruntime's own dependencies, where it imports them, and what numpy.random is built with.
WITH_ONNXRUNTIME = ALLOWED | {"pbc", "onnxruntime", "flatbuffers", "google", "packaging"}
WITH_ONNXRUNTIME |= {"cython_runtime"}


def test_onnxruntime_bundles_train_without_the_compiler(examples: Path, tmp_path: Path) -> None:
    bundle = light.compiled(tmp_path / "net", examples)
    train, test = examples / "photos" / "train", examples / "photos" / "test"
    photo = sorted(test.rglob("*.jpg"))[0]
    mine = tmp_path / "mine"
    for args in (
        ["inspect", bundle],
        ["train", bundle, train, "-o", mine, "--val", test, "--epochs", "1"],
        ["eval", mine, test, "--level", "1"],
        ["predict", mine, photo],
        ["export", mine, "-o", tmp_path / "mine.onnx"],
        ["bench", bundle, train, "--quick", "--rivals", "piebridge,pbc-nocache,pbc",
         "--html", tmp_path / "r.html"],
        ["forget", mine, "--all"],
    ):  # fmt: skip
        names = imported(
            "from pbc.cli import main; main()",
            *(str(arg) for arg in args),
            forbidden=FORBIDDEN - {"onnxruntime"} | light.HEAVY,
        )
        assert third_party(names) <= WITH_ONNXRUNTIME, args


def test_importing_pbc_costs_nothing() -> None:
    assert third_party(imported("import pbc")) == {"pbc"}


@pytest.mark.parametrize("folder", ["passes", "targets"])
def test_a_second_copy_of_the_plugins_is_refused(root: Path, folder: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import {folder}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"ImportError: import pbc.{folder}, not {folder}" in result.stderr


def test_the_compiler_is_loaded_on_first_use() -> None:
    import pbc
    import pbc.compiler

    assert pbc.compile is pbc.compiler.compile
    with pytest.raises(AttributeError, match="module 'pbc' has no attribute 'complie'"):
        getattr(pbc, "complie")  # noqa: B009
