"""From logits to text: free functions that filter and draw, and a generator of tokens.

Shapes: V vocabulary, T positions.
"""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gpt2.cli import UserError
from gpt2.config import Count, Float, SamplingParams, Seed
from gpt2.model import GPT2Model
from gpt2.tokenizer import END_OF_TEXT_ID

GREEDY_BELOW = 1e-6  # a temperature that float32 cannot divide by is as good as 0


class GenerationSettings(SamplingParams):
    """What one who asks for text can set; without a seed every text is another."""

    temperature: Annotated[Float, Field(ge=0)] = 0.7
    top_k: Count | None = 40
    max_tokens: Count = 50
    seed: Seed | None = None


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (V,) with all but the k largest at -inf (Fan et al. 2018, section 5)."""
    best = logits.topk(min(k, logits.numel()))
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (V,) with all at -inf but the fewest largest that hold probability p (Holtzman et al. 2020)."""
    if p == 1:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= p  # what stands before already holds p
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def draw(logits: Tensor, setting: SamplingParams, generator: torch.Generator) -> int:
    """Draw a token from logits (V,): the largest at temperature 0, else at random after top_k, then top_p.

    Raises UserError if the largest is infinite or NaN.
    """
    largest = logits.max()
    if not largest.isfinite():
        raise UserError(f"the model's weights are ruined: a logit is {largest.item()}")
    if setting.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    logits = (logits.float() - largest) / setting.temperature
    if setting.top_k is not None:
        logits = keep_top_k(logits, setting.top_k)
    if setting.top_p is not None:
        logits = keep_top_p(logits, setting.top_p)
    return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator))


@torch.inference_mode()
def generate(model: GPT2Model, prompt: list[int], max_tokens: int, setting: SamplingParams, seed: int) -> Iterator[int]:
    """Yield up to max_tokens token ids that follow the prompt's; <|endoftext|> ends them and is not yielded.

    The model sees the last max_len tokens. The same arguments give the same tokens. Raises ValueError if the prompt
    is empty, UserError if the model gives logits that are not finite.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        context = torch.tensor([tokens[-model.max_len :]], device=device)  # (1, T)
        last = model.features(context)[0, -1]
        token = draw(model.output_projection(last), setting, generator)
        if token == END_OF_TEXT_ID:
            return
        tokens.append(token)
        yield token
