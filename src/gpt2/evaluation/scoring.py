"""A report on how well a model predicts a text, and on the tokens that surprise it most."""

import numpy as np

from gpt2.data import tokenizer
from gpt2.evaluation.perplexity import format_summary, predict, summarize, token_losses
from gpt2.model.gpt2 import GPT2Model

BATCH_SIZE = 8  # windows
EXPLAINED, CONTEXT_CHARACTERS, TOKEN_CHARACTERS = 10, 32, 18


def score(model: GPT2Model, text: str, explain: bool) -> str:
    """Return the figures of a text, which ends with <|endoftext|> as the corpus's documents do.

    With `explain`, a table of the tokens of highest loss follows. Raises UserError if a loss is not finite.
    """
    stride = max(1, model.max_len // 2)
    tokens = np.array([*tokenizer.encode(text), tokenizer.END_OF_TEXT_ID], dtype=np.uint16)
    losses = token_losses(model, tokens, stride, BATCH_SIZE)
    summary = summarize(losses, len(text.encode()))
    lines = [f"{format_summary(summary)}, {summary['tokens']:,} tokens, {summary['bytes']:,} bytes"]
    if explain:
        lines += ["", _row("  loss", "text before", "token", "most likely")]
    for index in losses.topk(min(EXPLAINED, len(losses))).indices.tolist() if explain else ():
        before = tokenizer.decode(tokens[max(0, index - CONTEXT_CHARACTERS) : index].tolist())[-CONTEXT_CHARACTERS:]
        probability, best = predict(model, tokens, index, stride).softmax(-1).max(-1)
        most_likely = f"{_show(int(best))} {probability:.1%}"
        lines.append(_row(f"{losses[index]:6.2f}", repr(before), _show(int(tokens[index])), most_likely))
    return "\n".join(lines)


def _row(loss: str, before: str, token: str, most_likely: str) -> str:
    return f"{loss}  {before:>{CONTEXT_CHARACTERS + 2}}  {token:{TOKEN_CHARACTERS}}  {most_likely}"


def _show(token: int) -> str:
    return repr(tokenizer.decode([token]))
