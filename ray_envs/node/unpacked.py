"""The files of unpacked wheels in uv's cache: listed, hashed, compared with their RECORD."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import os
import posixpath
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from ray_envs.decisions.packs import PackedFile
from ray_envs.node.bytecode import marker_name
from ray_envs.node.uv_cache import UvCache

#: How much of a file is hashed at once, in bytes.
_BUFFER_BYTES = 1024 * 1024
#: How many unpacked wheels this process remembers the hashes of.
_REMEMBERED = 256
_MARKER = "ray_envs-bytecode."
#: How the name of byte-code of this Python ends.
_BYTECODE = f".{sys.implementation.cache_tag}.pyc"


def within(cache: UvCache, path: Path) -> str:
    return path.relative_to(cache.folder).as_posix()


def led_to(link: Path) -> Path:
    return Path(os.path.normpath(link.parent / os.readlink(link)))


def is_compiled(archive: Path) -> bool:
    """Whether its byte-code of this Python is complete."""
    return any((info / marker_name()).is_file() for info in archive.glob("*.dist-info"))


def files_below(archive: Path, is_compiled: bool) -> Iterator[str]:
    """The files of an unpacked wheel that are sent: no marker, whose time is of this node's
    clock, and no byte-code but that of this Python, where it is complete.
    """
    for place, folders, files in os.walk(archive):
        folders.sort()
        is_bytecode = os.path.basename(place) == "__pycache__"
        for name in sorted(files):
            if is_bytecode and not (is_compiled and name.endswith(_BYTECODE)):
                continue
            if not (name.startswith(_MARKER) and place.endswith(".dist-info")):
                yield os.path.join(place, name)


@lru_cache(maxsize=_REMEMBERED)
def hashed(archive: Path, inode: int, is_compiled: bool) -> tuple[PackedFile, ...]:  # noqa: ARG001
    """The files of an archive; its inode stands for another one of the same name."""
    cache = archive.parents[1]
    return tuple(packed(Path(path), cache) for path in files_below(archive, is_compiled))


def packed(path: Path, cache: Path) -> PackedFile:
    made, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with io.FileIO(fd) as file:
        mode = os.fstat(fd).st_mode
        while part := file.read(_BUFFER_BYTES):
            made.update(part)
            size += len(part)
    return PackedFile(
        path=os.path.relpath(path, cache),
        size=size,
        sha256=made.hexdigest(),
        is_executable=bool(mode & 0o100),
    )


def not_as_recorded(folder: Path, archive: str, files: Iterable[PackedFile]) -> str:
    """The reason why an unpacked wheel does not match its RECORD; "" if it does."""
    infos = list(folder.glob("*.dist-info"))
    if len(infos) != 1:
        return f"it has {len(infos)} dist-info folders"
    have = {file.path[len(archive) + 1 :]: file.sha256 for file in files}
    try:
        text = (infos[0] / "RECORD").read_text(encoding="utf-8")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        if not any(row[0] == f"{infos[0].name}/RECORD" for row in rows):
            return "its RECORD is not whole"
        for row in rows:
            path, digest = posixpath.normpath(row[0]), row[1]
            if digest.startswith("sha256=") and not path.endswith(".pyc"):
                coded = digest.removeprefix("sha256=")
                wanted = base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4)).hex()
                if have.get(path) != wanted:
                    return f"{path} does not match its RECORD"
    except FileNotFoundError:
        return "it has no RECORD"
    except (ValueError, IndexError, csv.Error, binascii.Error) as exc:
        return f"its RECORD cannot be read: {exc}"
    return ""
