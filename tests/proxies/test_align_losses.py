from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from networks import AttentionNet, ConvNet, ResidualNet, calibration, pruned
from torch.nn import functional

from pbc.errors import PbcError, UsageError
from pbc.ir.graph import get_tensor, tensor_names
from pbc.passes.align import Align
from pbc.proxies.align_losses import FeatureMap, logit_loss, map_loss, nst_loss, terms_of
from pbc.proxies.fidelity import UpToInterface
from pbc.testing import assert_equivalent


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_nst_is_the_discrepancy_summed_over_pairs_of_channels() -> None:
    student, teacher = random(1, 5, 3, 3), random(1, 7, 3, 3, seed=1)

    def kernel(one: torch.Tensor, two: torch.Tensor) -> float:
        pairs = itertools.product(one[0].flatten(1), two[0].flatten(1))
        unit = [(functional.normalize(x, dim=0), functional.normalize(y, dim=0)) for x, y in pairs]
        return sum(float((x @ y) ** 2) for x, y in unit) / len(unit)

    expected = kernel(teacher, teacher) + kernel(student, student) - 2 * kernel(student, teacher)
    assert float(nst_loss(student, teacher)) == pytest.approx(expected, abs=1e-5)
    assert float(nst_loss(teacher[:, [2, 0, 1, 3, 4, 6, 5]], teacher)) < 1e-6


def test_maps_are_compared_wherever_their_channels_are_and_at_equal_positions() -> None:
    student, teacher = random(1, 5, 2, 2), random(1, 7, 3, 3, seed=1)
    one, two = FeatureMap("", 1).pair(student, teacher)
    assert (one.shape, two.shape) == ((1, 5, 3, 3), (1, 7, 3, 3))
    last = FeatureMap("", 3).pair(student.movedim(1, 3), teacher.movedim(1, 3))
    torch.testing.assert_close(last, (one, two))
    assert float(nst_loss(one, two)) > 0


def test_errors_of_a_map_count_in_deviations_of_its_channels() -> None:
    teacher = random(8, 5, 3, 3)
    assert float(map_loss(teacher, teacher)) == 0
    mean = teacher.mean((0, 2, 3), keepdim=True).expand_as(teacher)
    scale = torch.tensor([1.0, 10.0, 30.0, 2.0, 5.0]).reshape(1, 5, 1, 1)
    assert float(map_loss(mean * scale, teacher * scale)) == pytest.approx(1, abs=0.05)
    with pytest.raises(PbcError, match="a proxy keeps 3 of 5; use nst"):
        map_loss(teacher[:, :3], teacher)


def test_gradients_of_scores_are_as_large_at_any_temperature() -> None:
    teacher = random(64, 10)
    norms = []
    for temperature in (4.0, 16.0):
        student = random(64, 10, seed=1).requires_grad_()
        logit_loss(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.25)
    assert float(logit_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_terms_by_name() -> None:
    assert terms_of("nst+features") == ("features", "nst")
    with pytest.raises(UsageError, match=r"no term of --align-loss named 'logit'; did you mean"):
        terms_of("features+logit")


def test_the_last_map_of_the_prefix() -> None:
    assert FeatureMap.of(pruned(ConvNet)).channels == 1
    assert FeatureMap.of(pruned(AttentionNet)).channels == 2


def test_what_follows_the_interface() -> None:
    program = pruned(ResidualNet, "adapters:2")
    level = program.levels[1]
    feature_map = FeatureMap.of(program)
    plain = UpToInterface(program, level)(program.network.example)
    whole = UpToInterface(program, level, feature_map.node, logits=True)
    values = whole(program.network.example)
    assert len(values) == len(plain) + 2
    for one, two in zip(plain, values, strict=False):
        assert torch.equal(one, two)
    torch.testing.assert_close(values[-1], program.logits(1, program.network.example))
    known = {n for n, _ in UpToInterface(program, level).named_parameters()}
    assert {n for n, _ in whole.named_parameters()} == known


@pytest.mark.parametrize("terms", ["logits", "features+nst+logits"])
def test_levels_are_distilled_by_other_terms(
    terms: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program = pruned(ConvNet)
    data = calibration(tmp_path_factory.mktemp("photos"), program.network.input, per_class=10)
    before = replace(program, calibration=data)
    started = Align(align_steps=1)(before)
    after = Align(align_steps=40, align_loss=terms)(before)
    assert_equivalent(before, after)
    images = data.batch(data.held_out)
    truth = before.logits(0, images)
    errors = [float(logit_loss(p.logits(1, images), truth)) for p in (started, after)]
    assert errors[1] < errors[0]
    for name in tensor_names(after.levels[0].body):
        assert torch.equal(
            get_tensor(after.levels[0].body, name), get_tensor(before.levels[0].body, name)
        )
