"""Charts as inline SVG: plain text in, plain text out, coloured by the page's style sheet.

Every mark carries a `<title>`, which browsers show when the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 12, 44
_NARROW = 350
_ROW, _BAR = 30, 18


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one name; `colour` is a class of the style sheet."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Part:
    """The name behind one colour of a stacked bar."""

    name: str
    colour: str


def legend(items: Sequence[Series | Part]) -> str:
    """Return an HTML list of names with their colours."""
    rows = "".join(
        f'<li><span class="key {item.colour}"></span>{escape(item.name)}</li>' for item in items
    )
    return f'<ul class="legend">{rows}</ul>'


def lines(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str],
    height: int = 320,
    *,
    logarithmic: bool = False,
    x_names: Sequence[str] | None = None,
) -> str:
    """Return a line chart with a dot per point; `x_names` name the positions 0, 1, 2."""
    points = [point for each in series for point in each.points]
    if not points:
        return ""
    x_axis = _Axis.of([x for x, _ in points], _LEFT, _WIDTH - _RIGHT, logarithmic, x_names)
    y_axis = _Axis.of([y for _, y in points], height - _BOTTOM, _TOP)
    marks = [_frame(x_axis, y_axis, height, x_label, y_label, x_text)]
    for each in series:
        placed = [(x_axis(x), y_axis(y)) for x, y in each.points]
        path = "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        marks.append(f'<path class="line {each.colour}" d="{path}"/>')
        for (x, y), (at_x, at_y) in zip(each.points, placed, strict=True):
            name = x_names[int(x)] if x_names else x_text(x)
            title = escape(f"{each.name}: {y:.4g} at {name}")
            marks.append(
                f'<circle class="dot {each.colour}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4">'
                f"<title>{title}</title></circle>"
            )
    return _svg(height, f"{y_label} over {x_label}", marks)


def scatter(
    points: Sequence[tuple[str, str, float, float]],
    x_label: str,
    y_label: str,
    y_low: float,
    height: int = 300,
    *,
    joined: bool = True,
) -> str:
    """Return labelled dots: (label, title, x, y) each; the y axis reaches down to `y_low`.

    joined: a line goes through them in their order.
    """
    if not points:
        return ""
    x_axis = _Axis.of([0.0, *(x for _, _, x, _ in points)], _LEFT, _WIDTH - 90)
    y_axis = _Axis.of([y_low, *(y for *_, y in points)], height - _BOTTOM, _TOP)
    marks = [_frame(x_axis, y_axis, height, x_label, y_label)]
    path = " L".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for _, _, x, y in points)
    if joined:
        marks.append(f'<path class="line thin" d="M{path}"/>')
    taken: list[float] = []
    for index, (label, title, x, y) in enumerate(points):
        at_x, at_y = x_axis(x), y_axis(y)
        below = any(abs(at_x - other) < 24 for other in taken)
        taken.append(at_x)
        marks.append(
            f'<circle class="dot l{min(index, 7)}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="6">'
            f"<title>{escape(title)}</title></circle>"
            f'<text x="{at_x + 10:.1f}" y="{at_y + (16 if below else 4):.1f}">'
            f"{escape(label)}</text>"
        )
    return _svg(height, f"{y_label} against {x_label}", marks)


def columns(
    stacks: Sequence[Sequence[float]], parts: Sequence[Part], y_label: str, height: int = 200
) -> str:
    """Return a stacked column per epoch; stacks[e][k] belongs to parts[k]."""
    if not stacks:
        return ""
    y_axis = _Axis.of([0.0, max(sum(stack) for stack in stacks)], height - _BOTTOM, _TOP)
    marks = [_horizontals(y_axis, _NARROW), _y_name(y_label, height)]
    step = (_NARROW - _LEFT - _RIGHT) / len(stacks)
    for epoch, stack in enumerate(stacks):
        left, bottom = _LEFT + epoch * step, 0.0
        width = min(0.8 * step, 48)
        left += (step - width) / 2
        for part, value in zip(parts, stack, strict=False):
            if value <= 0:
                continue
            top = bottom + value
            y, size = y_axis(top), y_axis(bottom) - y_axis(top)
            title = escape(f"epoch {epoch + 1}, {part.name}: {value:.0f} visits")
            marks.append(
                f'<rect class="bar {part.colour}" x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{max(size - 1, 0.5):.1f}"><title>{title}</title></rect>'
            )
            bottom = top
        if len(stacks) <= 15 or epoch % 5 == 4:
            middle = left + width / 2
            marks.append(
                f'<text class="tick" x="{middle:.1f}" y="{height - _BOTTOM + 16}" '
                f'text-anchor="middle">{epoch + 1}</text>'
            )
    marks.append(_x_name("epoch", height, _NARROW))
    return _svg(height, f"{y_label} per epoch", marks, _NARROW)


def shares(rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[Part]) -> str:
    """Return a horizontal bar per row, divided into shares that add up to 1."""
    left = 120
    height = _TOP + len(rows) * _ROW + 26
    width = _WIDTH - left - _RIGHT
    marks = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * width
        marks.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - 24}"/>'
            f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="middle">'
            f"{100 * tick:.0f} %</text>"
        )
    for index, (name, values) in enumerate(rows):
        y, at = _TOP + index * _ROW + (_ROW - _BAR) / 2, 0.0
        marks.append(
            f'<text x="{left - 8}" y="{y + _BAR - 5:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        for part, value in zip(parts, values, strict=True):
            if value <= 0:
                continue
            title = escape(f"{name}, {part.name}: {100 * value:.1f} %")
            marks.append(
                f'<rect class="bar {part.colour}" x="{left + at * width:.1f}" y="{y:.1f}" '
                f'width="{max(value * width - 1, 0.5):.1f}" height="{_BAR}">'
                f"<title>{title}</title></rect>"
            )
            at += value
    return _svg(height, "share of time per stage", marks)


# ---- axes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Map from values to pixels; callable."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool = False
    names: tuple[str, ...] | None = None

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def text(self, value: float) -> str:
        """Write a tick with as many digits as tell it from the next one."""
        step = self.ticks[1] - self.ticks[0]
        return f"{value:.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}"

    @staticmethod
    def of(
        values: Sequence[float],
        start: float,
        end: float,
        logarithmic: bool = False,
        names: Sequence[str] | None = None,
    ) -> _Axis:
        """Make an axis that holds all values, with room around them and round ticks."""
        if names is not None:
            count = len(names)
            ticks = tuple(float(index) for index in range(count))
            return _Axis(-0.5, max(count, 1) - 0.5, start, end, ticks, False, tuple(names))
        low, high = min(values), max(values)
        if logarithmic:
            low, high = low / 1.15, high * 1.15
            return _Axis(low, high, start, end, _log_ticks(low, high), True)
        step = _step(high - low or abs(high) or 1.0)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        if high - low < step / 2:
            low, high = low - step, high + step
        count = round((high - low) / step)
        return _Axis(low, high, start, end, tuple(low + step * k for k in range(count + 1)))


def _step(span: float) -> float:
    """Return a round step that gives four to eight ticks."""
    rough = span / 5
    power: float = 10 ** math.floor(math.log10(rough))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= rough)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = tuple(
            k * 10.0**decade
            for decade in decades
            for k in multiples
            if low <= k * 10.0**decade <= high
        )
        if len(ticks) >= 3:
            break
    return ticks


def _frame(
    x_axis: _Axis,
    y_axis: _Axis,
    height: int,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str] | None = None,
) -> str:
    marks = [_horizontals(y_axis), _y_name(y_label, height), _x_name(x_label, height)]
    x_text = x_text or x_axis.text
    for tick in x_axis.ticks:
        x = x_axis(tick)
        text = x_axis.names[int(tick)] if x_axis.names else x_text(tick)
        marks.append(
            f'<text class="tick" x="{x:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">'
            f"{escape(text)}</text>"
        )
    return "".join(marks)


def _horizontals(axis: _Axis, width: int = _WIDTH) -> str:
    return "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{axis(tick):.1f}" '
        f'y2="{axis(tick):.1f}"/><text class="tick" x="{_LEFT - 8}" y="{axis(tick) + 4:.1f}" '
        f'text-anchor="end">{axis.text(tick)}</text>'
        for tick in axis.ticks
    )


def _x_name(text: str, height: int, width: int = _WIDTH) -> str:
    middle = (_LEFT + width - _RIGHT) / 2
    return (
        f'<text class="axis" x="{middle:.1f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def _y_name(text: str, height: int) -> str:
    middle = (height - _BOTTOM + _TOP) / 2
    return (
        f'<text class="axis" transform="translate(12 {middle:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def _svg(height: float, label: str, marks: Sequence[str], width: int = _WIDTH) -> str:
    return (
        f'<div class="chart"><svg viewBox="0 0 {width} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}</svg></div>'
    )
