"""Checks definitions and lock files against the operator's settings.

`resolving` refuses what cannot work on every node, `credentials` refuses secrets. `[tool.uv]` and
`uv.lock` have the formats of uv 0.9 to 0.13.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement

from ray_envs.decisions.credentials import check_env_vars, check_file, redacted
from ray_envs.decisions.parsing import parsed_toml, strings
from ray_envs.decisions.requirements import LOCAL_HINT
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.settings import Settings, cut_off
from ray_envs.specs import Definition, LocalWheel

#: The places of requirements in a pyproject.toml.
_REQUIREMENT_TABLES = (
    ("project", "dependencies"),
    ("project", "optional-dependencies"),
    ("dependency-groups",),
    ("tool", "uv", "constraint-dependencies"),
    ("tool", "uv", "override-dependencies"),
    ("tool", "uv", "build-constraint-dependencies"),
    ("tool", "uv", "dev-dependencies"),
    ("tool", "uv", "extra-build-dependencies"),
)
_INDEX_KEYS = ("index", "index-url", "extra-index-url", "find-links")
_LOCAL_SOURCES = ("path", "directory", "editable", "virtual", "workspace")
_DEFAULT_PORTS = {"http": 80, "https": 443}

_Error = Callable[..., InvalidInput | InvalidPackages]


def check_definition(definition: Definition, settings: Settings, *, where: str) -> Definition:
    """Check that the operator's settings allow a definition, and complete it from them.

    Returns:
        The definition with the operator's cut-off if it has none, and with `only_binary` if the
        definition or the settings have it.

    Raises:
        InvalidPackages: a requirement has a source that is not allowed.
        InvalidInput: the project has a source, an index or a cut-off that is not allowed, or is not
            TOML; or a file or env_vars hold a secret.
    """
    check_env_vars(definition.env_vars, where=where)
    for wheel in definition.wheels:
        _check_source(
            "local", settings, InvalidPackages, what=f"{wheel.name} is a local package", where=where
        )
    for text in definition.packages:
        _check_requirement(text, settings, where=_place(where, "packages"))
    project = parsed_toml(definition.pyproject or "", where=_place(where, "pyproject.toml"))
    local = {wheel.path for wheel in definition.wheels}
    _check_project(project, settings, local, where=_place(where, "pyproject.toml"))
    check_file(definition.pyproject or "", where=_place(where, "pyproject.toml"))
    check_file(definition.uv_lock or "", where=_place(where, "uv.lock"))
    changed: dict[str, Any] = {"only_binary": definition.only_binary or settings.only_binary}
    if definition.exclude_newer is not None:
        try:
            cut_off(definition.exclude_newer)
        except ValueError as exc:
            raise InvalidInput(
                str(exc),
                where=_place(where, "exclude_newer"),
                hint="write it like 2026-01-31 or 2026-01-31T12:00:00Z",
            ) from None
    if settings.exclude_newer is not None:
        limit = settings.exclude_newer
        if definition.exclude_newer is not None:
            place = _place(where, "exclude_newer")
            _check_cut_off(definition.exclude_newer, limit, where=place)
        # If the project has a cut-off, keep it: ours could only be later.
        elif "exclude-newer" not in _table(project, "tool", "uv"):
            changed["exclude_newer"] = limit
    return definition.model_copy(update=changed)


def check_lock(
    lock: str, settings: Settings, *, only_binary: bool = False, wheels: Iterable[LocalWheel] = ()
) -> None:
    """Check that the operator's settings allow the sources of all packages in a lock.

    This is the last check: it also sees packages that came from UV_* variables or from the user's
    own lock. It checks sources, not the addresses of files: an index may keep its files elsewhere.

    Raises:
        InvalidPackages: a package has another source, or no wheel and only wheels are allowed.
        InvalidInput: `lock` is not TOML, or a URL in it has credentials.
    """
    local = {wheel.path for wheel in wheels}
    for package in parsed_toml(lock, where="uv.lock").get("package", []):
        source = package.get("source", {})
        kind, at = next(iter(source.items()), ("registry", ""))
        if (kind, at) == ("virtual", ".") or (kind == "path" and at in local):
            continue
        name = " ".join([package.get("name", "?"), package.get("version", "")]).strip()
        what = f"{name} comes from {kind} {redacted(str(at))}"
        if kind == "registry":
            if "://" not in at:
                raise _refused_local(what, InvalidPackages, where="uv.lock")
            _check_index(at, settings, InvalidPackages, what=what, where="uv.lock")
            _check_files(package, at, what=name)
        else:
            _check_source(kind, settings, InvalidPackages, what=what, where="uv.lock")
        if (only_binary or settings.only_binary) and not package.get("wheels"):
            raise InvalidPackages(
                f"{name} has no wheel, and building from source is not allowed",
                where="uv.lock",
                hint="publish a wheel of it, choose a version that has one, or allow builds "
                "(only_binary of the spec, RAY_ENVS_ONLY_BINARY)",
            )
    check_file(lock, where="uv.lock")


def _check_files(package: Mapping[str, Any], registry: str, *, what: str) -> None:
    """Refuse files that are fetched less safely than their index is read.

    Their host may be another one: many indexes keep files elsewhere, and a hash pins each.
    """
    safe = {"https", urlsplit(registry).scheme.lower()}
    for url in file_urls(package):
        scheme = urlsplit(url).scheme.lower()
        if scheme and scheme not in safe:
            raise InvalidPackages(
                f"a file of {what} is fetched by {scheme} ({redacted(url)[:200]})",
                where="uv.lock",
                hint="lock the project again with `uv lock`, and take locks from whom you trust",
            )


def file_urls(package: Mapping[str, Any]) -> Iterator[str]:
    """Yield the URL of every file of a package in a lock."""
    sdist = package.get("sdist")
    for file in [*package.get("wheels", ()), *([sdist] if sdist else ())]:
        if isinstance(file, dict) and isinstance(url := file.get("url"), str):
            yield url


def file_hosts(lock: str) -> list[str]:
    """Return the hosts from which a node that lacks a file of `lock` fetches it, sorted."""
    packages = parsed_toml(lock, where="uv.lock").get("package", [])
    urls = (url for package in packages for url in file_urls(package))
    return sorted({host for url in urls if (host := urlsplit(url).hostname)})


def _place(*parts: str) -> str:
    return ": ".join(part for part in parts if part)


def _at(data: Any, *path: str) -> Any:
    """Return the value at `path`, or an empty table."""
    for part in path:
        data = data.get(part, {}) if isinstance(data, dict) else {}
    return data


def _table(data: Any, *path: str) -> dict[str, Any]:
    """Return the table at `path`; an empty one for another value, which `resolving` refuses."""
    found = _at(data, *path)
    return found if isinstance(found, dict) else {}


def _check_project(
    project: Mapping[str, Any], settings: Settings, local: Collection[str], *, where: str
) -> None:
    for path in _REQUIREMENT_TABLES:
        for text in strings(_at(project, *path)):
            _check_requirement(text, settings, where=_place(where, ".".join(path)))
    uv = _table(project, "tool", "uv")
    for name, given in _table(uv, "sources").items():
        for source in given if isinstance(given, list) else [given]:
            given_path = _table(source).get("path")
            if isinstance(given_path, str) and given_path in local:
                continue
            for kind in sorted({"git", "url", *_LOCAL_SOURCES} & _table(source).keys()):
                what = f"{name} comes from {kind} {redacted(str(source[kind]))}"
                place = _place(where, f"tool.uv.sources.{name}")
                _check_source(kind, settings, InvalidInput, what=what, where=place)
    for key in _INDEX_KEYS:
        given = _at(uv, key)
        for entry in given if isinstance(given, list) else [given] if given else []:
            url = str(entry.get("url", "") if isinstance(entry, dict) else entry)
            what = f"the index {redacted(url)} is named"
            place = _place(where, f"tool.uv.{key}")
            _check_index(url, settings, InvalidInput, what=what, where=place)
    if settings.exclude_newer is not None:
        for name, text in _cut_offs(uv, "tool.uv"):
            _check_cut_off(text, settings.exclude_newer, where=_place(where, name))


def _check_requirement(text: str, settings: Settings, *, where: str) -> None:
    try:
        url = Requirement(text).url
    except InvalidRequirement:
        return  # `resolving` raises the error
    if url is not None:
        kind = "git" if url.lower().startswith("git+") else "url"
        what = f"{redacted(text)!r} comes from {kind}"
        _check_source(kind, settings, InvalidPackages, what=what, where=where)


def _check_source(kind: str, settings: Settings, error: _Error, *, what: str, where: str) -> None:
    if kind in _LOCAL_SOURCES:
        raise _refused_local(what, error, where=where)
    if kind not in settings.allowed_sources:
        allowed = ", ".join(settings.allowed_sources) or "indexes only"
        raise error(
            f"{what}, which is not allowed",
            where=where,
            hint="publish a wheel to a package index and name it by its version, or let the "
            f"operator add {kind} to RAY_ENVS_ALLOWED_SOURCES (now: {allowed})",
        )


def _refused_local(what: str, error: _Error, *, where: str) -> InvalidInput | InvalidPackages:
    return error(f"{what}, and other nodes do not have it", where=where, hint=LOCAL_HINT)


def _check_index(url: str, settings: Settings, error: _Error, *, what: str, where: str) -> None:
    allowed = settings.allowed_indexes
    if allowed and normalised(url) not in {normalised(each) for each in allowed}:
        raise error(
            f"{what}, which is not allowed",
            where=where,
            hint=f"use {' or '.join(allowed)}, or let the operator add this one to "
            "RAY_ENVS_ALLOWED_INDEXES",
        )


def normalised(url: str) -> str:
    """Return the one spelling of an index URL: lower case host, no credentials, no final slash."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return url
    if "\\" in url:  # uv reads it as a slash, which makes another host
        return url
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS.get(scheme):
        host += f":{port}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{host}{parts.path.rstrip('/')}{query}"


def _cut_offs(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every cut-off below [tool.uv]: general, of a package, of an index."""
    if isinstance(value, list):
        for inner in value:
            yield from _cut_offs(inner, place)
    elif isinstance(value, dict):
        for name, inner in value.items():
            here = f"{place}.{name}"
            if not name.startswith("exclude-newer"):
                yield from _cut_offs(inner, here)
            elif isinstance(inner, dict):
                yield from (
                    (f"{here}.{package}", _as_text(each)) for package, each in inner.items()
                )
            else:
                yield here, _as_text(inner)


def _as_text(value: Any) -> str:
    # TOML has dates; `false` exempts a package in uv.
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _check_cut_off(text: str, limit: str, *, where: str) -> None:
    try:
        is_admitted, said = cut_off(text) <= cut_off(limit), f"{text} is later than {limit}"
    except ValueError:
        is_admitted, said = False, f"{text!r} cannot be compared with {limit}"
    if not is_admitted:
        raise InvalidInput(
            f"{said}, the latest cut-off that is allowed",
            where=where,
            hint=f"give a date up to {limit}, leave it out, or let the operator change "
            "RAY_ENVS_EXCLUDE_NEWER",
        )
