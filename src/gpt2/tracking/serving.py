"""The model as MLflow serves it: loaded from its folder, continuing prompts."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from gpt2.config import check
from gpt2.core.errors import UserError
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.model.weights import load_model

NONE_IF_FALSE = ("top_k", "top_p", "min_p", "stop")  # a schema knows no null; 0 and "" stand for it
# MLflow's server then answers that the request took too long, but does not stop the work.
REQUEST_SECONDS = float(os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", threading.TIMEOUT_MAX))


class SharedEngine:
    """Lets many threads generate with one model: their texts grow side by side, those that came first first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Request] = deque()
        self._readers: dict[Request, SimpleQueue[str | Exception | None]] = {}
        self._is_running = False  # a thread; it ends when no request is left, and then the model may be freed
        self._lock = threading.Lock()  # whatever waits has a reader, and a thread that generates

    def submit(self, requests: list[Request]) -> list[Generator[str]]:
        """Return each request's text, part by part.

        Reading raises what went wrong in generation, and queue.Empty if the text has not ended after REQUEST_SECONDS. A
        text that is no longer read is cancelled.
        """
        readers: list[SimpleQueue[str | Exception | None]] = [SimpleQueue() for _ in requests]
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._run, daemon=True).start()
                self._is_running = True
            self._readers.update(zip(requests, readers, strict=True))
            self._waiting.extend(requests)
        deadline = time.monotonic() + REQUEST_SECONDS
        return [self._read(request, reader, deadline) for request, reader in zip(requests, readers, strict=True)]

    @staticmethod
    def _read(request: Request, reader: "SimpleQueue[str | Exception | None]", deadline: float) -> Generator[str]:
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


class TextGenerator(PythonModel):
    """Continues prompts. The parameters and their defaults stand in the model's signature.

    Its predictions raise MlflowException, which a server answers with status 400, for what cannot be used.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights once, verified."""
        model, _, seen = load_model(Path(context.artifacts["model"]))
        self.engine = SharedEngine(Engine(model, MAX_SLOTS, seen))
        logger = logging.getLogger("mlflow.models.utils")
        logger.setLevel(logging.WARNING)
        logger.addFilter(refuse_unknown_params)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return the text that follows each prompt, one row each."""
        requests = self._requests(list(model_input["prompt"]), params)
        try:
            return pd.DataFrame({"text": ["".join(parts) for parts in self.engine.submit(requests)]})
        finally:
            for request in requests:  # those that wait behind one that failed
                request.cancelled = True

    def predict_stream(
        self, context: PythonModelContext, model_input: dict[str, str], params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Yield the text that follows one prompt, {"prompt": ...}, part by part as it is generated."""
        [parts] = self.engine.submit(self._requests([model_input["prompt"]], params))
        yield from parts

    def _requests(self, prompts: list[str], params: dict[str, Any] | None) -> list[Request]:
        given = {name: (value or None) if name in NONE_IF_FALSE else value for name, value in (params or {}).items()}
        try:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError("a prompt is no text")
            settings = check(GenerationSettings, {"seed": 0, **given}, "params")
            return [Request(prompt, settings) for prompt in prompts]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def refuse_unknown_params(record: logging.LogRecord) -> bool:
    """Raise MlflowException where MLflow would only warn of params that the signature does not have."""
    message = record.getMessage()
    if "Unrecognized params" in message and all(f"'{name}'" in message for name in GenerationSettings.model_fields):
        told = message.replace(" are ignored for inference", "").partition(" To enable them")[0]
        raise MlflowException.invalid_parameter_value(told)
    return True
