"""config.json to ModelConfig: what transformers makes of the same file, and a clear refusal of everything else."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import ARCHITECTURES, MODEL_TYPES, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedConfig

from tpdist.checkpoint.index import CheckpointIndex, check_names
from tpdist.errors import CheckpointError, PlanError
from tpdist.models.registry import FAMILIES, load_config, weights
from tpdist.plan.model_config import ModelConfig

REQUIRED = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def write_config(folder: Path, *, architecture: str = "LlamaForCausalLM", **keys: Any) -> Path:
    """REQUIRED and `keys` as config.json; a key of `...` is left out."""
    base = {"architectures": [architecture], "model_type": MODEL_TYPES.get(architecture, "other"), **REQUIRED, **keys}
    values = {key: value for key, value in base.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.sliding_window for layer in config.layers]


def expected_windows(reference: PreTrainedConfig) -> list[int | None]:
    """As transformers' modeling files use the keys: Llama ignores them, Mistral has one for all layers, and with
    layer_types becomes a Ministral, which follows them as Qwen does."""
    num_layers = reference.num_hidden_layers
    if reference.model_type == "llama":
        return [None] * num_layers
    if reference.model_type == "mistral":
        return [reference.sliding_window] * num_layers
    return [reference.sliding_window if kind == "sliding_attention" else None for kind in reference.layer_types]


def assert_equal_to_transformers(folder: Path) -> ModelConfig:
    config, reference = load_config(folder), AutoConfig.from_pretrained(folder)
    names = (*REQUIRED, "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "bos_token_id")
    assert {name: getattr(config, name) for name in names} == {name: getattr(reference, name) for name in names}
    head_dim = getattr(reference, "head_dim", None) or reference.hidden_size // reference.num_attention_heads
    assert config.head_dim == head_dim
    assert windows(config) == expected_windows(reference)
    for layer in config.layers:
        for name, value in reference.rope_parameters.items():
            assert name == "type" or getattr(layer.rope, name) == value, name
    return config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_key_value_heads": ..., "num_attention_heads": 32, "hidden_size": 128},
        {"head_dim": 32},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e6},
        {"rope_scaling": None, "rope_theta": 1e6},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": LLAMA3, "rope_theta": 5e5, "max_position_embeddings": 512},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "truncate": False}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 64},
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": True, "bos_token_id": 7, "eos_token_id": [8, 9]},
        {"sliding_window": 16},
        {"sliding_window": None},
        {"sliding_window": 16, "use_sliding_window": True},
        {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 2},
        {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 2},
        {
            "sliding_window": 16,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ],
    ids=lambda keys: ",".join(keys) or "required only",
)
def test_every_key_means_what_it_means_to_transformers(tmp_path: Path, architecture: str, keys: dict[str, Any]) -> None:
    assert_equal_to_transformers(write_config(tmp_path, architecture=architecture, **keys))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_null_key_value_heads_mean_one_for_each_query_head(tmp_path: Path, architecture: str) -> None:
    config = load_config(write_config(tmp_path, architecture=architecture, num_key_value_heads=None))
    assert config.num_key_value_heads == config.num_attention_heads == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weight_table_matches_a_checkpoint_of_transformers(
    tmp_path: Path, architecture: str, tied: bool, bias: bool
) -> None:
    make_checkpoint(
        tmp_path, architecture=architecture, tie_word_embeddings=tied, attention_bias=bias, max_shard_size=100_000
    )
    config = assert_equal_to_transformers(tmp_path)
    check_names(CheckpointIndex.read(tmp_path), weights(config))
    assert config.dtype == "float32"
    assert config.eos_token_ids == (299,)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, 512),
        ({"type": "linear", "factor": 2.5}, 1280),
        ({"type": "dynamic", "factor": 4.0}, 512),
        (LLAMA3, 512),
        ({**YARN, "original_max_position_embeddings": 512}, 2048),
        (YARN, 512),
    ],
)
def test_the_longest_sequence_follows_from_the_rope_rule(tmp_path: Path, rope: dict[str, Any], expected: int) -> None:
    config = load_config(write_config(tmp_path, rope_scaling=rope, max_position_embeddings=512))
    assert config.max_model_len == expected


def test_rope_parameters_may_be_nested_by_layer_type(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"type": "linear", "factor": 2.0}}
    write_config(
        tmp_path,
        architecture="Qwen3ForCausalLM",
        layer_types=kinds,
        use_sliding_window=True,
        sliding_window=8,
        rope_theta=3e4,
        rope_parameters=nested,
    )
    ropes = [
        (layer.rope.rope_type, layer.rope.rope_theta, layer.sliding_window) for layer in load_config(tmp_path).layers
    ]
    assert ropes == [("default", 1e6, None), ("linear", 3e4, 8)] * 2


def test_a_dtype_may_have_its_old_or_its_new_name(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path, torch_dtype="bfloat16")).dtype == "bfloat16"
    assert load_config(write_config(tmp_path, dtype="float16", torch_dtype="bfloat16")).dtype == "float16"
    assert load_config(write_config(tmp_path)).dtype is None


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, (5,)), ({}, (5,)), ({"eos_token_id": 6}, (6,)), ({"eos_token_id": [6, 7]}, (6, 7))],
)
def test_the_eos_ids_of_generation_config_win(
    tmp_path: Path, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    write_config(tmp_path, eos_token_id=5)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported.*Qwen3ForCausalLM"),
        ({"architectures": []}, r"\(none\) is not supported"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized \(gptq\)"),
        ({"quantization_config": {}}, "quantized"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type longrope.*llama3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "relu"}, "hidden_act relu.*silu"),
    ],
)
def test_a_kind_of_model_that_is_not_supported_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load_config(write_config(tmp_path, **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        *(({key: ...}, f"config.json: {key} is missing") for key in REQUIRED if key != "num_key_value_heads"),
        ({"architectures": ...}, "architectures is missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of strings"),
        ({"hidden_size": "64"}, 'hidden_size must be a positive integer, found string "64"'),
        ({"hidden_size": True}, "hidden_size must be a positive integer, found boolean"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer"),
        ({"num_attention_heads": 6, "hidden_size": 96}, r"num_attention_heads \(6\) must be a multiple of 4"),
        ({"hidden_size": 66}, r"hidden_size \(66\) must be a multiple"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"attention_bias": "no"}, "attention_bias must be true or false"),
        ({"torch_dtype": "float64"}, "torch_dtype is float64"),
        ({"dtype": 16}, "dtype must be a string"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
        ({"eos_token_id": [1, -2]}, "eos_token_id must be a token id"),
        ({"bos_token_id": [1, 2]}, "bos_token_id must be one token id"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling.low_freq_factor is missing"),
        ({"rope_scaling": {**YARN, "beta_fast": "x"}}, "rope_scaling.beta_fast must be a number"),
        ({"rope_theta": -1}, "rope_theta must be a positive number"),
    ],
)
def test_a_missing_or_malformed_key_is_named_with_its_file(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(write_config(tmp_path, **keys))


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_types": ["full_attention"]}, "1 entries for num_hidden_layers 4"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "has sliding_attention, but"),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(
    tmp_path: Path, architecture: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(write_config(tmp_path, architecture=architecture, **keys))


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\ufeff{}", '{"a": 1} x', "[" * 100_000])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_config(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
KEYS = (
    *REQUIRED,
    *("architectures", "head_dim", "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "dtype", "eos_token_id", "quantization_config", "hidden_act"),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    architecture=st.sampled_from(sorted(FAMILIES)), keys=st.dictionaries(st.sampled_from(KEYS), json_values, max_size=2)
)
def test_any_value_of_any_key_is_read_or_refused_on_purpose(
    tmp_path: Path, architecture: str, keys: dict[str, Any]
) -> None:
    with contextlib.suppress(CheckpointError, PlanError):
        load_config(write_config(tmp_path, architecture=architecture, **keys))
