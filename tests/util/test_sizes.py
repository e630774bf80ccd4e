from __future__ import annotations

import pytest

from pbc.util.sizes import memory_text, size_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1 KB"),
        (812_900, "813 KB"),
        (999_400, "999 KB"),
        (999_600, "1.0 MB"),
        (12_345_678, "12.3 MB"),
        (999_900_000, "1.0 GB"),
        (5_000_000_000_000, "5000.0 GB"),
    ],
)
def test_sizes_have_the_unit_that_reads_best(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(1_000, "1000 bytes"), (2**10, "1 KiB"), (2**19, "512 KiB"), (2**20, "1.0 MiB"),
     (3 * 2**29, "1.5 GiB"), (2**40, "1024.0 GiB")],
)  # fmt: skip
def test_memory_counts_in_powers_of_two(count: int, text: str) -> None:
    assert memory_text(count) == text
