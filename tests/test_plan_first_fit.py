"""First-fit placement: what must hold for every result, and the slips that such a placement is prone to."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.errors import PlanError
from tpdist.plan.first_fit import FirstFit, first_fit

MB = 1024 * 1024
NOTHING: dict[str, Any] = {
    "non_mapped_bytes": 0,
    "mapped_activation_bytes": 0,
    "non_mapped_activation_bytes": 0,
    "kv_bytes_per_layer": 0,
    "cpu": False,
    "parameters": "max_seq_len 4096, max_batch_size 1",
}


def place(layer_bytes: list[int], devices: list[tuple[str, int]], **changes: Any) -> FirstFit:
    return first_fit(layer_bytes, devices=devices, **{**NOTHING, **changes})


def free_for(usable: int) -> int:
    """The least free bytes of which `usable` may be used."""
    return -(-usable * 10 // 9)


sizes = st.integers(0, 60)
models = st.fixed_dictionaries(
    {
        "layer_bytes": st.lists(st.integers(1, 60), min_size=1, max_size=8),
        "non_mapped_bytes": sizes,
        "mapped_activation_bytes": sizes,
        "non_mapped_activation_bytes": sizes,
        "kv_bytes_per_layer": sizes,
        "devices": st.lists(st.integers(0, 500), max_size=4).map(
            lambda free: [(f"cuda:{i}", n) for i, n in enumerate(free)]
        ),
    }
)


def used_bytes(model: dict[str, Any], start: int, count: int, *, first: bool) -> int:
    """What `count` layers from `start` take on a device, summed one by one."""
    used: int = model["mapped_activation_bytes"]
    if first:
        used = max(used, model["non_mapped_activation_bytes"]) + model["non_mapped_bytes"]
    for size in model["layer_bytes"][start : start + count]:
        used += size + model["kv_bytes_per_layer"]
    return used


def fits(model: dict[str, Any], free: int, start: int, count: int, *, first: bool) -> bool:
    return used_bytes(model, start, count, first=first) * 10 <= free * 9


def brute_force(model: dict[str, Any]) -> list[tuple[str, int]]:
    """For each device in order, the largest number of layers that fits, by trying all of them."""
    placed: list[tuple[str, int]] = []
    for name, free in model["devices"]:
        start = sum(count for _, count in placed)
        left = len(model["layer_bytes"]) - start
        count = max(n for n in range(left + 1) if n == 0 or fits(model, free, start, n, first=not placed))
        placed += [(name, count)] if count else []
    return placed


@given(model=models)
def test_every_device_takes_as_many_layers_as_fit_and_no_more(model: dict[str, Any]) -> None:
    result = first_fit(**model, cpu=True, parameters="")
    free = dict(model["devices"])
    start = 0
    for number, (name, count) in enumerate(result.layers):
        assert count > 0
        if name != "cpu":
            assert fits(model, free[name], start, count, first=number == 0)
            is_full = not fits(model, free[name], start, count + 1, first=number == 0)
            assert is_full or start + count == len(model["layer_bytes"])
        start += count
    assert start == len(model["layer_bytes"])


@given(model=models)
def test_the_result_is_that_of_trying_every_number(model: dict[str, Any]) -> None:
    expected = brute_force(model)
    left = len(model["layer_bytes"]) - sum(count for _, count in expected)
    result = first_fit(**model, cpu=True, parameters="")
    assert list(result.layers) == expected + ([("cpu", left)] if left else [])
    if left:
        with pytest.raises(PlanError):
            first_fit(**model, cpu=False, parameters="")
    else:
        assert first_fit(**model, cpu=False, parameters="") == result


@given(model=models)
def test_devices_take_layers_in_their_order_and_those_passed_over_are_warned_of(model: dict[str, Any]) -> None:
    result = first_fit(**model, cpu=True, parameters="")
    names = [name for name, _ in model["devices"]] + ["cpu"]
    used = [name for name, _ in result.layers]
    assert used == [name for name in names if name in used]
    passed_over = [name for name in names[: names.index(used[-1])] if name not in used]
    assert [warning.split()[0] for warning in result.warnings] == passed_over
    assert result.non_mapped_device == used[0]


@given(model=models, more=st.integers(0, 500))
def test_more_memory_never_leaves_more_to_the_cpu(model: dict[str, Any], more: int) -> None:
    def on_cpu(devices: list[tuple[str, int]]) -> int:
        return dict(first_fit(**{**model, "devices": devices}, cpu=True, parameters="").layers).get("cpu", 0)

    last = [
        (name, free + more * (number == len(model["devices"]) - 1))
        for number, (name, free) in enumerate(model["devices"])
    ]
    assert on_cpu(last) <= on_cpu(model["devices"])


def test_all_layers_are_on_the_first_device_if_everything_fits_there() -> None:
    devices = [("cuda:0", free_for(1000)), ("cuda:1", 10_000)]
    changes = {"non_mapped_bytes": 300, "mapped_activation_bytes": 50, "non_mapped_activation_bytes": 100}
    assert place([100] * 5, devices, kv_bytes_per_layer=20, **changes).layers == (("cuda:0", 5),)
    assert place([100] * 5, devices, kv_bytes_per_layer=21, **changes).layers == (("cuda:0", 4), ("cuda:1", 1))


def test_nine_tenths_of_what_is_free_are_used() -> None:
    assert place([450, 450], [("cuda:0", 1000)]).layers == (("cuda:0", 2),)
    assert place([450, 451], [("cuda:0", 1000)], cpu=True).layers == (("cuda:0", 1), ("cpu", 1))


def test_the_cpu_takes_what_is_left_without_a_limit() -> None:
    result = place([10**15] * 3, [("cuda:0", 10 * MB)], cpu=True, non_mapped_bytes=10**18)
    assert result.layers == (("cpu", 3),)
    assert result.non_mapped_device == "cpu"


def test_without_accelerators_the_cpu_takes_everything() -> None:
    assert place([1, 2], [], cpu=True) == FirstFit((("cpu", 2),), ())


def test_the_larger_of_the_two_activations_is_reserved_on_the_first_device_and_the_mapped_one_on_others() -> None:
    devices = [("cuda:0", free_for(300)), ("cuda:1", free_for(300))]
    mapped = {"mapped_activation_bytes": 100, "non_mapped_activation_bytes": 40}
    assert place([100] * 4, devices, **mapped).layers == (("cuda:0", 2), ("cuda:1", 2))
    non_mapped = {"mapped_activation_bytes": 0, "non_mapped_activation_bytes": 200}
    assert place([100] * 4, devices, **non_mapped).layers == (("cuda:0", 1), ("cuda:1", 3))


def test_non_mapped_bytes_count_once() -> None:
    """Counting them twice leaves a model out that fills the device exactly."""
    assert place([100, 100], [("cuda:0", free_for(500))], non_mapped_bytes=300).layers == (("cuda:0", 2),)


def test_the_cache_is_not_taken_for_weights_that_are_placed() -> None:
    """Subtracting weights and cache from what is left of the weights ends before all layers have a place."""
    devices = [("cuda:0", free_for(200)), ("cuda:1", free_for(200))]
    assert place([10] * 4, devices, kv_bytes_per_layer=90).layers == (("cuda:0", 2), ("cuda:1", 2))
    with pytest.raises(PlanError, match="no room for 1 of its layers"):
        place([10] * 5, devices, kv_bytes_per_layer=90)


def test_non_mapped_parts_move_on_with_the_first_layer() -> None:
    """Reserving for them on device 0 alone forgets them when it takes no layer."""
    devices = [("cuda:0", free_for(100)), ("cuda:1", free_for(400)), ("cuda:2", free_for(400))]
    result = place([100] * 5, devices, non_mapped_bytes=300, cpu=True)
    assert result.layers == (("cuda:1", 1), ("cuda:2", 4))
    assert result.non_mapped_device == "cuda:1"


def test_layers_can_be_placed_again_with_another_cache() -> None:
    """Taking sizes off the caller's list would leave the second attempt without the layers of the first."""
    layer_bytes = [100, 200, 300]
    devices = [("cuda:0", free_for(300))]
    first = place(layer_bytes, devices, cpu=True)
    assert layer_bytes == [100, 200, 300]
    assert place(layer_bytes, devices, cpu=True, kv_bytes_per_layer=100).layers == (("cuda:0", 1), ("cpu", 2))
    assert place(layer_bytes, devices, cpu=True) == first


def test_a_device_that_is_passed_over_is_warned_of_with_its_numbers() -> None:
    devices = [("cuda:0", 10 * MB), ("cuda:1", 100 * MB)]
    result = place([5 * MB], devices, non_mapped_bytes=5 * MB, kv_bytes_per_layer=1)
    assert result.layers == (("cuda:1", 1),)
    (warning,) = result.warnings
    assert "cuda:0 takes no layer: one needs 11 MB" in warning
    assert "9 MB of the 10 MB that are free" in warning
    assert "max_seq_len 4096, max_batch_size 1" in warning


def test_what_does_not_fit_is_an_error_with_the_excess_the_devices_and_the_parameters() -> None:
    devices = [("cuda:0", 100 * MB), ("cuda:1", 10 * MB)]
    with pytest.raises(PlanError) as caught:
        place([40 * MB] * 4, devices, kv_bytes_per_layer=2 * MB)
    message = str(caught.value)
    assert "exceeds its devices by 84 MB: there is no room for 2 of its layers on " in message
    assert "cuda:0 (90 of 100 MB usable), cuda:1 (9 of 10 MB usable)" in message
    assert "max_seq_len 4096, max_batch_size 1" in message
    assert caught.value.exit_code == 3


def test_the_excess_of_a_model_that_no_device_takes_has_what_is_no_layer_too() -> None:
    parts = {"non_mapped_bytes": 30 * MB, "mapped_activation_bytes": MB, "non_mapped_activation_bytes": 4 * MB}
    with pytest.raises(PlanError, match=re.escape("by 54 MB: there is no room for 2 of its layers on cuda:0")):
        place([10 * MB] * 2, [("cuda:0", MB)], **parts)
    with pytest.raises(PlanError, match="no room for 1 of its layers on any device"):
        place([1], [])


def test_the_excess_is_never_zero() -> None:
    with pytest.raises(PlanError, match="by 1 MB"):
        place([1], [("cuda:0", 1)])


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(PlanError, match="no layers"):
        place([], [("cuda:0", 1)])
