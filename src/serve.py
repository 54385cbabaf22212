"""Serve a trained GPT-2 over HTTP: OpenAI's completions, and a page to try them."""

import os

from gpt2.core.environment import OPENMP_DEFAULTS

os.environ.update(OPENMP_DEFAULTS | os.environ)

import socket
import sys
import time
from types import FrameType
from typing import Annotated

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import Field

from gpt2.config import champion_uri
from gpt2.core.cli import Parser, run_command
from gpt2.core.errors import UserError
from gpt2.core.fields import MOST, Device, Section, Text
from gpt2.core.paths import PARAMS
from gpt2.core.validation import check
from gpt2.generation.engine import MAX_SLOTS, Engine
from gpt2.generation.linear import Quantization
from gpt2.generation.repl import inform
from gpt2.generation.shared_engine import SharedEngine
from gpt2.serving.app import Limits, make_app
from infer import choose_device_for, load

API_KEY = "GPT2_API_KEY"  # in the environment, as other users see the arguments of a command
LAST_SECONDS = 2  # for what is left to send when all texts have ended, or been ended


class Options(Section, strict=False):
    """What is set for the whole server; texts are those that clients ask for."""

    host: Text = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=2**16)] = 8000
    max_tokens: Annotated[int, Field(gt=0, lt=MOST)] = 1024
    max_waiting: Annotated[int, Field(ge=0, lt=MOST)] = 256
    grace: Annotated[float, Field(ge=0)] = 30
    device: Device = "auto"
    quantize: Quantization = "none"


class Server(uvicorn.Server):
    """After Ctrl-C or SIGTERM it takes no new texts, and stops when the others have ended; at a second one at once."""

    def __init__(self, app: FastAPI, engine: SharedEngine, grace: float) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_SECONDS))
        self.received = 0
        self._app, self._engine, self._grace = app, engine, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._deadline = 0.0 if self.received else time.monotonic() + self._grace
        self.received, self._app.state.draining = sig, True

    async def on_tick(self, counter: int) -> bool:
        if self.received and (not self._engine.unfinished or time.monotonic() > self._deadline):
            self._engine.cancel_all(HTTPException(503, "the server has stopped"))
            self.should_exit = True
        return await super().on_tick(counter)


def main() -> None:
    defaults = Options()
    parser = Parser(
        description=__doc__, allow_abbrev=False, epilog=f"{API_KEY} in the environment: clients must send it."
    )
    add = parser.add_argument
    add("-m", "--model", help="registry or run URI, path, or hf:NAME (default: params.yaml's champion)")
    add("--host", help=f"address to listen on; 0.0.0.0 is all (default: {defaults.host})")
    add("--port", help=f"0 takes a free one (default: {defaults.port})")
    add("--max_tokens", help=f"tokens of a text at most (default: {defaults.max_tokens})")
    add("--max_waiting", help=f"texts that wait while {MAX_SLOTS} others grow (default: {defaults.max_waiting})")
    add("--grace", help=f"seconds for texts to end after Ctrl-C or SIGTERM (default: {defaults.grace:g})")
    add("--device", help=f"auto, cpu, cuda, cuda:N or mps (default: {defaults.device})")
    add("--quantize", help=f"none, or bfloat16 or int8 for weights that are read faster (default: {defaults.quantize})")
    arguments = parser.parse_args()
    given = {name: text for name in Options.model_fields if (text := getattr(arguments, name)) is not None}
    options = check(Options, given, "settings")
    api_key = os.environ.get(API_KEY)
    if api_key == "":
        raise UserError(f"{API_KEY} is set, but empty")
    with listen(options.host, options.port) as listener:
        name = arguments.model or champion_uri(PARAMS)
        named, tokenizer = load(name, choose_device_for(options.device, options.quantize))
        engine = SharedEngine(Engine(named.model, MAX_SLOTS, named.seen, options.quantize))
        limits = Limits(max_tokens=options.max_tokens, max_waiting=options.max_waiting)
        app = make_app(engine, tokenizer, named.model.max_len, name, limits, api_key)
        host, port = listener.getsockname()[:2]
        inform(f"listens on http://{f'[{host}]' if ':' in host else host}:{port}")
        server = Server(app, engine, options.grace)
        server.run([listener])
    deadline = time.monotonic() + LAST_SECONDS
    while engine.unfinished and time.monotonic() < deadline:  # cancelled texts end with their next token
        time.sleep(0.01)
    if server.received:
        sys.exit(128 + server.received)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raises OSError, ValueError or UserError if it cannot."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except TypeError:  # some names that IDNA does not allow
        raise UserError(f"{host} is not an address") from None


if __name__ == "__main__":
    run_command(main)
