"""The items of a batch that wait for their start, and the results that wait for the caller.

Runs in the user's program. `dispatch` starts and watches single items. This module decides when an
item starts, and what happens while the manager does not answer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator

from ray_envs.batch_models import ItemResult
from ray_envs.client.connection import RESTART_S, call_limit
from ray_envs.client.dispatch import Dispatcher
from ray_envs.client.items import Item, not_run
from ray_envs.client.waiting import Waiting
from ray_envs.errors import ManagerUnavailable, RayEnvsError

#: How long one start may wait for a manager that does not answer: other items' results come in.
_CALL_LIMIT_S = 15.0
#: The pause before the manager is asked again when nothing runs.
_PAUSE_S = 0.5


class ItemQueue:
    """Starts items, at most `max_pending` at a time, until `cancelled` is set."""

    def __init__(
        self, dispatcher: Dispatcher, waiting: Waiting, max_pending: int, cancelled: threading.Event
    ) -> None:
        self._dispatcher = dispatcher
        self._waiting = waiting
        self._max_pending = max_pending
        self._cancelled = cancelled
        self._results: deque[ItemResult] = deque()
        #: The keys of environments in which an item has just ended, so that a worker is free.
        self._warm: list[str] = []
        #: Since when the manager does not answer; None while it answers.
        self._away_at: float | None = None

    def results(self) -> Iterator[ItemResult]:
        """Start the items and yield each result, until all have ended or the batch is cancelled."""
        while self._waiting or self._dispatcher.lanes or self._results:
            self._launch()
            # After the starts: the caller may take long with each result.
            for results in (self._waiting.results, self._results):
                while results:
                    yield results.popleft()
            if self._cancelled.is_set():
                return
            self._collect()
            if self._away_at is not None and not self._dispatcher.lanes:
                self._cancelled.wait(_PAUSE_S)

    def _launch(self) -> None:
        """Start items while there is room for them and the manager answers."""
        while self._waiting and (room := self._max_pending - self._dispatcher.pending()) > 0:
            if self._results and self._away_at is not None:  # a start may take long now
                return
            waiting = self._waiting
            firsts, left = waiting.firsts(), waiting.left()
            item = self._dispatcher.next_item(firsts, left, self._warm) if firsts else None
            if item is None or self._cancelled.is_set():
                return
            # Not all that may be pending to one lane: the others need work, too.
            count = self._dispatcher.chunk(item, min(left[item.key], self._max_pending))
            items = waiting.take(item, min(count, room))
            try:
                with call_limit(_CALL_LIMIT_S):
                    if not self._dispatcher.launch(items):
                        waiting.put_back(items)
                self._away_at = None
            except ManagerUnavailable as exc:
                self._away_at = self._away_at or time.monotonic()
                if time.monotonic() - self._away_at > RESTART_S:
                    self._results.append(not_run(item, exc))
                    items = items[1:]
                waiting.put_back(items)
                return
            except RayEnvsError as exc:
                self._results.append(not_run(item, exc))
                waiting.put_back(items[1:])

    def _collect(self) -> None:
        """Take the results of items that ended; put those to start again in front of the others."""
        again: list[Item] = []
        try:
            with call_limit(_CALL_LIMIT_S):
                for item, result in self._dispatcher.ended():
                    if result is None:
                        again.append(item)
                    else:
                        self._results.append(result)
        finally:
            self._waiting.put_back(again)
        self._warm = self._dispatcher.freed
