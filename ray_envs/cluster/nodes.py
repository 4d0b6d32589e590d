"""The nodes of a cluster, their agents, and the jobs and detached actors that run on it.

`RayNodes` asks Ray. `LocalNodes` answers for this machine alone, without Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

from ray_envs.cluster import bootstrap, ray_versions
from ray_envs.cluster.actors import actor_class
from ray_envs.cluster.calls import Call, in_time, unwrapped
from ray_envs.cluster.connecting import NAMESPACE
from ray_envs.errors import RayEnvsError, WrongEnvironment
from ray_envs.settings import Settings

#: Stands after the id of a job for the detached actors that it has left.
OF_DETACHED = "+"
#: How long to wait before the next try on a node without ray_envs: each try starts a process.
_BARE_PAUSE_S = 30


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A live node of the cluster."""

    node_id: str
    is_head: bool
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    num_gpus: float = 0


class Nodes(Protocol):
    """What the manager asks about a cluster."""

    async def alive(self) -> list[NodeInfo]: ...

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        """Return a function that calls a verb of the agent: `await call("describe")`."""

    def ray_version(self) -> str: ...

    def address(self) -> str:
        """Return the cluster's address for other processes; empty if there is none."""

    async def living_jobs(self) -> set[str]:
        """Return `session/job` of every running job, and of those with detached actors.

        The latter end with `OF_DETACHED`.
        """

    async def given_to_detached(self) -> list[str]:
        """Return the serialized runtime_envs of detached actors that run or may restart."""

    def session(self) -> str:
        """Return the name of this run of the cluster; each start has another one."""

    async def stop(self) -> None:
        """Stop an agent that runs in this process."""


class LocalNodes:
    """This machine as the only node, without Ray; the agent runs in this process."""

    def __init__(self, agent_class: type) -> None:
        self._agent_class = agent_class
        self._agent: Any = None

    async def alive(self) -> list[NodeInfo]:
        return [NodeInfo("local", True, "127.0.0.1")]

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        if self._agent is None:
            self._agent = self._agent_class(
                settings=settings, node_id=node_id, ray_version=self.ray_version()
            )

        async def call(verb: str, **arguments: Any) -> Any:
            return await getattr(self._agent, verb)(**arguments)

        return call

    def ray_version(self) -> str:
        found = version("ray")  # importing ray costs a second
        ray_versions.check(found)
        return found

    def address(self) -> str:
        return ""

    async def living_jobs(self) -> set[str]:
        return set()

    async def given_to_detached(self) -> list[str]:
        return []

    def session(self) -> str:
        return "local"

    async def stop(self) -> None:
        if self._agent is not None:
            await self._agent.stop()


class RayNodes:
    """The nodes of the Ray cluster that this process is connected to."""

    def __init__(self, agent_class: type) -> None:
        self._agent_class = agent_class
        self._handles: dict[str, Any] = {}
        #: By bare node: the error of its agent, and when to try again.
        self._bare: dict[str, tuple[WrongEnvironment, float]] = {}
        #: The arguments of `equip`; made for the first bare node.
        self._pack: dict[str, Any] = {}
        self._packing = asyncio.Lock()

    async def alive(self) -> list[NodeInfo]:
        import ray

        nodes = await asyncio.to_thread(ray.nodes)
        found = [
            NodeInfo(
                node["NodeID"],
                "node:__internal_head__" in node.get("Resources", {}),
                node["NodeManagerAddress"],
                node.get("Labels") or {},
                node.get("Resources", {}).get("GPU", 0),
            )
            for node in nodes
            if node["Alive"]
        ]
        alive = {node.node_id for node in found}
        for known in (self._handles, self._bare):
            for node_id in known.keys() - alive:
                del known[node_id]
        return found

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        """See `Nodes.agent`. On a node without ray_envs each verb raises `WrongEnvironment`."""
        error, until = self._bare.get(node_id, (None, 0.0))
        if error is not None and time.monotonic() < until:

            async def refuse(verb: str, **arguments: Any) -> Any:  # noqa: ARG001 - as `call`
                raise error

            return refuse
        if node_id not in self._handles:
            self._handles[node_id] = self._start_agent(node_id, settings)
        handle = self._handles[node_id]
        may_equip = Settings.from_environment(settings).bootstrap

        async def call(verb: str, **arguments: Any) -> Any:
            try:
                return await self._call(node_id, handle, verb, arguments)
            except WrongEnvironment as exc:
                try:
                    if not may_equip:
                        raise
                    await self._call(node_id, handle, "equip", await self._packed())
                    return await self._call(node_id, handle, verb, arguments)
                except WrongEnvironment as last:
                    self._try_later(node_id, last)
                    raise last from exc

        return call

    def _start_agent(self, node_id: str, settings: dict[str, str]) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return (
            actor_class(self._agent_class, version=bootstrap.own_version())
            .options(
                name=f"NodeAgent:{node_id}",
                namespace=NAMESPACE,
                get_if_exists=True,
                num_cpus=0,
                max_restarts=-1,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(settings=settings, node_id=node_id, ray_version=self.ray_version())
        )

    async def _call(self, node_id: str, handle: Any, verb: str, arguments: dict[str, Any]) -> Any:
        from ray.exceptions import ActorDiedError

        who = f"the NodeAgent of node {node_id[:12]}"
        try:
            return await in_time(handle, who, verb, arguments)
        except RayEnvsError:
            raise
        except Exception as exc:
            if isinstance(exc, ActorDiedError):  # it never restarts: the next call makes a new one
                self._handles.pop(node_id, None)
            raise unwrapped(exc, who) from exc

    async def _packed(self) -> dict[str, Any]:
        """Return the arguments of `equip`. Ray keeps the packages as long as this process runs."""
        import ray

        async with self._packing:
            if not self._pack:
                pack = await asyncio.to_thread(bootstrap.packed)
                # In a list, Ray does not fetch it for the actor, which may have it already.
                self._pack = {
                    "sha256": pack.sha256,
                    "site": pack.site,
                    "data": [ray.put(pack.data)],
                }
        return self._pack

    def _try_later(self, node_id: str, error: WrongEnvironment) -> None:
        """Try again later with a new process, which sees what was installed meanwhile."""
        import ray

        self._bare[node_id] = (error, time.monotonic() + _BARE_PAUSE_S)
        handle = self._handles.pop(node_id, None)
        if handle is not None:
            ray.kill(handle)

    def ray_version(self) -> str:
        import ray

        return str(ray.__version__)

    def address(self) -> str:
        import ray

        return str(ray.get_runtime_context().gcs_address)

    async def living_jobs(self) -> set[str]:
        rows = await asyncio.to_thread(ray_versions.job_table)
        living = {row["JobID"] for row in rows if not row["IsDead"]}
        actors = await asyncio.to_thread(ray_versions.detached_actors)
        living |= {job + OF_DETACHED for job, _ in actors}
        return {f"{self.session()}/{job}" for job in living}

    async def given_to_detached(self) -> list[str]:
        return [env for _, env in await asyncio.to_thread(ray_versions.detached_actors)]

    def session(self) -> str:
        return str(ray_versions.own_node().session_name)

    async def stop(self) -> None:
        """Do nothing: Ray ends the agents with the manager, which owns them."""
