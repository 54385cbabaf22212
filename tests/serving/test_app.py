"""The server as its clients see it: the official OpenAI client unchanged, and what else may speak HTTP."""

import contextlib
import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
from fastapi import FastAPI
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.generation.shared_engine import SharedEngine
from gpt2.model.gpt2 import GPT2Model
from gpt2.report.page import LEVELS, STYLE
from gpt2.serving.app import MAX_BODY_BYTES, PAGE, Limits, make_app
from serving.helpers import serving

NAME, KEY, MAX_LEN = "models:/gpt2@champion", "a secret", 24
MAX_WAITING, ENDLESS = 4, 10**6
GPT2 = gpt2_tokenizer()
PROMPT = "The state of the Union is “naïve” 🦊,"


@dataclass
class Served:
    address: tuple[str, int]
    app: FastAPI
    engine: SharedEngine
    model: GPT2Model

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url="http://{}:{}/v1".format(*self.address), api_key=KEY, max_retries=0)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Return the status and the text of an answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | headers
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        with contextlib.closing(connection):
            return answer.status, answer.read().decode()

    def write(self, **body: Any) -> Any:
        status, text = self.ask("POST", "/v1/completions", {"prompt": "The war", "seed": 1} | body)
        assert status == 200, text
        return json.loads(text)

    def by_hand(self, prompt: str, **settings: Any) -> str:
        [text] = Engine(self.model, MAX_SLOTS).generate_all([Request(prompt, GenerationSettings(**settings), GPT2)])
        return text

    def wait_until_unfinished(self, texts: int) -> None:
        deadline = time.monotonic() + 30
        while self.engine.unfinished != texts:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def served(make_model: Callable[..., GPT2Model]) -> Iterator[Served]:
    model = make_model(vocab_size=VOCAB_SIZE, max_len=MAX_LEN, random=True)
    engine = SharedEngine(Engine(model, MAX_SLOTS))
    app = make_app(engine, GPT2, model.max_len, NAME, Limits(max_tokens=ENDLESS, max_waiting=MAX_WAITING), KEY)
    with serving(app) as address:
        yield Served(address, app, engine, model)


def test_the_openai_client_gets_the_text_whole_and_in_parts(served: Served) -> None:
    settings: dict[str, Any] = {"max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    with served.client as client:
        assert [model.id for model in client.models.list()] == [NAME] == [client.models.retrieve(NAME).id]
        extra = {"top_k": 40, "min_p": 0.001, "repetition_penalty": 1.2}
        whole = client.completions.create(model=NAME, prompt=PROMPT, extra_body=extra, **settings)
        options: Any = {"stream_options": {"include_usage": True}, "extra_body": extra}
        parts = list(client.completions.create(model=NAME, prompt=PROMPT, stream=True, **options, **settings))
    assert whole.choices[0].text == served.by_hand(PROMPT, **settings, **extra)
    assert "".join(choice.text for part in parts for choice in part.choices) == whole.choices[0].text
    reasons = [choice.finish_reason for part in parts for choice in part.choices]
    assert len(parts) > 5 and {*reasons[:-1]} == {None} and reasons[-1] == whole.choices[0].finish_reason == "length"
    assert whole.usage == parts[-1].usage and whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(GPT2.encode(PROMPT)), 20)
    assert whole.usage.total_tokens == len(GPT2.encode(PROMPT)) + 20


def test_each_prompt_has_n_texts_by_the_seeds_that_follow(served: Served) -> None:
    prompts = ["The war", "One nation"]
    answer = served.write(prompt=prompts, n=2, seed=2**31 - 1, max_tokens=6)
    expected = [
        served.by_hand(prompt, seed=seed, max_tokens=6, temperature=1.0, top_k=None)
        for prompt in prompts
        for seed in (2**31 - 1, 0)
    ]
    assert [choice["text"] for choice in answer["choices"]] == expected and len(set(expected)) == 4
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 24, "total_tokens": 28}
    tokens = served.write(prompt=[GPT2.encode(prompt) for prompt in prompts], n=2, seed=2**31 - 1, max_tokens=6)
    assert tokens["choices"] == answer["choices"]


@pytest.mark.parametrize("max_tokens", [0, 12])
def test_echo_and_logprobs_tell_each_token_whole_and_in_parts(served: Served, max_tokens: int) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 3, "max_tokens": max_tokens, "temperature": 2, "top_k": 9}
    [choice] = served.write(**asked)["choices"]
    told, text = choice["logprobs"], choice["text"]
    assert text.startswith(PROMPT) and (text == PROMPT) == (max_tokens == 0) and choice["finish_reason"] == "length"
    ends = [*told["text_offset"][1:], len(text)]
    pieces = [text[start:end] for start, end in zip(told["text_offset"], ends, strict=True)]
    assert "".join(pieces) == text
    for token, piece in zip(told["tokens"], pieces, strict=True):
        assert token == piece or token.startswith("bytes:\\x")
    tokens = GPT2.encode(PROMPT)
    assert len(pieces) == len(tokens) + max_tokens and sum("bytes:" in token for token in told["tokens"]) >= 2
    with torch.no_grad():
        logprobs = served.model(torch.tensor([tokens]))[0].log_softmax(-1)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    for index, token in enumerate(tokens[1:], 1):
        assert told["token_logprobs"][index] == pytest.approx(logprobs[index - 1, token].item(), abs=1e-3)
        best = {*told["top_logprobs"][index].values()}
        assert max(best) == pytest.approx(logprobs[index - 1].max().item(), abs=1e-3) and 3 <= len(best) <= 4
    told_in_parts: dict[str, list[Any]] = {name: [] for name in told}
    with served.client as client:
        extra: Any = {"extra_body": {"top_k": asked.pop("top_k")}} | asked
        for part in client.completions.create(model=NAME, stream=True, seed=1, **extra):
            for name, values in part.choices[0].logprobs or ():
                told_in_parts[name] += values
    assert told_in_parts == told


def test_a_text_ends_before_the_first_stop_string_and_so_do_its_tokens(served: Served) -> None:
    [whole] = served.write(max_tokens=20, logprobs=0)["choices"]
    starts = [start - len("The war") for start in whole["logprobs"]["text_offset"]]
    stops = [whole["text"][starts[first] : starts[first + 2]] for first in (12, 6)]  # of two tokens each
    [choice] = served.write(max_tokens=20, stop=stops, logprobs=0)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole["text"][: starts[6]], "stop")
    assert choice["logprobs"] == {name: values[:6] for name, values in whole["logprobs"].items()}
    assert served.write(max_tokens=20, stop=stops[0])["choices"][0]["text"] == whole["text"][: starts[12]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        ([], "should be a valid dictionary"),
        ({}, "prompt is missing"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": ["a", []]}, "the prompt is empty"),
        ({"prompt": [1, "a"]}, "prompt should be a text, a list of token ids, or a list of either"),
        ({"prompt": [50257]}, "the prompt's token 50257 is not one of the model's 50,257"),
        ({"prompt": [True]}, "prompt should be"),
        ({"prompt": "\ud800"}, "the prompt is not UTF-8 text"),
        ({"prompt": "one " * MAX_LEN}, f"the prompt has {MAX_LEN + 1} tokens, the model's context only {MAX_LEN}"),
        ({"prompt": "a", "temperatur": 1}, "temperatur is unknown (did you mean temperature?)"),
        ({"prompt": "a", "\ud800": 1}, "should be a valid string"),
        ({"prompt": "a", "two\nlines": 1}, "two lines is unknown"),
        ({"prompt": "a", "unknown": None}, "unknown is unknown"),
        ({"prompt": "a", "temperature": -1, "top_p": 2}, "temperature should be greater than or equal to 0"),
        ({"prompt": "a", "temperature": -1, "top_p": 2}, "top_p should be less than or equal to 1"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature should be a finite number"),
        ({"prompt": "a", "max_tokens": ENDLESS + 1}, f"max_tokens should be at most {ENDLESS}"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens should be greater than 0, unless echo is true"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens should be a valid integer"),
        ({"prompt": "a", "n": 0}, "n should be greater than 0"),
        ({"prompt": ["a"] * 65, "n": 2}, "65 prompts, 2 texts each, are more than 128"),
        ({"prompt": "a", "stop": ["a", ""]}, "stop.1"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop"),
        ({"prompt": "a", "logprobs": 6}, "logprobs should be less than or equal to 5"),
        ({"prompt": "a", "seed": 2**63}, "seed should be less than"),
        ({"prompt": "a", "n": MAX_SLOTS + MAX_WAITING + 1}, f"are more than the {MAX_SLOTS + MAX_WAITING} that this"),
        ({"prompt": "a", "best_of": 2}, "best_of should be less than or equal to 1"),
        ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty should be less than or equal to 0"),
        ({"prompt": "a", "presence_penalty": -1}, "presence_penalty should be greater than or equal to 0"),
        ({"prompt": "a", "logit_bias": {"50256": -100}}, "logit_bias"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"prompt": "a", "stream_options": {"usage": True}}, "stream_options.usage is unknown"),
    ],
)
def test_what_cannot_be_used_is_one_line(served: Served, body: Any, message: str) -> None:
    status, text = served.ask("POST", "/v1/completions", body)
    error = json.loads(text)["error"]
    assert status == 400 and message in error["message"] and len(error["message"].splitlines()) == 1
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}


def test_null_is_a_field_that_is_not_given(served: Served) -> None:
    nulls = dict.fromkeys(["model", "stop", "logprobs", "max_tokens", "temperature", "n", "stream", "echo", "user"])
    assert served.write(**nulls)["choices"] == served.write()["choices"]


def test_what_clients_send_though_it_changes_nothing_is_taken(served: Served) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None}
    answer = served.write(**neutral, stream_options={"include_obfuscation": False}, seed=1 + 2**33)
    assert answer["choices"] == served.write()["choices"]
    headers = {"Content-Type": "Application/JSON; charset=utf-8", "Authorization": f"bearer {KEY}"}
    assert served.ask("POST", "/v1/completions", {"prompt": "a"}, **headers)[0] == 200
    assert [served.ask("HEAD", path) for path in ("/health", "/")] == [(200, "")] * 2


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "kind"),
    [
        ("POST", "/v1/completions", {"prompt": "a"}, {"Authorization": "Bearer wrong"}, 401, "authentication_error"),
        ("GET", "/v1/models", None, {"Authorization": ""}, 401, "authentication_error"),
        ("GET", "/v1/models", None, {"Authorization": KEY}, 401, "authentication_error"),
        ("GET", "/v1/models/other", None, {}, 404, "invalid_request_error"),
        ("POST", "/v1/completions", {"prompt": "a", "model": "other\ud800"}, {}, 404, "invalid_request_error"),
        ("GET", "/v1/complete", None, {}, 404, "invalid_request_error"),
        ("GET", "/v1/completions", None, {}, 405, "invalid_request_error"),
        ("POST", "/v1/completions", b" " * (MAX_BODY_BYTES + 1), {}, 413, "invalid_request_error"),
        ("POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"}, 415, "invalid_request_error"),
    ],
)
def test_what_is_refused_has_its_status(
    served: Served, method: str, path: str, body: Any, headers: dict[str, str], status: int, kind: str
) -> None:
    found, text = served.ask(method, path, body, **headers)
    assert (found, json.loads(text)["error"]["type"]) == (status, kind)


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_refuses_and_clients_that_go_free_it(served: Served, stream: bool) -> None:
    served.wait_until_unfinished(0)
    connections, unfinished = [], 0
    for n in (MAX_SLOTS, MAX_WAITING):
        connection = http.client.HTTPConnection(*served.address, timeout=60)
        body = {"prompt": "The war", "n": n, "max_tokens": ENDLESS, "stream": stream}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        connections.append(connection)
        served.wait_until_unfinished(unfinished := unfinished + n)
    with served.client as client, pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model=NAME, prompt="One nation")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    metrics = samples(served)
    assert (metrics["gpt2_texts_running"], metrics["gpt2_texts_waiting"]) == (MAX_SLOTS, MAX_WAITING)
    assert served.ask("GET", "/health")[0] == 200
    for connection, left in ((connections[1], MAX_SLOTS), (connections[0], 0)):  # those that wait go at once, too
        connection.close()
        served.wait_until_unfinished(left)
    assert served.write()["usage"]["completion_tokens"] == 16


def samples(served: Served) -> dict[str, float]:
    """The values of /metrics, by name and status."""
    families = text_string_to_metric_families(served.ask("GET", "/metrics")[1])
    return {one.name + one.labels.get("status", ""): one.value for family in families for one in family.samples}


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    served.wait_until_unfinished(0)
    before = samples(served)
    served.write(n=2, max_tokens=5)
    served.ask("POST", "/v1/completions", {})
    after = samples(served)
    names = (
        "gpt2_requests_total200",
        "gpt2_requests_total400",
        "gpt2_prompt_tokens_total",
        "gpt2_completion_tokens_total",
    )
    assert [after[name] - before.get(name, 0) for name in names] == [1, 1, 2, 10]
    assert after["gpt2_completion_seconds_count"] == before["gpt2_completion_seconds_count"] + 1


def test_many_clients_at_once_get_each_their_own(served: Served) -> None:
    def ask(seed: int) -> str:
        if seed % 2:
            return served.write(seed=seed, max_tokens=12)["choices"][0]["text"]
        with served.client as client:
            parts = client.completions.create(model=NAME, prompt="The war", seed=seed, max_tokens=12, stream=True)
            return "".join(part.choices[0].text for part in parts)

    alone = [ask(seed) for seed in range(2 * MAX_WAITING + MAX_SLOTS)]
    with ThreadPoolExecutor(MAX_WAITING + MAX_SLOTS) as threads:
        assert list(threads.map(ask, range(len(alone)))) == alone


def test_a_text_that_breaks_is_told_and_the_next_is_tried_anew(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Request, logits: object) -> str:
        raise RuntimeError("broken on purpose")

    with monkeypatch.context() as patch, served.client as client:
        patch.setattr(Request, "add_token", fail)
        with pytest.raises(openai.InternalServerError, match="internal error"):
            client.completions.create(model=NAME, prompt="The war")
        with pytest.raises(openai.APIError, match="internal error"):
            list(client.completions.create(model=NAME, prompt="The war", stream=True))
    assert served.write()["choices"][0]["text"]


def test_while_it_stops_texts_end_and_new_ones_are_refused(served: Served) -> None:
    with served.client as client:
        text = client.completions.create(model=NAME, prompt="The war", seed=1, max_tokens=200, stream=True)
        parts = [next(text).choices[0].text]
        served.app.state.draining = True
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model=NAME, prompt="One nation")
        assert refused.value.status_code == 503 and served.ask("GET", "/health")[0] == 503
        parts += [part.choices[0].text for part in text]
    served.app.state.draining = False
    assert "".join(parts) == served.write(max_tokens=200)["choices"][0]["text"]


def test_the_page_has_the_colours_of_the_report_and_loads_nothing(served: Served) -> None:
    status, page = served.ask("GET", "/")
    assert status == 200 and page == PAGE.read_text(encoding="utf-8") and not re.search(r"https?:|//\w", page)
    rules = re.findall(r"^\.s\d .*|--mark: .*", STYLE, re.MULTILINE)
    assert len(rules) == 6 and all(rule in page for rule in rules)
    assert str([least for least, _ in LEVELS]).replace("0.0]", "0]") in page
    assert all(f">{about}</span>" in page for _, about in LEVELS)
