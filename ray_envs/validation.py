"""What all models share, and how plain data becomes a model, or raises one clear error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ray_envs.errors import InvalidInput


class Model(BaseModel):
    """Frozen data that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], data: Mapping[str, Any], *, where: str) -> ModelT:
    """Return `data` as a `model`.

    The error tells one fault. An unknown key comes first: for a misspelt key it says more than
    "is missing".

    Args:
        model: the model to build.
        data: plain data, from a file or a caller.
        where: the file or call that the data comes from, for the message.

    Raises:
        InvalidInput: a key is unknown (the hint names the nearest one), or a value is wrong.
        InvalidId: an id is not allowed.
    """
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        errors = exc.errors()
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        path = _dotted(first["loc"])
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            known = _keys_at(model, first["loc"][:-1])
            raise InvalidInput(
                f"unknown key {path!r}", where=where, hint=nearest_hint(name, known)
            ) from None
        if first["type"] == "missing":
            raise InvalidInput(f"{path} is missing", where=where) from None
        message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
        raise InvalidInput(f"{path}: {message}" if path else message, where=where) from None


def _dotted(loc: Iterable[int | str]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _keys_at(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Return the keys of the model at `loc` inside `model`."""
    for part in loc:
        if isinstance(part, int):
            continue
        if (field := model.model_fields.get(part)) is None:  # a key of a mapping
            continue
        annotation = field.annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        classes = (c for c in candidates if isinstance(c, type) and not hasattr(c, "__origin__"))
        model = next((c for c in classes if issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known word nearest to `name`, or with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known keys: " + ", ".join(known)
