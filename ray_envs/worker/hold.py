"""The hold: a lock that tells a collector that an environment is in use. Standard library only.

This file is installed in every environment as `_ray_envs_inside` and runs at each start of an
interpreter there. Items of any version read its `hold_fd` and call its `take_hold`.
"""

from __future__ import annotations

import os

#: The name under which this file stands in an environment's site-packages.
INSTALLED_AS = "_ray_envs_inside"
#: The descriptor whose shared lock is the hold; open for as long as the process lives.
hold_fd: int | None = None
#: The folder below the root where workers tell their starts to the node's agent.
STARTS = "starts"
#: Our plugin gives it to a worker: the key of the environment and a hash of the runtime_env.
START_VARIABLE = "RAY_ENVS_START"


def take_hold() -> None:
    """Take the shared lock of this environment until the process ends.

    The lock belongs to the open file: a forked child keeps it, and `kill -9` frees it. Exits the
    process if a collector has the exclusive lock: the files are being deleted, and the process
    would fail later, at an import, with a misleading error.

    The time stamp of the lock file is the last use of the environment: set now and at the end.
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
        try:  # programs that close all low descriptors do not close this one
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
    _tell_start(os.path.dirname(path))
    _renew(path, os.getpid())
    atexit.unregister(_renew)  # the hold was closed and is taken again
    atexit.register(_renew, path, os.getpid())


def _tell_start(store: str) -> None:
    """Tell the node's agent that a Ray worker starts, so that it finds those that go no further.

    The variable is inherited, so only Ray's own command counts.
    """
    import sys

    start, words = os.environ.get(START_VARIABLE), sys.orig_argv
    nodes = [word.partition("=")[2] for word in words if word.startswith("--node-id=")]
    if not start or not nodes or not any(w.endswith("default_worker.py") for w in words[:5]):
        return
    path = os.path.join(os.path.dirname(store), STARTS, f"{nodes[0]}.{start}.{os.getpid()}")
    try:  # noqa: SIM105 - contextlib is not imported at every interpreter start
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except OSError:  # no agent has made the folder, or the disk is full
        pass


def _renew(hold: str, pid: int) -> None:
    """Set the time stamp of the file `hold` to now, unless this is a forked child of `pid`.

    By path: at the end of the process, the descriptor may belong to another file.
    """
    if os.getpid() == pid:
        try:  # noqa: SIM105 - contextlib is not imported at every interpreter start
            os.utime(hold)
        except OSError:  # another user's file; the agent renews the time of what is held
            pass


def shared_lock(fd: int) -> bool:
    """Take a shared lock on `fd`; return False if another process keeps the exclusive lock.

    A process that tests whether a hold is free has the exclusive lock for an instant: so retry.
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
