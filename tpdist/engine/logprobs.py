"""Log-probabilities: of the tokens that were sampled, and of those that stand in a prompt.

They are of the model's own distribution: log_softmax of the float32 logits before mask, bias, penalties, temperature
and filters. Rows that ask for none pay nothing. Of tokens that tie, the lower id is named first.

A score is one row of numbers on the device: id, rank and log-probability of the token that stands there, then id
and log-probability of each of the most probable ones: [3 + 2 * num_top] float64, which holds ids and float32 exactly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tpdist.control.messages import TokenLogprobs
from tpdist.engine.sample_row import SampleRow
from tpdist.engine.sampler import sample
from tpdist.engine.transfer import rows_of

ROWS_AT_ONCE = 32
"""Rows are scored in parts of this size: at a vocabulary of 256 thousand one part takes some 200 MB."""


def sample_and_score(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, dict[int, Tensor]]:
    """Choose one token per row as `sample` does, and score the tokens of the rows that ask for it.

    logits: [n, vocab_size] float32, written into. Returns [n] int64, and scores [1, 3 + 2 * num_top] by row.
    """
    asking = [position for position, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not asking:
        return sample(logits, rows), {}
    parts = [slice(first, first + ROWS_AT_ONCE) for first in range(0, len(rows), ROWS_AT_ONCE)]
    tokens, scores = zip(*(_sample_part(logits[part], rows[part]) for part in parts), strict=True)
    return torch.cat(tokens), dict(zip(asking, (score for part in scores for score in part), strict=True))


def score(logits: Tensor, tokens: Tensor, *, num_top: int) -> Tensor:
    """The scores of one token in each row, [n, 3 + 2 * num_top]. logits: [n, vocab_size] float32, as the model gave
    them; tokens: [n] int64."""
    return _score(logits.log_softmax(dim=-1), tokens, num_top)


def read(tokens: Tensor, scores: Sequence[Tensor]) -> tuple[list[int], list[tuple[TokenLogprobs, ...]]]:
    """Token ids [n] and scores [m, 3 + 2 * num_top] on the host. It is the one wait for the device in a step."""
    if not scores:
        return tokens.tolist(), []
    together = torch.cat([tokens.double(), *(score.flatten() for score in scores)]).cpu()
    token_ids, *values = torch.split_with_sizes(together, [len(tokens), *(score.numel() for score in scores)])
    lines = (part.view(score.shape).tolist() for part, score in zip(values, scores, strict=True))
    return token_ids.long().tolist(), [tuple(map(_entry, part)) for part in lines]


def _entry(values: Sequence[float]) -> TokenLogprobs:
    token, rank, logprob, *top = values
    return TokenLogprobs((int(token), *map(int, top[::2])), (logprob, *top[1::2]), int(rank))


def _sample_part(logits: Tensor, rows: Sequence[SampleRow]) -> tuple[Tensor, list[Tensor]]:
    """Tokens of all rows, scores of those that ask. Sampling writes into the logits, so log-probabilities are taken
    before."""
    asking = [
        (position, row.sampling.logprobs) for position, row in enumerate(rows) if row.sampling.logprobs is not None
    ]
    if not asking:
        return sample(logits, rows), []
    chosen = rows_of(logits, [position for position, _ in asking])
    logprobs = logits[chosen].log_softmax(dim=-1)
    tokens = sample(logits, rows)
    scores = _score(logprobs, tokens[chosen], max(num_top for _, num_top in asking))
    return tokens, [scores[i : i + 1, : 3 + 2 * num_top] for i, (_, num_top) in enumerate(asking)]


def _score(logprobs: Tensor, tokens: Tensor, num_top: int) -> Tensor:
    """logprobs: [n, vocab_size] float32; tokens: [n] int64. A vocabulary smaller than num_top is named as a whole."""
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top = _top_ids(logprobs, min(num_top, logprobs.shape[1]))
    pairs = torch.stack((top.double(), logprobs.gather(1, top).double()), dim=2)
    return torch.cat((torch.stack((tokens, ranks), dim=1), chosen, pairs.flatten(1)), dim=1)


def _top_ids(logprobs: Tensor, num_top: int) -> Tensor:
    """Ids by descending log-probability, then ascending id: [n, num_top] int64.

    topk alone leaves open which of several tied tokens it takes. The bits of a float that is not negative are ordered
    as the float is, so (bits of -logprob, id) as one integer is unique in its row and the least come first.
    """
    keys = logprobs.abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys |= torch.arange(keys.shape[1], device=keys.device)
    return keys.topk(num_top, dim=1, largest=False).values.bitwise_and_(0xFFFFFFFF)
