"""The page of serve.py in a real browser."""

import re
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, expect

from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.generation.shared_engine import SharedEngine
from gpt2.model.gpt2 import GPT2Model
from gpt2.serving.app import Limits, make_app
from serving.helpers import serving

pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)
KEY, PROMPT = "a secret", "The “fox” 🦊 of <b>the union</b>"


@pytest.fixture(scope="module")
def model(make_model: Callable[..., GPT2Model]) -> GPT2Model:
    return make_model(vocab_size=VOCAB_SIZE, max_len=64, random=True)


@pytest.fixture(scope="module")
def engine(model: GPT2Model) -> SharedEngine:
    return SharedEngine(Engine(model, MAX_SLOTS))


@pytest.fixture(scope="module")
def address(engine: SharedEngine) -> Iterator[str]:
    app = make_app(engine, gpt2_tokenizer(), 64, "a model", Limits(max_tokens=10**6, max_waiting=4), KEY)
    with serving(app) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    scheme: Literal["light", "dark"] = request.param
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    mistakes: list[str] = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((address, "data:")) else mistakes.append(asked.url))
    page.goto(address)
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")
    assert (max(map(int, brightness)) < 128) == (scheme == "dark")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert mistakes == []
    page.close()


def test_a_text_streams_in_colours_of_its_probabilities(page: Page, model: GPT2Model, engine: SharedEngine) -> None:
    status, write, text = page.locator("#status"), page.get_by_role("button", name="Write"), page.locator("#text")
    page.get_by_label("prompt").fill(PROMPT)
    page.get_by_label("max_tokens").fill("40")
    page.get_by_label("seed").fill("3")
    expect(page.get_by_label("API key")).to_be_hidden()
    write.click()
    expect(status).to_have_text("the API key is missing or wrong")
    page.get_by_label("API key").fill(KEY)
    write.click()
    expect(status).to_have_text(re.compile(r"^40 tokens, [\d.]+ tokens/s$"))
    expect(write).to_be_enabled()
    settings = GenerationSettings(max_tokens=40, temperature=0.7, top_k=40, seed=3)
    by_hand = Request(PROMPT, settings, gpt2_tokenizer(), logprobs=1)
    [expected] = Engine(model, MAX_SLOTS).generate_all([by_hand])
    assert text.text_content() == PROMPT + expected
    levels = [sum(logprob < limit for limit in (-0.6931, -2.3026, -4.6052, -6.9078)) for logprob, _ in by_hand.scores]
    shown = text.locator("span").evaluate_all("spans => spans.map(span => span.className)")
    assert shown == [f"s{level}" for level in levels] and len(set(shown)) > 1
    assert re.match(r"\d+\.\d\d% ", text.locator("span").first.get_attribute("title") or "")

    page.get_by_label("temperature").fill("9999")
    page.get_by_label("top_p").fill("0.00001")
    page.get_by_label("max_tokens").fill("1000000")
    write.click()
    expect(text.locator("span").nth(50)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    expect(status).to_have_text("stopped")
    for _ in range(100):
        page.wait_for_timeout(100 if engine.unfinished else 0)
    assert not engine.unfinished
    page.get_by_label("max_tokens").fill("1000001")
    write.click()
    expect(status).to_have_text(re.compile("max_tokens should be at most 1000000"))
