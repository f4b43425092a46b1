"""Slots and tensors of a step, as every rank makes them from plans; and the memory of the cache."""

from typing import Any

import numpy as np
import pytest
import torch

from tpdist.control.messages import SequenceStart, SlotBlocks, SlotWork, StepPlan
from tpdist.engine.batch import SlotTable
from tpdist.engine.kv_cache import allocate, bytes_per_token, num_blocks_that_fit
from tpdist.errors import PlanError
from tpdist.sampling_params import SamplingParams

CPU = torch.device("cpu")


def start(slot: int, tokens: list[int], *, num_prompt_tokens: int | None = None) -> SequenceStart:
    data = np.array(tokens, dtype="<i4").tobytes()
    return SequenceStart(slot, data, num_prompt_tokens or len(tokens), 11 + slot, SamplingParams(), (5,))


def plan(**parts: Any) -> StepPlan:
    return StepPlan(epoch=1, step=1, **parts)


def two_slots() -> tuple[SlotTable, StepPlan]:
    """Slot 2 decodes its sixth token, slot 0 prefills its tokens 2 to 4 of 6."""
    table = SlotTable(max_num_seqs=3, max_tokens=20, block_size=4)
    first = plan(
        start=(start(0, [10, 11, 12, 13, 14, 15]), start(2, [20, 21, 22, 23, 24])),
        blocks=(SlotBlocks(0, (7, 3)), SlotBlocks(2, (1, 5))),
    )
    table.apply(first)
    table.append((2,), (29,))
    return table, plan(work=(SlotWork(2, 5, 1, True), SlotWork(0, 2, 3, False)))


def test_the_tokens_of_a_step_lie_in_the_order_of_its_work() -> None:
    table, work = two_slots()
    batch = table.batch(work, device=CPU)
    assert batch.token_ids.tolist() == [29, 12, 13, 14]
    assert batch.positions.tolist() == [5, 2, 3, 4]
    assert batch.token_ids.dtype == batch.positions.dtype == torch.int64
    assert (batch.samples.rows.tolist(), batch.samples.slots) == ([0], (2,))


def test_attention_gets_the_place_of_each_token_and_the_blocks_of_each_sequence() -> None:
    table, work = two_slots()
    attention = table.batch(work, device=CPU).attention
    assert attention.slot_mapping.tolist() == [5 * 4 + 1, 7 * 4 + 2, 7 * 4 + 3, 3 * 4 + 0]
    assert attention.block_tables.tolist() == [[1, 5], [7, 3]]
    assert attention.context_lens == [6, 5]
    assert attention.query_lens == [1, 3]
    assert attention.block_size == 4


def test_a_reused_slot_shows_nothing_of_its_earlier_sequence() -> None:
    table, _ = two_slots()
    again = plan(
        free=(2,),
        start=(start(2, [8]),),
        blocks=(SlotBlocks(2, (6,)),),
        work=(SlotWork(2, 0, 1, True), SlotWork(0, 5, 1, True)),
    )
    table.apply(again)
    batch = table.batch(again, device=CPU)
    assert batch.token_ids.tolist() == [8, 15]
    assert batch.attention.block_tables.tolist() == [[6, 0], [7, 3]]
    row = table.sample_rows([2])[0]
    assert (row.tokens[: row.num_tokens].tolist(), row.num_sampled) == ([8], 0)
    assert (row.seed, row.stop_token_ids) == (13, (5,))


def test_a_sequence_that_starts_again_counts_the_tokens_that_it_had_sampled() -> None:
    table = SlotTable(max_num_seqs=1, max_tokens=20, block_size=4)
    table.apply(plan(start=(start(0, [1, 2, 3, 4], num_prompt_tokens=3),), blocks=(SlotBlocks(0, (0,)),)))
    assert table.sample_rows([0])[0].num_sampled == 1
    table.append((0,), (9,))
    row = table.sample_rows([0])[0]
    assert (row.num_sampled, row.tokens[: row.num_tokens].tolist()) == (2, [1, 2, 3, 4, 9])


def test_a_step_that_samples_after_each_of_its_tokens_needs_no_index() -> None:
    table, _ = two_slots()
    batch = table.batch(plan(work=(SlotWork(0, 5, 1, True), SlotWork(2, 5, 1, True))), device=CPU)
    assert batch.samples == ((0, 2), None)
    assert (batch.token_ids.tolist(), batch.positions.tolist()) == ([15, 29], [5, 5])
    assert batch.attention.slot_mapping.tolist() == [3 * 4 + 1, 5 * 4 + 1]


def asking(slot: int, tokens: list[int], *, num_prompt_tokens: int, num_top: int) -> SequenceStart:
    data = np.array(tokens, dtype="<i4").tobytes()
    return SequenceStart(slot, data, num_prompt_tokens, 0, SamplingParams(prompt_logprobs=num_top), ())


def chunks(table: SlotTable, *work: SlotWork) -> list[tuple[int, int, list[int], int]]:
    found = table.prompt_chunks(plan(work=work))
    return [(chunk.slot, chunk.first, chunk.token_ids.tolist(), chunk.num_top) for chunk in found]


def test_work_on_a_prompt_tells_of_the_tokens_after_each_of_its_own() -> None:
    table = SlotTable(max_num_seqs=3, max_tokens=20, block_size=4)
    table.apply(plan(start=(start(0, [7, 8]), asking(1, [10, 11, 12, 13, 14], num_prompt_tokens=4, num_top=3))))
    assert chunks(table, SlotWork(0, 0, 2, True), SlotWork(1, 0, 2, False)) == [(1, 2, [11, 12], 3)]
    assert chunks(table, SlotWork(1, 2, 1, False), SlotWork(0, 2, 1, True)) == [(1, 0, [13], 3)]
    assert chunks(table, SlotWork(1, 2, 3, True)) == [(1, 0, [13], 3)]


def test_the_completion_and_the_last_token_of_a_prompt_tell_of_no_prompt() -> None:
    table = SlotTable(max_num_seqs=3, max_tokens=20, block_size=4)
    table.apply(plan(start=(asking(1, [10, 11, 12, 13, 14], num_prompt_tokens=4, num_top=0),)))
    assert chunks(table, SlotWork(1, 3, 2, True)) == chunks(table, SlotWork(1, 3, 1, False)) == []
    assert chunks(table, SlotWork(1, 4, 1, True)) == []
    table.apply(plan(free=(1,), start=(start(1, [5, 6, 7]),)))
    assert chunks(table, SlotWork(1, 0, 3, True)) == []


def test_a_cache_has_a_zeroed_tensor_per_layer_and_cached_thing() -> None:
    shapes = [((2, 8), (2, 8)), ((1, 4), (1, 4))]
    cache = allocate(shapes, num_blocks=3, block_size=16, dtype=torch.bfloat16, device=CPU)
    assert [[tuple(x.shape) for x in layer] for layer in cache.layers] == [[(3, 16, 2, 8)] * 2, [(3, 16, 1, 4)] * 2]
    assert all(x.dtype == torch.bfloat16 and not x.any() for layer in cache.layers for x in layer)
    assert bytes_per_token(shapes, dtype=torch.bfloat16) == (2 * 16 + 2 * 4) * 2


def test_a_cache_on_a_cpu_takes_memory_only_where_it_is_written() -> None:
    def resident_pages() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident_pages()
    cache = allocate([((1024,),)], num_blocks=2**12, block_size=16, dtype=torch.float32, device=CPU)
    cache.layers[0][0][7] = 1
    assert cache.layers[0][0].nbytes == 2**28
    assert (resident_pages() - before) * 4096 < 2**24


def test_blocks_fill_the_budget_but_no_more_than_all_sequences_can_use() -> None:
    sizes = {"bytes_per_token": 100, "block_size": 16, "max_model_len": 50}
    assert num_blocks_that_fit(budget_bytes=16_000, max_num_seqs=8, **sizes) == 10
    assert num_blocks_that_fit(budget_bytes=10**9, max_num_seqs=8, **sizes) == 8 * 4


def test_a_budget_below_one_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlanError, match=r"1,000 bytes .* one block of 16 tokens takes 1,600"):
        num_blocks_that_fit(budget_bytes=1000, bytes_per_token=100, block_size=16, max_num_seqs=1, max_model_len=50)
