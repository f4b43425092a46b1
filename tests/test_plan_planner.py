"""Placements of ranks: sizes, shares, stages, what shrinks, what is refused and what is recommended."""

import json
import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from inventories import GIB, MIB, cpu, demand, gpu, inventory
from plans import small_config

from tpdist.errors import JoinError, PlanError
from tpdist.plan import costs
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.layouts import factorisations, proportions
from tpdist.plan.memory import cpu_cache_budget
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device, Placement
from tpdist.plan.places import Layout, Place
from tpdist.plan.planner import plan_ranks
from tpdist.plan.shards import Interval, Partition
from tpdist.plan.sizes import Extra, Model

LLAMA_405B = {
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
}


def place(config: ModelConfig, devices: list[Device], asked: Demand | None = None, **options: Any) -> Placement:
    defaults = {"tp_size": None, "pp_size": None, "shares": None, "stage_layers": None}
    weights = decoder_weights(config)
    return plan_ranks(config, weights, inventory(devices), asked or demand(), **{**defaults, **options})


def gpus(*sizes: int, node: str = "a") -> list[Device]:
    return [gpu(index, size, node=node) for index, size in enumerate(sizes)]


def layers_of(placement: Placement) -> list[int]:
    return [layers.size for layers in placement.stage_layers]


def assert_consistent(placement: Placement, config: ModelConfig) -> None:
    """What holds of every placement of ranks that is not refused."""
    asked = placement.demand
    assert [plan.rank for plan in placement.devices] == list(range(placement.tp_size * placement.pp_size))
    assert placement.stage_layers[0].start == 0
    assert placement.stage_layers[-1].stop == config.num_hidden_layers
    assert min(layers_of(placement)) > 0
    for plan in placement.devices:
        assert plan.used_bytes <= plan.usable_bytes
        assert plan.layers == placement.stage_layers[plan.stage]
        assert plan.tokens == placement.extra["num_blocks"] * asked.block_size
        assert plan.tokens >= costs.demanded_tokens(asked)
        assert plan.holds_embedding == (plan.stage == 0)
        assert plan.holds_head == (plan.stage == placement.pp_size - 1)
    assert costs.context_tokens(asked) <= placement.longest_context
    assert placement.longest_context <= min(asked.max_model_len, placement.devices[0].tokens)
    json.dumps(placement.as_dict(), allow_nan=False)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_the_default_is_one_stage() -> None:
    placement = place(small_config(), gpus(GIB, GIB, GIB, GIB))
    assert (placement.tp_size, placement.pp_size, placement.notes) == (4, 1, ())
    assert placement.shares == ((1, 1, 1, 1),)


def test_where_heads_do_not_suffice_the_fewest_stages_are_taken_and_a_note_says_so() -> None:
    config = small_config()
    placement = place(config, gpus(*[GIB] * 9))
    assert (placement.tp_size, placement.pp_size) == (3, 3)
    assert layers_of(placement) == [1, 1, 1]
    assert placement.notes == (
        "9 ranks and 8 query heads: 3 stages of 3, since tensor-parallel size 9 is more than 8 query heads",
    )
    assert_consistent(placement, config)


def test_ranks_that_no_layout_suits_are_refused_with_every_reason() -> None:
    with pytest.raises(PlanError) as caught:
        place(small_config(), gpus(*[GIB] * 11))
    assert str(caught.value) == (
        "LlamaForCausalLM cannot be cut for 11 ranks: tensor-parallel size 11 is more than 8 query heads; "
        "11 stages are more than 3 layers. Use 10 ranks"
    )


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, None), (None, 3), (2, 3)])
def test_if_one_size_is_given_the_other_follows(tp_size: int | None, pp_size: int | None) -> None:
    placement = place(small_config(), gpus(*[GIB] * 6), tp_size=tp_size, pp_size=pp_size)
    assert (placement.tp_size, placement.pp_size) == (2, 3)


@pytest.mark.parametrize(
    ("num_ranks", "tp_size", "pp_size", "message"),
    [
        (2, 3, None, "tensor_parallel_size=3 times 1 stages needs 3 ranks, but the nodes have 2; change"),
        (2, 2, 2, "tensor_parallel_size=2 times 2 stages needs 4 ranks, but the nodes have 2; change"),
        (5, 2, None, "tensor_parallel_size=2 times 2 stages needs 4 ranks, but the nodes have 5; change"),
        (5, None, 3, "tensor_parallel_size=1 times 3 stages needs 3 ranks, but the nodes have 5; change"),
    ],
)
def test_sizes_that_contradict_the_ranks_are_refused(
    num_ranks: int, tp_size: int | None, pp_size: int | None, message: str
) -> None:
    with pytest.raises(JoinError, match=message):
        place(small_config(), gpus(*[GIB] * num_ranks), tp_size=tp_size, pp_size=pp_size)


def test_sizes_that_the_model_cannot_be_cut_to_are_refused() -> None:
    with pytest.raises(PlanError, match="cannot be sharded over tensor-parallel size 9: it has 8 query heads"):
        place(small_config(), gpus(*[GIB] * 9), pp_size=1)
    with pytest.raises(PlanError, match="cannot be cut so: 4 stages are more than 3 layers"):
        place(small_config(), gpus(*[GIB] * 4), pp_size=4)


def test_nothing_is_placed_on_no_devices() -> None:
    with pytest.raises(PlanError, match="there is no device"):
        place(small_config(), [])


def test_the_ranks_are_the_gpus_where_there_are_any() -> None:
    placement = place(small_config(), [*gpus(GIB, GIB), cpu(GIB)])
    assert [plan.device.name for plan in placement.devices] == ["cuda:0", "cuda:1"]
    assert [plan.device.name for plan in place(small_config(), [cpu(GIB)]).devices] == ["cpu"]


# -- layers and shares ------------------------------------------------------------------------------------------------


def test_layers_of_stages_are_as_given_or_checked() -> None:
    config = small_config(num_hidden_layers=6)
    assert layers_of(place(config, gpus(GIB, GIB), stage_layers=(1, 5))) == [1, 5]
    with pytest.raises(PlanError, match=r"layers of 3 stages \(2, 2, 2\) were given, but there are 2 stages"):
        place(config, gpus(GIB, GIB), pp_size=2, stage_layers=(2, 2, 2))
    with pytest.raises(PlanError, match=r"\(1, 4\) must be at least one each and add up to the model's 6 layers"):
        place(config, gpus(GIB, GIB), stage_layers=(1, 4))


def test_layers_that_are_given_are_compared_with_the_best() -> None:
    config = small_config(num_hidden_layers=12)
    placement = place(config, [gpu(0, GIB, bandwidth=1e9), gpu(1, GIB, bandwidth=1e9)], stage_layers=(1, 11))
    best = [each for each in placement.rejected if each.pp_size == 2]
    assert len(best) == 1
    assert sum(best[0].stage_layers) == 12
    assert best[0].slowest_stage_s < placement.slowest_stage_s
    assert "faster by" in best[0].reason


def test_a_faster_device_gets_more_layers() -> None:
    config = small_config(num_hidden_layers=12)
    devices = [gpu(0, GIB, bandwidth=3e9), gpu(1, GIB, bandwidth=1e9)]
    first, second = layers_of(place(config, devices, pp_size=2))
    assert first > 2 * second


def test_shares_are_even_or_as_given() -> None:
    config = small_config(num_hidden_layers=4)
    devices = gpus(*[GIB] * 4)
    assert place(config, devices, pp_size=2, shares=(2, 1)).shares == ((2, 1), (2, 1))
    assert place(config, devices, pp_size=2, shares=(2, 1, 1, 3)).shares == ((2, 1), (1, 3))
    with pytest.raises(PlanError, match=r"3 shares \(1, 2, 3\) were given, but it takes 2 \(the same for each stage\)"):
        place(config, devices, pp_size=2, shares=(1, 2, 3))
    with pytest.raises(PlanError, match=r"3 shares \(1, 2, 3\) were given, but it takes 4"):
        place(config, devices, pp_size=1, shares=(1, 2, 3))


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [
        ((80, 80, 40), (2, 2, 1)),
        ((48, 24), (2, 1)),
        ((80, 79, 80), (1, 1, 1)),
        ((80, 79, 40), (2, 2, 1)),
        ((24, 16), (8, 5)),
        ((1000, 1), (8, 1)),
    ],
)
def test_memory_becomes_small_whole_shares(amounts: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert proportions(amounts, steps=8) == expected


def test_shares_by_memory_are_those_of_each_stage() -> None:
    config = small_config(num_hidden_layers=4, num_attention_heads=16, num_key_value_heads=16)
    sizes = [2000, 1000, 1000, 3000]
    placement = place(config, gpus(*[size * MIB for size in sizes]), pp_size=2, shares="auto")
    assert placement.shares[0] != placement.shares[1]
    for shares, pair in zip(placement.shares, (sizes[:2], sizes[2:]), strict=True):
        assert (shares[0] > shares[1]) == (pair[0] > pair[1])


def test_finer_shares_are_taken_if_readable_ones_do_not_fit() -> None:
    """An eighth of the larger device is too coarse a step for what the smaller one has."""
    config = small_config(vocab_size=778_000, num_attention_heads=64, num_key_value_heads=64, head_dim=2)
    small = demand(max_num_batched_tokens=16, max_num_seqs=1, max_seq_len=16)
    sizes = [(256 + 450) * MIB, (256 + 24) * MIB]
    placement = place(config, gpus(*sizes), small, tp_size=2, shares="auto")
    assert_consistent(placement, config)
    assert placement.shares == ((64, 3),)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_the_cut_is_the_best_of_all_that_fit(objective: str) -> None:
    rng = random.Random(4)
    refused = 0
    for _ in range(60):
        config = small_config(num_hidden_layers=6, vocab_size=20_000, tie_word_embeddings=rng.random() < 0.5)
        devices = [
            gpu(index, rng.randint(266, 276) * MIB, bandwidth=rng.choice((1e9, 2e9)), node=rng.choice("ab"))
            for index in range(3)
        ]
        asked = demand(
            max_seq_len=64, max_num_seqs=4, max_num_batched_tokens=64, fixed=frozenset(("max_seq_len", "max_num_seqs"))
        )
        asked = Demand(**{**vars(asked), "fixed": asked.fixed | {"max_num_batched_tokens"}})
        best = best_cut(config, devices, asked, objective)
        if best is None:
            refused += 1
            with pytest.raises(PlanError, match="does not fit"):
                place(config, devices, asked, pp_size=3, objective=objective)
            continue
        placement = place(config, devices, asked, pp_size=3, objective=objective)
        assert_consistent(placement, config)
        found = placement.latency_s if objective == "latency" else placement.slowest_stage_s
        assert found == pytest.approx(best, rel=1e-9)
    assert 10 < refused < 50


def best_cut(config: ModelConfig, devices: list[Device], asked: Demand, objective: str) -> float | None:
    """The least seconds of all cuts that fit, one stage on each device."""
    places = tuple(Place((device,), Partition((1,))) for device in devices)
    model = Model(config, decoder_weights(config), Extra())
    layout = Layout(model=model, inventory=inventory(devices), places=places, mode="ranks")
    seconds, transfers = layout.seconds(asked), layout.transfers(asked)
    results = []
    for inner in combinations(range(1, config.num_hidden_layers), len(devices) - 1):
        bounds = (0, *inner, config.num_hidden_layers)
        runs = [Interval(bounds[i], bounds[i + 1]) for i in range(len(devices))]
        needs = [layout.need(i, 0, run, stage=i, demand=asked) for i, run in enumerate(runs)]
        if all(costs.demanded_tokens(asked) * need.token_bytes <= need.room_bytes for need in needs):
            values = [seconds[i, run.start, run.stop] for i, run in enumerate(runs)]
            values = [value + transfers[i, i + 1] * (i + 1 < len(runs)) for i, value in enumerate(values[:-1])] + [
                values[-1]
            ]
            total = sum(values) + layout.return_s(range(len(devices)), asked)
            results.append(total if objective == "latency" else max(values))
    return min(results, default=None)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_gpus_cache_takes_what_is_left_but_no_more_than_sequences_can_use() -> None:
    config = small_config()
    plan = place(config, gpus(100 * MIB), demand(max_num_seqs=4)).devices[0]
    assert plan.tokens == 4 * 512
    larger = place(config, gpus(100 * MIB), demand(max_num_seqs=100_000, max_num_batched_tokens=16)).devices[0]
    block_bytes = 16 * 2 * 4 * 16 * 4 * 3
    assert 0 <= larger.usable_bytes - larger.used_bytes < block_bytes
    assert larger.kv_cache_bytes % block_bytes == 0


def test_a_cpus_cache_follows_the_rule_of_its_ranks() -> None:
    """Two ranks of one machine, each of which was given half of its memory."""
    config = small_config()
    devices = [cpu(GIB // 2), cpu(GIB // 2)]
    placement = place(config, devices, demand(max_num_seqs=100_000), tp_size=2)
    left = sum(
        p.device.free_bytes - p.weight_bytes - p.overhead_bytes - p.communication_bytes for p in placement.devices
    )
    budget = cpu_cache_budget(left, local_ranks=2)
    block_bytes = 16 * 2 * 2 * 16 * 4 * 3
    assert placement.extra["num_blocks"] == budget // block_bytes


def test_a_cache_that_was_asked_for_is_the_same_on_each_rank() -> None:
    config = small_config(num_hidden_layers=4)
    asked = demand(kv_cache_memory_bytes=10 * MIB, max_num_seqs=100_000)
    placement = place(config, gpus(GIB, GIB), asked, stage_layers=(1, 3))
    token_bytes = 2 * 4 * 16 * 4
    assert placement.extra["num_blocks"] == 10 * MIB // (3 * token_bytes * 16)
    assert [plan.kv_cache_bytes for plan in placement.devices] == [
        placement.extra["num_blocks"] * 16 * layers * token_bytes for layers in (1, 3)
    ]


def test_a_cache_that_was_asked_for_moves_layers_to_where_it_fits() -> None:
    config = small_config(num_hidden_layers=8)
    devices = [gpu(0, 400 * MIB, bandwidth=5e12), gpu(1, 3 * GIB, bandwidth=1e12)]
    asked = demand(kv_cache_memory_bytes=2 * GIB, max_num_seqs=10**6, max_num_batched_tokens=64, max_model_len=4096)
    placement = place(config, devices, asked, pp_size=2)
    assert_consistent(placement, config)


# -- what shrinks -----------------------------------------------------------------------------------------------------


def smallest_that_fits(config: ModelConfig, asked: Demand) -> int:
    """The least bytes of one GPU on which nothing of this demand has to shrink."""
    low, high = 0, 64 * GIB
    while low < high:
        middle = (low + high) // 2
        try:
            fits = place(config, gpus(middle), asked).demand == asked
        except PlanError:
            fits = False
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def test_the_context_shrinks_first_to_the_longest_that_fits_in_whole_blocks() -> None:
    config = small_config()
    asked = demand(max_model_len=4096, max_num_seqs=4)
    shorter = Demand(**{**vars(asked), "max_seq_len": 1008})
    size = smallest_that_fits(config, shorter)
    placement = place(config, gpus(size), asked)
    assert placement.demand == shorter
    (note,) = placement.notes
    assert note.startswith("max_seq_len shrank from 4096 to 1008 tokens, so that the model fits: cuda:0 on a lacked ")
    assert place(config, gpus(size - 1), asked).demand.max_seq_len == 992
    assert_consistent(placement, config)


def test_then_the_batch_shrinks_by_halves_with_the_longest_context_each_time() -> None:
    config = small_config()
    asked = demand(max_model_len=4096, max_num_seqs=4)
    one_block = Demand(**{**vars(asked), "max_seq_len": 16})
    size = smallest_that_fits(config, one_block) - 1
    placement = place(config, gpus(size), asked)
    assert placement.demand.max_num_batched_tokens == 1024
    assert placement.demand.max_num_seqs == 4
    assert placement.demand.max_seq_len > 16
    assert [note.split(",")[0] for note in placement.notes] == [
        f"max_seq_len shrank from 4096 to {placement.demand.max_seq_len} tokens",
        "max_num_batched_tokens shrank from 2048 to 1024 tokens",
    ]


def test_last_the_number_of_sequences_shrinks() -> None:
    config = small_config(vocab_size=30_000)
    asked = demand(max_num_seqs=256, max_model_len=64)
    few_tokens = Demand(**{**vars(asked), "max_seq_len": 16, "max_num_batched_tokens": 16})
    size = smallest_that_fits(config, few_tokens) - 1
    placement = place(config, gpus(size), asked)
    assert (placement.demand.max_num_batched_tokens, placement.demand.max_num_seqs) == (16, 8)
    assert "max_num_seqs shrank from 256 to 8 sequences" in placement.notes[-1]


@pytest.mark.parametrize(
    ("fixed", "value"),
    [("max_seq_len", 4096), ("max_num_batched_tokens", 2048), ("max_num_seqs", 256)],
)
def test_what_the_user_set_never_shrinks(fixed: str, value: int) -> None:
    config = small_config(vocab_size=30_000)
    asked = demand(max_model_len=4096, fixed=frozenset({fixed}))
    enough = smallest_that_fits(config, asked)
    for size in range(enough - 1, enough // 2, -enough // 9):
        try:
            placement = place(config, gpus(size), asked)
        except PlanError:
            continue
        assert getattr(placement.demand, fixed) == value
        assert placement.demand != asked
        assert_consistent(placement, config)


def test_a_model_length_that_the_user_set_is_what_there_must_be_room_for() -> None:
    config = small_config()
    asked = demand(max_model_len=8192, max_seq_len=16, max_num_seqs=1, fixed=frozenset({"max_model_len"}))
    placement = place(config, gpus(GIB), asked)
    assert placement.longest_context == 8192
    with pytest.raises(PlanError, match="one sequence of 8192 tokens"):
        place(config, gpus(12 * MIB), asked)


def test_a_length_of_one_sequence_that_the_user_set_counts_and_not_the_models() -> None:
    config = small_config()
    both = frozenset({"max_model_len", "max_seq_len"})
    asked = demand(max_model_len=8192, max_seq_len=64, max_num_seqs=1, max_num_batched_tokens=16, fixed=both)
    placement = place(config, gpus(12 * MIB), asked)
    assert placement.demand == asked
    assert 64 <= placement.longest_context < 8192
    only_model = Demand(**{**vars(asked), "fixed": frozenset({"max_model_len"})})
    with pytest.raises(PlanError, match="one sequence of 8192 tokens"):
        place(config, gpus(12 * MIB), only_model)


def test_there_are_never_fewer_sequences_than_the_batch_that_there_must_be_room_for() -> None:
    config = small_config(vocab_size=30_000)
    fixed = frozenset({"max_batch_size"})
    asked = demand(max_num_seqs=256, max_model_len=64, max_batch_size=12, fixed=fixed)
    few_tokens = Demand(**{**vars(asked), "max_seq_len": 16, "max_num_batched_tokens": 16, "max_num_seqs": 12})
    placement = place(config, gpus(smallest_that_fits(config, few_tokens)), asked)
    assert placement.demand.max_num_seqs == 12
    with pytest.raises(PlanError, match="12 sequences of 16 tokens, max_num_batched_tokens 16 and max_num_seqs 12"):
        place(config, gpus(MIB), asked)


# -- refusals ---------------------------------------------------------------------------------------------------------


def refusal(config: ModelConfig, devices: list[Device], asked: Demand | None = None, **options: Any) -> list[str]:
    with pytest.raises(PlanError) as caught:
        place(config, devices, asked, **options)
    return str(caught.value).splitlines()


def test_a_refusal_has_the_exact_shortfall_of_the_fullest_device_and_its_parts() -> None:
    config = small_config(**LLAMA_8B)
    asked = demand(dtype="bfloat16", max_model_len=131072)
    lines = refusal(config, gpus(8 * GIB), asked)
    lacks = int(lines[0].split("(")[1].split(" ")[0].replace(",", ""))
    assert lines[0] == (
        f"the model does not fit: cuda:0 on a lacks {lacks / GIB:.1f} GiB ({lacks:,} bytes) of the 8.7 GiB "
        "(9,328,132,096 bytes) that may be used of it"
    )
    assert lines[1].startswith("  it needs weights 15.0 GiB, KV cache 2.0 MiB, activations ")
    assert lines[1].endswith("communication 0 bytes, overhead 704.0 MiB (layers 0 to 31, bfloat16)")
    assert lines[2] == (
        "  for one sequence of 16 tokens, max_num_batched_tokens 16 and max_num_seqs 1 (shrunk from one sequence of "
        "4096 tokens, max_num_batched_tokens 2048 and max_num_seqs 256)"
    )
    fitting = place(config, gpus(8 * GIB + lacks), asked)
    assert fitting.demand.max_num_seqs == 1
    refusal(config, gpus(8 * GIB + lacks - 1), asked)


def test_a_refusal_says_how_many_devices_would_do_and_they_do() -> None:
    config = small_config(**LLAMA_8B)
    asked = demand(dtype="bfloat16", max_model_len=131072)
    lines = refusal(config, gpus(4 * GIB), asked)
    (line,) = [line for line in lines if "devices such as" in line]
    count = int(line.split()[1])
    place(config, gpus(*[4 * GIB] * count), asked)
    assert line.startswith(f"  - {count} devices such as cuda:0 would fit: --tensor-parallel-size ")
    assert any("not even 64 devices" in line for line in refusal(config, gpus(100 * MIB), asked))


def test_a_refusal_names_smaller_numbers_where_they_would_fit() -> None:
    config = small_config(**LLAMA_8B)
    devices = gpus(20 * GIB)
    lines = refusal(config, devices, demand(max_model_len=131072))
    assert "  - --dtype bfloat16 would fit" in lines
    fixed = demand(dtype="bfloat16", max_model_len=131072, max_seq_len=131072, fixed=frozenset({"max_seq_len"}))
    lines = refusal(config, devices, fixed)
    assert any(line.startswith("  - without --max-seq-len it would fit with one sequence of ") for line in lines)
    half = demand(dtype="bfloat16", max_model_len=131072, gpu_memory_utilization=0.5)
    assert any(
        line.startswith("  - --gpu-memory-utilization 0.98 would fit") for line in refusal(config, devices, half)
    )


def test_a_refusal_names_another_layout_where_it_would_fit() -> None:
    """Norms and NCCL's buffers are on each rank of a group; and heads are few."""
    config = small_config(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=40, head_dim=512)
    asked = demand(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=20_000, max_seq_len=20_000)
    asked = Demand(**{**vars(asked), "fixed": frozenset({"max_seq_len"})})
    size = 256 * MIB + 1700 * MIB + 300 * MIB
    lines = refusal(config, gpus(size, size), asked, tp_size=2)
    assert "  - --tensor-parallel-size 1 --pipeline-parallel-size 2 would fit" in lines


def test_a_refusal_names_other_layers_and_shares_where_they_would_fit() -> None:
    config = small_config(num_hidden_layers=8, vocab_size=30_000)
    asked = demand(max_num_seqs=1, max_num_batched_tokens=16, max_seq_len=16)
    devices = gpus(300 * MIB, 266 * MIB)
    lines = refusal(config, devices, asked, stage_layers=(1, 7))
    assert any(line.endswith(" layers on the stages would fit") for line in lines)
    config = small_config(vocab_size=100_000)
    lines = refusal(config, gpus(330 * MIB, 275 * MIB), asked, tp_size=2)
    assert "  - shares in proportion to the devices' memory (auto) would fit" in lines


@pytest.mark.parametrize("make", [gpu, lambda index, size: cpu(size, node="ab"[index])])
@pytest.mark.parametrize("name", ["max_batch_size", "max_seq_len", "max_num_batched_tokens"])
@pytest.mark.parametrize("value", [10**14, 10**30])
def test_a_demand_beyond_all_machines_is_refused(make: Callable[..., Device], name: str, value: int) -> None:
    asked = demand(**{"max_model_len": 10**30, name: value}, fixed=frozenset({name}))
    devices = [make(index, GIB) for index in range(2)]
    for options in ({"tp_size": 2}, {"pp_size": 2}):
        for cache in (None, 10**40):
            with pytest.raises(PlanError, match="does not fit"):
                place(small_config(), devices, Demand(**{**vars(asked), "kv_cache_memory_bytes": cache}), **options)


def test_shares_by_memory_are_not_tried_on_devices_that_have_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise AssertionError("shares by memory of equal devices are even ones")

    monkeypatch.setattr("tpdist.plan.layouts.shares_by_memory", refused)
    assert any("does not fit" in line for line in refusal(small_config(), gpus(MIB, MIB), tp_size=2))


def test_a_cache_that_may_not_be_large_enough_is_told_from_a_lack_of_room() -> None:
    config = small_config()
    asked = demand(kv_cache_memory_bytes=MIB, max_model_len=4096, fixed=frozenset({"max_seq_len"}))
    lines = refusal(config, gpus(GIB), asked)
    cache = 4096 * 2 * 4 * 16 * 4 * 3
    assert lines[0] == (
        "the model does not fit: the KV cache of cuda:0 on a may take 1.0 MiB (1,048,576 bytes) with "
        f"--kv-cache-memory-bytes 1MiB, which is {(cache - MIB) / MIB:.1f} MiB ({cache - MIB:,} bytes) less than it "
        f"needs; that takes --kv-cache-memory-bytes {cache} or more"
    )
    place(config, gpus(GIB), Demand(**{**vars(asked), "kv_cache_memory_bytes": cache}))
    assert any(line.startswith("  - without --kv-cache-memory-bytes it would fit") for line in lines)


def test_a_cpus_cache_that_the_rule_keeps_small_is_told_from_a_lack_of_room() -> None:
    config = small_config()
    asked = demand(max_model_len=10**7, max_seq_len=1_100_000, max_num_batched_tokens=16, max_num_seqs=1)
    asked = Demand(**{**vars(asked), "fixed": frozenset({"max_seq_len"})})
    lines = refusal(config, [cpu(6 * GIB)], asked)
    assert "the KV cache of cpu on a may take 1.5 GiB" in lines[0]
    assert "by default" in lines[0]


def test_a_cache_that_was_asked_for_and_has_no_room_is_refused() -> None:
    config = small_config()
    asked = demand(kv_cache_memory_bytes=2 * GIB, max_num_seqs=10**6, fixed=frozenset({"max_num_seqs"}))
    lines = refusal(config, gpus(GIB), asked)
    assert "cuda:0 on a lacks 1." in lines[0]
    assert any(line.startswith("  - without --kv-cache-memory-bytes it would fit") for line in lines)


# -- what else was weighed --------------------------------------------------------------------------------------------


def test_every_other_layout_is_weighed_with_its_reason() -> None:
    config = small_config(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    placement = place(config, gpus(*[GIB] * 8))
    assert (placement.tp_size, placement.pp_size) == (4, 2)
    assert [(each.tp_size, each.pp_size) for each in placement.rejected] == [(8, 1), (2, 4), (1, 8)]
    reasons = [each.reason for each in placement.rejected]
    assert reasons[0] == "tensor-parallel size 8 is more than 4 query heads"
    assert reasons[1].startswith("not asked for: ")
    assert reasons[2] == "8 stages are more than 4 layers"
    assert placement.as_dict()["rejected"][0]["latency_s"] is None
    assert_consistent(placement, config)


def test_repeated_key_value_heads_are_named_with_their_bytes() -> None:
    config = small_config(num_attention_heads=8, num_key_value_heads=2)
    repeated = 2 * 16 * 4 * 3 * 2 * 512
    placement = place(config, gpus(*[GIB] * 4))
    assert placement.notes == (
        "4 ranks and 2 key-value heads: ranks repeat heads, which takes 384.0 KiB more for the demanded tokens",
    )
    assert repeated == 384 * 1024
    other = place(config, gpus(*[GIB] * 4), tp_size=2).rejected[0]
    assert other.tp_size == 4
    assert other.reason.endswith("key-value heads are repeated: 384.0 KiB more")


def test_a_layout_that_does_not_fit_is_weighed_with_what_it_lacks() -> None:
    config = small_config(vocab_size=300_000, num_hidden_layers=4, tie_word_embeddings=True)
    asked = demand(max_num_seqs=1, max_num_batched_tokens=16)
    placement = place(config, gpus(320 * MIB, 320 * MIB), asked, tp_size=2)
    (other,) = placement.rejected
    assert other.shortfall_bytes > 0
    assert "does not fit: lacks " in other.reason
    assert " on cuda:" in other.reason


def two_nodes() -> list[Device]:
    return [gpu(index % 8, 72 * GIB, node="ab"[index // 8], bandwidth=3.35e12) for index in range(16)]


def test_stages_are_recommended_across_a_slow_link_and_not_imposed() -> None:
    config = small_config(**LLAMA_405B)
    placement = place(config, two_nodes(), demand(dtype="bfloat16", max_model_len=131072))
    assert (placement.tp_size, placement.pp_size) == (16, 1)
    (advice,) = placement.advice
    assert advice.startswith("--tensor-parallel-size 8 --pipeline-parallel-size 2 would be ")
    assert advice.endswith("its all-reduces stay inside a node, and only hidden states cross the link between nodes")


def test_nothing_is_recommended_that_is_hardly_faster() -> None:
    config = small_config(**LLAMA_8B)
    asked = demand(dtype="bfloat16", max_model_len=8192)
    assert place(config, gpus(80 * GIB, 80 * GIB), asked, objective="latency").advice == ()


def test_a_roomier_layout_is_recommended_where_the_demand_shrank() -> None:
    config = small_config(num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=40, head_dim=512)
    asked = demand(max_num_seqs=1, max_num_batched_tokens=16, max_model_len=20_000, max_seq_len=20_000)
    size = 256 * MIB + 1700 * MIB + 300 * MIB
    placement = place(config, gpus(size, size), asked, tp_size=2)
    assert placement.demand.max_seq_len < 20_000
    assert any("--pipeline-parallel-size 2 would fit without shrinking anything" in each for each in placement.advice)


def test_what_else_stays_on_the_first_stage_is_on_each_of_its_ranks() -> None:
    config = small_config(num_hidden_layers=4)
    plain = place(config, gpus(*[GIB] * 4), tp_size=2)
    more = place(config, gpus(*[GIB] * 4), tp_size=2, extra=Extra(bytes=5 * MIB, activation_bytes=200 * MIB))
    added = [b.weight_bytes - a.weight_bytes for a, b in zip(plain.devices, more.devices, strict=True)]
    assert added == [5 * MIB, 5 * MIB, 0, 0]
    assert [plan.activation_bytes == 200 * MIB for plan in more.devices] == [True, True, False, False]


# -- all sizes, and speed ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_random_ranks_are_placed_or_refused_without_contradiction() -> None:
    rng = random.Random(5)
    outcomes = {"placed": 0, "refused": 0}
    for _ in range(150):
        config = small_config(
            num_hidden_layers=rng.randint(2, 8),
            num_key_value_heads=rng.choice((1, 2, 4, 8)),
            vocab_size=rng.choice((300, 50_000)),
            tie_word_embeddings=rng.random() < 0.5,
        )
        world_size = rng.randint(1, 9)
        make = rng.random() < 0.7
        devices = [
            gpu(i, rng.randint(200, 900) * MIB, node=rng.choice("ab"), bandwidth=rng.choice((1e12, 3e12)))
            if make
            else cpu(rng.randint(20, 300) * MIB, node=rng.choice("ab"))
            for i in range(world_size)
        ]
        asked = demand(
            max_model_len=rng.choice((100, 4096)),
            max_batch_size=rng.choice((1, 4)),
            kv_cache_memory_bytes=rng.choice((None, None, rng.randint(1, 50) * MIB)),
            fixed=frozenset(rng.sample(["max_seq_len", "max_num_seqs", "max_num_batched_tokens"], rng.randint(0, 2))),
        )
        shares = rng.choice((None, "auto"))
        try:
            placement = place(config, devices, asked, shares=shares, objective=rng.choice(("latency", "throughput")))
        except PlanError:
            outcomes["refused"] += 1
            continue
        outcomes["placed"] += 1
        assert_consistent(placement, config)
        assert len(placement.rejected) == len(factorisations(world_size)) - 1
        assert (placement.demand == asked) == (not any("shrank" in note for note in placement.notes))
    assert min(outcomes.values()) > 20


def test_a_large_model_over_sixteen_devices_is_planned() -> None:
    config = small_config(**LLAMA_405B)
    asked = demand(dtype="bfloat16", max_model_len=131072)
    for options in ({}, {"pp_size": 16}, {"shares": "auto"}):
        assert_consistent(place(config, two_nodes(), asked, **options), config)
    tight = [gpu(index, 50 * GIB) for index in range(16)]
    assert place(config, tight, asked, pp_size=16, stage_layers=None).demand.max_seq_len <= 4096
