from __future__ import annotations

import pytest

from pbc.errors import PbcError, UsageError, nearest, suggest


def test_suggest_names_what_was_asked_the_nearest_and_all() -> None:
    assert suggest("pass", "prune-dim", ["prune-dims", "align"]) == (
        "no pass named 'prune-dim'; did you mean 'prune-dims'? (available: align, prune-dims)"
    )


def test_suggest_does_not_guess_without_a_likeness() -> None:
    assert suggest("engine", "quux", ["pytorch"]) == "no engine named 'quux' (available: pytorch)"


def test_suggest_says_when_nothing_is_there() -> None:
    assert suggest("engine", "tvm", []) == "no engine named 'tvm' (available: none)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("prun", "prune-dims"), ("Jetson-TX2", "jetson-tx2"), ("jetsontx2", "jetson-tx2"), ("", None)],
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["prune-dims", "jetson-tx2", "align"]) == expected


def test_exit_codes() -> None:
    assert PbcError.exit_code == 1
    assert UsageError.exit_code == 2
    assert issubclass(UsageError, PbcError)
