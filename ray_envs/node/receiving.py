"""Receives wheels into this node's uv cache: a wheel appears there completely or not at all.

`InvalidInput` is about what was sent: ask another sender. `StorageFailed` is about this node's
disk; `LockTimeout` means that the cache is being pruned.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ray_envs.decisions.packs import ARCHIVE, Manifest, why_not
from ray_envs.disk.files import storage_errors
from ray_envs.errors import InvalidInput
from ray_envs.models import Installed
from ray_envs.node.bytecode import marker_name
from ray_envs.node.sending import OTHER_SENDER, made_here
from ray_envs.node.unpacked import not_as_recorded
from ray_envs.node.uv_cache import UvCache


def missing(cache: UvCache, packages: Iterable[Installed]) -> list[Installed]:
    """The packages whose pinned content uv would not find offline."""
    with cache.in_use():
        return [package for package in packages if cache.cached(package) is None]


def receive(cache: UvCache, manifest: Manifest, chunks: Iterable[bytes]) -> None:
    """Put a wheel into `cache`."""
    with Receiving(cache, manifest) as receiving:
        for chunk in chunks:
            receiving.write(chunk)
        receiving.commit()


class Receiving:
    """A wheel that is being received; it appears in the uv cache completely or not at all.

    The cache is in use during the block, as it is while uv downloads. Several may receive the same
    at once. Uv does not see what a killed process leaves; the next pruning removes it.

    Raises:
        InvalidInput: a wheel for another uv, Python or platform; from `write` and `commit`: what
            came is not what the manifest or the wheel's own RECORD says. Nothing was put in.
        LockTimeout: the cache is being pruned for longer than it waits.
        StorageFailed: this node cannot write it.
    """

    def __init__(self, cache: UvCache, manifest: Manifest) -> None:
        if reason := why_not(manifest.wheel, made_here()):
            raise InvalidInput(reason, hint=OTHER_SENDER)
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
                if wrong := not_as_recorded(folder, archive, files):
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
            # Environments link to the files of an archive: they must not be written.
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
        return InvalidInput(f"{self._manifest.wheel} was not received: {reason}", hint=OTHER_SENDER)


def _is_of(dist_info: str, package: Installed) -> bool:
    name, _, version = dist_info.removesuffix(".dist-info").rpartition("-")
    if canonicalize_name(name) != package.name:
        return False
    try:
        return not package.version or Version(version) == Version(package.version)
    except InvalidVersion:
        return version == package.version
