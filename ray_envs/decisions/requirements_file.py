"""Reads the text of a requirements file, in pip's format: its entries, each with its line.

`requirements` checks each requirement; `sources` makes a definition of the entries. The files that
it names are read by the client. The format is that of pip 25's documentation.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ray_envs.decisions.credentials import check_credentials
from ray_envs.decisions.requirements import parts_of, requirement_line
from ray_envs.errors import InvalidPackages
from ray_envs.validation import nearest_hint


@dataclass(frozen=True, slots=True)
class Wanted:
    """A requirement, or in a constraints file a constraint."""

    #: In the form of `requirements.requirement_line`.
    line: str
    #: As written, such as "sha256:<hex>".
    hashes: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class Local:
    """A folder or file of the machine that the requirements are read on."""

    #: As it is written, relative to the file that names it; the address of a file becomes a path.
    path: str
    extras: tuple[str, ...]
    marker: str
    name: str | None
    where: str


@dataclass(frozen=True, slots=True)
class Include:
    """Another file, relative to the one that names it."""

    path: str
    is_constraint: bool
    where: str


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that concerns all requirements, such as "--index-url"."""

    name: str
    value: str
    where: str


Entry = Wanted | Local | Include | Setting

_SWITCHES = ("--no-index", "--pre", "--prefer-binary", "--require-hashes")
_WITH_VALUE = (
    "--requirement", "--constraint", "--editable", "--index-url", "--extra-index-url",
    "--find-links", "--no-binary", "--only-binary",
)  # fmt: skip
_SHORT = {
    "-r": "--requirement",
    "-c": "--constraint",
    "-e": "--editable",
    "-i": "--index-url",
    "-f": "--find-links",
}
_ALIASES = {"--pypi-url": "--index-url"}
_BACKEND_HINT = "write [tool.uv] config-settings-package in a project, or publish a wheel"
_REFUSED = {
    "--trusted-host": "set UV_INSECURE_HOST in the environment of the cluster's nodes",
    "--config-settings": _BACKEND_HINT,
    "--config-setting": _BACKEND_HINT,
    "-C": _BACKEND_HINT,
    "--global-option": "uv builds without setup.py's options: publish a wheel",
    "--build-option": "uv builds without setup.py's options: publish a wheel",
    "--install-option": "uv installs without setup.py's options: publish a wheel",
    "--use-feature": "leave it out: uv has no switches of pip",
    "--use-deprecated": "leave it out: uv has no switches of pip",
    "--all-releases": "write --pre, or a version such as x>=2.0rc1 for one package",
    "--only-final": "leave it out: uv takes final releases unless a version says otherwise",
    "--no-deps": "leave it out: an environment has what its packages need",
    "--no-build-isolation": "write [tool.uv] no-build-isolation-package in a project",
    "--proxy": "set HTTPS_PROXY in the environment of the cluster's nodes",
    "--cert": "set SSL_CERT_FILE in the environment of the cluster's nodes",
    "--client-cert": "set SSL_CLIENT_CERT in the environment of the cluster's nodes",
    "--timeout": "set UV_HTTP_TIMEOUT in the environment of the cluster's nodes",
    "--retries": "set UV_HTTP_RETRIES in the environment of the cluster's nodes",
}
_VARIABLE = re.compile(r"\$\{[A-Z0-9_]+\}")
_COMMENT = re.compile(r"(^|\s+)#.*$")
#: The algorithms that pip accepts, and how many hex characters they have.
_ALGORITHMS = {"sha256": 64, "sha384": 96, "sha512": 128}
_ARCHIVES = (".whl", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?\s*@\s*(\S.*)")


def entries(text: str, *, file: str) -> tuple[Entry, ...]:
    """Return the entries of a requirements or constraints file, in their order.

    Args:
        text: the content of the file.
        file: its name, for messages and for the `where` of the entries.

    Raises `InvalidPackages`: a line is malformed, has credentials or cannot be accepted here.
    """
    found: list[Entry] = []
    for number, line in _logical_lines(text):
        found += _entries_of(line, where=f"{file}: line {number}")
    return tuple(found)


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line, without comments, with continued lines joined."""
    pending, first = "", 0
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), start=1):
        first = first if pending else number
        # As in pip, a comment is never continued, and ends what was.
        is_comment = line.lstrip().startswith("#")
        if line.endswith("\\") and not is_comment:
            pending += line[:-1] or " "
            continue
        whole = _COMMENT.sub("", pending + ("" if is_comment else line)).strip()
        pending = ""
        if whole:
            yield first, whole
    if pending.strip():
        yield first, pending.strip()


def _entries_of(line: str, *, where: str) -> Iterator[Entry]:
    variable = _VARIABLE.search(line)
    if variable is not None:
        raise _refused(
            f"the variable {variable[0]} is not replaced",
            "write the value out; the nodes have the credentials of an index in "
            "UV_INDEX_<NAME>_USERNAME and UV_INDEX_<NAME>_PASSWORD",
            where,
        )
    # This comes before all else, so that no later message can repeat a secret.
    check_credentials(line, InvalidPackages, where=where)
    if line.startswith("-"):
        yield from _options(line, where=where)
        return
    start = re.search(r"\s(?=--?[A-Za-z])", line)
    given = _hashes(line[start.end() :], where=where) if start else ()
    entry = line[: start.start()].strip() if start else line
    for part in [entry] if _is_place(entry) else parts_of(entry):
        yield requirement(part, given, where=where)


def _refused(what: str, hint: str, where: str) -> InvalidPackages:
    return InvalidPackages(what, hint=hint, where=where)


# -- options


def _words(text: str, *, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise _refused(f"{text!r} cannot be split: {exc}", "close the quote", where) from None


def _pairs(text: str, *, where: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield (option as written, value joined to it or None, the next word or "") of a line."""
    words = _words(text, where=where)
    while words:
        word = words.pop(0)
        if word.startswith("--") or not word.startswith("-"):
            option, joined, value = word.partition("=")
        else:
            option, joined, value = word[:2], word[2:], word[2:].removeprefix("=")
        name = _SHORT.get(option, _ALIASES.get(option, option))
        takes_next = not joined and (name in _WITH_VALUE or name == "--hash")
        if takes_next and name == "--editable":  # `name @ URL` and markers have spaces
            value, words = " ".join(words), []
        elif takes_next:
            value = words.pop(0) if words else ""
        yield name, value if joined or takes_next else None, option


def _options(line: str, *, where: str) -> Iterator[Entry]:
    for name, value, written in _pairs(line, where=where):
        if name in _SWITCHES and value is None:
            yield Setting(name, "", where)
            continue
        if name in _SWITCHES:
            raise _refused(f"{written} takes no value", f"write {written} alone", where)
        if name not in _WITH_VALUE:
            raise _unknown(written, where)
        if not value:
            raise _refused(f"{written} has no value", f"write {written} VALUE", where)
        if name in ("--requirement", "--constraint"):
            yield _include(value, is_constraint=name == "--constraint", where=where)
        elif name == "--editable":
            yield _editable(value, where=where)
        else:
            if name in ("--index-url", "--extra-index-url", "--find-links"):
                _check_remote(name, value, where=where)
            yield Setting(name, value, where)


def _unknown(written: str, where: str) -> InvalidPackages:
    if written == "-" or not written.startswith("-"):
        return _refused(
            f"{written!r} stands behind an option", "write it into a line of its own", where
        )
    if written == "--hash":
        return _refused("--hash belongs to no requirement", "write it behind one", where)
    if written in _REFUSED:
        return _refused(f"{written} cannot be used here", _REFUSED[written], where)
    near = nearest_hint(written, (*_SWITCHES, *_WITH_VALUE))
    hint = near if near.startswith("did") else "leave it out"
    return _refused(f"{written} is an option that is not known here", hint, where)


def _include(value: str, *, is_constraint: bool, where: str) -> Include:
    scheme = urlsplit(value).scheme if "://" in value else ""
    if scheme and scheme != "file":
        raise _refused(
            f"{value} is an address, not a file", "download it, and name the file here", where
        )
    path = unquote(urlsplit(value).path) if scheme else value
    return Include(path, is_constraint, where)


def _editable(value: str, *, where: str) -> Entry:
    if not _is_place(value):  # as in pip, a bare word behind -e is a folder
        if "://" in value:
            return requirement(value, (), where=where)
        value = f"./{value}"
    return requirement(value, (), where=where)


def _check_remote(name: str, value: str, *, where: str) -> None:
    if not re.match(r"https?://", value, re.IGNORECASE):
        raise _refused(
            f"{name} {value} is a local path, and other nodes do not have it",
            "serve that folder by http, and write its address here",
            where,
        )


def _hashes(text: str, *, where: str) -> tuple[str, ...]:
    found = []
    for name, value, written in _pairs(text, where=where):
        if name != "--hash":
            raise _unknown(written, where)
        algorithm, _, digest = (value or "").partition(":")
        algorithm, digest = algorithm.lower(), digest.lower()
        if algorithm not in _ALGORITHMS:
            raise _refused(
                f"--hash {value}: the algorithm is not one of {', '.join(_ALGORITHMS)}",
                "write --hash=sha256:<64 characters>",
                where,
            )
        if not re.fullmatch(rf"[0-9a-f]{{{_ALGORITHMS[algorithm]}}}", digest):
            raise _refused(
                f"--hash {value}: this is not a {algorithm}",
                f"copy all {_ALGORITHMS[algorithm]} hexadecimal characters",
                where,
            )
        found.append(f"{algorithm}:{digest}")
    return tuple(found)


# -- requirements


def _is_place(entry: str) -> bool:
    """Whether an entry is an address or a path, with or without a name before it."""
    head = _without_marker(entry)[0]
    return (
        re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|file:|\.|/|~|\\|[A-Za-z]:\\", head) is not None
        or _NAMED.fullmatch(head) is not None
        or ("@" not in head and "/" in head.partition("[")[0])
        or head.partition("[")[0].lower().endswith(_ARCHIVES)
    )


def _without_marker(entry: str) -> tuple[str, str]:
    """Return an entry without its marker, and the marker; an address may contain a semicolon."""
    pattern = r"\s+;\s*|;\s+" if "://" in entry else r"\s*;\s*"
    head, *rest = re.split(pattern, entry, maxsplit=1)
    return head.strip(), rest[0].strip() if rest else ""


def requirement(entry: str, hashes: tuple[str, ...], *, where: str) -> Wanted | Local:
    """Return one requirement as an entry. It may be an address or a path without a name.

    Raises `InvalidPackages`: it is malformed, has credentials or cannot be accepted here.
    """
    check_credentials(entry, InvalidPackages, where=where)
    head, marker = _without_marker(entry)
    named = _NAMED.fullmatch(head)
    place = named[3] if named else head
    if not _is_place(entry) or (named and "://" not in place and not _is_path(place)):
        return Wanted(requirement_line(entry, where=where), hashes, where)
    if "://" not in place or place.lower().startswith("file:"):
        if hashes:
            raise _refused(
                f"{head!r} is a local path with a hash",
                "hashes are compared with files of an index: publish a wheel of it there",
                where,
            )
        return _local(place, named, marker, where=where)
    address, name = _address(place, named, where=where)
    line = f"{name} @ {address}" + (f" ; {marker}" if marker else "")
    return Wanted(requirement_line(line, where=where), hashes, where)


def _is_path(place: str) -> bool:
    return place.startswith("file:") or not re.search(r"\s", place)


def _local(place: str, named: re.Match[str] | None, marker: str, *, where: str) -> Local:
    if marker:
        try:
            Requirement(f"x ; {marker}")
        except InvalidRequirement as exc:
            reason = str(exc).splitlines()[0]
            raise _refused(
                f"{marker!r} is not a marker: {reason}", 'write it like python_version < "3.12"',
                where,
            ) from None  # fmt: skip
    place, _, fragment = place.partition("#")
    egg, extras = _egg(fragment)
    path, inner = _split_extras(place)
    if path.startswith("file:"):
        path = unquote(urlsplit(path).path)
    names = (*_listed(named[2] if named else None), *extras, *inner)
    name = named[1] if named else egg
    return Local(
        path=path,
        extras=tuple(sorted({str(canonicalize_name(each)) for each in names})),
        marker=marker,
        name=str(canonicalize_name(name)) if name else None,
        where=where,
    )


def _split_extras(place: str) -> tuple[str, tuple[str, ...]]:
    found = re.fullmatch(r"(.+?)\s*\[([^\[\]]*)\]", place)
    return (found[1], _listed(found[2])) if found else (place, ())


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(each.strip() for each in (text or "").split(",") if each.strip())


def _egg(fragment: str) -> tuple[str, tuple[str, ...]]:
    """Return the name and the extras in the `egg=` of an address."""
    for part in fragment.split("&"):
        key, _, value = part.partition("=")
        if key == "egg":
            name, extras = _split_extras(unquote(value))
            return name, extras
    return "", ()


def _address(place: str, named: re.Match[str] | None, *, where: str) -> tuple[str, str]:
    """Return the address of a requirement without `egg=`, and its name with extras."""
    address, _, fragment = place.partition("#")
    egg, extras = _egg(fragment)
    kept = "&".join(part for part in fragment.split("&") if part and not part.startswith("egg="))
    whole = f"{address}#{kept}" if kept else address
    if named:
        return whole, f"{named[1]}[{named[2]}]" if named[2] else named[1]
    name = egg or _name_of_file(address)
    if not name:
        raise _refused(f"{place!r} does not say what it is", 'write "name @ URL"', where)
    return whole, f"{name}[{','.join(extras)}]" if extras else name


def _name_of_file(address: str) -> str:
    """Return the name of the package in the name of its wheel or source archive; "" if none."""
    file = unquote(urlsplit(address).path).rpartition("/")[2]
    if address.lower().startswith("git+"):
        return ""
    if file.endswith(".whl"):
        try:
            return str(parse_wheel_filename(file)[0])
        except InvalidWheelFilename:
            return ""
    stem = next((file[: -len(end)] for end in _ARCHIVES if file.endswith(end)), "")
    found = re.fullmatch(r"(.+)-v?\d[^-]*", stem)
    return str(canonicalize_name(found[1])) if found else ""
