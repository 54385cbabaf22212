import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2.data import tokenizer
from gpt2.data.tokenizer import TextStream, Tokenizer, cut_long_runs, gpt2_tokenizer

GPT2 = gpt2_tokenizer()
MANY_BYTES = "naïve 日本語の文章 👩‍👩‍👧‍👦 🇯🇵 ﷽ e\u0301"


def test_loads_offline_with_the_vocabulary_of_gpt2(offline: None) -> None:
    gpt2_tokenizer.cache_clear()
    loaded = gpt2_tokenizer()
    assert loaded.encoding.n_vocab == loaded.vocab_size == tokenizer.VOCAB_SIZE == 50257
    assert loaded.encoding.eot_token == loaded.end_of_text_id == 50256


def test_known_text_has_the_ids_of_gpt2() -> None:
    assert GPT2.encode("Hello world") == [15496, 995]


@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    tokens = GPT2.encode(text)
    assert GPT2.decode(tokens) == text
    assert all(0 <= token < GPT2.end_of_text_id for token in tokens)


RUNS = st.lists(st.tuples(st.sampled_from("a\u65e5 \n\u3000"), st.integers(1, 30))).map(
    lambda runs: "".join(character * count for character, count in runs)
)


@given(RUNS, st.integers(2, 20))
def test_long_runs_alone_are_cut(text: str, longest: int) -> None:
    parts = cut_long_runs(text, longest)
    assert "".join(parts) == text
    ends = [match.end() for match in re.finditer(rf"\S{{{longest}}}|\s{{{longest}}}", text)]
    assert parts == [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.text() | RUNS)
def test_arrays_hold_the_same_tokens(text: str) -> None:
    for one in (text, f"{text}<|endoftext|>{text}"):
        assert [token for array in GPT2.encode_arrays(one) for token in array.tolist()] == GPT2.encode(one)


def test_a_long_run_is_encoded_in_pieces() -> None:
    text = "a b" + "\u65e5" * 2 * tokenizer.LONGEST_RUN + " " * 2 * tokenizer.LONGEST_RUN
    arrays = GPT2.encode_arrays(text)
    assert len(arrays) == 5 and GPT2.decode(GPT2.encode(text)) == text
    assert [token for array in arrays for token in array.tolist()] == GPT2.encode(text)


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_have_the_smallest_type_that_holds_all(size: int, dtype: str) -> None:
    words = [bytes(letters) for count in (1, 2) for letters in itertools.product(range(256), repeat=count)]
    ranks = {word: rank for rank, word in enumerate(words[: size - 1])}
    document = Tokenizer("large", ranks).encode_document("\0a")
    assert document.dtype == dtype and document[-1] == size - 1


def test_end_of_text_written_out_is_ordinary_text() -> None:
    tokens = GPT2.encode("a<|endoftext|>b")
    assert GPT2.end_of_text_id not in tokens
    assert GPT2.decode(tokens) == "a<|endoftext|>b"


def test_end_of_text_token_decodes_to_its_name() -> None:
    assert GPT2.decode([GPT2.end_of_text_id]) == tokenizer.END_OF_TEXT


def test_stream_never_breaks_a_character() -> None:
    tokens = GPT2.encode(MANY_BYTES)
    assert "\ufffd" in "".join(GPT2.encoding.decode([token]) for token in tokens)  # else it would prove nothing
    stream = TextStream(GPT2)
    parts = [*map(stream.push, tokens), stream.finish()]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) == MANY_BYTES


def test_stream_shows_each_text_as_soon_as_it_is_whole() -> None:
    stream = TextStream(GPT2)
    assert [stream.push(token) for token in GPT2.encode("one two three")] == ["one", " two", " three"]


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stream_ends_before_the_stop_string_that_is_whole_first(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(GPT2, *stops), ""
    for letter in text:
        shown += stream.push(*GPT2.encode(letter))
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
    found = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    assert stream.stopped == bool(found)
    assert shown + stream.finish() == (text[: sum(min(found))] if found else text)


def test_stream_holds_back_only_what_may_become_the_stop_string() -> None:
    stream = TextStream(GPT2, "\n\nThe")
    assert [stream.push(token) for token in GPT2.encode("war\n\na\n\nThe")] == ["war", "", "", "\n\na", "", "", ""]


def test_decoding_marks_what_stays_broken() -> None:
    assert GPT2.decode(GPT2.encode("👧")[:1]) == "\ufffd"


@pytest.mark.parametrize("name", ["VOCAB_BPE_SHA256", "ENCODER_JSON_SHA256"])
def test_files_of_another_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tokenizer, name, "0" * 64)
    gpt2_tokenizer.cache_clear()
    with pytest.raises(ValueError, match=r"[Hh]ash"):
        gpt2_tokenizer()
