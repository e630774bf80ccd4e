"""A budget becomes a scheme: within it by the memory model, and the most valuable one."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from networks import settled
from test_sparse import Chain

from pbc import compiler
from pbc.data import InputSpec
from pbc.errors import PbcError, UsageError
from pbc.frontend import models
from pbc.frontend.traced_network import TracedNetwork
from pbc.ir.program import Program
from pbc.lower.engine_choice import DEFAULT_ENGINE
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.split_prefix import SplitPrefix
from pbc.scheme.contributions import Contributions
from pbc.scheme.costs import Costs, everything, taken
from pbc.scheme.layers import layers
from pbc.scheme.scheme import Scheme
from pbc.testing import TARGET, make_program, run_passes

HALF, WHOLE = Fraction(1, 2), Fraction(1)
WORTH = Contributions(
    "accuracy",
    {},
    50.0,
    {"one": {HALF: 0.1, WHOLE: 0.2}, "two": {HALF: 3.0, WHOLE: 3.5}, "three": {WHOLE: 1.0}},
    {1: 0.2, 3: 0.4},
)


def split(program: Program) -> Program:
    return run_passes(program, MarkTrainable(), SplitPrefix(), FoldBatchNorm())


def started(strategy: str, contributions: Path | None = None) -> Program:
    spec = InputSpec((3, 16, 16), models.IMAGENET_MEAN, models.IMAGENET_STD)
    source = models.given(settled(Chain()), "Chain", spec)
    options = compiler.CompileOptions(
        target=TARGET,
        engine=DEFAULT_ENGINE,
        strategy=strategy,
        shape=spec.shape,
        contributions=contributions,
    )
    return compiler.start(source, options)


@pytest.fixture(scope="module")
def worth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worth") / "contributions.json"
    WORTH.save(path)
    assert Contributions.open(path) == WORTH
    return path


def scheme_of(program: Program) -> Scheme:
    return Scheme.parse(program.request.strategy.partition(":")[2])


def test_what_adds_up_is_what_the_memory_model_says() -> None:
    program = make_program(settled(Chain()), "linear-probe")
    module = settled(Chain())
    network = TracedNetwork.of(module, program.network.head, program.network.example)
    found = layers(network)
    whole = split(make_program(copy.deepcopy(module), f"sparse:{everything(found)}"))
    costs = Costs.of(whole, found)
    for biases in (1, 3):  # of the head alone, what it reads is a feature
        program = split(make_program(settled(Chain()), f"sparse:b{biases}"))
        assert taken(program)["extra"] == costs.bases[biases], biases
    for name, share in (("two", HALF), ("three", Fraction(1, 4))):
        program = split(make_program(settled(Chain()), f"sparse:b3,{name}={share}"))
        own = taken(program)["extra"] - costs.bases[3]
        assert own == costs.layers[name][share], name


@pytest.mark.parametrize("kib", [40, 400])
def test_the_last_layers_come_first_without_contributions(kib: int) -> None:
    program = started(f"sparse:{kib}KiB")
    scheme = scheme_of(program)
    assert taken(split(program))["extra"] <= kib * 1024
    last = ["stem", "one", "two", "three"][-scheme.biases :] if scheme.biases else []
    assert set(scheme.fractions) <= set(last)
    assert "the last layers first" in program.notes[0]


def test_what_is_worth_most_is_chosen(worth: Path) -> None:
    program = started("sparse:200KiB", worth)
    scheme = scheme_of(program)
    assert scheme.fractions["two"] == WHOLE
    assert scheme.biases in (2, 3)
    assert taken(split(program))["extra"] <= 200 * 1024
    assert "chosen by contributions (accuracy)" in program.notes[0]


def test_a_peak_is_kept(worth: Path) -> None:
    most = taken(split(started("sparse:b3,two=1/2")))["peak"]
    program = started(f"sparse:peak={most // 1024 + 1}KiB", worth)
    assert taken(split(program))["peak"] <= most + 1024
    assert scheme_of(program).fractions["two"] >= HALF


def test_a_budget_that_is_too_little_is_refused() -> None:
    with pytest.raises(PbcError, match=r"sparse:1 KiB is too little: the head alone"):
        started("sparse:1024B")


def test_what_does_not_go_together_is_refused(tmp_path: Path, worth: Path) -> None:
    with pytest.raises(UsageError, match=r"sparse:peak=1.0 MiB needs --contrib"):
        started("sparse:peak=1MiB")
    with pytest.raises(UsageError, match="--contributions is for a strategy of a budget"):
        started("linear-probe", worth)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"measure": "accuracy"}')
    with pytest.raises(PbcError, match="holds no contributions of `pbc analyze`: it has no"):
        started("sparse:1MiB", wrong)
    replace(WORTH, layers={}).save(wrong)
    assert "two" not in scheme_of(started("sparse:400KiB", wrong)).fractions
