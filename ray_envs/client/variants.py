"""Variants, as a program uses them: define, prepare, run in, delete. `Variants` is the contract.

`provider` keeps it with a cluster or without Ray, `in_memory` without uv and Ray for tests.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ray_envs.client.inputs import read_definition
from ray_envs.client.statuses import (
    OnStatus,
    Statuses,
    coverage,
    is_done,
    may_join,
    raise_status_error,
    ready_nodes,
)  # fmt: skip
from ray_envs.decisions import placement, requirements
from ray_envs.errors import EnvironmentNotReady, RayEnvsError
from ray_envs.models import EnvId
from ray_envs.settings import Settings
from ray_envs.specs import Definition, EnvSpec
from ray_envs.validation import Model, check_is, validated
from ray_envs.verbs import DEFAULT, CreateEnv, DeleteEnv, request_of

if TYPE_CHECKING:
    from typing_extensions import Self


class _Wait(Model):
    #: Seconds; infinity for as long as it takes.
    timeout_s: Annotated[float, Field(ge=0)] | None = None


class Variants(ABC):
    """Environments by `variant_id`. Safe to use from several threads.

    Args:
        specs: specs by variant id, by node id, or under "default", for callers of
            `create_environment` whose config names no packages, project or requirements.
        base_packages: requirements that every created environment gets as well.
    """

    def __init__(
        self, *, specs: Mapping[str, EnvSpec] | None = None, base_packages: Iterable[str] = ()
    ) -> None:
        self._specs = dict(specs or {})
        self._base_packages = tuple(base_packages)
        #: The address behind each id of `create_environment`; several may share one.
        self._ids: dict[str, EnvId] = {}
        self._guard = threading.Lock()

    @abstractmethod
    def _create(self, request: CreateEnv, definition: Definition) -> Any:
        """Define a variant; returns its status. `definition` is the spec of the request."""

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
    def _delete(self, request: DeleteEnv) -> dict[str, Any]:
        """Delete the definition of a variant; without `force`, only if it is not in use."""

    @abstractmethod
    def list_variants(self) -> list[dict[str, Any]]:
        """Every defined variant in a row: its ids, key, generation and status."""

    @abstractmethod
    def close(self) -> None:
        """End the connection. May be called twice."""

    def create(
        self,
        variant_id: str,
        spec: EnvSpec | Mapping[str, Any],
        *,
        replace: bool = True,
        base: Path | None = None,
        wait_s: float = DEFAULT,
        dry_run: bool = DEFAULT,
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
        return self._created(env_id, definition, replace=replace, wait_s=wait_s, dry_run=dry_run)

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
            EnvironmentNotReady: that took too long.
            RayEnvsError: with `strict`, why an environment could not be built.
        """
        if not variant_ids:
            return {}
        ids = [self._id(text) for text in variant_ids]
        if on_status is not None:
            check_is(on_status, Callable, where="on_status of prepare()", hint="give a function")
        given = validated(_Wait, {"timeout_s": timeout_s}, where="prepare()").timeout_s
        limit_s = self.prepare_timeout_s() if given is None else given
        deadline = time.monotonic() + limit_s
        statuses = self._statuses(ids, want=True)
        while True:
            if on_status is not None:
                on_status(statuses)
            busy = sorted(
                name
                for name, status in statuses.items()
                if not is_done(status, everywhere=everywhere, patient=patient)
            )
            if not busy:
                break
            if time.monotonic() >= deadline:
                raise EnvironmentNotReady(
                    f"not ready after {limit_s:g} s: {', '.join(busy)}",
                    variant_id=busy[0],
                    detail=coverage(statuses[busy[0]]),
                    hint="the builds go on: call prepare() again, or see `ray-envs explain`",
                )
            statuses = self._next_statuses(ids)
        if strict:
            for name, status in statuses.items():
                if everywhere or not ready_nodes(status):
                    raise_status_error(name, status)
        return statuses

    def options(self, variant_id: str, **given: Any) -> dict[str, Any]:
        """The full dict for `.options(**…)` of a Ray task or actor, to run in a variant.

        Names only nodes where the environment is ready now; prepares it first where none is.

        Raises:
            NotFound, EnvironmentNotReady, NoEligibleNode: the variant cannot run now.
            InvalidInput: `given` contradicts the environment or its placement.
        """
        return placement.options(self.environment(variant_id), given, variant_id=variant_id)

    def environment(self, variant_id: str, *, prepare: bool = True) -> dict[str, Any]:
        """Paths, versions and ready nodes of a variant.

        Raises:
            NotFound, EnvironmentNotReady: no node has it.
            RayEnvsError: why it could not be built.
        """
        env_id = self._id(variant_id)
        environment = self._environment(env_id)
        if not environment["ready_nodes"] and may_join(environment):
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
        self, variant_id: str, *, force: bool = DEFAULT, dry_run: bool = DEFAULT
    ) -> dict[str, Any]:
        """Delete the definition of a variant, if it is defined. `gc` deletes its environment later.

        Returns `variant_id` and `deleted`; with `dry_run`, `would_delete`. Raises
        `EnvironmentInUse`, with the users in `detail`, unless `force`: tasks keep what they run in.
        """
        return self._deleted(self._id(variant_id), force=force, dry_run=dry_run)

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

    def prepare_timeout_s(self) -> float:
        return Settings().prepare_timeout_s

    def worker_start_timeout_s(self) -> float:
        return Settings().worker_start_timeout_s

    def start_error(self, variant_id: str) -> RayEnvsError | None:  # noqa: ARG002
        """Return why no worker can start in a ready environment; None if one can."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _id(self, variant_id: str) -> EnvId:
        known = self._ids.get(variant_id) if isinstance(variant_id, str) else None
        return known or EnvId.parse(variant_id)

    def _created(self, env_id: EnvId, definition: Definition, **given: Any) -> dict[str, Any]:
        spec = definition.model_dump(mode="json", exclude_defaults=True)
        arguments = {"variant_id": str(env_id), "spec": spec, "wheels": definition.contents()}
        request = request_of(CreateEnv, {**arguments, **given})
        status: dict[str, Any] = self._create(request, definition)
        return status

    def _deleted(self, env_id: EnvId, **given: Any) -> dict[str, Any]:
        return self._delete(request_of(DeleteEnv, {"variant_id": str(env_id), **given}))

    def _defined(
        self, spec: EnvSpec | Mapping[str, Any], *, base: Path | None, where: str
    ) -> Definition:
        hint = "give an EnvSpec, or a dict with its fields"
        if not isinstance(spec, EnvSpec):
            check_is(spec, Mapping, where=f"{where}: spec", hint=hint)
            data = dict(spec)
            if isinstance(data.get("packages"), str):
                data["packages"] = requirements.requirement_lines(data["packages"], where=where)
            spec = validated(EnvSpec, data, where=where)
        if self._base_packages:
            spec = spec.model_copy(update={"packages": (*spec.packages, *self._base_packages)})
        if base is not None:
            check_is(base, Path, where=f"{where}: base", hint="give a pathlib.Path")
        return read_definition(spec, base or Path.cwd())
