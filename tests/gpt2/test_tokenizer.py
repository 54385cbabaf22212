from operator import length_hint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.tokenizer import decode_stream, encode, load_tokenizer

MANY_BYTES = "naïve 日本語の文章 👩‍👩‍👧‍👦 🇯🇵 ﷽ e\u0301"


def test_loads_offline_with_the_vocabulary_of_gpt2(offline: None) -> None:
    load_tokenizer.cache_clear()
    assert load_tokenizer().n_vocab == tokenizer.VOCAB_SIZE == 50257
    assert load_tokenizer().eot_token == tokenizer.END_OF_TEXT_ID == 50256


def test_known_text_has_the_ids_of_gpt2() -> None:
    assert encode("Hello world") == [15496, 995]


@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    tokens = encode(text)
    assert "".join(decode_stream(tokens)) == text
    assert all(0 <= token < tokenizer.END_OF_TEXT_ID for token in tokens)


def test_end_of_text_written_out_is_ordinary_text() -> None:
    tokens = encode("a<|endoftext|>b")
    assert tokenizer.END_OF_TEXT_ID not in tokens
    assert "".join(decode_stream(tokens)) == "a<|endoftext|>b"


def test_end_of_text_token_decodes_to_its_name() -> None:
    assert "".join(decode_stream([tokenizer.END_OF_TEXT_ID])) == tokenizer.END_OF_TEXT


def test_decode_stream_never_breaks_a_character() -> None:
    tokens = encode(MANY_BYTES)
    assert "\ufffd" in "".join(load_tokenizer().decode([token]) for token in tokens)  # else it would prove nothing
    parts = list(decode_stream(tokens))
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == MANY_BYTES


def test_decode_stream_gives_each_text_as_soon_as_it_is_whole() -> None:
    tokens = iter(encode("one two three"))
    stream = decode_stream(tokens)
    assert (next(stream), length_hint(tokens)) == ("one", 2)
    assert (next(stream), length_hint(tokens)) == (" two", 1)


def test_decode_stream_marks_what_stays_broken() -> None:
    assert "".join(decode_stream(encode("👧")[:1])) == "\ufffd"


def test_files_of_another_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "VOCAB_BPE_SHA256", "0" * 64)
    load_tokenizer.cache_clear()
    with pytest.raises(ValueError, match=r"[Hh]ash"):
        load_tokenizer()
