"""The model as MLflow serves it: MLflow runs this file when it loads a registered model."""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from gpt2 import tokenizer
from gpt2.cli import UserError
from gpt2.config import check
from gpt2.sampling import GenerationSettings, generate
from gpt2.weights import load_model


class TextGenerator(PythonModel):
    """Continues prompts. Parameters and their defaults stand in the model's signature; top_k 0 means all tokens."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights once, verified."""
        self.model, _ = load_model(Path(context.artifacts["model"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return the text that follows each prompt, one row each. Raises MlflowException for what cannot be used."""
        given = params or {}
        try:
            settings = check(GenerationSettings, {"seed": 0, **given, "top_k": given.get("top_k") or None}, "params")
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        if not all(model_input["prompt"]):
            raise MlflowException.invalid_parameter_value("a prompt is empty")
        texts = []
        for prompt in model_input["prompt"]:
            tokens = generate(self.model, tokenizer.encode(prompt), settings.max_tokens, settings, settings.seed or 0)
            texts.append("".join(tokenizer.decode_stream(tokens)))
        return pd.DataFrame({"text": texts})


set_model(TextGenerator())
