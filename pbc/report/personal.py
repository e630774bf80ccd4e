"""`pbc report`: how good a personal model is, where it fails, and how it was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pbc.bench.report import charts
from pbc.bench.report.charts import Part, Series
from pbc.bench.report.page import page, section, table
from pbc.bundle import Bundle
from pbc.data import InputSpec
from pbc.data.inventory import printable
from pbc.report.levels import accuracy_by_time
from pbc.report.thumbnails import thumbnail
from pbc.runtime.output.folder import Output
from pbc.runtime.output.metrics import Metrics
from pbc.runtime.output.personal import deployed_level, stored
from pbc.runtime.output.validation import Validation
from pbc.util.sizes import memory_text, size_text

_MATRIX_MOST = 24
_CONFUSED_MOST = 20
_PHOTOS_MOST = 60
_COLOURS, _LEVELS = 9, 8


@dataclass(frozen=True)
class Report:
    """A personal model, and what it answered for photos that it was not trained on, if known.

    epochs: the lines of metrics.jsonl, none where they were forgotten. photos: where the photos
    that it was measured on are from. levels: accuracy and sample_ms of each on these photos; none
    where what the run found counts.
    """

    name: str
    bundle: Bundle
    model: dict[str, Any]
    size_bytes: int
    epochs: tuple[dict[str, Any], ...]
    validation: Validation | None
    photos: str = "that were held out"
    levels: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        root: Path,
        validation: Validation | None = None,
        photos: str = "",
        levels: Sequence[dict[str, Any]] = (),
    ) -> Report:
        """Read a personal model's folder; what else is given stands for what its run left there.

        levels: accuracy and sample_ms of each on the photos.
        """
        bundle, model, _ = stored(root)
        output = Output(root)
        if validation is None and output.validation.exists():
            validation, photos = Validation.load(output.validation), "that were held out"
        return cls(
            name=root.resolve().name,
            bundle=bundle,
            model=model,
            size_bytes=output.trainable.stat().st_size,
            epochs=tuple(Metrics(output.metrics).epochs()),
            validation=validation,
            photos=photos,
            levels=tuple(levels),
        )

    def html(self) -> str:
        """Return the page."""
        title = f"{printable(self.name)}: a personal {self.bundle.manifest['model']}"
        return page(
            title,
            [
                f"<header><h1>{escape(title)}</h1>{self._summary()}</header>",
                *self._quality(),
                section("Accuracy against inference time", self._by_level()),
                section("Loss per epoch", self._losses()),
                section("Routing: photos per level and epoch", self._routing()),
                section("Which tensors trained, by epoch", self._selected()),
                section("Where the time went", self._stages()),
                section("Model, size and options", self._facts(), folded=True),
            ],
        )

    def _summary(self) -> str:
        trained = (
            f"Trained on {self.model['samples']} photos of {len(self.model['classes'])} classes"
        )
        seconds = sum(epoch["seconds"] for epoch in self.epochs)
        took = f" in {_duration(seconds)}" if self.epochs else ""
        setting = f"<p>{trained}{took}. What was trained takes {size_text(self.size_bytes)}.</p>"
        if self.validation is None:
            return (
                '<p class="lead">How good it is is not known: no photos were held out. '
                f"Give some: pbc report {escape(printable(self.name))} PHOTOS</p>{setting}"
            )
        result = self.validation.evaluation
        low, high = result.interval
        right = round(result.accuracy * result.count)
        return (
            f'<p class="lead">It is right about <b>{right} of {result.count}</b> photos '
            f"{escape(self.photos)}: {result.accuracy:.1%}, with 95 % confidence "
            f"{100 * low:.1f} to {100 * high:.1f} %.</p>{setting}"
        )

    # ---- what it gets right and wrong ------------------------------------------------------

    def _quality(self) -> list[str]:
        if self.validation is None:
            return []
        names = list(self.validation.classes)
        answers = {photo.answer for photo in self.validation.wrong}
        shown = sorted({*names, *answers})
        matrix = self._matrix(shown) if len(shown) <= _MATRIX_MOST else self._confusions()
        return [
            section("What is taken for what", matrix),
            section("Per class", self._per_class()),
            section("Wrong photos, the surest mistakes first", self._wrong()),
        ]

    def _matrix(self, names: list[str]) -> str:
        assert self.validation is not None
        confused = self.validation.confused()
        head = "".join(f'<th class="answer">{escape(printable(name))}</th>' for name in names)
        rows = []
        for label in names:
            count, right = self.validation.classes.get(label, (0, 0))
            cells = []
            for answer in names:
                value = right if label == answer else confused.get((label, answer), 0)
                kind = "hit" if label == answer else "miss"
                share = f"{100 * value / count:.0f}%" if count else "0%"
                cells.append(f'<td class="{kind}" style="--share:{share}">{value or ""}</td>')
            rows.append(
                f'<tr><th class="name">{escape(printable(label))}</th>{"".join(cells)}</tr>'
            )
        return (
            "<p>A row is a class, a column what the model said.</p>"
            f'<div class="wide"><table class="matrix"><tr><th></th>{head}</tr>'
            f"{''.join(rows)}</table></div>"
        )

    def _confusions(self) -> str:
        assert self.validation is not None
        found = sorted(self.validation.confused().items(), key=lambda pair: (-pair[1], pair[0]))
        rows = [["class", "taken for", "photos"]]
        rows += [
            [printable(label), printable(answer), str(count)]
            for (label, answer), count in found[:_CONFUSED_MOST]
        ]
        more = len(found) - _CONFUSED_MOST
        rest = f"<p>And {more} pairs more.</p>" if more > 0 else ""
        return table(rows, names=2) + rest or "<p>Nothing was confused.</p>"

    def _per_class(self) -> str:
        assert self.validation is not None
        ordered = sorted(
            self.validation.classes.items(), key=lambda row: (row[1][1] / row[1][0], row[0])
        )
        rows = "".join(
            f'<tr><td class="name">{escape(printable(name))}</td>'
            f'<td><div class="meter"><span style="width:{100 * right / count:.0f}%"></span></div>'
            f"</td><td>{right / count:.0%}</td><td>{right} of {count}</td></tr>"
            for name, (count, right) in ordered
        )
        head = (
            '<tr><th class="name">class, the worst first</th><th></th><th>right</th><th></th></tr>'
        )
        return f'<div class="wide"><table>{head}{rows}</table></div>'

    def _wrong(self) -> str:
        assert self.validation is not None
        figures = []
        for wrong in self.validation.wrong[:_PHOTOS_MOST]:
            place = escape(printable(wrong.photo))
            picture = thumbnail(wrong.photo)
            shown = (
                f'<img src="{picture}" alt="{place}">' if picture else "<p>not there any more</p>"
            )
            figures.append(
                f'<figure title="{place}">{shown}<figcaption>{escape(printable(wrong.label))}, '
                f"taken for <b>{escape(printable(wrong.answer))}</b> ({wrong.probability:.0%})"
                "</figcaption></figure>"
            )
        more = len(self.validation.wrong) - _PHOTOS_MOST
        rest = f"<p>And {more} more.</p>" if more > 0 else ""
        return f'<div class="photos">{"".join(figures)}</div>{rest}' if figures else ""

    def _by_level(self) -> str:
        photos = f"On photos {escape(self.photos or 'that were held out')}"
        if self.levels:
            words = f"{photos}, every level with the head of this model."
            return accuracy_by_time(self.levels, deployed_level(self.model), words)
        words = f"{photos}, every level with a head of its own."
        return accuracy_by_time(self.model.get("levels", []), deployed_level(self.model), words)

    # ---- how it was trained ----------------------------------------------------------------

    def _losses(self) -> str:
        judged = [epoch for epoch in self.epochs if epoch["loss"] is not None]
        points = [(float(epoch["epoch"]), float(epoch["loss"])) for epoch in judged]
        if len(points) < 2:
            return ""
        return charts.lines(
            [Series("training loss", "c5", points)], "epoch", "training loss", "{:.0f}".format, 260
        )

    def _routing(self) -> str:
        if not self.epochs or len(self.epochs[0]["levels"]) < 2:
            return ""
        levels = self.bundle.manifest["levels"]
        parts = [
            Part(
                f"level {at}" + (" (the original)" if at == 0 else f" (cost {level['cost']:.2f})"),
                f"l{min(at, _LEVELS - 1)}",
            )
            for at, level in enumerate(levels)
        ]
        stacks = [epoch["levels"] for epoch in self.epochs]
        return charts.legend(parts) + charts.columns(stacks, parts, "photos")

    def _selected(self) -> str:
        """A row for each tensor that ever trained alone, as in ElasticTrainer's figure 21."""
        chosen = [frozenset(epoch.get("selected", ())) for epoch in self.epochs]
        names = [
            name for name in self.bundle.manifest["parameters"] if any(name in c for c in chosen)
        ]
        if not names:
            return ""
        head = "".join(f"<th>{epoch['epoch']}</th>" for epoch in self.epochs)
        rows = []
        for name in names:
            cells = (f'<td class="hit" style="--share:{100 * (name in c)}%"></td>' for c in chosen)
            rows.append(f'<tr><th class="name">{escape(printable(name))}</th>{"".join(cells)}</tr>')
        return (
            f"<p>{len(self.bundle.manifest['parameters'])} tensors could train.</p>"
            f'<div class="wide"><table class="matrix"><tr><th></th>{head}</tr>'
            f"{''.join(rows)}</table></div>"
        )

    def _stages(self) -> str:
        total: dict[str, float] = {}
        for epoch in self.epochs:
            for stage, seconds in epoch["stage_seconds"].items():
                total[stage] = total.get(stage, 0.0) + seconds
        whole = sum(total.values())
        if not whole:
            return ""
        ordered = sorted(total.items(), key=lambda item: -item[1])
        rows = [["stage", "seconds", "share"]]
        rows += [
            [name, f"{seconds:.2f}", f"{seconds / whole:.0%}"]
            for name, seconds in ordered
            if seconds >= whole / 1000
        ]
        return table(rows)

    def _facts(self) -> str:
        manifest = self.bundle.manifest
        bundle_bytes = sum(facts["size_bytes"] for facts in manifest["files"].values())
        peak = max((epoch["peak_memory_bytes"] for epoch in self.epochs), default=0)
        facts = {
            "model": f"{manifest['model']} (weights: {manifest['provenance']['weights']})",
            "photos are": InputSpec.from_json(manifest["input"]).words(),
            "strategy": manifest["strategy"],
            "engine": manifest["engine"],
            "bundle": size_text(bundle_bytes),
            "trained part": size_text(self.size_bytes),
            "peak memory of training": memory_text(peak) if peak else "unknown",
            "fidelity floor": self.model["fidelity_floor"],
            **self.model["options"],
        }
        rows = "".join(
            f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
            for name, value in facts.items()
            if value is not None
        )
        return f"<dl>{rows}</dl>"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"
