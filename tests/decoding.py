"""Runs a Decoder by hand: one shuffled block table per sequence, every step spelled out, argmax as the sampler.

Needs no transformers, so that ranks can import it fast.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tpdist.checkpoint.index import CheckpointIndex
from tpdist.checkpoint.load import load_weights
from tpdist.layers.attention import AttentionContext
from tpdist.models import registry
from tpdist.models.decoder import Decoder
from tpdist.parallel.group import RankGroup
from tpdist.plan.shards import Partition

BLOCK_SIZE = 4


def load_decoder(folder: Path, *, group: RankGroup, shares: Sequence[int]) -> Decoder:
    """One rank's part of a checkpoint, float32 on the CPU."""
    config, partition = registry.load_config(folder), Partition(tuple(shares))
    decoder = Decoder(config, partition=partition, group=group, dtype=torch.float32, device=torch.device("cpu"))
    load_weights(
        decoder,
        index=CheckpointIndex.read(folder),
        weights=registry.weights(config),
        partition=partition,
        rank=group.rank,
        threads=1,
        progress=lambda done, total: None,
    )
    return decoder


class Tape:
    """Sequences and their cache on one rank. `lens`: tokens of each sequence in the cache."""

    def __init__(self, decoder: Decoder, *, num_seqs: int, max_len: int) -> None:
        self.decoder = decoder
        self.lens = [0] * num_seqs
        width = -(-max_len // BLOCK_SIZE)
        self.tables = torch.randperm(num_seqs * width, generator=torch.Generator().manual_seed(0)).view(num_seqs, width)
        self.caches = [
            tuple(torch.zeros(num_seqs * width, BLOCK_SIZE, *shape) for shape in layer)
            for layer in decoder.cache_shapes()
        ]

    def step(self, work: dict[int, list[int]]) -> Tensor:
        """Run the next tokens of some sequences. Returns their hidden states, [num_tokens, hidden_size]."""
        positions, slots = [], []
        for sequence, tokens in work.items():
            first = self.lens[sequence]
            self.lens[sequence] += len(tokens)
            position = torch.arange(first, self.lens[sequence])
            positions.append(position)
            slots.append(self.tables[sequence][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        context = AttentionContext(
            slot_mapping=torch.cat(slots),
            block_tables=self.tables[list(work)],
            context_lens=[self.lens[sequence] for sequence in work],
            query_lens=[len(tokens) for tokens in work.values()],
            block_size=BLOCK_SIZE,
        )
        hidden: Tensor = self.decoder(
            torch.tensor([token for tokens in work.values() for token in tokens]),
            positions=torch.cat(positions),
            attention=context,
            caches=self.caches,
        )
        return hidden


def prompt_logits(group: RankGroup, folder: Path, shares: Sequence[int], prompt: list[int]) -> Tensor | None:
    """Logits of every position of a prompt run at once, on rank 0."""
    decoder = load_decoder(folder, group=group, shares=shares)
    with torch.inference_mode():
        return decoder.logits(Tape(decoder, num_seqs=1, max_len=len(prompt)).step({0: prompt}))


def greedy_tokens(
    group: RankGroup,
    folder: Path,
    shares: Sequence[int],
    prompts: list[list[int]],
    max_new_tokens: int,
    chunk: int | None = None,
) -> list[list[int]]:
    """Greedy continuations of prompts that run side by side, the prompts `chunk` tokens a step. On every rank."""
    decoder = load_decoder(folder, group=group, shares=shares)
    longest = max(len(prompt) for prompt in prompts) + max_new_tokens
    tape = Tape(decoder, num_seqs=len(prompts), max_len=longest)
    pending = dict(enumerate(prompts))
    outputs: list[list[int]] = [[] for _ in prompts]
    while pending:
        work = {sequence: tokens[:chunk] for sequence, tokens in pending.items()}
        for sequence, token in _next_tokens(group, tape, work).items():
            rest = pending.pop(sequence)[len(work[sequence]) :]
            if not rest:
                outputs[sequence].append(token)
                rest = [token]
            if len(outputs[sequence]) < max_new_tokens:
                pending[sequence] = rest
    return outputs


@torch.inference_mode()
def _next_tokens(group: RankGroup, tape: Tape, work: dict[int, list[int]]) -> dict[int, int]:
    """The likeliest token after each sequence's last one of this step."""
    hidden = tape.step(work)
    lasts = torch.tensor([len(tokens) for tokens in work.values()]).cumsum(0) - 1
    logits = tape.decoder.logits(hidden[lasts])
    tokens = torch.empty(len(work), dtype=torch.int64) if logits is None else logits.argmax(-1)
    return dict(zip(work, group.broadcast(tokens).tolist(), strict=True))
