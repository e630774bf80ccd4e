"""Operations that are run without their numbers: what they hold, and until when."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pbc.training_graph.operations import Operation, run
from pbc.training_graph.pool import Pool

KIB = 1024


def make(name: str, *reads: str, kib: int = 1, within: str | None = None) -> Operation:
    return Operation(reads, {name: kib * KIB}, within=within)


def kib_of(operations: Sequence[Operation], results: Collection[str] = ()) -> float:
    pool = Pool()
    for chunk in run(operations, results, pool):
        pool.release(chunk)
    return pool.total_bytes / KIB


def test_what_nobody_reads_any_more_is_taken_again() -> None:
    chain = [make("a", "x"), make("b", "a"), make("c", "b"), make("d", "c")]
    assert kib_of(chain) == 2
    assert kib_of(chain, ["a"]) == 3  # who asks for it holds it


def test_what_is_read_later_stays() -> None:
    assert kib_of([make("a", "x"), make("b", "a"), make("c", "b"), make("d", "a", "c")]) == 3


def test_a_view_takes_nothing_and_holds_what_it_is_of() -> None:
    view = make("v", "a", within="a")
    assert kib_of([make("a", "x"), view, make("b", "v")]) == 2
    assert kib_of([make("a", "x"), view, make("b", "x"), make("c", "v")], ["b"]) == 3
    assert kib_of([make("a", "x"), view, make("b", "x")], ["v"]) == 2
    assert kib_of([make("v", "x", within="x"), make("b", "v")]) == 1  # of an input


def test_a_workspace_is_held_beside_the_result_alone() -> None:
    working = Operation(("x",), {"a": KIB}, workspace_bytes=2 * KIB)
    assert kib_of([working, make("b", "a"), make("c", "a", "b")]) == 3


def test_of_several_results_those_that_nobody_reads_go_at_once() -> None:
    both = Operation(("x",), {"a": KIB, "b": 4 * KIB})
    assert kib_of([both, make("c", "a", kib=4)]) == 5


def test_the_results_stay_until_they_are_given_back() -> None:
    pool = Pool()
    held = run([make("a", "x"), make("b", "a")], ["b"], pool)
    assert [chunk.size for chunk in held] == [KIB]
    run([make("a", "x"), make("b", "a")], [], pool)
    assert pool.total_bytes == 3 * KIB


def test_what_others_gave_back_is_taken_first() -> None:
    pool = Pool(held_bytes=3 * KIB)
    pool.spare_bytes = 3 * KIB
    pool.allocate(2 * KIB)
    assert pool.total_bytes == 3 * KIB
    pool.allocate(2 * KIB)  # what is left of it is too small
    assert pool.total_bytes == 5 * KIB
