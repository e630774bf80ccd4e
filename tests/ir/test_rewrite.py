from __future__ import annotations

import torch
from networks import ConvNet, captured, split

from pbc.ir.graph import (
    get_tensor,
    graph_inputs,
    graph_outputs,
    output_nodes,
    placeholders,
    tensor_names,
)
from pbc.ir.rewrite import (
    ancestors,
    copy_graph,
    cut_at,
    drop_unused,
    extract,
    fused,
    replace_tensor,
    tensors_to_inputs,
)
from pbc.testing import graph_of


def test_a_cut_computes_no_more_than_it_returns() -> None:
    graph = graph_of(split(ConvNet), "prefix/0")
    before = copy_graph(graph).code
    cut = cut_at(graph, ["relu", "conv2d_1"])
    assert graph_outputs(cut) == ["relu", "conv2d_1"]
    held = {name for name, _ in (*cut.named_parameters(), *cut.named_buffers())}
    assert held == set(tensor_names(cut))
    assert "bn2.weight" not in held
    assert graph.code == before
    images = torch.randn(2, 3, 16, 16)
    first, second = cut(images)
    assert (first.shape[1], second.shape[1]) == (16, 24)
    # An unread parameter is no input any more; features stay.
    body = graph_of(split(ConvNet, "norm"), "body/0")
    assert graph_inputs(cut_at(body, ["relu"])) == ["feature_0", "bn1.weight", "bn1.bias"]


def test_a_replaced_tensor_stays_what_it_was_for_others() -> None:
    graph = graph_of(split(ConvNet), "prefix/0")
    other = copy_graph(graph)
    replace_tensor(other, "conv1.weight", torch.zeros(16, 3, 3, 3))
    assert float(get_tensor(other, "conv1.weight").abs().sum()) == 0
    assert isinstance(get_tensor(other, "conv1.weight"), torch.nn.Parameter)
    assert float(get_tensor(graph, "conv1.weight").detach().abs().sum()) > 0


def test_what_is_extracted_takes_its_inputs_by_their_names() -> None:
    model = captured(ConvNet).program.copy().model
    assert model is not None
    values = tensors_to_inputs(model, {"fc.weight", "fc.bias"})
    assert list(values) == ["fc.weight", "fc.bias"]
    by_name = {node.name: node for node in model.graph.nodes}
    start, end = by_name["relu"], by_name["relu_1"]
    inside = ancestors([end]) - ancestors([start])
    part = extract(model, [start], inside, [end])
    assert [node.name for node in placeholders(part)] == ["relu"]
    images = torch.randn(3, 3, 16, 16)
    (whole,) = cut_at(model, ["relu"])(images)
    assert torch.equal(part(whole)[0], cut_at(model, ["relu_1"])(images)[0])


def test_fusing_keeps_the_names_of_layers_and_of_outputs() -> None:
    graph = graph_of(split(ConvNet), "prefix/0")
    with_norms = cut_at(graph, ["batch_norm_1"])
    without = fused(with_norms)
    assert [node.name for node in output_nodes(without)] == ["conv2d_1"]
    assert graph_outputs(without) == ["batch_norm_1"]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(without(images), with_norms(images), rtol=1e-4, atol=1e-5)
    left = [name for name, _ in (*without.named_parameters(), *without.named_buffers())]
    drop_unused(without)
    assert left == [name for name, _ in (*without.named_parameters(), *without.named_buffers())]
