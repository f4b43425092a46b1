"""The longest context of a placement: what can be asked for, and no block more; and contexts that cannot be had."""

from dataclasses import replace
from typing import Any

import pytest
from inventories import GIB, MIB, cpu, demand, gpu, inventory
from plans import small_config

from tpdist.errors import DoesNotFitError, PlanError
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.model_config import ModelConfig
from tpdist.plan.placement import Demand, Device, Placement
from tpdist.plan.planner import plan_mapping, plan_ranks

LLAMA_8B = small_config(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=262144,
)
BATCH = frozenset({"max_num_seqs", "max_num_batched_tokens"})


def place(config: ModelConfig, devices: list[Device], asked: Demand, **options: Any) -> Placement:
    sizes = {"tp_size": None, "pp_size": None, "shares": None, "stage_layers": None}
    return plan_ranks(config, decoder_weights(config), inventory(devices), asked, **{**sizes, **options})


def gpus(*sizes: int) -> list[Device]:
    return [gpu(index, size) for index, size in enumerate(sizes)]


def with_length(asked: Demand, tokens: int) -> Demand:
    """The user sets the length and the batch, so that nothing shrinks."""
    return replace(asked, max_seq_len=tokens, fixed=BATCH | {"max_seq_len"})


def assert_longest(placement: Placement, config: ModelConfig, devices: list[Device]) -> None:
    """The same cut with the same batch has room for this length, and for no block more."""
    longest, asked = placement.longest_context, placement.demand
    stages = tuple(layers.size for layers in placement.stage_layers)
    again = place(config, devices, with_length(asked, longest), stage_layers=stages)
    assert again.demand.max_seq_len == again.longest_context == longest
    with pytest.raises(DoesNotFitError):
        place(config, devices, with_length(asked, longest + asked.block_size), stage_layers=stages)


@pytest.mark.parametrize(
    ("sizes", "stages"),
    [((21,), 1), ((20, 20), 1), ((20, 20), 2), ((11,) * 4, 1), ((11, 22), 2), ((36,), 1), ((43,), 1)],
)
def test_the_longest_context_can_be_asked_for_and_no_block_more(sizes: tuple[int, ...], stages: int) -> None:
    devices = gpus(*[size * GIB for size in sizes])
    placement = place(LLAMA_8B, devices, demand(dtype="bfloat16", max_model_len=262144), pp_size=stages)
    assert 4096 < placement.longest_context < placement.devices[0].tokens
    assert placement.longest_context % 16 == 0
    assert_longest(placement, LLAMA_8B, devices)


def test_the_longest_context_after_all_has_shrunk_is_that_to_which_it_did() -> None:
    devices = gpus(15 * GIB + 100 * MIB)
    placement = place(LLAMA_8B, devices, demand(dtype="bfloat16", max_model_len=262144))
    assert placement.longest_context == placement.demand.max_seq_len < 4096


def test_sequences_that_there_must_be_room_for_together_are_all_as_long() -> None:
    devices = gpus(40 * GIB)
    asked = demand(dtype="bfloat16", max_model_len=262144, max_batch_size=4)
    placement = place(LLAMA_8B, devices, asked)
    assert 4096 < placement.longest_context <= placement.devices[0].tokens // 4
    assert_longest(placement, LLAMA_8B, devices)


@pytest.mark.parametrize("size", [100, 512])
def test_with_room_for_it_the_longest_context_is_the_models_in_whole_blocks_or_not(size: int) -> None:
    for devices in (gpus(GIB), [cpu(GIB)]):
        assert place(small_config(), devices, demand(max_model_len=size)).longest_context == size


def test_a_cache_that_was_asked_for_is_the_longest_context_where_memory_is_ample() -> None:
    asked = demand(max_model_len=10**6, kv_cache_memory_bytes=64 * MIB)
    placement = place(small_config(), [cpu(8 * GIB)], asked)
    assert placement.longest_context == placement.devices[0].tokens == 64 * MIB // (2 * 4 * 16 * 4 * 3) // 16 * 16


def test_more_memory_never_makes_the_longest_context_shorter() -> None:
    asked = demand(max_model_len=10**6, max_num_seqs=1, max_num_batched_tokens=16, max_seq_len=64)
    longest = [place(small_config(), gpus(size * MIB), asked).longest_context for size in range(8, 200, 12)]
    assert longest == sorted(longest)
    assert len(set(longest)) == len(longest)


def test_the_longest_context_of_one_process_is_that_of_its_cut() -> None:
    config = small_config(num_hidden_layers=8, hidden_size=512, intermediate_size=2048, head_dim=64)
    devices = [gpu(0, 80 * MIB), gpu(1, 60 * MIB), cpu(GIB)]
    asked = demand(max_model_len=10**6, max_num_seqs=1, max_num_batched_tokens=16, max_seq_len=16, fixed=BATCH)

    def by_hand(tokens: int) -> Placement:
        layers = tuple((plan.device.name, plan.layers.size) for plan in placement.devices if plan.layers.size)
        head_first = placement.devices[0].holds_head
        return plan_mapping(
            config,
            decoder_weights(config),
            inventory(devices),
            with_length(asked, tokens),
            method="manual",
            device_layers=layers,
            head_first=head_first,
        )

    placement = plan_mapping(config, decoder_weights(config), inventory(devices), asked, method="exact")
    assert 16 < placement.longest_context < placement.devices[0].tokens
    assert by_hand(placement.longest_context).longest_context == placement.longest_context
    with pytest.raises(DoesNotFitError):
        by_hand(placement.longest_context + 16)


# -- what cannot be had -----------------------------------------------------------------------------------------------


def test_a_length_beyond_the_models_is_planned_as_the_models_and_a_note_says_so() -> None:
    asked = demand(max_seq_len=600, fixed=frozenset({"max_seq_len"}))
    placement = place(small_config(), gpus(GIB), asked)
    assert placement.longest_context == 512
    assert placement.notes == (
        "--max-seq-len 600 is more than what LlamaForCausalLM supports: planned for 512 tokens of one sequence",
    )
    both = replace(asked, max_model_len=256, fixed=asked.fixed | {"max_model_len"})
    assert place(small_config(), gpus(GIB), both).notes == (
        "--max-seq-len 600 is more than --max-model-len: planned for 256 tokens of one sequence",
    )
    assert place(small_config(), gpus(GIB), demand(max_seq_len=600)).notes == ()


def test_one_process_says_so_too() -> None:
    config, asked = small_config(), demand(max_seq_len=600, fixed=frozenset({"max_seq_len"}))
    for method in ("exact", "first-fit", "manual"):
        devices = inventory([gpu(0, GIB), cpu(GIB)])
        placement = plan_mapping(config, decoder_weights(config), devices, asked, method=method)  # type: ignore[arg-type]
        assert placement.notes[0].startswith("--max-seq-len 600 is more than what LlamaForCausalLM supports")


def test_where_it_does_not_fit_either_both_lengths_are_named() -> None:
    asked = demand(max_model_len=8192, max_seq_len=10_000, fixed=frozenset({"max_seq_len"}))
    with pytest.raises(PlanError, match=r"one sequence of 8192 tokens \(10000 asked for\), max_num_batched_tokens 16"):
        place(small_config(), gpus(8 * MIB), asked)


@pytest.mark.parametrize("device", [gpu(0, GIB), cpu(GIB)])
def test_where_a_cache_that_was_asked_for_is_why_the_context_shrank_the_note_names_it(device: Device) -> None:
    asked = demand(max_model_len=4096, kv_cache_memory_bytes=3 * MIB)
    placement = place(small_config(), [device], asked)
    assert placement.notes == (
        f"max_seq_len shrank from 4096 to 2048 tokens, so that the model fits: the KV cache of {device.name} on a may "
        "take 3.0 MiB with --kv-cache-memory-bytes 3MiB, and lacked 3.0 MiB",
    )


def test_where_the_rule_for_cpus_is_why_the_context_shrank_the_note_says_so() -> None:
    asked = demand(max_model_len=10**7, max_seq_len=500_000, max_num_batched_tokens=16, max_num_seqs=1)
    (note,) = place(small_config(), [cpu(2 * GIB)], asked).notes
    assert ": the KV cache of cpu on a may take 511.8 MiB by default, and lacked " in note


def test_where_room_is_why_the_note_names_the_device() -> None:
    asked = demand(max_model_len=4096, kv_cache_memory_bytes=6 * MIB)
    notes = place(small_config(), gpus(12 * MIB), asked).notes
    assert notes
    assert all(": cuda:0 on a lacked " in note for note in notes)
