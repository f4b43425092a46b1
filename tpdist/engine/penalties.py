"""What is done to logits before a token is chosen: mask, bias and penalties, at a few tokens of a few rows.

All edits of a step travel to the device in one copy. It knows nothing of probabilities.

The order is vLLM's: min_tokens (stop ids are masked) and logit_bias, then the repetition penalty (tokens of prompt and
completion), then frequency and presence penalty (tokens of the completion).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tpdist.engine.sample_row import SampleRow
from tpdist.engine.transfer import to_device


def adjust(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Write the edits that rows ask for into their logits. logits: [n, vocab_size] float32."""
    adjusted = [(position, row) for position, row in enumerate(rows) if row.adjusted]
    if not adjusted:
        return
    added = [_additions(row, position=position, vocab_size=logits.shape[1]) for position, row in adjusted]
    penalties = [_penalties(row, position=position) for position, row in adjusted if row.penalised]
    num_added = sum(edits.shape[1] for edits in added)
    edits = to_device(np.concatenate(added + penalties, axis=1), logits.device)
    for part in (edits[:, :num_added], edits[:, num_added:]):
        if part.shape[1]:
            _edit(logits, part)


def _edit(logits: Tensor, edits: Tensor) -> None:
    """logit = (logit / divisor if logit > 0 else logit * divisor) - subtrahend

    logits: [n, vocab_size]; edits: [4, num_edits] float64 of row, token, divisor and subtrahend, no place twice.
    """
    row, token = edits[:2].long()
    divisor, subtrahend = edits[2:].to(logits.dtype)
    before = logits[row, token]
    logits[row, token] = torch.where(before > 0, before / divisor, before * divisor) - subtrahend


def _additions(row: SampleRow, *, position: int, vocab_size: int) -> np.ndarray:
    """Edits of logit_bias and min_tokens: [4, n]. Ids beyond the vocabulary cannot be sampled anyway."""
    subtrahends = {token: -bias for token, bias in (row.sampling.logit_bias or {}).items() if token < vocab_size}
    if row.num_sampled < row.sampling.min_tokens:
        subtrahends.update((token, np.inf) for token in row.stop_token_ids if token < vocab_size)
    edits = np.empty((4, len(subtrahends)))
    edits[0] = position
    edits[1] = list(subtrahends)
    edits[2] = 1
    edits[3] = list(subtrahends.values())
    return edits


def _penalties(row: SampleRow, *, position: int) -> np.ndarray:
    """Edits of the three penalties: [4, n].

    Repetition: CTRL (arXiv:1909.05858) with the sign rule that Hugging Face added. Frequency and presence: OpenAI's
    logit - count * frequency - (count > 0) * presence (https://platform.openai.com/docs/api-reference/parameter-details).
    """
    ids, counts = row.token_counts()
    edits = np.empty((4, len(ids)))
    edits[0] = position
    edits[1] = ids
    edits[2] = row.sampling.repetition_penalty
    edits[3] = counts * row.sampling.frequency_penalty + (counts > 0) * row.sampling.presence_penalty
    return edits
