"""Show a training run: a live bar on a terminal, a line per epoch anywhere else."""

from __future__ import annotations

import math
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from pbc.runtime.events import (
    EpochReport,
    Event,
    Finished,
    Note,
    Plan,
    Progress,
    StepReport,
)

_REFRESH_SECONDS = 0.1


class TrainDisplay:
    """A report callback that draws; costs next to nothing per step."""

    def __init__(self, epochs: int, *, quiet: bool = False) -> None:
        self._epochs = epochs
        self._console = Console(stderr=True, quiet=quiet)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._live,
        )
        self._stage = ""
        self._shown_at = 0.0
        self._longest = 0

    def __enter__(self) -> TrainDisplay:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Take an event of the run."""
        if isinstance(event, Note):
            self.line(event.text)
        elif isinstance(event, Plan):
            self._epochs = event.epochs
        elif isinstance(event, EpochReport):
            self.line(epoch_line(event, self._epochs))
        elif not isinstance(event, Finished) and self._live and self._due(event):
            self._draw(event)

    def reading(self, done: int, total: int) -> None:
        """Show how far the decoding of photos is."""
        self(Progress("reading", done, total))

    def line(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _due(self, event: Progress | StepReport) -> bool:
        now = monotonic()
        last = event.done == event.total if isinstance(event, Progress) else False
        if not last and now - self._shown_at < _REFRESH_SECONDS:
            return False
        self._shown_at = now
        return True

    def _draw(self, event: Progress | StepReport) -> None:
        if isinstance(event, Progress):
            self._advance(event.stage, event.done, event.total, "")
            return
        # Epochs visit different numbers of samples; in the bar all have the length of the fullest.
        self._longest = longest = max(self._longest, event.total)
        done = (event.epoch - 1) * longest + longest * event.samples // event.total
        loss = "" if math.isnan(event.loss) else f"loss {loss_text(event.loss, 3)}  "
        facts = f"{loss}{level_shares(event.levels)}"
        self._advance("training", done, self._epochs * longest, facts)

    def _advance(self, stage: str, done: int, total: int, facts: str) -> None:
        if stage != self._stage:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(stage, total=total, completed=done, facts=facts)
            self._stage = stage
        self._bars.update(self._bars.task_ids[0], completed=done, total=total, facts=facts)


def epoch_line(report: EpochReport, epochs: int) -> str:
    """Return one line that says how an epoch went."""
    skipped = ""
    visited = sum(report.levels)
    planned = visited + report.unvisited_samples
    if report.unvisited_samples:
        skipped += f"  stopped at {visited}/{planned} samples"
    if report.skipped_updates:
        skipped += f"  skipped {report.skipped_updates}/{report.steps} updates"
    if report.skipped_samples:
        share = report.skipped_samples / (report.skipped_samples + planned)
        skipped += f"  skipped {share:.0%} of samples"
    loss = "" if math.isnan(report.loss) else f"loss {loss_text(report.loss)}  "
    return (
        f"epoch {report.epoch}/{epochs}  {loss}"
        f"{level_shares(report.levels)}  "
        f"{report.samples_per_second:.0f} samples/s{skipped}"
    )


def loss_text(loss: float, digits: int = 4) -> str:
    """Return a loss with so many digits behind the point; one of a run gone astray by its size."""
    return f"{loss:.{digits}f}" if loss < 1e4 else f"{loss:.1e}"


def level_shares(visits: tuple[int, ...]) -> str:
    """Return the share of every level that was visited, like `L0 62% L2 38%`."""
    total = max(sum(visits), 1)
    return " ".join(
        f"L{level} {100 * count / total:.0f}%" for level, count in enumerate(visits) if count
    )
