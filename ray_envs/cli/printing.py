"""Prints: data goes to stdout, text for people to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Answer = dict[str, Any]
#: How many characters of a key, and of a node's id, tables show.
KEY_SHOWN = 10
NODE_SHOWN = 12


def put(text: str) -> bool:
    """Print data to stdout. Returns False if its reader has ended, which is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def put_json(data: Any) -> None:
    put(json.dumps(data, indent=1))


def put_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one JSON list with a row on each line: fast, and can be searched with grep."""
    put("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]" if rows else "[]")


def say(text: str) -> None:
    """Print a line for people to stderr."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Print what is wrong to stderr, under the name of the command."""
    first, *rest = text.splitlines() or [""]
    say("\n".join([f"ray-envs: {first}", *(f"  {line}" for line in rest)]))


def columns(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: str = "") -> str:
    """Return a table with a line for each row, however narrow the terminal is.

    Args:
        header: the names of the columns.
        rows: their cells; None is shown as "-".
        right: the names of the columns that are aligned to the right, separated by spaces.
    """
    cells = [[name.upper() for name in header]]
    cells += [["-" if c is None else " ".join(str(c).split()) or "-" for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = {header.index(name) for name in right.split()}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def put_fields(fields: Mapping[str, Any]) -> None:
    """Print a line for each field: its name and its value."""
    for name, value in fields.items():
        text = str(value)
        if isinstance(value, Mapping):
            text = " ".join(f"{key}={value[key]}" for key in sorted(value))
        elif isinstance(value, list | tuple):
            text = " ".join(map(str, value))
        put(f"{name:16} {'-' if value is None else text or '-'}")


def put_diff(diff: Mapping[str, Any]) -> None:
    """Print a line for each package that differs: `+` added, `-` removed, `~` changed."""
    lines = [(name, f"+ {name} {version}") for name, version in diff["added"].items()]
    lines += [(name, f"- {name} {version}") for name, version in diff["removed"].items()]
    lines += [(name, f"~ {name} {old} -> {new}") for name, (old, new) in diff["changed"].items()]
    for _, line in sorted(lines):
        put(line)


def put_change(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a change of a variant did or, with `dry_run`, would do."""
    if as_json:
        put_json(answer)
        return
    put_diff(answer["diff"])
    put(f"generation {answer['generation']}, environment {answer['key']}")
    if not answer["is_changed"]:
        say("nothing would be changed" if answer["dry_run"] else "nothing was changed")
    elif answer["dry_run"]:
        say("dry run: nothing was changed")


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
