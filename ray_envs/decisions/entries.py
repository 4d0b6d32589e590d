"""One requirement as people write it, in a file of their own: a name, an address or a local path.

`requirements` checks those with a name or an address; `requirements_file`, `scripts` and `pylocks`
find them in their files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ray_envs.decisions.credentials import check_credentials
from ray_envs.decisions.requirements import requirement_line
from ray_envs.errors import InvalidPackages

_ARCHIVES = (".whl", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?\s*@\s*(\S.*)")


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


def refused(what: str, hint: str, where: str) -> InvalidPackages:
    """Return the error of a line."""
    return InvalidPackages(what, hint=hint, where=where)


def split_address(address: str, *, where: str) -> SplitResult:
    """Return the parts of an address; raise `InvalidPackages` if it has none."""
    try:
        parts = urlsplit(address)
        _ = parts.port  # it is read late, and may be no number
    except ValueError as exc:
        raise refused(f"{address!r} is not an address: {exc}", "correct it", where) from None
    return parts


def is_place(entry: str) -> bool:
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
    if not is_place(entry) or (named and "://" not in place and not _is_path(place)):
        return Wanted(requirement_line(entry, where=where), hashes, where)
    if "://" not in place or place.lower().startswith("file:"):
        if hashes:
            raise refused(
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
            raise refused(
                f"{marker!r} is not a marker: {reason}", 'write it like python_version < "3.12"',
                where,
            ) from None  # fmt: skip
    place, _, fragment = place.partition("#")
    egg, extras = _egg(fragment)
    path, inner = _split_extras(place)
    if path.startswith("file:"):
        path = unquote(split_address(path, where=where).path)
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
    name = egg or _name_of_file(address, where=where)
    if not name:
        raise refused(f"{place!r} does not say what it is", 'write "name @ URL"', where)
    return whole, f"{name}[{','.join(extras)}]" if extras else name


def _name_of_file(address: str, *, where: str) -> str:
    """Return the name of the package in the name of its wheel or source archive; "" if none."""
    file = unquote(split_address(address, where=where).path).rpartition("/")[2]
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
