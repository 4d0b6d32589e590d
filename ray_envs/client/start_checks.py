"""Asks why the workers of a variant do not start, while the batch goes on.

Runs in the user's program, in threads of its own: a check reads every file of an environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread

from ray_envs.errors import RayEnvsError


class StartChecks:
    """The checks of one batch. `check` returns why no worker of a variant can start, or None."""

    def __init__(self, check: Callable[[str], RayEnvsError | None], every_s: float) -> None:
        self._check = check
        self._every_s = every_s
        #: By variant: when its last check began, and its result.
        self._checks: dict[str, tuple[float, Future[RayEnvsError | None]]] = {}

    def error_of(self, name: str) -> RayEnvsError | None:
        """Return what the last check of a variant found; begin one if that was long ago."""
        began_at, found = self._checks.get(name, (0.0, None))
        if found is None or (found.done() and time.monotonic() - began_at > self._every_s):
            asked: Future[RayEnvsError | None] = Future()
            self._checks[name] = (time.monotonic(), asked)
            Thread(target=self._run, args=(name, asked), daemon=True).start()
        return found.result() if found is not None and found.done() else None

    def _run(self, name: str, asked: Future[RayEnvsError | None]) -> None:
        error = None
        # The manager is away, the variant was deleted, or Ray is being shut down: ask later.
        with suppress(Exception):
            error = self._check(name)
        asked.set_result(error)
