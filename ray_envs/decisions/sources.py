"""Makes the parts of a definition from what a requirements file, script or pylock.toml asks for.

`requirements_file`, `scripts` and `pylocks` read these texts; `resolving` makes the project that uv
locks. The entries of [tool.uv] are those of uv 0.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import tomlkit
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ray_envs.decisions.entries import Local, Setting, Wanted
from ray_envs.decisions.local_sources import ENVIRONMENT
from ray_envs.errors import InvalidPackages

COMPILE_HINT = "compile the file again with `uv pip compile --generate-hashes`"
_SHA256 = "sha256:"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a file asks for, as parts of a `Definition`."""

    packages: tuple[str, ...]
    #: The text of a project with the settings of the file; None if it has none.
    pyproject: str | None = None
    python: str | None = None
    hashes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    locals: tuple[Local, ...] = ()


def from_requirements(
    wanted: Iterable[Wanted],
    constraints: Iterable[Wanted],
    settings: Iterable[Setting],
    locals_: Iterable[Local],
) -> Asked:
    """Return what the entries of requirements files and constraints files ask for.

    Raises `InvalidPackages`: a line cannot be said to uv, or lacks a hash that it needs.
    """
    wanted, constraints, settings = tuple(wanted), tuple(constraints), tuple(settings)
    locals_ = tuple(locals_)
    for each in constraints:
        if Requirement(each.line).extras:
            raise InvalidPackages(
                f"the constraint {each.line!r} has extras",
                where=each.where,
                hint="write the extras into the requirement, and the version here",
            )
    uv = _settings(settings)
    limits = sorted({each.line for each in constraints})
    if limits:
        uv["constraint-dependencies"] = limits
    is_required = any(each.name == "--require-hashes" for each in settings)
    for option in settings:
        if option.name == "--require-hashes" and not wanted:
            raise _unchecked("there is no requirement that could have a hash", option.where)
    is_checked = is_required or any(each.hashes for each in (*wanted, *constraints))
    return Asked(
        packages=tuple(sorted({each.line for each in wanted})),
        pyproject=project_text(uv),
        hashes=_hashes(wanted, constraints, locals_) if is_checked else {},
        locals=locals_,
    )


def project_text(uv: Mapping[str, Any]) -> str | None:
    """Return the text of a project with the entries `uv` in [tool.uv]; None if there are none."""
    if not uv:
        return None
    # With `package` set, `resolving` has nothing to add to a table that may end in others.
    plain = {name: value for name, value in uv.items() if not _is_table(value)}
    tables = {name: value for name, value in uv.items() if _is_table(value)}
    return tomlkit.dumps(
        {
            "project": {"name": ENVIRONMENT, "version": "0"},
            "tool": {"uv": {**plain, "package": False, **tables}},
        }
    )


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(each, dict) for each in value)
    )


def both_pythons(given: str | None, wanted: str | None) -> str | None:
    """Return what admits the Pythons of a spec (a version or a specifier) and of its file."""
    if given is None or wanted is None:
        return given if wanted is None else wanted
    text = given.strip()
    return f"=={text}.*,{wanted}" if re.fullmatch(r"\d+(\.\d+){0,2}", text) else f"{text},{wanted}"


def index_name(url: str, taken: Iterable[str]) -> str:
    """Return a name for an index: that of its host, with a number if it is taken."""
    host = urlsplit(url).hostname or ""
    name = re.sub(r"[^a-z0-9]+", "-", host.lower()).strip("-") or "index"
    names, number = set(taken), 1
    result = name
    while result in names:
        number += 1
        result = f"{name}-{number}"
    return result


# -- settings


def _settings(settings: tuple[Setting, ...]) -> dict[str, Any]:
    """Return the entries of [tool.uv] that mean what pip's options mean."""
    given: dict[str, list[str]] = {}
    for each in settings:
        given.setdefault(each.name, []).append(each.value)
    uv: dict[str, Any] = {}
    if "--no-index" in given:
        uv["no-index"] = True
    if "--pre" in given:
        uv["prerelease"] = "allow"
    uv |= _formats(settings)
    if links := list(dict.fromkeys(given.get("--find-links", ()))):
        uv["find-links"] = links
    indexes: list[dict[str, Any]] = []
    default = given.get("--index-url", [""])[-1]  # as in pip, the last one counts
    for each in settings:
        if each.name not in ("--index-url", "--extra-index-url"):
            continue
        is_default = each.value == default
        if each.name == "--index-url" and not is_default:
            continue
        if any(index["url"] == each.value for index in indexes):
            continue
        index = {
            "name": index_name(each.value, (index["name"] for index in indexes)),
            "url": each.value,
        }
        indexes.append({**index, "default": True} if is_default else index)
    if indexes:
        uv["index"] = indexes
    return uv


def _formats(settings: tuple[Setting, ...]) -> dict[str, Any]:
    """Return which packages are installed from wheels, or from source archives only.

    As in pip, a later option takes names away from the other one.
    """
    chosen: dict[str, set[str]] = {"--no-binary": set(), "--only-binary": set()}
    where = ""
    for each in settings:
        if each.name not in chosen:
            continue
        where = each.where
        other = chosen["--only-binary" if each.name == "--no-binary" else "--no-binary"]
        for value in (part.strip() for part in each.value.split(",")):
            if value == ":all:":
                chosen[each.name] = {":all:"}
                other.clear()
            elif value == ":none:":
                chosen[each.name] = set()
            elif re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", value):
                other.discard(canonicalize_name(value))
                chosen[each.name].add(canonicalize_name(value))
            else:
                raise InvalidPackages(
                    f"{each.name}: {value!r} is not the name of a package",
                    where=each.where,
                    hint="write :all:, :none: or names with commas between them",
                )
    source, wheels = chosen["--no-binary"], chosen["--only-binary"]
    if (":all:" in source and wheels) or (":all:" in wheels and source):
        raise InvalidPackages(
            "uv has no exceptions from :all:",
            where=where,
            hint="name the packages of --no-binary and --only-binary one by one",
        )
    uv: dict[str, Any] = {}
    for key, names in (("no-binary", source), ("no-build", wheels)):
        if ":all:" in names:
            uv[key] = True
        elif names:
            uv[f"{key}-package"] = sorted(names)
    return uv


# -- hashes


def _hashes(
    wanted: tuple[Wanted, ...], constraints: tuple[Wanted, ...], locals_: tuple[Local, ...]
) -> dict[str, tuple[str, ...]]:
    """Return the accepted hashes of each package. As in pip, all need one if one has one."""
    for local in locals_:
        raise _unchecked(f"{local.path!r} is a local path, which has no hash", local.where)
    limits: dict[str, list[Wanted]] = {}
    for each in constraints:
        limits.setdefault(_name(each), []).append(each)
    found: dict[str, set[str]] = {}
    for each in wanted:
        # One name may have several constraints, with markers: any of them may be the one.
        theirs = {one for limit in limits.get(_name(each), ()) for one in _own(limit)}
        allowed = [hashes for hashes in (_own(each), theirs) if hashes]
        if not allowed:
            raise _unchecked(f"{each.line!r} has no hash", each.where)
        if not any(_is_pinned(one) for one in (each, *limits.get(_name(each), ()))):
            raise _unchecked(f"{each.line!r} has a hash, and no version with ==", each.where)
        common = set.intersection(*allowed)
        sha256 = {each for each in common if each.startswith(_SHA256)}
        if not sha256:
            what = "has no sha256 among its hashes" if common else "has other hashes as constraint"
            raise _unchecked(f"{each.line!r} {what}; uv.lock has only sha256", each.where)
        found.setdefault(_name(each), set()).update(sha256)
    return {name: tuple(sorted(hashes)) for name, hashes in sorted(found.items())}


def _unchecked(what: str, where: str) -> InvalidPackages:
    return InvalidPackages(
        what,
        where=where,
        hint=f"one hash means that each requirement needs one: {COMPILE_HINT}, or remove all",
    )


def _name(wanted: Wanted) -> str:
    return str(canonicalize_name(Requirement(wanted.line).name))


def _own(wanted: Wanted) -> set[str]:
    """Return the hashes of a requirement; the one in its address counts, too."""
    url = Requirement(wanted.line).url or ""
    inside = re.search(r"[#&](sha256|sha384|sha512)=([0-9A-Fa-f]+)", url)
    return {*wanted.hashes, *([f"{inside[1]}:{inside[2].lower()}"] if inside else ())}


def _is_pinned(wanted: Wanted) -> bool:
    requirement = Requirement(wanted.line)
    if requirement.url is not None:
        return True
    specifiers = list(requirement.specifier)
    return any(s.operator in ("==", "===") and not s.version.endswith(".*") for s in specifiers)
