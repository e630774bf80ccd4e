from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pbc.util.source import literals, protocol_members, summary

SOURCE = '''
"""A module that cannot be imported."""
import a_module_that_does_not_exist
from typing import ClassVar, Protocol


class Plain:
    """Say what it is.

    And more.
    """

    stage: ClassVar[str] = "prune"
    after = before = ("align",)
    option: int


class Computed:
    stage = "pr" + "une"


class Inheriting(Plain):
    default = False


def function():
    """Do something."""


class Asked(Protocol):
    stage: ClassVar[str]
    optional: ClassVar[str] = "default"
    option: int

    def __init__(self, setting): ...

    def __call__(self, program): ...

    def run(self): ...
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "source_example.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    return "source_example"


def test_a_summary_is_the_first_line_of_a_docstring(module: str) -> None:
    assert summary(module, "Plain") == "Say what it is."
    assert summary(module, "function") == "Do something."
    assert summary(module, "Computed") == ""
    assert summary(module, "value") == "A module that cannot be imported."
    assert summary("no_such_module", "Plain") == ""
    assert summary("sys", "Plain") == ""
    assert module not in sys.modules


def test_attributes_are_read_where_the_source_spells_them_out(module: str) -> None:
    asked = ("stage", "after", "before", "default", "option")
    assert literals(module, "Plain", asked) == {
        "stage": "prune",
        "after": ("align",),
        "before": ("align",),
    }
    assert literals(module, "Computed", asked) is None
    assert literals(module, "Computed", ("default",)) == {}
    assert literals(module, "Inheriting", asked) is None
    assert literals(module, "function", asked) is None
    assert literals("no_such_module", "Plain", asked) is None


def test_a_protocol_asks_for_what_it_declares_without_a_default(module: str) -> None:
    assert protocol_members(module, "Asked") == (["stage"], ["__call__", "run"])
    assert protocol_members(module, "Plain") == ([], [])
    assert protocol_members("no_such_module", "Asked") == ([], [])
