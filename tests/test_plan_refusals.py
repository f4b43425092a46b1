"""What a refusal says would help: each is tried here too."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from inventories import GIB, MIB, cpu, demand, disk, gpu, inventory
from plans import small_config

from tpdist.errors import DoesNotFitError, PlanError
from tpdist.plan.costs import VisionTower
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.placement import Demand, Device, Placement
from tpdist.plan.planner import plan_mapping, plan_ranks
from tpdist.plan.refusal import flag_size
from tpdist.plan.sizes import Extra

LAYERS = small_config(num_hidden_layers=8, hidden_size=512, intermediate_size=2048, head_dim=64)
"""Of about 15 MiB each."""

TOWER = VisionTower(parameter_bytes=MIB, hidden_size=1024, intermediate_size=4096, patch_size=14)

SMALL = demand(max_num_seqs=1, max_num_batched_tokens=16, max_seq_len=16)


def ranks(devices: Sequence[Device], asked: Demand = SMALL, **options: Any) -> Placement:
    sizes = {"tp_size": None, "pp_size": None, "shares": None, "stage_layers": None}
    return plan_ranks(LAYERS, decoder_weights(LAYERS), inventory(devices), asked, **{**sizes, **options})


def process(devices: Sequence[Device], asked: Demand = SMALL, **options: Any) -> Placement:
    return plan_mapping(LAYERS, decoder_weights(LAYERS), inventory(devices), asked, **{"method": "exact", **options})


def helps(caught: pytest.ExceptionInfo[DoesNotFitError]) -> list[str]:
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines() if line.startswith("  - ")]


def helps_of_ranks(devices: Sequence[Device], asked: Demand = SMALL, **options: Any) -> list[str]:
    with pytest.raises(DoesNotFitError) as caught:
        ranks(devices, asked, **options)
    return helps(caught)


def helps_of_process(devices: Sequence[Device], asked: Demand = SMALL, **options: Any) -> list[str]:
    with pytest.raises(DoesNotFitError) as caught:
        process(devices, asked, **options)
    return helps(caught)


# -- the CPU and the disk ---------------------------------------------------------------------------------------------


def test_a_cpu_is_named_with_memory_that_is_enough() -> None:
    gpus = [gpu(0, 50 * MIB), gpu(1, 40 * MIB)]
    assert "a CPU with 1GiB among the devices would take the layers that do not fit" in helps_of_process(gpus)
    process([*gpus, cpu(GIB)])


def test_a_cpu_is_not_named_where_none_would_do() -> None:
    """No layer can leave the GPU beside the cache that the others have on the CPU."""
    beyond = replace(SMALL, max_model_len=10**12, max_seq_len=10**12, fixed=frozenset({"max_seq_len"}))
    assert not any("CPU" in each for each in helps_of_process([gpu(0, 50 * MIB)], beyond))


def test_a_larger_cpu_is_named_with_memory_that_is_enough_and_not_the_one_that_is_there() -> None:
    devices = [gpu(0, 50 * MIB), cpu(30 * MIB)]
    said = helps_of_process(devices)
    assert "a CPU with 1GiB among the devices would take the layers that do not fit" in said


def test_the_disk_is_named_where_it_helps() -> None:
    devices = [gpu(0, 50 * MIB), cpu(60 * MIB)]
    said = helps_of_process(devices)
    assert "--offload-folder FOLDER would fit: it lets layers lie on the disk, which is slowest" in said
    process([*devices, disk(GIB)], allow_disk=True)
    assert not any("--offload-folder" in each for each in helps_of_process([gpu(0, 50 * MIB), cpu(20 * MIB)]))


def test_ranks_name_the_cpu_only_where_one_process_with_it_would_fit() -> None:
    devices = [gpu(0, 40 * MIB), gpu(1, 40 * MIB)]
    expected = "MISTRALRS_NO_NCCL=1 places the layers that do not fit on the CPU, which is slower: 1GiB of its memory "
    assert any(each.startswith(expected) for each in helps_of_ranks(devices))
    process([*devices, cpu(GIB)])
    beyond = replace(SMALL, max_model_len=10**12, max_seq_len=10**12, fixed=frozenset({"max_seq_len"}))
    assert not any("MISTRALRS_NO_NCCL" in each for each in helps_of_ranks(devices, beyond))


def test_ranks_with_layers_or_shares_by_hand_say_what_is_to_be_left_out() -> None:
    devices = [gpu(0, 400 * MIB), gpu(1, 300 * MIB)]
    said = helps_of_ranks(devices, stage_layers=(1, 7))
    assert any(each.startswith("without --pipeline-layers: MISTRALRS_NO_NCCL=1 places") for each in said)
    assert any(each.startswith("without --pipeline-layers: ") and "devices such as" in each for each in said)
    said = helps_of_ranks([gpu(0, 900 * MIB), gpu(1, 10 * MIB)], tp_size=2, shares=(1, 1))
    without = "without --tensor-parallel-size, --tensor-shares: "
    assert any(each.startswith(f"{without}MISTRALRS_NO_NCCL=1 places") for each in said)


# -- limits of the user -----------------------------------------------------------------------------------------------


def test_limits_of_gpus_are_named_and_a_utilization_that_they_leave_unused_is_not() -> None:
    asked = replace(SMALL, gpu_memory_utilization=0.9)
    limited = [replace(gpu(index, 3 * GIB), limit_bytes=704 * MIB + 40 * MIB) for index in range(2)]
    said = helps_of_process(limited, asked)
    assert "--max-memory that allows the GPUs more would fit" in said
    assert "cpu=1GiB in --max-memory would take the layers that do not fit" in said
    assert not any("--gpu-memory-utilization" in each for each in said)
    process([replace(device, limit_bytes=None) for device in limited], asked)
    process([*limited, replace(cpu(3 * GIB), limit_bytes=GIB)], asked)
    assert not any("allows the GPUs more" in each for each in helps_of_process([gpu(0, 50 * MIB)], asked))


def test_a_cut_by_hand_is_said_to_be_left_out_before_anything_else_helps() -> None:
    by_hand = {"method": "manual", "device_layers": (("cuda:0", 8),)}
    without = "without --device-layers (-n), --device-map or --placement first-fit "
    assert helps_of_process([gpu(0, 60 * MIB), cpu(GIB)], **by_hand)[-1] == (
        f"{without}it would fit: 3 layers on cuda:0, 5 layers on cpu"
    )
    said = helps_of_process([gpu(0, 60 * MIB)], **by_hand)
    assert said[-1] == f"{without}a CPU with 1GiB among the devices would take the layers that do not fit"
    said = helps_of_process([gpu(0, 60 * MIB), cpu(60 * MIB)], **by_hand)
    assert said[-1].startswith(f"{without}--offload-folder FOLDER would fit")


def test_of_several_limits_the_one_that_is_too_much_is_named() -> None:
    asked = replace(SMALL, max_model_len=10**6, max_seq_len=10**6, max_num_seqs=2)
    asked = replace(asked, fixed=frozenset({"max_seq_len", "max_num_seqs"}))
    said = helps_of_ranks([gpu(0, 300 * MIB)], asked)
    assert [each.split(" it would fit")[0] for each in said if each.startswith("without ")] == ["without --max-seq-len"]
    both = replace(
        asked,
        max_num_seqs=10**5,
        max_num_batched_tokens=10**5,
        fixed=frozenset({"max_seq_len", "max_num_batched_tokens"}),
    )
    said = helps_of_ranks([gpu(0, 300 * MIB)], both)
    assert [each.split(" it would fit")[0] for each in said if each.startswith("without ")] == [
        "without --max-seq-len, --max-num-batched-tokens"
    ]


def test_images_are_named_where_there_are_any() -> None:
    asked = replace(SMALL, max_image_length=100_000, max_num_images=2)
    with pytest.raises(PlanError, match="of 16 tokens with 2 images of 100000 x 100000 pixels, max_num_batched_tokens"):
        process([gpu(0, GIB)], asked, extra=Extra.of(TOWER))
    with pytest.raises(PlanError) as caught:
        process([gpu(0, 50 * MIB)], asked)
    assert "image" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [("max_image_length", 100_000, "--max-image-length"), ("max_num_images", 10_000, "--max-num-images")],
)
def test_images_that_are_too_much_are_said_to_be_left_out(name: str, value: int, flag: str) -> None:
    asked = replace(SMALL, **{name: value}, fixed=frozenset({name}))
    expected = f"without {flag} it would fit with one sequence of 16 tokens, max_num_batched_tokens 16 and max_num_seqs"
    for devices in ([gpu(0, GIB), gpu(1, GIB)], [gpu(0, GIB), cpu(4 * GIB)]):
        assert any(each.startswith(expected) for each in helps_of_process(devices, asked, extra=Extra.of(TOWER)))
        assert any(each.startswith(expected) for each in helps_of_ranks(devices, asked, extra=Extra.of(TOWER)))
        process(devices, replace(SMALL), extra=Extra.of(TOWER))
        ranks(devices, replace(SMALL), extra=Extra.of(TOWER))


def test_the_cache_of_one_process_is_named_whole() -> None:
    asked = replace(SMALL, kv_cache_memory_bytes=1000)
    devices = [gpu(0, 100 * MIB), gpu(1, 100 * MIB)]
    with pytest.raises(DoesNotFitError, match=r"that takes --kv-cache-memory-bytes \d+ or more") as caught:
        process(devices, asked)
    enough = int(str(caught.value).split("that takes --kv-cache-memory-bytes ")[1].split()[0])
    process(devices, replace(asked, kv_cache_memory_bytes=enough))
    with pytest.raises(DoesNotFitError):
        process(devices, replace(asked, kv_cache_memory_bytes=enough - 1))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (1, "1"), (1024, "1KiB"), (1536, "1536"), (100 * MIB, "100MiB"), (GIB, "1GiB")]
)
def test_sizes_are_written_as_options_take_them(size: int, text: str) -> None:
    assert flag_size(size) == text
