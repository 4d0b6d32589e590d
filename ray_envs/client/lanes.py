"""A lane: items of one variant that one Ray task runs, one after the other, and what it tells.

`dispatch` starts lanes and ends them. A Ray task costs milliseconds, and a message of its stream
much less: so items that are short share a task.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_envs.client.items import Item

#: How many seconds of work a lane is given at once: little against the time that its worker takes
#: to start, and much against the time of a Ray task.
_CHUNK_S = 0.2
#: After so long, a lane gives back the items that have not begun: some took longer than expected.
BUDGET_S = 2 * _CHUNK_S
#: The time that no item is taken to be shorter than, and the most items of a lane.
_LEAST_S = 0.002
#: How much longer than its time limit an item may take whose worker ends it.
_GRACE_S = 5.0
#: The weight of the newest item in the mean length of items.
_NEWEST = 0.3


@dataclass(slots=True, eq=False)
class Lane:
    """The items of one Ray task that have not ended; the first one may have begun."""

    items: deque[Item]
    nodes: tuple[str, ...]
    #: The item that it was started for: its attempt began with the start.
    lead: Item
    launched_at: float = field(default_factory=time.monotonic)
    #: When its last message came.
    heard_at: float = field(default_factory=time.monotonic)
    #: The node of its worker; None until that has begun an item.
    node_id: str | None = None
    #: Whether the next message is the value of the first item, whose outcome is known.
    awaits_value: bool = False

    @property
    def first(self) -> Item:
        return self.items[0]

    def begin(self, began: Mapping[str, Any]) -> None:
        """Note that the first item has begun."""
        item = self.first
        item.attempts += item is not self.lead
        item.began = dict(began)
        # In a child process, the worker ends the item itself.
        grace_s = _GRACE_S if item.limits.isolation == "process" else 0.0
        item.deadline = time.monotonic() + item.limits.timeout_s + grace_s
        self.node_id = began["node_id"]


@dataclass
class Paces:
    """How long the items of each environment take, as far as some have ended."""

    _means: dict[str, float] = field(default_factory=dict)

    def note(self, item: Item) -> None:
        """Take the length of an item that has ended into account."""
        seconds = float((item.outcome or {}).get("duration_s", 0.0))
        mean = self._means.get(item.key, seconds)
        self._means[item.key] = mean + _NEWEST * (seconds - mean)

    def chunk(self, item: Item, left: int, slots: int) -> int:
        """Return how many items a new lane gets.

        Args:
            item: the first of them.
            left: how many of its variant wait.
            slots: how many lanes the cluster has room for. Each gets a share of what is left.
        """
        mean = self._means.get(item.key)
        if mean is None or not item.may_share:
            return 1
        share = -(-left // (2 * max(slots, 1)))
        return max(1, min(int(_CHUNK_S / max(mean, _LEAST_S)), share))
