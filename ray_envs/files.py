"""Durable files: atomic writes, and locks that name their holder. Knows no layout.

The neighbours `store` and `registry` say which files; this module says how they are written so
that a process that dies on any line leaves either the old or the new content.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import json
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ray_envs.errors import LockTimeout, StorageFailed

_HINTS = {
    errno.ENOSPC: "free space on that file system, or set RAY_ENVS_ROOT to a larger one",
    errno.EDQUOT: "the quota is used up: free space, or set RAY_ENVS_ROOT elsewhere",
    errno.EACCES: "make the folder writable for this user, or set RAY_ENVS_ROOT elsewhere",
    errno.EPERM: "make the folder writable for this user, or set RAY_ENVS_ROOT elsewhere",
    errno.EROFS: "the file system is read-only: set RAY_ENVS_ROOT elsewhere",
    errno.ENOTDIR: "a file stands where a folder is needed: set RAY_ENVS_ROOT elsewhere",
    errno.ENOSYS: "this file system has no flock: set RAY_ENVS_ROOT to a local disk",
}

#: filelock would otherwise put a lock file in the place of a missing flock. Releases that cannot be
#: told (those for Python 3.10) are covered by `Store.set_up`, which takes a flock of its own.
_NEVER_SOFT: dict[str, Any] = (
    {"fallback_to_soft": False}
    if "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    else {}
)

#: How often a waiter tries a lock again. Short against a build, long against the cost of a try.
_POLL_S = 0.05


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` in the block into `StorageFailed`: "cannot <doing>: <reason>"."""
    try:
        yield
    except OSError as exc:
        path = f" {exc.filename}" if exc.filename else ""
        raise StorageFailed(
            f"cannot {doing}:{path} {exc.strerror or exc}".replace(":  ", ": "),
            hint=_HINTS.get(exc.errno or 0, "see `ray-envs status`, and the folder's permissions"),
        ) from exc


def write_atomically(path: Path, text: str) -> None:
    """Give `path` the content `text`: after a crash it has the old content or the new, whole.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    fd, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@asynccontextmanager
async def locked(path: Path, *, what: str, timeout_s: float) -> AsyncIterator[None]:
    """Hold the exclusive kernel lock `path` during the block, across threads and processes.

    The lock ends with the process, however it ends. It never falls back to a lock file that a
    crash would leave behind.

    Args:
        path: the lock file; it stays.
        what: what the lock protects, for the error message.
        timeout_s: how long to wait for another holder, in seconds.

    Raises:
        LockTimeout: another process kept it; the message names the process.
        StorageFailed: the lock file could not be made, or the file system has no flock.
    """
    lock = FileLock(path, thread_local=False, **_NEVER_SOFT)
    deadline = time.monotonic() + timeout_s
    while True:
        with storage_errors(f"lock {what}"), suppress(TimeoutError):
            lock.acquire(blocking=False)
        if lock.is_locked:
            break
        if time.monotonic() >= deadline:
            raise LockTimeout(
                f"{what} is being changed by {_holder_of(path)}; waited {timeout_s:g} s",
                hint="try again when it has ended, or raise RAY_ENVS_LOCK_TIMEOUT_S",
            )
        await asyncio.sleep(_POLL_S)
    try:
        with suppress(OSError):  # the name is a courtesy; the lock is what counts
            _holder_file(path).write_text(
                json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            )
        yield
    finally:
        lock.release()


def _holder_file(path: Path) -> Path:
    return path.with_name(path.name + ".holder")


def _holder_of(path: Path) -> str:
    try:
        holder = json.loads(_holder_file(path).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
