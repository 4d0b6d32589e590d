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
import site
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from types import ModuleType
from typing import Any, Protocol

from ray_envs.cluster import bootstrap
from ray_envs.errors import (
    InvalidInput,
    ManagerUnavailable,
    RayEnvsError,
    WrongEnvironment,
    from_dict,
)
from ray_envs.plugin.gate import PLUGINS_VARIABLE, with_plugin
from ray_envs.settings import Settings
from ray_envs.worker import inside

NAMESPACE = "ray_envs"
MANAGER = "EnvManager"

#: How long the helper that starts the manager may take; a cold Ray import alone takes seconds.
_START_TIMEOUT_S = 120

#: How long a node that lacks ray_envs is left alone: each look there starts a process.
_BARE_PAUSE_S = 30

#: How long a manager may take to end in order, and its agents after it.
_END_TIMEOUT_S = 30

#: How long the port of a given address may take to answer.
_CONNECT_TIMEOUT_S = 5

#: What a helper driver must not inherit from the job that calls us: it names that job.
_OF_THE_JOB = ("RAY_JOB_", "RAY_RUNTIME_ENV", "RAY_CLIENT_", "RAY_OVERRIDE_", "PYTHON")

#: How long an agent may take over a verb that only says or notes something, beyond the time that
#: the verb is given to wait; over the first one it is asked, on a busy machine; and before it is
#: asked whether it is alive, over one that examines, makes or removes something. Guesses.
_QUICK_S = 15.0
_FIRST_S = 30.0
_LONG_S = 60.0
_LIMITS_S = {"describe": _FIRST_S, **dict.fromkeys(("watch", "ensure", "refuse"), _QUICK_S)}

#: Ray's switch for copying `uv run` from the driver to the workers.
_UV_RUN_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"

Call = Callable[..., Awaitable[Any]]


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
            return await _in_time(handle, who, verb, arguments)
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
        """Nothing: the agents end with the manager that owns them."""


class RayPeers:
    """The agents of other nodes, and Ray's objects between them; see `exchange.Peers`."""

    def peer(self, node_id: str) -> Call:
        who = f"the NodeAgent of node {node_id[:12]}"

        async def call(verb: str, **arguments: Any) -> Any:
            import ray

            try:
                handle = ray.get_actor(f"NodeAgent:{node_id}", namespace=NAMESPACE)
            except ValueError:
                raise ManagerUnavailable(f"{who} is not there") from None
            try:
                return await getattr(handle, verb).remote(**arguments)
            except Exception as exc:
                raise _of_peer(exc, who) from exc

        return call

    async def put(self, data: bytes) -> Any:
        import ray

        return await asyncio.to_thread(ray.put, data)

    async def take(self, ref: Any) -> bytes:
        try:
            return bytes(await ref)
        except Exception as exc:
            raise _of_peer(exc, "another node") from exc


def _of_peer(exc: Exception, who: str) -> BaseException:
    """What another node raised, as an error of ours."""
    error = unwrapped(exc, who)
    if isinstance(error, RayEnvsError):
        return error
    # A bad disk or a full object store, say: another node's is well.
    return ManagerUnavailable(f"{who} failed: {getattr(exc, 'cause', exc)!r}")


async def _in_time(handle: Any, who: str, verb: str, arguments: dict[str, Any]) -> Any:
    """What an agent answers; `ManagerUnavailable` where it has stopped to answer anything."""

    async def is_alive() -> None:
        with suppress(Exception):  # that is an answer, too
            await handle.watch.remote(seen=-1, timeout_s=0)

    asked = getattr(handle, verb).remote(**arguments)
    if verb in _LIMITS_S:
        return await answered(asked, who, _LIMITS_S[verb] + arguments.get("timeout_s", 0))
    return await answered(asked, who, _LONG_S, is_alive=is_alive)


async def answered(
    asked: Awaitable[Any],
    who: str,
    within_s: float,
    *,
    is_alive: Callable[[], Awaitable[object]] | None = None,
) -> Any:
    """What an actor answers within `within_s` seconds; with `is_alive`, whenever it answers.

    Args:
        asked: the answer to come.
        who: the actor, in words.
        within_s: how long one that answers at all may take.
        is_alive: asks the actor something short; its answer gives the other one more time.

    Raises:
        ManagerUnavailable: it did not answer: its process may be stopped, or have no share of a
            busy machine.
    """
    answer = asyncio.ensure_future(asked)
    short: asyncio.Future[object] | None = None
    try:
        while not (await asyncio.wait({answer}, timeout=within_s))[0]:
            ended: set[asyncio.Future[Any]] = set()
            if is_alive is not None:
                short = asyncio.ensure_future(is_alive())
                ended, _ = await asyncio.wait(
                    {answer, short}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED
                )
            if not ended:
                raise ManagerUnavailable(
                    f"{who} did not answer within {within_s:g} s",
                    hint="it is met again by itself, unless its process is stopped",
                )
        return answer.result()
    finally:
        for future in filter(None, (answer, short)):
            future.cancel()


def _state() -> Any:
    """Ray's own view of its tables; the public one needs the dashboard."""
    from ray._private import state

    return state.state


def actor_class(cls: type, *, version: str | None = None) -> Any:
    """`cls` as a Ray actor: see `inside.actor_shell`; `unwrapped` turns its errors back.

    Args:
        cls: an importable class.
        version: given, the actor's node may lack ray_envs of it: see `bootstrap.node_shell`.
    """
    import ray

    verbs = [
        name
        for name, _ in inspect.getmembers(cls, inspect.iscoroutinefunction)
        if not name.startswith("_")
    ]
    with by_value([inside, bootstrap]):
        shell = inside.actor_shell(cls.__module__, cls.__name__, verbs)
        if version is not None:
            shell = bootstrap.node_shell(shell, cls.__module__, cls.__name__, version)
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
    lost = (exceptions.RayActorError, exceptions.GetTimeoutError, exceptions.ObjectLostError)
    if isinstance(exc, lost):
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


def is_client() -> bool:
    """Whether this process speaks to its cluster through Ray Client."""
    import ray

    return bool(ray.util.client.ray.is_connected())


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

    if is_client():
        raise ManagerUnavailable(
            "this cluster has no EnvManager, and a program on Ray Client cannot start it",
            hint="run `ray-envs up` on a node of the cluster",
        )
    address = ray.get_runtime_context().gcs_address
    environ = {k: v for k, v in os.environ.items() if not k.startswith((*_OF_THE_JOB, "RAY_ENVS_"))}
    environ.update(settings, **{_UV_RUN_HOOK: "0"})
    code = "import sys; from ray_envs.manager.start import start; start(sys.argv[1])"
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
            with _plugin_loaded() if embeds(address) else nullcontext():
                ray.init(
                    address=None if address in ("", "auto") else address,
                    include_dashboard=False,
                    **quiet,
                )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise _no_answer(_address_of(address), str(exc)) from exc
    return bool(ray._private.worker._global_node.head)


@contextmanager
def _plugin_loaded() -> Iterator[None]:
    """A Ray that is started in the block loads our plugin; what is started later need not.

    Only where ray_envs is installed: a plugin that Ray cannot import keeps it from starting.
    """
    before = os.environ.get(PLUGINS_VARIABLE)
    if _is_installed():
        os.environ[PLUGINS_VARIABLE] = with_plugin(before)
    try:
        yield
    finally:
        os.environ.pop(PLUGINS_VARIABLE, None)
        if before is not None:
            os.environ[PLUGINS_VARIABLE] = before


def _is_installed() -> bool:
    """Whether every process of this interpreter finds ray_envs, whatever its folder."""
    try:
        place = os.path.realpath(str(distribution("ray-envs").locate_file("")))
    except PackageNotFoundError:
        return False
    folders = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return place in map(os.path.realpath, folders)


def is_own() -> bool:
    """Whether this process has started the Ray that it is connected to: it ends with it."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and bool(node.head)


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
    if not colon or not (port.isascii() and port.isdigit()):  # "local", "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as exc:  # no host has such a name, or such a port
        raise _no_answer(named, str(exc)) from exc


def _no_answer(address: str, reason: str) -> ManagerUnavailable:
    lines = reason.strip().splitlines() or [""]
    return ManagerUnavailable(
        f"no Ray cluster answers at {address or 'this machine'}",
        detail=lines[-1],
        hint="check --address and RAY_ADDRESS (a cluster with tokens needs RAY_AUTH_MODE=token and "
        "the same token); `--address local` uses a local Ray; `ray stop` forgets a crashed one",
    )


def end_manager() -> list[str]:
    """End the cluster's EnvManager and its agents for good; what is on the disks stays.

    Returns the names of the actors that ended: none where no manager lived.

    Raises:
        ManagerUnavailable: some are still there.
    """
    import ray

    handle = find_manager()
    if handle is None:
        return []
    names = _our_actors()
    with suppress(Exception):  # one that hangs, or dies at this moment, is ended all the same
        ray.get(handle.stop.remote(), timeout=_END_TIMEOUT_S)
    ray.kill(handle, no_restart=True)
    deadline = time.monotonic() + _END_TIMEOUT_S
    while left := _our_actors() & names:  # the agents end with the manager that owns them
        if time.monotonic() >= deadline:
            raise ManagerUnavailable(
                f"still there after {_END_TIMEOUT_S} s: {', '.join(sorted(left))}",
                hint="try again; Ray's logs of those actors say more",
            )
        time.sleep(0.1)
    return sorted(names)


def _our_actors() -> set[str]:
    """The names of the manager and the agents that live."""
    from ray.util import list_named_actors

    rows = list_named_actors(all_namespaces=True)
    return {row["name"] for row in rows if row["namespace"] == NAMESPACE}
