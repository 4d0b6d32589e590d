"""The live nodes of the cluster and their resources, as Ray last told them.

Runs in the user's program. Ray is asked in a thread of its own: its call waits for a head that is
gone, for a minute or longer.
"""

from __future__ import annotations

from concurrent import futures
from concurrent.futures import Future
from threading import Thread

from ray_envs.client import scheduling

#: How long an answer is waited for. It takes milliseconds where the head is well.
_PATIENCE_S = 5.0


class NodeTable:
    """`totals`: the total resources of each live node, by node id."""

    def __init__(self) -> None:
        self.totals: dict[str, dict[str, float]] = {}
        self._asked: Future[dict[str, dict[str, float]]] | None = None
        self.look()

    def look(self) -> bool:
        """Read the list again; return False, and keep the old one, if Ray does not answer."""
        patience_s = 0.0  # it has been waited for already
        if self._asked is None:
            self._asked, patience_s = Future(), _PATIENCE_S
            Thread(target=_ask, args=(self._asked,), daemon=True).start()
        try:
            self.totals = self._asked.result(patience_s)
        except futures.TimeoutError:
            return False
        except Exception:  # the head is gone, or just being started: `cluster_watch` decides
            self._asked = None
            return False
        self._asked = None
        return True


def _ask(asked: Future[dict[str, dict[str, float]]]) -> None:
    try:
        asked.set_result(scheduling.node_totals())
    except Exception as exc:
        asked.set_exception(exc)
