"""What a peer lacks of an environment's wheels: told, sent in pieces, and put into its uv cache.

Build once, fan out: what travels are entries of uv's cache (`uv_cache`) with their byte-code; then
an ordinary offline sync links them. There is no Ray here: `exchange` moves the bytes, `bundles`
keeps them in a file, and `packs` says what they are. `InvalidInput` is about what was sent, and may
be asked of another sender; `StorageFailed` is about the disk of the node that raises it.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import os
import posixpath
import sys
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ray_envs.decisions.packs import (
    ARCHIVE,
    CHUNK_BYTES,
    Lead,
    MadeFor,
    Manifest,
    PackedFile,
    Wheel,
    why_not,
)
from ray_envs.disk.files import storage_errors
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.models import Installed
from ray_envs.node.bytecode import marker_name
from ray_envs.node.uv import this_platform, uv_version
from ray_envs.node.uv_cache import UvCache

#: How much of a file is hashed at once, in bytes.
_BUFFER_BYTES = 1024 * 1024
#: How many unpacked wheels this process remembers the hashes of.
_REMEMBERED = 256

_MARKER = "ray_envs-bytecode."
#: How the name of byte-code of this Python ends.
_BYTECODE = f".{sys.implementation.cache_tag}.pyc"
_OTHER_SENDER = "take it from another node, or from the package index"


def made_here() -> MadeFor:
    """What this node can use, and what it makes."""
    return MadeFor(
        uv=".".join(uv_version().split(".")[:2]),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        platform=this_platform().name,
    )


# -- the sender


def offers(cache: UvCache, packages: Iterable[Installed]) -> list[Wheel]:
    """Those of `packages` that can be sent from here, complete and of the very content.

    Raises:
        LockTimeout: the cache is being pruned for longer than it waits.
        StorageFailed: it cannot be read.
    """
    here, found = made_here(), []
    with cache.in_use(), storage_errors("read uv's cache"):
        for package in packages:
            cached = cache.cached(package)
            if cached is not None:
                is_compiled = all(map(_is_compiled, cached.archives))
                sizes = [
                    os.lstat(path).st_size
                    for archive in cached.archives
                    for path in _files_below(archive, is_compiled)
                ]
                sizes += [lead.stat().st_size for lead in cached.leads if not lead.is_symlink()]
                found.append(
                    Wheel(
                        package=package,
                        made_for=here,
                        is_compiled=is_compiled,
                        archives=tuple(_within(cache, path) for path in cached.archives),
                        total_bytes=sum(sizes),
                    )
                )
    return found


def manifest(cache: UvCache, wheel: Wheel, *, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """What there is to send of one of the `offers`; hashed once in the life of the process.

    Raises:
        LockTimeout: the cache is being pruned for longer than it waits.
        StorageFailed: it is gone, or not as its own RECORD says: not to be sent.
    """
    with cache.in_use(), storage_errors(f"read {wheel} in uv's cache"):
        cached = cache.cached(wheel.package)
        archives = [_within(cache, path) for path in cached.archives] if cached else []
        if cached is None or {*archives} != {*wheel.archives}:
            raise StorageFailed(f"{wheel} is not in uv's cache any more", hint=_OTHER_SENDER)
        files: list[PackedFile] = []
        for archive in cached.archives:
            inode = archive.stat().st_ino
            below = _hashed(archive, inode, wheel.is_compiled)
            if wrong := _not_as_recorded(archive, _within(cache, archive), below):
                _hashed.cache_clear()
                raise StorageFailed(
                    f"{wheel} in uv's cache is damaged: {wrong}",
                    hint="mend it with `ray-envs doctor --repair`",
                )
            files += below
        files += [_packed(lead, cache.folder) for lead in cached.leads if not lead.is_symlink()]
        leads = [
            Lead(
                path=_within(cache, lead),
                archive=_within(cache, _led_to(lead)) if lead.is_symlink() else None,
            )
            for lead in cached.leads
        ]
    total = sum(file.size for file in files)
    return Manifest(
        wheel=wheel.model_copy(update={"total_bytes": total}),
        files=tuple(files),
        leads=tuple(leads),
        chunk_bytes=chunk_bytes,
    )


def read_chunk(cache: UvCache, manifest: Manifest, number: int) -> bytes:
    """The piece `number`, from 0, of the stream; in any order, and read from the files themselves.

    Raises:
        StorageFailed: a file is gone or has become shorter.
    """
    if not 0 <= number < manifest.chunk_count:
        raise ValueError(f"{manifest.wheel} has no piece {number}")
    return read_range(cache, manifest, number * manifest.chunk_bytes, manifest.chunk_bytes)


def read_range(cache: UvCache, manifest: Manifest, offset: int, size: int) -> bytes:
    """`size` bytes of the stream from `offset` on; fewer at its end.

    Raises:
        StorageFailed: a file is gone or has become shorter.
    """
    size = min(size, manifest.offsets[-1] - offset)
    index = bisect_right(manifest.offsets, offset) - 1
    parts: list[bytes] = []
    with storage_errors(f"read {manifest.wheel} in uv's cache"):
        while size > 0:
            file = manifest.files[index]
            start = offset - manifest.offsets[index]
            wanted = min(size, file.size - start)
            if wanted:
                fd = os.open(cache.folder / file.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with io.FileIO(fd) as opened:
                    part = os.pread(opened.fileno(), wanted, start)
                if len(part) != wanted:
                    raise StorageFailed(
                        f"{manifest.wheel} in uv's cache has changed: {file.path}",
                        hint=_OTHER_SENDER,
                    )
                parts.append(part)
            offset, size, index = offset + wanted, size - wanted, index + 1
    return b"".join(parts)


# -- the receiver


def missing(cache: UvCache, packages: Iterable[Installed]) -> list[Installed]:
    """Those of `packages` whose very content uv would not find offline.

    Raises:
        LockTimeout: the cache is being pruned for longer than it waits.
        StorageFailed: it cannot be read.
    """
    with cache.in_use():
        return [package for package in packages if cache.cached(package) is None]


def receive(cache: UvCache, manifest: Manifest, chunks: Iterable[bytes]) -> None:
    """Put a wheel into `cache`.

    Args:
        cache: of this node.
        manifest: what `chunks` are of.
        chunks: the stream, in pieces of any size.

    Raises:
        InvalidInput, LockTimeout, StorageFailed: see `Receiving`.
    """
    with Receiving(cache, manifest) as receiving:
        for chunk in chunks:
            receiving.write(chunk)
        receiving.commit()


class Receiving:
    """A wheel on its way into a uv cache, where all or nothing of it appears.

    The cache is in use during the block, as it is while uv downloads. Several may receive the same
    at once; what a killed process leaves, uv does not see, and goes with the next pruning.

    Args:
        cache: of this node.
        manifest: what comes.

    Raises:
        InvalidInput: a wheel for another uv, Python or platform; from `write` and `commit`: what
            came is not what the manifest or the wheel's own RECORD says. Nothing was put in.
        LockTimeout: the cache is being pruned for longer than it waits.
        StorageFailed: this node cannot write it.
    """

    def __init__(self, cache: UvCache, manifest: Manifest) -> None:
        if reason := why_not(manifest.wheel, made_here()):
            raise InvalidInput(reason, hint=_OTHER_SENDER)
        self._cache = cache
        self._manifest = manifest
        self._exits = ExitStack()
        self._folder = Path()
        self._made: set[str] = set()
        self._count = 0  # of the files that are begun
        self._file: io.FileIO | None = None
        self._left = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> Receiving:
        with ExitStack() as exits:
            self._folder = exits.enter_context(self._cache.arriving())
            exits.callback(self._close)
            with storage_errors(f"receive {self._manifest.wheel}"):
                self._begin_next()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def write(self, chunk: bytes) -> None:
        """Take the next bytes of the stream."""
        view = memoryview(chunk)
        with storage_errors(f"receive {self._manifest.wheel}"):
            while view:
                if self._file is None:
                    raise self._refused("more came than was announced")
                part = view[: self._left]
                written = self._file.write(part)
                self._hash.update(part[:written])
                self._left -= written
                view = view[written:]
                if not self._left:
                    self._end_file()
                    self._begin_next()

    def commit(self) -> None:
        """Put what came into the cache; byte-code counts from now on, by this node's clock."""
        manifest = self._manifest
        wheel = manifest.wheel
        if self._file is not None:
            come = manifest.offsets[self._count] - self._left
            raise self._refused(f"it ended after {come} of {manifest.offsets[-1]} bytes")
        with storage_errors(f"receive {wheel}"):
            for archive in wheel.archives:
                folder = self._folder / archive
                files = [each for each in manifest.files if each.path.startswith(f"{archive}/")]
                if wrong := _not_as_recorded(folder, archive, files):
                    raise self._refused(wrong)
                (info,) = folder.glob("*.dist-info")
                if not _is_of(info.name, wheel.package):
                    raise self._refused(f"it holds {info.name}")
                if wheel.is_compiled:
                    marker = info / marker_name()
                    marker.write_text(repr(time.time()))
                    marker.chmod(0o444)
        leads = [(lead.path, lead.archive) for lead in manifest.leads]
        self._cache.move_in(self._folder, wheel.archives, leads)

    def _begin_next(self) -> None:
        """Make the next file; empty ones are complete at once."""
        while self._count < len(self._manifest.files):
            file = self._manifest.files[self._count]
            place = os.path.join(self._folder, file.path)
            parent = os.path.dirname(place)
            if parent not in self._made:
                os.makedirs(parent, exist_ok=True)
                self._made.add(parent)
            # Environments link to the files of an archive: nobody is to write into them.
            mode = 0o444 if ARCHIVE.match(file.path) else 0o644
            mode |= 0o111 if file.is_executable else 0
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = io.FileIO(os.open(place, flags, mode), "wb")
            self._count, self._left, self._hash = self._count + 1, file.size, hashlib.sha256()
            if file.size:
                return
            self._end_file()

    def _end_file(self) -> None:
        self._close()
        file = self._manifest.files[self._count - 1]
        if self._hash.hexdigest() != file.sha256:
            raise self._refused(f"{file.path} was damaged on its way")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _refused(self, reason: str) -> InvalidInput:
        return InvalidInput(
            f"{self._manifest.wheel} was not received: {reason}", hint=_OTHER_SENDER
        )


# -- files of a cache


def _within(cache: UvCache, path: Path) -> str:
    return path.relative_to(cache.folder).as_posix()


def _led_to(link: Path) -> Path:
    return Path(os.path.normpath(link.parent / os.readlink(link)))


def _is_compiled(archive: Path) -> bool:
    """Whether its byte-code of this Python is complete."""
    return any((info / marker_name()).is_file() for info in archive.glob("*.dist-info"))


def _files_below(archive: Path, is_compiled: bool) -> Iterator[str]:
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
def _hashed(archive: Path, inode: int, is_compiled: bool) -> tuple[PackedFile, ...]:  # noqa: ARG001
    """The files of an archive; its inode stands for another one of the same name."""
    cache = archive.parents[1]
    return tuple(_packed(Path(path), cache) for path in _files_below(archive, is_compiled))


def _packed(path: Path, cache: Path) -> PackedFile:
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


def _not_as_recorded(folder: Path, archive: str, files: Iterable[PackedFile]) -> str:
    """What is wrong with an unpacked wheel by its own RECORD; "" if nothing is.

    Args:
        folder: where it is.
        archive: what the paths of `files` begin with.
        files: its files, hashed.
    """
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
                    return f"{path} is not as its RECORD says"
    except FileNotFoundError:
        return "it has no RECORD"
    except (ValueError, IndexError, csv.Error, binascii.Error) as exc:
        return f"its RECORD cannot be read: {exc}"
    return ""


def _is_of(dist_info: str, package: Installed) -> bool:
    name, _, version = dist_info.removesuffix(".dist-info").rpartition("-")
    if canonicalize_name(name) != package.name:
        return False
    try:
        return not package.version or Version(version) == Version(package.version)
    except InvalidVersion:
        return version == package.version
