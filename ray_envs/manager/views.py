"""Nodes as the planner sees them: what they have, what workers wait for, what to retry."""

from __future__ import annotations

import time
from collections.abc import Iterable

from ray_envs.decisions import planning
from ray_envs.decisions.targets import NodeView
from ray_envs.manager.fleet import Node
from ray_envs.models import NodeEnvState, Phase


class Views:
    """Makes the planner's view of a node, and remembers failures for it."""

    def __init__(self) -> None:
        #: By node and key: the last failure, the number of failures in a row, and when it was seen.
        self._failures: dict[tuple[str, str], tuple[NodeEnvState, int, float]] = {}

    def of(self, node: Node) -> NodeView:
        """The view of one node. A failed environment is due when its pause is over."""
        node_id, now = node.info.node_id, time.monotonic()
        due = set()
        for key in node.others:
            seen = self._failures.get((node_id, key))
            if seen is not None and now - seen[2] >= planning.pause_s(seen[1]):
                due.add(key)
        return NodeView(
            node_id=node_id,
            site=node.site,
            is_head=node.info.is_head,
            labels=node.info.labels,
            num_gpus=node.info.num_gpus,
            ready=node.ready,
            others=node.others,
            asked=node.asked,
            due=frozenset(due),
        )

    def note_failures(self, nodes: Iterable[Node]) -> None:
        """Count the failures in a row of environments that may succeed when they are retried."""
        failures = {}
        for node in nodes:
            for key, state in node.others.items():
                place = (node.info.node_id, key)
                last = self._failures.get(place)
                if state.phase is Phase.FAILED and planning.may_pass(state.error or {}):
                    if last is None or last[0] != state:
                        last = (state, last[1] + 1 if last else 1, time.monotonic())
                    failures[place] = last
                elif last is not None and not state.phase.is_final:  # it is being retried
                    failures[place] = last
        self._failures = failures
