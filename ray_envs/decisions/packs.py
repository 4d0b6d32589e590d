"""Describes the wheels that nodes send to each other and that bundles contain.

A peer or a bundle may be wrong or hostile, so every description is checked: paths stay below the
cache, and sizes add up. `node.sending` and `node.receiving` move them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ray_envs.models import Installed
from ray_envs.validation import Model, validated

#: How much is read, sent and kept in memory at once. A guess: Ray's own chunks are 5 MiB.
CHUNK_BYTES = 8 * 1024 * 1024
_MAX_CHUNK_BYTES = 256 * 1024 * 1024

#: The path of an unpacked wheel, relative to a uv cache.
ARCHIVE = re.compile(r"archive-v\d+/[A-Za-z0-9_-]+")
_BUCKET = re.compile(r"(wheels|sdists)-v\d+")
#: By bucket and kind of source: which part of an entry's path is the name of its package. None for
#: what uv built from a URL or a commit: that path has no package name.
_NAME_AT = {
    ("wheels", "pypi"): 2,
    ("wheels", "index"): 3,
    ("wheels", "url"): 3,
    ("sdists", "pypi"): 2,
    ("sdists", "index"): 3,
    ("sdists", "url"): None,
    ("sdists", "git"): None,
}

#: The longest file name that file systems accept.
_MAX_NAME_BYTES = 255
#: A guess: Linux accepts paths of 4096 bytes, which include the folder of the cache.
_MAX_PATH_BYTES = 1024

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class MadeFor(Model):
    """What an unpacked wheel was prepared for; only nodes that match can use it."""

    #: The layout of uv's cache, as in "archive-v0 sdists-v11 wheels-v8". It may change with any
    #: version of uv, and several series may share one.
    uv: str
    #: The Python of its byte-code, as in "3.11".
    python: str
    #: As `Platform.name`. It matters for wheels that uv built from source.
    platform: str


class Wheel(Model):
    """A package that a node can send, as its uv cache holds it."""

    package: Installed
    made_for: MadeFor
    #: Whether its byte-code is complete, and is sent with it.
    is_compiled: bool
    #: The unpacked wheels, relative to the cache. Their ids are random, so equal ids anywhere in a
    #: cluster are copies of the same wheel.
    archives: tuple[str, ...] = Field(min_length=1)
    total_bytes: int = Field(ge=0)

    def __str__(self) -> str:
        return f"{self.package.name} {self.package.version}".rstrip()

    @field_validator("archives")
    @classmethod
    def _check(cls, archives: tuple[str, ...]) -> tuple[str, ...]:
        for archive in archives:
            if not ARCHIVE.fullmatch(archive):
                raise ValueError(f"{archive!r} is not an unpacked wheel of a uv cache")
        return archives

    @model_validator(mode="after")
    def _is_text(self) -> Wheel:
        """Refuse half a surrogate: JSON can hold it, but it cannot be hashed, sent or printed."""
        self.model_dump_json()
        return self


class PackedFile(Model):
    """A file of the stream that a wheel is sent as."""

    #: Relative to the cache.
    path: str
    size: int = Field(ge=0)
    sha256: _Sha256
    is_executable: bool = False


class Lead(Model):
    """An entry of uv's cache that leads to an archive: a file of the stream, or a link."""

    path: str
    #: The target of a link; None for a file.
    archive: str | None = None


class Manifest(Model):
    """The content of a wheel's stream: its files one after the other, cut into equal chunks."""

    wheel: Wheel
    files: tuple[PackedFile, ...]
    #: In the order in which they must be written; see `node.uv_cache.Cached`.
    leads: tuple[Lead, ...] = Field(min_length=1)
    chunk_bytes: int = Field(default=CHUNK_BYTES, ge=1, le=_MAX_CHUNK_BYTES)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        """Refuse paths outside this wheel's own entries, which would overwrite other files."""
        archives = set(self.wheel.archives)
        files = {file.path for file in self.files}
        leads = {lead.path for lead in self.leads}
        if len(files) != len(self.files) or len(leads) != len(self.leads):
            raise ValueError("a path is listed twice")
        for lead in self.leads:
            if not _is_entry(_parts(lead.path), self.wheel.package.name):
                raise ValueError(f"{lead.path!r} is not an entry of {self.wheel} in a uv cache")
            if lead.archive is None and lead.path not in files:
                raise ValueError(f"{lead.path!r} is not in the stream")
            if lead.archive is not None and (lead.archive not in archives or lead.path in files):
                raise ValueError(f"{lead.path!r} leads out of what is sent")
        for path in files - leads:
            if len(parts := _parts(path)) < 3 or "/".join(parts[:2]) not in archives:
                raise ValueError(f"{path!r} is in no wheel that is sent")
        for path in files | leads:
            if any(above in files or above in leads for above in _above(path)):
                raise ValueError(f"{path!r} is below a file or a link")
        if self.wheel.total_bytes != self.offsets[-1]:
            raise ValueError("the sizes of the files do not add up")
        return self

    @cached_property
    def offsets(self) -> list[int]:
        """The position in the stream of each file's first byte, and the end of the last file."""
        return list(accumulate((file.size for file in self.files), initial=0))

    @cached_property
    def identity(self) -> str:
        """A hash of the manifest: another sender with the same hash can continue a stream."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def chunk_count(self) -> int:
        """The number of chunks of the stream."""
        return -(-self.offsets[-1] // self.chunk_bytes)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "the pack") -> Manifest:
        """Return the manifest that a peer or a bundle sent as plain data.

        Raises `InvalidInput`: it is not a manifest, or a path in it is not allowed.
        """
        return validated(cls, data, where=where)


def why_not(wheel: Wheel, node: MadeFor) -> str:
    """Return why `node` cannot use `wheel`, as a sentence for people; "" if it can."""
    made_for = wheel.made_for
    if made_for.uv != node.uv:
        return f"{wheel} is in a uv cache with {made_for.uv}; this node's uv has {node.uv}"
    if made_for.python != node.python:
        return f"{wheel} was prepared for Python {made_for.python}; this node has {node.python}"
    if wheel.package.is_built and made_for.platform != node.platform:
        return f"{wheel} was built on {made_for.platform}; this node is {node.platform}"
    return ""


def _is_entry(parts: list[str], name: str) -> bool:
    """Whether `parts` are the path of an entry of the package `name`, as far as paths show."""
    if len(parts) < 4 or not _BUCKET.fullmatch(parts[0]):
        return False
    kind = (parts[0].partition("-")[0], parts[1])
    at = _NAME_AT.get(kind)
    return kind in _NAME_AT and (at is None or (parts[at] == name and len(parts) > at + 1))


def _above(path: str) -> Iterator[str]:
    """Yield the folders that contain a path."""
    while path := path.rpartition("/")[0]:
        yield path


def _parts(path: str) -> list[str]:
    """Return the parts of a relative path without ".." that a disk accepts; [] for another."""
    parts = path.split("/")
    is_safe = not any(part in ("", ".", "..") or "\0" in part for part in parts)
    return parts if is_safe and _fits(path) else []


def _fits(path: str) -> bool:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return False
    names = encoded.split(b"/")
    return len(encoded) <= _MAX_PATH_BYTES and max(map(len, names)) <= _MAX_NAME_BYTES
