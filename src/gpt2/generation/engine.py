"""Text after prompts, many at once: infer.py, the sample stage and the server all write through here.

A text depends on its prompt, its settings and its seed, not on the texts beside it, but for rounding: this hardly ever
changes a token in float, but may in int8, whose scale the texts share. The model sees at most max_len tokens: of a
longer prompt the last; when a text has filled the context, it goes on from the later half.
"""

import secrets
from collections import deque
from collections.abc import Generator, Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gpt2.config import Count, Float, Natural, SamplingParams
from gpt2.core.errors import UserError
from gpt2.data import tokenizer
from gpt2.generation.decoder import Decoder, Quantization
from gpt2.generation.sampling import draw, logits_wanted
from gpt2.model.gpt2 import GPT2Model

MAX_ROWS = 16  # texts written at once


class GenerationSettings(SamplingParams):
    """What one who asks for text can set; without a seed every text is another."""

    temperature: Annotated[Float, Field(ge=0)] = 0.7
    top_k: Count | None = 40
    max_tokens: Count = 50
    stop: Annotated[str, Field(min_length=1)] | None = None  # the text ends before it
    seed: Natural | None = None


class Text:
    """A text on its way. Raises UserError if the prompt is empty or no text."""

    def __init__(self, prompt: str, settings: GenerationSettings) -> None:
        if not prompt.strip():
            raise UserError("the prompt is empty")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError("the prompt is not UTF-8 text") from None
        self.prompt, self.settings = prompt, settings
        self.seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        self.tokens = tokenizer.encode(prompt)  # and what has been written since
        self.written = 0  # tokens
        self.ended = False
        self.abandoned = False  # by its reader; then it ends at the next token, or before its first
        self.seen_from: int | None = None  # the model sees the tokens from here on
        self._generator = torch.Generator().manual_seed(self.seed)
        self._stream = tokenizer.TextStream(settings.stop)

    def write(self, logits: Tensor) -> str:
        """Add a token drawn from logits (V,); return what of the text can be shown now."""
        token = draw(logits, self.settings, self._generator, self.tokens)
        if token == tokenizer.END_OF_TEXT_ID or self.abandoned:
            self.ended = True
            return self._stream.finish()
        self.tokens.append(token)
        self.written += 1
        shown = self._stream.push(token)
        self.ended = self._stream.stopped or self.written == self.settings.max_tokens
        return shown + self._stream.finish() if self.ended else shown


class Writer:
    """Writes up to `rows` texts at once with a model. Raises UserError where the model is not fit for int8."""

    def __init__(self, model: GPT2Model, rows: int, quantization: Quantization = "none") -> None:
        self._decoder = Decoder(model, rows, quantization)
        self.max_len = model.max_len

    def write(self, waiting: deque[Text]) -> Generator[tuple[Text, str]]:
        """Yield texts with what each goes on with, token by token, until all have ended.

        Texts may be added to those that wait meanwhile. Raises UserError if the model gives logits that are not finite.
        """
        rows: list[Text] = []
        while waiting or rows:
            while waiting and len(rows) < self._decoder.rows:
                text = waiting.popleft()
                if text.abandoned:
                    text.ended = True
                    yield text, ""
                else:
                    rows.append(text)
            if not rows:
                continue
            for text, logits in zip(rows, self._next_logits(rows), strict=True):
                yield text, text.write(logits)
            for row in reversed(range(len(rows))):
                if rows[row].ended:
                    last = rows.pop()
                    if row < len(rows):
                        rows[row] = last
                        self._decoder.move(len(rows), row)

    def _next_logits(self, rows: list[Text]) -> Tensor:
        """Return the logits (R, V) of the next token of each text, on the CPU."""
        new, positions = {}, [0] * len(rows)
        for row, text in enumerate(rows):
            if text.seen_from is None:
                text.seen_from = max(0, len(text.tokens) - self.max_len)
            elif len(text.tokens) - text.seen_from > self.max_len:
                text.seen_from = len(text.tokens) - max(1, self.max_len // 2)
            else:
                positions[row] = len(text.tokens) - text.seen_from - 1
                continue
            new[row] = text.tokens[text.seen_from :]
        if len(new) == len(rows):
            return self._decoder.prefill(new).cpu()
        wanted = logits_wanted((text.settings, len(text.tokens)) for text in rows)
        logits = self._decoder.step([text.tokens[-1] for text in rows], positions, wanted).cpu()
        return logits.index_copy(0, torch.tensor(list(new)), self._decoder.prefill(new).cpu()) if new else logits


def write_all(model: GPT2Model, texts: Iterable[Text]) -> list[str]:
    """Return what follows each prompt, in whole."""
    waiting = deque(texts)
    parts: dict[Text, list[str]] = {text: [] for text in waiting}
    for text, part in Writer(model, min(MAX_ROWS, len(waiting))).write(waiting):
        parts[text].append(part)
    return ["".join(found) for found in parts.values()]
