"""A bundle or a personal model as one object to fit, score and ask: `pbc.load`.

m = pbc.load("resnet.pbc")
m.fit("photos/train", epochs=12)
m.score("photos/test")
m.predict("photo.jpg")
m.save("mine")
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pbc.bundle import Bundle
from pbc.bundle.trust import open_trusted
from pbc.callbacks import Callback, together
from pbc.cli.display import TrainDisplay
from pbc.data import InputSpec, Samples, images, read_image
from pbc.data.arrays import pixels
from pbc.data.held_out import DEFAULT_SHARE, default_validation, held_out_of
from pbc.data.sources import is_hub, open_samples
from pbc.errors import PbcError
from pbc.runtime.evaluation import Evaluation
from pbc.runtime.options import TrainOptions
from pbc.runtime.output.export import export
from pbc.runtime.output.folder import Output
from pbc.runtime.output.personal import Personal
from pbc.runtime.output.validation import Validation
from pbc.runtime.runtime import Runtime
from pbc.util.sizes import size_text


def load(path: Path | str, *, progress: bool = True) -> Model:
    """Open a bundle (`resnet.pbc`) or a personal model (the folder that training wrote).

    progress: whether `fit` and `score` show how far they are. Raises PbcError for neither.
    """
    path = Path(path)
    if path.is_dir() and Output(path).is_run():
        return Model(Personal.open(path).bundle, Output(path), progress=progress)
    return Model(open_trusted(path), None, progress=progress)


class Model:
    """A network to personalise: `fit`, then `score`, `predict`, `export` and `save`."""

    def __init__(self, bundle: Bundle, output: Output | None, *, progress: bool = True) -> None:
        self.bundle = bundle
        self._output = output
        self._progress = progress
        self._personal: Personal | None = None
        self.validation: Validation | None = None

    @property
    def spec(self) -> InputSpec:
        """Return how a photo becomes the network's input."""
        return InputSpec.from_json(self.bundle.manifest["input"])

    @property
    def classes(self) -> list[str] | None:
        """Return class names by label; None before training, where the bundle names none."""
        if self._output is not None:
            return self.personal.classes
        names = self.bundle.manifest["classes"]
        return None if names is None else list(names)

    @property
    def folder(self) -> Path:
        """Return the folder of the personal model; it goes with this object, if `fit` chose it."""
        return self._trained().root

    @property
    def personal(self) -> Personal:
        """Return what `fit` made, loaded; raises PbcError before."""
        if self._personal is None:
            self._personal = Personal.open(self._trained().root)
        return self._personal

    def fit(
        self,
        data: Any,
        *,
        val: Any = DEFAULT_SHARE,
        out: Path | str | None = None,
        callbacks: Iterable[Callback | str] = (),
        resume: bool = False,
        overwrite: bool = False,
        **options: Any,
    ) -> Model:
        """Train on labelled photos, from the bundle's weights; return this model.

        data: see pbc.data.sources.open_samples. val: other photos to measure the result on, or the
        share to hold out of each class; None trains on all. The result is in `validation`.
        out: folder of the result; by default a temporary one, which `save` copies.
        callbacks: called with every event of pbc.runtime.events, or names of `pbc plugins`.
        options: fields of pbc.runtime.options.TrainOptions, such as epochs or learning_rate.
        Raises PbcError for data and options that cannot be meant.
        """
        known = TrainOptions.__dataclass_fields__
        if unknown := [name for name in options if name not in known]:
            raise PbcError(f"fit has no option {unknown[0]!r}; one of {', '.join(known)}")
        chosen = TrainOptions(**{"head": "auto", **options})  # as `pbc train` does
        with self._shown(chosen.epochs) as display:
            samples = self._samples(data, display, classes=self.bundle.manifest["classes"])
            if isinstance(data, str | Path) and val is DEFAULT_SHARE and not is_hub(data):
                val = default_validation(data)
            if isinstance(val, float):
                samples, held_out = held_out_of(samples, val)
            elif val is None:
                held_out = None
            else:
                held_out = self._samples(val, display, classes=samples.classes, held_out=True)
            root = self._temporary() if out is None else Path(out)
            validation = Runtime.open(self.bundle.path).fit(
                samples,
                chosen,
                root,
                val=held_out,
                resume=resume,
                overwrite=overwrite,
                report=together([display, *callbacks], root, chosen),
            )
        self._output, self._personal, self.validation = Output(root), None, validation
        return self

    def evaluate(self, data: Any, *, level: int | None = None) -> Evaluation:
        """Return accuracy, loss and count on labelled photos; see `fit` for what they may be in.

        level: of the network; by default the one that training left it at.
        """
        with self._shown(1) as display:
            samples = self._samples(data, display, classes=self.classes, held_out=True)
        return self.personal.evaluate(samples, level=level)

    def score(self, data: Any, *, level: int | None = None) -> float:
        """Return the accuracy on labelled photos, in 0…1."""
        return self.evaluate(data, level=level).accuracy

    def predict(self, image: Any, *, level: int | None = None) -> Prediction | list[Prediction]:
        """Name what is in a photo, or in each of several.

        image: a path, a PIL image or an array as pbc.data.arrays.pixels takes it; for several a
        folder or zip, a list, or an array of [N, H, W, C] or [N, C, H, W].
        """
        if isinstance(image, str | Path) and not Path(image).is_file():
            found = images(image, self.spec)
            return [self._seen(found.decode(at), level) for at in range(len(found))]
        if isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4:
            return [self._seen(self._pixels(one), level) for one in image]
        return self._seen(self._pixels(image), level)

    def export(self, path: Path | str, *, level: int | None = None) -> Path:
        """Write FILE.onnx, for any ONNX runtime, or FILE.safetensors; return its path."""
        export(self._trained().root, path, level=level)
        return Path(path)

    def save(self, folder: Path | str) -> Path:
        """Copy the personal model to a folder that `pbc.load` and `pbc predict` open."""
        source, target = self._trained().root, Path(folder)
        if target.exists() and target.resolve() != source.resolve():
            raise PbcError(f"{target} exists already; give a folder that does not")
        if target.resolve() != source.resolve():
            shutil.copytree(source, target)
        self._output = Output(target)
        return target

    def __repr__(self) -> str:
        return f"<pbc.Model {'; '.join(f'{key} {value}' for key, value in self._facts().items())}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(key)}</th>"
            f"<td style='text-align:left'>{escape(value)}</td></tr>"
            for key, value in self._facts().items()
        )
        return f"<table>{rows}</table>"

    def _facts(self) -> dict[str, str]:
        manifest = self.bundle.manifest
        size_bytes = sum(facts["size_bytes"] for facts in manifest["files"].values())
        facts = {
            "model": f"{manifest['model']} ({size_text(size_bytes)})",
            "input": "x".join(map(str, manifest["input"]["shape"])),
            "strategy": manifest["strategy"],
            "levels": str(len(manifest["levels"])),
            "engine": manifest["engine"],
        }
        if self._output is None:
            return {**facts, "state": "not trained"}
        trained = self.personal.model
        accuracy = trained["metrics"].get("val_accuracy")
        facts["classes"] = str(len(trained["classes"]))
        facts["state"] = f"trained on {trained['samples']} photos"
        return facts if accuracy is None else {**facts, "validation": f"{accuracy:.1%}"}

    # ---- what these need -------------------------------------------------------------------

    def _trained(self) -> Output:
        if self._output is None:
            raise PbcError("this model is not trained yet; call fit(photos) first")
        return self._output

    def _temporary(self) -> Path:
        """Make a folder that goes when this object does, or the program ends."""
        root = tempfile.mkdtemp(prefix="pbc-")
        weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        return Path(root) / "model"

    @contextmanager
    def _shown(self, epochs: int) -> Iterator[TrainDisplay]:
        display = TrainDisplay(epochs, quiet=not self._progress)
        with display:
            yield display

    def _samples(
        self,
        data: Any,
        display: TrainDisplay,
        *,
        classes: Sequence[str] | None,
        held_out: bool = False,
    ) -> Samples:
        samples = open_samples(
            data, self.spec, held_out=held_out, classes=classes, progress=display.reading
        )
        for line in samples.inventory.lines():
            display.line(line)
        return samples

    def _pixels(self, image: Any) -> np.ndarray:
        if isinstance(image, str | Path):
            return read_image(image, self.spec)
        return pixels(image, self.spec, "the image")

    def _seen(self, image: np.ndarray, level: int | None) -> Prediction:
        best = self.personal.predict(image, top=len(self.personal.classes), level=level)
        shown = image[..., 0] if image.shape[-1] == 1 else image  # Pillow has grey without channels
        return Prediction(tuple(best), Image.fromarray(shown))


@dataclass(frozen=True)
class Prediction:
    """Every class with its probability, the likeliest first, and what the network was shown."""

    shares: tuple[tuple[str, float], ...]
    image: Image.Image

    @property
    def label(self) -> str:
        """Return the name of the likeliest class."""
        return self.shares[0][0]

    @property
    def probability(self) -> float:
        """Return the probability of the likeliest class, in 0…1."""
        return self.shares[0][1]

    def __repr__(self) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in self.shares[:3])

    def _repr_html_(self) -> str:
        return f"<b>{escape(self.label)}</b> {self.probability:.1%}"
