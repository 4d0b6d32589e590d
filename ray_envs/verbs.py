"""What the verbs of an actor are called with: checked once, before anything is done.

Callers may be any worker with any data: a wrong type is an error of ours that names the argument,
never a traceback from inside. Types are those of the verb's own signature.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ray_envs.errors import InvalidInput

ClassT = TypeVar("ClassT", bound=type)

#: Seconds, from none to a year.
Seconds = Annotated[float, Field(ge=0, le=366 * 86400, allow_inf_nan=False)]
Hours = Annotated[float, Field(ge=0, le=10**6, allow_inf_nan=False)]
#: How many rows, or which one.
Count = Annotated[int, Field(ge=0, le=10**9)]
#: A position in the history; -1 is its end.
Position = Annotated[int, Field(ge=-1, le=2**62)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Texts = list[str] | tuple[str, ...]
Packages = list[str] | tuple[str, ...] | str
Options = dict[str, Any]

_STRICT = ConfigDict(strict=True)


def checked(cls: ClassT) -> ClassT:
    """`cls`, whose public coroutines refuse arguments of another type than they declare."""
    for name, verb in inspect.getmembers(cls, inspect.iscoroutinefunction):
        if not name.startswith("_"):
            setattr(cls, name, _checked(verb))
    return cls


def _checked(verb: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.cache
    def adapters() -> dict[str, TypeAdapter[Any]]:
        hints = typing.get_type_hints(verb, include_extras=True)
        hints.pop("return", None)
        return {name: TypeAdapter(hint, config=_STRICT) for name, hint in hints.items()}

    @functools.wraps(verb)
    async def call(self: Any, **arguments: Any) -> Any:
        for name, value in arguments.items():
            adapter = adapters().get(name)
            if adapter is not None:  # Python itself says that an argument is unknown
                try:
                    adapter.validate_python(value)
                except ValidationError as exc:
                    reason = exc.errors(include_input=False, include_url=False)[0]["msg"]
                    raise InvalidInput(f"{name}: {reason}", where=verb.__name__) from None
        return await verb(self, **arguments)

    return call
