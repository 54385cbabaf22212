"""A report on how well a model predicts a text, and on the tokens that surprise it most."""

import torch
import torch.nn.functional as F

from gpt2.data.tokenizer import Tokenizer
from gpt2.evaluation.perplexity import check_finite, format_summary, predictions, summarize
from gpt2.model.gpt2 import GPT2Model

BATCH_SIZE = 8  # windows
EXPLAINED, CONTEXT_CHARACTERS, TOKEN_CHARACTERS = 10, 32, 18


def score(model: GPT2Model, tokenizer: Tokenizer, text: str, explain: bool) -> str:
    """Return the figures of a text, which ends with <|endoftext|> as the corpus's documents do.

    With `explain`, a table of the tokens of highest loss follows. Raises UserError if a loss is not finite.
    """
    tokens = tokenizer.encode_document(text)
    found = []
    for logits, targets in predictions(model, tokens, max(1, model.max_len // 2), BATCH_SIZE):
        losses = F.cross_entropy(logits, targets, reduction="none")
        found.append(torch.stack([losses, *logits.softmax(-1).max(-1)]).cpu())
    losses, probabilities, most_likely = torch.cat(found, 1)  # each (N,)
    summary = summarize(check_finite(losses.double().mean().item()), len(tokens), len(text.encode()))
    lines = [f"{format_summary(summary)}, {summary['tokens']:,} tokens, {summary['bytes']:,} bytes"]
    if explain:
        lines += ["", _row("  loss", "text before", "token", "most likely")]
    for index in losses.topk(min(EXPLAINED, len(losses))).indices.tolist() if explain else ():
        before = tokenizer.decode(tokens[max(0, index - CONTEXT_CHARACTERS) : index].tolist())[-CONTEXT_CHARACTERS:]
        best = f"{_show(tokenizer, int(most_likely[index]))} {probabilities[index]:.1%}"
        lines.append(_row(f"{losses[index]:6.2f}", repr(before), _show(tokenizer, int(tokens[index])), best))
    return "\n".join(lines)


def _row(loss: str, before: str, token: str, most_likely: str) -> str:
    return f"{loss}  {before:>{CONTEXT_CHARACTERS + 2}}  {token:{TOKEN_CHARACTERS}}  {most_likely}"


def _show(tokenizer: Tokenizer, token: int) -> str:
    return repr(tokenizer.decode([token]))
