"""A graph's name is text in a bundle, and a value everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from pbc.bundle.graph_name import BODY, FORWARD, POLICY, PREFIX, GraphName, update
from pbc.errors import PbcError

NAMES = {
    "policy": POLICY,
    "prefix/0": PREFIX.at(0),
    "body/12": BODY.at(12),
    "forward/3": FORWARD.at(3),
    "update/2/adam": update("adam").at(2),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_are_read_as_they_are_written(text: str) -> None:
    name = GraphName.parse(text)
    assert name == NAMES[text]
    assert str(name) == text
    assert name.trains == text.startswith(("forward", "update"))


def test_the_role_of_a_graph_is_its_name_at_no_level() -> None:
    assert GraphName.parse("update/2/adam").role == update("adam")
    assert str(PREFIX.at(1).role) == "prefix"


def test_a_bundle_knows_its_graphs_by_name(tmp_path: Path) -> None:
    probe, bodies, whole = (
        tiny.write(tmp_path / f"{kind}.pbc", kind) for kind in ("probe", "bodies", "whole")
    )
    assert [bundle.has_prefix for bundle in (probe, bodies, whole)] == [True, True, False]
    assert [bundle.shares_body for bundle in (probe, bodies, whole)] == [True, False, False]
    assert probe.graph_file(PREFIX.at(1)) == probe.manifest["graphs"]["prefix/1"]
    assert probe.weight_files(PREFIX.at(1)) is None
    with pytest.raises(PbcError, match=r"whole\.pbc has no graph prefix/0"):
        whole.graph_file(PREFIX.at(0))
