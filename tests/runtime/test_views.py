"""Views: the whole image and a fixed set of crops, each computed once and shown in turn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny

from pbc.data import ImageFolder, Samples
from pbc.runtime.features.views import Views, crop_of
from pbc.runtime.options import TrainOptions
from pbc.runtime.runtime import Runtime


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    tiny.photos(tmp_path / "photos", 5)
    return ImageFolder.open(tmp_path / "photos", tiny.SPEC)


def test_view_0_is_the_image_and_no_other_is(samples: Samples) -> None:
    views = Views(samples, 3)
    assert len(views) == 45
    everything = views.images(np.arange(45))
    np.testing.assert_array_equal(everything[:15], samples.images(np.arange(15)))
    for first in (15, 30):
        assert not np.array_equal(everything[first : first + 15], everything[:15])
    assert not np.array_equal(everything[15:30], everything[30:])


def test_the_same_row_is_the_same_pixels_whatever_it_is_asked_with(samples: Samples) -> None:
    views = Views(samples, 4, seed=2)
    alone = np.concatenate([views.images(np.array([row])) for row in (3, 50, 17)])
    np.testing.assert_array_equal(alone, views.images(np.array([3, 50, 17])))


def test_an_epoch_shows_every_sample_once_and_k_epochs_every_view(samples: Samples) -> None:
    views, everybody = Views(samples, 3), np.arange(15)
    shown = [views.rows(epoch, everybody) for epoch in range(3)]
    for rows in shown:
        assert (rows % 15 == everybody).all()
        assert len(set((rows // 15).tolist())) == 3
    assert sorted(np.concatenate(shown).tolist()) == list(range(45))
    np.testing.assert_array_equal(views.rows(3, everybody), shown[0])
    np.testing.assert_array_equal(Views(samples).rows(7, everybody), everybody)


def test_what_no_epoch_shows_is_not_computed(tmp_path: Path, samples: Samples) -> None:
    views, everybody = Views(samples, 4), np.arange(15)
    shown = np.concatenate([views.rows(epoch, everybody) for epoch in range(3)])
    assert views.shown(3).tolist() == sorted(shown.tolist())
    assert len(shown) == 45
    assert views.shown(4).tolist() == views.shown(9).tolist() == list(range(60))
    tiny.write(tmp_path / "m.pbc")
    options = TrainOptions(
        2, augment=7, routing=False, costs=tiny.costs(tmp_path / "costs.json"), cache="ram"
    )
    trainer = Runtime.open(tmp_path / "m.pbc").trainer(samples, options, tmp_path / "out")
    computed = 0
    images = Views.images

    def counted(self: Views, rows: np.ndarray) -> np.ndarray:
        nonlocal computed
        computed += len(set(rows.tolist()))
        return images(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Views, "images", counted)
        trainer.prepare()
        assert computed == 30
        while not trainer.finished:
            trainer.run_epoch()
    assert computed == 30


def test_what_is_in_a_row_is_in_its_key(samples: Samples) -> None:
    contents = Views(samples, 3).contents()
    assert tuple(contents[:15]) == samples.hashes
    assert len(set(contents)) == 45
    again = Views(samples, 2, seed=1).contents()
    assert set(again[15:]).isdisjoint(contents)


def test_crops_keep_most_of_the_image_inside_it() -> None:
    for number in range(200):
        crop = crop_of(number.to_bytes(32, "little"), 1, 0)
        left, top, right, bottom = crop.box
        assert 0 <= left < right <= 1 + 1e-12
        assert 0 <= top < bottom <= 1 + 1e-12
        assert 0.6 <= (right - left) * (bottom - top) <= 1
    assert crop_of(b"a", 1, 0) == crop_of(b"a", 1, 0)
    different = {crop_of(b"a", 1, 0), crop_of(b"a", 2, 0), crop_of(b"b", 1, 0), crop_of(b"a", 1, 1)}
    assert len(different) == 4


def test_a_mirrored_crop_is_the_crop_mirrored(samples: Samples) -> None:
    image = samples.decode(0)
    crop = dataclasses.replace(crop_of(b"a", 1, 0), mirrored=False)
    mirrored = dataclasses.replace(crop, mirrored=True)
    np.testing.assert_array_equal(mirrored(image), crop(image)[:, ::-1])


def test_training_on_views_caches_all_of_them(tmp_path: Path, samples: Samples) -> None:
    tiny.write(tmp_path / "m.pbc")
    runtime = Runtime.open(tmp_path / "m.pbc")
    costs = tiny.costs(tmp_path / "costs.json")
    trained = {}
    for cache in ("off", "ram", "disk"):
        options = TrainOptions(
            6, 0.1, augment=3, cache=cache, skip=False, routing=False, costs=costs
        )
        trainer = runtime.trainer(samples, options, tmp_path / cache)
        trainer.prepare()
        assert trainer.cache_bytes == (0 if cache == "off" else 45 * tiny.CHANNELS * 4)
        losses = []
        while not trainer.finished:
            report = trainer.run_epoch()
            losses.append(report.loss)
            if cache != "off" and report.epoch > 1:
                assert report.stage_seconds["prefix"] == 0
        trained[cache] = trainer.parameters()
    for name, value in trained["off"].items():
        np.testing.assert_allclose(value, trained["ram"][name], atol=1e-5)
        np.testing.assert_array_equal(trained["disk"][name], trained["ram"][name])


def test_other_views_are_not_taken_from_a_cache_on_disk(tmp_path: Path, samples: Samples) -> None:
    tiny.write(tmp_path / "m.pbc")
    runtime = Runtime.open(tmp_path / "m.pbc")
    computed = []
    for seed in (0, 0, 1):
        options = TrainOptions(
            1, augment=2, cache="disk", seed=seed, costs=tiny.costs(tmp_path / "costs.json")
        )
        trainer = runtime.trainer(samples, options, tmp_path / "out")
        trainer.prepare()
        computed.append(trainer.run_epoch().stage_seconds["prefix"] > 0)
    assert computed == [True, False, True]
