"""A self-contained HTML page: sections and tables, one style sheet, no script, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole document; empty sections are left out."""
    style = files("pbc.bench.report").joinpath("report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def section(title: str, *content: str, folded: bool = False) -> str:
    """Return content under a heading, which opens it if it is folded; nothing without content."""
    inside = "".join(content)
    if not inside:
        return ""
    heading = f"<h2>{escape(title)}</h2>"
    if folded:
        return f"<section><details><summary>{heading}</summary>{inside}</details></section>"
    return f"<section>{heading}{inside}</section>"


def table(rows: Sequence[Sequence[str]], names: int = 1, marked: int | None = None) -> str:
    """Return a table; the first `names` columns are words, the others figures.

    marked: the row, counted without the head, that stands out.
    """
    if len(rows) < 2:
        return ""

    def line(kind: str, cells: Sequence[str]) -> str:
        tags = [f'{kind} class="name"'] * names + [kind] * (len(cells) - names)
        marked = zip(tags, cells, strict=True)
        return "".join(f"<{tag}>{escape(cell)}</{kind}>" for tag, cell in marked)

    ours = ' class="ours"'
    body = "".join(
        f"<tr{ours if at == marked else ''}>{line('td', row)}</tr>"
        for at, row in enumerate(rows[1:])
    )
    made = f"<table><thead><tr>{line('th', rows[0])}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{made}</div>'
