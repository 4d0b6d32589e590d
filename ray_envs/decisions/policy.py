"""What may stand in a definition or a lock, and what may be shown.

Pure: texts in, values or errors out; no disk, no processes, no clock. `resolving`, above, refuses
what cannot work on every node; here is refused what the operator does not allow (`settings`), and
what is a secret. Formats come from elsewhere: `[tool.uv]` and `uv.lock` from uv 0.13.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement

from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import Definition
from ray_envs.settings import Settings, cut_off

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)")
#: The user and password of a URL. The second form is a password with a slash in it, of which uv
#: takes the first part for a port, and repeats the whole.
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]+|(?!\[)[^/\s:@]*:(?!\d*(?:[/?#\s,'\"`()<>]|$))\S*)@")
#: Parameters of a URL that let somebody in. uv hides a few of them, and those not everywhere.
_SECRET_PARAMETER = re.compile(
    r"([?&](?:[\w.-]*(?:token|passw(?:or)?d|secret|signature|credential|api[_-]?key)|sig)=)"
    r"[^\s&#'\"`()<>]+",
    re.IGNORECASE,
)
#: Nothing of uv prints these, but the words of a build back end come through it.
_HEADER = re.compile(r"(\bauthorization:\s*(?:(?:basic|bearer|token)\s+)?)[^\s'\"]+", re.IGNORECASE)

#: Names of variables that hold secrets for sure. `_KEY` alone would be half of all cache keys.
_SECRET_NAME = re.compile(
    r".*PASSWORD|.*PASSWD|(.*_)?(TOKEN|SECRET|API_?KEY|(ACCESS|SECRET|PRIVATE)_KEY)"
    r"|UV_INDEX_.*_USERNAME|UV_PUBLISH_USERNAME",
    re.IGNORECASE,
)
#: Values that are no secrets, whatever the name: switches, numbers, files that hold the secret.
_PLAIN_VALUE = re.compile(
    r"|\d+|true|false|yes|no|on|off|none|null|enabled|disabled|[~./].*|[a-z]:\\.*|file:.*",
    re.IGNORECASE,
)
#: What a token looks like. Those of language models ("[PAD]", "<eos>") are not that.
_TOKEN_VALUE = re.compile(r"[\w.~+/=:-]{8,}")

_CREDENTIALS_HINT = (
    "put them into a netrc file or a keyring on the nodes, or set "
    "UV_INDEX_<NAME>_USERNAME and UV_INDEX_<NAME>_PASSWORD there"
)
_ENV_VARS_HINT = (
    "Ray logs env_vars in plain text: set it in the environment of the cluster's nodes, "
    "where workers inherit it, or give the path of a file that holds it"
)
#: Where [tool.uv] and [project] hold requirements.
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


def redacted(text: str) -> str:
    """`text` without the credentials of its URLs and headers; the rest of a URL stays readable."""
    text = _CREDENTIALS.sub("***@", text)
    return _HEADER.sub(r"\1***", _SECRET_PARAMETER.sub(r"\1***", text))


def check_credentials(text: str, error: _Error, *, where: str) -> None:
    """Refuse a user name, password or token in a URL of `text`, without repeating it.

    Args:
        text: a requirement, or a value of a project file.
        error: the class that is raised.
        where: the file or option that holds it, for messages.
    """
    is_secret = "://" in text and _SECRET_PARAMETER.search(text) is not None
    for scheme, authority in _URL.findall(text):
        user, has_user, host = authority.rpartition("@")
        # A password with a slash in it ends the authority early: what is left is no port.
        is_cut_short = re.search(r":(?!\d*$)[^\]]*$", host)
        # ssh://git@host is how everybody logs in; the secret is a key elsewhere.
        is_login = scheme.lower().endswith("ssh") and ":" not in user
        is_secret = is_secret or bool(is_cut_short) or bool(has_user and not is_login)
    if is_secret:
        raise _secret_url(text, error, where=where)


def check_env_vars(env_vars: Mapping[str, str], *, where: str) -> None:
    """Refuse secrets in the variables of a spec, without repeating them.

    Only what is sure: a URL with a password or token (a bare user name only for http, where it is
    one: elsewhere it is a login or, as in abfss://, a folder), and variables whose name says
    secret and whose value is neither a switch, a number nor the path of a file.

    Raises:
        InvalidInput: naming the variable, never its value.
    """
    for name, value in env_vars.items():
        place = _place(where, f"env_vars.{name}")
        for scheme, authority in _URL.findall(value):
            user = authority.rpartition("@")[0]
            if user.partition(":")[2] or (user and scheme.lower().startswith("http")):
                raise _secret_url(value, InvalidInput, where=place)
        if "://" in value and _SECRET_PARAMETER.search(value):
            raise _secret_url(value, InvalidInput, where=place)
        is_plain = _PLAIN_VALUE.fullmatch(value) or (
            name.upper().endswith("TOKEN") and not _TOKEN_VALUE.fullmatch(value)
        )
        if _SECRET_NAME.fullmatch(name) and not is_plain:
            raise InvalidInput(f"{name} looks like a secret", where=place, hint=_ENV_VARS_HINT)


def check_definition(definition: Definition, settings: Settings, *, where: str) -> Definition:
    """`definition` as the operator's settings make it, if they admit it.

    Args:
        definition: a spec with the texts of its files.
        settings: sources and indexes that are allowed, wheels only, the cut-off date.
        where: the file or option that holds the spec, for messages.

    Returns:
        The definition with the default cut-off, and with `only_binary` where either asks for it.

    Raises:
        InvalidPackages: a requirement from a source that is not allowed.
        InvalidInput: a source, an index or a cut-off of the project that is not allowed; a secret
            in env_vars; a project that is no TOML.
    """
    check_env_vars(definition.env_vars, where=where)
    for text in definition.packages:
        _check_requirement(text, settings, where=_place(where, "packages"))
    project = _toml(definition.pyproject or "", where=_place(where, "pyproject.toml"))
    _check_project(project, settings, where=_place(where, "pyproject.toml"))
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
        # A cut-off of the project's own holds as well; ours would replace it with a later one.
        elif "exclude-newer" not in _table(project, "tool", "uv"):
            changed["exclude_newer"] = limit
    return definition.model_copy(update=changed)


def check_lock(lock: str, settings: Settings, *, only_binary: bool = False) -> None:
    """Nothing, if all that `lock` names comes from where the operator's settings allow.

    The last word: it sees what the variables of uv's process and a lock that was kept brought in.
    Sources are checked, not the addresses of files: an index may keep its files elsewhere.

    Args:
        lock: the text of the uv.lock that a resolution left.
        settings: sources and indexes that are allowed, wheels only.
        only_binary: whether the spec asks for wheels only.

    Raises:
        InvalidPackages: a package from elsewhere, or without a wheel where only wheels are allowed.
        InvalidInput: `lock` is no TOML.
    """
    for package in _toml(lock, where="uv.lock").get("package", []):
        source = package.get("source", {})
        kind, at = next(iter(source.items()), ("registry", ""))
        if kind == "virtual" and at == ".":
            continue
        name = " ".join([package.get("name", "?"), package.get("version", "")]).strip()
        what = f"{name} comes from {kind} {redacted(str(at))}"
        if kind == "registry":
            if "://" not in at:
                raise _refused_local(what, InvalidPackages, where="uv.lock")
            _check_index(at, settings, InvalidPackages, what=what, where="uv.lock")
        else:
            _check_source(kind, settings, InvalidPackages, what=what, where="uv.lock")
        if (only_binary or settings.only_binary) and not package.get("wheels"):
            raise InvalidPackages(
                f"{name} has no wheel, and nothing may be built from source",
                where="uv.lock",
                hint="publish a wheel of it, choose a version that has one, or allow builds "
                "(only_binary of the spec, RAY_ENVS_ONLY_BINARY)",
            )


def _place(*parts: str) -> str:
    return ": ".join(part for part in parts if part)


def _secret_url(text: str, error: _Error, *, where: str) -> InvalidInput | InvalidPackages:
    return error(
        f"credentials in a URL ({text.partition('://')[0][:80]}://…)",
        where=where,
        hint=_CREDENTIALS_HINT,
    )


def _toml(text: str, *, where: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidInput(f"not valid TOML: {exc}", where=where) from None
    return data


def _at(data: Any, *path: str) -> Any:
    """What stands at `path`, or an empty table."""
    for part in path:
        data = data.get(part, {}) if isinstance(data, dict) else {}
    return data


def _table(data: Any, *path: str) -> dict[str, Any]:
    """The table at `path`; empty for anything else, which `resolving` refuses."""
    found = _at(data, *path)
    return found if isinstance(found, dict) else {}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


# -- projects


def _check_project(project: Mapping[str, Any], settings: Settings, *, where: str) -> None:
    for path in _REQUIREMENT_TABLES:
        for text in _strings(_at(project, *path)):
            _check_requirement(text, settings, where=_place(where, ".".join(path)))
    uv = _table(project, "tool", "uv")
    for name, given in _table(uv, "sources").items():
        for source in given if isinstance(given, list) else [given]:
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
        return  # `resolving` says what is wrong with it
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
    return error(
        f"{what}, and other nodes do not have it",
        where=where,
        hint="build a wheel, publish it to an index that every node reaches, and name it",
    )


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
    """`url` such that equal indexes are equal texts: no credentials, no slash at the end."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return url
    if "\\" in url:  # uv reads it as a slash, and so another host
        return url
    scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS.get(scheme):
        host += f":{port}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{scheme}://{host}{parts.path.rstrip('/')}{query}"


# -- cut-offs


def _cut_offs(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every cut-off below [tool.uv]: uv knows one for all, for a package and for an index."""
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
    # TOML has moments of its own; `false` is how uv exempts a package.
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


__all__ = [
    "check_credentials",
    "check_definition",
    "check_env_vars",
    "check_lock",
    "normalised",
    "redacted",
]
