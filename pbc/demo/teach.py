"""The demo as a function: photos into a folder, training, measuring, a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from pbc.data import ImageFolder
from pbc.demo import digits
from pbc.errors import PbcError
from pbc.model import Model, Prediction, load
from pbc.report.personal import Report
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.output.validation import Validation
from pbc.util.atomic import replace_bytes

_FOR_TRAINING = 100


@dataclass(frozen=True)
class Demo:
    """What came of it: the model, how it did on digits that it never saw, and where the report is.

    samples: photos that it learnt from. seconds: what that took, decoding included. prediction: for
    the photo `photo`.
    """

    model: Model
    samples: int
    seconds: float
    evaluation: Evaluation
    photo: Path
    prediction: Prediction
    report: Path


def teach(folder: Path, *, progress: bool = True) -> Demo:
    """Teach the network that ships with pbc the digits that it does not know, in a new folder.

    progress: show how far it is. Raises PbcError for a folder that is there already.
    """
    if folder.exists():
        raise PbcError(f"{folder} exists already; give a folder that does not (-o)")
    for digit in range(digits.KNOWN, len(digits.COUNTS)):
        for number, picture in enumerate(digits.of(digit)):
            part = "train" if number < _FOR_TRAINING else "test"
            file = folder / "photos" / part / str(digit) / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file)
    bundle = folder / digits.BUNDLE.name
    bundle.write_bytes(digits.BUNDLE.read_bytes())
    model = load(bundle, progress=progress)
    began = perf_counter()
    model.fit(folder / "photos" / "train", val=None, out=folder / "mine")
    seconds = perf_counter() - began
    test = ImageFolder.open(folder / "photos" / "test", model.spec, held_out=True)
    evaluation = model.evaluate(folder / "photos" / "test")
    found = Validation.of(evaluation, test.with_classes(model.personal.classes))
    report = folder / "report.html"
    page = Report.of(model.folder, found, "that it has not seen")
    replace_bytes(report, page.html().encode())
    photo = next(iter(sorted((folder / "photos" / "test").glob("*/*.png"))))
    prediction = model.predict(photo)
    assert isinstance(prediction, Prediction)
    samples = model.personal.model["samples"]
    return Demo(model, samples, seconds, evaluation, photo, prediction, report)
