"""`pbc doctor`, on this very installation and on one that lacks things."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
from click.testing import CliRunner
from guarded import ALLOWED, imported, third_party

from pbc import plugins
from pbc.cli import main
from pbc.util.extras import install

BOARD = """
from pbc.target import Target

board = Target("acme-one", "Acme One", "aarch64", "acme", ("acme",))
"""


def told() -> dict[str, Any]:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def by_name(checks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in checks}


def test_what_is_installed_works() -> None:
    found = told()
    for group in ("engines", "lowerings"):
        assert list(by_name(found[group])) == list(plugins.entries(f"pbc.{group}"))
        assert all(check["works"] for check in found[group]), found[group]
    assert all(check["works"] for check in found["targets"])
    assert by_name(found["targets"])["jetson-nano"]["detail"] == "tvm, onnxruntime"
    extra = by_name(found["extras"])["device"]
    assert extra["detail"] == f"onnxruntime {metadata.version('onnxruntime')}"
    assert "dev" not in by_name(found["extras"])


def test_what_is_missing_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, install_plugin: Callable[..., None]
) -> None:
    points = (
        "[pbc.engines]\nacme = acme_engine:Engine\n[pbc.targets]\nacme-one = acme_board:board\n"
    )
    install_plugin("acme", points, "import a_package_that_does_not_exist\n", module="acme_engine")
    install_plugin("bolt", "", BOARD, module="acme_board")
    real = metadata.version

    def version(name: str) -> str:
        if name == "timm":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("pbc.doctor.metadata.version", version)
    monkeypatch.setattr("pbc.doctor.shutil.which", lambda name: None)
    found = told()
    assert by_name(found["extras"])["models"] == {
        "name": "models",
        "works": False,
        "detail": "timm not installed",
        "remedy": install("models"),
    }
    assert not by_name(found["engines"])["acme"]["works"]
    assert "a_package_that_does_not_exist" in by_name(found["engines"])["acme"]["detail"]
    target = by_name(found["targets"])["acme-one"]
    assert target["detail"] == "none of acme can be compiled for here"
    text = CliRunner().invoke(main, ["doctor"]).stdout
    assert "  not acme-one: none of acme can be compiled for here" in text
    assert f"  {install('models')}" in text
    assert "  apt install openssh-client" in text


def test_it_runs_where_no_engine_is_installed() -> None:
    names = imported(
        "from pbc.doctor import diagnose\n"
        "found = diagnose()\n"
        "assert not any(check.works for check in [*found.engines, *found.lowerings])\n"
        "assert not any(check.works for check in found.targets)"
    )
    assert third_party(names) <= ALLOWED | {"pbc"}
