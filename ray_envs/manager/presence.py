"""Tells other processes on this machine whether a manager serves a root, and at which address.

The sign is a kernel lock, which ends with the manager's process. It is of use to the command line.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from ray_envs.disk.files import storage_errors, write_atomically

_LOCK, _ADDRESS = "manager.lock", "manager.address"


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
