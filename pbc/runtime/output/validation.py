"""What a personal model got right and wrong on photos that it was not trained on."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pbc.data import Samples
from pbc.errors import PbcError
from pbc.runtime.evaluation import Evaluation
from pbc.util import strict_json
from pbc.util.atomic import replace_bytes
from pbc.util.shapes import check, integer, list_of, number, record, text

_SHAPE = record(
    {
        "accuracy": number(0, 1),
        "loss": number(),
        "count": integer(1),
        "classes": list_of(record({"class": text(), "count": integer(1), "right": integer()})),
        "wrong": list_of(
            record(
                {"photo": text(), "class": text(), "answer": text(), "probability": number(0, 1)}
            )
        ),
    },
    more=True,
)


@dataclass(frozen=True)
class WrongPhoto:
    """A photo that a model took for another class, and how probable it held that to be."""

    photo: str
    label: str
    answer: str
    probability: float

    def to_json(self) -> dict[str, Any]:
        return {
            "photo": self.photo,
            "class": self.label,
            "answer": self.answer,
            "probability": self.probability,
        }


@dataclass(frozen=True)
class Validation:
    """An evaluation with the photos behind it.

    classes: per class name (photos, right answers). wrong: the surest mistakes first.
    """

    evaluation: Evaluation
    classes: dict[str, tuple[int, int]]
    wrong: tuple[WrongPhoto, ...]

    @classmethod
    def of(cls, evaluation: Evaluation, samples: Samples) -> Validation:
        """Bring together what was answered for samples, and what they are."""
        right = evaluation.answers == samples.labels
        counts = np.bincount(samples.labels, minlength=len(samples.classes))
        rights = np.bincount(samples.labels[right], minlength=len(samples.classes))
        mistakes = np.flatnonzero(~right)
        order = np.argsort(-evaluation.probabilities[mistakes], kind="stable")
        return cls(
            evaluation,
            {
                name: (int(count), int(found))
                for name, count, found in zip(samples.classes, counts, rights, strict=True)
                if count
            },
            tuple(
                WrongPhoto(
                    samples.path(index),
                    samples.classes[samples.labels[index]],
                    samples.classes[evaluation.answers[index]],
                    float(evaluation.probabilities[index]),
                )
                for index in mistakes[order].tolist()
            ),
        )

    @classmethod
    def load(cls, path: Path) -> Validation:
        """Read what `save` wrote; what was answered for single photos is not in it."""
        try:
            data = strict_json.load(path)
            check(data, _SHAPE)
            nothing = np.empty(0)
            evaluation = Evaluation(
                data["accuracy"], data["loss"], data["count"], nothing.astype(np.int64), nothing
            )
            classes = {row["class"]: (row["count"], row["right"]) for row in data["classes"]}
            wrong = tuple(
                WrongPhoto(row["photo"], row["class"], row["answer"], row["probability"])
                for row in data["wrong"]
            )
        except (OSError, ValueError) as error:
            raise PbcError(f"{path} is damaged: {error}") from error
        return cls(evaluation, classes, wrong)

    def confused(self) -> dict[tuple[str, str], int]:
        """Return how many photos of a class were taken for another one: (class, answer)."""
        return Counter((photo.label, photo.answer) for photo in self.wrong)

    def worst_classes(self) -> list[tuple[str, int, int]]:
        """Return (class, photos, right answers) where not all are right, the worst first."""
        rows = [(name, count, right) for name, (count, right) in self.classes.items()]
        faulty = [row for row in rows if row[2] < row[1]]
        return sorted(faulty, key=lambda row: (row[2] / row[1], row[2] - row[1], row[0]))

    def to_json(self) -> dict[str, Any]:
        return {
            **self.evaluation.to_json(),
            "classes": [
                {"class": name, "count": count, "right": right}
                for name, (count, right) in self.classes.items()
            ],
            "wrong": [photo.to_json() for photo in self.wrong],
        }

    def save(self, path: Path) -> None:
        """Write it as JSON, readable by its owner only: it names photos."""
        replace_bytes(path, (json.dumps(self.to_json(), indent=1) + "\n").encode())
