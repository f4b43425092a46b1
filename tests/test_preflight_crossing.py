"""What measured links mean for a model, and the file that holds them."""

from pathlib import Path

import pytest
from examinations import cluster_of, link_of
from placements import two_nodes

from tpdist import builtin
from tpdist.control.placing import demand_of, place_ranks, ranks_inventory
from tpdist.models import registry
from tpdist.plan.inventory_file import read_inventory
from tpdist.plan.placement import Link, Placement
from tpdist.preflight.crossing import advise_crossing, inventory_text, measured_links, with_links
from tpdist.preflight.examine import facts_of
from tpdist.preflight.words import Failed
from tpdist.settings import Settings

PAIR = ("head", "worker-0")


def test_of_the_two_ways_of_a_link_the_slower_counts() -> None:
    links = (link_of(0, 1, bandwidth=2e9, latency_s=1e-4), link_of(1, 0, bandwidth=1e9, latency_s=5e-5))
    assert measured_links(cluster_of(1, links=links)) == {PAIR: Link(bandwidth=1e9, latency_s=1e-4)}


def test_a_way_that_failed_leaves_the_other() -> None:
    links = (link_of(0, 1), link_of(1, 0, Failed(problem="refused")))
    assert measured_links(cluster_of(1, links=links)) == {PAIR: Link(bandwidth=1.25e9, latency_s=50e-6)}


def test_measured_links_replace_those_of_an_inventory() -> None:
    inventory, link = two_nodes(), Link(bandwidth=1.0, latency_s=2.0)
    assert with_links(inventory, {("alpha", "beta"): link}).across[("alpha", "beta")] == link
    assert with_links(inventory, {}).across == inventory.across


def planned(*, flags: dict[str, object] | None = None, num_workers: int = 1, **figures: float) -> Placement:
    """The built-in model over CPU nodes with links of these figures."""
    count = num_workers + 1
    pairs = [(source, target) for source in range(count) for target in range(count) if source != target]
    examination = cluster_of(num_workers, links=tuple(link_of(*pair, **figures) for pair in pairs))
    settings = Settings.load(flags or {}, environ={})
    config = registry.load_config(builtin.path())
    demand = demand_of(config, settings.shared(), dtype="float32", explicit=())
    sizes = [1] * count
    found = with_links(ranks_inventory(facts_of(examination.nodes), sizes, device="cpu"), measured_links(examination))
    return place_ranks(config, registry.weights(config), found, demand, settings.shared())


def test_over_a_slow_link_stages_should_cross_and_the_flags_are_named() -> None:
    decision, how = advise_crossing(planned(latency_s=0.01, bandwidth=1e8))
    assert decision.startswith("stages should cross the links between the nodes")
    assert "--pipeline-parallel-size 2" in how


def test_settings_that_give_it_already_are_left_alone() -> None:
    placement = planned(flags={"pipeline_parallel_size": "2"}, latency_s=0.01, bandwidth=1e8)
    assert tuple(advise_crossing(placement))[1] == "these settings give that already"


def test_over_a_link_that_costs_nothing_tensor_parallelism_may_cross() -> None:
    placement = planned(flags={"optimize": "latency"}, latency_s=1e-12, bandwidth=1e15)
    decision, how = advise_crossing(placement)
    assert decision.startswith("tensor parallelism should cross")
    assert how == "these settings give that already"


def test_a_single_node_has_no_link_to_cross() -> None:
    assert not list(advise_crossing(planned(num_workers=0)))


def test_the_file_is_an_inventory_of_the_nodes_with_the_measured_links(tmp_path: Path) -> None:
    examination = cluster_of(2, links=(link_of(0, 1, bandwidth=1.25e9, latency_s=3e-5), link_of(1, 0)))
    file = tmp_path / "found.toml"
    file.write_text(inventory_text(examination))
    inventory = read_inventory(file)
    assert [device.node for device in inventory.devices] == ["head", "worker-0", "worker-1"]
    link = inventory.across[PAIR]
    assert (link.bandwidth, link.latency_s) == pytest.approx((1.25e9, 5e-5))
