"""The model as MLflow serves it: loaded from its folder, continuing prompts."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from gpt2.core.errors import UserError
from gpt2.core.validation import check
from gpt2.data.tokenizer import load_tokenizer
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.generation.shared_engine import SharedEngine
from gpt2.model.weights import load_model

NULLS = {"top_k": 0, "top_p": 0.0, "min_p": 0.0, "stop": ""}  # which stand for none, as a schema has no null
# MLflow's server then answers that the request took too long, but does not stop the work.
REQUEST_SECONDS = float(os.environ.get("MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT", threading.TIMEOUT_MAX))
FIELDS = scoring_server.SUPPORTED_FORMATS | {"params"}
split_data_and_params = scoring_server._split_data_and_params


class TextGenerator(PythonModel):
    """Continues prompts. The parameters and their defaults stand in the model's signature.

    Its predictions raise MlflowException, which a server answers with status 400, for what cannot be used.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights once, verified."""
        folder = Path(context.artifacts["model"])
        model, config, seen = load_model(folder)
        self.tokenizer = load_tokenizer(folder, config.vocab_size)
        self.engine = SharedEngine(Engine(model, MAX_SLOTS, seen))
        logger = logging.getLogger("mlflow.models.utils")
        logger.setLevel(logging.WARNING)
        logger.addFilter(refuse_unknown_names)
        scoring_server._split_data_and_params = refuse_unknown_fields

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return the text that follows each prompt, one row each."""
        rows = (row if isinstance(row, list) else [row] for row in model_input["prompt"])
        requests = self._requests([prompt for row in rows for prompt in row], params)
        try:
            return pd.DataFrame({"text": ["".join(parts) for parts in self.engine.submit(requests, REQUEST_SECONDS)]})
        finally:
            for request in requests:  # those that wait behind one that failed
                request.cancelled = True

    def predict_stream(
        self, context: PythonModelContext, model_input: dict[str, str], params: dict[str, Any] | None = None
    ) -> Iterator[str]:
        """Yield the text that follows one prompt, {"prompt": ...}, part by part as it is generated."""
        [parts] = self.engine.submit(self._requests([model_input["prompt"]], params), REQUEST_SECONDS)
        yield from parts

    def _requests(self, prompts: list[str], params: dict[str, Any] | None) -> list[Request]:
        given = {name: (value or None) if name in NULLS else value for name, value in (params or {}).items()}
        try:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise UserError("a prompt is no text")
            settings = check(GenerationSettings, {"seed": 0, **given}, "params")
            return [Request(prompt, settings, self.tokenizer) for prompt in prompts]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None


def refuse_unknown_names(record: logging.LogRecord) -> bool:
    """Raise MlflowException where MLflow would only warn of inputs or params that the signature does not have."""
    message = record.getMessage()
    if "Unrecognized params" in message and all(f"'{name}'" in message for name in GenerationSettings.model_fields):
        told = message.replace(" are ignored for inference", "").partition(" To enable them")[0]
        raise MlflowException.invalid_parameter_value(told)
    if "Found extra inputs" in message and _expected_inputs() == ["prompt"]:
        extra, known = message.split("`")[1], list(GenerationSettings.model_fields)
        raise MlflowException.invalid_parameter_value(f"Found unknown inputs {extra} beside prompt; params are {known}")
    return True


def _expected_inputs() -> list[str]:
    """Return the inputs that MLflow is looking for, of whatever model: its warning does not tell."""
    frame = sys._getframe()
    while "input_schema" not in frame.f_locals and frame.f_back:
        frame = frame.f_back
    schema = frame.f_locals.get("input_schema")
    return schema.input_names() if schema else []


def refuse_unknown_fields(body: str | dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Raise MlflowException where MLflow's server would drop a field of a request, or take null for the text "None"."""
    fields = scoring_server._decode_json_input(body)
    if unknown := sorted(fields.keys() - FIELDS):
        raise MlflowException.invalid_parameter_value(f"Found unknown fields {unknown} beside {sorted(FIELDS)}")
    if _has_null([value for name, value in fields.items() if name in scoring_server.SUPPORTED_FORMATS]):
        raise MlflowException.invalid_parameter_value("a prompt is no text, but null")
    return split_data_and_params(body)


def _has_null(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return value is None or any(map(_has_null, inner))
