"""One engine for the threads, or the event loop, of a server."""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from queue import SimpleQueue

from gpt2.generation.engine import Engine, Request

Part = str | Exception | None  # a text's parts; then None, or what went wrong
Receiver = Callable[[Part], object]


class SharedEngine:
    """Lets many threads generate with one model: their texts grow side by side, those that came first first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Request] = deque()
        self._receivers: dict[Request, Receiver] = {}
        self._is_running = False  # a thread; it ends when no request is left, and then the model may be freed
        self._lock = threading.Lock()  # whatever waits has a receiver, and a thread that generates

    @property
    def unfinished(self) -> int:
        """The texts that grow or wait."""
        return len(self._receivers)

    def start(self, receivers: dict[Request, Receiver]) -> None:
        """Begin the texts of requests. Each is told to its receiver, which the engine's thread calls."""
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._run, daemon=True).start()
                self._is_running = True
            self._receivers.update(receivers)
            self._waiting.extend(receivers)

    def cancel_all(self, reason: Exception) -> None:
        """End all texts, and tell their receivers why."""
        for request, receive in list(self._receivers.items()):
            request.cancelled = True
            receive(reason)

    def submit(self, requests: list[Request], seconds: float = threading.TIMEOUT_MAX) -> list[Generator[str]]:
        """Return each request's text, part by part.

        Reading raises what went wrong in generation, and queue.Empty if the text has not ended after `seconds`. A text
        that is no longer read is cancelled.
        """
        parts: list[SimpleQueue[Part]] = [SimpleQueue() for _ in requests]
        self.start({request: queue.put for request, queue in zip(requests, parts, strict=True)})
        deadline = time.monotonic() + seconds
        texts = [self._read(request, queue, deadline) for request, queue in zip(requests, parts, strict=True)]
        for text in texts:
            next(text)  # only a generator that has begun learns that nobody reads it
        return texts

    @staticmethod
    def _read(request: Request, parts: SimpleQueue[Part], deadline: float) -> Generator[str]:
        try:
            yield ""
            while (part := parts.get(timeout=max(0, deadline - time.monotonic()))) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            request.cancelled = True

    def _run(self) -> None:
        while True:
            try:
                for request, part in self._engine.generate(self._waiting):
                    receive = self._receivers[request]
                    receive(part)
                    if request.finished:
                        del self._receivers[request]
                        receive(None)
            except Exception as error:  # every receiver learns of it, and the next requests are tried anew
                with self._lock:
                    self._waiting.clear()
                    while self._receivers:
                        self._receivers.popitem()[1](error)
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
