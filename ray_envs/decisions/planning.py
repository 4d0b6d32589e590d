"""What each node has to build, given what is wanted and there. Pure: a snapshot in, actions out.

Level-triggered: the planner keeps nothing between two calls, so any snapshot is a legal input and
the state after a restart is planned like any other. `reconciler` gathers the snapshot and acts;
on which nodes an environment shall be is said by `targets`, below.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ray_envs.decisions.targets import Need, NodeView, chosen, fits, spread
from ray_envs.errors import StorageFailed, from_dict
from ray_envs.models import NodeEnvState, Phase, Status

#: How many environments a node is told of at once: the rest when it has finished with some.
MAX_TOLD = 8
#: How many nodes try the package index in vain before each one tries for itself.
_MAX_DOWNLOADERS = 3
#: Of how many peers a node is told that they have what it lacks.
_MAX_PEERS = 4
#: How many nodes get a key from one that has it, at once: soon those give it to others.
_MAX_RECEIVERS = 4
#: The first pause after a failure that may pass, in seconds; it doubles up to the second number.
_FIRST_PAUSE_S = 30.0
_LAST_PAUSE_S = 900.0


@dataclass(frozen=True, slots=True)
class Wish:
    """An environment that some variant wants.

    `attempt` rises whenever somebody asks again: a failure is tried at once for each attempt.
    """

    key: str
    attempt: int
    variants: tuple[str, ...]
    #: What a node must be to have it.
    site: str
    #: What each of the variants asks of nodes; together they get the nodes of all of them.
    needs: tuple[Need, ...] = (Need(),)


@dataclass(frozen=True, slots=True)
class Build:
    """Tell the agent of `node_id` to make `key` ready; `because` is for people."""

    node_id: str
    key: str
    attempt: int
    because: str
    #: Nodes that have its wheels, in the order in which to ask them; none: the package index.
    peers: tuple[str, ...] = ()
    #: Only get its wheels, for other nodes.
    is_cache_only: bool = False


def plan(wishes: Iterable[Wish], nodes: Iterable[NodeView]) -> list[Build]:
    """What to begin now, so that every wish becomes true on every node that shall have it.

    One node downloads what no node has: the head, where it fits, even for others; then the rest
    gets it from there, a few at a time from each. A node is told of a few environments at a time.

    Args:
        wishes: what is wanted.
        nodes: the live nodes.
    """
    return _Plan(wishes, nodes).actions()


class _Plan:
    """One snapshot, and what follows from it.

    Of a thousand nodes and keys most have nothing to do; sets find out which have.
    """

    def __init__(self, wishes: Iterable[Wish], nodes: Iterable[NodeView]) -> None:
        #: Where workers wait, and what they wait for, comes first.
        self._nodes = sorted(nodes, key=lambda node: (not node.asked, node.node_id))
        asked = {key for node in self._nodes for key in node.asked}
        order = sorted(wishes, key=lambda wish: (wish.key not in asked, wish.key))
        self._wishes = {wish.key: wish for wish in order}
        self._head = next((node for node in self._nodes if node.is_head), None)
        #: By key: the nodes that are at it, and those that failed and are not to try again now.
        self._at_it: defaultdict[str, list[NodeView]] = defaultdict(list)
        self._failed: defaultdict[str, list[NodeView]] = defaultdict(list)
        #: What some node has for others; without what enough others get already.
        self._open: set[str] = set()
        self._look()
        #: By node: sets of what all such nodes shall have, and what it was chosen for or asked.
        self._common: defaultdict[str, list[frozenset[str]]] = defaultdict(list)
        self._own: defaultdict[str, set[str]] = defaultdict(set)
        self._owners: defaultdict[str, list[NodeView]] = defaultdict(list)
        self._fits: dict[tuple[str, tuple[Need, ...]], list[NodeView]] = {}
        self._share_out()
        #: By node: what it has to ask the package index for.
        self._downloads: defaultdict[str, set[str]] = defaultdict(set)
        for key in self._wishes.keys() - self._open:
            for node in self._downloaders(self._wishes[key]):
                self._downloads[node.node_id].add(key)
        #: By key: who has it, how many more may be sent it now, and who sends it next.
        self._senders: dict[str, list[NodeView]] = {}
        self._room: dict[str, int] = {}
        self._turn: dict[str, int] = {}

    def _look(self) -> None:
        """Sort by key what nodes say."""
        for node in self._nodes:
            self._open |= node.ready
            for key, state in node.others.items():
                if state.phase is Phase.CACHED:
                    self._open.add(key)
                elif state.phase is not Phase.FAILED:
                    self._at_it[key].append(node)
                elif key in self._wishes and not _why_build(self._wishes[key], node):
                    self._failed[key].append(node)
        self._open &= self._wishes.keys()

    def _share_out(self) -> None:
        """Find out which nodes shall have what."""
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
        """Who is to ask the package index for what no node has: one, until some have failed.

        The head first, even where it shall not have it; nobody while somebody is at it.
        """
        head = self._head if self._head is not None and self._head.site == wish.site else None
        failed = {node.node_id for node in self._failed[wish.key]}
        is_vain = len(failed) >= _MAX_DOWNLOADERS
        if self._at_it[wish.key] and not is_vain:
            return []
        everywhere = _everywhere(wish)
        targets = self._fitting(wish.site, everywhere) if everywhere else []
        targets = self._owners[wish.key] + targets
        if targets and head is not None and head.node_id not in failed:
            return [head]
        able = [node for node in targets if node.node_id not in failed]
        start = spread("", wish.key) % max(1, len(able))
        return able if is_vain else able[start : start + 1]

    def actions(self) -> list[Build]:
        return [action for node in self._nodes for action in self._begun(node)]

    def _begun(self, node: NodeView) -> list[Build]:
        """What one node has to begin; what workers wait for there comes first."""
        room = MAX_TOLD - sum(not state.phase.is_final for state in node.others.values())
        if room <= 0:
            return []
        possible = (self._own[node.node_id] - node.ready) & self._open
        for keys in self._common[node.node_id]:
            possible |= (keys - node.ready) & self._open
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
        """What the node has to do for the wish now, if anything."""
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
        """Who sends the node the wheels of `key`, the next one first; nobody where all are busy.

        The head, which gives everything to the first ones, is asked last where others have it.
        """
        if key not in self._senders:
            having = [each for each in self._nodes if _has(each, key)]
            senders = [each for each in having if each is not self._head] or having
            self._senders[key] = senders
            self._room[key] = _MAX_RECEIVERS * len(senders) - len(self._at_it[key])
            self._turn[key] = spread(node.node_id, key) % len(senders)
        if self._room[key] <= 0:
            self._open.discard(key)
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
    """Whether it can give the wheels of `key` to others."""
    return key in node.ready or _is_cached(node, key)


def _is_cached(node: NodeView, key: str) -> bool:
    state = node.others.get(key)
    return state is not None and state.phase is Phase.CACHED


def _why_build(wish: Wish, node: NodeView) -> str:
    """Why a node must build the wish now, or an empty string where it must not."""
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
    """Whether a failure is one that time may mend: a network that is away, a full disk."""
    found = from_dict(dict(error))
    return found.retryable or isinstance(found, StorageFailed)


def pause_s(failures: int) -> float:
    """How long to wait after so many failures in a row before a node tries again, in seconds."""
    return float(min(_FIRST_PAUSE_S * 2 ** min(failures - 1, 20), _LAST_PAUSE_S))


def is_to_try_again(state: NodeEnvState, attempt: int) -> bool:
    """Whether a failure is older than the last request for the environment."""
    return state.phase is Phase.FAILED and state.attempt < attempt


def status_of(
    key: str, node_ids: Iterable[str], states: Mapping[str, Mapping[str, NodeEnvState]]
) -> Status:
    """What a variant with this key is, over all nodes that shall have it.

    ACTIVE only where every one of them is ready; ERROR where none can become ready any more
    or some failed; CREATING otherwise.

    Args:
        key: the environment's key.
        node_ids: the nodes that shall have it.
        states: by node, then by key.
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
