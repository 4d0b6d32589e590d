"""What travels of an environment's wheels: the words in which nodes and bundles describe it.

What a peer or a file says is not believed here: every path stays below the cache, and sizes add up.
Who makes and takes what is described is `transfer`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ray_envs.models import Installed, Model, validated

#: What is read, sent and kept in memory at once, in bytes. A guess: Ray's own chunks are 5 MiB.
CHUNK_BYTES = 8 * 1024 * 1024
_MAX_CHUNK_BYTES = 256 * 1024 * 1024

#: An unpacked wheel, relative to a uv cache.
ARCHIVE = re.compile(r"archive-v\d+/[A-Za-z0-9_-]+")
_BUCKET = re.compile(r"(wheels|sdists)-v\d+")
#: Where in the path of an entry the name of its package is, by bucket and kind of source. What uv
#: built from a URL or a commit is not below a name.
_NAME_AT = {
    ("wheels", "pypi"): 2,
    ("wheels", "index"): 3,
    ("wheels", "url"): 3,
    ("sdists", "pypi"): 2,
    ("sdists", "index"): 3,
    ("sdists", "url"): None,
    ("sdists", "git"): None,
}

#: What file systems take as one name, in bytes.
_MAX_NAME_BYTES = 255
#: A guess: Linux takes 4096 bytes as a path, and the folder of the cache counts too.
_MAX_PATH_BYTES = 1024

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class MadeFor(Model):
    """What an unpacked wheel fits, besides what its pin says."""

    #: The series of uv, whose cache has one layout; as in "0.13".
    uv: str
    #: The Python that its byte-code is of; as in "3.11".
    python: str
    #: As `Platform.name`: what uv builds from source is for one platform.
    platform: str


class Wheel(Model):
    """A package that a node can send, as its uv cache holds it."""

    package: Installed
    made_for: MadeFor
    #: Whether its byte-code is complete, and travels with it.
    is_compiled: bool
    #: The unpacked wheels, relative to the cache. uv draws the ids at random: equal ones anywhere
    #: in a cluster are copies of the same.
    archives: tuple[str, ...] = Field(min_length=1)
    total_bytes: int = Field(ge=0)

    def __str__(self) -> str:
        return f"{self.package.name} {self.package.version}".rstrip()

    @field_validator("archives")
    @classmethod
    def _check(cls, archives: tuple[str, ...]) -> tuple[str, ...]:
        for archive in archives:
            if not ARCHIVE.fullmatch(archive):
                raise ValueError(f"{archive!r} is no unpacked wheel of a uv cache")
        return archives

    @model_validator(mode="after")
    def _is_text(self) -> Wheel:
        """JSON can hold half a surrogate, which cannot be hashed, sent on or printed."""
        self.model_dump_json()
        return self


class PackedFile(Model):
    """A file of the stream."""

    #: Relative to the cache.
    path: str
    size: int = Field(ge=0)
    sha256: _Sha256
    is_executable: bool = False


class Lead(Model):
    """What leads uv to an archive: a file of the stream, or a link."""

    path: str
    #: Where a link leads to; None for a file.
    archive: str | None = None


class Manifest(Model):
    """What the stream of a wheel holds: its files, one after the other, cut into equal pieces."""

    wheel: Wheel
    files: tuple[PackedFile, ...]
    #: In the order in which they may appear; see `uv_cache.Cached`.
    leads: tuple[Lead, ...] = Field(min_length=1)
    chunk_bytes: int = Field(default=CHUNK_BYTES, ge=1, le=_MAX_CHUNK_BYTES)

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        """Every path stays where it belongs: what is written outside is somebody else's."""
        archives = set(self.wheel.archives)
        files = {file.path for file in self.files}
        leads = {lead.path for lead in self.leads}
        if len(files) != len(self.files) or len(leads) != len(self.leads):
            raise ValueError("a path is there twice")
        for lead in self.leads:
            if not _is_entry(_parts(lead.path), self.wheel.package.name):
                raise ValueError(f"{lead.path!r} is no entry of {self.wheel} in a uv cache")
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
        """Where in the stream each file begins, and where the last one ends."""
        return list(accumulate((file.size for file in self.files), initial=0))

    @cached_property
    def identity(self) -> str:
        """A hash of all of it: senders with the same one can go on for each other."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def chunk_count(self) -> int:
        """How many pieces the stream has."""
        return -(-self.offsets[-1] // self.chunk_bytes)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "the pack") -> Manifest:
        """The manifest that a peer or a file gives as plain data.

        Raises:
            InvalidInput: it is none, or it names a path outside the cache.
        """
        return validated(cls, data, where=where)


def why_not(wheel: Wheel, node: MadeFor) -> str:
    """Why `wheel` is of no use to `node`, as a sentence for people; "" if it is of use."""
    made_for = wheel.made_for
    if made_for.uv != node.uv:
        return f"{wheel} is in the cache of uv {made_for.uv}; this node has uv {node.uv}"
    if made_for.python != node.python:
        return f"{wheel} was prepared for Python {made_for.python}; this node has {node.python}"
    if wheel.package.is_built and made_for.platform != node.platform:
        return f"{wheel} was built on {made_for.platform}; this node is {node.platform}"
    return ""


def _is_entry(parts: list[str], name: str) -> bool:
    """Whether `parts` are those of an entry of the package `name`, as far as its path says."""
    if len(parts) < 4 or not _BUCKET.fullmatch(parts[0]):
        return False
    kind = (parts[0].partition("-")[0], parts[1])
    at = _NAME_AT.get(kind)
    return kind in _NAME_AT and (at is None or (parts[at] == name and len(parts) > at + 1))


def _above(path: str) -> Iterator[str]:
    """The folders that a path is in."""
    while path := path.rpartition("/")[0]:
        yield path


def _parts(path: str) -> list[str]:
    """The parts of a path that leads nowhere but down, and that a disk takes; none of any other."""
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
