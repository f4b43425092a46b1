"""Loading a model's tokenizer and chat template."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server_fakes import CHAT_TEMPLATE, save_tokenizer, small_tokenizer

from tpdist.errors import CheckpointError, RequestError, SettingsError
from tpdist.server.tokenizer import Tokenizer, load_tokenizer, read_chat_template

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_a_model_with_tokenizer_json_needs_no_torch(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    code = (
        "import sys, pathlib; from tpdist.server.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer(pathlib.Path({str(tmp_path)!r}))\n"
        f"assert tokenizer.render_chat({MESSAGES!r}); assert tokenizer.decode(tokenizer.encode('x', "
        "add_special_tokens=True)) == 'x'\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_server_package_needs_no_torch() -> None:
    code = "import sys, tpdist.server.api, tpdist.server.http; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_text_survives_the_round_trip(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    text = "hello  world \u4f60\u597d ."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.decode([0, 50], skip_special_tokens=True) == tokenizer.decode([50])


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": 5}', "\x00"])
def test_a_damaged_tokenizer_names_its_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_the_models_chat_template_writes_the_prompt(tmp_path: Path) -> None:
    assert small_tokenizer(tmp_path).render_chat(MESSAGES) == "<|start|>user: hi\n<|start|>assistant: "


def test_a_chat_template_given_as_text_or_as_a_file_replaces_the_models(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    template = "{{ messages[0]['content'] }}!"
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    for value in (template, str(file)):
        assert load_tokenizer(tmp_path, chat_template=value).render_chat(MESSAGES) == "hi!"


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(RequestError, match="--chat-template"):
        tokenizer.render_chat(MESSAGES)


def test_messages_that_the_template_refuses_are_the_clients_error(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, chat_template=CHAT_TEMPLATE)
    with pytest.raises(RequestError, match="not this") as caught:
        tokenizer.render_chat([{"role": "user", "content": "refuse"}])
    assert caught.value.param == "messages"


def test_a_chat_template_that_is_not_jinja_is_refused_at_start(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="not valid jinja"):
        load_tokenizer(tmp_path, chat_template="{% for %}")


def test_a_chat_template_file_that_is_missing_is_a_wrong_setting() -> None:
    with pytest.raises(SettingsError, match="no-such-file"):
        read_chat_template("no-such-file.jinja")


@given(text=st.text(max_size=40))
@example(text="\U0001f600<|end|>a\u00e9 \n")
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_tokens_add_up_to_the_text_even_inside_characters(byte_level: Tokenizer, text: str) -> None:
    tokens = byte_level.encode(text, add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, tokens)) == text.encode()


def test_the_text_of_a_part_of_a_character_is_a_replacement(byte_level: Tokenizer) -> None:
    first, *_ = byte_level.encode("\U0001f600", add_special_tokens=False)
    assert byte_level.token_bytes(first) == b"\xf0"
    assert byte_level.token_text(first) == byte_level.decode([first]) == "\ufffd"


def test_an_id_beyond_the_tokenizer_is_nothing(byte_level: Tokenizer) -> None:
    assert (byte_level.token_bytes(100_000), byte_level.token_text(100_000)) == (b"", "")


@pytest.mark.parametrize("metaspace", [True, False])
def test_a_sentencepiece_token_keeps_the_space_that_it_begins_with(metaspace: bool) -> None:
    names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581world", "\u2581\u2581", "hello", "\u00e9"]
    model = tokenizers.models.BPE(
        vocab={name: index for index, name in enumerate(names)}, merges=[], byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    first = decoders.Metaspace() if metaspace else decoders.Replace("\u2581", " ")
    strip = [] if metaspace else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([first, decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>"))
    assert tokenizer.decode([257]) == "world"
    spelt = [tokenizer.token_bytes(token) for token in (0, 1 + 0xF0, 257, 258, 259, 260)]
    assert spelt == [b"<s>", b"\xf0", b" world", b"  ", b"hello", "\u00e9".encode()]


def test_a_vocabulary_of_an_unknown_kind_is_read_by_decoding() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "\u2581two": 1}, unk_token="one"))
    tokenizer = Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.token_bytes(1) == "\u2581two".encode()


@pytest.mark.slow
def test_a_model_without_tokenizer_json_is_read_all_the_same(tmp_path: Path) -> None:
    saved = json.loads((save_tokenizer(tmp_path / "fast") / "tokenizer.json").read_text())["model"]
    merges = "\n".join(" ".join(pair) for pair in saved["merges"])
    (tmp_path / "vocab.json").write_text(json.dumps(saved["vocab"]))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "unk_token": "<|end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello \U0001f600", add_special_tokens=False)) == "hello \U0001f600"
