"""Layers placed by hand: the three forms, every mistake, and writing what was read."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.errors import PlanError, SettingsError
from tpdist.plan.device_layers import DeviceLayers, format_device_layers, parse_device_layers


def parse(value: str | list[str], num_layers: int = 32, num_devices: int = 2) -> DeviceLayers:
    return parse_device_layers(value, num_layers=num_layers, num_devices=num_devices)


@pytest.mark.parametrize("value", ["0:16;1:16", " 0:16 ; 1 : 16 ", ["0:16", "1:16"], ("0:16", "1:16"), ["0:16;1:16"]])
def test_text_and_list_place_the_same_layers(value: str | list[str]) -> None:
    assert parse(value) == (("cuda:0", 16), ("cuda:1", 16))


@pytest.mark.parametrize("value", ["16", " 16 ", ["16"], "0:16"])
def test_a_number_alone_is_for_the_first_gpu(value: str | list[str]) -> None:
    assert parse(value) == (("cuda:0", 16), ("cpu", 16))


def test_layers_follow_the_order_of_the_entries_and_the_cpu_has_the_rest() -> None:
    assert parse("1:5;0:7") == (("cuda:1", 5), ("cuda:0", 7), ("cpu", 20))


def test_gpus_that_are_not_named_take_no_layers() -> None:
    assert parse("3:32", num_devices=4) == (("cuda:3", 32),)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "'' are empty"),
        ("  ", "are empty"),
        ([], "are empty"),
        ("0:16;", "'' is not ORD:NUM"),
        ("0:16;;1:16", "'' is not ORD:NUM"),
        ("all", "'all' is not ORD:NUM"),
        ("0:", "'0:' is not ORD:NUM"),
        (":16", "':16' is not ORD:NUM"),
        ("0:1:2", "'0:1:2' is not ORD:NUM"),
        ("0:-1", "'0:-1' is not ORD:NUM"),
        ("-1:4", "'-1:4' is not ORD:NUM"),
        ("0:1.5", "'0:1.5' is not ORD:NUM"),
        ("0:1_6", "'0:1_6' is not ORD:NUM"),
        ("0:16,1:16", "'0:16,1:16' is not ORD:NUM"),
        ("0:\u0661", "is not ORD:NUM"),
        ("9" * 5000, "is not ORD:NUM"),
        ("0", "'0' places 0 layers"),
        ("0:16;1:0", "'1:0' places 0 layers"),
        ("16;1:16", "'16' names no GPU"),
        (["0:16", "16"], "'16' names no GPU"),
        ("0:16;0:8", "have GPU 0 twice, with 16 and 8 layers"),
        ("0:16;00:8", "have GPU 0 twice"),
    ],
)
def test_a_text_that_is_wrong_by_itself_is_an_error_of_settings(value: str | list[str], says: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(says)) as caught:
        parse(value)
    text = value if isinstance(value, str) else ";".join(value)
    assert repr(text) in str(caught.value)
    assert 'for example "0:16;1:16"' in str(caught.value)


@pytest.mark.parametrize(
    ("value", "num_layers", "num_devices", "says"),
    [
        ("0:16;2:16", 32, 2, "'0:16;2:16' name GPU 2, but there are 2, numbered from 0 to 1"),
        ("0:16;1:17", 32, 2, "'0:16;1:17' place 33 layers, but the model has 32"),
        ("33", 32, 1, "'33' place 33 layers, but the model has 32"),
        ("16", 32, 0, "'16' name GPUs, but there are none"),
    ],
)
def test_a_text_that_contradicts_model_or_devices_is_an_error_of_the_plan(
    value: str, num_layers: int, num_devices: int, says: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(says)):
        parse(value, num_layers, num_devices)


@pytest.mark.parametrize("num_layers", [1, 2, 7, 32])
@pytest.mark.parametrize("num_devices", [1, 2, 3])
def test_the_example_of_an_error_is_right_for_the_model_and_the_devices(num_layers: int, num_devices: int) -> None:
    with pytest.raises(PlanError) as caught:
        parse(str(num_layers + 1), num_layers, num_devices)
    example = re.findall(r'for example "(.*)"', str(caught.value))[0]
    placed = parse(example, num_layers, num_devices)
    assert sum(count for _, count in placed) == num_layers
    assert "cpu" not in dict(placed)


def test_a_form_is_shown_where_there_is_no_gpu_to_show_it_with() -> None:
    with pytest.raises(SettingsError, match='for example "0:16;1:16"'):
        parse("x", num_devices=0)


@given(counts=st.dictionaries(st.integers(0, 63), st.integers(1, 200), min_size=1, max_size=8), rest=st.integers(0, 9))
def test_what_is_written_is_read_again(counts: dict[int, int], rest: int) -> None:
    num_layers = sum(counts.values()) + rest
    gpus = tuple((f"cuda:{ordinal}", count) for ordinal, count in counts.items())
    layers = (*gpus, ("cpu", rest)) if rest else gpus
    text = format_device_layers(layers)
    assert parse(text, num_layers, 64) == layers
    assert format_device_layers(parse(text.split(";"), num_layers, 64)) == text
