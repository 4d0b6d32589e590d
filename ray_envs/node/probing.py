"""Tests what a node can do for environments, for `doctor`. A probe never raises."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ray_envs.cluster.ray_versions import described
from ray_envs.models import Target
from ray_envs.validation import Model

#: Linux's ioctl that lets a file share the blocks of another one (linux/fs.h).
_FICLONE = 0x40049409
#: The first letters of the probes' files; a killed process may leave one.
_PREFIX = ".ray_envs-probe-"
#: Files of the largest environments that we know, with their byte-code. A guess for all others.
_MIN_FREE_INODES = 20_000
#: Ray opens several files and sockets for each worker; its own documents ask for more than 1024.
_MIN_OPEN_FILES = 4096

_OTHER_DISK = "set RAY_ENVS_ROOT to a local disk"


class Probe(Model):
    """One thing that a node can or cannot do."""

    name: str
    #: Whether environments can be built and run with this. A hint alone: they can, but worse.
    ok: bool
    #: What was found, for people.
    value: str
    hint: str = ""


def probe(
    root: Path,
    cache: Path,
    store: Path,
    *,
    min_free_bytes: int,
    expected: Target | None,
    actual: Target,
    uv: str,
    uv_problem: str = "",
) -> list[Probe]:
    """What this node can do, always the same probes in the same order.

    Args:
        root: the root folder.
        cache: uv's cache folder.
        store: a folder on the file system where environments are made.
        min_free_bytes: what must be free before anything is built.
        expected: what the cluster needs; None where there is no cluster to compare with.
        actual: the interpreter and the Ray of this node; an empty version for what is missing.
        uv: the version of uv.
        uv_problem: why this uv cannot be used; empty if it can. See `uv_trial`.
    """
    return [
        _safely("root", partial(_root, root)),
        _safely("locks", partial(_locks, root)),
        _safely("free space", partial(_free_space, root, min_free_bytes)),
        _safely("free inodes", partial(_free_inodes, root)),
        _safely("links", partial(_links, cache, store)),
        _safely("open files", _open_files),
        _uv(uv, uv_problem),
        _version("python", actual.python, expected.python if expected else None),
        _ray(actual.ray, expected.ray if expected else None),
    ]


def _safely(name: str, look: Callable[[], tuple[bool, str, str]]) -> Probe:
    """The probe `name`; what it met instead of an answer is one, too."""
    try:
        ok, value, hint = look()
    except Exception as exc:
        ok, value, hint = False, _words_of(exc), _hint_for(exc)
    return Probe(name=name, ok=ok, value=value, hint=hint)


def _words_of(exc: Exception) -> str:
    if not isinstance(exc, OSError) or not exc.strerror:
        return str(exc)
    folder, name = os.path.split(exc.filename or "")
    where = folder if name.startswith(_PREFIX) else exc.filename  # the name is only ours
    return f"{exc.strerror}: {where}" if where else exc.strerror


def _hint_for(exc: Exception) -> str:
    if isinstance(exc, FileNotFoundError):
        return "make the folder: the first build does, and so does `ray-envs up`"
    if isinstance(exc, PermissionError):
        return "make the folder writable for this user, or set RAY_ENVS_ROOT elsewhere"
    if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space on that file system, or set RAY_ENVS_ROOT to a larger one"
    return _OTHER_DISK


def _root(root: Path) -> tuple[bool, str, str]:
    with _scratch(root) as file:
        file.write_bytes(b"x")
    return True, str(root), ""


def _locks(root: Path) -> tuple[bool, str, str]:
    with _scratch(root) as file:
        first, second = os.open(file, os.O_RDWR), os.open(file, os.O_RDWR)
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _can_lock(second):
                return False, "flock does not exclude", _OTHER_DISK
            fcntl.flock(first, fcntl.LOCK_UN)
            if not _can_lock(second):
                return False, "flock is not given back", _OTHER_DISK
        finally:
            os.close(first)
            os.close(second)
    return True, "flock", ""


def _can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free_space(root: Path, min_free_bytes: int) -> tuple[bool, str, str]:
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    if free < min_free_bytes:
        least = f"{min_free_bytes // 2**20} MiB must be free: free space"
        return False, f"{free // 2**20} MiB", f"{least}, or set RAY_ENVS_ROOT elsewhere"
    return True, f"{free // 2**20} MiB", ""


def _free_inodes(root: Path) -> tuple[bool, str, str]:
    status = os.statvfs(root)
    if status.f_files == 0:
        return True, "this file system does not count them", ""
    if status.f_favail < _MIN_FREE_INODES:
        hint = "free space, or set RAY_ENVS_ROOT to another file system"
        return False, str(status.f_favail), hint
    return True, str(status.f_favail), ""


def _links(cache: Path, store: Path) -> tuple[bool, str, str]:
    value = how_linked(cache, store)
    hint = "every environment takes its full size: give the cache and the store one disk"
    return True, value, hint if value == "copy" else ""


def how_linked(cache: Path, store: Path) -> str:
    """How a file gets from the cache into an environment, the cheapest way that works.

    Returns "reflink", "hard link" or "copy".

    Raises `OSError`: one of the folders cannot be written.
    """
    with _scratch(cache) as source, _scratch(store) as place:
        source.write_bytes(b"x" * 4096)
        for value, attempt in (("reflink", _reflink), ("hard link", _hard_link)):
            with suppress(OSError):
                attempt(source, place)
                return value
    return "copy"


def _reflink(source: Path, place: Path) -> None:
    with source.open("rb") as given, place.open("wb") as made:
        fcntl.ioctl(made, _FICLONE, given.fileno())
    if place.read_bytes() != source.read_bytes():
        raise OSError(errno.EIO, "the clone has another content", str(place))


def _hard_link(source: Path, place: Path) -> None:
    place.unlink()
    os.link(source, place)
    if not place.samefile(source):
        raise OSError(errno.EIO, "the link is another file", str(place))


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty file in `folder` for the length of the block."""
    fd, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    os.close(fd)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _open_files() -> tuple[bool, str, str]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return True, "unlimited", ""
    if limit < _MIN_OPEN_FILES:
        return True, str(limit), f"Ray may run out of them: `ulimit -n {_MIN_OPEN_FILES}`"
    return True, str(limit), ""


def _uv(version: str, problem: str) -> Probe:
    if version and not problem:
        return Probe(name="uv", ok=True, value=version)
    hint = "install a uv whose cache and locks can be read here: `pip install 'uv>=0.9,<1'`"
    return Probe(name="uv", ok=False, value=problem or "not installed", hint=hint)


def _ray(actual: str, expected: str | None) -> Probe:
    """As `_version`, and whether ray_envs has been tried with it."""
    found = _version("ray", actual, expected)
    return found.model_copy(update={"value": described(actual)}) if actual else found


def _version(name: str, actual: str, expected: str | None) -> Probe:
    """Whether the node has what the cluster has, to the last digit: Ray refuses anything else."""
    if not actual:
        hint = f"install {name}{f' {expected}' if expected else ''} on this node"
        return Probe(name=name, ok=False, value="not installed", hint=hint)
    if expected not in (None, actual):
        hint = f"the cluster has {expected}: install that on this node"
        return Probe(name=name, ok=False, value=actual, hint=hint)
    return Probe(name=name, ok=True, value=actual)
