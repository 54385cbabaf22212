import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.generation.shared_engine import SharedEngine
from gpt2.model.gpt2 import GPT2Model


@pytest.fixture
def engine(make_model: Callable[..., GPT2Model]) -> SharedEngine:
    return SharedEngine(Engine(make_model(vocab_size=VOCAB_SIZE, random=True), MAX_SLOTS))


def text_of(prompt: str, max_tokens: int, seed: int = 1) -> Request:
    return Request(prompt, GenerationSettings(max_tokens=max_tokens, seed=seed), gpt2_tokenizer())


def test_many_threads_get_each_their_own(engine: SharedEngine) -> None:
    def ask(seed: int) -> str:
        return "".join(*engine.submit([text_of("The war", 12, seed)]))

    alone = [ask(seed) for seed in range(24)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(24))) == alone
    assert len(set(alone)) > 20


def test_a_text_that_is_not_read_on_is_not_written_on(engine: SharedEngine) -> None:
    text = text_of("The war", 2**31 - 1)
    [parts] = engine.submit([text])
    next(parts)
    assert not text.finished
    parts.close()
    [other] = engine.submit([text_of("One nation", 2)])
    assert len(list(other)) == 2
    assert text.finished


def test_a_text_that_nobody_begins_to_read_is_cancelled(engine: SharedEngine) -> None:
    text = text_of("The war", 2**31 - 1)
    engine.submit([text])[0].close()
    [other] = engine.submit([text_of("One nation", 2)])
    assert len("".join(other)) > 0 and text.finished


def test_what_breaks_a_text_reaches_its_reader_and_the_next_is_tried_anew(
    engine: SharedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Request, logits: object) -> str:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Request, "add_token", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            list(*engine.submit([text_of("The war", 2)]))
    assert len(list(*engine.submit([text_of("The war", 2)]))) == 2


def test_a_model_that_is_no_longer_used_is_freed(make_model: Callable[..., GPT2Model]) -> None:
    model = make_model(vocab_size=VOCAB_SIZE)
    engine = SharedEngine(Engine(model, MAX_SLOTS))
    assert len(list(*engine.submit([text_of("The war", 2)]))) == 2
    freed = weakref.ref(model)
    del model, engine
    deadline = time.monotonic() + 60
    while freed():
        assert time.monotonic() < deadline
        time.sleep(0.01)
        gc.collect()
