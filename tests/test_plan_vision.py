"""Vision models taken apart: where the text model is, and what the rest takes."""

from pathlib import Path
from typing import Any

import pytest
from sparse_checkpoints import LLAMA_1B, LLAVA, TOWER, text_shapes

from tpdist.errors import CheckpointError, PlanError
from tpdist.models import registry
from tpdist.plan import vision
from tpdist.plan.config_file import ConfigFile
from tpdist.plan.shards import Weights

KNOWN = tuple(registry.FAMILIES)


def config_file(**changes: Any) -> ConfigFile:
    return ConfigFile(Path("config.json"), {**LLAVA, **changes})


def text_of(**changes: Any) -> ConfigFile:
    return vision.text_file(config_file(text_config={**LLAMA_1B, **changes}))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("text")
    text_shapes(folder, LLAMA_1B)
    return registry.weights(registry.load_config(folder))


@pytest.mark.parametrize(
    ("values", "expected"), [(LLAVA, True), (LLAMA_1B, False), ({"text_config": {}, "vision_config": None}, False)]
)
def test_a_vision_model_has_both_parts(values: dict[str, Any], expected: bool) -> None:
    assert vision.is_vision(ConfigFile(Path("config.json"), values)) is expected


def test_the_text_part_inherits_what_only_the_whole_says() -> None:
    text = vision.text_file(config_file(dtype="float16", quantization_config={"quant_method": "awq"}))
    assert text.values["dtype"] == "float16"
    assert text.values["quantization_config"] == {"quant_method": "awq"}
    assert text.prefix == "text_config."
    assert text_of(tie_word_embeddings=True).values["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": None, "model_type": None}, "LlamaForCausalLM"),
    ],
)
def test_the_text_model_is_known_by_architecture_or_type(changes: dict[str, Any], expected: str) -> None:
    assert vision.text_architecture(text_of(**changes), KNOWN) == expected


def test_a_text_model_of_another_kind_is_refused() -> None:
    text = text_of(architectures=["GemmaForCausalLM"], model_type="gemma")
    with pytest.raises(PlanError, match="model_type gemma, which is not supported; supported are Llama"):
        vision.text_architecture(text, KNOWN)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("language_model.model.", "language_model."), ("model.language_model.", ""), ("model.", ""), ("", "")],
)
def test_text_layers_are_found_under_any_prefix(prefix: str, head: str, weights: Weights) -> None:
    own = {spec.name: spec.shape for spec in weights.specs}
    shapes = {
        (head + name if name.startswith("lm_head") else prefix + name.removeprefix("model.")): shape
        for name, shape in own.items()
    }
    text, others = vision.split_text({**TOWER, **shapes}, weights, where="here")
    assert set(text.values()) == set(own)
    assert set(others) == set(TOWER)


def test_a_strange_tensor_of_a_text_layer_is_no_part_of_the_tower(weights: Weights) -> None:
    shapes = {"language_model." + spec.name: spec.shape for spec in weights.specs}
    strange = "language_model.model.layers.0.strange.weight"
    text, others = vision.split_text({**shapes, strange: (3,)}, weights, where="here")
    assert text[strange] == "model.layers.0.strange.weight"
    assert others == ()


def test_a_tower_with_layers_of_the_same_names_is_not_taken_for_the_text_model(weights: Weights) -> None:
    shapes = {"language_model." + spec.name: spec.shape for spec in weights.specs}
    tower = {"tower.layers.0.input_layernorm.weight": (1024,), "tower.layers.1.input_layernorm.weight": (1024,)}
    text, others = vision.split_text({**tower, **shapes}, weights, where="here")
    assert set(text) == set(shapes)
    assert set(others) == set(tower)


def test_files_without_text_layers_are_told(weights: Weights) -> None:
    with pytest.raises(CheckpointError, match="no 16 text layers of hidden size"):
        vision.split_text(TOWER, weights, where="here")


def test_sizes_of_a_tower_come_from_its_config() -> None:
    tower = vision.tower_of(config_file(), parameter_bytes=5)
    assert (tower.parameter_bytes, tower.hidden_size, tower.intermediate_size, tower.patch_size) == (5, 1024, 4096, 14)
    small = vision.tower_of(config_file(vision_config={"embed_dim": 32, "patch_size": 2}), parameter_bytes=5)
    assert (small.hidden_size, small.intermediate_size, small.patch_size) == (32, 128, 2)


def test_a_tower_without_files_is_estimated_within_a_tenth() -> None:
    """CLIP's large tower has 303 million parameters, Llava's projector to 4096 dimensions 21 million."""
    elements = vision.estimated_elements(config_file(), text_hidden_size=4096)
    assert elements == pytest.approx(324e6, rel=0.1)
