"""Blocks by number: free + cached + used = all after every call, and the order in which they are given out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpdist.engine.block_manager import BlockManager


def digest(number: int) -> bytes:
    return bytes([number])


def filled(manager: BlockManager, *numbers: int) -> list[int]:
    """Allocate a block for each of `numbers`, and make it known by that digest."""
    blocks = manager.allocate(len(numbers))
    for block, number in zip(blocks, numbers, strict=True):
        manager.register(block, digest(number))
    return blocks


def known(manager: BlockManager, *numbers: int) -> list[int]:
    return [number for number in numbers if manager.find(digest(number)) is not None]


def test_the_most_recently_freed_block_is_given_out_first_and_others_are_not_touched() -> None:
    manager = BlockManager(num_blocks=6, block_size=2)
    first = manager.allocate(2)
    manager.free(first)
    assert manager.allocate(2) == first
    assert manager.allocate(1) not in [[block] for block in first]


def test_free_blocks_are_given_out_before_a_cached_one_is_dropped() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    manager.free(filled(manager, 1, 2))
    assert manager.num_available == 4
    manager.allocate(2)
    assert known(manager, 1, 2) == [1, 2]
    manager.allocate(1)
    assert known(manager, 1, 2) == [1]


def test_the_last_block_of_a_sequence_is_dropped_before_its_first() -> None:
    manager = BlockManager(num_blocks=3, block_size=2)
    manager.free(filled(manager, 1, 2, 3))
    left = []
    for _ in range(3):
        manager.allocate(1)
        left.append(known(manager, 1, 2, 3))
    assert left == [[1, 2], [1], []]


def test_a_block_shared_again_is_dropped_after_those_that_were_not() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    old, new = filled(manager, 1, 2)
    manager.free([old])
    manager.free([new])
    manager.share([old])
    manager.free([old])
    manager.allocate(1)
    assert known(manager, 1, 2) == [1]


def test_a_shared_block_is_used_until_its_last_holder_gives_it_back() -> None:
    manager = BlockManager(num_blocks=2, block_size=2)
    blocks = filled(manager, 1)
    manager.share(blocks)
    assert manager.num_cached_of(blocks) == 0
    manager.free(blocks)
    manager.check([blocks])
    assert (manager.num_used, manager.num_cached, manager.num_available) == (1, 0, 1)
    manager.free(blocks)
    manager.check([])
    assert (manager.num_used, manager.num_cached, manager.num_available) == (0, 1, 2)
    assert manager.num_cached_of(blocks) == 1


def test_the_first_block_with_a_content_stays_known() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    first = filled(manager, 1)
    second = filled(manager, 1)
    assert manager.find(digest(1)) == first[0]
    manager.free(second)
    manager.check([first])
    assert manager.num_cached == 0


def test_promised_blocks_are_not_available_to_others() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    manager.promise(3)
    assert manager.num_available == 1
    with pytest.raises(AssertionError, match="2 blocks wanted, 1 available"):
        manager.allocate(2)
    manager.promise(-3)
    assert len(manager.allocate(4)) == 4
    with pytest.raises(AssertionError, match="promised"):
        manager.promise(1)


def test_a_block_given_back_twice_is_refused() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    blocks = manager.allocate(2)
    manager.free(blocks)
    with pytest.raises(AssertionError, match="nobody holds it"):
        manager.free(blocks)


def test_the_check_notices_a_holder_that_is_not_counted() -> None:
    manager = BlockManager(num_blocks=4, block_size=2)
    blocks = manager.allocate(2)
    manager.check([blocks])
    for wrong in ([], [blocks, blocks[:1]], [[*blocks, 3]]):
        with pytest.raises(AssertionError, match="held"):
            manager.check(wrong)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.lists(st.integers(0, 20), min_size=1, max_size=4)),
        st.tuples(st.just("share"), st.lists(st.integers(0, 20), min_size=1, max_size=4, unique=True)),
        st.tuples(st.just("free"), st.integers(0, 9)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(operations, st.integers(1, 8))
def test_what_was_given_back_longest_ago_is_dropped_first_whatever_happens(
    events: list[tuple[str, list[int] | int]], num_blocks: int
) -> None:
    """`released` is the model: contents that nobody holds, the one given back longest ago first."""
    manager = BlockManager(num_blocks=num_blocks, block_size=1)
    holders: list[list[int]] = []
    contents: dict[int, int] = {}
    released: list[int] = []
    for kind, value in events:
        if kind == "fill" and isinstance(value, list) and len(value) <= manager.num_available:
            evicted = max(0, len(value) - (num_blocks - manager.num_used - manager.num_cached))
            dropped, released = released[:evicted], released[evicted:]
            assert known(manager, *dropped) == dropped
            holders.append(manager.allocate(len(value)))
            assert known(manager, *dropped) == []
            for block, number in zip(holders[-1], value, strict=True):
                manager.register(block, digest(number))
                contents[block] = number
        elif kind == "share" and isinstance(value, list):
            found = [block for number in value if (block := manager.find(digest(number))) is not None]
            manager.share(found)
            holders.append(found)
            released = [number for number in released if number not in {contents[block] for block in found}]
        elif kind == "free" and isinstance(value, int) and value < len(holders):
            blocks = holders.pop(value)
            manager.free(blocks)
            held = {block for each in holders for block in each}
            gone = [block for block in reversed(blocks) if block not in held]
            released += [contents[block] for block in gone if manager.find(digest(contents[block])) == block]
        manager.check(holders)
        assert known(manager, *released) == released
        assert manager.num_cached == len(released)
