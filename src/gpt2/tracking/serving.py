"""The model as MLflow serves it: MLflow runs this file when it loads a registered model."""

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
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from gpt2.config import check
from gpt2.core.errors import UserError
from gpt2.generation.engine import MAX_ROWS, GenerationSettings, Text, Writer
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model

NONE_IF_FALSE = ("top_k", "top_p", "min_p", "stop")  # a schema knows no null; 0 and "" stand for it
# MLflow's server then answers that the request took too long, but does not stop the work.
REQUEST_SECONDS = float(os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", threading.TIMEOUT_MAX))


class SharedWriter:
    """Lets many threads write with one model: it writes their texts together, first come, first served."""

    def __init__(self, model: GPT2Model) -> None:
        self._writer = Writer(model, MAX_ROWS)
        self._waiting: deque[Text] = deque()
        self._readers: dict[Text, SimpleQueue[str | Exception | None]] = {}
        self._writes = False  # whether a thread runs; it ends when no text is left, so that the model can be freed
        self._lock = threading.Lock()  # each waiting text has a reader, and a thread that writes

    def submit(self, texts: list[Text]) -> list[Generator[str]]:
        """Return for each text an iterator over the parts that continue it.

        It raises what went wrong in writing, and queue.Empty if the text has not ended after REQUEST_SECONDS. A text
        whose iterator is closed is no longer written.
        """
        readers: list[SimpleQueue[str | Exception | None]] = [SimpleQueue() for _ in texts]
        with self._lock:
            if not self._writes:
                threading.Thread(target=self._write, daemon=True).start()
                self._writes = True
            self._readers.update(zip(texts, readers, strict=True))
            self._waiting.extend(texts)
        deadline = time.monotonic() + REQUEST_SECONDS
        return [self._read(text, reader, deadline) for text, reader in zip(texts, readers, strict=True)]

    @staticmethod
    def _read(text: Text, reader: "SimpleQueue[str | Exception | None]", deadline: float) -> Generator[str]:
        try:
            while (part := reader.get(timeout=max(0, deadline - time.monotonic()))) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            text.abandoned = True

    def _write(self) -> None:
        while True:
            try:
                for text, part in self._writer.write(self._waiting):
                    reader = self._readers[text]
                    reader.put(part)
                    if text.ended:
                        del self._readers[text]
                        reader.put(None)
            except Exception as error:  # every reader gets it; later texts are tried again
                with self._lock:
                    self._waiting.clear()
                    while self._readers:
                        self._readers.popitem()[1].put(error)
            with self._lock:
                if not self._waiting:
                    self._writes = False
                    return


class TextGenerator(PythonModel):
    """Continues prompts. The parameters and their defaults are in the model's signature.

    Raises MlflowException for a bad prompt or parameter; a server answers that with status 400.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights once, verified."""
        model, _ = load_model(Path(context.artifacts["model"]))
        self.writer = SharedWriter(model)
        logger = logging.getLogger("mlflow.models.utils")
        logger.setLevel(logging.WARNING)
        logger.addFilter(refuse_unknown_params)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return the text that follows each prompt, one row each."""
        texts = self._texts(list(model_input["prompt"]), params)
        try:
            return pd.DataFrame({"text": ["".join(parts) for parts in self.writer.submit(texts)]})
        finally:
            for text in texts:  # some may wait behind one that failed
                text.abandoned = True

    def predict_stream(
        self, context: PythonModelContext, model_input: dict[str, str], params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Yield the text that follows one prompt, {"prompt": ...}, part by part as it is written."""
        [parts] = self.writer.submit(self._texts([model_input["prompt"]], params))
        yield from parts

    def _texts(self, prompts: list[str], params: dict[str, Any] | None) -> list[Text]:
        given = {name: (value or None) if name in NONE_IF_FALSE else value for name, value in (params or {}).items()}
        try:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError("a prompt is no text")
            settings = check(GenerationSettings, {"seed": 0, **given}, "params")
            return [Text(prompt, settings) for prompt in prompts]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def refuse_unknown_params(record: logging.LogRecord) -> bool:
    """Raise MlflowException where MLflow would only warn of params that the signature does not have."""
    message = record.getMessage()
    if "Unrecognized params" in message and all(f"'{name}'" in message for name in GenerationSettings.model_fields):
        told = message.replace(" are ignored for inference", "").partition(" To enable them")[0]
        raise MlflowException.invalid_parameter_value(told)
    return True


set_model(TextGenerator())
