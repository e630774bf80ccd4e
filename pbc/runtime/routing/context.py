"""All that a decision about a run may depend on, in one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from pbc import plugins
from pbc.bundle import Bundle
from pbc.bundle.ladder import SGD, Ladder
from pbc.data import Samples
from pbc.runtime.engines import Engine, Executable
from pbc.runtime.engines.bounds import photos_at_once
from pbc.runtime.events import Note, Report
from pbc.runtime.features.source import Made
from pbc.runtime.features.views import Views
from pbc.runtime.meter import Meter
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.folder import Output
from pbc.runtime.routing.routes import Routes
from pbc.runtime.schedulers import SchedulerClass


@dataclass(frozen=True)
class RunContext:
    """A bundle, samples, options, and where time and notes go.

    progress: told (stage, done, total); may raise to stop. made: features that measuring made, by
    level and rows: they need not be made again. head: how the head is made, SGD or CLOSED.
    """

    bundle: Bundle
    engine: Engine
    executable: Executable
    samples: Samples
    options: TrainOptions
    batch: int
    meter: Meter
    output: Output
    report: Report
    progress: Callable[[str, int, int], None]
    made: Made = field(default_factory=dict)
    head: str = SGD

    @functools.cached_property
    def ladder(self) -> Ladder:
        """The bundle's levels."""
        return self.bundle.ladder

    @functools.cached_property
    def photos_at_once(self) -> int:
        """The photos that a call of a prefix has at most, whatever was measured or asked for."""
        return photos_at_once(self.bundle.manifest)

    @functools.cached_property
    def routes(self) -> Routes:
        """The levels that bundle and options leave open."""
        return Routes(self.bundle.manifest, self.ladder, self.options, self.head)

    @functools.cached_property
    def views(self) -> Views:
        """The samples' views."""
        return Views(self.samples, self.options.views, self.options.seed)

    @functools.cached_property
    def scheduler_class(self) -> SchedulerClass:
        """The scheduler that the options name; raises UsageError for an unknown one."""
        found: SchedulerClass = plugins.load("pbc.schedulers", self.options.scheduler)
        return found

    def note(self, text: str) -> None:
        """Report a line that the user should read."""
        self.report(Note(text))
