"""Text after prompts, by continuous batching: infer.py, the sample stage and the server all generate here.

A text depends on its prompt, its settings and its seed, not on the texts beside it, but for rounding: this hardly ever
changes a token in float, but may in int8, whose scale the texts share. The model sees at most max_len tokens: of a
longer prompt the last ones; when a text has filled the context, its later half becomes the context.
"""

import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from gpt2.config import SamplingParams
from gpt2.core.errors import UserError
from gpt2.core.fields import Count, Float, Natural, Text
from gpt2.data.batches import SeenMask
from gpt2.data.tokenizer import TextStream, Tokenizer
from gpt2.generation.decoder import Decoder
from gpt2.generation.linear import Quantization
from gpt2.generation.sampling import draw, score
from gpt2.model.gpt2 import GPT2Model

MAX_SLOTS = 16  # texts written at once
PREFILL_TOKENS = 256  # of prompts read between two steps, so that the texts at work wait little: chunked prefill


class GenerationSettings(SamplingParams):
    """Settings of a request; without a seed every text differs."""

    temperature: Annotated[Float, Field(ge=0)] = 0.7
    top_k: Count | None = 40
    max_tokens: Count = 50
    stop: Text | None = None  # the text ends before it
    seed: Natural | None = None


class Request:
    """A prompt, as text or as tokens, with its settings, and the text that follows it so far.

    The text ends before the first of `stops` too. With `logprobs`, `scores` has for each token that follows the prompt
    its log probability and those of so many most likely ones, by the model alone: settings do not change them. With
    `scores_prompt`, the prompt's tokens but for the first come before. Raises UserError if the prompt is empty, not
    UTF-8 text, or has a token that the tokenizer does not.
    """

    def __init__(
        self,
        prompt: str | list[int],
        settings: GenerationSettings,
        tokenizer: Tokenizer,
        stops: Iterable[str] = (),
        logprobs: int | None = None,
        scores_prompt: bool = False,
    ) -> None:
        self.tokens = _read(prompt, tokenizer)  # and those generated since
        self.prompt = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        self.settings, self.scores_prompt = settings, scores_prompt
        self.seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
        self.generated = 0  # tokens
        self.finished = False
        self.cancelled = False  # by its reader; then it finishes at the next token, or before its first
        self.context_start = 0  # the model sees the tokens from here on
        self.cached = 0  # of these, the tokens whose keys and values are in the cache
        self.scores: list[tuple[float, dict[int, float]]] = []
        self._logprobs = logprobs
        self._generator = torch.Generator().manual_seed(self.seed)
        self._end_of_text = tokenizer.end_of_text_id
        self._stream = TextStream(tokenizer, *([settings.stop] if settings.stop else []), *stops)

    @property
    def unread(self) -> list[int]:
        """The tokens that the model has yet to read."""
        return self.tokens[self.context_start + self.cached :]

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """Why the text ended: what it wrote, or max_tokens."""
        return "length" if self.generated == self.settings.max_tokens and not self._stream.stopped else "stop"

    def add_token(self, logits: Tensor) -> str:
        """Add a token drawn from logits (V,); return what of the text can be shown now."""
        token = draw(logits, self.settings, self._generator, self.tokens)
        if token == self._end_of_text or self.cancelled:
            self.finished = True
            return self._stream.finish()
        if self._logprobs is not None:
            self.scores += score(logits[None], [token], self._logprobs)
        self.tokens.append(token)
        self.generated += 1
        shown = self._stream.push(token)
        self.finished = self._stream.stopped or self.generated == self.settings.max_tokens
        return shown + self._stream.finish() if self.finished else shown

    def score_prompt(self, logits: Tensor) -> None:
        """Score the next of the prompt's tokens, from the logits before each (T, V)."""
        first = self.context_start + len(self.scores) + 1
        self.scores += score(logits, self.tokens[first : first + len(logits)], self._logprobs or 0)


def check_prompt(prompt: str) -> None:
    """Raise UserError if a text cannot be a prompt."""
    if not prompt.strip():
        raise UserError("the prompt is empty")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text") from None


def _read(prompt: str | list[int], tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        check_prompt(prompt)
        return tokenizer.encode(prompt)
    if not prompt:
        raise UserError("the prompt is empty")
    if unknown := [token for token in prompt if not 0 <= token < tokenizer.vocab_size]:
        raise UserError(f"the prompt's token {unknown[0]} is not one of the model's {tokenizer.vocab_size:,}")
    return list(prompt)


class Engine:
    """Generates up to `slots` texts at once with a model; for the other arguments and errors see Decoder."""

    def __init__(
        self, model: GPT2Model, slots: int, seen: SeenMask | None = None, quantization: Quantization = "none"
    ) -> None:
        self._decoder = Decoder(model, slots, seen, quantization)
        self.max_len = model.max_len

    def generate(self, waiting: deque[Request]) -> Generator[tuple[Request, str]]:
        """Yield requests with the next part of their texts, token by token, until all have finished.

        Requests may be added to `waiting` meanwhile, by other threads too. Raises UserError if the model gives logits
        that are not finite.
        """
        running: list[Request] = []  # in the first slots
        while waiting or running:
            for request in [one for one in list(waiting) if one.cancelled]:
                waiting.remove(request)
                request.finished = True
                yield request, ""
            reads: dict[int, Request] = {}  # by slot, prompts and halved contexts, which are not read by steps
            for slot, request in enumerate(running):
                if len(request.unread) > 1 and _fit([*reads.values(), request]):
                    reads[slot] = request
            while waiting and len(running) < self._decoder.slots:
                request = waiting[0]
                request.context_start = max(0, len(request.tokens) - self.max_len)
                if not _fit([*reads.values(), request]):
                    break
                reads[len(running)] = request
                running.append(waiting.popleft())
            for request, logits in chain(self._step(running, reads), self._read(reads)):
                yield request, request.add_token(logits)
                if len(request.tokens) - request.context_start > self.max_len:
                    request.context_start, request.cached = len(request.tokens) - max(1, self.max_len // 2), 0
            for slot in reversed(range(len(running))):
                if running[slot].finished:
                    last = running.pop()
                    if slot < len(running):
                        running[slot] = last
                        self._decoder.move(len(running), slot)

    def generate_all(self, requests: Iterable[Request], advance: Callable[[], object] = lambda: None) -> list[str]:
        """Return the text that follows each prompt, whole; call `advance` after each token."""
        waiting = deque(requests)
        parts: dict[Request, list[str]] = {request: [] for request in waiting}
        for request, part in self.generate(waiting):
            parts[request].append(part)
            advance()
        return ["".join(found) for found in parts.values()]

    def _step(self, running: list[Request], reads: dict[int, Request]) -> Iterator[tuple[Request, Tensor]]:
        """Read the token that texts have got last; yield these and the logits after it (V,), on the CPU."""
        steps = {slot: one for slot, one in enumerate(running) if slot not in reads and len(one.unread) == 1}
        if not steps:
            return
        # All take part; what another gets here, at the place that it reads next, is overwritten then.
        logits = self._decoder.step([one.tokens[-1] for one in running], [one.cached for one in running]).cpu()
        for slot, request in steps.items():
            request.cached += 1
            yield request, logits[slot]

    def _read(self, reads: dict[int, Request]) -> Iterator[tuple[Request, Tensor]]:
        """Read what fits of texts, by slot; yield those that are read to their end and the logits there (V,)."""
        if not reads:
            return
        requests = list(reads.values())
        parts = [request.unread[:PREFILL_TOKENS] for request in requests]
        hidden_states = self._decoder.prefill(dict(zip(reads, parts, strict=True)), requests[0].cached)  # (R, T, C)
        for request, part, states in zip(requests, parts, hidden_states, strict=True):
            request.cached += len(part)
            if request.scores_prompt and not request.generated:
                followed = len(part) if request.unread else len(part) - 1
                request.score_prompt(self._decoder.logits(states[:followed]).cpu())
        if not requests[0].unread:  # else it is the only one, and has more to read
            ends = hidden_states[range(len(parts)), [len(part) - 1 for part in parts]]
            yield from zip(requests, self._decoder.logits(ends).cpu(), strict=True)


def _fit(requests: list[Request]) -> bool:
    """Tell whether the model may read these texts at once: one, or several that have few tokens and none read yet."""
    longest = max(len(request.unread) for request in requests)
    are_small = len(requests) * longest <= PREFILL_TOKENS and not any(request.cached for request in requests)
    return len(requests) == 1 or are_small
