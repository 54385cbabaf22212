"""A vocabulary of the corpus's own: byte-level BPE (Sennrich et al. 2016), trained by the `tokenizers` library."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gpt2.core.errors import UserError
from gpt2.data.tokenizer import write_tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, file: Path) -> None:
    """Write the tokens of a vocabulary, all but <|endoftext|>, in tiktoken's format, which `load_tokenizer` reads.

    The same texts give the same bytes, whatever their order or the number of threads. Raises UserError if they have not
    enough pairs for so many tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=sorted(byte_of), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    ids = bpe.get_vocab()
    if len(ids) < vocab_size - 1:
        raise UserError(f"prepare.vocab_size {vocab_size} is more than the {len(ids) + 1} that the train split gives")
    tokens = (bytes(byte_of[letter] for letter in token) for token in sorted(ids, key=ids.__getitem__))
    write_tokenizer(tokens, file)


def byte_letters() -> dict[int, str]:
    """Return the letter by which GPT-2 writes each byte (Radford et al. 2019, encoder.py).

    Bytes that Latin-1 can print are their own letters, and come first.
    """
    order = sorted(range(256), key=lambda byte: byte == ord(" ") or not chr(byte).isprintable())
    return dict(zip(order, sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
