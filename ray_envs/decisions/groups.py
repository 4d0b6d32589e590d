"""Checks the dependency groups of a project: what they include, and for which Python they are.

uv 0.13 leaves a group out in silence if it is for another Python. The other faults it names itself,
but as faults of its own work. Groups come from PEP 735. `choices` checks which exclude each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

from packaging.utils import canonicalize_name

from ray_envs.decisions.parsing import table
from ray_envs.decisions.requirements import check_python
from ray_envs.errors import InvalidInput
from ray_envs.models import Target
from ray_envs.validation import nearest_hint

_FILE = "pyproject.toml"


def check_groups(data: Mapping[str, Any], chosen: Iterable[str], target: Target) -> None:
    """Check the dependency groups of a project, and that the chosen ones are for this Python.

    Args:
        data: the content of a pyproject.toml.
        chosen: the groups to install, which the project declares.
        target: has the version of Python.

    Raises `InvalidInput`: a group includes one that is not declared, or itself; `default-groups`
    names one that is not declared; or a chosen group excludes the cluster's Python.
    """
    groups = {str(canonicalize_name(name)): value for name, value in _groups(data).items()}
    uv = table(data, "tool", "uv")
    known = {*groups, *(["dev"] if "dev-dependencies" in uv else [])}  # the old form of it
    for name in _default_groups(uv):
        if canonicalize_name(name) not in known:
            raise _unknown(name, known, "tool.uv.default-groups")
    includes = {name: _includes(name, entries, groups) for name, entries in groups.items()}
    _check_circles(includes)
    pythons = {
        str(canonicalize_name(name)): each
        for name, each in table(uv, "dependency-groups").items()
        if isinstance(each, dict)
    }
    queue = [str(canonicalize_name(name)) for name in chosen]
    needed: set[str] = set()
    while queue:
        group = queue.pop()
        if group in needed:
            continue
        needed.add(group)
        queue += includes.get(group, ())
        wanted = pythons.get(group, {}).get("requires-python")
        if wanted is not None:
            place = f"tool.uv.dependency-groups.{group}.requires-python"
            check_python(str(wanted), target, where=f"{_FILE}: {place}")


def _groups(data: Mapping[str, Any]) -> dict[str, list[Any]]:
    found = table(data, "dependency-groups")
    return {name: value for name, value in found.items() if isinstance(value, list)}


def _default_groups(uv: Mapping[str, Any]) -> list[str]:
    given = uv.get("default-groups", [])
    if given == "all":
        return []
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise InvalidInput(
            'this is neither a list of names nor "all"',
            where=f"{_FILE}: tool.uv.default-groups",
            hint='write it like ["dev"]',
        )
    return given


def _includes(group: str, entries: list[Any], groups: Mapping[str, Any]) -> list[str]:
    """Return the groups that the entries of `group` include."""
    found = []
    for entry in entries:
        if isinstance(entry, dict):
            name = entry.get("include-group")
            if not isinstance(name, str) or len(entry) != 1:
                raise InvalidInput(
                    f"{entry!r:.100} is neither a requirement nor an include",
                    where=f"{_FILE}: dependency-groups.{group}",
                    hint='write requirements, or { include-group = "name" }',
                )
            if canonicalize_name(name) not in groups:
                raise _unknown(name, groups, f"dependency-groups.{group}")
            found.append(str(canonicalize_name(name)))
    return found


def _check_circles(includes: Mapping[str, list[str]]) -> None:
    """Refuse a group that includes itself, through any number of others."""
    try:
        TopologicalSorter(includes).prepare()
    except CycleError as exc:
        circle = list(reversed(exc.args[1]))
        raise InvalidInput(
            f"the groups include each other in a circle: {' -> '.join(circle)}",
            where=f"{_FILE}: dependency-groups.{circle[0]}",
            hint="remove one of the entries include-group",
        ) from None


def _unknown(name: str, groups: Iterable[str], place: str) -> InvalidInput:
    known = list(groups)
    hint = nearest_hint(name, known) if known else "the project declares no groups"
    return InvalidInput(f"unknown group {name!r}", where=f"{_FILE}: {place}", hint=hint)
