"""What the manager's loop does besides building: announce, settle, reload, collect, prune."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import datetime, timezone

from ray_envs.errors import StorageFailed
from ray_envs.manager import presence
from ray_envs.manager.wiring import Parts

_PRUNE_HISTORY_S = 3600.0


class Chores:
    """The regular work of one manager that is not the building of environments."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        #: The open lock of `presence`: this manager serves the root.
        self._announced: int | None = None
        #: The same, of this session of Ray among those that use the root.
        self._joined: int | None = None
        self._has_begun = self._is_settled = False
        self._prune_history_at = self._reload_at = 0.0

    async def awake(self) -> None:
        """Start the loop, if it does not run yet, and wait for its first turn."""
        if not self._has_begun:
            self._has_begun = True
            with suppress(StorageFailed):  # the loop tries again, and the verbs tell the reason
                self._announce()
        await self._parts.reconciler.awake(self._turn)

    async def stop(self) -> None:
        """End the loop and, where the agent lives in this process, its builds."""
        await self._parts.reconciler.stop()
        self._parts.operations.history.close()
        if self._announced is not None:
            os.close(self._announced)
            self._announced = None
        if self._joined is not None:
            os.close(self._joined)
            self._joined = None

    async def _turn(self) -> None:
        parts = self._parts
        self._announce()  # again in each turn: the manager that had the root may have ended
        if self._joined is not None:
            with suppress(OSError):  # the lock alone shows that this manager lives
                os.utime(self._joined)
        if not self._is_settled:
            self._is_settled = True
            await parts.operations.settle_all()
        if time.monotonic() >= self._reload_at:  # each turn is too often for thousands of variants
            self._reload_at = time.monotonic() + parts.settings.tick_s
            parts.reconciler.reload()
        if self._announced is not None:  # a second manager of a root leaves this to the first
            await parts.collector.turn()
            if time.monotonic() >= self._prune_history_at:
                self._prune_history_at = time.monotonic() + _PRUNE_HISTORY_S
                parts.operations.history.prune(datetime.now(timezone.utc))

    def _announce(self) -> None:
        if self._announced is None:
            root, cluster = self._parts.settings.root, self._parts.cluster
            if self._joined is None and cluster.address():
                with suppress(StorageFailed):  # a full disk must not keep it from being emptied
                    self._joined = presence.join(root, cluster.session())
            self._announced = presence.announce(root, cluster.address())
            if self._announced is not None:
                self._parts.variants.wishes.write_from_now()
