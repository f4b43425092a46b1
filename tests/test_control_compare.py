"""What nodes must agree on, and the table that they get when they do not."""

from typing import Any

import pytest
from clusters import SETTINGS, fingerprint_of, gpus

from tpdist.control.compare import differences, table

AUTO = {**SETTINGS, "device": "auto"}


def rows(worker: dict[str, Any], *, head: dict[str, Any] | None = None, **settings: Any) -> dict[str, dict[str, str]]:
    fingerprints = {"head": fingerprint_of("h", **(head or {})), "worker 0": fingerprint_of("w", **worker)}
    return dict(differences(fingerprints, settings={**AUTO, **settings}))


def test_nodes_that_are_equal_where_it_matters_fit_together() -> None:
    worker = {"hostname": "other", "num_cpus": 2, "python": "3.11.9", "driver": "570", "memory_bytes": 5}
    assert rows(worker) == {}


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        ({"tpdist": "0.2.0"}, {"tpdist": {"head": "0.1.0", "worker 0": "0.2.0"}}),
        ({"torch": "2.12.0"}, {"torch": {"head": "2.13.0", "worker 0": "2.12.0"}}),
        ({"torch": None}, {"torch": {"head": "2.13.0", "worker 0": "none"}}),
        ({"cuda": "13.0"}, {"cuda": {"head": "none", "worker 0": "13.0"}}),
        ({"nccl": "2.27"}, {"nccl": {"head": "none", "worker 0": "2.27"}}),
        ({"python": "3.12.0"}, {"python": {"head": "3.11", "worker 0": "3.12"}}),
        ({"devices": gpus(1)}, {"device": {"head": "cpu", "worker 0": "cuda"}}),
        ({"model": {"config.json": "x"}}, {"model config.json": {"head": "abc", "worker 0": "x"}}),
        ({"model": {}}, {"model config.json": {"head": "abc", "worker 0": "missing"}}),
        (
            {"model": {"config.json": "abc", "extra": "y"}},
            {"model extra": {"head": "missing", "worker 0": "y"}},
        ),
        ({"explicit": {"block_size": 32}}, {"block_size": {"head": "16", "worker 0": "32"}}),
        ({"explicit": {"block_size": 16}}, {}),
        ({"explicit": {"max_model_len": 5}}, {"max_model_len": {"head": "None", "worker 0": "5"}}),
        ({"explicit": {"newer_option": None}}, {"newer_option": {"head": "unknown", "worker 0": "None"}}),
    ],
)
def test_each_difference_is_a_row_with_the_value_of_each_node(
    worker: dict[str, Any], expected: dict[str, dict[str, str]]
) -> None:
    assert rows(worker) == expected


def test_ranks_on_cpus_need_not_have_the_same_gpus() -> None:
    assert rows({"devices": gpus(1), "cuda": "13.0", "nccl": "2.27"}, device="cpu") == {}


def test_what_somebody_set_on_the_head_is_the_heads_setting() -> None:
    assert rows({}, head={"explicit": {"block_size": 99}}) == {}


def test_nodes_that_agree_with_the_head_are_left_out_of_the_table() -> None:
    fingerprints = {"head": fingerprint_of("h")}
    fingerprints |= {
        f"worker {index}": fingerprint_of("w", torch="2.0" if index == 7 else "2.13.0") for index in range(9)
    }
    assert differences(fingerprints, settings=SETTINGS) == [("torch", {"head": "2.13.0", "worker 7": "2.0"})]


def test_the_table_is_aligned_with_one_line_a_row() -> None:
    text = table([("torch", {"head": "1", "worker 0": "2"}), ("model config.json", {"head": "a", "worker 1": "b"})])
    assert text.splitlines() == [
        "  torch              head=1  worker 0=2",
        "  model config.json  head=a  worker 1=b",
    ]
