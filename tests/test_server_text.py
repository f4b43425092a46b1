"""Detokenizer, stop strings and TextReader: pure, on real tokenizers of both kinds that cut characters in pieces."""

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server_fakes import small_tokenizer

from tpdist.control.messages import Generate, TokenLogprobs, TokenOutput
from tpdist.sampling_params import SamplingParams
from tpdist.server.text import REPLACEMENT, Detokenizer, StopStrings, TextReader
from tpdist.server.tokenizer import Tokenizer

TEXT = "na\u00efve \u4f60\u597d \U0001f600 end"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class ByteFallback:
    """A sentencepiece-like vocabulary: a token a character for ASCII, bytes for all others; the first space is cut."""

    special_ids = frozenset({0})

    def __init__(self) -> None:
        characters = ["\u2581" if code == 32 else chr(code) for code in range(32, 127)]
        names = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
        self._ids = {name: index for index, name in enumerate(names)}
        self._tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=self._ids, merges=[], byte_fallback=True, unk_token="<s>")
        )
        decoders = tokenizers.decoders
        self._tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for character in text:
            known = self._ids.get("\u2581" if character == " " else character)
            ids += [known] if known else [1 + byte for byte in character.encode()]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))


def pieces_of(decoder: Tokenizer | ByteFallback, tokens: Sequence[int], *, prompt: Sequence[int] = ()) -> list[str]:
    reader = Detokenizer(decoder, prompt=prompt, skip_special_tokens=True)
    return [*(reader.push(token) for token in tokens), reader.flush()]


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = pieces_of(tokenizer, tokens)
    assert len(tokens) > len(TEXT)
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_bytes_of_a_sentencepiece_vocabulary_come_out_whole() -> None:
    decoder = ByteFallback()
    pieces = pieces_of(decoder, decoder.encode(TEXT), prompt=decoder.encode("x"))
    assert "".join(pieces) == TEXT
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_the_space_before_the_first_word_survives_because_the_prompt_is_context() -> None:
    decoder = ByteFallback()
    assert "".join(pieces_of(decoder, decoder.encode(" world"), prompt=decoder.encode("hello"))) == " world"


def test_a_context_that_would_start_inside_a_character_is_made_longer() -> None:
    decoder = ByteFallback()
    prompt = decoder.encode("x\u00e9\U0001f600\u4f60")
    assert "".join(pieces_of(decoder, decoder.encode("\u597d"), prompt=prompt)) == "\u597d"


def test_a_skipped_token_in_the_middle_does_not_eat_the_next_space() -> None:
    decoder = ByteFallback()
    tokens = [*decoder.encode("a"), 0, *decoder.encode(" b")]
    assert "".join(pieces_of(decoder, tokens)) == "a b"


def test_a_character_cut_at_the_end_of_the_sequence_is_shown_as_a_replacement(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ok\U0001f600", add_special_tokens=False)[:-1]
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces[:-1]) == "ok"
    assert pieces[-1] == REPLACEMENT


def test_endless_invalid_bytes_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("\U0001f600", add_special_tokens=False)[0]
    pieces = pieces_of(tokenizer, [half] * 200)
    assert "".join(pieces) == REPLACEMENT * 200
    assert any(pieces[:40])


def test_a_prompt_may_end_inside_a_character_or_with_a_replacement(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("\U0001f600!", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, tokens[2:], prompt=tokens[:2])) == "\U0001f600!"
    replacement = tokenizer.encode("a\ufffd", add_special_tokens=False)
    assert "".join(pieces_of(tokenizer, tokens, prompt=replacement)) == "\U0001f600!"


@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
@example(text="", prompt="\ufffd")
@settings(max_examples=200, deadline=None)
def test_pieces_add_up_to_the_text_for_any_text(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, tokens, prompt=tokenizer.encode(prompt, add_special_tokens=False))
    assert "".join(pieces) == text


@given(tokens=st.lists(st.integers(2, 319), max_size=60))
@settings(max_examples=200, deadline=None)
def test_pieces_of_random_tokens_add_up_to_the_decoded_whole(tokenizer: Tokenizer, tokens: list[int]) -> None:
    whole = tokenizer.decode(tokens)
    if REPLACEMENT * 20 not in whole:
        assert "".join(pieces_of(tokenizer, tokens)) == whole


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["<END>"])
    assert [stops.push(text) for text in ("a<", "EN", "x", "<E")] == ["a", "", "<ENx", ""]
    assert stops.flush() == "<E"
    assert stops.found is None


def test_the_text_is_cut_at_the_first_of_several_stop_strings() -> None:
    stops = StopStrings(["world", "lo w"])
    assert stops.push("hel") == "he"
    assert stops.push("lo world") == "l"
    assert stops.found


def test_an_overlapping_start_of_a_stop_string_is_found() -> None:
    stops = StopStrings(["aab"])
    assert "".join(stops.push(character) for character in "aaab") == "a"
    assert stops.found


def test_an_included_stop_string_ends_the_text() -> None:
    stops = StopStrings(["world", "or"], include=True)
    assert stops.push("hello wo") == "hello "
    assert stops.push("rld!") == "world"
    assert stops.found == "world"


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    include=st.booleans(),
)
def test_a_cut_text_shows_a_stop_string_only_at_its_end_and_if_asked_to(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    reader, shown, rest = StopStrings(stops, include=include), "", text
    for cut in cuts:
        shown += "" if reader.found else reader.push(rest[:cut])
        rest = rest[cut:]
    shown += reader.flush()
    assert text.startswith(shown)
    before = shown.removesuffix(reader.found) if include and reader.found else shown
    assert shown == before + (reader.found if include and reader.found else "")
    assert not any(stop in before for stop in stops)
    assert bool(reader.found) == any(stop in text for stop in stops)
    assert reader.found or shown == text


def reader_for(tokenizer: Tokenizer, **sampling: object) -> TextReader:
    params = SamplingParams(**{"max_tokens": 64, **sampling})  # type: ignore[arg-type]
    return TextReader(
        tokenizer, Generate(request_id="r", prompt_token_ids=(5,), sampling=params, eos_token_ids=(0,)), index=2
    )


def test_a_stop_string_across_tokens_ends_the_sequence_in_the_middle_of_an_output(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("go XYZ on", add_special_tokens=False)
    reader = reader_for(tokenizer, stop=("XYZ",))
    piece = reader.push(TokenOutput("r", tuple(tokens), None))
    assert (piece.text, piece.finish_reason, piece.index) == ("go ", "stop", 2)
    assert len(piece.token_ids) < len(tokens)
    assert tokenizer.decode(piece.token_ids) == "go XYZ"


def test_the_token_that_ends_a_sequence_is_counted_but_not_shown(tokenizer: Tokenizer) -> None:
    reader = reader_for(tokenizer, stop_token_ids=(70,), skip_special_tokens=False)
    piece = reader.push(TokenOutput("r", (71, 70), "stop"))
    assert piece.token_ids == (71, 70)
    assert piece.text == tokenizer.decode([71])


def test_what_ended_a_sequence_may_be_included_in_its_text(tokenizer: Tokenizer) -> None:
    include = {"include_stop_str_in_output": True}
    piece = reader_for(tokenizer, stop_token_ids=(70,), **include).push(TokenOutput("r", (71, 70), "stop"))
    assert (piece.text, piece.stop_reason) == (tokenizer.decode([71, 70]), 70)
    piece = reader_for(tokenizer, skip_special_tokens=False, **include).push(TokenOutput("r", (71, 0), "stop"))
    assert (piece.text, piece.stop_reason) == (tokenizer.decode([71]) + "<|end|>", None)
    piece = reader_for(tokenizer, **include).push(TokenOutput("r", (71, 0), "stop"))
    assert piece.text == tokenizer.decode([71])
    tokens = tuple(tokenizer.encode("go XYZ on", add_special_tokens=False))
    piece = reader_for(tokenizer, stop=("never", "XYZ"), **include).push(TokenOutput("r", tokens))
    assert (piece.text, piece.stop_reason) == ("go XYZ", "XYZ")


def test_a_piece_tells_where_its_tokens_begin_and_keeps_what_belongs_to_them(tokenizer: Tokenizer) -> None:
    tokens = tuple(token for text in "ab\u00e9" for token in tokenizer.encode(text, add_special_tokens=False))
    entries = tuple(TokenLogprobs((token,), (-1.0,), 1) for token in tokens)
    reader = reader_for(tokenizer, stop=("b",))
    piece = reader.push(TokenOutput("r", tokens, None, entries, entries[:1], 3))
    assert (piece.offsets, piece.logprobs) == ((0, 1), entries[:2])
    assert (piece.prompt_logprobs, piece.num_cached_tokens) == (entries[:1], 3)
    reader = reader_for(tokenizer)
    pieces = [reader.push(TokenOutput("r", (token,))) for token in tokens]
    assert [piece.offsets for piece in pieces] == [(0,), (1,), (2,), (2,)]


def test_text_held_for_a_stop_string_is_shown_when_the_sequence_ends(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("ab<", add_special_tokens=False)
    reader = reader_for(tokenizer, stop=("<END>",))
    assert reader.push(TokenOutput("r", tuple(tokens), "length")).text == "ab<"


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    tokens = [token for character in "x.y.z" for token in tokenizer.encode(character, add_special_tokens=False)]
    reader = reader_for(tokenizer, stop=(".",), min_tokens=2)
    piece = reader.push(TokenOutput("r", tuple(tokens), None))
    assert (piece.text, piece.finish_reason) == ("x.y", "stop")
