"""What all models share, and how plain data becomes a model, or raises one clear error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ray_envs.errors import InvalidInput

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # it has no public name


class _Checked(ModelMetaclass):
    """Makes a direct construction raise our errors; what is nested in it is validated as always."""

    def __call__(cls, *args: Any, **data: Any) -> Any:
        if args:
            raise InvalidInput(
                f"{args[0]!r:.100} is given without a name",
                where=cls.__name__,
                hint="write each field with its name, as in EnvSpec(packages=[…])",
            )
        try:
            return super().__call__(**data)
        except ValidationError as exc:
            raise _as_error(cls, exc, where=cls.__name__) from None


class Model(BaseModel, metaclass=_Checked):
    """Frozen data that refuses unknown keys.

    A construction raises `InvalidInput`, which names the class and the field. `model_validate` and
    `model_validate_json` raise pydantic's own error: `validated` turns it into ours.
    """

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
        raise _as_error(model, exc, where=where) from None


def check_is(value: object, kind: Any, *, where: str, hint: str) -> None:
    """Raise `InvalidInput` if an argument is no `kind`; `where` names it, as in "spec of create()".

    For arguments that no model holds, of programs that no type checker has seen.
    """
    if not isinstance(value, kind):
        raise InvalidInput(f"{value!r:.100} cannot be used here", where=where, hint=hint)


def _as_error(model: Any, exc: ValidationError, *, where: str) -> InvalidInput:
    errors = exc.errors()
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    path = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        known = _keys_at(model, first["loc"][:-1])
        return InvalidInput(f"unknown key {path!r}", where=where, hint=nearest_hint(name, known))
    if first["type"] == "missing":
        return InvalidInput(f"{path} is missing", where=where)
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return InvalidInput(f"{path}: {message}" if path else message, where=where)


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
    if not known:
        return "there are no keys here"
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "known keys: " + ", ".join(known)
