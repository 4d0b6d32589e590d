"""Reads the files that people name, and writes and locks our own durably. Knows no layout.

A named file may be anything: reading never waits for ever, and an error names the file. A process
that dies on any line of a write leaves either the old content or the new one.
"""

from __future__ import annotations

import asyncio
import difflib
import errno
import inspect
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from ray_envs.errors import InvalidInput, LockTimeout, StorageFailed

_HINTS = {
    errno.ENOSPC: "free space on that file system, or set RAY_ENVS_ROOT to a larger one",
    errno.EDQUOT: "the quota is used up: free space, or set RAY_ENVS_ROOT elsewhere",
    errno.EACCES: "make the folder writable for this user, or set RAY_ENVS_ROOT elsewhere",
    errno.EPERM: "make the folder writable for this user, or set RAY_ENVS_ROOT elsewhere",
    errno.EROFS: "the file system is read-only: set RAY_ENVS_ROOT elsewhere",
    errno.EEXIST: "a file stands where a folder is needed: set RAY_ENVS_ROOT elsewhere",
    errno.ENOENT: "a folder is missing or a link leads nowhere: check RAY_ENVS_ROOT",
    errno.ENOTDIR: "a file stands where a folder is needed: set RAY_ENVS_ROOT elsewhere",
    errno.ENOSYS: "this file system has no flock: set RAY_ENVS_ROOT to a local disk",
}

#: Without it, filelock uses a plain lock file where flock is missing. Its releases for Python 3.10
#: do not know the option; there `Store.set_up` finds the fault, because it takes a flock itself.
_NEVER_SOFT: dict[str, Any] = (
    {"fallback_to_soft": False}
    if "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    else {}
)

#: The largest file that is read as a text of people. The locks of large projects have 5 MiB.
MAX_FILE_BYTES = 64 * 2**20

#: How often a waiter tries a lock again. Short against a build, long against the cost of a try.
_POLL_S = 0.05


def kind_of(path: Path) -> Literal["file", "folder", "other", "missing"]:
    """Return what `path` leads to; "missing" also if it cannot be a path."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as err:
        if isinstance(err, PermissionError):
            raise unreadable(path, err) from None
        return "missing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def is_file(path: Path) -> bool:
    """Whether `path` leads to a regular file."""
    return kind_of(path) == "file"


def check_folder(folder: Path, what: str, *, where: str, if_file: str = "name a folder") -> None:
    """Check that `folder` is a folder. The message calls it `what`, as in "the project folder".

    Raises `InvalidInput`: it does not exist, or is not a folder.
    """
    kind = kind_of(folder)
    if kind == "missing":
        raise InvalidInput(f"{what} does not exist", where=where, hint=_near_entry(folder))
    if kind != "folder":
        raise InvalidInput(f"{what} is not a folder", where=where, hint=if_file)


def _near_entry(path: Path) -> str:
    """Return a hint: the entry most like the missing `path`, or where it was looked for."""
    kind = kind_of(path.parent)
    names = [entry.name for entry in entries_of(path.parent)] if kind == "folder" else []
    near = difflib.get_close_matches(path.name, names, n=1)
    place = os.path.abspath(path.parent)
    return f"did you mean {near[0]!r}?" if near else f"it was looked for in {place}"


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of `folder`, unordered; empty if it has vanished.

    Raises `InvalidInput`: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as err:
        if has_vanished(err):
            return []
        raise unreadable(folder, err) from None


def read_bytes(path: Path) -> bytes:
    """Return the content of the regular file `path`; a pipe or device could block for ever.

    Raises `InvalidInput`: it does not exist, is not a regular file, has more than `MAX_FILE_BYTES`,
    or cannot be read.
    """
    kind = kind_of(path)
    if kind == "missing":
        raise InvalidInput("the file does not exist", where=str(path), hint=_near_entry(path))
    if kind != "file":
        what = "is a folder" if kind == "folder" else "is a pipe or a device"
        raise InvalidInput(f"{what}, not a file", where=str(path), hint="name a regular file")
    try:
        content = read_at_most(path, MAX_FILE_BYTES + 1)
    except OSError as err:
        raise unreadable(path, err) from None
    if len(content) > MAX_FILE_BYTES:
        raise InvalidInput(
            f"has more than {MAX_FILE_BYTES // 2**20} MiB",
            where=str(path),
            hint="name a text file that people write; keep data elsewhere",
        )
    return content


def read_at_most(path: Path, size: int) -> bytes:
    """Return the first `size` bytes of a file. Some files of the kernel have no end, or would wait.

    Raises `OSError`: it cannot be read, or not now.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        content = file.read(size)
    if content is None:
        raise BlockingIOError(errno.EAGAIN, "reading it would wait")
    return content


def has_vanished(err: OSError) -> bool:
    """Whether `err` says that a file or folder does not exist any more."""
    return err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def unreadable(path: Path, err: OSError) -> InvalidInput:
    """Return the error for a `path` that exists but, as `err` says, cannot be read."""
    return InvalidInput(
        "cannot be read",
        where=str(path),
        detail=err.strerror or str(err),
        hint="give yourself the permission to read it",
    )


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` of this block into `StorageFailed`: "cannot <doing>: <reason>"."""
    try:
        yield
    except OSError as exc:
        path = f" {exc.filename}" if exc.filename else ""
        raise StorageFailed(
            f"cannot {doing}:{path} {exc.strerror or exc}".replace(":  ", ": "),
            hint=_HINTS.get(exc.errno or 0, "see `ray-envs status`, and the folder's permissions"),
        ) from exc


def write_atomically(path: Path, content: str | bytes, *, is_durable: bool = True) -> None:
    """Write `content` to `path`: after a crash the file has all of the old or all of the new one.

    Args:
        path: the file.
        content: bytes, or a text that is written as UTF-8.
        is_durable: whether it must survive a crash of the machine, not only of the process. A copy
            of other data need not wait for the disk.

    Raises `OSError`: the folder is missing or not writable, or the disk is full.
    """
    fd, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if is_durable:
                os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise
    if is_durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@asynccontextmanager
async def locked(path: Path, *, what: str, timeout_s: float) -> AsyncIterator[None]:
    """Hold the exclusive kernel lock `path` during the block, across threads and processes.

    The lock ends with the process, however that ends. It is never a plain lock file, which a crash
    would leave behind.

    Args:
        path: the lock file; it stays.
        what: what the lock protects, for the error message.
        timeout_s: how long to wait for another holder, in seconds.

    Raises:
        LockTimeout: another process has kept it; the message names that process.
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
        with suppress(OSError):  # only for the message of a process that waits
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
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
