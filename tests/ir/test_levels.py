from __future__ import annotations

import pytest
import torch
from networks import ConvNet, pruned, split

from pbc.bundle.graph_name import BODY, FORWARD, POLICY, PREFIX, GraphName, update
from pbc.ir.levels import ladder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (POLICY, "policy"),
        (PREFIX.at(0), "prefix/0"),
        (FORWARD.at(12), "forward/12"),
        (update("adamw").at(3), "update/3/adamw"),
    ],
)
def test_a_graph_s_name_as_a_bundle_has_it(name: GraphName, text: str) -> None:
    assert str(name) == f"{name}" == text
    assert name.role.level is None


def test_graphs_are_in_the_order_of_levels_and_names() -> None:
    names = [str(name) for name in pruned(ConvNet).graphs]
    assert names == ["body/0", "prefix/0", "body/1", "prefix/1", "body/2", "prefix/2"]


def test_a_level_without_a_prefix_receives_the_images() -> None:
    images = torch.randn(2, 3, 16, 16)
    whole = split(ConvNet, "full").levels[0]
    assert whole.prefix is None
    assert list(whole.graphs) == [BODY]
    assert whole.features(images) == {"x": images}
    assert list(split(ConvNet).levels[0].features(images)) == ["feature_0"]


def test_a_fused_level_shares_nothing_that_changed() -> None:
    level = pruned(ConvNet).levels[1]
    assert level.prefix is not None
    text = level.prefix.code
    assert "batch_norm" not in str([g.code for g in level.fused().graphs.values()])
    assert level.prefix.code == text


def test_a_ladder_has_what_a_device_knows_of_levels() -> None:
    program = pruned(ConvNet)
    rows = ladder(program.levels, program.cost_model).to_json()
    assert [row["level"] for row in rows] == [0, 1, 2]
    assert [row["status"] for row in rows] == ["original", "unaligned", "unaligned"]
    assert rows[2]["macs"] == program.levels[2].macs < rows[1]["macs"] < rows[0]["macs"]
