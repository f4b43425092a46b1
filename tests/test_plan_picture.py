"""The picture of a placement: well formed, every device named, and its bars as long as the memory they show."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from placements import GIB, device_plan, facts_of_70b, one_process, two_nodes, two_stages

from tpdist.cli.plan_picture import BAR_WIDTH, STRIP_HEIGHT, draw
from tpdist.plan.placement import Inventory, Placement

SVG = "{http://www.w3.org/2000/svg}"


def drawing(placement: Placement, inventory: Inventory) -> ElementTree.Element:
    return ElementTree.fromstring(draw(placement, inventory=inventory, facts=facts_of_70b()))


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def rows(root: ElementTree.Element) -> list[ElementTree.Element]:
    return list(root.iter(f"{SVG}g"))


def width_of(row: ElementTree.Element, *kinds: str) -> float:
    """Of the pieces of a bar, which lie right of the layers."""
    return sum(
        float(each.attrib["width"])
        for each in row.iter(f"{SVG}rect")
        if each.attrib["class"] in kinds and float(each.attrib["x"]) > 540
    )


def test_every_device_is_named_with_its_part() -> None:
    inventory = two_nodes()
    shown = texts(drawing(two_stages(inventory), inventory))
    assert shown.count("cuda:0") == shown.count("cuda:1") == 2
    assert {"alpha", "beta", "rank 0, stage 0", "rank 5, stage 1"} <= set(shown)
    assert shown.count("layers 0-51, share 25% (16 heads)") == 4
    assert "layers 52-79, share 67% (40 heads)" in shown
    assert shown.count("68.0 GiB of 80.0 GiB") == 4
    assert "94% of 72.0 GiB usable" in shown


def test_title_and_description_say_it_all_without_the_picture() -> None:
    inventory = two_nodes()
    root = drawing(two_stages(inventory), inventory)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "title desc"
    assert root[0].attrib["id"] == "title"
    assert "2 pipeline stages" in (root[0].text or "")
    told = root[1].text or ""
    assert "beta cuda:1 (rank 5): layers 52-79; weights 12.0 GiB, KV cache 6.0 GiB" in told
    assert len(re.findall(r"cuda:\d", told)) == 6


def test_links_between_nodes_are_drawn_with_their_speed() -> None:
    inventory = two_nodes()
    shown = texts(drawing(two_stages(inventory), inventory))
    assert "12.5 GB/s, 30 us" in shown
    assert "4 devices, linked with 300 GB/s, 10 us" in shown
    slow = replace(inventory, across={}, default_across=replace(inventory.default_across, bandwidth=125e6))
    assert "125 MB/s, 30 us" in texts(drawing(two_stages(slow), slow))


def test_data_that_goes_both_ways_has_two_arrows() -> None:
    inventory = two_nodes()
    one_way = drawing(two_stages(inventory), inventory)
    both = drawing(two_stages(inventory, pp_size=1), inventory)
    arrows = [sum(each.attrib.get("class") == "arrow" for each in root.iter(f"{SVG}path")) for root in (one_way, both)]
    assert arrows == [1, 2]


def test_bars_are_to_scale() -> None:
    inventory = two_nodes()
    found = rows(drawing(two_stages(inventory), inventory))
    every = ("weights", "kv", "activations", "rest", "free", "blocked")
    assert width_of(found[0], *every) == pytest.approx(BAR_WIDTH, abs=0.1)
    assert width_of(found[4], *every) == pytest.approx(BAR_WIDTH * 48 / 80, abs=0.1)
    assert width_of(found[0], "weights") == pytest.approx(BAR_WIDTH / 2, abs=0.1)
    assert width_of(found[0], "kv") == pytest.approx(BAR_WIDTH / 4, abs=0.1)


def test_each_layer_that_a_device_holds_is_a_cell_as_high_as_its_part() -> None:
    inventory = two_nodes()
    paths = [row.find(f"{SVG}path") for row in rows(drawing(two_stages(inventory), inventory))]
    shapes = [path.attrib["d"] for path in paths if path is not None]
    assert [shape.count("M") for shape in shapes] == [52] * 4 + [28] * 2
    heights = [float(found[1]) for found in (re.search(r"v([\d.]+)", shape) for shape in shapes) if found]
    assert heights[:4] == [pytest.approx(STRIP_HEIGHT / 4)] * 4
    assert sum(heights[4:]) == pytest.approx(STRIP_HEIGHT)


def test_one_process_has_a_row_for_each_device_even_without_layers() -> None:
    inventory, placement = one_process()
    root = drawing(placement, inventory)
    shown = texts(root)
    assert {"cuda:0", "cuda:1", "cpu", "disk"} <= set(shown)
    assert "no layers" in shown
    assert "memory, each kind to scale" in shown
    assert "layers 0-29 (64 heads)" in shown


def test_names_are_text_whatever_they_hold() -> None:
    inventory = two_nodes(('a<b>&"\u0007', "'c'"))
    shown = texts(drawing(two_stages(inventory), inventory))
    assert {'a<b>&"?', "'c'"} <= set(shown)


def test_it_has_a_view_box_and_everything_stays_inside() -> None:
    inventory = two_nodes()
    root = drawing(two_stages(inventory), inventory)
    width, height = (float(each) for each in root.attrib["viewBox"].split()[2:])
    assert (root.attrib["width"], root.attrib["height"]) == (f"{width:.0f}", f"{height:.0f}")
    for element in root.iter():
        if "x" in element.attrib:
            assert 0 <= float(element.attrib["x"]) <= width
            assert 0 <= float(element.attrib["y"]) <= height


def test_it_follows_the_theme_of_its_reader() -> None:
    inventory = two_nodes()
    text = draw(two_stages(inventory), inventory=inventory, facts=facts_of_70b())
    assert "prefers-color-scheme:dark" in text
    assert text.isascii()


def test_a_device_that_is_over_stays_in_its_bar() -> None:
    inventory = two_nodes()
    placement = two_stages(inventory)
    over = device_plan(inventory.devices[0], weight_bytes=100 * GIB, layers=placement.devices[0].layers)
    found = rows(drawing(replace(placement, devices=(over, *placement.devices[1:])), inventory))
    assert width_of(found[0], "weights", "kv", "activations", "rest") == pytest.approx(BAR_WIDTH, abs=0.1)
