"""RayEnvironmentProvider: the variants of a Ray cluster, through its EnvManager.

Without a cluster it uses an EnvManager object in this process, for this machine's root.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ray_envs import verbs
from ray_envs.client.connection import ActorConnection, Connection, LocalConnection
from ray_envs.client.environments import EnvironmentProvider
from ray_envs.client.lifecycle import POLL_S, Lifecycle
from ray_envs.client.statuses import Statuses
from ray_envs.cluster import actors, bootstrap, connecting
from ray_envs.errors import RayEnvsError, RayEnvsWarning, WorkerCannotStart, from_dict
from ray_envs.manager import presence
from ray_envs.manager.manager import EnvManager
from ray_envs.models import EnvId
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.validation import check_is


class RayEnvironmentProvider(EnvironmentProvider, Lifecycle):
    """Environments of a Ray cluster, owned by its EnvManager.

    Example:
        >>> with RayEnvironmentProvider.connect() as envs:           # doctest: +SKIP
        ...     envs.create("old", EnvSpec(packages=["scikit-learn==1.7.*"]))
        ...     ray.get(task.options(**envs.options("old")).remote())
    """

    def __init__(self, connection: Connection, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._connection = connection
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
        if not connecting.is_own():  # that one never has another node
            bootstrap.note_missing_gate(nodes)
        return provider

    @classmethod
    def _opened(
        cls, address: str | None, settings: Settings, options: Mapping[str, Any]
    ) -> tuple[RayEnvironmentProvider, dict[str, Any]]:
        """A provider, and what its manager tells of the nodes that have answered so far."""
        import ray

        was_connected = ray.is_initialized()
        is_embedded = connecting.connect(address)
        handle = actors.find_manager()
        is_new = handle is None
        if is_new:
            environment = settings.to_environment()
            if is_embedded:  # our own job, whose context is clean
                handle = actors.create_manager(EnvManager, environment)
            else:
                handle = actors.start_manager(environment)
        connection = ActorConnection(handle, on_close=None if was_connected else ray.shutdown)
        provider = cls(connection, settings, **options)
        if is_embedded:  # its only node is this one, and its manager still starts
            return provider, {}
        told = connection.call("describe")
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
        address = presence.address_of(settings.root)
        if address is not None:
            return cls._opened(address, settings, options)[0]
        return cls(LocalConnection(settings), settings, **options)

    def close(self) -> None:
        self._is_closed = True
        self._connection.close()

    def ask(self, request: verbs.Request) -> Any:
        """The answer of the EnvManager to a request: any verb of `verbs`.

        Raises:
            ManagerUnavailable: it did not answer within the time of the verb.
            InvalidInput: this is no request.
            RayEnvsError: an error of the verb; see `verbs.VERBS`.
        """
        hint = "give one of the requests in ray_envs.verbs, as in verbs.ListEnvs()"
        check_is(request, tuple(verbs.VERB_OF), where="request of ask()", hint=hint)
        verb = verbs.VERB_OF[type(request)]
        arguments = request.model_dump(exclude_unset=True)
        if "operation_id" in type(request).model_fields:
            # The connection repeats a request whose answer was lost: it must not be done twice.
            arguments.setdefault("operation_id", uuid.uuid4().hex)
        limit_s = verb.limit_s(self._settings, request)
        return self._connection.call(verb.name, within_s=limit_s, **arguments)

    def describe(self) -> dict[str, Any]:
        """The cluster as its EnvManager sees it: root, interpreter, Ray, and each node."""
        return dict(self.ask(verbs.Describe()))

    def list_variants(self) -> list[dict[str, Any]]:
        return list(self.ask(verbs.ListEnvs()))

    def prepare_timeout_s(self) -> float:
        return self._settings.prepare_timeout_s

    def worker_start_timeout_s(self) -> float:
        return self._settings.worker_start_timeout_s

    def start_error(self, variant_id: str) -> RayEnvsError | None:
        told = self.ask(verbs.Doctor(variant_id=self._address(variant_id)))
        errors = (from_dict(row["error"]) for row in told["environments"] if row["error"])
        return next((error for error in errors if isinstance(error, WorkerCannotStart)), None)

    def _create(self, request: verbs.CreateEnv, definition: Definition) -> Any:  # noqa: ARG002
        return self.ask(request)

    def _delete(self, request: verbs.DeleteEnv) -> dict[str, Any]:
        given = {**request.model_dump(exclude_unset=True), "job_id": self._connection.job_id()}
        return dict(self.ask(verbs.DeleteEnv(**given)))

    def _statuses(self, ids: Iterable[EnvId], *, want: bool) -> Statuses:
        names = [str(env_id) for env_id in ids]
        if not want:
            return {name: self.ask(verbs.GetEnvStatus(variant_id=name)) for name in names}
        return self._told(self.ask(verbs.Prepare(variant_ids=names)))

    def _next_statuses(self, ids: Iterable[EnvId]) -> Statuses:
        names = [str(env_id) for env_id in ids]
        life, seen = self._seen
        told = self.ask(verbs.Watch(variant_ids=names, seen=seen, timeout_s=POLL_S))
        if told["life"] != life:  # the manager restarted and has forgotten the request
            told = self.ask(verbs.Prepare(variant_ids=names))
        return self._told(told)

    def _told(self, told: Mapping[str, Any]) -> Statuses:
        self._seen = (told["life"], told["version"])
        return dict(told["variants"])

    def _environment(self, env_id: EnvId) -> dict[str, Any]:
        job_id = self._connection.job_id()
        return dict(self.ask(verbs.GetEnvironment(variant_id=str(env_id), job_id=job_id)))

    def _address(self, variant_id: str) -> str:
        return str(self._id(variant_id))
