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
#: The time between two looks at the head's port.
_LOOK_S = 1.0


class ClusterWatch:
    """Whether the head of the cluster answers, and since when it does not."""

    def __init__(self) -> None:
        self._answers = True
        self._looked_at = time.monotonic()
        self._away_at: float | None = None

    def head_answers(self) -> bool:
        """Return whether the head has answered at the last look."""
        if time.monotonic() - self._looked_at > _LOOK_S:
            self._answers = connecting.head_answers()
            self._looked_at = time.monotonic()
        return self._answers

    def check(self, nodes: Collection[str]) -> None:
        """Raise `ClusterLost` if the head, or every node, has been away for 30 s.

        `nodes` are the live nodes that the head last told of.
        """
        now, answers = time.monotonic(), self.head_answers()
        if answers and nodes:
            self._away_at = None
            return
        self._away_at = self._away_at or now
        if now - self._away_at > _LOST_S:
            what = "no node of it is alive" if answers else "its head does not answer"
            raise ClusterLost(
                f"the Ray cluster has ended while the batch ran: {what} since {_LOST_S:g} s",
                hint="start it again, then run again with --resume: results so far are kept",
            )
