"""What a program talks to: turns a `variant_id` into Ray options. One contract, two providers.

`RayEnvironmentProvider` speaks to the EnvManager of a cluster or, through a local door, to the
same class in this process. `in_memory` keeps the same contract without uv and without Ray, for the
tests of programs that use a provider.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ray_envs.client.connection import VERB_TIMEOUT_S, ActorConnection, Connection, LocalConnection
from ray_envs.client.inputs import read_definition
from ray_envs.client.lifecycle import Lifecycle
from ray_envs.cluster import bootstrap, cluster
from ray_envs.decisions import placement, requirements
from ray_envs.decisions.planning import may_pass
from ray_envs.errors import (
    EnvironmentNotReady,
    InvalidId,
    NoEligibleNode,
    NotFound,
    RayEnvsError,
    RayEnvsWarning,
    from_dict,
)
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.models import Definition, EnvId, EnvSpec, Phase, Status, validated
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

#: How long one long-poll lasts: short enough that Ctrl-C and a dead manager are noticed.
_POLL_S = 2.0
#: A variant's status by its id, as `EnvManager.get_env_status` describes it.
Statuses = dict[str, dict[str, Any]]
OnStatus = Callable[[Statuses], None]

#: A variant that is being updated runs meanwhile as it is.
_BUSY = (Status.CREATING.value,)
_RUNS = (Status.ACTIVE.value, Status.UPDATING.value)
#: How many nodes are told one by one.
_MAX_TOLD_NODES = 12
_CONFIG_IDS = ("workflow_id", "node_id", "version_id")


class EnvironmentProvider(ABC):
    """Environments by `variant_id`. Safe to use from several threads.

    Args:
        specs: specs by variant id, by node id, or under "default", for callers of
            `create_environment` whose config names no packages, project or requirements.
        base_packages: requirements that every created environment gets as well.
    """

    def __init__(
        self,
        *,
        specs: Mapping[str, EnvSpec] | None = None,
        base_packages: Iterable[str] = (),
    ) -> None:
        self._specs = dict(specs or {})
        self._base_packages = tuple(base_packages)
        #: The address behind each id of `create_environment`; several may share one.
        self._ids: dict[str, EnvId] = {}
        #: Ids whose create surely failed: nothing of theirs is anywhere.
        self._refused: set[str] = set()
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    # -- what the two providers do in their own way ----------------------------------------------

    @abstractmethod
    def _create(
        self, env_id: EnvId, definition: Definition, *, replace: bool, wait_s: float, dry_run: bool
    ) -> Any:
        """Define a variant; returns its status."""

    @abstractmethod
    def _statuses(self, ids: Iterable[EnvId], *, want: bool) -> Statuses:
        """The status of variants by id; with `want`, ask for them to be made ready."""

    @abstractmethod
    def _next_statuses(self, ids: Iterable[EnvId]) -> Statuses:
        """Like `_statuses`, but wait a moment for something to change."""

    @abstractmethod
    def _environment(self, env_id: EnvId) -> dict[str, Any]:
        """See `EnvManager.get_environment`."""

    @abstractmethod
    def _delete(self, env_id: EnvId, *, force: bool, dry_run: bool) -> dict[str, Any]:
        """Forget a variant; without `force`, only where nobody uses it."""

    @abstractmethod
    def list_variants(self) -> list[dict[str, Any]]:
        """Every defined variant in a row: its ids, key, generation and status."""

    @abstractmethod
    def close(self) -> None:
        """Let go of whatever the provider holds; twice is fine."""

    # -- ours ----------------------------------------------------------------------------------

    def create(
        self,
        variant_id: str,
        spec: EnvSpec | Mapping[str, Any],
        *,
        replace: bool = True,
        base: Path | None = None,
        wait_s: float = 0,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Define a variant: validate it, lock it, and want it on every node. Returns its status.

        Returns before the environment is built, unless `wait_s` is given; `prepare` waits too.

        Args:
            variant_id: "node", "workflow/node" or "workflow/node/version".
            spec: an `EnvSpec`, or its fields.
            replace: whether an existing variant with another spec gets a new generation, which is
                prepared before it takes the place of the current one.
            base: the folder that paths in the spec are relative to; by default the cwd.
            wait_s: how long to wait until it is ready, in seconds. If the build fails within that
                time, this raises, and the definition is again what it was before.
            dry_run: only say what would be done.

        Raises:
            InvalidId, InvalidInput, InvalidPackages: the input cannot be accepted.
            AlreadyExists: it is defined differently and `replace` is false.
            ResolutionFailed: no packages satisfy the spec; `detail` is uv's explanation.
            UvFailed, StorageFailed, LockTimeout, ManagerUnavailable: it could not be done now.
        """
        env_id = EnvId.parse(variant_id)
        definition = self._defined(spec, base=base, where=f"variant {variant_id}")
        status: dict[str, Any] = self._create(
            env_id, definition, replace=replace, wait_s=wait_s, dry_run=dry_run
        )
        return status

    def prepare(
        self,
        *variant_ids: str,
        timeout_s: float | None = None,
        strict: bool = True,
        everywhere: bool = True,
        patient: bool = False,
        on_status: OnStatus | None = None,
    ) -> Statuses:
        """Wait until variants are ready on every node that shall have them; returns their status.

        Args:
            variant_ids: the variants; they are prepared in parallel.
            timeout_s: how long to wait, in seconds; by default `RAY_ENVS_PREPARE_TIMEOUT_S`.
            strict: raise the first failure, with the nodes that are ready and those that are not;
                otherwise it is left in the status (`error`, `nodes`).
            everywhere: wait for all nodes; otherwise, for each variant, for the first one.
            patient: wait also for nodes that failed: they try again by themselves where the
                failure may pass (a network that is away, a full disk), after a growing pause.
            on_status: called with every news, for a progress display.

        Raises:
            NotFound: a variant is not defined.
            EnvironmentNotReady: the time is over.
            RayEnvsError: with `strict`, what kept an environment from being built.
        """
        if not variant_ids:
            return {}
        ids = [self._id(text) for text in variant_ids]
        limit_s = self.prepare_timeout_s() if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        statuses = self._statuses(ids, want=True)
        while True:
            if on_status is not None:
                on_status(statuses)
            busy = sorted(
                name
                for name, status in statuses.items()
                if not _is_done(status, everywhere=everywhere, patient=patient)
            )
            if not busy:
                break
            if time.monotonic() >= deadline:
                raise EnvironmentNotReady(
                    f"not ready after {limit_s:g} s: {', '.join(busy)}",
                    variant_id=busy[0],
                    detail=_coverage(statuses[busy[0]]),
                    hint="the builds go on: call prepare() again, or see `ray-envs explain`",
                )
            statuses = self._next_statuses(ids)
        if strict:
            for name, status in statuses.items():
                if everywhere or not _ready_nodes(status):
                    raise_status_error(name, status)
        return statuses

    def options(self, variant_id: str, **given: Any) -> dict[str, Any]:
        """The full dict for `.options(**…)` of a Ray task or actor, to run in a variant.

        Names only nodes where the environment is ready now; prepares it first where none is.

        Args:
            variant_id: the variant.
            given: the caller's own options (`num_cpus=2`, …); merged.

        Raises:
            NotFound, EnvironmentNotReady, NoEligibleNode: the variant cannot run now.
            InvalidInput: `given` contradicts the environment or its placement.
        """
        return placement.options(self.environment(variant_id), given, variant_id=variant_id)

    def environment(self, variant_id: str, *, prepare: bool = True) -> dict[str, Any]:
        """Paths, versions and ready nodes of a variant.

        Args:
            variant_id: the variant.
            prepare: make it ready first where no node is; otherwise say why none is.

        Raises:
            NotFound, EnvironmentNotReady: there is nothing to run in.
            RayEnvsError: what kept it from being built.
        """
        env_id = self._id(variant_id)
        environment = self._environment(env_id)
        if not environment["ready_nodes"] and _may_join(environment):
            return environment
        if prepare and not environment["ready_nodes"]:
            self.prepare(variant_id)
            environment = self._environment(env_id)
        if not environment["ready_nodes"]:
            raise_status_error(variant_id, environment)
            raise EnvironmentNotReady(
                f"variant {variant_id!r} is ready on no node: {environment['status']}",
                variant_id=variant_id,
                hint="call prepare() first, or see `ray-envs status`",
            )
        return environment

    def status(self, variant_id: str) -> dict[str, Any]:
        """What is known of a variant; its `status` is NOT_EXISTS where it is not defined."""
        env_id = self._id(variant_id)
        return self._statuses([env_id], want=False)[str(env_id)]

    def delete(
        self, variant_id: str, *, force: bool = False, dry_run: bool = False
    ) -> dict[str, Any]:
        """Forget a variant. Its environment goes when nobody wants or holds it any more.

        Args:
            variant_id: the variant; nothing happens where it is not defined.
            force: also while somebody uses it: what he runs in stays until he has ended.
            dry_run: only say whether it would be deleted.

        Returns:
            `variant_id` and `deleted`; with `dry_run`, `would_delete`.

        Raises:
            EnvironmentInUse: somebody uses it; `detail` lists who.
        """
        return self._delete(self._id(variant_id), force=force, dry_run=dry_run)

    def prepare_timeout_s(self) -> float:
        return Settings().prepare_timeout_s

    # -- the face that other batch runners know ------------------------------------------------

    def create_environment(self, variant_id: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Create the environment of a variant and wait until it is ready.

        An existing one is replaced. If that fails, this raises and the old one stays.

        Args:
            variant_id: any name; unique for this provider.
            config: `workflow_id`, `node_id`, `version_id`, `packages`, `python_version`, and the
                fields of `EnvSpec`. Without ids, the variant id is the node id.

        Returns:
            `variant_id, type, workflow_id, node_id, version_id, env_path, venv_path, python_path,
            python_version, status, key`.
        """
        rest = dict(config)
        ids = {name: rest.pop(name, None) for name in _CONFIG_IDS}
        env_id = self._config_id(variant_id, ids)
        if "python_version" in rest:
            rest["python"] = rest.pop("python_version")
        if not any(rest.get(name) for name in ("packages", "project", "requirements")):
            names = (variant_id, ids["node_id"] or "", "default")
            spec = next((self._specs[name] for name in names if name in self._specs), None)
            if spec is not None:
                rest = {**spec.model_dump(exclude_defaults=True), **rest}
                rest["packages"] = spec.packages
        definition = self._defined(rest, base=None, where=f"variant {variant_id}")
        with self._one_at_a_time(variant_id):
            before = self._ids.get(variant_id)
            self._ids[variant_id] = env_id  # now: an answer that is lost can be cleaned up
            self._refused.discard(variant_id)
            try:
                status = self._create(
                    env_id,
                    definition,
                    replace=True,
                    wait_s=self.prepare_timeout_s(),
                    dry_run=False,
                )
            except RayEnvsError as exc:
                if not exc.retryable:  # surely not created
                    self._forget(variant_id, before)
                raise
            if before is not None and before != env_id:
                self._release(before)
        shown = (*_CONFIG_IDS, "env_path", "venv_path", "python_path", "python_version")
        return {
            "variant_id": variant_id,
            "type": "uv",
            **{name: status[name] for name in (*shown, "status", "key")},
        }

    def get_runtime_env(self, variant_id: str) -> dict[str, Any] | None:
        """The runtime_env of a variant without a placement, or None where it is unknown.

        It carries no placement, so it is given only when every live eligible node is ready.

        Raises:
            EnvironmentNotReady: some node is not; `options` needs only one.
        """
        env_id = self._known_id(variant_id)
        if env_id is None:
            return None
        try:
            environment = self._environment(env_id)
        except NotFound:
            return None
        if environment["status"] not in _RUNS:
            raise_status_error(variant_id, environment)
            raise EnvironmentNotReady(
                f"variant {variant_id!r} is not ready on every node: {environment['status']}",
                variant_id=variant_id,
                hint="call prepare() first, or use options(), which names the ready nodes",
            )
        self.runtime_env(variant_id)  # some node may have no part in it
        return {
            "type": "uv",
            "env_path": environment["env_path"],
            "venv_path": environment["venv_path"],
            "python_path": environment["python_path"],
            "py_executable": environment["python_path"],
            "env_vars": dict(environment["runtime_env"]["env_vars"]),
        }

    def runtime_env(self, variant_id: str) -> dict[str, Any]:
        """The runtime_env of a variant as Ray takes it, for a whole job or where no option goes.

        It names no nodes, so it is given only where no node could be the wrong one: every live
        node has the environment ready, or has our plugin, which makes a worker wait for it.

        Raises:
            NotFound: the variant is not defined.
            EnvironmentNotReady: some node is not ready; `options` needs only one.
        """
        environment = self.environment(variant_id)
        lists = ("preparing_nodes", "unfit_nodes", "other_nodes")
        unready = {name: environment[name] for name in lists if environment[name]}
        if environment["is_gated"] or not unready:
            return dict(environment["runtime_env"])
        raise EnvironmentNotReady(
            f"variant {variant_id!r} is not ready on every node of the cluster, and a job or task "
            "without placement may land on any",
            variant_id=variant_id,
            detail="\n".join(
                f"{name.replace('_', ' ')}: {', '.join(ids[:5])}" for name, ids in unready.items()
            ),
            hint="use options(), which names the ready nodes, or start every node with the plugin "
            "of ray_envs (README, On a cluster)",
        )

    def cleanup_environment(self, variant_id: str, timeout: float | None = None) -> None:
        """Give the environment of a variant up; nothing happens where it is unknown.

        Returns at once: files go when nothing wants or holds them any more.
        """
        with self._one_at_a_time(variant_id, timeout):
            env_id = self._known_id(variant_id)
            if env_id is not None:
                self._release(env_id, but=variant_id)
            self._ids.pop(variant_id, None)
            self._refused.discard(variant_id)

    def list_environments(self) -> list[str]:
        """The ids of all defined variants, as this provider's callers know them."""
        defined = {status["variant_id"] for status in self.list_variants()}
        ours = {name: str(env_id) for name, env_id in self._ids.items()}
        return sorted(
            {name for name, address in ours.items() if address in defined}
            | (defined - set(ours.values()))
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- shared --------------------------------------------------------------------------------

    def _id(self, variant_id: str) -> EnvId:
        return self._ids.get(variant_id) or EnvId.parse(variant_id)

    def _known_id(self, variant_id: str) -> EnvId | None:
        """The address behind a caller's id; None where there can be nothing of that name."""
        if variant_id in self._ids:
            return self._ids[variant_id]
        if variant_id in self._refused:
            return None
        try:
            return EnvId.parse(variant_id)
        except InvalidId:
            return None

    def _forget(self, variant_id: str, before: EnvId | None) -> None:
        """Take back that a caller's id has an address, after a create that surely failed."""
        if before is None:
            del self._ids[variant_id]
            self._refused.add(variant_id)
        else:
            self._ids[variant_id] = before

    def _release(self, env_id: EnvId, *, but: str = "") -> None:
        """Delete a definition, unless another id of our callers (than `but`) stands for it."""
        if not any(other == env_id for name, other in self._ids.items() if name != but):
            self._delete(env_id, force=True, dry_run=False)

    def _config_id(self, variant_id: str, ids: Mapping[str, str | None]) -> EnvId:
        if ids["node_id"] is None:
            return EnvId.parse(variant_id)
        given = {name: value for name, value in ids.items() if value is not None}
        return validated(EnvId, given, where=f"variant {variant_id}")

    def _defined(
        self, spec: EnvSpec | Mapping[str, Any], *, base: Path | None, where: str
    ) -> Definition:
        if not isinstance(spec, EnvSpec):
            data = dict(spec)
            if isinstance(data.get("packages"), str):
                data["packages"] = requirements.requirement_lines(data["packages"], where=where)
            spec = validated(EnvSpec, data, where=where)
        if self._base_packages:
            spec = spec.model_copy(update={"packages": (*spec.packages, *self._base_packages)})
        return read_definition(spec, base or Path.cwd())

    def _one_at_a_time(self, variant_id: str, timeout: float | None = None) -> _Held:
        with self._guard:
            lock = self._locks.setdefault(variant_id, threading.Lock())
        return _Held(lock, variant_id, timeout)


class _Held:
    """A thread lock that is waited for at most `timeout` seconds."""

    def __init__(self, lock: threading.Lock, variant_id: str, timeout: float | None) -> None:
        self._lock, self._variant_id, self._timeout = lock, variant_id, timeout

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=-1 if self._timeout is None else self._timeout):
            raise EnvironmentNotReady(
                f"another thread is still busy with {self._variant_id!r}",
                variant_id=self._variant_id,
                hint="try again",
            )

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


def raise_status_error(variant_id: str, status: Mapping[str, Any]) -> None:
    """Raise what a status says went wrong, if anything did.

    Raises:
        NotFound: the variant is not defined.
        RayEnvsError: the error that its agent reported.
    """
    if status["status"] == Status.NOT_EXISTS.value:
        raise NotFound(
            f"no variant {variant_id!r} is defined",
            variant_id=variant_id,
            hint="`ray-envs list` shows the defined ones, create() makes one",
        )
    if status.get("error"):
        error = dict(status["error"])
        coverage = _coverage(status)
        if coverage:
            error["detail"] = "\n".join(filter(None, (coverage, error.get("detail"))))
        raise from_dict(error).about(variant_id=variant_id)


def _may_join(environment: Mapping[str, Any]) -> bool:
    """Whether only a node that is not there yet can run it, and would be made to prepare it."""
    error = environment.get("error") or {}
    return bool(environment["is_gated"]) and error.get("type") == NoEligibleNode.__name__


def _is_done(status: Mapping[str, Any], *, everywhere: bool, patient: bool) -> bool:
    """Whether there is nothing more to wait for."""
    if not everywhere and _ready_nodes(status) and status["status"] != Status.UPDATING.value:
        return True
    may_come = patient and any(
        node.get("error") and may_pass(node["error"]) for node in status.get("nodes", {}).values()
    )
    return status["status"] not in _BUSY and not may_come


def _ready_nodes(status: Mapping[str, Any]) -> list[str]:
    nodes = status.get("nodes", {})
    return [node_id for node_id, state in nodes.items() if state["phase"] == Phase.READY.value]


def _coverage(status: Mapping[str, Any]) -> str:
    """On which nodes a variant is ready and on which not, in words; nothing of a single node."""
    nodes = status.get("nodes", {})
    ready = _ready_nodes(status)
    if len(nodes) < 2:
        return ""
    lines = [f"ready on {len(ready)} of {len(nodes)} nodes"]
    for node_id, state in nodes.items():
        if node_id not in ready:
            error = state.get("error") or {}
            why = error.get("message") or state.get("progress") or state.get("because") or ""
            where = state.get("address") or node_id[:12]
            lines.append(f"  {where}: {state['phase']}" + (f": {why}" if why else ""))
    return "\n".join(lines[:_MAX_TOLD_NODES])


class RayEnvironmentProvider(EnvironmentProvider, Lifecycle):
    """Environments of a Ray cluster, owned by its EnvManager.

    Example:
        >>> with RayEnvironmentProvider.connect() as envs:           # doctest: +SKIP
        ...     envs.create("old", EnvSpec(packages=["scikit-learn==1.7.*"]))
        ...     ray.get(task.options(**envs.options("old")).remote())
    """

    def __init__(self, door: Connection, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._door = door
        self._settings = settings
        #: Which life of the manager told us last, and its version then.
        self._seen: tuple[str, int] = ("", 0)

    @classmethod
    def connect(
        cls, address: str | None = None, *, settings: Settings | None = None, **options: Any
    ) -> RayEnvironmentProvider:
        """Connect to the cluster's EnvManager; start it where none lives.

        Uses the Ray that this process is connected to; else the cluster at `address`, of
        `RAY_ADDRESS` or of this machine; else an embedded Ray that ends with `close`. Warns of
        nodes that can have no environments; a cluster without our plugin is logged once.

        Args:
            address: of a Ray cluster, as in `ray.init`.
            settings: by default those of `RAY_ENVS_*`.
            options: see `EnvironmentProvider`.

        Raises:
            ManagerUnavailable: no cluster answers, or its manager cannot be started.
        """
        provider, nodes = cls._opened(address, settings or Settings.from_environment(), options)
        if not cluster.is_own():  # that one never has another node
            bootstrap.note_missing_gate(nodes)
        return provider

    @classmethod
    def _opened(
        cls, address: str | None, settings: Settings, options: Mapping[str, Any]
    ) -> tuple[RayEnvironmentProvider, dict[str, Any]]:
        """A provider, and what its manager tells of the nodes that have answered so far."""
        import ray

        was_connected = ray.is_initialized()
        is_embedded = cluster.connect(address)
        handle = cluster.find_manager()
        is_new = handle is None
        if is_new:
            environment = settings.to_environment()
            if is_embedded:  # our own job, whose context is clean
                handle = cluster.create_manager(EnvManager, environment)
            else:
                handle = cluster.start_manager(environment)
        door = ActorConnection(handle, on_close=None if was_connected else ray.shutdown)
        provider = cls(door, settings, **options)
        if is_embedded:  # its only node is this one, and its manager still starts
            return provider, {}
        told = door.call("describe")
        if not is_new and told["root"] != str(settings.root) and "RAY_ENVS_ROOT" in os.environ:
            warnings.warn(
                f"this cluster's EnvManager uses the root {told['root']}, "
                f"not {settings.root} (RAY_ENVS_ROOT)",
                RayEnvsWarning,
                stacklevel=3,
            )
        bootstrap.warn_of_bare(told["nodes"], stacklevel=3)
        return provider, told["nodes"]

    @classmethod
    def without_cluster(cls, settings: Settings, **options: Any) -> RayEnvironmentProvider:
        """The environments of this machine's root, for `create`, `prepare`, `list` and `delete`.

        Goes through the manager that lives on that root, if one does; starts no Ray otherwise.
        """
        address = Registry(settings).manager_address()
        if address is not None:
            return cls._opened(address, settings, options)[0]
        return cls(LocalConnection(settings), settings, **options)

    def close(self) -> None:
        self._is_closed = True
        self._door.close()

    def describe(self) -> dict[str, Any]:
        """The cluster as its EnvManager sees it: root, interpreter, Ray, and each node."""
        return dict(self._door.call("describe"))

    def list_variants(self) -> list[dict[str, Any]]:
        return list(self._door.call("list_envs"))

    def _create(
        self, env_id: EnvId, definition: Definition, *, replace: bool, wait_s: float, dry_run: bool
    ) -> Any:
        return self._door.call(
            "create_env",
            within_s=wait_s + self._patience_s(),
            variant_id=str(env_id),
            spec=definition.model_dump(mode="json", exclude_defaults=True),
            replace=replace,
            wait_s=wait_s,
            dry_run=dry_run,
        )

    def _statuses(self, ids: Iterable[EnvId], *, want: bool) -> Statuses:
        names = [str(env_id) for env_id in ids]
        if not want:
            return {n: self._door.call("get_env_status", variant_id=n) for n in names}
        return self._told(self._door.call("prepare", variant_ids=names))

    def _next_statuses(self, ids: Iterable[EnvId]) -> Statuses:
        names = [str(env_id) for env_id in ids]
        life, seen = self._seen
        told = self._door.call("watch", variant_ids=names, seen=seen, timeout_s=_POLL_S)
        if told["life"] != life:  # a manager that restarted has forgotten what we want
            told = self._door.call("prepare", variant_ids=names)
        return self._told(told)

    def _told(self, told: Mapping[str, Any]) -> Statuses:
        self._seen = (told["life"], told["version"])
        return dict(told["variants"])

    def _environment(self, env_id: EnvId) -> dict[str, Any]:
        job_id = self._door.job_id()
        return dict(self._door.call("get_environment", variant_id=str(env_id), job_id=job_id))

    def _delete(self, env_id: EnvId, *, force: bool, dry_run: bool) -> dict[str, Any]:
        answer: dict[str, Any] = self._door.call(
            "delete_env",
            within_s=self._settings.lock_timeout_s + VERB_TIMEOUT_S,
            variant_id=str(env_id),
            force=force,
            job_id=self._door.job_id(),
            dry_run=dry_run,
        )
        return answer

    def _call(self, verb: str, *, within_s: float = VERB_TIMEOUT_S, **arguments: Any) -> Any:
        return self._door.call(verb, within_s=within_s, **arguments)

    def _address(self, variant_id: str) -> str:
        return str(self._id(variant_id))

    def prepare_timeout_s(self) -> float:
        return self._settings.prepare_timeout_s
