"""The hold: proves to a collector that an environment is in use. Standard library only.

This file is installed in every environment as `_ray_envs_inside` and runs at each start of an
interpreter there. Ray is not imported.
"""

from __future__ import annotations

import os

#: The name under which this file stands in an environment's site-packages.
INSTALLED_AS = "_ray_envs_inside"
#: The descriptor whose shared lock is the hold; open for as long as the process lives.
hold_fd: int | None = None


def take_hold() -> None:
    """Take the shared lock that shows that this environment is in use, until the process ends.

    The lock belongs to the open file, so a forked child keeps it and `kill -9` drops it. Exits the
    process where a collector holds the exclusive lock: the files are about to go away, and a
    process that went on would fail later, at an import, with a misleading error.

    The time stamp of the hold is the last use of the environment: renewed now and at the end.
    """
    global hold_fd  # noqa: PLW0603 - one process, one hold

    import atexit
    import fcntl

    venv = __file__
    for _ in range(4):  # .venv/lib/pythonX.Y/site-packages/_ray_envs_inside.py
        venv = os.path.dirname(venv)
    path = os.path.dirname(venv) + ".hold"
    if is_open(hold_fd, path):  # Python reads the .pth files of a venv twice
        return
    try:
        hold_fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:  # out of the way of programs that close every low descriptor
            high = fcntl.fcntl(hold_fd, fcntl.F_DUPFD_CLOEXEC, 512)
            os.close(hold_fd)
            hold_fd = high
        except OSError:  # the limit of open files is below that
            pass
        is_held = shared_lock(hold_fd)
    except OSError as exc:
        raise SystemExit(f"ray_envs: cannot hold this environment: {exc}") from None
    if not is_held:
        raise SystemExit("ray_envs: this environment is being removed: " + venv)
    _renew(path, os.getpid())
    atexit.unregister(_renew)  # a hold that was closed and is taken again
    atexit.register(_renew, path, os.getpid())


def _renew(hold: str, pid: int) -> None:
    """Make now the last use of the environment of `hold`, unless this is a forked child of `pid`.

    By name: at the end of the process, the descriptor may be that of another file.
    """
    if os.getpid() == pid:
        try:  # noqa: SIM105 - contextlib is not imported at every interpreter start
            os.utime(hold)
        except OSError:  # the file is another user's; the agent renews what is held
            pass


def shared_lock(fd: int) -> bool:
    """Take a shared lock on `fd`; False if another process keeps the exclusive one.

    A process that only looks has the exclusive lock for an instant: so, try several times.
    """
    import fcntl

    for _ in range(20):
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            import time

            time.sleep(0.02)
        else:
            return True
    return False


def is_open(fd: int | None, path: str) -> bool:
    """Whether `fd` is an open descriptor of the file `path`."""
    try:
        return fd is not None and os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False
