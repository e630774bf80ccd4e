"""LoRA: what it corrects, how it starts, and that an exported model has no branches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, ResidualNet, captured, settled, split
from torch import Tensor, nn

from pbc import bundle, compiler
from pbc.errors import PbcError
from pbc.frontend.lora import LowRankWeight
from pbc.ir.graph import op_name, parameter_names
from pbc.ir.program import Program
from pbc.ir.rewrite import in_sequence
from pbc.lower.merge_low_rank import merge_low_rank
from pbc.passes.derive_train_step import DeriveTrainStep
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.lower import Lower
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.runtime.output.export import _write_onnx
from pbc.testing import (
    assert_gradients,
    eager_gradients,
    gradients,
    make_program,
    run_passes,
    with_request,
)

CORRECTED: dict[Kind, set[str]] = {
    # Its 3x3 convolutions are not.
    ResidualNet: {f"blocks.{number}.down" for number in range(3)},
    # Not its patches, its MLP and its head.
    AttentionNet: {"qkv", "proj"},
}


def moved(program: Program) -> dict[str, Tensor]:
    """θ with branches that do something."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in program.parameters.items()
    }


def products(graph: torch.fx.GraphModule) -> int:
    names = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    return sum(name in ("aten.conv2d.default", "aten.linear.default") for name in names)


@pytest.mark.parametrize("kind", CORRECTED)
def test_it_corrects_projections_and_pointwise_convolutions(kind: Kind) -> None:
    module, program = captured(kind, "lora:4")
    layers = {name.partition(".lora.")[0] for name in program.trainable if ".lora." in name}
    assert layers == CORRECTED[kind]
    head = {name for name in program.trainable if ".lora." not in name}
    assert head == set(program.network.head.parameters)
    untouched = settled(kind())
    with torch.no_grad():
        assert torch.equal(module(program.network.example), untouched(program.network.example))
    program = split(kind, "lora:4")
    assert_gradients(gradients(program), eager_gradients(module, program), tolerance=2e-3)


@pytest.mark.parametrize("kind", CORRECTED)
def test_branches_are_merged_into_their_layers(kind: Kind) -> None:
    program = split(kind, "lora:4")
    level = program.levels[0]
    assert level.prefix is not None  # the first layer is of it, its branch is of the body
    whole = in_sequence(level.prefix, level.body)
    merged = merge_low_rank(whole)
    assert products(merged) == products(whole) - 2 * len(CORRECTED[kind])
    theta = moved(program)
    (got,) = merged(program.network.example, *[theta[name] for name in parameter_names(merged)])
    expected = level.logits(program.network.example, theta)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_branch_is_left_as_it_is() -> None:
    body = split(ConvNet, "full").levels[0].body
    assert merge_low_rank(body) is body


def test_an_exported_model_has_no_branches(tmp_path: Path) -> None:
    program = with_request(split(ResidualNet, "lora:4"), engine="onnxruntime")
    program = run_passes(program, FoldBatchNorm(), Lower())
    made = bundle.write(tmp_path / "lora.pbc", *compiler.package(program))
    theta = moved(program)
    arrays = {name: value.detach().numpy() for name, value in theta.items()}
    classes = [str(number) for number in range(len(theta["fc.bias"]))]
    _write_onnx(tmp_path / "mine.onnx", made, {"classes": classes}, arrays, 0)
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "mine.onnx")).graph.node]
    assert kinds.count("Conv") == 1 + 3 * 2
    session = onnxruntime.InferenceSession(str(tmp_path / "mine.onnx"))
    (logits,) = session.run(["logits"], {"x": program.network.example.numpy()})
    level = program.levels[0]
    np.testing.assert_allclose(
        logits, level.logits(program.network.example, theta).detach(), rtol=1e-4, atol=1e-5
    )


def test_a_rank_is_no_larger_than_a_layer() -> None:
    shape = captured(ResidualNet, "lora:64").program.model.get_parameter  # type: ignore[union-attr]
    assert shape("blocks.0.down.lora.up.weight").shape == (32, 16, 1, 1)


def test_a_network_with_nothing_to_correct() -> None:
    with pytest.raises(PbcError, match="ConvNet has no attention projection and no 1x1 conv"):
        make_program(ConvNet(), "lora:4")


class TorchAttention(nn.Module):
    """Attention as torch's own layer, as torchvision's vision transformers have it."""

    def __init__(self, keys: int = 16, values: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.keys, self.values = nn.Conv2d(3, keys, 4, 4), nn.Conv2d(3, values, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, kdim=keys, vdim=values)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens, keys, values = (
            patch(x).flatten(2).transpose(1, 2) for patch in (self.patch, self.keys, self.values)
        )
        mixed, _ = self.attention(tokens, keys, values, need_weights=False)
        logits: Tensor = self.head((tokens + mixed).mean(1))
        return logits


@pytest.mark.parametrize("widths", [(16, 16), (12, 20)])  # in one weight, and in three
def test_projections_that_are_no_layers_are_corrected_as_weights(
    tmp_path: Path, widths: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    module = TorchAttention(*widths).eval()
    images = torch.randn(2, 3, 16, 16)
    untouched = module(images)
    program = make_program(module, "lora:4", (3, 16, 16))
    torch.testing.assert_close(module(images), untouched)
    corrected = {name.partition(".parametrizations.")[::2] for name in program.trainable}
    assert ("attention.out_proj", "weight.0.up") in corrected
    stacked = ("attention", "in_proj_weight.0.up") in corrected
    assert stacked == (widths == (16, 16))
    assert stacked or ("attention", "v_proj_weight.0.down") in corrected

    program = with_request(program, engine="onnxruntime")
    program = run_passes(
        program, MarkTrainable(), SplitPrefix(), FoldBatchNorm(), DeriveTrainStep(), Lower()
    )
    theta = moved(program)
    with torch.no_grad():
        for name, value in theta.items():
            module.get_parameter(name).copy_(value)
    level = program.levels[0]
    example = program.network.example
    torch.testing.assert_close(level.logits(example, theta), module(example), rtol=1e-4, atol=1e-5)
    begun = replace(program, parameters=theta)
    assert_gradients(gradients(begun), eager_gradients(module, begun), tolerance=2e-3)

    made = bundle.write(tmp_path / "lora.pbc", *compiler.package(program))
    arrays = {name: value.detach().numpy() for name, value in theta.items()}
    classes = [str(number) for number in range(10)]
    _write_onnx(tmp_path / "mine.onnx", made, {"classes": classes}, arrays, 0)
    session = onnxruntime.InferenceSession(str(tmp_path / "mine.onnx"))
    (logits,) = session.run(["logits"], {"x": example.numpy()})
    np.testing.assert_allclose(logits, module(example).detach(), rtol=1e-4, atol=1e-5)


def test_each_projection_of_a_stack_has_a_product_of_its_own() -> None:
    weight = torch.randn(12, 8)
    low_rank = LowRankWeight(weight, 3, 2)
    assert torch.equal(low_rank(weight), weight)
    with torch.no_grad():
        low_rank.up.normal_()
    change = low_rank(weight) - weight
    assert [int(torch.linalg.matrix_rank(part)) for part in change.split(4)] == [2, 2, 2]
    assert int(torch.linalg.matrix_rank(change)) == 6
