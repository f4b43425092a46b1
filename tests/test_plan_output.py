"""A placement on the terminal: table, bars, words; and what was measured beside it."""

import re
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from placements import facts_of_70b, one_process, two_nodes, two_stages
from rich.console import Console

from tpdist.cli.plan_bars import SEGMENTS, bars, shows_blocks
from tpdist.cli.plan_output import compare, layout_of, milliseconds, parameters, print_plan
from tpdist.plan.placement import Candidate

GIB = 1024**3
NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def plain(text: str) -> str:
    """Without line breaks and indentation."""
    return " ".join(text.split())


NOTHING = {"activation_bytes": 0, "communication_bytes": 0, "overhead_bytes": 0}

# -- on a terminal ----------------------------------------------------------------------------------------------------


def shown(width: int = 80, *, encoding: str = "utf-8", full: bool = False, **changes: Any) -> str:
    class Stream(StringIO):
        pass

    Stream.encoding = encoding  # type: ignore[misc,assignment]
    stream = Stream()
    console = Console(file=stream, width=width, highlight=False)
    print_plan(two_stages(two_nodes(), **changes), facts_of_70b(), console=console, full=full)
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_fits_the_terminal(width: int) -> None:
    assert max(map(len, shown(width, full=True).splitlines())) <= width


def test_a_terminal_without_blocks_gets_ascii() -> None:
    text = shown(encoding="ascii")
    assert not NOT_ASCII.search(text)
    assert "## weights" in text
    assert re.search(r"alpha cuda:0 #+=+\++o+\.+x+ +68\.0 GiB of 80\.0 GiB", text)


def test_blocks_are_used_where_they_can_be_shown() -> None:
    assert "\u2588\u2588 weights" in shown()
    assert shows_blocks(Console(file=StringIO()))


def test_stages_have_their_layers_heads_and_ranks() -> None:
    lines = [line.split() for line in shown().splitlines()]
    assert ["alpha", "cuda:0", "0", "0", "0-51", "16", "40.0", "20.0", "8.0", "68.0", "72.0", "94%"] in lines
    assert ["cuda:1", "5", "1", "52-79", "24", "12.0", "6.0", "2.4", "20.4", "21.6", "94%"] in lines


def test_long_and_strange_names_of_nodes_do_not_break_the_table() -> None:
    names = ("[/red]" + "x" * 50, "ip-10-0-113-207.eu-central-1.compute.internal")
    inventory = two_nodes(names)
    stream = StringIO()
    print_plan(two_stages(inventory), facts_of_70b(), console=Console(file=stream, width=80, highlight=False))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "[/red]" in text
    assert "ip-10-0-113... cuda:0" in text


def test_small_models_are_shown_in_mebibytes() -> None:
    placement = two_stages(two_nodes())
    small = [replace(plan, weight_bytes=5 << 20, kv_cache_bytes=1 << 20, **NOTHING) for plan in placement.devices]
    text = shown(devices=tuple(small))
    assert "MiB" in text.splitlines()[5]
    assert ["cuda:1", "1", "0", "0-51", "16", "5.0", "1.0", "0.0", "6.0", "73728.0", "0%"] in [
        line.split() for line in text.splitlines()
    ]


def test_a_context_that_does_not_fit_is_told() -> None:
    assert "the longest that fits is 100000 tokens, less than the 131072 that the model allows" in plain(shown())
    assert "all that the model allows" in plain(shown(longest_context=131072))


def test_times_are_called_predictions() -> None:
    text = plain(shown())
    assert "predicted, from the bandwidths of memory and links" in text
    assert "24 ms a token for one sequence (41 tokens/s)" in text
    assert "at most 76 steps/s (13 ms each in the slowest stage, with all stages busy)" in text


def test_the_longest_bar_is_the_largest_device_of_a_kind() -> None:
    _, placement = one_process()
    first, second, cpu, disk = bars(placement, width=80, blocks=False).plain.splitlines()[1:]
    lengths = [len(re.findall(r"[#=+o.x]", line.split(maxsplit=2)[2].split(" ")[0])) for line in (first, second, cpu)]
    assert lengths[0] == lengths[1] == lengths[2]
    assert "disk" in disk


def test_every_part_that_is_there_has_a_cell() -> None:
    placement = two_stages(two_nodes())
    for line in bars(placement, width=60, blocks=False).plain.splitlines()[1:]:
        assert all(plain_mark in line for _, _, plain_mark, _ in SEGMENTS)


def test_other_layouts_are_named_with_their_reason() -> None:
    text = plain(shown())
    assert "tensor 2 x pipeline 3 (26 + 27 + 27): reason 0; 30 ms a token, slowest stage 10 ms" in text
    assert "reason 1; 1.0 GiB too little on its fullest device" in text
    assert "2 more; --all shows them" in text
    many = Candidate(tp_size=1, pp_size=8, stage_layers=(10,) * 8, shortfall_bytes=0, latency_s=0, slowest_stage_s=0)
    assert layout_of(many) == "tensor 1 x pipeline 8 (8 x 10)"


@pytest.mark.parametrize(
    ("count", "words"), [(999, "999"), (1500, "1.5K"), (1_100_000, "1.1M"), (70.6e9, "70.6B"), (1e12, "1.0T")]
)
def test_parameters_are_rounded_as_people_say_them(count: float, words: str) -> None:
    assert parameters(int(count)) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0241, "24 ms"), (0.0996, "100 ms"), (0.00512, "5.1 ms"), (0.000123, "0.12 ms"), (2, "2000 ms"), (45.2, "45 s")],
)
def test_milliseconds_have_two_digits(seconds: float, words: str) -> None:
    assert milliseconds(seconds) == words


# -- predicted and measured -------------------------------------------------------------------------------------------


def held(device: str, weights: int, cache: int) -> dict[str, object]:
    return {"device": device, "weight_bytes": weights * GIB, "kv_cache_bytes": cache * GIB}


def compared(plan: dict[str, object], ranks: dict[int, dict[str, object]]) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(compare(plan, ranks))
    return [plain(line) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_measured_bytes_stand_beside_the_predicted_ones() -> None:
    ranks = {0: {"held": [held("cuda:0", 41, 20)]}, 5: {"held": []}}
    lines = compared(two_stages(two_nodes()).as_dict(), ranks)
    assert "rank 0 40.0 GiB 41.0 GiB +2.5% 20.0 GiB 20.0 GiB +0.0%" in lines
    assert "rank 1 40.0 GiB - - 20.0 GiB - -" in lines
    assert "rank 5 12.0 GiB - - 6.0 GiB - -" in lines


def test_the_devices_of_one_process_are_compared_by_name() -> None:
    _, placement = one_process()
    names = [each.device.name for each in placement.devices]
    lines = compared(placement.as_dict(), {0: {"held": [held(names[0], 1, 1)]}})
    assert [line.split()[0] for line in lines[-len(names) :]] == names
