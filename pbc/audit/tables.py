"""An audit as rows of words: for a terminal, and for a page."""

from __future__ import annotations

from pbc.audit.audit import Audit

HEADER = (
    "shared", "defence", "labels", "features", "identified", "(chance)", "AUC", "within a class",
    "accuracy",
)  # fmt: skip


def rows(audit: Audit) -> list[list[str]]:
    """Return the header and a line per row; what is shared is named once."""
    lines, last = [list(HEADER)], ""
    for row in audit.rows:
        lines.append(
            [
                "" if row.shared == last else row.shared,
                row.defence,
                _percent(row.labels),
                "-" if row.features is None else f"{row.features:.2f}",
                _percent(row.identified),
                f"({_percent(row.chance)})",
                f"{row.auc:.3f}",
                "-" if row.auc_within is None else f"{row.auc_within:.3f}",
                "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
            ]
        )
        last = row.shared
    return lines


READING = (
    "labels: named from the head's bias, without photos. features: cosine of what is read of one "
    "photo's. identified: of the photos behind it, found among all candidates. AUC: members told "
    "from photos that nobody trained on; 0.5 is chance. accuracy: on those, after the rounds."
)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"
