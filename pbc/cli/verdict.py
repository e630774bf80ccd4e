"""What a training run came to, for people: accuracy, where it fails, and what to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

from pbc.data.inventory import printable
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.output.folder import Output
from pbc.runtime.output.validation import Validation

_CLASSES_MOST = 5
_WRONG_MOST = 5


def accuracy_line(result: Evaluation) -> str:
    """Return the accuracy with its interval, in one line."""
    low, high = result.interval
    return (
        f"accuracy {result.accuracy:.2%} on {result.count} samples "
        f"(95 % confidence: {100 * low:.1f} to {100 * high:.1f} %)"
    )


def verdict(result: Validation, output: Output) -> list[str]:
    """Return lines: the accuracy, the worst classes, the surest mistakes and where all are."""
    lines = [accuracy_line(result.evaluation)]
    worst = result.worst_classes()
    if worst:
        shown = ", ".join(
            f"{printable(name)} {right} of {count}" for name, count, right in worst[:_CLASSES_MOST]
        )
        lines.append(f"worst classes: {shown}{_more(len(worst), _CLASSES_MOST)}")
        lines.append(f"wrong photos, {len(result.wrong)} in all, the surest mistakes first:")
    lines += [
        f"  {printable(wrong.photo)}: taken for {printable(wrong.answer)} ({wrong.probability:.0%})"
        for wrong in result.wrong[:_WRONG_MOST]
    ]
    lines.append(f"every class and every wrong photo: {output.validation}")
    return lines


def next_commands(bundle: Path, data: Path, out: Path, *, held_out: bool, onnx: bool) -> list[str]:
    """Return commands that make sense after a run; held_out: whether it kept photos aside."""
    mine = shlex.quote(str(out))
    rows = [(f"pbc predict {mine} PHOTO.jpg", "what is on a photo")]
    rows.append((f"pbc eval {mine} FOLDER", "accuracy on other photos"))
    rows.append((f"pbc report {mine}", "a page with every wrong photo"))
    if onnx:
        rows.append((f"pbc export {mine} -o mine.onnx", "for any ONNX runtime"))
    if held_out:
        again = shlex.join(["pbc", "train", str(bundle), str(data), "--val", "none", "-o"])
        rows.append((f"{again} {mine}-all", "learn from the held-out photos too"))
    return ["next:", *(f"  {command}  # {why}" for command, why in rows)]


def _more(count: int, shown: int) -> str:
    return f" and {count - shown} more" if count > shown else ""
