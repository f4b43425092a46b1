"""`LLM` with its layers in memory and on the disk: the tokens of transformers wherever they lie, plans that hold, and
checkpoints that change while they are read."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint, reference_tokens

from tpdist import LLM, SamplingParams
from tpdist.errors import CheckpointError, LostError, PlanError, SettingsError

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("nothing_left_behind")]

NUM_TOKENS = 8
NUM_LAYERS = 6
PROMPTS = [[9], [3, 1, 4, 1, 5], [(11 * index) % 256 for index in range(50)]]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
SMALL = {
    "device": "cpu",
    "threads": 1,
    "kv_cache_memory_bytes": "4MiB",
    "max_num_batched_tokens": 64,
    "max_num_seqs": 4,
    "max_model_len": 128,
}
LAYERS_OF_8_MIB = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
}
ROOM_FOR_A_PART = {"cpu": "300MiB"}
"""The process itself counts as 256 MiB, and all layers are about 50."""
FIRST_ON_DISK = {"": "cpu", **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1"), "disk")}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("untied"), tokenizer=True, **LAYERS_OF_8_MIB)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one of several files, with odd sizes."""
    return make_checkpoint(
        tmp_path_factory.mktemp("tied"),
        architecture="Qwen3ForCausalLM",
        tokenizer=True,
        tie_word_embeddings=True,
        max_shard_size="150KB",
        hidden_size=60,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=12,
        head_dim=20,
    )


@pytest.fixture
def offload_folder(tmp_path: Path) -> Iterator[Path]:
    """Which stays empty."""
    folder = tmp_path / "offload"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def layers_on(llm: LLM) -> dict[str, list[int]]:
    """Numbers of layers by device, of devices that have any."""
    devices = llm.cluster_state().plan["devices"]
    return {each["device"]["name"]: list(range(*each["layers"])) for each in devices if range(*each["layers"])}


def holds_what_was_foretold(llm: LLM) -> None:
    """The one rank's devices, within 5 percent. What lies on the disk has a norm and frequencies in memory."""
    state = llm.cluster_state()
    held = {each.device: each for each in state.nodes[0].ranks[0].held}
    for foretold in state.plan["devices"]:
        found = held.get(foretold["device"]["name"])
        for name in ("weight_bytes", "kv_cache_bytes"):
            measured = getattr(found, name) if found else 0
            assert measured == pytest.approx(foretold[name], rel=0.05, abs=4096), (name, foretold, held)


# -- placements -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_memory_lies_on_the_disk(untied: Path, offload_folder: Path) -> None:
    options = {**SMALL, "max_memory": ROOM_FOR_A_PART, "offload_folder": offload_folder}
    with LLM(untied, **options, device_map="auto") as llm:
        placed = layers_on(llm)
        assert list(placed) == ["cpu", "disk"]
        assert placed["cpu"] + placed["disk"] == list(range(NUM_LAYERS))
        holds_what_was_foretold(llm)
        assert any("disk" in note for note in llm.cluster_state().plan["notes"])
        expected = reference_tokens(untied, PROMPTS, NUM_TOKENS)
        assert [tokens(llm), tokens(llm)] == [expected, expected]


MAPS: dict[str, dict[str, str]] = {
    "the embedding and the first ones": FIRST_ON_DISK,
    "the last one and the output": {"": "cpu", **dict.fromkeys(("model.layers.5", "model.norm", "lm_head"), "disk")},
    "all": {"": "disk"},
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_puts_layers_on_the_disk_and_the_tokens_stay(tied: Path, offload_folder: Path, name: str) -> None:
    """The output is tied to the embedding, also where only one of the two lies on the disk."""
    on_disk = [index for index in range(NUM_LAYERS) if f"model.layers.{index}" in MAPS[name] or name == "all"]
    with LLM(tied, **SMALL, device_map=MAPS[name], offload_folder=offload_folder) as llm:
        assert tokens(llm) == reference_tokens(tied, PROMPTS, NUM_TOKENS)
        assert layers_on(llm)["disk"] == on_disk
        holds_what_was_foretold(llm)


def test_the_layers_of_stages_say_how_many_ranks_there_are(tied: Path) -> None:
    """As pipeline_parallel_size does: a number of stages, each of tensor_parallel_size ranks."""
    with LLM(tied, **SMALL, pipeline_layers=[1, 5], tensor_parallel_size=1) as llm:
        assert tokens(llm) == reference_tokens(tied, PROMPTS, NUM_TOKENS)
        assert [(rank["stage"], rank["layers"]) for rank in llm.cluster_state().plan["ranks"]] == [
            (0, [0, 1]),
            (1, [1, 6]),
        ]


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_without_an_offload_folder_what_does_not_fit_is_refused_with_what_is_lacking(untied: Path) -> None:
    with pytest.raises(PlanError) as error:
        LLM(untied, **SMALL, device_map="auto", max_memory=ROOM_FOR_A_PART)
    assert re.search(r"cpu on head lacks [0-9.]+ MiB \([0-9,]+ bytes\) of the 300.0 MiB", str(error.value))


def test_a_map_that_uses_the_disk_needs_an_offload_folder(tied: Path) -> None:
    with pytest.raises(PlanError, match="disk"):
        LLM(tied, **SMALL, device_map=FIRST_ON_DISK)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device_map": "auto", "tensor_parallel_size": 2}, "device_map"),
        ({"max_memory": {"cpu": "1GiB"}, "pipeline_parallel_size": 2}, "max_memory"),
        ({"device_map": "auto", "device_layers": "0:1"}, "device-layers"),
        ({"max_memory": {"cpu": "much"}}, "max_memory"),
    ],
)
def test_options_that_contradict_each_other_are_errors_that_name_them(
    tied: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(SettingsError) as error:
        LLM(tied, **SMALL, **options)
    assert named.replace("_", "-") in str(error.value).lower().replace("_", "-")


# -- files that change while they are used ----------------------------------------------------------------------------


def remove(file: Path) -> None:
    file.unlink()


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint to damage, of one file."""
    return make_checkpoint(tmp_path / "model", tokenizer=True, num_hidden_layers=4)


def generate_until_it_ends(llm: LLM) -> None:
    """What has been read already serves a step or two."""
    for _ in range(3):
        tokens(llm)


@pytest.mark.parametrize("damage", [remove, halve])
def test_layers_whose_file_is_damaged_end_the_llm_with_its_name(
    own: Path, offload_folder: Path, damage: Callable[[Path], None]
) -> None:
    layers = {f"model.layers.{index}": "disk" for index in range(1, 4)}
    ends = {"": "cpu", "model.norm": "disk", "lm_head": "disk"}
    with LLM(own, **SMALL, device_map={**ends, **layers}, offload_folder=offload_folder) as llm:
        assert tokens(llm) == reference_tokens(own, PROMPTS, NUM_TOKENS)
        damage(own / "model.safetensors")
        with pytest.raises(CheckpointError) as error:
            generate_until_it_ends(llm)
    assert str(own / "model.safetensors") in str(error.value)
    assert "model.layers." in str(error.value)


def test_an_embedding_that_is_mapped_and_cut_short_ends_the_llm_and_does_not_hang(
    own: Path, offload_folder: Path
) -> None:
    """The kernel has nothing to show in its place, and ends the rank."""
    names = {"": "cpu", "model.embed_tokens": "disk", "model.layers.0": "disk"}
    with LLM(own, **SMALL, device_map=names, offload_folder=offload_folder) as llm:
        assert tokens(llm) == reference_tokens(own, PROMPTS, NUM_TOKENS)
        os.truncate(own / "model.safetensors", 0)
        with pytest.raises(LostError, match=r"rank 0 .*SIGBUS"):
            generate_until_it_ends(llm)


def test_a_file_that_goes_away_does_not_matter_once_all_its_layers_are_in_memory(
    own: Path, offload_folder: Path
) -> None:
    """Two layers fit the two buffers, and are read once; the output stays mapped."""
    names = {"": "cpu", **dict.fromkeys(("model.layers.2", "model.layers.3", "model.norm", "lm_head"), "disk")}
    with LLM(own, **SMALL, device_map=names, offload_folder=offload_folder) as llm:
        expected = tokens(llm)
        (own / "model.safetensors").unlink()
        assert [tokens(llm), tokens(llm)] == [expected, expected]
