from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.generation import engine
from gpt2.generation.decoder import Decoder
from gpt2.generation.engine import Engine, GenerationSettings, Request
from gpt2.generation.linear import Quantization
from gpt2.generation.sampling import draw
from gpt2.model.gpt2 import GPT2Model

ErrorLine = Callable[[Callable[[], object]], str]
MakeModel = Callable[..., GPT2Model]
MAX_LEN = 8
GPT2 = gpt2_tokenizer()


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> GPT2Model:
    model = make_model(vocab_size=VOCAB_SIZE, max_len=MAX_LEN, d_model=8)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter)  # so strong that each token of the context changes what follows
    return model


def text_of(prompt: str, **settings: Any) -> Request:
    given: dict[str, Any] = {"temperature": 1.0, "top_k": None, "seed": 1, "max_tokens": 20} | settings
    return Request(prompt, GenerationSettings(**given), GPT2)


def written_by_hand(model: GPT2Model, text: Request) -> list[int]:
    """What follows a text's prompt, by the whole model at each token; a full context is halved."""
    generator = torch.Generator().manual_seed(text.seed)
    tokens, start = list(text.tokens), max(0, len(text.tokens) - MAX_LEN)
    while len(tokens) < len(text.tokens) + text.settings.max_tokens:
        if len(tokens) - start > MAX_LEN:
            start = len(tokens) - MAX_LEN // 2
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:]]))[0, -1]
        tokens.append(draw(logits, text.settings, generator, tokens))
    return tokens[len(text.tokens) :]


VARIOUS: list[tuple[str, dict[str, Any]]] = [
    ("One nation", {"temperature": 0}),
    ("The", {"top_k": 40, "seed": 2, "max_tokens": 3}),
    ("My fellow citizens of the Senate and of the House of Representatives,", {"top_p": 0.9, "seed": 3}),
    ("war", {"min_p": 0.1, "temperature": 2, "seed": 4, "max_tokens": 11}),
    ("peace peace", {"repetition_penalty": 3, "temperature": 0, "max_tokens": 30}),
    ("1 2 3 4 5 6 7 8", {"seed": 6, "max_tokens": 1}),
]


@pytest.mark.parametrize(("prompt", "settings"), VARIOUS)
def test_a_text_is_what_the_whole_model_would_write(model: GPT2Model, prompt: str, settings: dict[str, Any]) -> None:
    text = text_of(prompt, **settings)
    expected = written_by_hand(model, text)
    assert Engine(model, 16).generate_all([text]) == [GPT2.decode(expected)]
    assert (
        text.tokens == GPT2.encode(prompt) + expected and text.generated == text.settings.max_tokens and text.finished
    )


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_texts_side_by_side_are_those_written_alone(model: GPT2Model, rows: int) -> None:
    texts = [text_of(prompt, **settings) for prompt, settings in VARIOUS * 2]
    for _ in Engine(model, rows).generate(deque(texts)):
        pass
    for first, again, (prompt, settings) in zip(texts[: len(VARIOUS)], texts[len(VARIOUS) :], VARIOUS, strict=True):
        alone = text_of(prompt, **settings)
        Engine(model, 16).generate_all([alone])
        assert first.tokens == again.tokens == alone.tokens


def test_texts_may_come_while_others_are_written(model: GPT2Model) -> None:
    waiting, late = deque([text_of("One")]), text_of("Two", seed=2)
    for text, _ in Engine(model, 2).generate(waiting):
        if text.generated == 5 and text is not late:
            waiting.append(late)
    alone = text_of("Two", seed=2)
    Engine(model, 16).generate_all([alone])
    assert late.tokens == alone.tokens


def test_texts_at_work_wait_for_few_tokens_at_once(model: GPT2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 6)
    prefill, read = Decoder.prefill, []

    def noted(decoder: Decoder, texts: dict[int, list[int]], start: int) -> Tensor:
        read.append([len(text) for text in texts.values()])
        return prefill(decoder, texts, start)

    monkeypatch.setattr(Decoder, "prefill", noted)
    lengths = (1, 3, 4, 2, 20, 1, 1)  # of which the model sees 8 at most
    texts = [text_of(" war" * length, max_tokens=4, seed=length) for length in lengths]
    expected = [written_by_hand(model, text) for text in texts]
    Engine(model, 5).generate_all(texts)
    assert [text.tokens[length:] for text, length in zip(texts, lengths, strict=True)] == expected
    assert read == [[1, 3], [4], [2], [6], [2], [4], [1, 1]]  # the fifth in two parts; then its full context is halved


def test_a_writer_writes_again_after_it_was_stopped(model: GPT2Model) -> None:
    writer, again, fresh = Engine(model, 1), text_of("One"), text_of("One")
    stopped = writer.generate(deque([text_of("Two")]))
    next(stopped)
    stopped.close()
    for _ in writer.generate(deque([again])):
        pass
    Engine(model, 16).generate_all([fresh])
    assert again.tokens == fresh.tokens


def test_parts_make_the_text_token_by_token(model: GPT2Model) -> None:
    text = text_of("One", max_tokens=5)
    counts, parts = zip(*((text.generated, part) for _, part in Engine(model, 1).generate(deque([text]))), strict=True)
    assert counts == (1, 2, 3, 4, 5)
    assert "".join(parts) == Engine(model, 16).generate_all([text_of("One", max_tokens=5)])[0]


def test_the_seed_decides_and_nothing_else(model: GPT2Model) -> None:
    state = torch.get_rng_state()
    first = Engine(model, 16).generate_all([text_of("One")])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(5)
    assert Engine(model, 16).generate_all([text_of("One")]) == first
    assert Engine(model, 16).generate_all([text_of("One", seed=2)]) != first


def test_without_a_seed_every_text_is_another_and_tells_its_seed(model: GPT2Model) -> None:
    first, second = text_of("One", seed=None), text_of("One", seed=None)
    found = Engine(model, 16).generate_all([first, second])
    assert found[0] != found[1] and Engine(model, 16).generate_all([text_of("One", seed=first.seed)]) == found[:1]


@pytest.mark.parametrize(("favourite", "written"), [(GPT2.end_of_text_id, 0), (GPT2.encode(" war")[0], 3)])
def test_end_of_text_ends_a_text(make_model: MakeModel, favourite: int, written: int) -> None:
    model = make_model(vocab_size=VOCAB_SIZE, d_model=8, n_layers=1)
    with torch.no_grad():  # the features become ones, and one row of the head likes ones
        model.layer_norm.weight.zero_()
        model.layer_norm.bias.fill_(1)
        model.output_projection.weight.zero_()
        model.output_projection.weight[favourite] = 1
    text = text_of("One", temperature=0, max_tokens=3)
    assert Engine(model, 16).generate_all([text]) == [" war" * written]
    assert text.finished and text.generated == written


def test_a_text_ends_before_its_stop_string(model: GPT2Model) -> None:
    whole = Engine(model, 16).generate_all([text_of("One")])[0]
    stop = whole[len(whole) // 2 :][:3]
    text = text_of("One", stop=stop)
    assert Engine(model, 16).generate_all([text, text_of("One")]) == [whole.partition(stop)[0], whole]
    assert text.finished and text.generated < 20


@pytest.mark.parametrize(("prompt", "words"), [(" \n", "is empty"), ("a\udc80", "not UTF-8 text")])
def test_prompts_that_cannot_be_continued_are_refused(error_line: ErrorLine, prompt: str, words: str) -> None:
    assert words in error_line(lambda: text_of(prompt))


@pytest.mark.parametrize("part", ["output_projection", "layer_norm"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_broken_weights_are_named(
    make_model: MakeModel, error_line: ErrorLine, part: str, quantization: Quantization
) -> None:
    model = make_model(vocab_size=VOCAB_SIZE, d_model=8)
    with torch.no_grad():
        model.get_parameter(f"{part}.weight")[7] = torch.nan
    line = error_line(lambda: next(Engine(model, 1, quantization=quantization).generate(deque([text_of("One")]))))
    assert "the model's weights are broken" in line


def test_no_texts_are_no_texts(model: GPT2Model) -> None:
    assert Engine(model, 16).generate_all([]) == []


@pytest.mark.parametrize(("prompt", "read_at_once"), [("One nation, many", 256), ("One nation, many", 3), ("One", 3)])
def test_scores_are_the_whole_models_log_probabilities_whatever_the_settings(
    model: GPT2Model, monkeypatch: pytest.MonkeyPatch, prompt: str, read_at_once: int
) -> None:
    monkeypatch.setattr(engine, "PREFILL_TOKENS", read_at_once)
    settings = text_of("a", max_tokens=3, temperature=2.0, top_k=5, repetition_penalty=2.0).settings
    beside = text_of("war", max_tokens=9)
    text = Request(prompt, settings, GPT2, logprobs=2, scores_prompt=True)
    Engine(model, 16).generate_all([beside, text])
    with torch.no_grad():
        expected = model(torch.tensor([text.tokens[:-1]]))[0].log_softmax(-1)
    assert len(text.scores) == len(text.tokens) - 1
    for (logprob, best), token, logprobs in zip(text.scores, text.tokens[1:], expected, strict=True):
        assert logprob == pytest.approx(logprobs[token].item(), abs=1e-3)
        assert list(best) == logprobs.topk(2).indices.tolist()
        assert best == pytest.approx({each: logprobs[each].item() for each in best}, abs=1e-3)


def test_a_prompt_of_tokens_is_that_of_their_text(model: GPT2Model) -> None:
    texts = [text_of("One nation"), Request(GPT2.encode("One nation"), text_of("a").settings, GPT2)]
    first, second = Engine(model, 16).generate_all(texts)
    assert first == second and texts[1].prompt == "One nation"
