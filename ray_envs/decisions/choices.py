"""Extras and groups that exclude each other: checks a choice, and reads it in a lock's markers.

`[tool.uv] conflicts` and the names that stand for a choice in a uv.lock (`extra-3-foo-cpu` is the
extra `cpu` of the package `foo`, whose name has 3 letters) come from uv 0.13. `resolving` checks
projects with this module, `locks` follows the edges of a lock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from packaging.markers import InvalidMarker, Marker, UndefinedComparison, UndefinedEnvironmentName
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ray_envs.decisions.parsing import table
from ray_envs.errors import InvalidInput, ResolutionFailed
from ray_envs.models import Platform
from ray_envs.validation import nearest_hint

_PLACE = "pyproject.toml: tool.uv.conflicts"
_SHAPE = 'write it like [[{ extra = "cpu" }, { extra = "gpu" }]]'
_HINT = "choose one of them, and make a variant for each"
#: A clause of a marker that asks whether something is chosen.
_CLAUSE = re.compile(r"""\bextra\s*(==|!=)\s*(['"])((?:extra|group|project)-\d+-[^'"]*)\2""")
#: A clause that holds on every platform, and one that holds on none: each has an os_name.
_TRUE, _FALSE = "os_name != ''", "os_name == ''"


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """An extra or a group of a package; or the package itself, which has the kind "project"."""

    package: str
    kind: str
    name: str = ""

    @property
    def in_lock(self) -> str:
        """The name that stands for it in the markers of a uv.lock."""
        name = f"-{self.name}" if self.name else ""
        return f"{self.kind}-{len(self.package)}-{self.package}{name}"

    def __str__(self) -> str:
        return f"{self.kind} {(self.name or self.package)!r}"


# -- projects


def check_choice(
    data: Mapping[str, Any], *, extras: Iterable[str] = (), groups: Iterable[str] = ()
) -> None:
    """Check the conflicts of a project, and that `extras` and `groups` can be installed together.

    Args:
        data: the content of a pyproject.toml.
        extras: the extras to install, which the project declares.
        groups: the dependency groups to install, which the project declares.

    Raises:
        InvalidInput: the entry has another form, or a group includes one that it excludes; or two
            of those to install, or that these bring with them, exclude each other.
    """
    project = str(canonicalize_name(str(table(data, "project").get("name", ""))))
    optional = _by_plain_name(table(data, "project", "optional-dependencies"))
    declared = _by_plain_name(table(data, "dependency-groups"))
    conflicts = _parsed(table(data, "tool", "uv").get("conflicts", []), project)
    if not conflicts:
        return

    def brought(by: Choice) -> Iterable[Choice]:
        entries = (optional if by.kind == "extra" else declared).get(by.name, [])
        return _brought_by(entries, project)

    for name in declared:  # uv 0.13 writes a lock for it, which it then cannot read
        group = Choice(project, "group", name)
        for other in _closure([group], brought):
            if other.kind == "group" and other != group and _excluded(group, other, conflicts):
                raise InvalidInput(
                    f"{group} includes {other}, and the two exclude each other",
                    where=_PLACE,
                    hint="remove one of the two entries",
                )
    chosen = [Choice(project, "project")]
    chosen += [Choice(project, "extra", str(canonicalize_name(name))) for name in extras]
    chosen += [Choice(project, "group", str(canonicalize_name(name))) for name in groups]
    reached = _closure(chosen, brought)
    for one, other in combinations(sorted(reached), 2):
        if _excluded(one, other, conflicts):
            raise InvalidInput(
                f"{one}{reached[one]} and {other}{reached[other]} exclude each other "
                "(tool.uv.conflicts)",
                where="groups" if one.kind == other.kind == "group" else "extras",
                hint=_HINT,
            )


def _closure(
    chosen: Iterable[Choice], brought: Callable[[Choice], Iterable[Choice]]
) -> dict[Choice, str]:
    """Return `chosen` and what they bring with them, each with words that say through what."""
    queue = list(chosen)
    reached = dict.fromkeys(queue, "")
    while queue:
        one = queue.pop()
        for other in brought(one):
            if other not in reached:
                reached[other] = reached[one] or f" (through {one})"
                queue.append(other)
    return reached


def _excluded(one: Choice, other: Choice, conflicts: Iterable[Collection[Choice]]) -> bool:
    return any(one in conflict and other in conflict for conflict in conflicts)


def _by_plain_name(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {
        str(canonicalize_name(name)): entries if isinstance(entries, list) else []
        for name, entries in given.items()
    }


def _brought_by(entries: Iterable[Any], project: str) -> Iterable[Choice]:
    """Yield the groups and the project's own extras that requirements always bring with them."""
    for entry in entries:
        if isinstance(entry, dict):
            included = str(entry.get("include-group", ""))
            yield Choice(project, "group", str(canonicalize_name(included)))
        elif isinstance(entry, str):
            try:
                requirement = Requirement(entry)
            except InvalidRequirement:  # `resolving` refuses it, and says why
                continue
            if requirement.marker is None and canonicalize_name(requirement.name) == project:
                for extra in requirement.extras:
                    yield Choice(project, "extra", str(canonicalize_name(extra)))


def _parsed(given: Any, project: str) -> list[list[Choice]]:
    """Return the sets of `[tool.uv] conflicts`; raise `InvalidInput` if it has another form.

    As in uv, they may name what the project does not declare.
    """
    if not isinstance(given, list) or not all(isinstance(each, list) for each in given):
        raise InvalidInput("this is not a list of lists", where=_PLACE, hint=_SHAPE)
    found = []
    for index, items in enumerate(given):
        place = f"{_PLACE}[{index}]"
        conflict = {_choice(item, project, f"{place}[{n}]") for n, item in enumerate(items)}
        if len(conflict) < 2:
            raise InvalidInput("it does not name two", where=place, hint=_SHAPE)
        found.append(sorted(conflict))
    return found


def _choice(item: Any, project: str, place: str) -> Choice:
    keys = ("package", "extra", "group")
    if not isinstance(item, dict):
        raise InvalidInput("this is not a table", where=place, hint=_SHAPE)
    for key, value in item.items():
        if key not in keys:
            raise InvalidInput(f"unknown key {key!r}", where=place, hint=nearest_hint(key, keys))
        if not isinstance(value, str) or not value:
            raise InvalidInput(f"{key} is not a name", where=place, hint=_SHAPE)
    if not item or {"extra", "group"} <= item.keys():
        raise InvalidInput("name one extra or one group in each table", where=place, hint=_SHAPE)
    kind = next((kind for kind in ("extra", "group") if kind in item), "project")
    package = str(canonicalize_name(item.get("package", project)))
    return Choice(package, kind, str(canonicalize_name(item.get(kind, ""))))


# -- locks


def check_lock_choice(lock: Mapping[str, Any], active: Collection[str]) -> None:
    """Check that nothing `active` excludes another; raise `ResolutionFailed` if so.

    `active` has the names of `Choice.in_lock`, also of extras that packages ask for.
    """
    for conflict in lock.get("conflicts", []):
        items = [_locked_choice(item) for item in conflict]
        for one, other in combinations([each for each in items if each.in_lock in active], 2):
            raise ResolutionFailed(
                f"{one} of {one.package} and {other} of {other.package} exclude each other "
                "(tool.uv.conflicts)",
                where="uv.lock",
                hint=f"{_HINT}; or change which requirement asks for an extra",
            )


def _locked_choice(item: Mapping[str, str]) -> Choice:
    kind = next((kind for kind in ("extra", "group") if kind in item), "project")
    return Choice(item.get("package", ""), kind, item.get(kind, ""))


class LockMarkers:
    """Evaluates the markers of a lock on a platform; each is parsed once."""

    def __init__(self, platform: Platform) -> None:
        self._environment = {**platform.markers, "extra": ""}
        self._known: dict[str, bool] = {"": True}

    def hold(self, marker: str, active: Collection[str] | None) -> bool:
        """Return whether `marker` holds.

        Args:
            marker: the marker of an edge, or one of a package's `resolution-markers`.
            active: what is chosen, as `Choice.in_lock`. None: any choice, so each clause about one
                counts as true.

        Raises `InvalidInput`: it is no marker.
        """
        if "extra" in marker:
            marker = _CLAUSE.sub(lambda clause: _answer(clause, active), marker)
        if marker not in self._known:
            try:
                self._known[marker] = Marker(marker).evaluate(self._environment)
            except (InvalidMarker, UndefinedComparison, UndefinedEnvironmentName) as exc:
                raise InvalidInput(
                    f"{marker[:200]!r} is not a marker: {exc}",
                    where="uv.lock",
                    hint="run `uv lock`",
                ) from None
        return self._known[marker]


def _answer(clause: re.Match[str], active: Collection[str] | None) -> str:
    operator, name = clause[1], clause[3]
    return _TRUE if active is None or (name in active) == (operator == "==") else _FALSE
