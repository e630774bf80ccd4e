"""The results as one self-contained HTML file: tables and inline SVG, no script, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pbc.bench.marks import FIRST_EPOCH
from pbc.bench.report import charts, tables, verdict
from pbc.bench.report.charts import Part, Series
from pbc.bench.report.page import page, section, table
from pbc.bench.results import Results
from pbc.bench.standings import BASELINES, REFERENCE, Standing
from pbc.bench.sweep import Study
from pbc.bundle.ladder import UNALIGNED

_COLOURS = 9
_LEVELS = 8
_MARK = ' class="ours"'
# A ladder that is nearly exact must not look steep.
_LEAST_FIDELITY = 0.9
_WORDS = {
    "cost_model": "costs of levels are",
    "trained_values": "trainable values",
    "train_samples": "photos to train on",
    "test_samples": "photos to test on",
    "test_photos": "test photos are",
    "learning_rate_from": "that rate is",
    "rates_of_their_own": "rates of their own",
}


def html(results: Results, with_budgets: bool) -> str:
    """Return the page."""
    bundle = results.about["bundle"]
    title = f"pbc bench: {bundle['model']}, {bundle['strategy']}"
    sections = [
        f"<header><h1>{escape(title)}</h1>{_summary(results)}</header>",
        section("Time to train", _bars(results)),
        section("Time to an accuracy", table(tables.clock(results)), _marks()),
        section("Whole runs", _headline(results), _reading(results)),
        section("Accuracy over time", _accuracy(results)),
        section("Accuracy and memory", _memory(results)),
        section("Routing: visits per level and epoch", _routing(results)),
        section("The ladder: what a level costs, and how faithful it is", _ladder(results)),
        section("Where the time goes", _stages(results)),
    ]
    if with_budgets:
        rows = tables.budgets(results)
        what = "Seconds until a share of full training's accuracy is first reached."
        sections.append(section("Accuracy budgets", table(rows), f"<p>{what}</p>"))
    studies = zip(results.sweeps, tables.sweeps(results), strict=True)
    sections += [_study(study, rows, results) for study, rows in studies]
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    listed = f"<ul>{notes}</ul>" if notes else "<p>None.</p>"
    sections.append(section("Notes", listed, folded=True))
    sections.append(section("Protocol and machine", _facts(results), folded=True))
    return page(title, sections)


def _summary(results: Results) -> str:
    """Say the main thing in one sentence, and what it is about."""
    ours, reference = tables.ours(results), results.standing(REFERENCE)
    data, protocol = results.about["data"], results.about["protocol"]
    setting = (
        f"<p>{data['train_samples']} photos of {data['classes']} classes, tested on "
        f"{data['test_samples']}; {protocol['epochs']} epochs, {protocol['seeds']} "
        f"seed{'s' if protocol['seeds'] > 1 else ''}, batch {protocol['batch']}.</p>"
    )
    if ours is None or reference is None or not ours.faster:
        return setting
    # The clock that a user feels first; whole runs where nobody reached the reference.
    sooner = ours.to_reference.faster if ours.to_reference is not None else {}
    faster = sooner or ours.faster
    what = f"to {REFERENCE}'s final accuracy − 0.5" if sooner else "over all epochs"
    times = ", ".join(
        f"<b>{tables.ratio(faster[name])}</b> as fast as {name}"
        for name in BASELINES
        if name in faster
    )
    # A few epochs say nothing about an accuracy.
    beside = (
        "" if reference.extrapolated else f" ({REFERENCE}: {tables.percent(reference.accuracy)})"
    )
    return (
        f'<p class="lead">{escape(verdict.sentence(results))}</p>'
        f"<p>{escape(ours.rival)} is {times} {escape(what)}, at "
        f"<b>{tables.percent(ours.accuracy)}</b> final test accuracy{beside}.</p>{setting}"
    )


def _bars(results: Results) -> str:
    """Return a bar per rival, the fastest first; pbc's stands out."""
    ordered = tables.by_speed(results)
    longest = max((standing.seconds.mean for standing in ordered), default=0.0)
    ours = tables.ours(results)
    rows = "".join(
        f"<tr{_MARK if standing is ours else ''}>"
        f'<td class="name">{escape(_words(standing.rival))}</td>'
        f'<td class="bars"><div class="meter"><span style="width:'
        f'{100 * standing.seconds.mean / longest:.1f}%"></span></div></td>'
        f"<td>{tables.seconds(standing.seconds)}</td></tr>"
        for standing in ordered
    )
    return f"<table>{rows}</table>" if longest else ""


def _words(rival: str) -> str:
    return f"{verdict.WORDS[rival]} ({rival})" if rival in verdict.WORDS else rival


def _headline(results: Results) -> str:
    ordered, ours = tables.by_speed(results), tables.ours(results)
    marked = next((at for at, standing in enumerate(ordered) if standing is ours), None)
    return table(tables.headline(results), marked=marked)


def _marks() -> str:
    shares = ", ".join(f"{100 * share:g}" for share in FIRST_EPOCH)
    return (
        f"<p>Every rival is evaluated at {shares} % of its first epoch and at the end of each, "
        "outside of the measured time. Whoever is there may stop; seeds that never were are "
        "counted.</p>"
    )


def _reading(results: Results) -> str:
    text = (
        "Accuracy is the final epoch's on the test photos, never the best one. Times are all that "
        "training needs; evaluation is outside. Ratios are taken seed by seed"
    )
    if results.about["protocol"]["seeds"] > 1:
        text += "; ± is the standard deviation over the seeds"
    return f"<p>{text}.</p>"


def _accuracy(results: Results) -> str:
    series = [
        Series(
            standing.label,
            _colour(index),
            [(seconds, 100 * accuracy) for seconds, accuracy in standing.curve if seconds > 0],
        )
        for index, standing in enumerate(results.standings)
    ]
    chart = charts.lines(
        series,
        "seconds of training (logarithmic)",
        "test accuracy, %",
        lambda x: f"{x:.3g} s",
        logarithmic=True,
    )
    return chart and charts.legend(series) + chart


def _memory(results: Results) -> str:
    """What training takes beside what is loaded, each rival in a process of its own."""
    found = [
        (standing, standing.facts[tables.MEMORY])
        for standing in results.standings
        if standing.facts.get(tables.MEMORY)
    ]
    points = [
        (
            standing.rival,
            f"{standing.label}: {tables.memory(size)}, {tables.percent(standing.accuracy)}",
            size / 2**20,
            100 * standing.accuracy.mean,
        )
        for standing, size in found
    ]
    least = min((accuracy for *_, accuracy in points), default=0.0)
    return charts.scatter(
        points, "memory of training, MiB", "test accuracy, %", 5 * (least // 5), joined=False
    )


def _routing(results: Results) -> str:
    routed = [standing for standing in results.standings if len(standing.levels[0]) > 1]
    if not routed:
        return ""
    count = max(len(standing.levels[0]) for standing in routed)
    parts = [
        Part(f"level {level}" + (" (the original)" if level == 0 else ""), _level(level))
        for level in range(count)
    ]
    figures = "".join(
        f"<figure><figcaption>{escape(standing.label)}</figcaption>"
        f"{charts.columns(standing.levels, parts, 'visits')}</figure>"
        for standing in routed
    )
    return f'{charts.legend(parts)}<div class="pair">{figures}</div>'


def _ladder(results: Results) -> str:
    known = [level for level in results.ladder if level["fidelity"] is not None]
    points = [
        (
            f"level {level['level']}",
            f"level {level['level']}: cost {level['cost']:.3f}, fidelity {level['fidelity']:.3f}"
            f"{_how(level)}",
            level["cost"],
            level["fidelity"],
        )
        for level in known
    ]
    chart = charts.scatter(
        points,
        f"cost relative to level 0 ({results.about['bundle']['cost_model']})",
        "fidelity",
        _LEAST_FIDELITY,
    )
    unaligned = [str(row["level"]) for row in results.ladder if row["status"] == UNALIGNED]
    if unaligned:
        chart += f"<p>Never aligned, and not shown: level {', '.join(unaligned)}.</p>"
    return chart


def _how(level: Mapping[str, Any]) -> str:
    resolution = level.get("resolution")
    at = f" at {'x'.join(map(str, resolution))} pixels" if resolution else ""
    return f", {level.get('precision', 'float32')}{at}"


def _stages(results: Results) -> str:
    names = tables.stages(results)[0][1:]
    parts = [Part(name, _colour(index)) for index, name in enumerate(names)]
    rows = [
        (standing.rival, [standing.stages.get(name, 0.0) for name in names])
        for standing in results.standings
    ]
    if not rows:
        return ""
    return charts.legend(parts) + charts.shares(rows, parts) + table(tables.stages(results))


def _study(study: Study, rows: Sequence[Sequence[str]], results: Results) -> str:
    """Return a section; a rival has the colour that it has in all other charts."""
    known = [standing.rival for standing in results.standings]
    rivals_seen = list(dict.fromkeys([*known, *(point.rival for point in study.points)]))
    rivals = dict.fromkeys(point.rival for point in study.points)
    place = {value: float(index) for index, value in enumerate(study.values)}
    accuracies, ratios = [], []
    for rival in rivals:
        colour = _colour(rivals_seen.index(rival))
        mine = [point for point in study.points if point.rival == rival]
        accuracies.append(
            Series(
                rival,
                colour,
                [(place[point.value], 100 * point.accuracy.mean) for point in mine],
            )
        )
        if rival != REFERENCE:
            faster = [(place[p.value], p.faster.mean) for p in mine if p.faster is not None]
            ratios.append(Series(rival, colour, faster))
    kwargs: dict[str, Any] = {"height": 260, "x_names": study.values}
    return section(
        f"Sweep: {study.title}",
        charts.legend(accuracies),
        charts.lines(accuracies, study.title, "test accuracy, %", str, **kwargs),
        charts.lines(ratios, study.title, "times as fast as pet", str, **kwargs),
        table(rows, names=2),
    )


def _facts(results: Results) -> str:
    blocks = []
    for name, facts in results.about.items():
        shown = dict(facts)
        if name == "machine":
            shown["peak memory of the process"] = tables.memory(results.peak_memory_bytes)
            shown["energy"] = results.energy
        rows = "".join(
            f"<dt>{escape(_WORDS.get(key, key.replace('_', ' ')))}</dt>"
            f"<dd>{escape(_text(value))}</dd>"
            for key, value in shown.items()
            if value not in (None, {}, False)
        )
        blocks.append(f"<div><h3>{escape(name)}</h3><dl>{rows}</dl></div>")
    variants = "".join(
        f"<li>{escape(standing.rival)}: {escape(_variant(standing))}</li>"
        for standing in results.standings
        if _variant(standing)
    )
    listed_variants = f"<h3>variants that ran</h3><ul>{variants}</ul>" if variants else ""
    return f'<div class="facts">{"".join(blocks)}</div>{listed_variants}'


def _variant(standing: Standing) -> str:
    return str(standing.facts.get("variant", ""))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return "yes" if value is True else str(value)


def _colour(index: int) -> str:
    return f"c{index % _COLOURS}"


def _level(level: int) -> str:
    return f"l{min(level, _LEVELS - 1)}"
