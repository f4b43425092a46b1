"""Gives sequences their blocks: those that another one with the same beginning has filled, and new ones.

A full block is known by a digest of its tokens and of all tokens before them: the keys and values of a position depend
on those alone. It can be found as soon as the step that fills it is planned, and may be used from the same plan on:
ranks run steps in order, and a layer writes all keys and values of a step before it reads any (AttentionBackend in
layers/attention.py). This module knows sequences and blocks, but not who is served when.
"""

from collections.abc import Iterable
from hashlib import blake2b
from struct import Struct

from tpdist.engine.block_manager import BlockManager
from tpdist.engine.sequence import Sequence

DIGEST_BYTES = 32
"""As much as SHA-256: nobody can make two prompts with the same digest, which would mix up their answers."""


class BlockTables:
    """`num_queries` counts the prompt tokens that were looked up when requests first started, `num_hits` those of them
    that were found, then or before their prompts were done. With caching disabled nothing is ever found."""

    def __init__(self, block_manager: BlockManager, *, enable_prefix_caching: bool) -> None:
        self._block_manager = block_manager
        self._caching = enable_prefix_caching
        self._block_size = block_manager.block_size
        self._pack = Struct(f"<{self._block_size}i").pack
        self.num_queries = 0
        self.num_hits = 0

    def find(self, sequence: Sequence) -> list[int]:
        """The cached blocks that come next in `sequence`, if it has got this far in whole blocks. Its last token is
        left out: its logits are needed."""
        held = len(sequence.blocks)
        if not (self._caching and sequence.may_skip_prompt) or held * self._block_size != sequence.num_scheduled:
            return []
        found: list[int] = []
        for index in range(held, (sequence.num_tokens - 1) // self._block_size):
            block = self._block_manager.find(self._digest(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def fits(self, sequence: Sequence, found: list[int], *, spare: int) -> bool:
        """Whether there is room for all known tokens of a waiting sequence, `found` being in the cache, and for `spare`
        blocks more."""
        needed = self._block_manager.num_blocks_for(sequence.num_tokens) - len(found)
        return needed + self._block_manager.num_cached_of(found) + spare <= self._block_manager.num_available

    def could_fit(self, sequence: Sequence, victims: Iterable[Sequence]) -> bool:
        """Whether there could be room for a waiting sequence if all `victims` gave up what they have. (Less than that
        may come free, where they share blocks with others.)"""
        yielded = sum(len(victim.blocks) + victim.num_promised for victim in victims)
        needed = self._block_manager.num_blocks_for(sequence.num_tokens) - len(self.find(sequence))
        return needed <= self._block_manager.num_available + yielded

    def start(self, sequence: Sequence, found: list[int]) -> None:
        """Give a sequence that `fits` the blocks `found`, and promise it the rest for its known tokens."""
        if self._caching and sequence.may_skip_prompt and not sequence.restarted:
            self.num_queries += sequence.num_prompt_tokens
        self._share(sequence, found)
        self._promise(sequence, self._block_manager.num_blocks_for(sequence.num_tokens) - len(found))

    def take(self, sequence: Sequence, found: list[int]) -> None:
        """Give a prefill the blocks `found`, in the place of as many that were promised; its work goes on behind."""
        self._promise(sequence, -len(found))
        self._share(sequence, found)

    def extend(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Allocate and return the blocks that a sequence lacks for its first `num_tokens`: those promised, and for a
        decode one more, if any is available."""
        missing = max(0, self._block_manager.num_blocks_for(num_tokens) - len(sequence.blocks))
        self._promise(sequence, -min(missing, sequence.num_promised))
        blocks = self._block_manager.allocate(missing)
        sequence.blocks.extend(blocks)
        return blocks

    def register(self, sequence: Sequence, *, first: int) -> None:
        """Let others find the blocks of `sequence` from number `first` on that are full once the steps planned have
        run."""
        if self._caching:
            for index in range(first, sequence.num_scheduled // self._block_size):
                self._block_manager.register(sequence.blocks[index], self._digest(sequence, index))

    def release(self, sequence: Sequence) -> None:
        """Take back what `sequence` holds and was promised."""
        self._promise(sequence, -sequence.num_promised)
        self._block_manager.free(sequence.blocks)
        sequence.blocks = []

    def check(self, running: Iterable[Sequence]) -> None:
        """Assert that `running` hold what is counted as used and promised. For tests."""
        running = list(running)
        manager = self._block_manager
        manager.check(sequence.blocks for sequence in running)
        for sequence in running:
            needed = manager.num_blocks_for(sequence.num_tokens if sequence.prefilling else sequence.num_scheduled)
            assert len(sequence.blocks) + sequence.num_promised >= needed, f"{sequence}: a token has no block"
            assert sequence.prefilling or sequence.num_promised == 0, f"{sequence}: blocks are promised for nothing"
        promised = sum(sequence.num_promised for sequence in running)
        assert manager.num_available == manager.num_blocks - manager.num_used - promised, "a promise is lost"

    def _share(self, sequence: Sequence, found: list[int]) -> None:
        self._block_manager.share(found)
        sequence.blocks.extend(found)
        num_tokens = len(found) * self._block_size
        sequence.num_scheduled += num_tokens
        if not sequence.restarted:
            sequence.num_cached += num_tokens
            self.num_hits += num_tokens

    def _promise(self, sequence: Sequence, count: int) -> None:
        sequence.num_promised += count
        self._block_manager.promise(count)

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """Of the first `index + 1` blocks of `sequence`. Computed once, since tokens never change."""
        digests = sequence.block_digests
        while len(digests) <= index:
            first = len(digests) * self._block_size
            tokens = self._pack(*sequence.token_ids[first : first + self._block_size])
            parent = digests[-1] if digests else b""
            digests.append(blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest())
        return digests[index]
