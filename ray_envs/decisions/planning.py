"""Decides what each node has to build now, from the wanted environments and the state of the nodes.

Level-triggered: the planner keeps no state between two calls, so any snapshot is a legal input,
also the one after a restart. The manager's `reconciler` takes the snapshot and acts; `targets`
decides which nodes shall have an environment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_envs.decisions.targets import Need, NodeView, chosen, fits, spread
from ray_envs.errors import StorageFailed, from_dict
from ray_envs.models import NodeEnvState, Phase, Status

#: How many environments a node builds or waits to build at a time; it gets more when some are done.
MAX_TOLD = 8
#: After so many nodes have failed to download an environment, every node tries for itself.
_MAX_DOWNLOADERS = 3
#: How many peers a node gets to ask for wheels.
_MAX_PEERS = 4
#: How many nodes get wheels from one peer at a time; soon they can send them to others.
_MAX_RECEIVERS = 4
#: The pause after the first failure that may pass. It doubles with each failure, up to the last.
_FIRST_PAUSE_S = 30.0
_LAST_PAUSE_S = 900.0


@dataclass(frozen=True, slots=True)
class Wish:
    """An environment that at least one variant wants.

    `attempt` rises with each new request: a node that failed tries again for each attempt.
    """

    key: str
    attempt: int
    variants: tuple[str, ...]
    #: A node must have the same platform, Python and Ray; see `NodeView.site`.
    site: str
    #: The requirements of the variants for nodes; a node gets the environment if it meets one.
    needs: tuple[Need, ...] = (Need(),)


@dataclass(frozen=True, slots=True)
class Build:
    """An order to the agent of `node_id` to make `key` ready; `because` is for people."""

    node_id: str
    key: str
    attempt: int
    because: str
    #: Nodes that have its wheels, in the order to ask them; if empty, ask the package index.
    peers: tuple[str, ...] = ()
    #: Only download its wheels, for other nodes.
    is_cache_only: bool = False


def plan(wishes: Iterable[Wish], nodes: Iterable[NodeView]) -> list[Build]:
    """Return the builds to start now.

    If no node has an environment, one node downloads it: the head if it has the right site, even if
    it does not use the environment itself. The others get it from nodes that have it, a few at a
    time from each. A node gets a few environments at a time.
    """
    return _Plan(wishes, nodes).actions()


class _Plan:
    """The plan for one snapshot.

    Of a thousand nodes and keys most have nothing to do. Set operations find the others quickly.
    """

    def __init__(self, wishes: Iterable[Wish], nodes: Iterable[NodeView]) -> None:
        #: Nodes with waiting workers come first, and so do the keys that these wait for.
        self._nodes = sorted(nodes, key=lambda node: (not node.asked, node.node_id))
        asked = {key for node in self._nodes for key in node.asked}
        order = sorted(wishes, key=lambda wish: (wish.key not in asked, wish.key))
        self._wishes = {wish.key: wish for wish in order}
        self._head = next((node for node in self._nodes if node.is_head), None)
        #: By key: the nodes that build it, and those that failed and must not try again now.
        self._building: defaultdict[str, list[NodeView]] = defaultdict(list)
        self._failed: defaultdict[str, list[NodeView]] = defaultdict(list)
        #: Keys that a node can send to others, without those that are sent often enough already.
        self._available: set[str] = set()
        self._sort_states()
        #: By node: key sets that it shares with similar nodes, and keys for this node alone.
        self._common: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
        self._own: defaultdict[str, set[str]] = defaultdict(set)
        self._owners: defaultdict[str, list[NodeView]] = defaultdict(list)
        self._fits: dict[tuple[str, tuple[Need, ...]], list[NodeView]] = {}
        self._assign()
        #: By node: the keys that it must download from the package index.
        self._downloads: defaultdict[str, set[str]] = defaultdict(set)
        for key in self._wishes.keys() - self._available:
            for node in self._downloaders(self._wishes[key]):
                self._downloads[node.node_id].add(key)
        #: By key: the nodes that can send it, how many more may get it now, and who sends next.
        self._senders: dict[str, list[NodeView]] = {}
        self._room: dict[str, int] = {}
        self._turn: dict[str, int] = {}

    def _sort_states(self) -> None:
        """Fill `_available`, `_building` and `_failed` from the states of the nodes."""
        for node in self._nodes:
            self._available |= node.ready
            for key, state in node.others.items():
                if state.phase is Phase.CACHED:
                    self._available.add(key)
                elif state.phase is not Phase.FAILED:
                    self._building[key].append(node)
                elif key in self._wishes and not _why_build(self._wishes[key], node):
                    self._failed[key].append(node)
        self._available &= self._wishes.keys()

    def _assign(self) -> None:
        """Fill `_common`, `_own` and `_owners`: which nodes shall have which keys."""
        common: dict[tuple[str, tuple[Need, ...]], set[str]] = {}
        for key, wish in self._wishes.items():
            if everywhere := _everywhere(wish):
                common.setdefault((wish.site, everywhere), set()).add(key)
            for need in wish.needs:
                if need.count is not None:
                    for node in chosen(need, key, self._fitting(wish.site, (need,))):
                        self._give(key, node)
        for (site, needs), found in common.items():
            keys = frozenset(found)
            for node in self._fitting(site, needs):
                self._common[node.node_id].append(keys)
        for node in self._nodes:
            for key in node.asked:
                if key in self._wishes and self._wishes[key].site == node.site:
                    self._give(key, node)

    def _give(self, key: str, node: NodeView) -> None:
        if key not in self._own[node.node_id]:
            self._own[node.node_id].add(key)
            self._owners[key].append(node)

    def _fitting(self, site: str, needs: tuple[Need, ...]) -> list[NodeView]:
        if (site, needs) not in self._fits:
            self._fits[site, needs] = [
                node
                for node in self._nodes
                if node.site == site
                and any(fits(need, node.labels, node.num_gpus) for need in needs)
            ]
        return self._fits[site, needs]

    def _downloaders(self, wish: Wish) -> list[NodeView]:
        """Return the nodes that download an environment which no node has.

        The head is first, even if it shall not have the environment. It is one node at a time,
        and none while one is at work, until `_MAX_DOWNLOADERS` have failed.
        """
        head = self._head if self._head is not None and self._head.site == wish.site else None
        failed = {node.node_id for node in self._failed[wish.key]}
        all_try = len(failed) >= _MAX_DOWNLOADERS
        if self._building[wish.key] and not all_try:
            return []
        everywhere = _everywhere(wish)
        targets = self._fitting(wish.site, everywhere) if everywhere else []
        targets = self._owners[wish.key] + targets
        if targets and head is not None and head.node_id not in failed:
            return [head]
        able = [node for node in targets if node.node_id not in failed]
        start = spread("", wish.key) % max(1, len(able))
        return able if all_try else able[start : start + 1]

    def actions(self) -> list[Build]:
        return [action for node in self._nodes for action in self._builds_of(node)]

    def _builds_of(self, node: NodeView) -> list[Build]:
        """Return the builds that one node has to start; first those that its workers wait for."""
        room = MAX_TOLD - sum(not state.phase.is_final for state in node.others.values())
        if room <= 0:
            return []
        possible = (self._own[node.node_id] - node.ready) & self._available
        for keys in self._common[node.node_id]:
            possible |= (keys - node.ready) & self._available
        possible |= self._downloads[node.node_id]
        order = [key for key in self._wishes if key in possible] if possible else []
        order.sort(key=lambda key: key not in node.asked)
        found: list[Build] = []
        for key in order:
            action = self._build(node, self._wishes[key])
            if action is not None:
                found.append(action)
                if len(found) == room:
                    break
        return found

    def _build(self, node: NodeView, wish: Wish) -> Build | None:
        """Return the build that the node has to start now for a wish, or None."""
        because = _why_build(wish, node)
        if not because:
            return None
        if wish.key not in self._downloads[node.node_id]:
            peers = self._peers(node, wish.key)
            if not peers and not _is_cached(node, wish.key):
                return None
            return Build(node.node_id, wish.key, wish.attempt, because, peers)
        if self._shall_have(node, wish.key):
            return Build(node.node_id, wish.key, wish.attempt, because)
        because = f"other nodes want it for {_names(wish)}, and none has its wheels"
        return Build(node.node_id, wish.key, wish.attempt, because, is_cache_only=True)

    def _peers(self, node: NodeView, key: str) -> tuple[str, ...]:
        """Return the peers that the node asks for the wheels of `key`; none if all are busy.

        If others have them, the head is asked last: it already sends every key to the first nodes.
        """
        if key not in self._senders:
            having = [each for each in self._nodes if _has(each, key)]
            senders = [each for each in having if each is not self._head] or having
            self._senders[key] = senders
            self._room[key] = _MAX_RECEIVERS * len(senders) - len(self._building[key])
            self._turn[key] = spread(node.node_id, key) % len(senders)
        if self._room[key] <= 0:
            self._available.discard(key)
            return ()
        senders, turn = self._senders[key], self._turn[key]
        self._room[key] -= 1
        self._turn[key] = (turn + 1) % len(senders)
        peers = [each for each in senders[turn:] + senders[:turn] if each is not node]
        if self._head is not None and self._head is not node and _has(self._head, key):
            peers = [each for each in peers[: _MAX_PEERS - 1] if each is not self._head]
            peers.append(self._head)
        return tuple(each.node_id for each in peers[:_MAX_PEERS])

    def _shall_have(self, node: NodeView, key: str) -> bool:
        common = self._common[node.node_id]
        return key in self._own[node.node_id] or any(key in keys for keys in common)


def _everywhere(wish: Wish) -> tuple[Need, ...]:
    return tuple(need for need in wish.needs if need.count is None)


def _has(node: NodeView, key: str) -> bool:
    """Whether the node can send the wheels of `key` to others."""
    return key in node.ready or _is_cached(node, key)


def _is_cached(node: NodeView, key: str) -> bool:
    state = node.others.get(key)
    return state is not None and state.phase is Phase.CACHED


def _why_build(wish: Wish, node: NodeView) -> str:
    """Return why a node must build the wish now, or an empty string if it must not."""
    if wish.key in node.ready:
        return ""
    state = node.others.get(wish.key)
    if state is None or state.phase is Phase.CACHED:
        if wish.key in node.asked:
            return "a worker waits for it here"
        return f"wanted by {_names(wish)} and not there"
    if is_to_try_again(state, wish.attempt):
        return f"wanted again by {_names(wish)} after a failure"
    if state.phase is Phase.FAILED and wish.key in node.due:
        return f"wanted by {_names(wish)}; the failure may have passed"
    return ""


def _names(wish: Wish) -> str:
    names = ", ".join(wish.variants[:3]) + (", …" if len(wish.variants) > 3 else "")
    return names or "a worker"


def may_pass(error: Mapping[str, str]) -> bool:
    """Whether a failure may pass with time, such as a lost network or a full disk."""
    found = from_dict(dict(error))
    return found.retryable or isinstance(found, StorageFailed)


def pause_s(failures: int) -> float:
    """Return how long a node waits after so many failures in a row, in seconds."""
    return float(min(_FIRST_PAUSE_S * 2 ** min(failures - 1, 20), _LAST_PAUSE_S))


def is_to_try_again(state: NodeEnvState, attempt: int) -> bool:
    """Whether the environment was requested again after a failure."""
    return state.phase is Phase.FAILED and state.attempt < attempt


def status_of(
    key: str, node_ids: Iterable[str], states: Mapping[str, Mapping[str, NodeEnvState]]
) -> Status:
    """Return the status of a variant with this key, over all nodes that shall have it.

    ACTIVE if all are ready; ERROR if all are ready or failed, and one failed; otherwise CREATING.
    """
    phases = []
    for node_id in node_ids:
        state = states.get(node_id, {}).get(key)
        phases.append(state.phase if state else Phase.WAITING)
    if phases and all(phase is Phase.READY for phase in phases):
        return Status.ACTIVE
    if phases and all(phase in (Phase.READY, Phase.FAILED) for phase in phases):
        return Status.ERROR
    return Status.CREATING
