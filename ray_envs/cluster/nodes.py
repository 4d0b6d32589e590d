"""The nodes of a cluster, with their agents, and the jobs and actors that live on it.

`RayNodes` asks Ray. `LocalNodes` answers the same questions for this machine alone, without Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

from ray_envs.cluster import bootstrap
from ray_envs.cluster.actors import actor_class
from ray_envs.cluster.calls import Call, in_time, unwrapped
from ray_envs.cluster.connecting import NAMESPACE
from ray_envs.errors import RayEnvsError, WrongEnvironment  # fmt: skip
from ray_envs.settings import Settings

#: How long a node that lacks ray_envs is left alone: each look there starts a process.
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
    """What the manager needs to know of a cluster."""

    async def alive(self) -> list[NodeInfo]: ...

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        """A function that calls a verb of the node's agent: `await agent("describe")`."""

    def ray_version(self) -> str: ...

    def address(self) -> str:
        """Where other processes find the cluster; empty where there is none to find."""

    async def living_jobs(self) -> set[str]:
        """`session/job` of every running job."""

    async def given_to_detached(self) -> list[str]:
        """The runtime_envs, as Ray keeps them, of detached actors that live or may restart."""

    def session(self) -> str:
        """The name of this Ray session, different for each start of a cluster."""

    async def stop(self) -> None:
        """End what lives in this process only."""


class LocalNodes:
    """This machine as the only node, without Ray; the agent lives in this process."""

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
        return version("ray")  # importing ray costs a second

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
        #: What bare nodes lack, and until when they are left alone.
        self._bare: dict[str, tuple[WrongEnvironment, float]] = {}
        #: What is brought to them; made for the first one.
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
        """See `Nodes.agent`; of a node that lacks ray_envs, each verb raises `WrongEnvironment`."""
        error, until = self._bare.get(node_id, (None, 0.0))
        if error is not None and time.monotonic() < until:
            told = error  # the name of a caught exception ends with its block

            async def refuse(verb: str, **arguments: Any) -> Any:  # noqa: ARG001 - as `call`
                raise told

            return refuse
        if node_id not in self._handles:
            self._handles[node_id] = self._start_agent(node_id, settings)
        handle = self._handles[node_id]
        may_equip = Settings.from_environment(settings).bootstrap

        async def call(verb: str, **arguments: Any) -> Any:
            try:
                return await self._say(node_id, handle, verb, arguments)
            except WrongEnvironment as exc:
                try:
                    if not may_equip:
                        raise
                    await self._say(node_id, handle, "equip", await self._packed())
                    return await self._say(node_id, handle, verb, arguments)
                except WrongEnvironment as last:
                    self._leave_alone(node_id, last)
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

    async def _say(self, node_id: str, handle: Any, verb: str, arguments: dict[str, Any]) -> Any:
        from ray.exceptions import ActorDiedError

        who = f"the NodeAgent of node {node_id[:12]}"
        try:
            return await in_time(handle, who, verb, arguments)
        except RayEnvsError:
            raise
        except Exception as exc:
            if isinstance(exc, ActorDiedError):  # for good: the next call makes a new one
                self._handles.pop(node_id, None)
            raise unwrapped(exc, who) from exc

    async def _packed(self) -> dict[str, Any]:
        """What `equip` takes. The packages stay in Ray's object store as long as this process."""
        import ray

        async with self._packing:
            if not self._pack:
                pack = await asyncio.to_thread(bootstrap.packed)
                # Within a list Ray does not fetch it for the actor, which may have it already.
                self._pack = {
                    "sha256": pack.sha256,
                    "site": pack.site,
                    "data": [ray.put(pack.data)],
                }
        return self._pack

    def _leave_alone(self, node_id: str, error: WrongEnvironment) -> None:
        """Begin again later, with a new process: only that sees what is installed meanwhile."""
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
        rows = await asyncio.to_thread(_state().job_table)
        return {f"{self.session()}/{row['JobID']}" for row in rows if not row["IsDead"]}

    async def given_to_detached(self) -> list[str]:
        from ray.core.generated.gcs_pb2 import ActorTableData

        state = _state()
        state._connect_and_get_accessor()
        rows = await asyncio.to_thread(state._global_state_accessor.get_actor_table, None, None)
        actors = (ActorTableData.FromString(row) for row in rows)
        return [
            actor.serialized_runtime_env
            for actor in actors
            if actor.is_detached and actor.state != ActorTableData.DEAD
        ]

    def session(self) -> str:
        import ray

        return str(ray._private.worker._global_node.session_name)

    async def stop(self) -> None:
        """Do nothing: the agents end with the manager that owns them."""


def _state() -> Any:
    """Ray's own view of its tables; the public one needs the dashboard."""
    from ray._private import state

    return state.state
