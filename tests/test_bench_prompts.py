"""Prompts: random ones never repeat, and those of a file are read as people write them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpdist.bench.load import Load, Loop
from tpdist.bench.prompts import Prompt, random_prompts, read_prompts, take
from tpdist.bench.session import Workload
from tpdist.errors import SettingsError


@given(
    count=st.integers(0, 5),
    num_tokens=st.integers(1, 50),
    vocab_size=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_random_prompts_have_their_size_and_share_their_prefix(
    count: int, num_tokens: int, vocab_size: int, seed: int, data: st.DataObject
) -> None:
    shared = data.draw(st.integers(0, num_tokens))
    prompts = random_prompts(
        count, num_tokens=num_tokens, vocab_size=vocab_size, seed=seed, run=1, shared_prefix_tokens=shared
    )
    assert len(prompts) == count
    assert all(len(prompt) == num_tokens for prompt in prompts)
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt if isinstance(token, int))
    assert len({prompt[:shared] for prompt in prompts}) <= 1


def test_no_prompt_and_no_prefix_comes_again_in_another_run_or_with_another_seed() -> None:
    places = [(seed, run) for seed in range(3) for run in range(30)]
    options = {"num_tokens": 64, "vocab_size": 1000, "shared_prefix_tokens": 32}
    runs = [random_prompts(4, seed=seed, run=run, **options) for seed, run in places]
    prompts = [prompt for run in runs for prompt in run]
    assert len(set(prompts)) == len(prompts)
    assert len({prompt[:32] for prompt in prompts}) == len(places)
    assert runs == [random_prompts(4, seed=seed, run=run, **options) for seed, run in places]


def test_a_file_holds_json_lines_or_plain_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('{"prompt": "a\\nb", "id": 3}\n\nplain text\n  \n[1, 2]\n', encoding="utf-8")
    assert read_prompts(file) == ["a\nb", "plain text", "[1, 2]"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ('good\n{"prompt": "a"', "line 2: starts as JSON"),
        ('{"text": "a"}', 'line 1: has no text under "prompt"'),
        ('{"prompt": ["a"]}', "line 1"),
        ('{"prompt": ""}', "line 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "prompts"
    file.write_text(text)
    with pytest.raises(SettingsError, match=told):
        read_prompts(file)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match="cannot read --prompt-file"):
        read_prompts(file)


def test_prompts_of_a_file_go_on_where_the_last_load_ended() -> None:
    prompts: list[Prompt] = ["a", "b", "c"]
    assert take(prompts, 2, skip=1) == ["b", "c"]
    assert take(prompts, 5, skip=2) == ["c", "a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("loop", "value", "count"), [(Loop.CLOSED, 1, 8), (Loop.CLOSED, 16, 64), (Loop.OPEN, 0.5, 32), (Loop.OPEN, 99, 32)]
)
def test_a_load_has_enough_requests_unless_their_number_is_given(loop: Loop, value: float, count: int) -> None:
    fields = {"prompt_tokens": 1, "max_tokens": 1, "vocab_size": 1, "seed": 0, "timeout_s": 1.0}
    assert Workload(**fields).count(Load(loop, value)) == count
    assert Workload(**fields, num_requests=5).count(Load(loop, value)) == 5
