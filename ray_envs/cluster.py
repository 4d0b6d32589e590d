"""Asks Ray about nodes; names, finds and starts actors. The only module that looks into Ray.

`RayNodes` and `LocalNodes` answer the same questions to `manager`: with a cluster, agents are
actors; without one, the only agent is an object in this process. Ray is imported late: reads of
the registry must not pay for it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any, Protocol

from ray_envs import inside
from ray_envs.errors import InvalidInput, ManagerUnavailable, from_dict

NAMESPACE = "ray_envs"
MANAGER = "EnvManager"

#: How long the helper that starts the manager may take; a cold Ray import alone takes seconds.
_START_TIMEOUT_S = 120

#: How long the port of a given address may take to answer.
_CONNECT_TIMEOUT_S = 5

#: What a helper driver must not inherit from the job that calls us: it names that job.
_OF_THE_JOB = ("RAY_JOB_", "RAY_RUNTIME_ENV", "RAY_CLIENT_", "RAY_OVERRIDE_", "PYTHON")

#: Ray's switch for copying `uv run` from the driver to the workers.
_UV_RUN_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"

Call = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """A live node of the cluster."""

    node_id: str
    is_head: bool
    address: str


class Nodes(Protocol):
    """What the manager needs to know of a cluster."""

    async def alive(self) -> list[NodeInfo]: ...

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        """A function that calls a verb of the node's agent: `await agent("describe")`."""

    def ray_version(self) -> str: ...

    def address(self) -> str:
        """Where other processes find the cluster; empty where there is none to find."""

    async def living_jobs(self) -> set[str]:
        """`session/job` of every job that goes on."""

    async def given_to_detached(self) -> list[str]:
        """The runtime_envs, as Ray keeps them, of detached actors that live or may restart."""

    def session(self) -> str:
        """What tells this cluster's life from others on the same machine."""

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

    async def alive(self) -> list[NodeInfo]:
        import ray

        nodes = await asyncio.to_thread(ray.nodes)
        found = [
            NodeInfo(
                node["NodeID"],
                "node:__internal_head__" in node.get("Resources", {}),
                node["NodeManagerAddress"],
            )
            for node in nodes
            if node["Alive"]
        ]
        for node_id in self._handles.keys() - {node.node_id for node in found}:
            del self._handles[node_id]
        return found

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        from ray.exceptions import ActorDiedError

        if node_id not in self._handles:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            self._handles[node_id] = (
                actor_class(self._agent_class)
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
        handle = self._handles[node_id]

        async def call(verb: str, **arguments: Any) -> Any:
            try:
                return await getattr(handle, verb).remote(**arguments)
            except Exception as exc:
                if isinstance(exc, ActorDiedError):  # for good: the next call makes a new one
                    self._handles.pop(node_id, None)
                raise unwrapped(exc, f"the NodeAgent of node {node_id[:12]}") from exc

        return call

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
        """Nothing: the agents end with the manager that owns them."""


def _state() -> Any:
    """Ray's own view of its tables; the public one needs the dashboard."""
    from ray._private import state

    return state.state


def actor_class(cls: type) -> Any:
    """`cls` as a Ray actor: see `inside.actor_shell`; `unwrapped` turns its errors back."""
    import ray

    verbs = [
        name
        for name, _ in inspect.getmembers(cls, inspect.iscoroutinefunction)
        if not name.startswith("_")
    ]
    with by_value([inside]):
        shell = inside.actor_shell(cls.__module__, cls.__name__, verbs)
        # A copy that belongs to no module: Ray pickles it later, at its first use.
        return ray.remote(ray.cloudpickle.loads(ray.cloudpickle.dumps(shell)))


@contextmanager
def by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Pickle functions and classes of `modules` by value in the block: workers lack them."""
    from ray import cloudpickle

    registered = []
    try:
        for module in modules:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def unwrapped(exc: BaseException, who: str = "the EnvManager") -> BaseException:
    """The error that our actor raised, freed from Ray's wrapping; any other error as it is."""
    from ray import exceptions

    if isinstance(exc, exceptions.RayTaskError):
        cause = exc.cause
        if (
            isinstance(cause, RuntimeError)
            and len(cause.args) == 2
            and isinstance(cause.args[1], dict)
        ):
            return from_dict(cause.args[1])
    if isinstance(exc, exceptions.RayActorError | exceptions.GetTimeoutError):
        return ManagerUnavailable(
            f"{who} did not answer: {type(exc).__name__}",
            detail=str(exc)[:500],
            hint="try again; Ray's logs of that actor say more",
        )
    return exc


def find_manager() -> Any | None:
    """The handle of the cluster's EnvManager, or None where none lives."""
    import ray

    try:
        return ray.get_actor(MANAGER, namespace=NAMESPACE)
    except ValueError:
        return None


def create_manager(manager_class: type, settings: dict[str, str]) -> Any:
    """Create the detached EnvManager on the head node, or find the one that was first."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    head = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" in node.get("Resources", {})
    ]
    placement = {"scheduling_strategy": NodeAffinitySchedulingStrategy(head[0], soft=False)}
    return (
        actor_class(manager_class)
        .options(
            name=MANAGER,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
            **(placement if head else {}),
        )
        .remote(settings=settings)
    )


def start_manager(settings: dict[str, str]) -> Any:
    """Start the EnvManager from a short helper driver, and return its handle.

    A detached actor inherits working_dir and env_vars of the job that creates it, and nothing
    unsets them: the user's job must not be that job. The helper has an isolated interpreter, `/`
    as its folder and none of the job's variables.

    Raises:
        ManagerUnavailable: the helper failed; its last lines are in `detail`.
    """
    import ray

    address = ray.get_runtime_context().gcs_address
    environ = {k: v for k, v in os.environ.items() if not k.startswith((*_OF_THE_JOB, "RAY_ENVS_"))}
    environ.update(settings, **{_UV_RUN_HOOK: "0"})
    code = "import sys; from ray_envs.manager import start; start(sys.argv[1])"
    command = [sys.executable, "-I", "-c", code, address]
    try:
        done = subprocess.run(
            command, cwd="/", env=environ, capture_output=True, text=True,
            timeout=_START_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ManagerUnavailable(
            f"the EnvManager did not start within {_START_TIMEOUT_S} s",
            hint="see Ray's logs of the actor EnvManager, then try again",
        ) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode and lines and lines[-1].startswith("{"):
        raise from_dict(json.loads(lines[-1]))
    if done.returncode:
        raise ManagerUnavailable(
            "the EnvManager could not be started",
            detail="\n".join(done.stderr.strip().splitlines()[-8:]),
            hint="ray_envs must be installed in the Python that runs the cluster's nodes",
        )
    handle = find_manager()
    if handle is None:
        raise ManagerUnavailable(
            "the EnvManager ended right after its start", hint="see Ray's logs"
        )
    return handle


def connect(address: str | None) -> bool:
    """Connect this process to Ray; returns whether that started an embedded, local Ray.

    Without an address: the cluster of `RAY_ADDRESS` or of a `ray start` on this machine, else an
    embedded Ray that ends with this process.

    Raises:
        ManagerUnavailable: no cluster answers at the address.
    """
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        return False
    _check_answers(address)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "namespace": NAMESPACE}
    # A driver under `uv run` would otherwise upload its folder and start every worker, also those
    # of the manager, with `uv run`. Ray has read the variable at its import, which may be past.
    os.environ.setdefault(_UV_RUN_HOOK, "0")
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = os.environ[_UV_RUN_HOOK] not in ("0", "false")
    try:
        with warnings.catch_warnings():  # of changes to come in Ray's own defaults
            warnings.simplefilter("ignore", FutureWarning)
            # Without an address, Ray finds what `ray start` started. "auto" would also find the
            # embedded Ray of another process, which ends with that process.
            ray.init(
                address=None if address in ("", "auto") else address,
                include_dashboard=False,
                **quiet,
            )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise _no_answer(_address_of(address), str(exc)) from exc
    return bool(ray._private.worker._global_node.head)


def embeds(address: str | None) -> bool:
    """Whether `connect` would start an embedded Ray: nothing names a cluster."""
    return address == "local" or (address != "auto" and not _address_of(address))


def _address_of(address: str | None) -> str:
    """The address that Ray would use: given, from the environment, or left by `ray start`."""
    from ray._private.utils import read_ray_address

    given = "" if address == "auto" else address
    return given or os.environ.get("RAY_ADDRESS") or read_ray_address() or ""


def _check_answers(address: str | None) -> None:
    """Refuse an address where nothing listens: Ray itself would try for minutes.

    Raises:
        InvalidInput: an address of Ray Client, which cannot name nodes of the cluster.
        ManagerUnavailable: nothing answers there.
    """
    named = _address_of(address)
    if address == "auto" and not named:
        raise _no_answer("", "nothing says that `ray start` has started one")
    if named.startswith("ray://"):
        raise InvalidInput(
            f"{named} is an address of Ray Client, which ray_envs does not support",
            hint="use the cluster's own address (host:6379), or `ray job submit`",
        )
    host, colon, port = named.rpartition(":")
    if not colon or not port.isdigit():  # "local", "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as exc:
        raise _no_answer(named, str(exc)) from exc


def _no_answer(address: str, reason: str) -> ManagerUnavailable:
    lines = reason.strip().splitlines() or [""]
    return ManagerUnavailable(
        f"no Ray cluster answers at {address or 'this machine'}",
        detail=lines[-1],
        hint="check --address and RAY_ADDRESS (a cluster with tokens needs RAY_AUTH_MODE=token and "
        "the same token); `--address local` uses a local Ray; `ray stop` forgets a crashed one",
    )
