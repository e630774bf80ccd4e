"""An audit as one self-contained HTML page."""

from __future__ import annotations

from html import escape

from pbc.audit import tables
from pbc.audit.audit import Audit
from pbc.bench.report.page import page, section, table


def html(audit: Audit) -> str:
    """Return the page."""
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
            section("What was audited", f"<dl>{facts}</dl>"),
        ],
    )
