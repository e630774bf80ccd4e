from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from pbc.compiler import CompileOptions, start
from pbc.data import InputSpec
from pbc.errors import PbcError
from pbc.frontend import models
from pbc.frontend.capture import capture
from pbc.frontend.open_classes import open_classes
from pbc.testing import TARGET

SPEC = InputSpec((3, 8, 8), models.IMAGENET_MEAN, models.IMAGENET_STD)


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.fc = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.stem(x)).mean((2, 3)))
        return logits


def test_a_head_with_norms_of_its_own_takes_any_number_of_classes() -> None:
    source = models.given(Net(parametrizations.weight_norm(nn.Linear(8, 5))), "net", SPEC)
    graph = capture(source.module, SPEC.shape)
    open_classes(graph, source.head)
    weights = dict(graph.named_parameters())
    seven = {name: torch.ones(7, *weights[name].shape[1:]) for name in source.head.parameters}
    (logits,) = functional_call(graph, seven, (torch.randn(3, 3, 8, 8),))
    assert logits.shape == (3, 7)


def test_a_frozen_tensor_of_the_classes_is_named() -> None:
    source = models.given(Net(parametrizations.spectral_norm(nn.Linear(8, 5))), "net", SPEC)
    graph = capture(source.module, SPEC.shape)
    with pytest.raises(PbcError, match=r"classes, 5, is that of fc\.parametrizations.*_u, which"):
        open_classes(graph, source.head)


def test_a_number_of_classes_that_the_network_does_not_run_with_is_refused() -> None:
    source = models.given(Net(parametrizations.spectral_norm(nn.Linear(8, 5))), "net", SPEC)
    options = CompileOptions(target=TARGET, engine="pytorch", classes=7, shape=SPEC.shape)
    expected = (
        r"^net does not run with 7 classes in place of its 5: .*; fc\..*_u has the former number"
    )
    with pytest.raises(PbcError, match=expected):
        start(source, options)
