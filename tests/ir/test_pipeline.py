from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from networks import AttentionNet, ConvNet, Kind, analysed, captured, pruned, split

from pbc import plugins
from pbc.errors import PbcError, UsageError
from pbc.ir import pipeline
from pbc.ir.graph import output_node, output_nodes
from pbc.ir.pipeline import PassPipeline, build
from pbc.ir.program import Program
from pbc.ir.rewrite import copy_graph
from pbc.ir.stages import order
from pbc.passes.align import Align
from pbc.passes.fold_batch_norm import FoldBatchNorm
from pbc.passes.mark_trainable import MarkTrainable
from pbc.passes.plan_levels import PlanLevels
from pbc.passes.prune_dims import PruneDims
from pbc.passes.split_prefix import SplitPrefix
from pbc.testing import TARGET, assert_same, graph_of
from pbc.util.progress import reporting_to


@dataclass(frozen=True)
class Step:
    """What `order` looks at."""

    stage: str = "prune"
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def names(passes: PassPipeline) -> list[str]:
    return [name for name, _ in passes.passes]


def test_the_installed_passes_run_in_the_order_of_their_stages() -> None:
    assert names(build({})) == [
        "mark-trainable", "split-prefix", "try-engine", "independent-dims", "plan-levels",
        "prune-dims", "merge-tokens", "align", "fold-batch-norm", "quantize", "fit-accuracy-map",
        "choose-levels", "learn-policy", "derive-train-step", "lower",
    ]  # fmt: skip


def test_within_a_stage_after_and_before_hold_and_names_decide_the_rest() -> None:
    kinds = {
        "a": Step(after=("d",)),
        "b": Step(),
        "c": Step(stage="mark"),
        "d": Step(),
        "e": Step(before=("b",)),
        "f": Step(after=("elsewhere", "c")),
    }
    assert order(kinds) == ["c", "d", "a", "e", "b", "f"]


def test_a_cycle_is_named() -> None:
    kinds = {"a": Step(after=("b",)), "b": Step(after=("a",)), "c": Step()}
    with pytest.raises(PbcError, match="passes a, b each want to run after another"):
        order(kinds)


def test_an_unknown_stage_is_named() -> None:
    with pytest.raises(PbcError, match="pass a is of stage 'prun'; stages are mark, analyse, plan"):
        order({"a": Step(stage="prun")})


@pytest.mark.parametrize("how", ["extra", "without"])
def test_an_unknown_pass_is_a_usage_error(how: str) -> None:
    with pytest.raises(UsageError, match="no pass named 'prun'; did you mean 'prune-dims'"):
        build({}, **{how: ["prun"]})


def test_a_pass_can_be_left_out() -> None:
    assert names(build({}, without=["learn-policy"])) == [
        name for name in names(build({})) if name != "learn-policy"
    ]


def test_options_reach_the_fields_of_their_name_and_none_means_unset() -> None:
    options = {"levels": 7, "min_cost": 0.5, "align_steps": None, "batch": 8}
    steps = dict(build(options).passes)
    assert steps["plan-levels"] == PlanLevels(levels=7, min_cost=0.5)
    assert steps["align"] == Align()


ACME = '''
from dataclasses import dataclass, replace
from typing import ClassVar


@dataclass(frozen=True)
class Note:
    """Leave a note."""

    levels: int = 0
    acme_words: str = "nothing"
    stage: ClassVar[str] = "prune"
    before: ClassVar[tuple[str, ...]] = ("prune-dims",)
    default: ClassVar[bool] = {default}

    def __call__(self, program):
        return replace(program.copy(), notes=(f"{{self.levels}} {{self.acme_words}}",))
'''


def test_a_pass_of_another_distribution_runs_with_its_options(
    install_plugin: Callable[..., None],
) -> None:
    install_plugin(
        "acme", "[pbc.passes]\nacme-note = acme_plugin:Note\n", ACME.format(default=True)
    )
    passes = build({"levels": 3, "acme_words": "hello"})
    at = names(passes).index("acme-note")
    assert names(passes)[at + 1] == "prune-dims"
    program = PassPipeline(passes.passes[at : at + 1]).run(analysed(ConvNet))
    assert program.notes == ("3 hello",)
    assert program.history[-1] == "acme-note"


def test_a_pass_that_is_not_default_runs_when_it_is_asked_for(
    install_plugin: Callable[..., None],
) -> None:
    install_plugin(
        "acme", "[pbc.passes]\nacme-note = acme_plugin:Note\n", ACME.format(default=False)
    )
    assert "acme-note" not in names(build({}))
    assert "acme-note" in names(build({}, extra=["acme-note"]))


@dataclass(frozen=True)
class Break:
    """A pass with a bug of some kind."""

    how: str
    stage: ClassVar[str] = "prune"

    def __call__(self, program: Program) -> Program:
        program = program.copy()
        graph = program.levels[-1].body
        (result,) = output_nodes(graph)
        if self.how == "values":
            with graph.graph.inserting_after(result):
                wrong = graph.graph.call_function(torch.neg, (result,))
            output_node(graph).args = ((wrong,),)
        elif self.how == "nan":
            program.parameters["fc.bias"] = program.parameters["fc.bias"] * float("nan")
        elif self.how == "output":
            output_node(graph).args = (result,)
        elif self.how == "parameter":
            del program.parameters["fc.bias"]
        elif self.how == "feature":
            placeholder = next(iter(graph.graph.nodes))
            placeholder.name = "renamed"
        elif self.how == "raise":
            raise ZeroDivisionError("oops")
        elif self.how == "shape":
            prefix = graph_of(program, "prefix/1")
            (sent,) = output_nodes(prefix)
            with prefix.graph.inserting_after(sent):
                half = prefix.graph.call_function(torch.narrow, (sent, 1, 0, 3))
            output_node(prefix).args = ((half,),)
            prefix.recompile()
        graph.recompile()
        return program


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("values", r"pass break changed level 0: its logits differ .* by \d\.\de[+-]\d+"),
        ("nan", "pass break changed level 0: its logits differ from the original's by nan"),
        ("output", "pass break failed: graph body/0 returns linear; graphs return a tuple"),
        (
            "parameter",
            r"pass break failed: .* trainable parameters that are not there: \['fc.bias'",
        ),
        (
            "feature",
            r"pass break failed: level 0: the prefix sends \['feature_0'\], the body reads",
        ),
        ("raise", "pass break failed: oops"),
    ],
)
def test_a_pass_with_a_bug_is_named(how: str, message: str) -> None:
    program = split(ConvNet)
    with pytest.raises(RuntimeError, match=message):
        PassPipeline((("break", Break(how)),)).run(program)
    assert_same(program, split(ConvNet))


@pytest.mark.parametrize("kind", [ConvNet, AttentionNet])
def test_what_a_network_amplifies_of_rounding_is_no_bug(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "EQUIVALENCE", 0.0)
    own = pipeline.float32_error(split(kind))
    assert 0 < own < 1e-5
    PassPipeline((("fold-batch-norm", FoldBatchNorm()),)).run(split(kind))
    with pytest.raises(RuntimeError, match="pass break changed level 0"):
        PassPipeline((("break", Break("values")),)).run(split(kind))


def test_a_proxy_that_sends_something_else_is_its_pass_s_bug() -> None:
    with pytest.raises(RuntimeError, match=r"pass break failed: level 1 sends .*\[2, 3\]"):
        PassPipeline((("break", Break("shape")),)).run(pruned(ConvNet, levels=1))


def test_what_the_user_can_fix_stays_what_it_is() -> None:
    @dataclass(frozen=True)
    class Refuse:
        stage: ClassVar[str] = "prune"

        def __call__(self, program: Program) -> Program:
            raise PbcError("not with this model")

    with pytest.raises(PbcError, match=r"^not with this model$"):
        PassPipeline((("refuse", Refuse()),)).run(split(ConvNet))


def test_every_pass_is_dumped_and_reported(tmp_path: Path) -> None:
    seen = []
    steps: tuple[tuple[str, pipeline.Pass], ...] = (
        ("mark-trainable", MarkTrainable()), ("split-prefix", SplitPrefix()),
    )  # fmt: skip
    with reporting_to(lambda stage, fraction, text: seen.append((stage, fraction))):
        program = PassPipeline(steps).run(captured(ConvNet).program, tmp_path / "ir")
    files = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert files == ["00-mark-trainable.txt", "01-split-prefix.txt"]
    assert (tmp_path / "ir" / files[1]).read_text() == program.text() + "\n"
    assert seen == [(n, f) for n in ("mark-trainable", "split-prefix") for f in (0.0, 1.0)]
    assert program.history == ("mark-trainable", "split-prefix")
    assert program.checks["level_0_error"] < 1e-5


def test_a_copy_of_a_program_can_be_changed_freely() -> None:
    program = pruned(ConvNet)
    copied = program.copy()
    assert_same(program, copied)
    graph = graph_of(copied, "prefix/0")
    delattr(graph.get_submodule("conv1"), "weight")
    copied.parameters.clear()
    copied.checks["x"] = 1
    assert "conv1.weight" in dict(graph_of(program, "prefix/0").named_parameters())
    assert program.parameters
    assert "x" not in program.checks
    # Tensors are shared, also after a second copy.
    twice = copy_graph(copy_graph(graph_of(program, "prefix/0")))
    assert twice.get_parameter("conv1.weight") is graph_of(program, "prefix/0").get_parameter(
        "conv1.weight"
    )


def test_the_checks_of_testing_catch_what_they_promise() -> None:
    from pbc.testing import assert_equivalent, assert_text, assert_unchanged

    @dataclass(frozen=True)
    class InPlace:
        stage: ClassVar[str] = "prune"

        def __call__(self, program: Program) -> Program:
            program.parameters["fc.bias"].add_(1)
            return program

    program = replace(
        split(ConvNet), parameters={k: v.clone() for k, v in split(ConvNet).parameters.items()}
    )
    with pytest.raises(AssertionError, match=r"InPlace changed tensors .*θ\[fc.bias\]"):
        assert_unchanged(InPlace(), program)
    with pytest.raises(AssertionError, match="the logits differs by"):
        assert_equivalent(split(ConvNet), program)
    with pytest.raises(AssertionError, match="tensors changed"):
        assert_same(split(ConvNet), program)
    with pytest.raises(AssertionError, match=r"-graph body/0\n"):
        assert_text(program, "graph body/0\n", "body/0")
    assert program.request.target.name == TARGET
    assert plugins.load("pbc.passes", "prune-dims") is PruneDims
