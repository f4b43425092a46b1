"""Bytes and seconds that the planner expects, against what models, caches and kernels' tensors really are."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_tensors import LivePeak
from plans import small_config

from tpdist.engine import logprobs, sampler
from tpdist.engine.kv_cache import num_blocks_that_fit
from tpdist.engine.sample_row import SampleRow
from tpdist.errors import PlanError
from tpdist.layers import attention
from tpdist.layers.attention import AttentionContext
from tpdist.models import streamed
from tpdist.models.decoder import Decoder
from tpdist.parallel import segment
from tpdist.parallel.group import FakeGroup
from tpdist.plan import costs, speed
from tpdist.plan.costs import VisionTower, WeightItems, vision_bytes
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.memory import cache_blocks, cpu_cache_budget, cuda_usable_bytes, kv_bytes_per_token, weight_bytes
from tpdist.plan.model_config import LayerConfig, ModelConfig, RopeConfig
from tpdist.plan.placement import Demand, Device, Inventory, Link
from tpdist.plan.places import Layout, Place
from tpdist.plan.shards import Interval, Partition
from tpdist.plan.sizes import Extra, Model
from tpdist.plan.stages import Stage, stage_weights
from tpdist.sampling_params import SamplingParams

GIB = 1024**3
PLAIN = LayerConfig(sliding_window=None, rope=RopeConfig())
WINDOWED = LayerConfig(sliding_window=32, rope=RopeConfig(rope_theta=500.0, partial_rotary_factor=0.5))

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "norms": {"qk_norm": True, "tie_word_embeddings": True},
    "two ropes": {"layers": (PLAIN, WINDOWED, PLAIN)},
}


def demand(**changes: Any) -> Demand:
    return Demand(**{"dtype": "float32", "max_model_len": 512, **changes})


def one_device(kind: str = "cuda", **changes: Any) -> Device:
    fields = {"name": f"{kind}:0", "node": "a", "total_bytes": GIB, "free_bytes": GIB, "bandwidth": 1e9, **changes}
    return Device(kind=kind, **fields)  # type: ignore[arg-type]


def layout_of(config: ModelConfig, devices: tuple[Device, ...], shares: tuple[int, ...]) -> Layout:
    """All devices in one stage."""
    link = Link(bandwidth=1e9, latency_s=1e-5)
    inventory = Inventory(devices=devices, inside={"a": link}, across={}, default_across=link)
    model = Model(config, decoder_weights(config), Extra())
    return Layout(model=model, inventory=inventory, places=(Place(devices, Partition(shares)),), mode="ranks")


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("shares", [(1,), (1, 1), (2, 1, 1), (1,) * 8])
@pytest.mark.parametrize("layers", [(0, 3), (0, 1), (1, 2), (1, 3), (2, 3)])
def test_weight_bytes_are_those_of_the_parameters_and_buffers_of_a_decoder(
    changes: dict[str, Any], shares: tuple[int, ...], layers: tuple[int, int]
) -> None:
    config = small_config(**changes)
    devices = (one_device(),) * len(shares)
    layout = layout_of(config, devices, shares)
    for dtype in ("float32", "bfloat16"):
        for rank in range(len(shares)):
            decoder = Decoder(
                config,
                partition=Partition(shares),
                group=FakeGroup(rank=rank, size=len(shares)),
                dtype=getattr(torch, dtype),
                device=torch.device("meta"),
                stage=Stage(Interval(*layers), 3),
            )
            held = sum(each.nbytes for each in (*decoder.parameters(), *decoder.buffers()))
            need = layout.need(0, rank, Interval(*layers), stage=0, demand=demand(dtype=dtype))
            assert need.weight_bytes == held
            shapes = decoder.cache_shapes()
            per_token = sum(heads * size for layer in shapes for heads, size in layer) * getattr(torch, dtype).itemsize
            assert need.token_bytes == per_token


def test_the_layers_of_stages_add_up_to_the_whole_model_and_a_tied_output_has_a_copy() -> None:
    for tied in (False, True):
        config = small_config(tie_word_embeddings=tied)
        weights, items = decoder_weights(config), WeightItems(config, decoder_weights(config))
        table = items.on_rank(Partition((1,)), 0, dtype_bytes=2).by_interval()
        for start in range(3):
            for stop in range(start + 1, 4):
                own = stage_weights(weights, Stage(Interval(start, stop), 3))
                num_norms = 2 * (stop - start) + (stop == 3)
                expected = weight_bytes(own, Partition((1,)), 0, dtype_bytes=2) + 4 * num_norms
                assert table[start, stop] == expected
        assert table[0, 1] + table[1, 3] - table[0, 3] == (2 * 300 * 64 if tied else 0)


def test_with_the_head_first_the_first_layers_have_all_that_is_no_layer() -> None:
    for tied in (False, True):
        config = small_config(tie_word_embeddings=tied)
        items = WeightItems(config, decoder_weights(config)).on_rank(Partition((1,)), 0, dtype_bytes=2)
        table = items.by_interval(head_first=True)
        assert table[0, 3] == items.by_interval()[0, 3] == table[0, 1] + table[1, 3]
        assert table[1, 3] == items.layers[1:].sum()


# -- the cache --------------------------------------------------------------------------------------------------------


def test_blocks_are_as_many_as_a_rank_makes() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        budget, per_token = rng.randint(0, 10**6), rng.randint(1, 4000)
        rest = {
            "block_size": rng.choice((8, 16, 256)),
            "max_num_seqs": rng.randint(1, 20),
            "max_model_len": rng.randint(1, 500),
        }
        expected = cache_blocks(budget, block_bytes=per_token * rest["block_size"], **rest)
        try:
            assert num_blocks_that_fit(budget_bytes=budget, bytes_per_token=per_token, **rest) == expected
        except PlanError:
            assert expected == 0


def test_a_cpus_cache_takes_a_quarter_of_what_is_available_and_4_gib_at_most_by_machine() -> None:
    assert cpu_cache_budget(8 * GIB, local_ranks=1) == 2 * GIB
    assert cpu_cache_budget(64 * GIB, local_ranks=4) == 1 * GIB
    assert cpu_cache_budget(-1, local_ranks=4) == 0


def test_a_gpu_is_used_but_for_the_part_that_is_left_to_others() -> None:
    usable = cuda_usable_bytes(free_bytes=70 * GIB, total_bytes=80 * GIB, gpu_memory_utilization=0.9)
    assert abs(usable - 62 * GIB) <= 1
    assert cuda_usable_bytes(free_bytes=GIB, total_bytes=80 * GIB, gpu_memory_utilization=0.9) == 0


def test_a_sliding_window_reduces_what_is_read_and_not_what_is_held() -> None:
    config = small_config(layers=(PLAIN, WINDOWED, PLAIN))
    assert speed.tokens_read(config, demand(max_seq_len=200, max_batch_size=2)) == [400, 64, 400]
    partition = Partition((1,))
    held = costs.kv_bytes_per_layer(config, partition, 0, dtype_bytes=2)
    assert 3 * held == kv_bytes_per_token(config, partition, 0, dtype_bytes=2)


def test_the_cache_must_have_room_for_whole_blocks_of_every_sequence() -> None:
    assert costs.demanded_tokens(demand(max_seq_len=17, max_batch_size=3)) == 96
    assert costs.demanded_tokens(demand(max_seq_len=4096)) == 512
    assert costs.demanded_tokens(demand(max_seq_len=16, fixed=frozenset({"max_model_len"}))) == 512


# -- activations ------------------------------------------------------------------------------------------------------


def alive_in_forward(config: ModelConfig, *, dtype: str, tokens: int, context: int, shares: tuple[int, ...]) -> int:
    """The peak of one step with the last `tokens` of a sequence, with its inputs."""
    model = Decoder(
        config,
        partition=Partition(shares),
        group=FakeGroup(rank=0, size=len(shares)),
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    num_blocks = -(-context // 16)
    caches = [
        tuple(torch.zeros(num_blocks, 16, *shape, dtype=getattr(torch, dtype)) for shape in layer)
        for layer in model.cache_shapes()
    ]
    positions = torch.arange(context - tokens, context)
    step = AttentionContext(
        slot_mapping=positions.clone(),
        block_tables=torch.randperm(num_blocks)[None],
        context_lens=[context],
        query_lens=[tokens],
        block_size=16,
    )
    before = (*model.parameters(), *model.buffers(), *(each for layer in caches for each in layer))
    token_ids = torch.zeros(tokens, dtype=torch.int64)
    with torch.inference_mode(), LivePeak(before) as live:
        model(token_ids, positions=positions, attention=step, caches=caches)
    return live.peak + 3 * token_ids.nbytes


SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "wide MLP": {"intermediate_size": 1024},
    "wide": {"hidden_size": 1024, "intermediate_size": 64},
    "many heads": {"num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 64},
    "norms": {"qk_norm": True, "num_attention_heads": 32, "intermediate_size": 16},
    "windows": {"layers": (PLAIN, WINDOWED, PLAIN)},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "context"), [(256, 512), (64, 2048)])
@pytest.mark.parametrize("shares", [(1,), (1, 1)])
def test_a_forward_keeps_less_alive_than_predicted_but_not_much_less(
    changes: dict[str, Any], dtype: str, tokens: int, context: int, shares: tuple[int, ...]
) -> None:
    """Not more, for then it would not fit; and not much less, or room is wasted: the formula counts twice what may be
    copied, and masks for all windows."""
    config = small_config(**changes)
    asked = demand(dtype=dtype, max_model_len=context, max_seq_len=context, max_num_batched_tokens=tokens)
    alive = alive_in_forward(config, dtype=dtype, tokens=tokens, context=context, shares=shares)
    predicted = costs.forward_bytes(config, Partition(shares), 0, asked)
    assert alive <= predicted <= 2 * alive


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("num_rows", [1, 64])
@pytest.mark.parametrize("vocab_size", [1000, 150_000])
def test_logits_become_tokens_within_what_is_predicted(greedy: bool, num_rows: int, vocab_size: int) -> None:
    config = small_config(vocab_size=vocab_size)
    partition, rows = Partition((1,)), sample_rows(num_rows, greedy=greedy)
    hidden = torch.randn(64, 64)
    weight = torch.randn(vocab_size, 64)
    with torch.inference_mode(), LivePeak((weight,)) as live:
        logits = torch.nn.functional.linear(hidden[:num_rows].clone(), weight).float()
        sampler.sample(logits, rows)
    asked = demand(max_num_seqs=num_rows, max_num_batched_tokens=64)
    predicted = costs.logits_bytes(config, partition, 0, asked, kind="cpu")
    assert live.peak <= predicted


def sample_rows(count: int, *, greedy: bool) -> list[SampleRow]:
    sampling = SamplingParams(temperature=0.0 if greedy else 1.0, top_p=0.9, min_p=0.01)
    tokens = torch.zeros(8, dtype=torch.int32).numpy()
    return [
        SampleRow(sampling=sampling, stop_token_ids=(), seed=row, num_prompt_tokens=4, tokens=tokens, num_tokens=4)
        for row in range(count)
    ]


def test_only_the_rank_that_samples_holds_all_logits() -> None:
    config, asked = small_config(vocab_size=100_000), demand(max_num_seqs=64)
    first, second = (costs.logits_bytes(config, Partition((1, 1)), rank, asked, kind="cuda") for rank in (0, 1))
    held = 2048 * 64 * 4
    assert second == held + 64 * (64 + 50_000) * 4
    assert first >= held + 64 * 100_000 * (4 + 4)


def test_constants_are_those_of_the_code_that_they_describe() -> None:
    assert costs.MAX_MASK_ELEMENTS == attention.MAX_MASK_ELEMENTS
    assert costs.SAMPLER_PART == {"cpu": sampler.CPU_PART_SIZE, "cuda": sampler.DEVICE_PART_SIZE}
    assert costs.LOGPROB_ROWS == logprobs.ROWS_AT_ONCE
    assert costs.DIGITS_BYTES == 2 * 8 * (sampler.NUM_DIGITS + 1)
    assert costs.SLOT_BYTES == segment.SLOT_BYTES
    assert costs.STREAM_BUFFERS == streamed.NUM_BUFFERS


def test_masks_are_bounded_for_each_sequence_and_each_window() -> None:
    def masks(config: ModelConfig, **changes: Any) -> int:
        longer = demand(max_num_batched_tokens=2048, max_model_len=100_000, max_seq_len=65536, **changes)
        return costs._mask_bytes(config, longer)

    one = costs.MAX_MASK_ELEMENTS * 4
    making = costs.MAX_MASK_ELEMENTS * 2
    assert masks(small_config()) == one + making
    assert masks(small_config(), max_batch_size=2) == 2 * one + making
    assert masks(small_config(layers=(PLAIN, WINDOWED, PLAIN))) == 2 * one + making


# -- communication and overhead ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_of_a_machine_together_hold_the_memory_that_they_share(size: int) -> None:
    shared = sum(costs.gloo_bytes([size], rank, hidden_bytes=1000) for rank in range(size))
    assert segment._num_bytes(size) <= shared < segment._num_bytes(size) + size


def test_first_ranks_of_machines_hold_a_sum_of_each_machine() -> None:
    header, slots = costs.SEGMENT_HEADER_BYTES, 2 * costs.SLOT_BYTES
    assert [costs.gloo_bytes([2, 1], rank, hidden_bytes=1000) for rank in range(3)] == [
        header // 2 + slots + 2000,
        header // 2 + slots,
        2000,
    ]
    assert costs.gloo_bytes([1], 0, hidden_bytes=1000) == 0


def test_nccl_has_a_communicator_of_all_and_one_of_each_smaller_group() -> None:
    pairs = [(1, 1), (2, 2), (1, 2), (2, 4)]
    numbers = [costs.nccl_bytes(tp_size=tp, world_size=world) // costs.NCCL_BYTES for tp, world in pairs]
    assert numbers == [0, 1, 1, 2]


def test_stages_hold_what_they_receive_and_what_is_on_its_way() -> None:
    config = small_config()
    devices = tuple(one_device(kind="cpu", name=f"cpu:{index}", node=f"n{index}") for index in range(3))
    link = Link(bandwidth=1e9, latency_s=1e-5)
    inventory = Inventory(devices=devices, inside={}, across={}, default_across=link)
    places = tuple(Place((device,), Partition((1,))) for device in devices)
    model = Model(config, decoder_weights(config), Extra())
    layout = Layout(model=model, inventory=inventory, places=places, mode="ranks")
    hidden = 2048 * 64 * 4
    needs = [layout.need(i, 0, Interval(i, i + 1), stage=i, demand=demand()) for i in range(3)]
    assert [need.communication_bytes for need in needs] == [3 * hidden, 4 * hidden, hidden]
    in_one_process = replace(layout, mode="devices")
    needs = [in_one_process.need(i, 0, Interval(i, i + 1), stage=i, demand=demand()) for i in range(3)]
    assert [need.communication_bytes for need in needs] == [0, hidden, hidden]


def test_tables_by_interval_agree_with_single_intervals() -> None:
    rng = random.Random(3)
    for _ in range(20):
        config = small_config(tie_word_embeddings=rng.random() < 0.5, layers=(PLAIN, WINDOWED, PLAIN))
        kind, shares = rng.choice(("cuda", "cpu")), rng.choice(((1,), (1, 2)))
        devices = tuple(
            one_device(kind=kind, name=f"{kind}:{rank}", free_bytes=rng.randint(1, GIB))
            for rank, _ in enumerate(shares)
        )
        layout = replace(layout_of(config, devices, shares), head_first=rng.random() < 0.3)
        asked = demand(max_seq_len=rng.randint(1, 512), max_num_seqs=rng.randint(1, 9))
        table = layout.overflow(asked)
        for start in range(3):
            for stop in range(start + 1, 4):
                needs = [
                    layout.need(0, rank, Interval(start, stop), stage=0, demand=asked) for rank in range(len(shares))
                ]
                tokens = costs.demanded_tokens(asked)
                assert table[0, start, stop] == max(tokens * need.token_bytes - need.room_bytes for need in needs)


def test_a_vision_tower_takes_its_weights_and_its_patches() -> None:
    tower = VisionTower(parameter_bytes=600, hidden_size=1024, intermediate_size=4096, patch_size=14)
    asked = demand(dtype="bfloat16", max_image_length=336, max_num_images=2)
    assert vision_bytes(tower, asked) == (600, 2 * 24 * 24 * (2 * 1024 + 2 * 4096) * 2)


# -- seconds ----------------------------------------------------------------------------------------------------------


def test_a_ring_moves_almost_twice_the_bytes() -> None:
    link = Link(bandwidth=1e9, latency_s=1e-5)
    assert speed.all_reduce_s(1e6, size=2, link=link) == pytest.approx(1e-5 + 1e-3)
    assert speed.all_reduce_s(1e6, size=4, link=link) == pytest.approx(1e-5 + 1.5e-3)
    assert speed.all_reduce_s(1e6, size=1, link=None) == 0


def test_links_are_found_by_the_nodes_of_two_devices() -> None:
    fast, slow, other = (Link(bandwidth=b, latency_s=latency) for b, latency in ((9e9, 1e-6), (1e9, 1e-4), (5e9, 1e-3)))
    a, b, c = (one_device(node=node) for node in "abc")
    inventory = Inventory(
        devices=(a, b, c), inside={"a": fast}, across={("a", "b"): slow, ("c", "a"): other}, default_across=fast
    )
    assert speed.link_between(inventory, a, a) == fast
    assert speed.link_between(inventory, b, a) == slow
    assert speed.link_between(inventory, a, c) == other
    assert speed.link_between(inventory, b, c) == fast
    assert speed.slowest_link(inventory, [a]) is None
    assert speed.slowest_link(inventory, [a, a, b, c]) == Link(bandwidth=1e9, latency_s=1e-3)


def test_a_decode_step_reads_weights_and_cache_and_reduces_twice_a_layer() -> None:
    config = small_config()
    device = one_device(bandwidth=1e9)
    alone = layout_of(config, (device,), (1,))
    asked = demand(max_seq_len=100)
    items = alone.model.items(Partition((1,)), 0, "float32")
    cache = 3 * 100 * costs.kv_bytes_per_layer(config, Partition((1,)), 0, dtype_bytes=4)
    read = int(items.layers.sum()) + items.final_norm + items.head + cache
    assert alone.seconds(asked)[0, 0, 3] == pytest.approx(read / 1e9)
    # The embedding's rows are too few to count, and a tied output is read whole.
    assert items.head == 300 * 64 * 4

    pair = layout_of(config, (device, device), (1, 1))
    reduce_s, gather_s = 1e-5 + 64 * 4 / 1e9, 1e-5 + 150 * 4 / 1e9
    exchange_s = 7 * reduce_s + gather_s + 1e-5 + 8 / 1e9
    items = pair.model.items(Partition((1, 1)), 0, "float32")
    read = int(items.layers.sum()) + items.final_norm + items.head + cache // 2
    assert pair.seconds(asked)[0, 0, 3] == pytest.approx(read / 1e9 + exchange_s)
