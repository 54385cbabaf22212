"""Settings of any kind checked against a pydantic model: all that is wrong with them in one line."""

import difflib
import re
import reprlib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from gpt2.core.errors import UserError

AnyModel = TypeVar("AnyModel", bound=BaseModel)


def check(model: type[AnyModel], raw: Any, where: str) -> AnyModel:
    """Validate raw against model. Raises UserError that lists every problem, with the nearest known name."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [_describe(model, problem) for problem in error.errors(include_url=False)]
        raise UserError(f"{where}: {'; '.join(problems)}") from None


def _describe(model: type[BaseModel], problem: Any) -> str:
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(re.sub(r"\.\d+", "", location), _known_names(model), n=1, cutoff=0.5)
        return f"{location} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
    if problem["type"] == "missing":
        return f"{location} is missing"
    message = re.sub(r"\b(Input|String|List|Dictionary) should", "should", problem["msg"]).removeprefix("Value error, ")
    if isinstance(problem["input"], dict) and problem["type"] == "value_error":  # a conflict between values
        return f"{location}: {message}".removeprefix(": ")
    try:
        shown = reprlib.repr(problem["input"])  # bounded: YAML's aliases can make a short file a huge value
    except ValueError:
        shown = "a huge number"
    return f"{location} {message} ({shown:.40})".strip()


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
