"""Parses the TOML and JSON texts that people give us. One limit of depth and digits for all."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ray_envs.errors import InvalidInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

#: How deep tables and lists may be nested. Deeper texts end our own recursion, or pydantic's.
MAX_DEPTH = 128
#: Python refuses to print an integer of more than 4,300 digits, Ray's options far shorter ones.
MAX_DIGITS = 1_000

_TOML_STRING = re.compile(r"""\"(?:[^"\\]|\\.)*"|'[^']*'""")
_DOTTED_KEY = re.compile(r"[\w-]+(?:[ \t]*\.[ \t]*[\w-]+)*")


def parsed_toml(text: str, *, where: str, hint: str = "") -> dict[str, Any]:
    """Return the content of a TOML text.

    Raises `InvalidInput`: the text is not TOML, or beyond the limits above; `where` names its file,
    `hint` says what to do.
    """
    _check_dotted_keys(text, where=where)
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as exc:  # also an integer that is too long for Python
        raise InvalidInput(f"not valid TOML: {exc}", where=where, hint=hint) from None
    check_limits(data, where=where)
    return data


def parsed_json(text: str | bytes, *, where: str, hint: str = "") -> Any:
    """Return the content of a JSON text. NaN and the infinities are not JSON.

    Raises `InvalidInput`: the text is not JSON, or beyond the limits above.
    """
    try:
        data = json.loads(text, parse_constant=_not_json)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as exc:
        raise InvalidInput(f"not valid JSON: {exc}", where=where, hint=hint) from None
    check_limits(data, where=where)
    return data


def check_limits(data: Any, *, where: str) -> None:
    """Raise `InvalidInput` if plain data is nested too deeply or holds a huge integer."""
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, int) and value.bit_length() > MAX_DIGITS * 3.33:
                raise InvalidInput(
                    f"an integer has more than {MAX_DIGITS} digits",
                    where=where,
                    hint="write it as a string",
                )
        if not inner:
            return
        level = inner
    raise _too_deep(where)


def _check_dotted_keys(text: str, *, where: str) -> None:
    """Refuse `a.b.c…` with too many parts: Python's parser takes minutes for some thousand."""
    for line in text.splitlines():
        if line.count(".") <= MAX_DEPTH:
            continue
        bare = _TOML_STRING.sub("s", line).partition("#")[0]
        for part in re.split(r"[=,\[\]{}]", bare):
            if part.count(".") > MAX_DEPTH and _DOTTED_KEY.fullmatch(part.strip()):
                raise _too_deep(where)


def _too_deep(where: str) -> InvalidInput:
    return InvalidInput(
        f"nested too deeply: tables and lists may have {MAX_DEPTH} levels",
        where=where,
        hint="flatten it, or keep data in a file of its own",
    )


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def table(data: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """Return the table at `path` of a pyproject.toml; an empty one if there is none.

    Raises `InvalidInput`: a value on the path is not a table.
    """
    found: Any = data
    for part in path:
        found = found.get(part, {})
        if not isinstance(found, dict):
            raise InvalidInput(f"{'.'.join(path)} is not a table", where="pyproject.toml")
    return dict(found)


def strings(value: Any) -> Iterator[str]:
    """Yield every string inside `value`, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
