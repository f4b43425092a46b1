"""Which blocks of the KV cache are free, which are held, and which are kept because somebody may want them again.

It knows numbers of blocks and digests of what is in them, neither tokens nor who holds a block.

    state    holders     content                        becomes
    free     0           nothing worth keeping          used, by `allocate`
    used     1 or more   being written, or shared       cached or free, when the last holder gives it back
    cached   0           full, known by its digest      used, by `share`; or used for something else, by `allocate`

free + cached + used = all, at any time. A block that is used may be known by its digest too, and shared while its
first holder still runs. Blocks of which a sequence was promised to get them later are free or cached until then.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockManager:
    """Free blocks are given out before cached ones are dropped: the most recently freed first, since its memory is the
    warmest, so that blocks that were never needed are never touched. Of the cached ones the least recently used is
    dropped first."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        assert min(num_blocks, block_size) >= 1, f"{num_blocks} blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_holders = [0] * num_blocks
        self._digests: list[bytes | None] = [None] * num_blocks
        self._by_digest: dict[bytes, int] = {}
        self._num_promised = 0

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated or promised now: free or cached, and not promised."""
        return len(self._free) + len(self._cached) - self._num_promised

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def promise(self, count: int) -> None:
        """Keep `count` of the available blocks for a sequence; a negative count gives up so many promises."""
        self._num_promised += count
        assert self._num_promised >= 0, "more promises were given up than made"
        assert self.num_available >= 0, f"{count} blocks promised, {-self.num_available} more than there are"

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks to write to; the caller has checked `num_available`."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def find(self, digest: bytes) -> int | None:
        """The block with this content, if there is one. It may be dropped by the next `allocate`."""
        return self._by_digest.get(digest)

    def num_cached_of(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: sharing them makes so many fewer available."""
        return sum(self._num_holders[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Become a holder of blocks that `find` returned. Nobody writes to them any more."""
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1

    def register(self, block: int, digest: bytes) -> None:
        """Make a full block known by its content. If another one with this content is, that one stays."""
        if self._by_digest.setdefault(digest, block) == block:
            self._digests[block] = digest

    def free(self, blocks: list[int]) -> None:
        """Give back the blocks of one sequence, in the order of its tokens. A step that is planned from now on may
        write to them. The last one is dropped first: without the head of a prefix its tail is of no use."""
        for block in reversed(blocks):
            assert self._num_holders[block] > 0, f"block {block} is given back, but nobody holds it"
            self._num_holders[block] -= 1
            if self._num_holders[block] > 0:
                continue
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Assert that `holders` (the block tables of all running sequences) are what is counted as used, and that no
        block is lost. For tests."""
        held = Counter(block for blocks in holders for block in blocks)
        counted = {block: count for block, count in enumerate(self._num_holders) if count}
        assert held == counted, f"held {sorted(held.items())}, counted {sorted(counted.items())}"
        every = sorted([*held, *self._free, *self._cached])
        assert every == list(range(self.num_blocks)), f"free + cached + used is {every}: a block is lost or there twice"
        known = {digest: block for block, digest in enumerate(self._digests) if digest is not None}
        assert known == self._by_digest, "the table of digests is not that of the blocks"
        assert all(self._digests[block] is not None for block in self._cached), "a cached block cannot be found"
        assert all(self._digests[block] is None for block in self._free), "a free block can be found"
        assert self.num_available >= 0, "more is promised than there is"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None, f"block {block} is cached without a digest"
        del self._by_digest[digest]
        self._digests[block] = None
        return block
