"""Runs an item in a child process of the worker, which is as it was before any item.

The child is a fork: it has all that the worker has imported, and costs milliseconds. Ray cannot be
used in it. What it leaves behind ends with it: orphans become children of the worker. It stays in
the worker's process group, which Ray ends with the worker.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

#: Of Linux's `prctl`: a signal at the parent's death; orphans become children of this process.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: The child writes the length of its message first.
_LENGTH_BYTES = 8
#: The time between two looks whether the child lives, in seconds.
_LOOK_S = 0.2


def in_child(run: Callable[[], Any], timeout_s: float) -> tuple[str, Any]:
    """Call `run` in a child process; return how that ended, and its value or what was wrong.

    Returns:
        "ended" and the value, which must be picklable; "late" and "", if it took longer than
        `timeout_s` seconds; "crashed" and the reason, if the child ended without a value.
    """
    import pickle
    import warnings

    before = _children()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else the child writes it, too
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # newer Pythons warn, because this process has threads
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            _be_child(run, writing)
        finally:
            os._exit(1)
    os.close(writing)
    told, is_late, status = b"", False, None
    try:
        told, is_late, status = _read(reading, pid, timeout_s)
    finally:
        os.close(reading)
        status = _end(pid, before, status)
    if told:
        return "ended", pickle.loads(told)  # noqa: S301 - from our own child
    return ("late", "") if is_late else ("crashed", _in_words(status))


def _be_child(run: Callable[[], Any], writing: int) -> None:
    """Call `run`, write what it returns, and end this process."""
    import pickle
    import signal

    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _leave_ray()
    told = pickle.dumps(run())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    left = memoryview(len(told).to_bytes(_LENGTH_BYTES, "big") + told)
    while left:
        left = left[os.write(writing, left) :]
    os._exit(0)


def _leave_ray() -> None:
    """Make calls of Ray fail at once.

    The threads that would serve them are not in this process, and its connections are those of the
    worker, which would crash.
    """
    worker: Any = sys.modules.get("ray._private.worker")
    hook: Any = sys.modules.get("ray._private.auto_init_hook")
    if worker is not None and hook is not None:
        worker.global_worker.set_is_connected(False)
        hook.enable_auto_connect = False


def _read(reading: int, pid: int, timeout_s: float) -> tuple[bytes, bool, int | None]:
    """Return the child's message, whether it is late, and its exit status if it has ended.

    The end of the pipe tells nothing: what the child has started may hold it open.
    """
    import select
    import time

    until, told, status, is_open = time.monotonic() + timeout_s, bytearray(), None, True
    while True:
        left_s = until - time.monotonic()
        pause_s = max(0.0, min(left_s, _LOOK_S))
        if not is_open:  # the child ends now, or it has closed the pipe and goes on
            time.sleep(min(pause_s, 0.01))
        elif select.select([reading], [], [], pause_s)[0]:
            part = os.read(reading, 1 << 20)
            told += part
            length = int.from_bytes(told[:_LENGTH_BYTES], "big") + _LENGTH_BYTES
            if len(told) >= _LENGTH_BYTES and len(told) >= length:
                return bytes(told[_LENGTH_BYTES:length]), False, status
            is_open = bool(part)
            if is_open:
                continue
        if status is not None:  # it had ended before this look, and all that it wrote was read
            return b"", False, status
        ended, found = os.waitpid(pid, os.WNOHANG)
        status = found if ended else None
        if status is None and left_s <= 0:
            return b"", True, None


def _end(pid: int, before: set[int], status: int | None) -> int:
    """End the child and all that it has started; return its exit status."""
    import contextlib

    if status is None:
        _kill(pid)
        _, status = os.waitpid(pid, 0)
    for _ in range(100):  # the children of an orphan that ends are orphans, too
        left = _children() - before
        if not left:
            break
        for orphan in left:
            _kill(orphan)
            with contextlib.suppress(OSError):
                os.waitpid(orphan, 0)
    return status


def _kill(pid: int) -> None:
    import contextlib
    import signal

    with contextlib.suppress(OSError):  # it has ended
        os.kill(pid, signal.SIGKILL)


def _children() -> set[int]:
    """The children of this process; empty where the kernel does not tell."""
    found: set[int] = set()
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
                found.update(map(int, file.read().split()))
    except OSError:  # no such file, or the thread has ended
        pass
    return found


def _in_words(status: int) -> str:
    import signal

    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"its process ended with exit code {code} before it had a result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"its process was ended by signal {-code} ({name})"


def _prctl(option: int, value: int) -> None:
    """Call Linux's `prctl`; elsewhere, do nothing."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
