"""Devices as people write them: on the command line and in a file."""

from pathlib import Path

import pytest

from tpdist.errors import SettingsError
from tpdist.plan import devices as known
from tpdist.plan.inventory import parse_devices, parse_rate, parse_seconds, parse_size
from tpdist.plan.inventory_file import read_inventory
from tpdist.plan.placement import Device, Link

GIB = 1024**3
EXAMPLE = Path(__file__).parents[1] / "configs" / "two-machines.toml"


def sizes(text: str) -> list[tuple[str, int]]:
    return [(device.name, device.total_bytes) for device in parse_devices(text).devices]


def read(tmp_path: Path, text: str) -> list[Device]:
    return list(read_inventory(written(tmp_path, text)).devices)


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "machines.toml"
    file.write_text(text)
    return file


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * GIB), ("24 GB", 24 * 10**9), ("1.5e9", 1500000000), (7, 7)])
def test_a_size_has_a_unit_or_is_a_number_of_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [("3.35TB/s", 3.35e12), ("100Gbit/s", 12.5e9), ("2 GiB/s", 2 * GIB), ("800 mbit/s", 100e6), (5e9, 5e9)],
)
def test_a_rate_is_in_bytes_or_bits_per_second(text: object, rate: float) -> None:
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "seconds"), [("50us", 50e-6), ("1.5 ms", 1.5e-3), ("800ns", 8e-7), ("2s", 2.0), (0.25, 0.25), (0, 0)]
)
def test_a_time_has_a_unit_or_is_in_seconds(text: object, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "80", "x", "80GiB", "80 parsecs/s", "-1GB/s", "0GB/s", True, [], -1, 0, 1e400])
def test_what_is_no_rate_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match=r"3\.35TB/s"):
        parse_rate(value)


@pytest.mark.parametrize("value", ["", "x", "0", 0, -5, True, [], "80 apples", "1.2.3GiB", "1e400", float("inf")])
def test_what_is_no_size_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match="80GiB"):
        parse_size(value)


@pytest.mark.parametrize("value", ["", "5", "5 min", -1, True, None])
def test_what_is_no_time_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match="50us"):
        parse_seconds(value)


# -- one argument -----------------------------------------------------------------------------------------------------


def test_each_size_is_a_gpu() -> None:
    assert sizes("80GiB, 24GB") == [("cuda:0", 80 * GIB), ("cuda:1", 24 * 10**9)]


def test_a_count_stands_for_as_many_equal_ones() -> None:
    assert sizes("2x80GiB,24GiB,1x16GiB") == [
        ("cuda:0", 80 * GIB),
        ("cuda:1", 80 * GIB),
        ("cuda:2", 24 * GIB),
        ("cuda:3", 16 * GIB),
    ]


def test_a_bandwidth_may_follow() -> None:
    first, second, third = parse_devices("80GiB@3.35TB/s,80GiB,H100@1TB/s").devices
    assert (first.bandwidth, third.bandwidth) == (3.35e12, 1e12)
    assert second.bandwidth == known.bandwidth_of("", kind="cuda", total_bytes=80 * GIB)


@pytest.mark.parametrize("text", ["2xH100", "2xh100", "2 x H100"])
def test_a_known_gpu_brings_memory_and_bandwidth(text: str) -> None:
    found = parse_devices(text).devices
    assert [device.total_bytes for device in found] == [known.memory_of("H100")] * 2
    assert found[0].bandwidth == known.bandwidth_of("H100", kind="cuda")
    assert all(device.free_bytes == device.total_bytes for device in found)


def test_a_name_with_digits_spaces_or_dashes_is_a_name() -> None:
    assert sizes("RTX-4090,2xRTX 3090,L4") == [(f"cuda:{index}", 24 * GIB) for index in range(4)]


def test_the_memory_of_the_machine_is_named_cpu() -> None:
    inventory = parse_devices("24GiB,cpu=64GiB@50GB/s")
    gpu, cpu = inventory.devices
    assert (cpu.name, cpu.kind, cpu.total_bytes, cpu.bandwidth) == ("cpu", "cpu", 64 * GIB, 50e9)
    assert gpu.node == cpu.node
    assert list(inventory.inside) == [gpu.node]


def test_links_are_the_defaults() -> None:
    inventory = parse_devices("2xH100")
    assert list(inventory.inside.values()) == [known.default_inside(inventory.devices)]
    assert inventory.across == {}
    assert inventory.default_across == known.DEFAULT_ACROSS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is no device"]),
        ("80GiB,,24GiB", ["'' is no device"]),
        ("0x80GiB", ["counts no device"]),
        ("1000000x80GiB", ["counts 1000000 devices, and one item may stand for 1024"]),
        ("2xcpu=64GiB", ["a memory, of which a node has one"]),
        ("cpu=1GiB,cpu=2GiB", ["cpu stands in it twice"]),
        ("80 apples", ["'80 apples' must be a size"]),
        ("80GiB@fast", ["must be a rate", "3.35TB/s"]),
        ("80GiB@", ["is no device"]),
        ("2xH1000", ["neither a size nor a known GPU", "nearest is H100", "80GiB@2TB/s"]),
        ("disk=4TB", ["is no device"]),
    ],
)
def test_wrong_devices_are_refused_with_the_text_and_an_example(text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_devices(text)
    message = str(raised.value)
    assert f"--devices {text}" in message
    assert "twice" in message or "example: 2x80GiB" in message
    for word in words:
        assert word in message


# -- a file -----------------------------------------------------------------------------------------------------------


def test_the_example_file_is_what_it_says() -> None:
    inventory = read_inventory(EXAMPLE)
    names = [(device.node, device.name) for device in inventory.devices]
    assert names == [
        *(("alpha", f"cuda:{index}") for index in range(4)),
        ("alpha", "cpu"),
        *(("beta", f"cuda:{index}") for index in range(2)),
        ("beta", "cpu"),
    ]
    assert inventory.devices[0].total_bytes == known.memory_of("H100")
    assert (inventory.devices[5].free_bytes, inventory.devices[5].bandwidth) == (45 * GIB, 864e9)
    assert inventory.inside["alpha"] == Link(bandwidth=450e9, latency_s=pytest.approx(10e-6))
    assert inventory.inside["beta"] == known.default_inside(inventory.devices[5:])
    assert inventory.across == {("alpha", "beta"): Link(bandwidth=12.5e9, latency_s=pytest.approx(30e-6))}
    assert inventory.default_across == Link(bandwidth=1.25e9, latency_s=pytest.approx(100e-6))


def test_a_link_is_found_in_the_order_of_ranks_whatever_the_order_written(tmp_path: Path) -> None:
    text = """
        [[node]]
        name = "b"
        devices = [{ memory = "1GiB" }]
        [[node]]
        name = "a"
        [[node.devices]]
        memory = "2GiB"
        [[link]]
        between = ["a", "b"]
        bandwidth = 5e9
    """
    inventory = read_inventory(written(tmp_path, text))
    assert inventory.across == {("b", "a"): Link(bandwidth=5e9, latency_s=known.DEFAULT_ACROSS.latency_s)}
    assert inventory.default_across == known.DEFAULT_ACROSS


def test_a_device_of_kind_cpu_is_the_memory(tmp_path: Path) -> None:
    text = '[[node]]\nname = "a"\ndevices = [{ kind = "cpu", memory = "8GiB", free = "5GiB", bandwidth = "20GB/s" }]'
    (device,) = read(tmp_path, text)
    assert (device.name, device.kind, device.free_bytes, device.bandwidth) == ("cpu", "cpu", 5 * GIB, 20e9)


def test_a_node_may_have_nothing_but_its_memory(tmp_path: Path) -> None:
    assert [device.name for device in read(tmp_path, '[[node]]\nname = "a"\nmemory = "8GiB"')] == ["cpu"]


NODE = '[[node]]\nname = "alpha"\n'
GPU = 'devices = [{ memory = "8GiB" }]\n'
TWO = NODE + GPU + NODE.replace("alpha", "beta") + GPU


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["node: there is none", "[[node]]"]),
        ("node = 1", ["node: must be a list of tables", "found 1"]),
        ("x = [", ["not TOML"]),
        ("[[nodes]]\n", ["nodes: is no key here; the nearest is node"]),
        ("[[node]]\n", ["node 0: name: is missing", 'name = "alpha"']),
        ('[[node]]\nname = ""\n', ["name: must be a name"]),
        ('[[node]]\nname = "a\\u0007"\n' + GPU, ["name: must be a name"]),
        (NODE, ["node 0 (alpha): devices: there is none", "80GiB"]),
        (NODE + "devices = 4", ["devices: must be a list of tables", "count = 4"]),
        (NODE + "devices = [{}]", ["devices 0: memory: is missing", "H100"]),
        (NODE + 'devices = [{ memory = "8 apples" }]', ["devices 0: memory: must be a size", "'8 apples'"]),
        (NODE + 'devices = [{ memroy = "8GiB" }]', ["memroy: is no key here; the nearest is memory"]),
        (NODE + 'devices = [{ model = "H1000" }]', ["model:", "nearest is H100"]),
        (NODE + 'devices = [{ memory = "8GiB", free = "9GiB" }]', ["free: '9GiB' is more than the memory"]),
        (NODE + 'devices = [{ memory = "8GiB", count = 0 }]', ["count: must be a whole number from 1 to 1024", "0"]),
        (NODE + 'devices = [{ memory = "8GiB", count = true }]', ["count: must be a whole number"]),
        (NODE + 'devices = [{ memory = "8GiB", kind = "tpu" }]', ["kind: must be cuda or cpu", "'tpu'"]),
        (NODE + 'devices = [{ memory = "8GiB", kind = "cpu", count = 2 }]', ["count: a node has one memory"]),
        (NODE + 'devices = [{ memory = "8GiB", bandwidth = "fast" }]', ["bandwidth: must be a rate", "'fast'"]),
        (NODE + 'devices = [{ memory = "8GiB", kind = "cpu" }]\nmemory = "8GiB"', ["more than one is of kind cpu"]),
        (NODE + GPU + "link = 3", ["link: must be a table"]),
        (NODE + GPU + 'link = { speed = "1GB/s" }', ["link: speed: is no key here"]),
        (NODE + GPU + 'link = { latency = "soon" }', ["link: latency: must be a time", "'soon'"]),
        (NODE + GPU + NODE + GPU, ["node 0: name: 'alpha' is the name of another node too"]),
        (TWO + "[[link]]\n", ["link 0: between: is missing"]),
        (TWO + '[[link]]\nbetween = ["alpha"]', ["between: must be the names of two nodes"]),
        (TWO + '[[link]]\nbetween = ["alpha", "bta"]', ["there is no node 'bta'; the nearest is beta"]),
        (TWO + '[[link]]\nbetween = ["alpha", "alpha"]', ["'alpha' twice"]),
        (TWO + '[[link]]\nbetween = ["alpha", "beta"]\nspeed = 1', ["link 0: speed: is no key here"]),
        (TWO + 2 * '[[link]]\nbetween = ["alpha", "beta"]\n', ["link 1: between: alpha and beta have one already"]),
        (TWO + "[across]\nspeed = 1", ["across: speed: is no key here"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_file_and_key(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        read(tmp_path, text)
    message = str(raised.value)
    assert "machines.toml" in message
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"no\.toml: No such file"):
        read_inventory(tmp_path / "no.toml")
