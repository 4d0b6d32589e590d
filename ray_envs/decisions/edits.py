"""Changes a definition: adds, removes or upgrades packages, and compares two sets of packages.

`requirements` checks the packages; the manager's `resolver` locks the new definition.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import tomlkit
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ray_envs.decisions import resolving
from ray_envs.decisions.requirements import requirement_lines
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import Generation
from ray_envs.specs import Definition

Diff = dict[str, Any]


def added(definition: Definition, packages: Iterable[str] | str, *, where: str) -> Definition:
    """Return `definition` with `packages`; each replaces a requirement of the same name.

    A bare name does not change a requirement that is declared already.

    Raises `InvalidPackages`: none are given, or one cannot be accepted.
    """
    lines = _given(packages, where=where)
    there = {_name(line) for line in _declared(definition)}
    new = [line for line in lines if not (_is_bare(line) and _name(line) in there)]
    kept = _without(definition, {_name(line) for line in new})
    return kept.model_copy(
        update={"packages": requirement_lines([*kept.packages, *new], where=where)}
    )


def removed(definition: Definition, packages: Iterable[str] | str, *, where: str) -> Definition:
    """Return `definition` without the requirements that `packages` name.

    Raises:
        InvalidPackages: none are given, or one is not declared; the hint names the nearest one.
    """
    lines = _given(packages, where=where)
    there = {_name(line) for line in _declared(definition)}
    for line in lines:
        if _name(line) not in there:
            raise InvalidPackages(
                f"{_name(line)!r} is not declared here",
                where=where,
                hint=_near(_name(line), there, "`ray-envs deps` shows what is declared; a "
                "dependency is removed together with the package that needs it"),
            )  # fmt: skip
    return _without(definition, {_name(line) for line in lines})


def upgraded(
    definition: Definition, packages: Iterable[str] | str, locked: Mapping[str, str], *, where: str
) -> tuple[Definition, tuple[str, ...]]:
    """Return the definition to lock, and the names whose versions may change; () means all.

    Raises `InvalidPackages`: one cannot be accepted, or is not in the environment.
    """
    lines = _given(packages, where=where) if packages else ()
    for line in lines:
        if _name(line) not in locked:
            raise InvalidPackages(
                f"{_name(line)!r} is not in this environment",
                where=where,
                hint=_near(_name(line), locked, "add it with `ray-envs add`"),
            )
    new = [line for line in lines if not _is_bare(line)]
    if new:
        definition = added(definition, new, where=where)
    return definition, tuple(sorted({_name(line) for line in lines}))


def inherited(packages: Iterable[str], versions: Mapping[str, str]) -> tuple[str, ...]:
    """Return `packages`; those without a version get the one in `versions`, if there is one."""
    lines = []
    for line in packages:
        requirement = Requirement(line)
        version = versions.get(canonicalize_name(requirement.name))
        if version is not None and not requirement.specifier and requirement.url is None:
            requirement.specifier = SpecifierSet(f"=={version}")
        lines.append(str(requirement))
    return requirement_lines(lines)


def versions(generation: Generation) -> dict[str, str]:
    """Return the versions of its packages for `diff`; those of local ones with their hash."""
    hashes = {wheel.name: wheel.sha256[:8] for wheel in generation.definition.wheels}
    return {
        name: f"{version} ({hashes[name]})" if name in hashes else version
        for name, version in generation.packages.items()
    }


def diff(before: Mapping[str, str], after: Mapping[str, str]) -> Diff:
    """Compare two sets of packages (name to version).

    Returns:
        `added` and `removed` (name to version), and `changed` (name to [old, new]), as plain data.
    """
    return {
        "added": {n: v for n, v in sorted(after.items()) if n not in before},
        "removed": {n: v for n, v in sorted(before.items()) if n not in after},
        "changed": {
            n: [before[n], v] for n, v in sorted(after.items()) if n in before and before[n] != v
        },
    }


def _given(packages: Iterable[str] | str, *, where: str) -> tuple[str, ...]:
    lines = requirement_lines(packages, where=where)
    if not lines:
        raise InvalidPackages("no packages are given", where=where, hint="name at least one")
    return lines


def _declared(definition: Definition) -> tuple[str, ...]:
    """Return the requirements of a definition: its own, and those in its project's text."""
    own = resolving.declared(definition.pyproject) if definition.pyproject else ()
    return (*definition.packages, *own)


def _without(definition: Definition, names: set[str]) -> Definition:
    """Return `definition` without the requirements of these names, also in its project's text."""
    update: dict[str, Any] = {
        "packages": tuple(line for line in definition.packages if _name(line) not in names)
    }
    text = definition.pyproject
    if text is not None and any(_name(line) in names for line in resolving.declared(text)):
        document = tomlkit.parse(text)
        array: Any = document["project"]["dependencies"]
        for index in reversed(range(len(array))):
            if _name(str(array[index])) in names:
                array.pop(index)
        update["pyproject"] = document.as_string()
        if any(_name(line) in names for line in resolving.declared(update["pyproject"])):
            raise InvalidInput(
                "the layout of the project is too unusual to be edited",
                where="pyproject.toml",
                hint="change the file and create the variant again with replace",
            )
    return definition.model_copy(update=update)


def _name(line: str) -> str:
    return str(canonicalize_name(Requirement(line).name))


def _is_bare(line: str) -> bool:
    requirement = Requirement(line)
    return not (
        requirement.specifier or requirement.url or requirement.extras or requirement.marker
    )


def _near(name: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise
