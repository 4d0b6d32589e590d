"""Reads the text files that people write, in the encodings in which they write them.

`disk.files` reads the bytes; `source_files` knows which file is meant.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from ray_envs.disk.files import read_bytes
from ray_envs.errors import InvalidInput

#: The longest first: the mark of UTF-16 is the beginning of that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY_HINT = "name a text file; a wheel or an archive belongs on a package index"
#: The comment with the encoding of a file (PEP 263).
_CODING = re.compile(rb"[ \t\f]*#.*?coding[:=][ \t]*([-_.a-zA-Z0-9]+)")


def read_utf8(path: Path) -> str:
    """Return the text of `path` with `\\n` as line ends and without a byte order mark.

    Raises `InvalidInput`: it cannot be read, or is not UTF-8.
    """
    return _decoded(read_bytes(path), "utf-8-sig", path).replace("\r\n", "\n")


def read_text(path: Path) -> str:
    """Return the text of `path` with `\\n` as line ends: UTF-8, or as its beginning says.

    A byte order mark says so, or a comment such as `# -*- coding: latin-1 -*-` in the first two
    lines.

    Raises `InvalidInput`: it cannot be read, is not a text, or has another encoding.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "")
    if not encoding and b"\0" in content:
        raise InvalidInput("it is a binary file, not a text", where=str(path), hint=_BINARY_HINT)
    if not encoding:
        encoding = _declared(content, path)
    text = _decoded(content, encoding, path).removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _declared(content: bytes, path: Path) -> str:
    for number, line in enumerate(content.splitlines()[:2], start=1):
        found = _CODING.match(line)
        if found is not None:
            name = found[1].decode()
            try:
                content.decode(name)
            except LookupError:  # also raised by codecs that make no text
                raise InvalidInput(
                    f"line {number} names the encoding {name!r}, which is not known",
                    where=str(path),
                    hint="save the file as UTF-8, and remove that comment",
                ) from None
            except UnicodeError as err:
                raise _undecodable(content, name, err, path) from None
            return name
    return "utf-8"


def _decoded(content: bytes, encoding: str, path: Path) -> str:
    try:
        return content.decode(encoding)
    except UnicodeError as err:
        raise _undecodable(content, encoding, err, path) from None


def _undecodable(content: bytes, encoding: str, err: UnicodeError, path: Path) -> InvalidInput:
    shown = "UTF-8" if encoding.startswith("utf-8") else encoding
    start = err.start if isinstance(err, UnicodeDecodeError) else 0
    line = content.count(b"\n", 0, start) + 1
    return InvalidInput(
        f"line {line} is not {shown}", where=str(path), hint="save the file as UTF-8"
    )
