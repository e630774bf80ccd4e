"""The forms that a program's proxies can take, and what they cost."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from torch.fx import GraphModule

from pbc.bundle.graph_name import BODY
from pbc.bundle.ladder import FLOAT32, INT8, LATENCY, MACS, PROFILE
from pbc.ir.dims import HEADS, Dimension, Dims
from pbc.ir.graph import op_name
from pbc.ir.levels import LevelGraphs, LevelPlan, Size
from pbc.ir.program import Program
from pbc.ir.work import work_file
from pbc.lower.backend import backend
from pbc.lower.cost_profile import CostProfile
from pbc.proxies import parallel
from pbc.proxies.fidelity import boundary_nodes
from pbc.proxies.resolution import layer_macs, macs, reduced_role
from pbc.proxies.tokens import tokens_of
from pbc.proxies.trial import reason_against, reason_of_failure, trial, with_merges
from pbc.util.atomic import replace_bytes

Sizes = dict[str, int]
# What decides how a form is converted: resolution, merges, precision.
Kind = tuple[Size | None, tuple[int, ...], str]

PRECISION, RESOLUTION, TOKENS, WIDTH = AXES = ("precision", "resolution", "tokens", "width")
# Common widths at which a latency is measured; between them it is interpolated.
MEASURED_WIDTHS = np.linspace(1.0, 0.1, 10)
# MACs follow from the sizes, at any width.
COUNTED_WIDTHS = np.linspace(1.0, 0.1, 181)
# Height and width against the original's: these before any channel goes, the further ones where
# no channel may. Which is better below three quarters was not measured (docs/alignment.md).
RESOLUTIONS = (7 / 8, 3 / 4)
FURTHER_RESOLUTIONS = (5 / 8, 1 / 2)
RESOLUTION_ROUNDING = 16
# Of a transformer's tokens, the shares that are merged after its first attention; further ones
# merge less and less (docs/alignment.md).
TOKEN_RATES = (1 / 32, 1 / 16, 3 / 32, 1 / 8)
# A precision that saves less is not worth a level, nor are resolutions.
WORTHWHILE = 0.9
# What an int8 multiply-accumulate of a convolution costs of a float32 one where that is not
# measured: ResNet-50's prefix took 3.7 ms for 12.7 ms an image (ONNX Runtime, one x86 core with
# VNNI), and its first and last layers are not integer.
INT8_COST = 0.35


@dataclass(frozen=True)
class Form:
    """The form of a level, against the original's.

    width: common to all independent dimensions. merges: tokens that go after each attention.
    """

    width: float = 1.0
    resolution: Size | None = None
    precision: str = FLOAT32
    merges: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The form as notes name it."""
        parts = [f"with {self.width:.0%} of the channels"] if self.width < 1 else []
        parts += ["at {}x{}".format(*self.resolution)] if self.resolution else []
        parts += [f"with {sum(self.merges)} tokens merged"] if self.merges else []
        parts += [f"in {self.precision}"] if self.precision != FLOAT32 else []
        return " ".join(parts)


class Forms:
    """The forms that a program can take, and what they cost."""

    def __init__(
        self,
        program: Program,
        dims: Dims,
        rounding: int,
        profile: CostProfile | None,
        *,
        trials: bool,
    ) -> None:
        self._program = program
        self._original = program.levels[0]
        self._profile = profile
        self._trials = trials
        self._dims = dims
        self._rounding = rounding or (16 if has_depthwise(*self._original.frozen) else 8)
        self.whole = self._dims.macs()
        self._pixels: dict[Size | None, float] = {None: 1.0}
        self._tokens: dict[tuple[int, ...], float] = {(): 1.0}
        # Why there can be no level of a form, empty where there can.
        self._tried: dict[Form, str] = {}
        # What the engine was asked to convert: another width is converted alike.
        self._converted: set[Kind] = set()

    @functools.cached_property
    def _frozen_macs(self) -> list[float]:
        """Multiply-accumulates of the original's prefix, if it has one, and body."""
        return [macs(graph) for graph in self._original.frozen]

    @property
    def frozen(self) -> bool:
        """Whether anything frozen sends what a trainable layer reads: else no level is cheaper."""
        return self._original.prefix is not None or bool(boundary_nodes(self._original.body))

    @property
    def notes(self) -> tuple[str, ...]:
        """A note for each form that was tried and cannot be, once for each reason."""
        reasons: dict[str, list[str]] = {}
        for form, reason in self._tried.items():
            if reason:
                reasons.setdefault(reason, []).append(form.title)
        return tuple(
            f"no level {' or '.join(forms)}: {reason}" for reason, forms in reasons.items()
        )

    def runnable(self, forms: Sequence[Form], *, chosen: bool = False) -> list[Form]:
        """Those of the forms of which a trial runs as a level must; without trials most.

        The engine converts one of all resolutions and merges, which takes seconds, and each that is
        chosen.
        """
        if not self._trials:
            return [form for form in forms if self._countable(form)]
        return [form for form in forms if not self._reason_against(form, chosen=chosen)]

    def _countable(self, form: Form) -> bool:
        """Whether the layers at least take images of its size."""
        return not reason_of_failure(lambda: self.macs(form))

    def _reason_against(self, form: Form, *, chosen: bool) -> str:
        """One line, empty where there is none."""
        kind = (form.resolution, form.merges, form.precision)
        ask = kind not in self._converted and (
            chosen or not any(_alike(kind, other) for other in self._converted)
        )
        if form not in self._tried or (ask and not self._tried[form]):
            if ask:
                self._converted.add(kind)
            plan = self._shape(form)
            self._tried[form] = parallel.once(
                lambda: reason_against(self._program, plan, self._dims, engine=ask)
            )
        return self._tried[form]

    @property
    def cost_model(self) -> str:
        """The source of costs, as the manifest names it."""
        if self._profile is not None:
            return PROFILE
        return LATENCY if self._program.request.target.local else MACS

    def profiled(self, precision: str) -> bool:
        return self._profile is not None and self._profile.measured(precision)

    def extrapolations(self, forms: Sequence[Form]) -> tuple[str, ...]:
        """A note where levels are cheaper than any that the profile has."""
        if self._profile is None:
            return ()
        beyond = [
            str(level)
            for level, form in enumerate(forms)
            if self.profiled(form.precision)
            and self._profile.extrapolated(self.macs(form) / self.whole, form.precision)
        ]
        if not beyond:
            return ()
        return (
            f"costs of level {', '.join(beyond)} are extrapolated: the profile has none so cheap; "
            "profile this bundle and compile once more",
        )

    def path(self, axes: Sequence[str], precision: str) -> list[Form]:
        """Forms from the original's down, each giving up more than the one before."""
        wide = WIDTH in axes and bool(self._dims.independent())
        resolutions: list[Size | None] = [None]
        if RESOLUTION in axes:
            shares = RESOLUTIONS if wide else (*RESOLUTIONS, *FURTHER_RESOLUTIONS)
            smaller = self._resolutions(shares)
            if smaller and self.macs(Form(resolution=smaller[-1])) <= WORTHWHILE * self.whole:
                resolutions += smaller
        forms = [Form(1.0, resolution, precision) for resolution in resolutions]
        if TOKENS in axes and len(resolutions) == 1:
            forms += [replace(forms[-1], merges=merges) for merges in self._merges(forms[-1])]
        if wide:
            widths = MEASURED_WIDTHS if self.cost_model == LATENCY else COUNTED_WIDTHS
            narrower = [replace(forms[-1], width=float(width)) for width in widths[1:]]
            if self.runnable(narrower[-1:]):
                forms += narrower
        return forms

    def without_narrowing(self, axes: Sequence[str], precision: str) -> list[Form]:
        """Forms with all channels and fewer pixels, or else fewer tokens, of little steps."""
        form = Form(precision=precision)
        if RESOLUTION in axes:
            smaller = self._resolutions((*RESOLUTIONS, *FURTHER_RESOLUTIONS))
            if smaller and self.macs(Form(resolution=smaller[-1])) <= WORTHWHILE * self.whole:
                return [replace(form, resolution=size) for size in smaller]
        if TOKENS in axes:
            return [replace(form, merges=merges) for merges in self._merges(form)]
        return []

    def _merges(self, form: Form) -> list[tuple[int, ...]]:
        """What may be merged after each attention, more and more of it."""
        tokens = tokens_of(self._original, self._dims)
        if tokens is None:
            return []
        plans = dict.fromkeys(tokens.schedule(rate) for rate in TOKEN_RATES)
        found = self.runnable([replace(form, merges=plan) for plan in plans if any(plan)])
        return [one.merges for one in found]

    def _resolutions(self, shares: Sequence[float]) -> list[Size]:
        _, height, width = self._program.network.input.shape
        sizes = [(_rounded_pixels(height * s), _rounded_pixels(width * s)) for s in shares]
        distinct = [size for size, _ in itertools.groupby([(height, width), *sizes])][1:]
        found = self.runnable([Form(resolution=size) for size in distinct])
        return [form.resolution for form in found if form.resolution is not None]

    def precisions(self) -> list[Form]:
        """The cheaper precisions to try: those that the engine offers and the program can have."""
        return [Form(precision=precision) for precision in self._precisions()]

    def _precisions(self) -> list[str]:
        prefix = self._original.prefix
        offered = backend(self._program.request.engine).precisions
        possible = [p for p in offered if p != INT8 or prefix is not None]
        if self.cost_model == LATENCY:
            return possible
        return [
            p for p in possible if self.profiled(p) or (p == INT8 and _convolves(self._original))
        ]

    def plan(self, form: Form, cost: float) -> LevelPlan:
        """The form, as what is to be made of it."""
        return replace(self._shape(form), cost=cost, macs=self.macs(form))

    def trial(self, form: Form) -> LevelGraphs:
        """A level of the form, to be run and forgotten."""
        return trial(self._program, self._shape(form), self._dims)

    def _shape(self, form: Form) -> LevelPlan:
        """The same before anything is known of its cost."""
        return LevelPlan(self.sizes(form), 1.0, 0.0, form.precision, form.resolution, form.merges)

    def sizes(self, form: Form) -> Sizes:
        return uniform_sizes(self._dims, form.width, self._rounding)

    def macs(self, form: Form) -> float:
        """Multiply-accumulates of one sample."""
        if form.resolution not in self._pixels and form.resolution:
            prefix, body = self._original.prefix, self._original.body
            if reduced_role(self._original) == BODY:
                before, after = macs(body), macs(body, form.resolution, prefix)
            else:
                assert prefix is not None
                before, after = macs(prefix), macs(prefix, form.resolution)
            # Only that graph shrinks: what it sends has its full size again.
            self._pixels[form.resolution] = 1 - (before - after) / max(self.whole, before)
        if form.merges not in self._tokens:
            level = replace(self._original, merges=form.merges)
            fewer = with_merges(level, self._original, self._dims, shapes=False)
            after = sum(macs(graph) for graph in fewer.frozen)
            self._tokens[form.merges] = after / sum(self._frozen_macs)
        pixels, tokens = self._pixels[form.resolution], self._tokens[form.merges]
        return self._dims.macs(self.sizes(form)) * pixels * tokens

    def costs(self, forms: Sequence[Form]) -> np.ndarray:
        """Costs relative to the original's; NaN for a form that the engine cannot run."""
        if self.cost_model == LATENCY:
            latency_ms = np.array(self._latencies_ms([Form(), *forms]))
            relative: np.ndarray = latency_ms[1:] / latency_ms[0]
            return relative
        return np.array([self.predicted(form) for form in forms])

    def predicted(self, form: Form) -> float:
        """The cost by MACs, as the profile maps them to time; in proportion without one."""
        work = self.macs(form) / self.whole
        if self._profile is None:
            return work * self._assumed(form.precision)
        if self.profiled(form.precision):
            return self._profile.cost(work, form.precision)
        return self._profile.cost(work) * self._assumed(form.precision)

    def _assumed(self, precision: str) -> float:
        """The weight of a multiply-accumulate: less for those of an int8 prefix."""
        prefix = self._original.prefix
        if precision != INT8 or prefix is None:
            return 1.0
        work = layer_macs(prefix)
        return 1 - work / (work + layer_macs(self._original.body)) * (1 - INT8_COST)

    def _latencies_ms(self, forms: Sequence[Form]) -> list[float]:
        """Measure; keep the result, since a resumed compilation must come to the same plan."""
        program, request = self._program, self._program.request
        decided_by = [[asdict(form) for form in forms], request.batch, request.engine]
        decided_by.append(self._rounding)
        kept = work_file(program, "latencies", decided_by, self._original.frozen, ".json")

        def measure() -> list[float | str]:
            measured: list[float | str]
            if kept is not None and kept.is_file():
                with contextlib.suppress(ValueError):  # damaged: measure again
                    measured = json.loads(kept.read_text())
                    return measured
            measured = self._times_or_reasons(forms)
            if kept is not None:
                replace_bytes(kept, json.dumps(measured).encode())
            return measured

        latencies = []
        for form, found in zip(forms, parallel.once(measure), strict=True):
            if isinstance(found, str):
                self._tried[form] = found
            latencies.append(math.nan if isinstance(found, str) else found)
        return latencies

    def _times_or_reasons(self, forms: Sequence[Form]) -> list[float | str]:
        """For each form milliseconds, or why the engine cannot run it; the original has to run."""
        program = self._program
        lowering = backend(program.request.engine).lowering()
        trials = [self.trial(form) for form in forms]
        times: list[float] = []

        def reason_against_timing(levels: Sequence[LevelGraphs]) -> str:
            return reason_of_failure(
                lambda: times.extend(lowering.latency_ms(program, levels)), *lowering.refusals
            )

        if not reason_against_timing(trials):
            return [*times]
        lowering.latency_ms(program, trials[:1])
        reasons = [reason_against_timing([level]) for level in trials]
        fit = [level for level, reason in zip(trials, reasons, strict=True) if not reason]
        times = lowering.latency_ms(program, fit)
        return [reason or times.pop(0) for reason in reasons]


def _alike(kind: Kind, other: Kind) -> bool:
    """Whether both give up the same, however much of it."""
    (size, merges, precision), (others_size, others_merges, others_precision) = kind, other
    return (size is None, any(merges), precision) == (
        others_size is None,
        any(others_merges),
        others_precision,
    )


def _rounded_pixels(size: float) -> int:
    return max(1, round(size / RESOLUTION_ROUNDING)) * RESOLUTION_ROUNDING


def uniform_sizes(dims: Dims, width: float, rounding: int) -> Sizes:
    """The size of every independent dimension at a common width; unshrunk ones are left out."""
    sizes = {}
    for dimension in dims.independent():
        size = rounded(dimension, width, rounding)
        if size < dimension.size:
            sizes[dimension.name] = size
    return sizes


def rounded(dimension: Dimension, width: float, rounding: int) -> int:
    """A dimension's size at a width: a multiple of `rounding`, at least one, at most its own."""
    if dimension.kind == HEADS:
        return dimension.size
    size = int(dimension.size * width / rounding + 0.5) * rounding
    return min(dimension.size, max(rounding, size))


def has_depthwise(*graphs: GraphModule) -> bool:
    """Whether a convolution runs channel by channel; such layers like wider blocks of channels."""
    return any(
        op_name(node) == "aten.conv2d.default" and len(node.args) > 6 and node.args[6] != 1
        for graph in graphs
        for node in graph.graph.nodes
    )


def _convolves(level: LevelGraphs) -> bool:
    """Whether most layers of the prefix are convolutions, and no layer runs channel by channel."""
    if level.prefix is None:
        return False
    names = [op_name(node) for node in level.prefix.graph.nodes]
    convolutions = names.count("aten.conv2d.default")
    return convolutions > names.count("aten.linear.default") and not has_depthwise(*level.frozen)
