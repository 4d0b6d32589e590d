"""The loop that has the wanted environments built on the nodes.

Verbs only record what is wanted; only this loop tells agents to build. Start and recovery are the
same code: the registry and a new look at the agents. `planning` decides what to build where.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_envs.decisions import planning
from ray_envs.decisions.locks import lock_sha256
from ray_envs.decisions.targets import Need
from ray_envs.errors import EnvironmentNotReady, ManagerUnavailable, RayEnvsError, StorageFailed
from ray_envs.manager.fleet import Fleet, ended, site_name
from ray_envs.manager.registry import Registry
from ray_envs.manager.statuses import Statuses
from ray_envs.manager.variants import Variants
from ray_envs.manager.views import Views
from ray_envs.models import BuildRequest, EnvId, Generation, NodeEnvState, Phase, Status
from ray_envs.settings import Settings


@dataclass(eq=False)
class Reconciler:
    """Builds what is wanted on the nodes of one cluster."""

    _settings: Settings
    _registry: Registry
    _variants: Variants
    fleet: Fleet
    _views: Views
    _statuses: Statuses

    #: Keys that callers wait for, and how many do.
    awaited: Counter[str] = field(default_factory=Counter, init=False)
    _loop_task: asyncio.Task[None] | None = field(default=None, init=False)
    _first_look: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _is_stopping: bool = field(default=False, init=False)

    def reload(self) -> None:
        """Read the definitions that other processes have changed."""
        if self._variants.reload():
            self.fleet.version += 1

    def want(self, keys: Iterable[str]) -> None:
        """Want environments on every node that fits. Where one has failed, it is retried."""
        with self._variants.wishes.at_once():
            for key in keys:
                states = (node.states.get(key) for node in self.fleet.nodes.values())
                failed = [s.attempt for s in states if s is not None and s.phase is Phase.FAILED]
                self._variants.wishes.want(key, failed=max(failed, default=None))
                if failed:
                    self._variants.wishes.outdate(key)
        self.fleet.wake_up.set()

    async def make_ready(
        self, generation: Generation, timeout_s: float, *, variant_id: str
    ) -> None:
        """Want a generation, and return when it is ready on every node that shall have it.

        Raises:
            EnvironmentNotReady: that took longer than `timeout_s` seconds.
            RayEnvsError: the error of a node, or there are too few nodes for it.
        """
        self.want([generation.key])
        await self.until_final(generation, timeout_s, variant_id=variant_id)
        self._statuses.raise_failure(generation, variant_id=variant_id)

    async def until_final(
        self, generation: Generation, timeout_s: float, *, variant_id: str
    ) -> None:
        """Return when each node is ready or has failed.

        Raises `EnvironmentNotReady`: that took longer than `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        self.awaited[generation.key] += 1
        try:
            while True:
                seen = self.fleet.version
                if self._statuses.status_of(generation) is not Status.CREATING:
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise EnvironmentNotReady(
                        f"variant {variant_id} was not ready after {timeout_s:g} s",
                        variant_id=variant_id,
                        hint="allow more time; what is built so far is used again",
                    )
                await self.fleet.news(seen, left_s)
        finally:
            self.awaited[generation.key] -= 1

    async def awake(self, chore: Callable[[], Any]) -> None:
        """Start the loop with the first verb: an actor's constructor has no running loop."""
        if self._loop_task is None:
            self._variants.wishes.load()
            self.reload()
            self._loop_task = asyncio.create_task(self._loop(chore))
        await self._first_look.wait()

    async def stop(self) -> None:
        """End the loop and, where the agent lives in this process, its builds."""
        self._is_stopping = True
        if self._loop_task is not None:
            await ended({self._loop_task})
        await ended(set(self._variants.relocking.values()))
        await self.fleet.stop()

    async def _loop(self, chore: Callable[[], Any]) -> None:
        while not self._is_stopping:
            self.fleet.wake_up.clear()
            for work in (self._tick, chore):
                try:
                    await work()
                except Exception as exc:
                    print(f"ray_envs: EnvManager: {type(exc).__name__}: {exc}", file=sys.stderr)
                self._first_look.set()  # a verb need not wait for the chores
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self.fleet.wake_up.wait(), self._settings.tick_s)

    async def _tick(self) -> None:
        await self.fleet.look_at_nodes()
        sources = self._sources()
        await self._refuse_unknown(sources)
        if not sources:
            return
        wishes = [
            planning.Wish(
                key=key,
                attempt=self._variants.wishes.attempt(key),
                variants=tuple(str(env_id) for env_id, _ in found),
                site=site_name(found[0][1].platform, found[0][1].target),
                needs=tuple({Need.of(made.definition): None for _, made in found}),
            )
            for key, found in sources.items()
        ]
        nodes = self.fleet.healthy()
        self._views.note_failures(nodes)
        views = [self._views.of(node) for node in nodes]
        actions = planning.plan(wishes, views)
        await asyncio.gather(*(self._act(action, sources[action.key]) for action in actions))

    def _sources(self) -> dict[str, list[tuple[EnvId, Generation]]]:
        """The generations of each key that is wanted or that a worker waits for.

        Any of them can be the source of a build.
        """
        asked = {key for node in self.fleet.healthy() for key in node.asked}
        found: dict[str, list[tuple[EnvId, Generation]]] = {}
        for name, record in self._variants.by_name.items():
            for made in filter(None, (record.current, self._variants.staged.get(name))):
                if made.key in self._variants.wishes or made.key in asked:
                    found.setdefault(made.key, []).append((record.env_id, made))
        for key in asked - found.keys():
            older = self._older(key)  # of a task that was submitted before an update
            if older is not None:
                found[key] = [older]
        return found

    def _older(self, key: str) -> tuple[EnvId, Generation] | None:
        """A generation with this key that is not the current one of its variant."""
        for record in list(self._variants.by_name.values()):
            for number in record.numbers:
                with suppress(StorageFailed):
                    made = self._registry.generation(record.env_id, number)
                    if made.key == key:
                        return record.env_id, made
        return None

    async def _refuse_unknown(self, sources: Iterable[str]) -> None:
        """Refuse the requests of waiting workers for environments that no variant has."""
        known = set(sources)
        for node in self.fleet.healthy():
            for key in node.asked.keys() - known:
                with suppress(RayEnvsError):
                    await node.call("refuse", key=key, reason="no variant has this environment")

    async def _act(self, action: planning.Build, sources: list[tuple[EnvId, Generation]]) -> None:
        node = self.fleet.nodes.get(action.node_id)
        if node is None:  # lost while another node was called
            return
        self.fleet.becauses[action.node_id, action.key] = action.because
        try:
            request = self._request_of_any(sources)
            peers = list(action.peers)
            if request["wheels"] and not node.info.is_head:  # the head has the local packages
                head = self.fleet.head().info.node_id
                peers = [*(peer for peer in peers if peer != head), head]
            state = await node.call(
                "ensure",
                request=request,
                attempt=action.attempt,
                peers=peers,
                is_cache_only=action.is_cache_only,
            )
            node.know_one(NodeEnvState.model_validate(state))
        except ManagerUnavailable:  # the agent is restarting; a later turn calls it again
            self.fleet.lose(node)
        except RayEnvsError as exc:
            node.know_one(
                NodeEnvState(
                    key=action.key, phase=Phase.FAILED, error=exc.to_dict(), attempt=action.attempt
                )
            )
        await self.fleet.announce()

    def _request_of_any(self, sources: list[tuple[EnvId, Generation]]) -> dict[str, Any]:
        """The request from the first variant whose texts can be read."""
        for env_id, generation in sources[:-1]:
            with suppress(StorageFailed):  # another variant may have the same texts
                return self.request(env_id, generation)
        return self.request(*sources[-1])

    def request(self, env_id: EnvId, generation: Generation) -> dict[str, Any]:
        """The request that a node builds a generation from, as plain data.

        Raises `StorageFailed`: its texts cannot be read, or the lock was edited.
        """
        pyproject, uv_lock = self._registry.lock_text(env_id, generation.number)
        if lock_sha256(uv_lock) != generation.lock_sha256:
            path = Path("generations", str(generation.number), "uv.lock")
            raise StorageFailed(
                f"{self._registry.folder(env_id) / path} is not what was locked",
                hint="restore the file, or create the variant again with replace",
                variant_id=str(env_id),
            )
        return build_request(generation, pyproject, uv_lock).model_dump(mode="json")


def build_request(generation: Generation, pyproject: str, uv_lock: str) -> BuildRequest:
    """The request that a node builds `generation` from."""
    definition = generation.definition
    return BuildRequest(
        key=generation.key,
        pyproject=pyproject,
        uv_lock=uv_lock,
        extras=definition.extras,
        groups=definition.groups,
        exclude_newer=definition.exclude_newer,
        only_binary=definition.only_binary,
        target=generation.target,
        platform=generation.platform,
        lock_sha256=generation.lock_sha256,
        packages=generation.packages,
        wheels=definition.wheels,
    )
