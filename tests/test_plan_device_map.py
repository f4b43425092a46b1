"""Device maps for our own models: names of modules to layers on devices, the named maps, and every mistake."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.errors import PlanError
from tpdist.plan.device_map import MappedLayers, mapped_layers

GPUS = ("cuda:0", "cuda:1", "cuda:2")
LAYERS = [f"model.layers.{index}" for index in range(5)]
ENDS = {"model.embed_tokens": 0, "model.norm": "cpu", "lm_head": "cpu"}


def mapped(device_map: Any, *, num_layers: int = 5, gpus: tuple[str, ...] = GPUS) -> MappedLayers:
    return mapped_layers(device_map, num_layers=num_layers, gpus=gpus)


def refused(device_map: Any, *texts: str, **options: Any) -> None:
    with pytest.raises(PlanError) as error:
        mapped(device_map, **options)
    missing = [text for text in texts if text not in str(error.value)]
    assert not missing, f"{missing} not in {error.value}"


# -- the named ones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [(), GPUS])
def test_auto_and_sequential_are_methods_of_the_planner(gpus: tuple[str, ...]) -> None:
    assert mapped("auto", gpus=gpus) == MappedLayers("exact")
    assert mapped("sequential", gpus=gpus) == MappedLayers("first-fit")


@pytest.mark.parametrize(
    ("name", "num_layers", "gpus", "expected"),
    [
        ("balanced", 6, GPUS, (("cuda:0", 2), ("cuda:1", 2), ("cuda:2", 2))),
        ("balanced", 5, GPUS, (("cuda:0", 2), ("cuda:1", 2), ("cuda:2", 1))),
        ("balanced", 2, GPUS, (("cuda:0", 1), ("cuda:1", 1))),
        ("balanced", 5, GPUS[:1], (("cuda:0", 5),)),
        ("balanced", 5, (), ()),
        ("balanced_low_0", 5, GPUS, (("cuda:1", 3), ("cuda:2", 2))),
        ("balanced_low_0", 5, GPUS[:1], (("cuda:0", 5),)),
        ("balanced_low_0", 5, (), ()),
    ],
)
def test_balanced_maps_deal_the_layers_evenly(
    name: str, num_layers: int, gpus: tuple[str, ...], expected: tuple[tuple[str, int], ...]
) -> None:
    """Without a GPU all layers are left to the CPU. Norm and output go with the last layers."""
    assert mapped(name, num_layers=num_layers, gpus=gpus) == MappedLayers("manual", expected, head_first=False)


@pytest.mark.parametrize("name", ["even", "", "Auto", "cpu"])
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    refused(name, repr(name), "auto", "balanced", "balanced_low_0", "sequential")


# -- names and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [1, "1", "cuda:1", "cpu", "disk"])
@pytest.mark.parametrize("root", [("",), ("model", "lm_head")])
def test_one_name_may_stand_for_all(root: tuple[str, ...], device: int | str) -> None:
    name = str(device) if device in ("cpu", "disk") else "cuda:1"
    assert mapped(dict.fromkeys(root, device)) == MappedLayers("manual", ((name, 5),))


def test_layers_follow_each_other_over_devices() -> None:
    layers = dict(zip(LAYERS, (0, 0, 2, "cpu", "cpu"), strict=True))
    assert mapped({**ENDS, **layers}) == MappedLayers("manual", (("cuda:0", 2), ("cuda:2", 1), ("cpu", 2)))


def test_the_longest_name_decides() -> None:
    by_names = {"": "cpu", "model": "cpu", "model.layers": 1, "model.layers.4": "cpu", "model.embed_tokens": 1}
    expected = MappedLayers("manual", (("cuda:1", 4), ("cpu", 1)))
    assert mapped(by_names) == expected
    assert mapped(dict(reversed(by_names.items()))) == expected


def test_a_name_does_not_stand_for_one_that_it_merely_begins() -> None:
    layers = {f"model.layers.{index}": 0 for index in range(2, 12)}
    assert mapped({"": "cpu", "model.layers.1": "cpu", **layers, "model.norm": 0, "lm_head": 0}, num_layers=12) == (
        MappedLayers("manual", (("cpu", 2), ("cuda:0", 10)))
    )


def test_norm_and_output_may_go_with_the_first_layers() -> None:
    layers = dict(zip(LAYERS, (0, 0, 0, "disk", "disk"), strict=True))
    made = mapped({**layers, "model.embed_tokens": 0, "model.norm": 0, "lm_head": 0})
    assert made == MappedLayers("manual", (("cuda:0", 3), ("disk", 2)), head_first=True)


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=5), head_first=st.booleans())
def test_what_is_written_name_by_name_is_what_is_placed(counts: list[int], head_first: bool) -> None:
    places = ["cuda:0", "cuda:1", "cuda:2", "cpu", "disk"][: len(counts)]
    devices = [place for place, count in zip(places, counts, strict=True) for _ in range(count)]
    end = devices[0 if head_first else -1]
    names: dict[str, int | str] = {f"model.layers.{index}": device for index, device in enumerate(devices)}
    names |= {"model.embed_tokens": devices[0], "model.norm": end, "lm_head": end}
    made = mapped(names, num_layers=len(devices))
    assert made.layers == tuple(zip(places, counts, strict=True))
    assert made.head_first == (head_first and len(places) > 1)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["model.embed_tokens", "model.norm", "lm_head", "model.layers.3"])
def test_a_module_without_a_device_is_named(missing: str) -> None:
    names = {**ENDS, "model.embed_tokens": "cpu", **dict.fromkeys(LAYERS, "cpu")}
    refused({name: device for name, device in names.items() if name != missing}, missing)


@pytest.mark.parametrize(
    "name", ["model.layers.5", "model.layers.0.mlp", "transformer.h.0", "embed_tokens", "model.layers."]
)
def test_a_name_that_the_model_does_not_have_is_refused(name: str) -> None:
    refused({"": "cpu", name: "cpu"}, name, "model.layers.0 to model.layers.4", "lm_head")


@pytest.mark.parametrize("device", [3, "3", "cuda:3", "mps", -1, "cuda", ""])
def test_a_device_that_is_not_there_is_named_with_those_that_are(device: int | str) -> None:
    refused({"": device}, f"on {device}", *GPUS, "cpu", "disk")


def test_a_gpu_where_there_is_none_is_refused() -> None:
    refused({"": 0}, "on 0", "cpu", "disk", gpus=())


def test_layers_that_go_back_to_a_device_are_refused_with_the_runs() -> None:
    layers = dict(zip(LAYERS, (0, 0, "cpu", 0, "cpu"), strict=True))
    refused({**ENDS, **layers}, "interleaves", "cuda:0: 2, cpu: 1, cuda:0: 1, cpu: 1")


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ({"model.embed_tokens": "cpu"}, "model.embed_tokens on cpu"),
        ({"model.norm": 0}, "model.norm on cuda:0"),
        ({"lm_head": 0}, "lm_head on cuda:0"),
        ({"model.norm": 1, "lm_head": 1}, "lm_head on cuda:1"),
        ({"model.norm": "disk", "lm_head": "disk"}, "lm_head on disk"),
    ],
)
def test_ends_that_lie_apart_from_their_layers_are_refused(ends: dict[str, Any], says: str) -> None:
    layers = dict(zip(LAYERS, (0, 0, 1, "cpu", "cpu"), strict=True))
    refused({**ENDS, **layers, **ends}, says, "the first goes with the first layer (cuda:0)")


def test_a_mistake_names_only_the_first_of_many_names() -> None:
    with pytest.raises(PlanError) as error:
        mapped({f"h.{index}": 0 for index in range(100)})
    assert len(re.findall(r"h\.\d+", str(error.value))) == 3
