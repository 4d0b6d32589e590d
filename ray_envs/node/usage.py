"""Asks the kernel: how much disk a folder uses, and which processes have a file open."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from stat import S_ISDIR
from typing import Any

#: The kernel's files about processes; they exist on Linux only.
_PROC = Path("/proc")
#: Ray's job id of a worker that was started before any job asked for it.
_NO_JOB = "ffffffff"


def measured(folder: Path) -> tuple[int, int, int]:
    """The share of bytes and of inodes that `folder` takes, and the bytes that no other has."""
    #: By inode: links found here, links in all, bytes.
    found: dict[tuple[int, int], list[int]] = {}
    todo = [os.fspath(folder)]
    while todo:
        path = todo.pop()
        with suppress(OSError):  # it is deleted meanwhile
            stat = os.lstat(path)
            is_folder = S_ISDIR(stat.st_mode)
            links = 1 if is_folder else max(1, stat.st_nlink)
            file = found.setdefault((stat.st_dev, stat.st_ino), [0, links, stat.st_blocks * 512])
            file[0] += 1
            if is_folder:
                todo += [os.path.join(path, name) for name in os.listdir(path)]
    size, inodes, own = Counter[int](), Counter[int](), 0
    for here, links, taken in found.values():
        size[links] += taken * here
        inodes[links] += here
        own += taken if here >= links else 0
    shares = [sum(Fraction(n, links) for links, n in each.items()) for each in (size, inodes)]
    return int(shares[0]), math.ceil(shares[1]), own


def holders(file: Path) -> list[int]:
    """The processes that have `file` open, as far as the kernel shows them.

    /proc/locks names the process that took a lock, not a child that inherited it from a dead
    parent. So the open descriptors count. For those of other users, which are hidden, /proc/locks
    is used.
    """
    takers: list[str] = []
    with suppress(OSError):
        told = file.stat()
        place = f"{os.major(told.st_dev):02x}:{os.minor(told.st_dev):02x}:{told.st_ino}"
        takers = re.findall(rf"FLOCK .* (\d+) {place} ", (_PROC / "locks").read_text())
    found = []
    for pid in os.listdir(_PROC) if _PROC.is_dir() else []:
        try:
            if pid.isdigit() and any(_leads_to(file, fd) for fd in (_PROC / pid / "fd").iterdir()):
                found.append(int(pid))
        except PermissionError:
            found += [int(pid)] * (pid in takers)
        except OSError:  # it has ended
            continue
    return sorted(found)


def _leads_to(file: Path, fd: Path) -> bool:
    """By name first: to ask what is behind any descriptor may hang on a network that is gone."""
    with suppress(OSError):
        return os.path.basename(os.readlink(fd)) == file.name and fd.samefile(file)
    return False


def told_of(pid: int) -> dict[str, Any]:
    """A process's pid, command (200 characters at most) and Ray job id."""
    command, job_id, left = [], None, 200
    with suppress(OSError):
        for word in (_PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0"):
            if word[:left]:
                command.append(word[:left])
                left -= len(word)
    with suppress(OSError):
        environ = (_PROC / str(pid) / "environ").read_text(errors="replace")
        job_id = dict(v.partition("=")[::2] for v in environ.split("\0")).get("RAY_JOB_ID")
    return {"pid": pid, "command": command, "job_id": None if job_id == _NO_JOB else job_id}
