"""Reads the text of a requirements file, in pip's format: its entries, each with its line.

`entries` has their kinds; `sources` makes a definition of them. The files that it names are read by
the client. The format is that of pip 25's documentation.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from urllib.parse import unquote

from ray_envs.decisions.credentials import check_credentials
from ray_envs.decisions.entries import (
    Entry,
    Include,
    Setting,
    is_place,
    refused,
    requirement,
    split_address,
)
from ray_envs.decisions.requirements import parts_of
from ray_envs.errors import InvalidPackages
from ray_envs.validation import nearest_hint

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


def entries_of(text: str, *, file: str) -> tuple[Entry, ...]:
    """Return the entries of a requirements or constraints file, in their order.

    Args:
        text: the content of the file.
        file: its name, for messages and for the `where` of the entries.

    Raises `InvalidPackages`: a line is malformed, has credentials or cannot be accepted here.
    """
    found: list[Entry] = []
    for number, line in _logical_lines(text):
        found += _from_line(line, where=f"{file}: line {number}")
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


def _from_line(line: str, *, where: str) -> Iterator[Entry]:
    variable = _VARIABLE.search(line)
    if variable is not None:
        raise refused(
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
    for part in [entry] if is_place(entry) else parts_of(entry):
        yield requirement(part, given, where=where)


# -- options


def _words(text: str, *, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as exc:
        raise refused(f"{text!r} cannot be split: {exc}", "close the quote", where) from None


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
            raise refused(f"{written} takes no value", f"write {written} alone", where)
        if name not in _WITH_VALUE:
            raise _unknown(written, where)
        if not value:
            raise refused(f"{written} has no value", f"write {written} VALUE", where)
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
        return refused(
            f"{written!r} stands behind an option", "write it into a line of its own", where
        )
    if written == "--hash":
        return refused("--hash belongs to no requirement", "write it behind one", where)
    if written in _REFUSED:
        return refused(f"{written} cannot be used here", _REFUSED[written], where)
    near = nearest_hint(written, (*_SWITCHES, *_WITH_VALUE))
    hint = near if near.startswith("did") else "leave it out"
    return refused(f"{written} is an option that is not known here", hint, where)


def _include(value: str, *, is_constraint: bool, where: str) -> Include:
    address = split_address(value, where=where)
    scheme = address.scheme if "://" in value else ""
    if scheme and scheme != "file":
        raise refused(
            f"{value} is an address, not a file", "download it, and name the file here", where
        )
    path = unquote(address.path) if scheme else value
    return Include(path, is_constraint, where)


def _editable(value: str, *, where: str) -> Entry:
    # As in pip, a bare word is a folder here.
    return requirement(value if is_place(value) else f"./{value}", (), where=where)


def _check_remote(name: str, value: str, *, where: str) -> None:
    if not re.match(r"https?://", value, re.IGNORECASE):
        raise refused(
            f"{name} {value} is a local path, and other nodes do not have it",
            "serve that folder by http, and write its address here",
            where,
        )
    split_address(value, where=where)


def _hashes(text: str, *, where: str) -> tuple[str, ...]:
    found = []
    for name, value, written in _pairs(text, where=where):
        if name != "--hash":
            raise _unknown(written, where)
        algorithm, _, digest = (value or "").partition(":")
        algorithm, digest = algorithm.lower(), digest.lower()
        if algorithm not in _ALGORITHMS:
            raise refused(
                f"--hash {value}: the algorithm is not one of {', '.join(_ALGORITHMS)}",
                "write --hash=sha256:<64 characters>",
                where,
            )
        if not re.fullmatch(rf"[0-9a-f]{{{_ALGORITHMS[algorithm]}}}", digest):
            raise refused(
                f"--hash {value}: this is not a {algorithm}",
                f"copy all {_ALGORITHMS[algorithm]} hexadecimal characters",
                where,
            )
        found.append(f"{algorithm}:{digest}")
    return tuple(found)
