"""The model as MLflow loads it, without a registry or a server; the pipeline's tests ask a real server."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models.utils import _enforce_schema
from mlflow.pyfunc import PyFuncModel, scoring_server
from mlflow.types import ColSpec, DataType, Schema

from gpt2.config import ModelConfig
from gpt2.data.tokenizer import VOCAB_SIZE, gpt2_tokenizer, load_tokenizer
from gpt2.generation.engine import MAX_SLOTS, Engine, GenerationSettings, Request
from gpt2.generation.shared_engine import SharedEngine
from gpt2.model.gpt2 import GPT2Model
from gpt2.model.weights import load_model, save_model
from gpt2.tracking import serving
from gpt2.tracking.logged_models import SIGNATURE
from gpt2.tracking.serving import TextGenerator, refuse_unknown_names

PROMPTS = pd.DataFrame({"prompt": ["The war", "One nation"]})


@pytest.fixture(scope="module")
def weights(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., GPT2Model],
    make_config: Callable[..., ModelConfig],
) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_model(make_model(vocab_size=VOCAB_SIZE, random=True), make_config(vocab_size=VOCAB_SIZE), folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> PyFuncModel:
    folder = tmp_path_factory.mktemp("served") / "model"
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(Path(serving.__file__).with_name("model_code.py")),
        artifacts={"model": str(weights)},
        signature=SIGNATURE,
        pip_requirements=[],
    )
    return mlflow.pyfunc.load_model(str(folder))


def texts(served: PyFuncModel, **params: Any) -> list[str]:
    found = served.predict(PROMPTS, params=params)
    assert isinstance(found, pd.DataFrame)
    return list(found["text"])


def by_hand(weights: Path, **settings: Any) -> list[str]:
    model, tokenizer = load_model(weights)[0], load_tokenizer(weights)
    return Engine(model, MAX_SLOTS).generate_all(
        [Request(prompt, GenerationSettings(**settings), tokenizer) for prompt in PROMPTS["prompt"]]
    )


def test_predict_writes_what_the_library_does(served: PyFuncModel, weights: Path) -> None:
    found = texts(served, temperature=1.2, top_k=0, top_p=0.9, min_p=0.0, stop="", max_tokens=9, seed=3)
    assert found == by_hand(weights, temperature=1.2, top_k=None, top_p=0.9, max_tokens=9, seed=3)
    assert texts(served) == by_hand(weights, seed=0)


def test_a_vocabulary_of_its_own_is_served(
    tmp_path: Path, bpe_file: Path, make_model: Callable[..., GPT2Model], make_config: Callable[..., ModelConfig]
) -> None:
    save_model(make_model(vocab_size=300, random=True), make_config(vocab_size=300), tmp_path, tokenizer=bpe_file)
    generator = TextGenerator()
    generator.load_context(SimpleNamespace(artifacts={"model": str(tmp_path)}))  # type: ignore[arg-type]
    found = generator.predict(None, PROMPTS, {"max_tokens": 9, "seed": 3})  # type: ignore[arg-type]
    assert list(found["text"]) == by_hand(tmp_path, max_tokens=9, seed=3)


def test_predict_stream_yields_the_same_in_parts(served: PyFuncModel) -> None:
    parts = list(served.predict_stream({"prompt": "The war"}, params={"max_tokens": 6}))
    assert len(parts) == 6
    assert "".join(map(str, parts)) == texts(served, max_tokens=6)[0]


def test_a_request_that_mlflow_has_given_up_is_not_written_on(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "REQUEST_SECONDS", 0.2)
    model, _, _ = load_model(weights)
    generator = TextGenerator()
    generator.engine = SharedEngine(Engine(model, MAX_SLOTS))
    settings, tokenizer = GenerationSettings(max_tokens=2**31 - 1, seed=1), gpt2_tokenizer()
    endless = [Request("The war", settings, tokenizer) for _ in range(2 * MAX_SLOTS)]
    monkeypatch.setattr(generator, "_requests", lambda *_: endless)
    with pytest.raises(Empty):
        generator.predict(None, PROMPTS)  # type: ignore[arg-type]
    [other] = generator.engine.submit([Request("One nation", GenerationSettings(max_tokens=2, seed=1), tokenizer)])
    assert len(list(other)) == 2
    assert all(text.finished for text in endless)
    assert not any(text.generated for text in endless[MAX_SLOTS:])
    assert not any(text.cached for text in endless[MAX_SLOTS:])  # the model has not even read them


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperatur": 1.0}, "temperatur"),
        ({"temperature": -1.0}, "temperature should be greater than or equal to 0"),
        ({"top_p": 1.5}, "top_p should be less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens should be greater than 0"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"seed": -1}, "seed should be greater than or equal to 0"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty should be greater than or equal to 0.01"),
    ],
)
def test_params_that_cannot_be_used_are_the_clients_error(
    served: PyFuncModel, params: dict[str, Any], words: str
) -> None:
    with pytest.raises(MlflowException, match=words) as caught:
        texts(served, **params)
    assert caught.value.get_http_status_code() == 400


def test_unknown_params_are_refused_whatever_is_logged(served: PyFuncModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "mlflow")
    with pytest.raises(MlflowException, match="temperatur"):
        texts(served, temperatur=1.0)


def test_another_models_unknown_names_are_left_to_mlflow(served: PyFuncModel) -> None:
    message = "Unrecognized params ['a'] are ignored for inference. Supported params are: {'b'}. To enable them, ..."
    assert refuse_unknown_names(logging.makeLogRecord({"msg": message}))
    schema = Schema([ColSpec(DataType.string, "text")])
    assert list(_enforce_schema(pd.DataFrame({"text": ["a"], "more": ["b"]}), schema).columns) == ["text"]


def invoke(served: PyFuncModel, body: Any, content_type: str = "application/json") -> Any:
    """What MLflow's server answers, without its address."""
    data = body if isinstance(body, str) else json.dumps(body)
    return json.loads(scoring_server.invocations(data, content_type, served, SIGNATURE.inputs).response)


SHAPES: list[dict[str, Any]] = [
    {"inputs": ["The war"]},
    {"inputs": [["The war"]]},
    {"inputs": {"prompt": "The war"}},
    {"inputs": {"prompt": ["The war"]}},
    {"inputs": [{"prompt": "The war"}]},
    {"instances": ["The war"]},
    {"instances": [{"prompt": "The war"}]},
    {"dataframe_split": {"columns": ["prompt"], "data": [["The war"]]}},
    {"dataframe_records": [{"prompt": "The war"}]},
]


@pytest.mark.parametrize("inputs", SHAPES, ids=json.dumps)
def test_mlflows_server_takes_each_shape_and_refuses_mistyped_names_in_it(
    served: PyFuncModel, inputs: dict[str, Any]
) -> None:
    params = {"max_tokens": 4}
    [text, _] = texts(served, **params)
    assert invoke(served, inputs | {"params": params}) == {"predictions": [{"text": text}]}
    for mistake, name in (
        ({"params": {"max_token": 4}}, "max_token"),
        ({"param": params}, "param"),
        (params, "max_tokens"),
    ):
        with pytest.raises(MlflowException, match=rf"\['{name}'\]") as caught:
            invoke(served, inputs | mistake)
        assert caught.value.get_http_status_code() == 400


def test_mlflows_server_takes_params_beside_a_prompt_and_csv(served: PyFuncModel) -> None:
    [text, other] = texts(served, max_tokens=4)
    assert invoke(served, {"prompt": "The war", "max_tokens": 4}) == [{"text": text}]
    assert invoke(served, {"prompt": ["The war", "One nation"], "max_tokens": 4}) == [{"text": text}, {"text": other}]
    [default, _] = texts(served)
    assert invoke(served, "prompt\nThe war\n", "text/csv") == {"predictions": [{"text": default}]}


@pytest.mark.parametrize("inputs", [*SHAPES, {"prompt": "The war"}], ids=json.dumps)
def test_null_is_not_the_text_none(served: PyFuncModel, inputs: dict[str, Any]) -> None:
    with pytest.raises(MlflowException, match="a prompt is no text") as caught:
        invoke(served, json.dumps(inputs).replace('"The war"', "null"))
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("Hi", "valid JSON"),
        ('"Hi"', "must be a JSON dictionary"),
        (["Hi"], "must be a JSON dictionary"),
        ({"inputs": "Hi"}, r"missing inputs \['prompt'\]"),
        ({"inputs": {"text": ["Hi"]}}, r"missing inputs \['prompt'\]"),
        ({"inputs": {"prompt": ["Hi"], "max_tokens": [4]}}, r"unknown inputs \['max_tokens'\] beside prompt"),
        ({"dataframe_records": [{"prompt": "Hi", "seed": 1}]}, r"unknown inputs \['seed'\] beside prompt"),
        ({"prompt": "Hi", "max_token": 4}, r"unknown inputs \['max_token'\] beside prompt; .*'max_tokens'"),
        ({"prompt": "Hi", "params": {"max_tokens": 4}}, r"unknown inputs \['params'\] beside prompt"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, r"missing inputs \['prompt'\]"),
    ],
)
def test_what_mlflows_server_does_not_take_has_a_reason(served: PyFuncModel, body: Any, words: str) -> None:
    with pytest.raises(MlflowException, match=words) as caught:
        invoke(served, body)
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(("prompt", "words"), [("", "the prompt is empty"), (None, "a prompt is no text")])
def test_a_prompt_that_is_none_is_the_clients_error(served: PyFuncModel, prompt: str | None, words: str) -> None:
    with pytest.raises(MlflowException, match=words) as caught:
        served.predict(pd.DataFrame({"prompt": ["The war", prompt]}))
    assert caught.value.get_http_status_code() == 400
