"""params.yaml as frozen, typed models: what is wrong with it is reported in one line, before any work.

All values that are wrong come first, then those that do not go together.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, model_validator

from gpt2.core.errors import UserError
from gpt2.core.fields import (
    Alias,
    AutoOrSize,
    Count,
    Device,
    Encoding,
    Float,
    Fraction,
    Glob,
    InitFrom,
    Name,
    Natural,
    Number,
    Prompt,
    Section,
    Size,
    Source,
    Text,
    Threads,
)
from gpt2.core.validation import check

OPENAI_SIZES = {  # d_model, n_layers and n_heads, by the names that Hugging Face gives them
    "gpt2": (768, 12, 12),  # 124M parameters
    "gpt2-medium": (1024, 24, 16),  # 355M
    "gpt2-large": (1280, 36, 20),  # 774M
    "gpt2-xl": (1600, 48, 25),  # 1.5B
}


def _preset(value: Any) -> Any:
    """Return the section `model` of one of OpenAI's models, given its name."""
    if not isinstance(value, str):
        return value
    if value not in OPENAI_SIZES:
        raise ValueError(f"should be a section, or one of {', '.join(OPENAI_SIZES)}")
    d_model, n_layers, n_heads = OPENAI_SIZES[value]
    sizes = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model, "max_len": 1024}
    return sizes | {"dropout": 0.1, "tie_weights": True, "qkv_bias": True, "activation": "gelu_tanh"}


class PrepareParams(Section):
    source: Source
    files: Glob | None
    text_column: Text
    separator: Text | None
    encoding: Encoding
    splits: dict[Literal["train", "val", "test"], Glob] | None
    val_fraction: Fraction
    test_fraction: Fraction
    tokenizer: Literal["gpt2", "bpe"]
    vocab_size: Annotated[int, Field(gt=256, le=2**20)] | None  # bytes and <|endoftext|> at least
    max_documents: Count | None
    min_chars: Natural
    deduplicate: bool
    unicode: Literal["NFC", "NFKC"] | None

    @model_validator(mode="after")
    def _leaves_training_text(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on")
        if (self.tokenizer == "bpe") != (self.vocab_size is not None):
            raise ValueError("tokenizer bpe needs a vocab_size, e.g. 4096; that of gpt2 is null")
        return self


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

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        return self


class TrainParams(Section):
    seed: Natural
    max_steps: Count
    batch_size: Size
    micro_batch_size: AutoOrSize
    sequence_length: Size
    initialization: Literal["bigrams", "random"]
    init_from: InitFrom | None
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
    keep: Literal["last", "best"]
    patience: Count | None
    checkpoint_interval: Count
    log_checkpoints: Count | None
    fused: bool
    compile: bool
    launcher: Literal["none", "torchrun"]
    nproc_per_node: Annotated[int, Field(gt=0, le=1024)]
    parallel: Literal["ddp", "fsdp"]
    activation_checkpointing: bool

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.log_checkpoints and self.log_checkpoints % self.eval_interval:
            raise ValueError(
                f"log_checkpoints {self.log_checkpoints} is not a multiple of eval_interval {self.eval_interval}"
            )
        if self.launcher == "none" and self.nproc_per_node > 1:
            raise ValueError(f"nproc_per_node {self.nproc_per_node} needs launcher torchrun")
        if self.launcher == "torchrun" and self.batch_size % self.nproc_per_node:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of nproc_per_node {self.nproc_per_node}")
        if self.parallel == "fsdp" and self.initialization == "bigrams" and not self.init_from:
            raise ValueError("parallel fsdp needs initialization random, since bigrams need the whole model")
        return self


class RuntimeParams(Section):
    """What several stages compute with: see core/device.py."""

    threads: Threads
    device: Device
    precision: Literal["auto", "float32", "bfloat16"]


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
    prompts: Annotated[list[Prompt], Field(min_length=1)]
    settings: Annotated[list[SamplingParams], Field(min_length=1)]
    max_tokens: Count
    seed: Natural


class ReportParams(Section):
    text: Prompt
    heads: Annotated[int, Field(gt=0, le=64)]


class RegisterParams(Section):
    name: Name
    alias: Alias
    promote: Literal["if_better", "always", "never"]


class SearchedParams(Section):
    """The values of one parameter that a sweep tries: a range of numbers, or choices."""

    low: Float | None = None
    high: Float | None = None
    log: bool = False
    choices: Annotated[list[Number], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _is_range_or_choices(self) -> Self:
        if (self.choices is None) != bool(self.model_fields_set - {"choices"}):
            raise ValueError("should have low and high (and log), or choices")
        if self.choices is None and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError("should have a low below its high")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError("should have a low above 0, where log is true")
        return self

    def extremes(self) -> list[Any]:
        """Return the choices, or the ends of the range."""
        return [self.low, self.high] if self.choices is None else self.choices


class SweepParams(Section):
    name: Name
    trials: Count
    seed: Natural
    prune: bool
    space: Annotated[dict[str, SearchedParams], Field(min_length=1)]


class Params(Section):
    prepare: PrepareParams
    model: Annotated[ModelParams, BeforeValidator(_preset)]
    train: TrainParams
    runtime: RuntimeParams
    evaluate: EvaluateParams
    sample: SampleParams
    report: ReportParams
    register_: Annotated[RegisterParams, Field(alias="register")]
    sweep: Annotated[SweepParams, Field(exclude=True)]  # it is of no training and no run

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        lengths = {
            "train.sequence_length": self.train.sequence_length,
            "evaluate.stride": self.evaluate.stride,
        }
        conflicts = [
            f"{name} {length} is more than model.max_len {self.model.max_len}"
            for name, length in lengths.items()
            if length > self.model.max_len
        ]
        if self.train.initialization == "bigrams" and not self.train.init_from:
            if self.model.tie_weights:
                conflicts.append("train.initialization bigrams needs model.tie_weights false")
            if self.model.d_model < 3:
                conflicts.append(f"train.initialization bigrams needs model.d_model 3 or more ({self.model.d_model})")
        if self.train.launcher == "torchrun" and self.runtime.device not in ("auto", "cpu", "cuda"):
            conflicts.append(f"runtime.device {self.runtime.device} is for one process; train.launcher starts several")
        if conflicts:
            raise ValueError("; ".join(conflicts))
        return self


class ModelConfig(ModelParams):
    """A saved model's shape, as in its config.json: the parameters and the tokenizer's vocabulary."""

    vocab_size: Count


def load_params(path: Path) -> Params:
    """Read and check params.yaml. Raises UserError with its problems in one line."""
    return check(Params, _read(path), path.name)


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
