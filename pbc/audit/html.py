"""An audit as one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from pbc.audit import pixel_tables, tables
from pbc.audit.audit import Audit
from pbc.audit.pixel_tables import Reconstruction
from pbc.bench.report.page import page, section, table


def html(audit: Audit, pictures: Sequence[Reconstruction] = ()) -> str:
    """Return the page; pictures: reconstructions, which it shows beside the photos."""
    about = audit.about
    title = f"pbc audit: {about['model']}, {about['strategy']}"
    lead = (
        f"<p>{about['photos']} photos of {about['classes']} classes, half of them dealt to "
        f"{about['clients']} clients; an update is {about['epochs']} epoch(s) of batch "
        f"{about['batch']}, accuracy is after {about['rounds']} rounds.</p>"
    )
    found = "".join(f"<li>{escape(line)}</li>" for line in audit.findings)
    facts = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in about.items()
    )
    return page(
        title,
        [
            f"<header><h1>{escape(title)}</h1>{lead}</header>",
            section(
                "What an attacker finds",
                table(tables.rows(audit), names=2),
                f"<p>{escape(tables.READING)}</p>",
            ),
            section("When a defence helps", f"<ul>{found}</ul>"),
            *([_rebuilt(pictures)] if pictures else []),
            section("What was audited", f"<dl>{facts}</dl>"),
        ],
    )


def _rebuilt(pictures: Sequence[Reconstruction]) -> str:
    found = "".join(f"<li>{escape(line)}</li>" for line in pixel_tables.findings(pictures))
    figures = "".join(
        f'<figure><img src="{_url(png)}" alt="{escape(what)}">'
        f"<figcaption>{escape(what)}</figcaption></figure>"
        for row in pictures
        for png, what in _shown(row)
    )
    return section(
        "Photos rebuilt from a gradient",
        table(pixel_tables.rows(pictures), names=1),
        f"<p>{escape(pixel_tables.READING)}</p><ul>{found}</ul>",
        f'<div class="photos">{figures}</div>',
    )


def _shown(row: Reconstruction) -> list[tuple[bytes, str]]:
    """Return a row's pictures with their words: a photo, then what was made of it."""
    where = f"{row.network}, {row.photos} photo{'s'[: row.photos != 1]}, {row.defence}"
    return [
        picture
        for photo, rebuilt in row.pictures
        for picture in ((photo, f"{where}: the photo"), (rebuilt, f"{where}: {row.attack}"))
    ]


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
