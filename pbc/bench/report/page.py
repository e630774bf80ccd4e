"""The frame of a report: one HTML file with its style, no script, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files


def page(title: str, sections: Sequence[str]) -> str:
    """Return the file; sections are HTML, empty ones are left out."""
    style = files("pbc.bench.report").joinpath("report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in sections if part)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *content: str) -> str:
    """Return a titled section of HTML parts, or nothing where they are empty."""
    inside = "".join(content)
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def table(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """Return a table; the first `names` columns are words, the others figures."""
    if len(rows) < 2:
        return ""

    def line(kind: str, cells: Sequence[str]) -> str:
        tags = [f'{kind} class="name"'] * names + [kind] * (len(cells) - names)
        marked = zip(tags, cells, strict=True)
        return "".join(f"<{tag}>{escape(cell)}</{kind}>" for tag, cell in marked)

    head = line("th", rows[0])
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows[1:])
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{inside}</div>'
