"""Sends wheels of this node's uv cache, with their byte-code, in pieces. Does not use Ray.

Raises `StorageFailed` for what has gone or is damaged, `LockTimeout` while the cache is pruned.
"""

from __future__ import annotations

import io
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable

from ray_envs.decisions.packs import CHUNK_BYTES, Lead, MadeFor, Manifest, PackedFile, Wheel
from ray_envs.disk.files import storage_errors
from ray_envs.errors import StorageFailed
from ray_envs.models import Installed
from ray_envs.node.interpreter import this_platform
from ray_envs.node.unpacked import (
    files_below,
    hashed,
    is_compiled,
    led_to,
    not_as_recorded,
    packed,
    within,
)
from ray_envs.node.uv_cache import UvCache
from ray_envs.node.uv_trial import layout_here

OTHER_SENDER = "take it from another node, or from the package index"


def made_here() -> MadeFor:
    """The layout of uv's cache, the Python and the platform of this node's wheels."""
    return MadeFor(
        uv=layout_here(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        platform=this_platform().name,
    )


def offers(cache: UvCache, packages: Iterable[Installed]) -> list[Wheel]:
    """The packages that this node can send, complete and with the pinned content."""
    here, found = made_here(), []
    with cache.in_use(), storage_errors("read uv's cache"):
        for package in packages:
            cached = cache.cached(package)
            if cached is not None:
                has_bytecode = all(map(is_compiled, cached.archives))
                sizes = [
                    os.lstat(path).st_size
                    for archive in cached.archives
                    for path in files_below(archive, has_bytecode)
                ]
                sizes += [lead.stat().st_size for lead in cached.leads if not lead.is_symlink()]
                found.append(
                    Wheel(
                        package=package,
                        made_for=here,
                        is_compiled=has_bytecode,
                        archives=tuple(within(cache, path) for path in cached.archives),
                        total_bytes=sum(sizes),
                    )
                )
    return found


def manifest(cache: UvCache, wheel: Wheel, *, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """The manifest of one of the `offers`; files are hashed once in a process."""
    with cache.in_use(), storage_errors(f"read {wheel} in uv's cache"):
        cached = cache.cached(wheel.package)
        archives = [within(cache, path) for path in cached.archives] if cached else []
        if cached is None or {*archives} != {*wheel.archives}:
            raise StorageFailed(f"{wheel} is not in uv's cache any more", hint=OTHER_SENDER)
        files: list[PackedFile] = []
        for archive in cached.archives:
            inode = archive.stat().st_ino
            below = hashed(archive, inode, wheel.is_compiled)
            if wrong := not_as_recorded(archive, within(cache, archive), below):
                hashed.cache_clear()
                raise StorageFailed(
                    f"{wheel} in uv's cache is damaged: {wrong}",
                    hint="repair it with `ray-envs doctor --repair`",
                )
            files += below
        files += [packed(lead, cache.folder) for lead in cached.leads if not lead.is_symlink()]
        leads = [
            Lead(
                path=within(cache, lead),
                archive=within(cache, led_to(lead)) if lead.is_symlink() else None,
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
    """The piece `number` of the stream, counted from 0, read from the files themselves."""
    if not 0 <= number < manifest.chunk_count:
        raise ValueError(f"{manifest.wheel} has no piece {number}")
    return read_range(cache, manifest, number * manifest.chunk_bytes, manifest.chunk_bytes)


def read_range(cache: UvCache, manifest: Manifest, offset: int, size: int) -> bytes:
    """`size` bytes of the stream from `offset` on; fewer at its end."""
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
                        hint=OTHER_SENDER,
                    )
                parts.append(part)
            offset, size, index = offset + wanted, size - wanted, index + 1
    return b"".join(parts)
