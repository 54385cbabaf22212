"""OpenAI's completions: what a request may ask for, and what a response says of its texts."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gpt2.config import SamplingParams
from gpt2.core.errors import UserError
from gpt2.core.fields import MOST, Float, Natural, Section
from gpt2.core.validation import check
from gpt2.data.tokenizer import TextStream, Tokenizer
from gpt2.generation.engine import GenerationSettings, Request

MAX_CHOICES = 128  # texts of a request
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


def _is_prompt(value: Any) -> bool:
    """Whether it is a text, or a list of tokens."""
    return isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value))


def _prompts(value: Any) -> Any:
    prompts = [value] if _is_prompt(value) else value
    if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
        raise ValueError("should be a text, a list of token ids, or a list of either")
    return prompts


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Section):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Completion(SamplingParams):
    """A request's fields, with OpenAI's names and defaults; top_k, min_p and repetition_penalty are ours."""

    model: str | None = None
    prompt: Annotated[list[Any], BeforeValidator(_prompts), Field(max_length=MAX_CHOICES)]
    temperature: Annotated[Float, Field(ge=0)] = 1.0
    max_tokens: Natural = 16
    n: Annotated[int, Field(gt=0, le=MAX_CHOICES)] = 1
    stop: Annotated[list[Stop], BeforeValidator(_stops)] = Field(default_factory=list, max_length=4)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None  # who asks, on which nothing depends
    # Clients send these at OpenAI's defaults, which change nothing; no other value is supported.
    best_of: Annotated[int, Field(ge=1, le=1)] = 1
    frequency_penalty: Annotated[Float, Field(ge=0, le=0)] = 0.0
    presence_penalty: Annotated[Float, Field(ge=0, le=0)] = 0.0
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] = Field(default_factory=dict)
    suffix: Annotated[str, Field(max_length=0)] = ""


def read_completion(raw: Any, max_tokens: int) -> Completion:
    """Return a request from its JSON, in which null means not given. Raises UserError, with all mistakes in a line."""
    if isinstance(raw, dict):
        raw = {name: value for name, value in raw.items() if value is not None or name not in Completion.model_fields}
    asked = check(Completion, raw, "request")
    if asked.max_tokens > max_tokens:
        raise UserError(f"request: max_tokens should be at most {max_tokens} ({asked.max_tokens})")
    if asked.max_tokens == 0 and not asked.echo:
        raise UserError("request: max_tokens should be greater than 0, unless echo is true (0)")
    if len(asked.prompt) * asked.n > MAX_CHOICES:
        raise UserError(f"request: {len(asked.prompt)} prompts, {asked.n} texts each, are more than {MAX_CHOICES}")
    return asked


class Choice:
    """One text of a response. Raises UserError if its prompt cannot be used, or is longer than max_len tokens."""

    def __init__(self, index: int, asked: Completion, tokenizer: Tokenizer, max_len: int) -> None:
        prompt, number = divmod(index, asked.n)
        settings = GenerationSettings(
            **asked.model_dump(include=set(SamplingParams.model_fields)),
            max_tokens=max(1, asked.max_tokens),
            seed=None if asked.seed is None else (asked.seed + number) % MOST,
        )
        scores_prompt = asked.echo and asked.logprobs is not None
        self.request = Request(asked.prompt[prompt], settings, tokenizer, asked.stop, asked.logprobs, scores_prompt)
        self.prompt_tokens = len(self.request.tokens)
        if self.prompt_tokens > max_len:
            raise UserError(f"the prompt has {self.prompt_tokens} tokens, the model's context only {max_len}")
        self.is_first = number == 0  # of its prompt
        self._index, self._asked, self._tokenizer = index, asked, tokenizer
        self._lead = self.request.prompt if asked.echo else ""
        self._told_characters = 0 if asked.echo else len(self.request.prompt)  # of prompt and text
        self._told_tokens = 0 if scores_prompt else self.prompt_tokens
        self._offset, self._stream = 0, TextStream(self._tokenizer)  # of the next token

    @property
    def completion_tokens(self) -> int:
        """How many tokens were written so far."""
        return min(self.request.generated, self._asked.max_tokens)  # one is written for max_tokens 0, and not told

    @property
    def _finish_reason(self) -> str:
        return self.request.finish_reason if self._asked.max_tokens else "length"

    def tell(self, text: str, ended: bool) -> dict[str, Any]:
        """Return what a response says of the next part of the text, or of the whole."""
        text, self._lead = self._lead + (text if self._asked.max_tokens else ""), ""
        self._told_characters += len(text)
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if self._asked.logprobs is None else self._tell_tokens(),
            "finish_reason": self._finish_reason if ended else None,
        }

    def _tell_tokens(self) -> dict[str, list[Any]]:
        """Tell the tokens that begin in what was told: none that has grown since, none that a stop string cuts off."""
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        while self._told_tokens < self.prompt_tokens + self.completion_tokens:
            if self._told_tokens == self.prompt_tokens:
                self._offset, self._stream = len(self.request.prompt), TextStream(self._tokenizer)
            if self._offset >= self._told_characters:
                break
            token = self.request.tokens[self._told_tokens]
            name = name_token(token, self._tokenizer)
            score = self._told_tokens - (1 if self.request.scores_prompt else self.prompt_tokens)
            logprob, best = self.request.scores[score] if score >= 0 else (None, {})
            named = {name_token(one, self._tokenizer): value for one, value in best.items()}
            told["tokens"].append(name)
            told["token_logprobs"].append(logprob)
            told["top_logprobs"].append(None if logprob is None else named | {name: logprob})
            told["text_offset"].append(self._offset)
            self._offset += len(self._stream.push(token))
            self._told_tokens += 1
        return told


def name_token(token: int, tokenizer: Tokenizer) -> str:
    """Return a token's text, or as OpenAI does "bytes:" and its bytes, if they are no whole characters."""
    data = tokenizer.encoding.decode_single_token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
