"""Sizes into rooms in any arrangement, against trying all of them."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.bigmodel import packing
from tpdist.bigmodel.packing import pack


def fits(sizes: list[int], rooms: list[int], packed: tuple[int, ...] | list[int]) -> bool:
    used = [0] * len(rooms)
    for size, room in zip(sizes, packed, strict=True):
        used[room] += size
    return all(taken <= room for taken, room in zip(used, rooms, strict=True))


@given(sizes=st.lists(st.integers(0, 9), max_size=7), rooms=st.lists(st.integers(0, 15), max_size=3))
def test_a_way_is_found_where_there_is_one(sizes: list[int], rooms: list[int]) -> None:
    packed = pack(sizes, rooms)
    if packed is None:
        assert not any(fits(sizes, rooms, each) for each in product(range(len(rooms)), repeat=len(sizes)))
    else:
        assert fits(sizes, rooms, packed)


def test_equal_sizes_follow_each_other() -> None:
    assert pack([5, 3, 3, 3, 3, 5], [11, 11]) == [0, 0, 0, 1, 1, 1]


def test_many_layers_that_are_alike_are_packed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_TRIES", 1000)
    sizes = [700, *[123] * 500, 700]
    packed = pack(sizes, [123 * 100] * 4 + [123 * 100 + 1400])
    assert packed is not None
    assert {packed[0], packed[-1]} == {4}


def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_TRIES", 3)
    assert pack([6, 6, 5, 5, 5, 5], [16, 16]) is None
