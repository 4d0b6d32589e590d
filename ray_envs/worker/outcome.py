"""Turns the value or the error of an item into plain data."""

from __future__ import annotations

import os
from typing import Any


def as_json(value: Any) -> Any:
    """Return `value` as a JSON file will hold it. Raises `TypeError` if it is not JSON."""
    import json

    def plain(thing: Any) -> Any:
        if type(thing).__module__ == "numpy" and getattr(thing, "ndim", None) == 0:
            return thing.item()
        raise TypeError(f"{repr(thing)[:80]} of type {type(thing).__qualname__}")

    try:
        text = json.dumps(value, default=plain, allow_nan=False, ensure_ascii=False)
        text.encode()  # fails for half a surrogate pair, which no file can hold
        plain_value = json.loads(text)
        _check_depth(plain_value)
        return plain_value
    except (TypeError, ValueError, RecursionError) as exc:  # also NaN, a circle, too deep
        raise TypeError(f"the value is not JSON: {exc}") from None


def _check_depth(value: Any) -> None:
    """Raise `ValueError` if `value` is nested deeper than readers of a results file accept."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, (dict, list)):
                inner += each.values() if isinstance(each, dict) else each
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


#: The same for everything that is read again: a batch file, an earlier result.
_MAX_DEPTH = 120


def in_words(value: Any) -> str:
    """Return `value` as text, for a driver that cannot read it: it may lack the class."""
    try:
        text = repr(value)
    except Exception as broken:
        text = f"<a {type(value).__qualname__}; its __repr__ raised {type(broken).__name__}>"
    return _writable(text[:_VALUE_LENGTH])


#: The longest text of a value.
_VALUE_LENGTH = 2_000
#: The longest texts of an error that are sent: a message may hold a whole array.
_MESSAGE_LENGTH = 10_000
_TRACEBACK_LENGTH = 20_000


def described(exc: BaseException) -> dict[str, str]:
    """Return `exc` as plain data; its traceback begins below the frames of this folder."""
    import traceback

    frames = exc.__traceback__
    ours = os.path.dirname(described.__code__.co_filename)
    while frames is not None and os.path.dirname(frames.tb_frame.f_code.co_filename) == ours:
        frames = frames.tb_next
    try:
        message = str(exc)
        text = "".join(traceback.format_exception(type(exc), exc, frames))
    except Exception as broken:  # a payload's own __str__
        message = text = f"<no message: its __str__ raised {type(broken).__name__}>"
    module = type(exc).__module__
    name = type(exc).__qualname__
    return {
        "type": name if module == "builtins" else f"{module}.{name}",
        "message": _writable(message[:_MESSAGE_LENGTH]),
        "traceback": _writable(text[-_TRACEBACK_LENGTH:]),
    }


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
