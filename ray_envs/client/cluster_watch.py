"""Notices that the cluster under a batch has ended, before Ray ends this process without a word.

Runs in the user's program. It asks the head's port, never Ray: a call would wait for a dead head.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from ray_envs.cluster import connecting
from ray_envs.errors import ClusterLost

#: How long the head, or all nodes, may be away. Ray ends a driver after 60 s without a head.
_LOST_S = 30.0
_HINT = "start it again, then run again with --resume: results so far are kept"
#: The time between two looks at the head's port.
_LOOK_S = 1.0
#: The same for the Ray node of this machine, which logs each look. Ray ends a driver 15 s after it.
_RAYLET_S = 5.0


class ClusterWatch:
    """Whether the head of the cluster and the Ray node of this machine live, and since when not."""

    def __init__(self) -> None:
        self._answers = True
        self._has_raylet = True
        self._looked_at = self._raylet_at = time.monotonic()
        self._away_at: float | None = None
        self.is_lost = False

    def head_answers(self) -> bool:
        """Return whether the head has answered at the last look."""
        now = time.monotonic()
        if now - self._looked_at > _LOOK_S:
            self._answers, self._looked_at = connecting.head_answers(), now
        if now - self._raylet_at > _RAYLET_S:
            self._has_raylet, self._raylet_at = connecting.raylet_answers(), now
        return self._answers

    def check(self, nodes: Collection[str]) -> None:
        """Raise `ClusterLost` if the head or every node has been away for 30 s, or this node ended.

        `nodes` are the live nodes that the head last told of.
        """
        now, answers = time.monotonic(), self.head_answers()
        if not self._has_raylet:
            self.is_lost = True
            raise ClusterLost(
                "the Ray node of this machine has ended while the batch ran", hint=_HINT
            )
        if answers and nodes:
            self._away_at = None
            return
        self._away_at = self._away_at or now
        if now - self._away_at > _LOST_S:
            self.is_lost = True
            what = "no node of it is alive" if answers else "its head does not answer"
            raise ClusterLost(
                f"the Ray cluster has ended while the batch ran: {what} since {_LOST_S:g} s",
                hint=_HINT,
            )
