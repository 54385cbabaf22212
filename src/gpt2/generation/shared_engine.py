"""One engine for the threads of a server."""

import threading
import time
from collections import deque
from collections.abc import Generator
from queue import SimpleQueue

from gpt2.generation.engine import Engine, Request

Reader = SimpleQueue[str | Exception | None]  # a text's parts, or what went wrong; then None


class SharedEngine:
    """Lets many threads generate with one model: their texts grow side by side, those that came first first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Request] = deque()
        self._readers: dict[Request, Reader] = {}
        self._is_running = False  # a thread; it ends when no request is left, and then the model may be freed
        self._lock = threading.Lock()  # whatever waits has a reader, and a thread that generates

    def submit(self, requests: list[Request], seconds: float = threading.TIMEOUT_MAX) -> list[Generator[str]]:
        """Return each request's text, part by part.

        Reading raises what went wrong in generation, and queue.Empty if the text has not ended after `seconds`. A text
        that is no longer read is cancelled.
        """
        readers: list[Reader] = [SimpleQueue() for _ in requests]
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._run, daemon=True).start()
                self._is_running = True
            self._readers.update(zip(requests, readers, strict=True))
            self._waiting.extend(requests)
        deadline = time.monotonic() + seconds
        return [self._read(request, reader, deadline) for request, reader in zip(requests, readers, strict=True)]

    @staticmethod
    def _read(request: Request, reader: Reader, deadline: float) -> Generator[str]:
        try:
            while (part := reader.get(timeout=max(0, deadline - time.monotonic()))) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            request.cancelled = True

    def _run(self) -> None:
        while True:
            try:
                for request, part in self._engine.generate(self._waiting):
                    reader = self._readers[request]
                    reader.put(part)
                    if request.finished:
                        del self._readers[request]
                        reader.put(None)
            except Exception as error:  # every reader learns of it, and the next requests are tried anew
                with self._lock:
                    self._waiting.clear()
                    while self._readers:
                        self._readers.popitem()[1].put(error)
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
