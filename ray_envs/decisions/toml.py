"""Reads TOML texts, for the modules that check projects, lock files and batch files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ray_envs.errors import InvalidInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]


def parsed_toml(text: str, *, where: str, hint: str = "") -> dict[str, Any]:
    """Return the content of a TOML text.

    Raises `InvalidInput`: the text is not TOML; `where` names its file, `hint` says what to do.
    """
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidInput(f"not valid TOML: {exc}", where=where, hint=hint) from None
    except RecursionError:
        raise InvalidInput("not valid TOML: nested too deeply", where=where) from None
    return data


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
