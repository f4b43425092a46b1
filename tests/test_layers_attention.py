import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tpdist.layers import attention
from tpdist.layers.attention import AttentionContext, gather_attention

torch.set_num_threads(1)

# (tokens in the cache after this step, tokens of this step) of each sequence.
MIXES = {
    "one whole prompt": [(9, 9)],
    "one token prompt": [(1, 1)],
    "one decode": [(21, 1)],
    "decodes of equal length": [(7, 1), (7, 1), (7, 1)],
    "decodes of many lengths": [(1, 1), (4, 1), (300, 1), (5, 1), (1100, 1), (17, 1)],
    "a later chunk": [(40, 13)],
    "chunks of several prompts": [(5, 5), (40, 13), (8, 2)],
    "everything mixed": [(33, 1), (12, 12), (2, 1), (600, 70), (300, 1), (3, 1), (4, 4)],
}


def a_step(mix, *, num_heads=6, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float32):
    """Context, this step's query, key, value, the caches before it, and every sequence's keys and values so far."""
    generator = torch.Generator().manual_seed(len(mix) + sum(context for context, _ in mix))
    num_blocks = [math.ceil(context / block_size) for context, _ in mix]
    shuffled = torch.randperm(sum(num_blocks) + 3, generator=generator).split([*num_blocks, 3])
    tables = torch.zeros(len(mix), max(num_blocks), dtype=torch.int64)
    # What no sequence has written is poison: reading it would show.
    caches = tuple(
        torch.full((sum(num_blocks) + 3, block_size, num_kv_heads, head_dim), 1e4, dtype=dtype) for _ in "kv"
    )
    slots, steps, histories = [], [], []
    for row, (context_len, query_len) in enumerate(mix):
        tables[row, : num_blocks[row]] = shuffled[row]
        positions = torch.arange(context_len)
        slot = shuffled[row][positions // block_size] * block_size + positions % block_size
        history = [torch.randn(context_len, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in "kv"]
        for cache, each in zip(caches, history, strict=True):
            cache.flatten(0, 1)[slot[:-query_len]] = each[:-query_len]
        slots.append(slot[-query_len:])
        histories.append(history)
        steps.append([each[-query_len:] for each in history])
    key, value = (torch.cat(each) for each in zip(*steps, strict=True))
    query = torch.randn(len(key), num_heads, head_dim, generator=generator).to(dtype)
    context = AttentionContext(
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        context_lens=[context_len for context_len, _ in mix],
        query_lens=[query_len for _, query_len in mix],
        block_size=block_size,
    )
    return context, query, key, value, caches, histories


def token_by_token(mix, query: Tensor, histories, *, scale: float, window: int | None) -> Tensor:
    """Attention as it is written down: one softmax per token and head."""
    attended, token = [], 0
    for (context_len, query_len), (keys, values) in zip(mix, histories, strict=True):
        group = query.shape[1] // keys.shape[1]
        for position in range(context_len - query_len, context_len):
            first = 0 if window is None else max(0, position - window + 1)
            for head in range(query.shape[1]):
                scores = keys[first : position + 1, head // group] @ query[token, head] * scale
                attended.append(scores.softmax(0) @ values[first : position + 1, head // group])
            token += 1
    return torch.stack(attended).view(len(query), -1)


@pytest.mark.parametrize("window", [None, 1, 3, 16, 700])
@pytest.mark.parametrize("name", MIXES)
def test_each_token_attends_to_its_sequence_up_to_itself_and_within_the_window(name, window):
    context, query, key, value, caches, histories = a_step(MIXES[name])
    attended = gather_attention(query, key, value, cache=caches, context=context, scale=0.3, window=window)
    expected = token_by_token(MIXES[name], query, histories, scale=0.3, window=window)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [1, 7, 100, 300])
@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("name", ["a later chunk", "chunks of several prompts", "everything mixed"])
def test_a_large_mask_in_parts_is_the_whole_one(name, window, most, monkeypatch):
    monkeypatch.setattr(attention, "MAX_MASK_ELEMENTS", most)
    context, query, key, value, caches, histories = a_step(MIXES[name])
    attended = gather_attention(query, key, value, cache=caches, context=context, scale=0.3, window=window)
    expected = token_by_token(MIXES[name], query, histories, scale=0.3, window=window)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


DECODES = {name: mix for name, mix in MIXES.items() if all(query_len == 1 for _, query_len in mix)}


def recorded(context: AttentionContext, *, more_blocks: int) -> AttentionContext:
    """The same decodes as a recorded step has them: lengths on the device, block tables wider than needed."""
    block_tables = F.pad(context.block_tables, (0, more_blocks))
    num_seqs, width = block_tables.shape
    return replace(
        context,
        block_tables=block_tables,
        context_lens=[width * context.block_size] * num_seqs,
        device_lens=torch.tensor(context.context_lens),
    )


@pytest.mark.parametrize("more_blocks", [0, 1, 9])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 16, 700])
@pytest.mark.parametrize("name", DECODES)
def test_a_recorded_step_attends_to_what_the_lengths_on_the_device_say(name, window, more_blocks):
    context, query, key, value, caches, histories = a_step(DECODES[name])
    context = recorded(context, more_blocks=more_blocks)
    attended = gather_attention(query, key, value, cache=caches, context=context, scale=0.3, window=window)
    expected = token_by_token(DECODES[name], query, histories, scale=0.3, window=window)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 2, 16, 17, 33])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(5, 1), (4, 4), (12, 3)])
def test_a_recorded_step_may_have_any_heads_and_any_block_size(num_heads, num_kv_heads, block_size, window):
    mix = [(length, 1) for length in (1, 15, 16, 17, 31, 32, 33, 48)]
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "block_size": block_size}
    context, query, key, value, caches, histories = a_step(mix, **sizes)
    context = recorded(context, more_blocks=1)
    attended = gather_attention(query, key, value, cache=caches, context=context, scale=0.3, window=window)
    expected = token_by_token(mix, query, histories, scale=0.3, window=window)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


def test_a_recorded_step_reads_no_more_blocks_than_a_window_can_touch():
    context, query, key, value, caches, _ = a_step([(1000, 1), (998, 1)], block_size=16)
    context = recorded(context, more_blocks=5)
    gather_attention(query, key, value, cache=caches, context=context, scale=1.0, window=34)
    (call,) = context.once(("gather", 34, torch.float32), list)
    assert call.blocks.numel() == 2 * 4, "34 tokens can lie in two whole blocks and the ends of two others"


def test_chunks_of_prompts_cannot_be_recorded():
    context, query, key, value, caches, _ = a_step(MIXES["a later chunk"])
    with pytest.raises(AssertionError, match="only decodes can be recorded"):
        gather_attention(
            query, key, value, cache=caches, context=recorded(context, more_blocks=0), scale=1.0, window=None
        )


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (5, 1), (4, 4), (12, 3)])
@pytest.mark.parametrize("block_size", [1, 16])
def test_any_grouping_of_heads_and_any_block_size_serve(num_heads, num_kv_heads, block_size):
    mix = MIXES["everything mixed"]
    context, query, key, value, caches, histories = a_step(
        mix, num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=block_size
    )
    attended = gather_attention(query, key, value, cache=caches, context=context, scale=0.3, window=None)
    expected = token_by_token(mix, query, histories, scale=0.3, window=None)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


def test_keys_and_values_of_the_step_are_in_the_cache_afterwards():
    context, query, key, value, caches, _ = a_step(MIXES["everything mixed"])
    gather_attention(query, key, value, cache=caches, context=context, scale=1.0, window=None)
    assert torch.equal(caches[0].flatten(0, 1)[context.slot_mapping], key)
    assert torch.equal(caches[1].flatten(0, 1)[context.slot_mapping], value)


def test_a_step_whose_lengths_do_not_add_up_to_its_slots_is_refused():
    context, query, key, value, caches, _ = a_step(MIXES["one whole prompt"])
    context.query_lens[0] -= 1
    with pytest.raises(AssertionError, match="8 tokens in query_lens, 9 slots"):
        gather_attention(query, key, value, cache=caches, context=context, scale=1.0, window=None)


def test_calls_and_masks_are_planned_once_per_step_and_window():
    context, query, key, value, caches, _ = a_step(MIXES["everything mixed"])
    planned = []
    for window in (None, None, 3, 3):
        gather_attention(query, key, value, cache=caches, context=context, scale=1.0, window=window)
        planned.append(context.once(("gather", window, torch.float32), list))
    assert planned[0] is planned[1]
    assert planned[2] is planned[3]
    assert planned[0] is not planned[2]


def test_a_single_decode_makes_no_mask_and_copies_only_its_blocks():
    context, query, key, value, caches, _ = a_step([(500, 1)], dtype=torch.bfloat16, block_size=16)
    attend = {"cache": caches, "context": context, "scale": 1.0, "window": None}
    gather_attention(query, key, value, **attend)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        gather_attention(query, key, value, **attend)
    seen = {event.key: event.count for event in profiler.key_averages()}
    assert seen["aten::index_select"] == 2
    assert seen["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert not {"aten::copy_", "aten::where", "aten::masked_fill_", "aten::cat"} & set(seen)
