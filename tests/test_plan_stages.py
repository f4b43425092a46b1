"""Which part of a model each stage has: layers in a row, the ends with what goes with them, tied outputs copied."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import small_config

from tpdist.errors import PlanError
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.shards import Interval, Weights
from tpdist.plan.stages import EMBEDDING, OUTPUT, Stage, stage_weights, stages_of, whole

NORM = "model.norm.weight"


def weights(*, num_layers: int = 5, tied: bool = False) -> Weights:
    return decoder_weights(small_config(num_hidden_layers=num_layers, tie_word_embeddings=tied))


def parameters(held: Weights) -> set[str]:
    return {spec.parameter for spec in held.specs}


def layers_of(held: Weights) -> set[int]:
    found = (re.match(r"model\.layers\.(\d+)\.", name) for name in parameters(held))
    return {int(match[1]) for match in found if match}


def ends_of(held: Weights) -> set[str]:
    return {name for name in parameters(held) if not name.startswith("model.layers.")}


counts_of_stages = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(counts=counts_of_stages)
def test_stages_follow_each_other_and_cover_the_model(counts: list[int]) -> None:
    stages = stages_of(tuple(counts), sum(counts))
    assert [stage.layers.size for stage in stages] == counts
    assert [number for stage in stages for number in range(*stage.layers)] == list(range(sum(counts)))
    assert [stage.is_first for stage in stages] == [True] + [False] * (len(counts) - 1)
    assert [stage.is_last for stage in stages] == [False] * (len(counts) - 1) + [True]


@given(counts=counts_of_stages, tied=st.booleans())
def test_every_weight_is_on_one_stage_but_for_a_tied_output(counts: list[int], tied: bool) -> None:
    table = weights(num_layers=sum(counts), tied=tied)
    held = [stage_weights(table, stage) for stage in stages_of(tuple(counts), sum(counts))]
    dealt = [spec for each in held for spec in each.specs]
    copies = [spec for spec in dealt if spec not in table.specs]
    assert sorted(map(repr, dealt)) == sorted(map(repr, [*table.specs, *copies]))
    assert len(copies) == (1 if tied and len(counts) > 1 else 0)


@pytest.mark.parametrize("counts", [(), (0,), (5, 0), (0, 5), (-1, 6), (2, 2), (3, 3), (1, 1, 1, 1, 2), (6,)])
def test_counts_that_do_not_add_up_are_refused_with_the_numbers(counts: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="the model's 5 layers") as refused:
        stages_of(counts, 5)
    assert f"({', '.join(map(str, counts))})" in str(refused.value)


def test_a_model_that_is_not_cut_is_one_stage() -> None:
    assert (whole(5),) == stages_of((5,), 5)
    assert whole(5) == Stage(Interval(0, 5), 5)
    for tied in (False, True):
        assert stage_weights(weights(tied=tied), whole(5)) == weights(tied=tied)


def test_the_ends_go_with_the_first_and_the_last_layers() -> None:
    first, middle, last = (stage_weights(weights(), stage) for stage in stages_of((1, 3, 1), 5))
    assert (layers_of(first), ends_of(first)) == ({0}, {EMBEDDING})
    assert (layers_of(middle), ends_of(middle)) == ({1, 2, 3}, set())
    assert (layers_of(last), ends_of(last)) == ({4}, {NORM, OUTPUT})


def test_a_layer_is_not_taken_for_one_whose_number_it_begins() -> None:
    held = stage_weights(weights(num_layers=12), Stage(Interval(1, 2), 12))
    assert layers_of(held) == {1}


def test_the_last_stage_has_a_copy_of_an_output_that_is_tied() -> None:
    first, last = (stage_weights(weights(tied=True), stage) for stage in stages_of((2, 3), 5))
    assert ends_of(first) == {EMBEDDING}
    assert ends_of(last) == {NORM, OUTPUT}
    embedding = next(spec for spec in first.specs if spec.parameter == EMBEDDING)
    copy = next(spec for spec in last.specs if spec.parameter == OUTPUT)
    assert (copy.name, copy.shape, copy.split) == (embedding.name, embedding.shape, embedding.split)


@pytest.mark.parametrize(("tied", "expected"), [(True, {EMBEDDING, NORM, OUTPUT}), (False, {EMBEDDING, NORM, OUTPUT})])
def test_an_output_that_lies_apart_has_weights_of_its_own(tied: bool, expected: set[str]) -> None:
    held = stage_weights(weights(tied=tied), whole(5), output_apart=True)
    assert ends_of(held) == expected
    assert len([spec for spec in held.specs if spec.parameter == OUTPUT]) == 1


def test_what_may_stand_unused_in_a_checkpoint_is_the_same_on_all_stages() -> None:
    table = weights(tied=True)
    for stage in stages_of((2, 3), 5):
        held = stage_weights(table, stage)
        assert (held.ignorable, held.tied) == (table.ignorable, table.tied)
