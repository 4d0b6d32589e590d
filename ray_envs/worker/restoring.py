"""Restores what an item has changed in its worker, for the items that run there later."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ray_envs.worker.paths import current_folder


def restorer(folder: str | None) -> Callable[[], None]:
    """Remember the state of this process, and return the function that restores it.

    That is: the current folder (`folder`), environment variables, umask, `sys.path`, the recursion
    limit, Python's signal handlers, timers, standard streams, and builtins that were replaced.
    Modules that an item has patched stay patched. Call it in the main thread. The returned function
    raises an error if something cannot be restored, such as the user or a closed stream.
    """
    import builtins
    import contextlib
    import signal

    user, variables = (os.geteuid(), os.getegid()), dict(os.environ)
    umask = os.umask(0o077)
    os.umask(umask)
    path, limit = list(sys.path), sys.getrecursionlimit()
    streams = {name: getattr(sys, name) for name in ("stdin", "stdout", "stderr")}
    names = dict(vars(builtins))
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def restore() -> None:
        vars(builtins).update(names)  # first: the rest needs them
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        for timer in signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF:
            signal.setitimer(timer, 0)
        os.umask(umask)
        sys.path[:] = path
        sys.setrecursionlimit(limit)
        for name, stream in streams.items():
            setattr(sys, name, stream)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if (os.geteuid(), os.getegid()) != user:
            raise PermissionError("an item has changed the user of its worker")
        if dict(os.environ) != variables:
            os.environ.clear()
            os.environ.update(variables)
        if folder is not None and current_folder() != folder:
            with contextlib.suppress(OSError):  # it is gone
                os.chdir(folder)

    return restore
