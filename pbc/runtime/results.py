"""What a run leaves: the personal model, the level that it runs at, and what it is worth there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pbc.data import Samples
from pbc.runtime.evaluation import Evaluation, evaluate
from pbc.runtime.level_trial import LevelTrial, Tried
from pbc.runtime.options import AUTO
from pbc.runtime.output.personal import write_model
from pbc.runtime.output.validation import Validation
from pbc.runtime.parameters import labelled_as
from pbc.runtime.routing.context import RunContext
from pbc.runtime.routing.prepared import Prepared


@dataclass
class Results:
    """The outcome of one run, written as often as there is something new.

    val: what it is measured on, if anything. level: that the model runs at. tried: what is known of
    it and others.
    """

    context: RunContext
    val: Samples | None
    level: int = 0
    tried: tuple[Tried, ...] = ()

    def evaluate(self, samples: Samples) -> Evaluation:
        """Evaluate the parameters as they are now, at the model's level."""
        context = self.context
        labelled = labelled_as(context.samples.classes, samples)
        return evaluate(context.executable, labelled, self.level, context.batch)

    def write(self, floor: float, metrics: Mapping[str, Any]) -> None:
        """Write the personal model of the parameters as they are now."""
        context, options = self.context, self.context.options
        write_model(
            context.output,
            context.bundle,
            context.executable.parameters(),
            classes=tuple(context.samples.classes),
            batch=context.batch,
            samples=len(context.samples),
            options={**options.to_json(), **options.resolved(context.batch)},
            fidelity_floor=floor,
            metrics=metrics,
            level=self.level,
            levels=[tried.to_json() for tried in self.tried],
        )

    def finish(
        self, run: Prepared, epochs: int, head: Mapping[str, float | int | None] | None
    ) -> tuple[Validation | None, dict[str, Any]]:
        """Choose the level if that is left to the run, evaluate, and write the last model.

        epochs: that were done. head: how it was found in closed form, if it was. Returns what was
        evaluated, and the last line of the metrics.
        """
        if self.context.options.deploy_level == AUTO:
            self._choose_level(run, epochs)
        final: dict[str, Any] = {"final": True, "epochs": epochs}
        validation = None
        if self.val is not None:
            result = self.evaluate(self.val)
            validation = Validation.of(result, self.val)
            validation.save(self.context.output.validation)
            final |= {"val_accuracy": result.accuracy, "val_loss": result.loss}
        if head is not None:
            final["head"] = dict(head)
        if run.decisions.findings:
            final["audit"] = [found.to_json() for found in run.decisions.findings]
        self.write(run.floor, final)
        return validation, final

    def _choose_level(self, run: Prepared, epochs: int) -> None:
        """Try the levels on the held-out samples, and go on with the one to deploy."""
        context = self.context
        if self.val is None:
            context.note("level 0 is deployed: no photos are held out to choose another by")
            return
        self.write(run.floor, {"final": False, "epochs": epochs})  # for whoever stops meanwhile
        trial = LevelTrial(context, run, self.val, context.executable.parameters())
        self.tried = trial()
        chosen = trial.cheapest(self.tried)
        self.level = chosen.level
        context.executable.start(chosen.theta, context.options.objective)
        context.note(trial.told(self.tried, chosen))
