"""A cached feature is the computed one, bit for bit, or it is computed again."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbc.errors import PbcError
from pbc.runtime.features.cache import FeatureCache, assign_slots
from pbc.runtime.features.keys import chunk_keys
from pbc.runtime.features.stores import DiskStore, Layout, MemoryStore, Store

LAYOUT = Layout({"map": (2, 3, 4), "flat": (5,), "tokens": (2, 3)})
COUNT = 10


def features(indices: np.ndarray, level: int = 0) -> dict[str, np.ndarray]:
    """Something that depends on the sample, and on what shares its chunk as rounding does."""
    result = {}
    for name, shape in LAYOUT.shapes.items():
        random = np.random.default_rng(int(indices.sum()) + 1000 * level)
        value = random.normal(size=(len(indices), *shape)).astype(np.float32)
        if len(shape) == 3:
            value = np.ascontiguousarray(value.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        result[name] = value
    return result


class Source:
    """A prefix that counts what it computes."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []

    def __call__(self, level: int, indices: np.ndarray) -> Mapping[str, np.ndarray]:
        self.calls.append((level, indices.tolist()))
        return features(indices, level)


def contents(count: int = COUNT) -> list[bytes]:
    return [hashlib.sha256(bytes([at])).digest() for at in range(count)]


def fill(
    store: Store,
    levels: list[int] | None = None,
    capacity: int = COUNT,
    salt: bytes = b"",
    samples: list[bytes] | None = None,
) -> tuple[FeatureCache, Source]:
    cache = FeatureCache(LAYOUT, store, assign_slots(COUNT, capacity, 0))
    source = Source()
    of_samples = np.array(levels or [0] * COUNT)
    cache.fill(
        np.arange(COUNT),
        of_samples,
        samples or contents(),
        lambda level: 4,
        lambda level: salt + bytes([level]),
        source,
        lambda done, total: None,
    )
    return cache, source


def disk(folder: Path, count: int = COUNT, dtype: str = "float32") -> DiskStore:
    return DiskStore(folder, count, LAYOUT.width, dtype)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_packing_is_undone_by_unpacking() -> None:
    value = features(np.arange(3))
    rows = LAYOUT.pack(value)
    assert rows.shape == (3, LAYOUT.width)
    assert same(LAYOUT.unpack(rows), value)


def test_a_map_comes_back_in_the_memory_order_that_engines_want() -> None:
    value = Layout({"map": (2, 3, 4)}).unpack(np.zeros((5, 24), np.float32))["map"]
    assert value.shape == (5, 2, 3, 4)
    assert value.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_chunks_are_per_level_in_the_order_of_the_samples(kind: str, tmp_path: Path) -> None:
    store = disk(tmp_path) if kind == "disk" else MemoryStore(COUNT, LAYOUT.width, "float32")
    cache, source = fill(store, [0, 1, 0, 0, 1, 0, 0, 1, 0, 0])
    assert source.calls == [(0, [0, 2, 3, 5]), (0, [6, 8, 9]), (1, [1, 4, 7])]
    assert cache.complete
    assert same(cache.gather(cache.slots[[6, 8, 9]]), features(np.array([6, 8, 9])))
    assert same(cache.gather(cache.slots[[1, 4, 7]]), features(np.array([1, 4, 7]), 1))


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_what_is_there_already_is_not_computed_again(kind: str, tmp_path: Path) -> None:
    store = disk(tmp_path) if kind == "disk" else MemoryStore(COUNT, LAYOUT.width, "float32")
    _, first = fill(store)
    _, second = fill(store)
    _, moved = fill(store, [0] * 8 + [1] * 2)
    assert (len(first.calls), second.calls) == (3, [])
    assert moved.calls == [(1, [8, 9])]


def test_a_part_may_be_filled_first(tmp_path: Path) -> None:
    cache = FeatureCache(LAYOUT, MemoryStore(8, LAYOUT.width, "float32"), assign_slots(COUNT, 8, 0))
    source = Source()
    first = np.array([7, 2, 3])
    for rows in (first, np.setdiff1d(np.arange(COUNT), first), first):
        cache.fill(
            rows, np.zeros(COUNT, int), contents(), lambda level: 4, lambda level: b"", source,
            lambda done, total: None,
        )  # fmt: skip
    held = set(np.flatnonzero(cache.slots >= 0).tolist())
    assert source.calls[0][1] == [at for at in (7, 2, 3) if at in held]
    assert sorted(at for _, rows in source.calls for at in rows) == sorted(held)


def test_a_disk_cache_is_found_again(tmp_path: Path) -> None:
    fill(disk(tmp_path))
    cache, source = fill(disk(tmp_path))
    assert source.calls == []
    assert same(cache.gather(cache.slots[:4]), features(np.arange(4)))


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    disk(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize(
    "change",
    [
        {"salt": b"another prefix"},
        {"levels": [1] * COUNT},
        {"samples": contents(COUNT + 1)[1:]},
    ],
)
def test_what_was_computed_from_something_else_is_not_used(
    tmp_path: Path, change: dict[str, object]
) -> None:
    fill(disk(tmp_path))
    _, source = fill(disk(tmp_path), **change)  # type: ignore[arg-type]
    assert sum(len(indices) for _, indices in source.calls) == COUNT


def test_a_new_photo_spares_the_chunks_before_it(tmp_path: Path) -> None:
    fill(disk(tmp_path))
    changed = [*contents()[:8], b"n" * 32, contents()[9]]
    _, source = fill(disk(tmp_path), samples=changed)
    assert source.calls == [(0, [8, 9])]


@pytest.mark.parametrize("file", ["features.bin", "index.bin"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_torn_write_is_computed_again(tmp_path: Path, file: str, share: float) -> None:
    fill(disk(tmp_path))
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    cache, source = fill(disk(tmp_path))
    assert len(source.calls) == 1
    for chunk in (np.arange(4), np.arange(4, 8), np.arange(8, 10)):
        assert same(cache.gather(cache.slots[chunk]), features(chunk))


def test_a_lost_tail_is_computed_again(tmp_path: Path) -> None:
    fill(disk(tmp_path))
    path = tmp_path / "features.bin"
    path.write_bytes(path.read_bytes()[: LAYOUT.width * 4 * 5])
    cache, source = fill(disk(tmp_path))
    assert source.calls == [(0, [4, 5, 6, 7]), (0, [8, 9])]
    assert same(cache.gather(cache.slots[4:8]), features(np.arange(4, 8)))


def test_what_does_not_fit_is_never_cached() -> None:
    cache, source = fill(MemoryStore(3, LAYOUT.width, "float32"), capacity=3)
    assert not cache.complete
    assert (cache.slots >= 0).sum() == 3
    assert source.calls == [(0, np.flatnonzero(cache.slots >= 0).tolist())]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 5))
def test_slots_are_distinct_and_repeatable(samples: int, capacity: int, seed: int) -> None:
    slots = assign_slots(samples, capacity, seed)
    used = slots[slots >= 0]
    assert sorted(used.tolist()) == list(range(min(samples, capacity)))
    assert (slots == assign_slots(samples, capacity, seed)).all()


def test_float16_halves_the_space_and_rounds(tmp_path: Path) -> None:
    cache, _ = fill(disk(tmp_path, dtype="float16"))
    assert (tmp_path / "features.bin").stat().st_size == COUNT * LAYOUT.width * 2
    gathered = cache.gather(cache.slots[:4])
    for name, value in features(np.arange(4)).items():
        assert gathered[name].dtype == np.float32
        np.testing.assert_allclose(gathered[name], value, rtol=1e-3, atol=1e-6)
    _, source = fill(disk(tmp_path, dtype="float16"))
    assert source.calls == []


def test_float16_refuses_what_it_cannot_hold() -> None:
    layout = Layout({"x": (1,)})
    cache = FeatureCache(layout, MemoryStore(1, 1, "float16"), np.array([0]))
    with pytest.raises(PbcError, match="7e\\+04, beyond float16's 65504: use --cache-dtype"):
        cache.put(np.array([0]), [b""], {"x": np.array([[7e4]], np.float32)})


def test_keys_depend_on_everything() -> None:
    """On the level, on what shares the chunk, and on the size that a short chunk is padded to."""
    keys = [
        *chunk_keys(b"level", 4, [b"a", b"b"]),
        *chunk_keys(b"other", 4, [b"a", b"b"]),
        *chunk_keys(b"level", 4, [b"b", b"a"]),
        *chunk_keys(b"level", 8, [b"a", b"b"]),
    ]
    assert len(set(keys)) == 8
    assert all(len(key) == 32 for key in keys)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(PbcError, match=r"features\.bin: File too large.*--cache ram needs no"):
            disk(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_cache_holds_only_what_was_filled_or_verified(tmp_path: Path) -> None:
    everybody = np.arange(COUNT)

    def opened() -> FeatureCache:
        store = DiskStore(tmp_path, COUNT, LAYOUT.width, "float32")
        return FeatureCache(LAYOUT, store, np.arange(COUNT))

    def fill_rows(cache: FeatureCache, rows: np.ndarray) -> None:
        cache.fill(
            rows,
            np.zeros(COUNT, np.int64),
            contents(),
            lambda level: 4,
            lambda level: b"key",
            lambda level, chunk: features(chunk),
            lambda done, total: None,
        )

    cache = opened()
    assert not cache.holds(everybody).any()
    fill_rows(cache, everybody[:6])
    assert cache.holds(everybody).tolist() == [True] * 6 + [False] * 4
    again = opened()  # rows are on the disk, but nobody compared their keys yet
    assert not again.holds(everybody).any()
    fill_rows(again, everybody[:6])
    assert again.holds(everybody).tolist() == [True] * 6 + [False] * 4
