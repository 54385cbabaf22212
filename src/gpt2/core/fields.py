"""What a single setting may be: types with their checks, and what all sections of settings share."""

import re
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MOST = 2**31  # all counts are below it
MOST_SIZE = 2**20  # of a matrix or a batch
MOST_THREADS = 1024


def _source(name: str) -> str:
    parts = Path(name.removeprefix("hf:")).parts
    is_dataset = re.fullmatch(r"hf:(?!data/)\w[\w.-]*(/\w[\w.-]*)?(:[^:@]+)?(@[\w./-]+)?", name)
    if name != "sotu" and not is_dataset and (parts[:2] != ("data", "raw") or ".." in parts):
        raise ValueError("should be sotu, hf:owner/dataset, or lie below data/raw, where DVC sees changes")
    if any("**" in part and part != "**" for part in parts):  # another glob in each version of Python
        raise ValueError("should have ** only as the whole name of a folder")
    return name


def _init_from(name: str) -> str:
    parts = Path(name).parts
    is_file = parts[:2] == ("data", "pretrained") and len(parts) > 2 and ".." not in parts
    if not is_file and not re.fullmatch(r"(models:/|runs:/).+|hf:[\w.-]+(/[\w.-]+)?(@[0-9a-f]{40})?", name):
        raise ValueError("should be null, like models:/gpt2/2, runs:/ID/model or hf:NAME, or lie below data/pretrained")
    return name


def _encoding(name: str) -> str:
    try:
        "a".encode(name)
    except (LookupError, ValueError):
        raise ValueError("should be a text encoding that Python knows, such as utf-8 or latin-1") from None
    return name


def _glob(pattern: str) -> str:
    try:
        PurePath().match(pattern)
    except ValueError:
        raise ValueError("should be a glob, such as *.py") from None
    return pattern


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("should be auto, cpu, mps, cuda or cuda:N")
    return name


def _auto_or_int(most: int) -> BeforeValidator:
    """A union of pydantic's would report the same value twice."""

    def check(value: Any) -> Any:
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if value != "auto" and not (is_int and 0 < value <= most):
            raise ValueError(f"should be auto or an integer from 1 to {most}")
        return value

    return BeforeValidator(check)


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
Text = Annotated[str, Field(min_length=1)]
Glob = Annotated[str, AfterValidator(_glob)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Source = Annotated[str, AfterValidator(_source)]
InitFrom = Annotated[str, AfterValidator(_init_from)]
Encoding = Annotated[str, AfterValidator(_encoding)]
Prompt = Annotated[str, AfterValidator(_prompt)]
Alias = Annotated[str, AfterValidator(_alias)]
Number = Annotated[Any, BeforeValidator(_number)]
AutoOrSize = Annotated[Literal["auto"] | int, _auto_or_int(MOST_SIZE)]
Threads = Annotated[Literal["auto"] | int, _auto_or_int(MOST_THREADS)]


class Section(BaseModel):
    """What all sections share: no unknown keys, no silent conversions, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
