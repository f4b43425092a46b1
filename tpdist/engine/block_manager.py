"""Which blocks of the KV cache are free. It knows numbers of blocks, not what is in them or who holds them.

A block has exactly one holder from `allocate` to `free`: free + used = all, at any time.
"""

from collections.abc import Iterable


class BlockManager:
    """The most recently freed block is given out first: its memory is the warmest, and blocks that were never needed
    are never touched."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        assert min(num_blocks, block_size) >= 1, f"{num_blocks} blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back. A step that is planned from now on may write to them."""
        for block in blocks:
            self._used.remove(block)
            self._free.append(block)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Assert that `holders` (the block tables of all running sequences) hold each used block exactly once."""
        held = [block for blocks in holders for block in blocks]
        assert len(held) == len(set(held)), f"a block has two holders: {sorted(held)}"
        assert set(held) == self._used, f"held {sorted(held)}, used {sorted(self._used)}"
        assert sorted([*held, *self._free]) == list(range(self.num_blocks)), "a block is lost or free twice"
