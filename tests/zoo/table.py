"""The table of the zoo in Markdown: outcomes per engine and strategy, and the reasons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from records import Record

OUTCOMES = ("right", "refused", "wrong", "traceback", "limit")


def table(records: Sequence[Record]) -> str:
    """Counts and the share that is right by engine and strategy; then reasons, frequent first."""
    rows: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        for strategy in (record.strategy, "all"):
            rows.setdefault((record.engine, strategy), []).append(record)
    titles = ("engine", "strategy", "networks", *OUTCOMES, "share right")
    lines = [_row(*titles), _row(*["---"] * len(titles))]
    for (engine, strategy), cells in sorted(rows.items()):
        counts = Counter(cell.outcome for cell in cells)
        networks = len({cell.network for cell in cells})
        share = f"{counts['right'] / len(cells):.0%}"
        lines.append(_row(engine, strategy, networks, *(counts[o] for o in OUTCOMES), share))
    networks = len({record.network for record in records})
    lines.append(f"\n{networks} networks, {len(records)} cells.\n")
    lines += [_row("outcome", "cells", "reason", "for example"), _row(*["---"] * 4)]
    lines += _reasons(record for record in records if record.outcome != "right")
    return "\n".join(lines) + "\n"


def _reasons(records: Iterable[Record]) -> list[str]:
    kinds: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        kinds.setdefault((record.outcome, _kind(record)), []).append(record)
    ordered = sorted(kinds.items(), key=lambda item: (OUTCOMES.index(item[0][0]), -len(item[1])))
    return [
        _row(outcome, len(of_kind), kind, ", ".join(_examples(of_kind)))
        for (outcome, kind), of_kind in ordered
    ]


def _examples(records: Sequence[Record], count: int = 3) -> list[str]:
    cells = [f"{record.network} {record.strategy} {record.engine}" for record in records]
    return cells[:count] + [f"{len(cells) - count} more"] * (len(cells) > count)


def _kind(record: Record) -> str:
    """The reason without what differs from one network to the next."""
    text = record.reason.replace(record.network, "NETWORK").replace("|", "/")
    text = re.sub(r"\[[^\]]*\]|'[^']*'|\b[\w]+(\.\w+)+\b", "…", text)
    return re.sub(r"\d[\d.e+-]*", "N", text)[:160]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
