"""Small random checkpoints of every supported family, and what transformers generates from them.

    folder = make_checkpoint(tmp_path, architecture="Qwen3ForCausalLM", num_key_value_heads=2)
    expected = reference_tokens(folder, [[5, 7, 11]], max_new_tokens=8)

Every weight is random, norms and biases too: transformers initialises those to one and zero, which would hide a bias
that is added twice or a norm that is never loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ARCHITECTURES = tuple(MODEL_TYPES)
SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_checkpoint(
    folder: Path,
    *,
    architecture: str = "LlamaForCausalLM",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "1GB",
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint into `folder` and return it. `overrides` are keys of config.json; the others are SMALL.

    The last two ids of the vocabulary are bos and eos. With `tokenizer`, ids below 256 are the bytes of the text and
    there is a chat template; the vocabulary needs at least 258 ids then.
    """
    settings = {**SMALL, **overrides}
    vocab_size = settings["vocab_size"]
    settings = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, **settings}
    config = CONFIG_MAPPING[MODEL_TYPES[architecture]](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model, seed=seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        byte_tokenizer(bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1).save_pretrained(folder)
    return Path(folder)


def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Fill every parameter: matrices keep the scale of what flows through them, norms lie around one, biases around
    zero. Logits end up far enough apart that greedy decoding does not depend on the order of float32 sums."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                noise *= 1.0 if "embed" in name else parameter.shape[1] ** -0.5 * 1.5
            elif name.endswith("bias"):
                noise *= 0.3
            else:
                noise = 1 + 0.2 * noise
            parameter.copy_(noise)


def byte_tokenizer(*, bos_token_id: int, eos_token_id: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose first 256 ids are bytes (in the order of the byte-level alphabet) without any merges."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"<unused{index}>": index for index in range(256, bos_token_id)}
    vocabulary |= {"<bos>": bos_token_id, "<eos>": eos_token_id}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def reference_tokens(folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The greedy float32 continuation of each prompt by transformers, alone and without a cache; eos is ignored."""
    model = reference_model(folder)
    return [greedy_tokens(model, prompt, max_new_tokens) for prompt in prompts]


@torch.inference_mode()
def greedy_tokens(model: torch.nn.Module, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits
        token_ids.append(int(logits[0, -1].argmax()))
    return token_ids[len(prompt) :]


@torch.inference_mode()
def reference_logits(folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """Logits of every position of one prompt by transformers, float32: [num_tokens, vocab_size]."""
    return reference_model(folder)(input_ids=torch.tensor([list(prompt)]), use_cache=False).logits[0].float()


def reference_model(folder: Path) -> torch.nn.Module:
    """The checkpoint as a transformers model in float32 with eager attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()
