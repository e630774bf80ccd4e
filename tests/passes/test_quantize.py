from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AttentionNet, ConvNet, Kind, ResidualNet, calibration, pruned
from torch import Tensor
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY, PREFIX
from pbc.bundle.ladder import INT8
from pbc.ir.graph import get_tensor, op_name, tensor_names
from pbc.ir.program import Program
from pbc.ir.rewrite import replace_tensor
from pbc.passes.quantize import Quantize
from pbc.proxies import distillation
from pbc.proxies.fidelity import precision_of
from pbc.proxies.quantization import (
    HIGHEST,
    LOWEST,
    WEIGHT_HIGHEST,
    Range,
    Scheme,
    calibrated,
    correct_biases,
    folded,
    integers,
    quantized,
    scheme,
    simulated,
)
from pbc.proxies.sample_fidelity import sample_fidelity
from pbc.testing import (
    assert_equivalent,
    assert_gradients,
    assert_same,
    assert_text,
    assert_unchanged,
    gradients,
    graph_of,
    run_passes,
    rungs,
    with_request,
)
from pbc.util.progress import reporting_to

CASES = [(ConvNet, "linear-probe"), (ResidualNet, "adapters:2"), (AttentionNet, "linear-probe")]
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default


def in_int8(kind: Kind, strategy: str = "linear-probe", folder: Path | None = None) -> Program:
    """Two proxies of which the first is planned to be int8; calibrated where there is a folder."""
    program = pruned(kind, strategy)
    original, first, *others = program.levels
    first = replace(first, precision=INT8)
    program = replace(program, levels=(original, first, *others))
    if folder is None:
        return program
    return replace(program, calibration=calibration(folder, program.network.input))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibration")


def first_prefix(kind: Kind) -> GraphModule:
    return folded(graph_of(pruned(kind), "prefix/0"))


# ---- ranges ----------------------------------------------------------------------------------

ends = st.floats(-1e4, 1e4, width=32)


@given(one=ends, other=ends, share=st.floats(0, 1))
def test_a_value_inside_the_range_moves_by_half_a_step_at_most(
    one: float, other: float, share: float
) -> None:
    span = Range.spanning(min(one, other), max(one, other))
    low, high = max(span.low, min(one, other, 0)), min(span.high, max(one, other, 0))
    value = torch.tensor(low + share * (high - low), dtype=torch.float32)
    integer = torch.clamp(torch.round(value / span.scale) + span.zero_point, LOWEST, HIGHEST)
    error = abs(float((integer - span.zero_point) * span.scale - value))
    assert error <= span.scale / 2 + 1e-5 * max(abs(low), abs(high))


@given(one=ends, other=ends)
def test_zero_is_exact_and_both_ends_are_within_a_step(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    span = Range.spanning(low, high)
    assert LOWEST <= span.zero_point <= HIGHEST
    assert span.low <= 0 <= span.high
    assert span.low <= min(low, 0) + span.scale
    assert span.high >= max(high, 0) - span.scale
    if low >= 0:
        assert span.zero_point == 0  # clamping below is then the ReLU itself


@settings(max_examples=6, deadline=None)
@given(rows=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_each_output_channel_of_a_weight_has_its_own_step(rows: list[float], seed: int) -> None:
    graph = first_prefix(ConvNet)
    name = "conv1.weight_folded"
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(get_tensor(graph, name).shape, generator=generator)
    sizes = torch.tensor(rows).repeat(len(weight))[: len(weight)]
    weight = weight * sizes.reshape(-1, 1, 1, 1)
    replace_tensor(graph, name, weight)
    stored = integers(simulated(graph, Scheme(scheme(graph).layers, {}), {}))
    integer, scale = (get_tensor(stored, f"{name}_{part}") for part in ("int8", "scale"))
    assert integer.dtype == torch.int8
    assert scale.shape == (len(weight),)
    assert set(integer.flatten(1).abs().amax(1).tolist()) == {WEIGHT_HIGHEST}
    error = (integer * scale.reshape(-1, 1, 1, 1) - weight).flatten(1).abs().amax(1)
    assert bool((error <= scale * 0.5001).all())


def test_two_products_of_the_largest_integers_fit_sixteen_bits() -> None:
    assert 2 * HIGHEST * WEIGHT_HIGHEST < 2**15  # what x86 without VNNI adds them in


def test_a_range_suits_the_usual_image_and_not_the_one_that_is_far_larger() -> None:
    graph = first_prefix(ConvNet)
    usual = torch.randn(31, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = scheme(graph)
    images = torch.cat([usual, 300 * usual[:1]])
    ranges = calibrated(graph, chosen, lambda: [images])
    alone = calibrated(graph, chosen, lambda: [usual])
    for name, span in ranges.items():
        assert span.scale < 60 * alone[name].scale, name  # its own would be 300 times as large


# ---- the graph -------------------------------------------------------------------------------


def test_a_quantised_graph_in_text() -> None:
    program = in_int8(ConvNet)
    graph = quantized(graph_of(program, "prefix/0"), program.network.example)
    steps = [node.args[1:3] for node in graph.graph.nodes if node.target is QUANTIZE]
    x, one, two = (f"{scale}, {zero}, 0, 255, torch.uint8" for scale, zero in steps)
    assert [zero for _, zero in steps[1:]] == [0, 0]  # behind ReLUs
    expected = """
        graph prefix/0 takes
          %x: [b, 3, 16, 16]
        does
          %Q: [b, 3, 16, 16] = quantize(%x, X)
          %D: [b, 3, 16, 16] = dequantize(%Q, X)
          %W: [16, 3, 3, 3] = weight(@conv1.weight_folded_int8, @conv1.weight_folded_scale, HOW)
          %conv2d: [b, 16, 16, 16] = conv2d(%D, %W, @conv1.weight_folded_bias, [1, 1], [1, 1])
          %relu: [b, 16, 16, 16] = relu(%conv2d)
          %Q_1: [b, 16, 16, 16] = quantize(%relu, ONE)
          %D_1: [b, 16, 16, 16] = dequantize(%Q_1, ONE)
          %W_1: [24, 16, 3, 3] = weight(@conv2.weight_folded_int8, @conv2.weight_folded_scale, HOW)
          %conv2d_1: [b, 24, 8, 8] = conv2d(%D_1, %W_1, @conv2.weight_folded_bias, AROUND)
          %relu_1: [b, 24, 8, 8] = relu(%conv2d_1)
          %Q_2: [b, 24, 8, 8] = quantize(%relu_1, TWO)
          %D_2: [b, 24, 8, 8] = dequantize(%Q_2, TWO)
          %mean: [b, 24] = mean.dim(%D_2, [2, 3])
        returns %mean as feature_0
        """
    # Written out: names that fit on a line, and the ranges, which depend on the example.
    for short, full in {
        "%Q": "%quantize_per_tensor_default",
        "%D": "%dequantize_per_tensor_default",
        "%W": "%dequantize_per_channel_default",
        " quantize(": " quantized_decomposed.quantize_per_tensor(",
        "dequantize(": "quantized_decomposed.dequantize_per_tensor(",
        "weight(": "quantized_decomposed.dequantize_per_channel(",
        "AROUND": "[2, 2], [1, 1]",
        "HOW": "None, 0, -64, 64, torch.int8",
        "X)": f"{x})",
        "ONE)": f"{one})",
        "TWO)": f"{two})",
    }.items():
        expected = expected.replace(short, full)
    level = replace(program.levels[0], prefix=graph)
    assert_text(replace(program, levels=(level,)), expected, "prefix/0")


@pytest.mark.parametrize("kind", [ConvNet, ResidualNet, AttentionNet])
def test_float_weights_leave_the_graph_and_nothing_else_changes(kind: Kind) -> None:
    graph = graph_of(pruned(kind), "prefix/0")
    before = {name: get_tensor(graph, name).clone() for name in tensor_names(graph)}
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = graph(images)[0]
        result = quantized(graph, images)
        got = result(images)[0]
        assert torch.equal(graph(images)[0], expected)
    assert all(torch.equal(get_tensor(graph, name), value) for name, value in before.items())
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 0.05 * float(expected.abs().max())
    kept = [get_tensor(result, name) for name in tensor_names(result)]
    wide = [tensor for tensor in kept if tensor.dim() > 1 and tensor.dtype == torch.float32]
    assert len([tensor for tensor in kept if tensor.dtype == torch.int8]) == len(
        scheme(folded(graph)).layers
    )
    assert all(tensor.shape[0] == 1 for tensor in wide)  # no matrix, no kernel
    assert {name for name, _ in (*result.named_parameters(), *result.named_buffers())} == set(
        tensor_names(result)
    )


def test_a_simulation_rounds_as_the_integers_do_and_differentiates() -> None:
    graph = first_prefix(ResidualNet)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = scheme(graph)
    ranges = calibrated(graph, chosen, lambda: [images])
    simulation = simulated(graph, chosen, ranges)
    output = simulation(images)[0]
    with torch.no_grad():
        assert torch.allclose(integers(simulation)(images)[0], output, atol=1e-5)
    weights = [get_tensor(simulation, name) for name in tensor_names(simulation)]
    trained = [w.requires_grad_(True) for w in weights if isinstance(w, torch.nn.Parameter)]
    slopes = torch.autograd.grad(simulation(images)[0].square().mean(), trained)
    assert all(float(slope.abs().max()) > 0 for slope in slopes)
    for weight in trained:
        weight.requires_grad_(False)


def test_sums_of_integers_are_integers_and_pools_of_the_output_are_not() -> None:
    graph = first_prefix(ResidualNet)
    chosen = scheme(graph)
    sums = [n.name for n in graph.graph.nodes if op_name(n) == "aten.add.Tensor"]
    assert len(sums) == 3
    assert set(sums[:2]) <= set(chosen.points)
    assert sums[2] not in chosen.points  # only the mean reads it
    assert "mean" not in chosen.points


def channel_error(graph: GraphModule, simulation: GraphModule, images: Tensor) -> float:
    with torch.no_grad():
        difference = simulation(images)[0] - graph(images)[0]
    return float(difference.mean(0).abs().mean())


def test_corrected_biases_take_the_usual_error_out() -> None:
    graph = first_prefix(ConvNet)
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    chosen = scheme(graph)
    ranges = calibrated(graph, chosen, lambda: [images])
    ranges["relu"] = Range(ranges["relu"].scale / 3, 0)  # cuts off what is large
    simulation = simulated(graph, chosen, ranges)
    before = channel_error(graph, simulation, images[32:])
    correct_biases(simulation, graph, images[:32])
    assert channel_error(graph, simulation, images[32:]) < 0.8 * before


# ---- the pass --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_int8_levels_are_rounded_aligned_and_measured(
    kind: Kind, strategy: str, photos: Path
) -> None:
    before = in_int8(kind, strategy, photos)
    data = before.calibration
    assert data is not None
    after = assert_unchanged(Quantize(align_steps=8), before)
    assert_equivalent(before, after)
    assert_equivalent(before, after, level=2)
    assert_gradients(gradients(after), gradients(before))
    assert gradients(after, 1).keys() == after.parameters.keys()
    targets = Counter(op_name(n) for n in graph_of(after, "prefix/1").graph.nodes)
    assert targets[str(QUANTIZE)] > 0
    assert str(QUANTIZE) not in {op_name(n) for n in graph_of(after, "body/1").graph.nodes}
    one, two = rungs(after).levels[1:]
    assert (one.status, two.status) == ("aligned", "unaligned")
    measured = sample_fidelity(after, after.levels[1:2], data, data.held_out).mean()
    assert one.fidelity == pytest.approx(measured, abs=1e-5)
    prefix = quantized(graph_of(before, "prefix/1"), before.network.example)
    rounded = replace(before.levels[1], prefix=prefix)
    start = sample_fidelity(before, [rounded], data, data.held_out).mean()
    assert one.fidelity > start


def test_an_int8_body_computes_in_float32() -> None:
    program = in_int8(ResidualNet, "adapters:2")
    assert precision_of(program.levels[0], PREFIX, INT8) == INT8
    assert precision_of(program.levels[0], BODY, INT8) == "float32"


def test_distillation_through_the_rounding_brings_a_level_nearer(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pbc.passes.quantize.LEARNING_RATE", 1e-3)
    program = in_int8(ConvNet, folder=photos)  # level 1 lost channels, and nothing aligned it
    little = Quantize(align_steps=1)(program).levels[1].fidelity
    more = Quantize(align_steps=160)(program).levels[1].fidelity
    assert little is not None
    assert more is not None
    assert more > little + 0.01


def test_the_same_seed_gives_the_same_bits(photos: Path) -> None:
    program = in_int8(ConvNet, folder=photos)
    assert_same(Quantize(align_steps=8)(program), Quantize(align_steps=8)(program))


class Interrupted(Exception):
    pass


def test_an_interrupted_quantisation_continues_to_the_same_bits(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "SAVE_SECONDS", 0.0)
    program = in_int8(ConvNet, folder=photos)
    whole = Quantize(align_steps=24)(program)
    program = with_request(program, work=tmp_path / "work")
    seen: list[str] = []

    def stop(stage: str, fraction: float, text: str) -> None:
        seen.append(text)
        if stage == "quantize" and "step 4," in text:
            raise Interrupted

    with pytest.raises(Interrupted), reporting_to(stop):
        Quantize(align_steps=24)(program)
    seen.clear()
    with reporting_to(lambda stage, fraction, text: seen.append(text)):
        assert_same(whole, Quantize(align_steps=24)(program))
    assert "step 4," in seen[0]  # saved after the third


def test_without_calibration_data_levels_stay_unaligned_and_a_note_says_so() -> None:
    before = in_int8(ConvNet)
    after = assert_unchanged(Quantize(), before)
    assert rungs(after) == rungs(before)
    assert any("ranges of random images" in note for note in after.notes)
    assert str(QUANTIZE) in {op_name(n) for n in graph_of(after, "prefix/1").graph.nodes}
    assert_equivalent(before, after)


def test_without_int8_levels_nothing_happens(photos: Path) -> None:
    program = pruned(ConvNet)
    program = replace(program, calibration=calibration(photos, program.network.input))
    assert_same(program, run_passes(program, Quantize(align_steps=1)))


# ---- onnxruntime -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_runs_integer_kernels_and_agrees(tmp_path: Path) -> None:
    graph = first_prefix(ConvNet)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    result = quantized(graph, images)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.onnx.export(
        result, (images,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        exported.model_proto.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    kernels = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kernels["QLinearConv"] == 2
    assert kernels["Conv"] == 0
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = result(images)[0]
    step = max(float(node.args[1]) for node in result.graph.nodes if node.target is QUANTIZE)
    assert float((torch.from_numpy(got) - expected).abs().max()) <= step
