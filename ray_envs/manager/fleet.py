"""The live nodes of a cluster, as their agents describe them. Knows no variants.

Follows every agent, and wakes the callers that wait for news.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray_envs.cluster.calls import Call
from ray_envs.cluster.nodes import NodeInfo, Nodes
from ray_envs.errors import ManagerUnavailable, RayEnvsError, WrongEnvironment, from_dict
from ray_envs.models import NodeEnvState, Phase, Target

#: How long one long-poll of an agent lasts before it is asked again.
_WATCH_S = 5.0
#: How many looks in a row an agent may miss before its node counts as failed. A guess.
_MAX_MISSES = 6
#: How long a look at the nodes waits for agents that do not answer yet.
_MEET_S = 2.0
#: After how long a worker that waits for an environment may have given up; see `plugin`.
_PATIENCE_S = 300.0


@dataclass(slots=True)
class Node:
    """A live node, as its agent last described it."""

    info: NodeInfo
    call: Call
    site: str = ""
    error: dict[str, str] | None = None
    #: Whether Ray has our plugin there.
    has_gate: bool = False
    #: What it runs: the versions of ray_envs and uv.
    software: dict[str, str] = field(default_factory=dict)
    states: dict[str, NodeEnvState] = field(default_factory=dict)
    #: The keys of `states` that are ready, and the rest of it.
    ready: frozenset[str] = frozenset()
    others: dict[str, NodeEnvState] = field(default_factory=dict)
    #: Keys that workers wait for there, with the attempt that they belong to.
    asked: dict[str, int] = field(default_factory=dict)
    #: The last end of each build for which `on_final` was called.
    told: dict[str, NodeEnvState] = field(default_factory=dict)
    watcher: asyncio.Task[None] | None = None

    @property
    def is_bare(self) -> bool:
        """Whether it lacks ray_envs or uv, so that it gets no environments."""
        return self.error is not None and self.error["type"] == WrongEnvironment.__name__

    def may_have(self, site: str) -> bool:
        """Whether environments for `site` can run there; True as long as that is not known."""
        return self.site == site or (not self.site and not self.is_bare)

    def know(self, states: dict[str, NodeEnvState]) -> None:
        """Store the states of all environments there."""
        self.states = states
        self.ready = frozenset(key for key, s in states.items() if s.phase is Phase.READY)
        self.others = {key: s for key, s in states.items() if s.phase is not Phase.READY}

    def know_one(self, state: NodeEnvState) -> None:
        """Store the state of one environment there."""
        self.know({**self.states, state.key: state})


@dataclass(eq=False)
class Fleet:
    """Follows the nodes of a cluster."""

    _cluster: Nodes
    _settings: dict[str, str]
    #: Called when a node has joined (True) or was lost (False), after the first look.
    _on_node: Callable[[NodeInfo, bool], None]
    #: Called when a build has ended: the environment is ready or has failed.
    _on_final: Callable[[NodeInfo, NodeEnvState], None]
    #: Called with a key that a node has lost, or has after a failure: what Ray has cached for its
    #: runtime_env is wrong now.
    _on_outdated: Callable[[str], None]

    _has_looked: bool = field(default=False, init=False)
    nodes: dict[str, Node] = field(default_factory=dict, init=False)
    #: Rises with every news; `news` waits for it.
    version: int = field(default=0, init=False)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition, init=False)
    #: Set when there is something to do: a new wish, or an agent that was lost.
    wake_up: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _is_stopping: bool = field(default=False, init=False)
    #: How often in a row an agent could not be met.
    _misses: dict[str, int] = field(default_factory=dict, init=False)
    #: Why the loop last built an environment, by node and key; for people.
    becauses: dict[tuple[str, str], str] = field(default_factory=dict, init=False)
    #: The agents that are being asked for the first time now.
    _meetings: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)

    def head(self) -> Node:
        """The head node, where uv resolves.

        Raises `RayEnvsError`: it is not there, or its agent reported an error.
        """
        for node in self.nodes.values():
            if node.info.is_head:
                if node.error is not None:
                    raise from_dict(node.error)
                return node
        raise ManagerUnavailable(
            "the head node of the cluster is not there", hint="try again when it has joined"
        )

    def is_gated(self) -> bool:
        """Whether every live node has our plugin, so that tasks may go to any node."""
        return bool(self.nodes) and all(node.has_gate for node in self.nodes.values())

    def healthy(self) -> list[Node]:
        """The nodes whose agent answers."""
        return [node for node in self.nodes.values() if node.error is None]

    async def news(self, seen: int, timeout_s: float) -> None:
        """Return once `version` is above `seen`, or after `timeout_s` seconds."""
        with suppress(TimeoutError, asyncio.TimeoutError):
            async with self._changed:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self.version > seen), timeout_s
                )

    async def announce(self) -> None:
        """Wake all callers of `news`."""
        self.version += 1
        async with self._changed:
            self._changed.notify_all()

    async def look_at_nodes(self) -> None:
        """Ask the agents of nodes that have joined, and of nodes whose agent was lost.

        The first look waits for every answer or failure. Later ones do not wait for slow agents,
        which are known as soon as they answer.
        """
        alive = {info.node_id: info for info in await self._cluster.alive()}
        for node_id in self._meetings.keys() - alive.keys():
            self._meetings.pop(node_id).cancel()
        for node_id in self.nodes.keys() - alive.keys():
            lost = self.nodes.pop(node_id)
            if lost.watcher is not None:
                lost.watcher.cancel()
            self._on_node(lost.info, False)
            await self.announce()
        if self._has_looked:
            for node_id in alive.keys() - self.nodes.keys() - self._meetings.keys():
                self._on_node(alive[node_id], True)
        for node_id, info in alive.items():
            known = self.nodes.get(node_id)
            if node_id not in self._meetings and (known is None or known.watcher is None):
                self._meetings[node_id] = asyncio.create_task(self._meet(info))
        if self._meetings:
            limit_s = _MEET_S if self._has_looked else None
            await asyncio.wait(set(self._meetings.values()), timeout=limit_s)
        self._has_looked = True
        over = {node_id: task for node_id, task in self._meetings.items() if task.done()}
        for node_id in over:
            del self._meetings[node_id]
        await asyncio.gather(*over.values())

    async def _meet(self, info: NodeInfo) -> None:
        node = Node(info, self._cluster.agent(info.node_id, settings=self._settings))
        try:
            told = await node.call("describe")
            target = Target.model_validate(told["target"])
            node.site = site_name(told["platform"]["name"], target)
            node.error = told["error"]
            node.has_gate = told["has_gate"]
            node.software = told["software"]
            self._hear(node, told)
            known = self.nodes.get(info.node_id)
            # The builds of an unknown node have ended earlier: they are no news.
            node.told = known.told if known else dict(node.states)
            self._tell_ends(node)
            if node.error is None:
                node.watcher = asyncio.create_task(self._watch(node, int(told["version"])))
            self._misses.pop(info.node_id, None)
        except Exception as exc:
            error = exc if isinstance(exc, RayEnvsError) else RayEnvsError(f"no agent: {exc}")
            misses = self._misses[info.node_id] = self._misses.get(info.node_id, 0) + 1
            if misses >= _MAX_MISSES or not error.retryable:  # until then, it may be restarting
                node.error = error.about(node_id=info.node_id).to_dict()
        known = self.nodes.get(info.node_id)
        self.nodes[info.node_id] = node
        if known is None or _facts(known) != _facts(node):  # a bare node is met at each look
            await self.announce()
            self.wake_up.set()  # the look may have gone on without it

    def lose(self, node: Node) -> None:
        """Forget the answers of an agent that is lost; the next look asks it again."""
        watcher, node.watcher = node.watcher, None
        node.know({})
        node.asked = {}
        node.site = ""  # nothing is built there until it answers
        self.version += 1
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
        self.wake_up.set()

    async def _watch(self, node: Node, seen: int) -> None:
        """Follow one agent for as long as it answers; the next tick meets it again after that."""
        try:
            while not self._is_stopping:
                told = await node.call("watch", seen=seen, timeout_s=_WATCH_S)
                if told["version"] != seen:
                    seen = told["version"]
                    self._hear(node, told)
                    self._tell_ends(node)
                    await self.announce()
        except Exception:  # it has died, and restarts; what its node has is not known till then
            self.lose(node)
            await self.announce()

    def _hear(self, node: Node, told: Mapping[str, Any]) -> None:
        """Store an agent's answer: its environments, and the workers that wait for some."""
        before = node.ready
        node.know(_states(told["states"]))
        for key in before - node.ready:
            self._on_outdated(key)
        if told["asked"] != node.asked or before - node.ready:
            node.asked = dict(told["asked"])
            self.wake_up.set()

    def _tell_ends(self, node: Node) -> None:
        """Call `on_final` for each build that has ended since the last call."""
        for key, state in node.states.items():
            if state.phase.is_final and state.duration_s and node.told.get(key) != state:
                before = node.told.get(key)
                has_failed = before is not None and before.phase is Phase.FAILED
                if state.phase is Phase.READY and (has_failed or state.duration_s > _PATIENCE_S):
                    self._on_outdated(key)
                node.told[key] = state
                self._on_final(node.info, state)
                self.wake_up.set()  # other nodes may have waited for wheels of this one

    def forget_state(self, node: Node, key: str) -> None:
        """Forget the state of `key` on a node, because its disk has changed."""
        node.know({other: state for other, state in node.states.items() if other != key})
        self.version += 1

    async def look_at_disks(self) -> None:
        """Ask every agent for the state of its disk now, before a worker is started there."""

        async def look(node: Node) -> None:
            with suppress(Exception):  # the watcher notices a dead agent
                told = await node.call("watch", seen=-1, timeout_s=0)
                if _states(told["states"]) != node.states:
                    self._hear(node, told)
                    self.version += 1
                    self._tell_ends(node)

        # A node without a watcher is being met.
        await asyncio.gather(*(look(node) for node in self.nodes.values() if node.watcher))

    async def stop(self) -> None:
        """Stop following the agents and, where one lives in this process, end its builds."""
        self._is_stopping = True
        await ended(set(self._meetings.values()))
        await ended({node.watcher for node in self.nodes.values() if node.watcher is not None})
        await self._cluster.stop()


async def ended(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel `tasks` until they have ended: before Python 3.12, wait_for may swallow a cancel."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=1)


def _facts(node: Node) -> tuple[Any, ...]:
    return node.site, node.error, node.has_gate, node.software, node.states, node.asked


def site_name(platform: str, target: Target) -> str:
    """The platform, Python and Ray that an environment of a node must match, as a text."""
    return f"{platform} python {target.python} ray {target.ray}"


def _states(told: Iterable[Mapping[str, Any]]) -> dict[str, NodeEnvState]:
    states = (NodeEnvState.model_validate(state) for state in told)
    return {state.key: state for state in states}
