"""Tells other processes on this machine whether a manager serves a root, and at which address.

The sign is a kernel lock, which ends with the manager's process. It is of use to the command line.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from ray_envs.disk.files import storage_errors, write_atomically

_LOCK, _ADDRESS = "manager.lock", "manager.address"
#: The folder with a file for each session of Ray that has a manager on this root.
_SESSIONS = "sessions"
#: A manager that ended may be restarted; after this time its session is over.
_RESTART_S = 900.0


def announce(root: Path, address: str) -> int | None:
    """Announce that a manager serves `root` at the Ray address `address`.

    Returns a descriptor, whose lock is the sign as long as it is open; None if another manager
    serves this root.
    """
    with storage_errors(f"use {root}"):
        root.mkdir(parents=True, exist_ok=True)
        fd = os.open(root / _LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        try:
            write_atomically(root / _ADDRESS, address + "\n")
        except OSError:
            os.close(fd)
            raise
    return fd


def address_of(root: Path) -> str | None:
    """The Ray address of the manager that serves `root`; None if there is none."""
    try:
        fd = os.open(root / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        try:
            return (root / _ADDRESS).read_text().strip() or None
        except OSError:  # the manager is just starting
            return None
    finally:
        os.close(fd)


def join(root: Path, session: str) -> int:
    """Show other managers of `root` that a manager of this session of Ray lives.

    Returns a descriptor, whose lock is the sign as long as it is open. Renew its time stamp, so
    that the session does not count as over while the manager restarts.
    """
    path = root / _SESSIONS / session
    with storage_errors(f"use {root}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):  # another manager has just forgotten it
                if os.path.samestat(os.fstat(fd), path.stat()):
                    os.utime(fd)
                    return fd
            os.close(fd)


def sessions(root: Path) -> set[str]:
    """The sessions of Ray whose manager lives, or ended so lately that it may be restarted.

    Forgets those that are over.
    """
    found = set()
    with suppress(OSError), os.scandir(root / _SESSIONS) as entries:
        for entry in entries:
            if _is_locked(entry.path) or time.time() - entry.stat().st_mtime < _RESTART_S:
                found.add(entry.name)
            else:
                os.unlink(entry.path)
    return found


def _is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
