"""Turns plain data into models, with one clear error for people if that fails."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ray_envs.errors import InvalidInput

ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], data: Mapping[str, Any], *, where: str) -> ModelT:
    """`data` as a `model`, or one clear error for one thing that is wrong with it.

    An unknown key comes first: where a required key is misspelt, it says more than "is missing".

    Args:
        model: the model to build.
        data: plain data, as read from a file or given by a caller.
        where: the file or call that the data comes from, for the message.

    Raises:
        InvalidInput: an unknown key (the nearest known one is named), a wrong type, a bad value.
        InvalidId: an id that is not allowed.
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
    """The keys that the model at `loc` inside `model` knows."""
    for part in loc:
        if isinstance(part, int):
            continue
        if (field := model.model_fields.get(part)) is None:  # a key of a table, as of `files`
            continue
        annotation = field.annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        classes = (c for c in candidates if isinstance(c, type) and not hasattr(c, "__origin__"))
        model = next((c for c in classes if issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def nearest_hint(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `name`, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known keys: " + ", ".join(known)
