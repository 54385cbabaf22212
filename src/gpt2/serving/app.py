"""The model over HTTP: OpenAI's completions, whole or streamed, and a page to try them."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from gpt2.core.errors import UserError
from gpt2.core.fields import Section
from gpt2.data.tokenizer import Tokenizer
from gpt2.generation.engine import MAX_SLOTS
from gpt2.generation.shared_engine import Part, SharedEngine
from gpt2.serving.completions import Choice, Completion, read_completion

MAX_BODY_BYTES = 2**20
MAX_MESSAGE = 500  # characters
CLIENT_GONE = 499  # nginx's status, which nobody reads
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PAGE = Path(__file__).with_name("page.html")

Parts = AsyncGenerator[dict[int, tuple[str, bool]]]  # of texts, by index: what has grown, and whether it has ended

logger = logging.getLogger(__name__)


class Limits(Section):
    """What one server takes on: the tokens of a text, and the texts that wait for others to end."""

    max_tokens: int
    max_waiting: int


class Metrics:
    """What /metrics tells Prometheus."""

    def __init__(self, engine: SharedEngine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gpt2_requests", "Completions and all refusals, by status", ["status"], registry=self.registry
        )
        self.prompt_tokens = Counter("gpt2_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.completion_tokens = Counter("gpt2_completion_tokens", "Tokens written", registry=self.registry)
        self.seconds = Histogram(
            "gpt2_completion_seconds",
            "Time from a request to the end of its texts",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_seconds = Histogram(
            "gpt2_first_part_seconds", "Time to the first part of a stream", buckets=SECONDS, registry=self.registry
        )
        running = Gauge("gpt2_texts_running", "Texts that grow", registry=self.registry)
        running.set_function(lambda: min(engine.unfinished, MAX_SLOTS))
        waiting = Gauge("gpt2_texts_waiting", "Texts that wait for others to end", registry=self.registry)
        waiting.set_function(lambda: max(engine.unfinished - MAX_SLOTS, 0))


def make_app(
    engine: SharedEngine, tokenizer: Tokenizer, max_len: int, name: str, limits: Limits, api_key: str | None
) -> FastAPI:
    """Return the server's application. While its `state.draining` is true, new requests get status 503."""
    app = FastAPI(openapi_url=None)  # its pages would load scripts from the web
    app.state.draining = False
    metrics = Metrics(engine)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "gpt2"}

    def check_name(asked: str) -> None:
        if asked != name:
            raise HTTPException(404, f"there is no model {asked}; this server has {name}")

    def refuse(status: int, message: str, headers: Any = None) -> Response:
        metrics.requests.labels(status).inc()
        return as_json(error_body(status, message), status, headers)

    @app.exception_handler(AnyHTTPException)
    async def refuse_http(_: Request, error: AnyHTTPException) -> Response:
        return refuse(error.status_code, error.detail, error.headers)

    @app.exception_handler(UserError)
    async def refuse_mistake(_: Request, error: UserError) -> Response:
        return refuse(400, str(error))

    @app.exception_handler(ClientDisconnect)
    async def forget(_: Request, __: ClientDisconnect) -> Response:
        return refuse(CLIENT_GONE, "the client is gone")

    @app.exception_handler(Exception)
    async def apologize(_: Request, __: Exception) -> Response:
        return refuse(500, "internal error")

    async def authorize(request: Request) -> None:
        if not api_key:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), api_key.encode()):
            raise HTTPException(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    @app.api_route("/", methods=["GET", "HEAD"])
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.api_route("/health", methods=["GET", "HEAD"])
    def health() -> Response:
        return as_json({"status": "stopping"}, 503) if app.state.draining else as_json({"status": "ok"})

    @app.get("/metrics")
    def tell_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", dependencies=[Depends(authorize)])
    def models() -> Response:
        return as_json({"object": "list", "data": [model]})

    @app.get("/v1/models/{asked:path}", dependencies=[Depends(authorize)])
    def model_named(asked: str) -> Response:
        check_name(asked)
        return as_json(model)

    @app.post("/v1/completions", dependencies=[Depends(authorize)])
    async def complete(request: Request) -> Response:
        began = time.monotonic()
        body = await read_body(request)
        asked, choices = await asyncio.to_thread(read_choices, body, limits.max_tokens, tokenizer, max_len)
        check_name(name if asked.model is None else asked.model)
        if app.state.draining:
            raise HTTPException(503, "the server is stopping", {"Retry-After": "10"})
        room = MAX_SLOTS + limits.max_waiting
        if len(choices) > room:
            raise UserError(f"request: {len(choices)} texts are more than the {room} that this server takes")
        if engine.unfinished + len(choices) > room:
            raise HTTPException(429, "too many texts are waiting; try again later", {"Retry-After": "1"})
        parts = follow(engine, choices, asked.stream, metrics, began)
        await anext(parts)  # begins the texts; and then a generator that is dropped ends them
        now = int(time.time())
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": now, "model": name}
        if asked.stream:
            events = tell_events(head, asked, choices, parts)
            answer: Response = StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        else:
            answer = await unless_gone(request, tell_whole(head, choices, parts))
        metrics.requests.labels(200).inc()
        return answer

    return app


async def read_body(request: Request) -> bytes:
    """Return a request's body. Raises HTTPException if it is too long, or not said to be JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the Content-Type should be application/json")  # no other site's form can send that
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def read_choices(body: bytes, max_tokens: int, tokenizer: Tokenizer, max_len: int) -> tuple[Completion, list[Choice]]:
    """Return what is asked for, and its texts, not yet begun. Raises UserError for what cannot be used."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        raise UserError("the body is not JSON") from None
    asked = read_completion(raw, max_tokens)
    return asked, [Choice(index, asked, tokenizer, max_len) for index in range(len(asked.prompt) * asked.n)]


async def follow(engine: SharedEngine, choices: list[Choice], each_part: bool, metrics: Metrics, began: float) -> Parts:
    """Begin the texts of choices and yield nothing; then those that have grown.

    Without `each_part` only when one has ended. Texts that are no longer followed are cancelled. Raises HTTPException
    if generation fails.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    inbox: deque[tuple[int, Part]] = deque()

    def receive(index: int, part: Part) -> None:  # on the engine's thread
        inbox.append((index, part))
        if each_part or not isinstance(part, str):
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(arrived.set)

    engine.start({choice.request: partial(receive, index) for index, choice in enumerate(choices)})
    running, is_first = len(choices), each_part
    try:
        yield {}
        while running:
            await arrived.wait()
            arrived.clear()
            grown: dict[int, tuple[str, bool]] = {}
            while inbox:
                index, part = inbox.popleft()
                if isinstance(part, HTTPException):
                    raise part
                if isinstance(part, Exception):
                    is_known = isinstance(part, UserError)
                    logger.error("a text failed: %s", part, exc_info=None if is_known else part)
                    raise HTTPException(500, str(part) if is_known else "internal error")
                running -= part is None
                grown[index] = (grown.get(index, ("", False))[0] + (part or ""), part is None)
            if is_first:
                metrics.first_seconds.observe(time.monotonic() - began)
                is_first = False
            yield grown
        metrics.seconds.observe(time.monotonic() - began)
    finally:
        for choice in choices:
            choice.request.cancelled = True
        counted = usage(choices)
        metrics.prompt_tokens.inc(counted["prompt_tokens"])
        metrics.completion_tokens.inc(counted["completion_tokens"])


async def tell_whole(head: dict[str, Any], choices: list[Choice], parts: Parts) -> Response:
    """Return a response with all texts."""
    texts = [""] * len(choices)
    async with aclosing(parts):
        async for grown in parts:
            for index, (text, _) in grown.items():
                texts[index] += text
    told = [choice.tell(text, ended=True) for choice, text in zip(choices, texts, strict=True)]
    return as_json(head | {"choices": told, "usage": usage(choices)})


async def tell_events(
    head: dict[str, Any], asked: Completion, choices: list[Choice], parts: Parts
) -> AsyncGenerator[str]:
    """Yield a response's server-sent events, as the texts grow."""
    try:
        async with aclosing(parts):
            async for grown in parts:
                told = [choices[index].tell(text, ended) for index, (text, ended) in grown.items()]
                shown = [choice for choice in told if choice["text"] or choice["finish_reason"]]
                yield "".join(event(head | {"choices": [choice]}) for choice in shown)
        if asked.stream_options.include_usage:
            yield event(head | {"choices": [], "usage": usage(choices)})
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield event(error_body(error.status_code, error.detail))


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return a response, or end its work when the client is gone. Raises ClientDisconnect then."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


def usage(choices: list[Choice]) -> dict[str, int]:
    """Count tokens; a prompt counts once, however many texts follow it."""
    prompts = sum(choice.prompt_tokens for choice in choices if choice.is_first)
    written = sum(choice.completion_tokens for choice in choices)
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return an error as OpenAI tells it, its message in one line."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    line = " ".join(str(message).split())[:MAX_MESSAGE]
    return {"error": {"message": line, "type": kind, "param": None, "code": None}}


def as_json(body: Any, status: int = 200, headers: Any = None) -> Response:
    """Return a response in ASCII, which holds any text, also half of a surrogate pair that a client has sent."""
    return Response(json.dumps(body), status, headers, "application/json")


def event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"
