"""Reads a pylock.toml (PEP 751): exact versions, markers, hashes and indexes.

`sources` makes a definition of it. Its packages become requirements of their own, which uv locks
together with the cluster's Ray. The extras of the file are not chosen, its default groups are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.utils import canonicalize_name

from ray_envs.decisions.credentials import check_credentials, redacted
from ray_envs.decisions.entries import Local, requirement, split_address
from ray_envs.decisions.parsing import parsed_toml, strings
from ray_envs.decisions.sources import Asked, index_name, project_text
from ray_envs.errors import InvalidInput, InvalidPackages

_VERSION = "1.0"
#: The public Python Package Index. What stands for it is decided by the settings of the nodes.
_USUAL = re.compile(r"https?://pypi\.[a-z]+/simple/?", re.IGNORECASE)
#: Markers of pylock.toml that a requirement cannot have.
_CHOICE = re.compile(
    r"""(["'])([^"']*)\1\s+(not\s+)?in\s+(extras|dependency_groups)\b""", re.IGNORECASE
)
_HOLDS, _FAILS = "python_version >= '0'", "python_version < '0'"
_LOCK_HINT = "write the file again, such as with `uv export --format pylock.toml`"
_HEADER = re.compile(r"\s*\[\[\s*packages\s*\]\]")


@dataclass(slots=True)
class _Found:
    lines: set[str] = field(default_factory=set)
    hashes: dict[str, set[str]] = field(default_factory=dict)
    locals: list[Local] = field(default_factory=list)
    #: Names by address.
    indexes: dict[str, str] = field(default_factory=dict)
    sources: dict[str, list[dict[str, str]]] = field(default_factory=dict)


def from_pylock(text: str, *, file: str) -> Asked:
    """Return what a pylock.toml asks for.

    Raises:
        InvalidInput: it is not TOML, has another version of the format, or a wrong value.
        InvalidPackages: a package cannot be accepted; `where` names the file and the line.
    """
    data = parsed_toml(text, where=file, hint=_LOCK_HINT)
    version = data.get("lock-version")
    if version != _VERSION:
        raise InvalidInput(
            f"lock-version is {version!r}, and only {_VERSION!r} is known"
            if version is not None
            else "there is no lock-version: this is not a pylock.toml",
            where=file,
            hint=_LOCK_HINT,
        )
    for each in strings(data):
        check_credentials(each, InvalidInput, where=file)
    rows = data.get("packages", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InvalidInput("packages is not a list of tables", where=file, hint=_LOCK_HINT)
    starts = [n for n, line in enumerate(text.split("\n"), 1) if _HEADER.match(line)]
    groups = set(strings(data.get("default-groups", [])))
    found = _Found()
    for number, row in enumerate(rows):
        place = f"line {starts[number]}" if len(starts) == len(rows) else f"packages[{number}]"
        _take(row, found, groups, where=f"{file}: {place}")
    return Asked(
        packages=tuple(sorted(found.lines)),
        pyproject=project_text(_uv(data, found, file=file)),
        python=_text(data, "requires-python", where=file),
        hashes={name: tuple(sorted(each)) for name, each in sorted(found.hashes.items())},
        locals=tuple(found.locals),
    )


def _uv(data: Mapping[str, Any], found: _Found, *, file: str) -> dict[str, Any]:
    uv: dict[str, Any] = {}
    environments = data.get("environments", [])
    if not isinstance(environments, list) or not all(isinstance(e, str) for e in environments):
        raise InvalidInput("environments is not a list of strings", where=file, hint=_LOCK_HINT)
    if environments:
        uv["environments"] = environments
    if found.indexes:
        uv["index"] = [
            {"name": name, "url": url, "explicit": True} for url, name in found.indexes.items()
        ]
        uv["sources"] = {
            name: given if len(given) > 1 else given[0] for name, given in found.sources.items()
        }
    return uv


def _text(table: Mapping[str, Any], key: str, *, where: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{key} is not a string", where=where, hint=_LOCK_HINT)
    return value


def _inner(table: Mapping[str, Any], key: str, *, where: str) -> dict[str, Any] | None:
    value = table.get(key)
    if value is not None and not isinstance(value, dict):
        raise InvalidInput(f"{key} is not a table", where=where, hint=_LOCK_HINT)
    return value


def _take(row: Mapping[str, Any], found: _Found, groups: set[str], *, where: str) -> None:
    """Put one entry of `packages` into `found`."""
    given = _text(row, "name", where=where)
    if given is None:
        raise InvalidInput("a package has no name", where=where, hint=_LOCK_HINT)
    name = str(canonicalize_name(given))
    marker = _marker(_text(row, "marker", where=where) or "", groups)
    suffix = f" ; {marker}" if marker else ""
    path = _path(row, where=where)
    if path is not None:
        requirement(f"{name}{suffix}", (), where=where)  # checks the marker
        found.locals.append(Local(path, (), marker, name, where))
        return
    place, hashes = _place(name, row, where=where)
    entry = requirement(f"{place}{suffix}", (), where=where)
    if isinstance(entry, Local):
        found.locals.append(entry)
        return
    if not hashes:
        raise InvalidPackages(
            f"{name} has no sha256 among its hashes; uv.lock has only sha256",
            where=where,
            hint=_LOCK_HINT,
        )
    found.lines.add(entry.line)
    found.hashes.setdefault(name, set()).update(hashes)
    index = _text(row, "index", where=where)
    if index is not None and "://" not in place and not _USUAL.fullmatch(index):
        if not re.match(r"https?://", index, re.IGNORECASE):
            raise InvalidPackages(
                f"{name} is in the index {redacted(index)}, which other nodes do not have",
                where=where,
                hint="lock with an index that every node reaches by http",
            )
        split_address(index, where=where)
        index = index.rstrip("/")
        if index not in found.indexes:
            found.indexes[index] = index_name(index, found.indexes.values())
        source = {"index": found.indexes[index], **({"marker": marker} if marker else {})}
        if source not in (sources := found.sources.setdefault(name, [])):
            sources.append(source)


def _path(row: Mapping[str, Any], *, where: str) -> str | None:
    """Return the path of an entry that is a folder or file of one machine, as it is written."""
    if (directory := _inner(row, "directory", where=where)) is not None:
        path = _text(directory, "path", where=where) or "."
        inner = _text(directory, "subdirectory", where=where)
        return f"{path.rstrip('/')}/{inner}" if inner else path
    archive = _inner(row, "archive", where=where)
    files = [archive] if archive is not None else list(_files(row, where=where))
    if not files or any("url" in file or "path" not in file for file in files):
        return None
    return _text(files[0], "path", where=where)


def _place(name: str, row: Mapping[str, Any], *, where: str) -> tuple[str, set[str]]:
    """Return an entry as the requirement that it means, without its marker, and its hashes."""
    if (vcs := _inner(row, "vcs", where=where)) is not None:
        return _repository(name, vcs, where=where)
    if (archive := _inner(row, "archive", where=where)) is not None:
        url = _text(archive, "url", where=where)
        if url is None:
            raise InvalidPackages(f"{name}: archive has no url", where=where, hint=_LOCK_HINT)
        folder = _text(archive, "subdirectory", where=where)
        return (
            f"{name} @ {url}" + (f"#subdirectory={folder}" if folder else ""),
            set(_sha256(archive, where=where)),
        )
    files = list(_files(row, where=where))
    if not files:
        raise InvalidPackages(f"{name} has no files", where=where, hint=_LOCK_HINT)
    version = _text(row, "version", where=where)
    if version is None:
        raise InvalidPackages(f"{name} has no version", where=where, hint=_LOCK_HINT)
    return f"{name}=={version}", {h for file in files for h in _sha256(file, where=where)}


def _repository(name: str, vcs: Mapping[str, Any], *, where: str) -> tuple[str, set[str]]:
    kind, url, commit, folder = (
        _text(vcs, key, where=where) for key in ("type", "url", "commit-id", "subdirectory")
    )
    if kind != "git" or url is None or not re.fullmatch(r"[0-9a-fA-F]{40}", commit or ""):
        raise InvalidPackages(
            f"{name} comes from a repository that other nodes cannot read",
            where=where,
            hint='only type = "git" with a url and a commit-id of 40 characters is supported',
        )
    inside = f"subdirectory={folder}" if folder else ""
    pin = f"git:{str(commit).lower()}" + (f":{inside}" if inside else "")
    address = url if url.startswith("git+") else f"git+{url}"
    return f"{name} @ {address}@{commit}" + (f"#{inside}" if inside else ""), {pin}


def _files(row: Mapping[str, Any], *, where: str) -> Iterator[dict[str, Any]]:
    sdist = _inner(row, "sdist", where=where)
    wheels = row.get("wheels", [])
    if not isinstance(wheels, list) or not all(isinstance(each, dict) for each in wheels):
        raise InvalidInput("wheels is not a list of tables", where=where, hint=_LOCK_HINT)
    yield from wheels
    if sdist is not None:
        yield sdist


def _sha256(file: Mapping[str, Any], *, where: str) -> Iterator[str]:
    digest = _text(_inner(file, "hashes", where=where) or {}, "sha256", where=where)
    if digest is not None:
        yield f"sha256:{digest.lower()}"


def _marker(marker: str, groups: set[str]) -> str:
    """Return a marker with the choice of extras and groups made: no extras, the default groups."""

    def chosen(match: re.Match[str]) -> str:
        is_in = match[4].lower() == "dependency_groups" and match[2] in groups
        return _HOLDS if is_in != bool(match[3]) else _FAILS

    return _CHOICE.sub(chosen, marker)
