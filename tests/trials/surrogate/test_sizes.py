"""The algebra of sizes: what is unified, split and pinned."""

from __future__ import annotations

import pytest

from hydro_trials.surrogate.sizes import Size, SizeTable, number, plus, times


@pytest.fixture
def table() -> SizeTable:
    return SizeTable()


def test_what_meets_a_number_is_pinned(table: SizeTable) -> None:
    size, other = table.fresh(8), table.fresh(8)
    table.unify(size, other)
    assert table.resolve(size) == table.resolve(other)
    table.unify(other, number(8))
    assert table.free(size) == set()
    assert table.value(size) == 8


def test_a_flattened_map_follows_its_channels(table: SizeTable) -> None:
    channels, incoming = table.fresh(8), table.fresh(128)
    table.unify(incoming, times(channels, number(16)))
    (atom,) = table.free(incoming)
    assert table.value(incoming, {atom: 2}) == 32


def test_joined_branches_are_a_sum(table: SizeTable) -> None:
    left, right, incoming = table.fresh(8), table.fresh(4), table.fresh(12)
    table.unify(incoming, plus(left, right))
    assert table.free(incoming) == table.free(left) | table.free(right)
    narrow = dict.fromkeys(table.free(left), 2)
    assert table.value(incoming, narrow) == 6, "one branch shrinks, the other does not"


def heads(table: SizeTable, size: Size) -> tuple[Size, Size]:
    halves = table.split(size, 4, "attention", shrink_first=True)
    assert halves is not None
    return halves


def test_the_same_view_gives_the_same_halves(table: SizeTable) -> None:
    size = table.fresh(32)
    one, other = heads(table, size), heads(table, size)
    assert one == other
    assert table.resolve(size) == times(*one)
    assert len(table.splits) == 1


def test_products_unify_factor_by_factor(table: SizeTable) -> None:
    first, second = heads(table, table.fresh(32)), heads(table, table.fresh(32))
    table.unify(times(*first), times(*second))
    assert [table.resolve(size) for size in first] == [table.resolve(size) for size in second]


def test_what_cannot_be_understood_is_pinned(table: SizeTable) -> None:
    left, right = table.fresh(6), table.fresh(4)
    other = table.fresh(5)
    table.unify(plus(left, right), times(number(2), other))
    assert table.free(plus(plus(left, right), other)) == set()
    size = times(table.fresh(6), table.fresh(10))
    assert table.split(size, 4, "view", shrink_first=True) is None
    assert table.free(size) == set()
