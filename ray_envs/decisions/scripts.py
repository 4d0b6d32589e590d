"""Reads the block of metadata in a Python script (PEP 723): its packages, Python and [tool.uv].

`sources` makes a definition of it. The form of the block is that of the inline script metadata
specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from ray_envs.decisions.entries import Local, Wanted, requirement
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.decisions.sources import Asked, project_text
from ray_envs.errors import InvalidInput
from ray_envs.validation import nearest_hint

_OPEN, _CLOSE = "# /// script", "# ///"
_EXAMPLE = '# /// script\n# dependencies = ["numpy>=1.26"]\n# ///'


def from_script(text: str, *, file: str) -> Asked:
    """Return what the block `# /// script` of a Python file asks for.

    Raises:
        InvalidInput: there is no block or there are several, or it has no end, is not TOML or has
            wrong values; `where` names the file and the line.
        InvalidPackages: a dependency cannot be accepted.
    """
    lines = text.split("\n")
    first, block = _block(lines, file=file)
    # The empty lines make the lines of an error those of the file.
    padded = "\n" * first + "\n".join(block)
    data = parsed_toml(padded, where=file, hint="correct that line of the `# /// script` block")
    for key in data:
        if key not in ("dependencies", "requires-python", "tool"):
            known = ("dependencies", "requires-python", "tool")
            hint = nearest_hint(key, known)
            raise InvalidInput(f"unknown key {key!r}", where=_at(key, lines, file), hint=hint)
    given = data.get("dependencies", [])
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise InvalidInput(
            "dependencies is not a list of strings",
            where=_at("dependencies", lines, file),
            hint='write it like dependencies = ["numpy>=1.26"]',
        )
    found = [requirement(each, (), where=_at(each, lines, file)) for each in given]
    uv = _tool_uv(data, where=_at("tool", lines, file))
    return Asked(
        packages=tuple(sorted({each.line for each in found if isinstance(each, Wanted)})),
        pyproject=project_text(uv),
        python=_requires_python(data, where=_at("requires-python", lines, file)),
        locals=tuple(each for each in found if isinstance(each, Local)),
    )


def _block(lines: Sequence[str], *, file: str) -> tuple[int, list[str]]:
    """Return the TOML lines of the only block, and the number of the line before them."""
    found: list[tuple[int, list[str]]] = []
    at = 0
    while at < len(lines):
        at += 1
        if lines[at - 1].rstrip() != _OPEN:
            continue
        end = at
        while end < len(lines) and (lines[end] == "#" or lines[end].startswith("# ")):
            end += 1
        # As the specification says, the last line that can be the end is the end.
        ends = [row for row in range(at, end) if lines[row].rstrip() == _CLOSE]
        again = [row for row in range(at, end) if lines[row].rstrip() == _OPEN]
        if not ends or (again and again[0] < ends[0]):
            raise InvalidInput(
                f"the block `{_OPEN}` has no end",
                where=f"{file}: line {at}",
                hint=f"end it with a line `{_CLOSE}`; each line between begins with `# `",
            )
        # A second block right behind the first one would be swallowed.
        last = next((row for row in reversed(ends) if not again or row < again[0]), ends[0])
        found.append((at, [line[2:] for line in lines[at:last]]))
        at = last + 1
    if not found:
        raise InvalidInput(f"there is no block `{_OPEN}`", where=file, hint=f"write\n{_EXAMPLE}")
    if len(found) > 1:
        raise InvalidInput(
            f"a second block `{_OPEN}`; the first one is in line {found[0][0]}",
            where=f"{file}: line {found[1][0]}",
            hint="write one block with all dependencies",
        )
    return found[0]


def _at(text: str, lines: Sequence[str], file: str) -> str:
    """Return the place of `text` in the comments of a file: "x.py: line 3"."""
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") and text and text in line.replace("\\", ""):
            return f"{file}: line {number}"
    return file


def _requires_python(data: dict[str, Any], *, where: str) -> str | None:
    text = data.get("requires-python")
    if text is None:
        return None
    try:
        # An empty specifier means any Python; another type than text means nothing.
        return str(SpecifierSet(text if isinstance(text, str) else "?"))
    except (InvalidSpecifier, TypeError, AttributeError):
        raise InvalidInput(
            f"requires-python: {text!r} is not a specifier",
            where=where,
            hint='write it like requires-python = ">=3.11"',
        ) from None


def _tool_uv(data: dict[str, Any], *, where: str) -> dict[str, Any]:
    tool = data.get("tool", {})
    uv = tool.get("uv", {}) if isinstance(tool, dict) else None
    if not isinstance(uv, dict):
        raise InvalidInput("tool.uv is not a table", where=where, hint="write [tool.uv]")
    return uv
