"""EnvManager: the verbs of one cluster. A plain class; `cluster` makes it a detached actor.

Takes and returns plain data, so that any worker can call it without having ray_envs. Each verb is
a few lines: what is known is `reconciler`, what changes a variant is `changes`, what goes is
`collector`. Identical requests at the same time share one result.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ray_envs.cluster.cluster import NAMESPACE, NodeInfo, Nodes, RayNodes, create_manager
from ray_envs.decisions import placement
from ray_envs.errors import InvalidInput, RayEnvsError, StorageFailed
from ray_envs.events import EventKind, OperationStatus
from ray_envs.manager import exports
from ray_envs.manager.changes import Changes
from ray_envs.manager.collector import Collector
from ray_envs.manager.inspector import Inspector
from ray_envs.manager.leases import Leases
from ray_envs.manager.operations import Operations
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.resolver import Resolver
from ray_envs.models import (
    EnvId,
    Generation,
    NodeEnvState,
    Phase,
    VariantRecord,
    nearest_hint,
)
from ray_envs.node.agent import NodeAgent
from ray_envs.node.uv import this_platform, this_target
from ray_envs.plugin import gate
from ray_envs.settings import Settings
from ray_envs.verbs import (
    Count,
    Hours,
    Name,
    Options,
    Packages,
    Position,
    Seconds,
    Texts,
    checked,
)

#: What `get_environment` takes from a status.
_FOR_PROGRAMS = (
    "variant_id", "workflow_id", "node_id", "version_id", "status", "key", "generation",
    "lock_sha256", "env_path", "venv_path", "python_path", "python_version", "ray_version", "error",
)  # fmt: skip
#: What uv makes of a lock, and the file that holds it.
_CONVERTED = {"requirements": "requirements.txt", "pylock": "pylock.toml"}
#: How long one long-poll for events lasts at most.
_MAX_POLL_S = 60.0
_HISTORY_S = 3600.0
#: Up to how many variants of one environment are told each that it is ready.
_TOLD_EACH = 20

Rows = list[dict[str, Any]]
Answer = dict[str, Any]


@dataclass(slots=True)
class _Flight:
    """A verb that runs, and how many wait for it."""

    task: asyncio.Future[Any]
    waiting: int = 0


@checked
class EnvManager:
    """The variants of one cluster. All methods are keyword-only; they take and return plain data.

    A variant is addressed by `variant_id`: "node", "workflow/node" or "workflow/node/version".
    Verbs that would change something take `dry_run`: they then say what they would do.

    Args:
        settings: as `Settings.to_environment` writes them.
        nodes: who answers about the cluster; by default the Ray cluster of this process.
    """

    def __init__(self, *, settings: dict[str, str], nodes: Nodes | None = None) -> None:
        self._settings = Settings.from_environment(settings)
        self._cluster = nodes or RayNodes(NodeAgent)
        self._registry = Registry(self._settings)
        self._platform = this_platform()
        self._target = this_target(self._cluster.ray_version())
        self._operations = Operations(self._settings, self._registry)
        self._leases = Leases(self._settings.root / "leases.json")
        self._reconciler = Reconciler(
            self._settings,
            self._cluster,
            self._registry,
            platform=self._platform,
            target=self._target,
            on_node=self._say_node,
            on_final=self._say_final,
        )
        self._resolver = Resolver(
            self._settings,
            self._registry,
            self._reconciler.fleet,
            platform=self._platform,
            target=self._target,
            known=self._reconciler.known,
        )
        self._collector = Collector(
            self._settings,
            self._cluster,
            self._registry,
            self._reconciler,
            self._leases,
            self._operations,
        )
        self._inspector = Inspector(
            self._settings,
            self._registry,
            self._reconciler,
            self._operations,
            self._collector,
            self._leases,
            target=self._target,
        )
        self._changes = Changes(
            self._settings,
            self._registry,
            self._reconciler,
            self._resolver,
            self._operations,
            users=self._inspector.users,
        )
        #: The keys and variables with which an interpreter has been seen to start.
        self._started: set[tuple[str, str]] = set()
        #: Verbs that run, by what was asked.
        self._flights: dict[str, _Flight] = {}
        #: Tells clients that a restart has forgotten their wishes.
        self._life = uuid.uuid4().hex
        #: The open lock that tells other processes that this manager serves the root.
        self._announced: int | None = None
        self._has_awoken = False
        self._is_settled = False
        self._prune_history_at = self._reload_at = 0.0

    # -- reading ----------------------------------------------------------------------------

    async def describe(self) -> Answer:
        """The manager's root, interpreter, Ray and nodes."""
        await self._awake()
        return {
            "root": str(self._settings.root),
            "target": self._target.model_dump(mode="json"),
            "platform": self._platform.name,
            "history": self._operations.history.problem or "ok",
            "nodes": {
                node.info.node_id: {
                    "address": node.info.address,
                    "is_head": node.info.is_head,
                    "is_eligible": node.site == self._reconciler.site and node.error is None,
                    "site": node.site,
                    "has_gate": node.has_gate,
                    "software": dict(node.software),
                    "labels": dict(node.info.labels),
                    "error": node.error,
                }
                for node in self._reconciler.fleet.nodes.values()
            },
        }

    async def get_env_status(self, *, variant_id: str) -> Answer:
        """What is known of a variant; NOT_EXISTS where it is not defined. Never counts as use."""
        await self._awake()
        return self._reconciler.status(_name(variant_id))

    async def list_envs(self) -> Rows:
        """Every variant in a row: ids, key, generation, status, and how many nodes are ready."""
        await self._awake()
        self._reconciler.reload()
        return self._reconciler.summaries()

    async def get_environment(self, *, variant_id: str, job_id: Name | None = None) -> Answer:
        """What a program needs to run in a variant: paths, variables, and the nodes that are ready.

        Args:
            variant_id: the variant.
            job_id: the job that will run in it: the environment is not collected before it ends.

        Raises:
            NotFound: the variant is not defined.
        """
        await self._awake()
        name = _name(variant_id)
        record = self._reconciler.get(name)
        status = self._reconciler.status(name)
        places = self._reconciler.places(name)
        if self._reconciler.is_stale(record.current):  # nothing runs on a mismatch
            places = {**places, "ready_nodes": [], "preparing_nodes": [], "may_spread": False}
        elif job_id is not None:
            self._lease(record, job_id)
        if places["ready_nodes"]:
            await self._check_start(record, places["ready_nodes"][0])
        env_vars, key = record.definition.env_vars, record.current.key
        asking = gate.field(key, self._reconciler.wishes.epoch(key))
        return {
            **{field: status[field] for field in _FOR_PROGRAMS},
            "env_vars": dict(env_vars),
            "runtime_env": placement.runtime_env(
                status["venv_path"], env_vars, asking if places["is_gated"] else None
            ),
            **places,
        }

    async def get_options(
        self, *, variant_id: str, job_id: Name | None = None, options: Options | None = None
    ) -> Answer:
        """The whole dict for `.options(**…)` of a task or actor that runs in a variant.

        For workers that have no ray_envs; `RayEnvironmentProvider.options` is the same.

        Args:
            variant_id: the variant; prepare it first.
            job_id: see `get_environment`.
            options: other options (`num_cpus`, `runtime_env`, …), to be merged; plain data.

        Raises:
            NotFound: the variant is not defined.
            NoEligibleNode: no node has it ready.
            InvalidInput: `options` contradict the variant.
        """
        environment = await self.get_environment(variant_id=variant_id, job_id=job_id)
        return placement.options(environment, options or {}, variant_id=variant_id)

    async def list_deps(self, *, variant_id: str) -> Answer:
        """What a variant declares, and the versions that are locked."""
        return exports.deps(self._registry, await self._defined(variant_id))

    async def list_generations(self, *, variant_id: str) -> Rows:
        """Every generation of a variant, oldest first, with what it changed."""

        def facts(made: Generation) -> Answer:
            return {
                "fits_cluster": not self._reconciler.is_stale(made),
                "is_ready": self._reconciler.is_ready(made),
            }

        record = await self._defined(variant_id)
        return exports.generations(self._registry, record, facts=facts)

    async def diff_env(self, *, variant_id: str, from_: Count, to: Count | None = None) -> Answer:
        """The packages that differ between two generations; `to` is the current one by default."""
        return exports.difference(self._registry, await self._defined(variant_id), from_, to)

    async def export_env(
        self, *, variant_id: str, format: str = "project", generation: Count | None = None
    ) -> Answer:
        """A generation for other tools, or for `import_env`.

        Returns:
            `files`: texts by name. "project": `pyproject.toml` and `uv.lock` byte for byte, and
            `options.json` with what is in neither; "requirements": with hashes; "pylock".

        Raises:
            NotFound: the variant is not defined.
            InvalidInput: it has no such generation, or the format is unknown.
        """
        record = await self._defined(variant_id)
        made = exports.generation(self._registry, record, generation)
        if format == "project":
            files = exports.project_files(self._registry, record, made)
        elif format in _CONVERTED:
            pyproject, uv_lock = self._registry.lock_text(record.env_id, made.number)
            text = await self._reconciler.fleet.head().call(
                "export",
                pyproject=pyproject,
                uv_lock=uv_lock,
                extras=list(made.definition.extras),
                groups=list(made.definition.groups),
                format=format,
            )
            files = {_CONVERTED[format]: text}
        else:
            hint = nearest_hint(format, ["project", *_CONVERTED])
            raise InvalidInput(f"unknown format {format!r}", hint=hint)
        return {
            "variant_id": str(record.env_id),
            "generation": made.number,
            "key": made.key,
            "lock_sha256": made.lock_sha256,
            "files": files,
        }

    async def explain(self, *, variant_id: str) -> Answer:
        """Why a variant is as it is: each node and its reason, who uses it, what gc would do."""
        return await self._inspector.explain(await self._defined(variant_id))

    # -- history ----------------------------------------------------------------------------

    async def events(
        self,
        *,
        since: Position = 0,
        kinds: Texts = (),
        variant_id: str | None = None,
        limit: Count = 1000,
        timeout_s: Seconds = 0,
    ) -> Answer:
        """Events after number `since`, as soon as there are any, or after `timeout_s` seconds.

        Returns:
            `events` in order, and `next`: what to give as `since` the next time. `since=-1` gives
            none, and the number to begin with to hear only what is new.
        """
        await self._awake()
        if since < 0:
            return {"events": [], "next": self._operations.history.last_number()}
        found, following = await self._operations.events(
            since=since,
            kinds=[_word(EventKind, kind) for kind in kinds],
            variant_id=None if variant_id is None else _name(variant_id),
            limit=limit,
            timeout_s=min(timeout_s, _MAX_POLL_S),
        )
        return {"events": [event.model_dump(mode="json") for event in found], "next": following}

    async def get_operations(
        self,
        *,
        variant_id: str | None = None,
        operation: Name | None = None,
        status: Name | None = None,
        limit: Count = 100,
        offset: Count = 0,
    ) -> Answer:
        """The operations that match, newest first, and how many there are: `rows`, `total`."""
        await self._awake()
        found, total = self._operations.history.operations(
            variant_id=None if variant_id is None else _name(variant_id),
            operation=operation,
            status=None if status is None else _word(OperationStatus, status),
            limit=limit,
            offset=offset,
        )
        return {"rows": [row.model_dump(mode="json") for row in found], "total": total}

    async def delete_operations(
        self,
        *,
        variant_id: str | None = None,
        operation: Name | None = None,
        status: Name | None = None,
        before: Name | None = None,
    ) -> Answer:
        """Delete operations that have ended and match; `before` is an RFC 3339 moment.

        Raises:
            InvalidInput: no filter is given.
        """
        await self._awake()
        count = self._operations.history.delete_operations(
            variant_id=None if variant_id is None else _name(variant_id),
            operation=operation,
            status=None if status is None else _word(OperationStatus, status),
            before=None if before is None else _moment(before),
        )
        if self._operations.history.problem:
            raise StorageFailed(
                "the history cannot be changed now", detail=self._operations.history.problem
            )
        return {"deleted": count}

    # -- changing ---------------------------------------------------------------------------

    async def create_env(
        self,
        *,
        variant_id: str,
        spec: Options,
        replace: bool = False,
        wait_s: Seconds = 0,
        dry_run: bool = False,
    ) -> Answer:
        """Define a variant and want it on every node; returns its status.

        Idempotent for an equal spec. A different one needs `replace` and makes a new generation:
        that is prepared on every node before it takes the place of the current one.

        Args:
            variant_id: the variant.
            spec: the fields of `models.Definition`: texts, not paths.
            replace: accept that the variant exists with another spec.
            wait_s: how long to wait until it is ready on every eligible node, in seconds. If it
                fails within that time, the definition is again what it was before. A variant that
                is replaced is waited for in any case.
            dry_run: only say what would be done.

        Raises:
            InvalidId, InvalidInput, InvalidPackages: the input cannot be accepted.
            AlreadyExists: it is defined differently and `replace` is false.
            ResolutionFailed, UvFailed, StorageFailed, LockTimeout: nothing was changed.
        """
        return await self._create(
            "create", variant_id, spec, replace=replace, wait_s=wait_s, dry_run=dry_run
        )

    async def import_env(
        self,
        *,
        variant_id: str,
        pyproject: str,
        uv_lock: str,
        options: Options | None = None,
        replace: bool = False,
        wait_s: Seconds = 0,
        dry_run: bool = False,
    ) -> Answer:
        """The way back from `export_env`: the same lock, byte for byte, and the same key.

        Raises:
            InvalidInput: the texts are no project and lock, or the lock is not that of the project.
            ResolutionFailed: pins would have to move, as for another Ray.
            (and what `create_env` raises)
        """
        spec = {**(options or {}), "pyproject": pyproject, "uv_lock": uv_lock}
        return await self._create(
            "import", variant_id, spec, replace=replace, wait_s=wait_s, dry_run=dry_run
        )

    async def _create(
        self,
        made_by: str,
        variant_id: str,
        spec: Mapping[str, Any],
        *,
        replace: bool,
        wait_s: float,
        dry_run: bool,
    ) -> Answer:
        env_id = EnvId.parse(variant_id)
        definition = self._resolver.checked(spec, where=f"variant {env_id}")
        await self._awake()
        asked = [made_by, str(env_id), definition.model_dump_json(), replace, wait_s, dry_run]
        return await self._once(
            asked,
            lambda: self._changes.create(
                env_id,
                definition,
                replace=replace,
                wait_s=wait_s,
                dry_run=dry_run,
                made_by=made_by,
            ),
        )

    async def add_deps(
        self,
        *,
        variant_id: str,
        packages: Packages,
        dry_run: bool = False,
        operation_id: Name | None = None,
    ) -> Answer:
        """Add packages (requirements, or a requirements text); pins that fit stay.

        Args:
            variant_id: the variant.
            packages: what to add.
            dry_run: only say what would change.
            operation_id: any unique text. Whoever heard no answer may ask again with the same one:
                what was done is not done again.

        Returns:
            The status, `diff`, and what every change says: `operation_id`, `stdout`, `stderr`,
            `exit_code`, `duration_s`.

        Raises:
            NotFound: the variant is not defined.
            InvalidPackages: none are given, or one cannot be accepted.
            ResolutionFailed, UvFailed, …: the current generation is as it was.
        """
        return await self._edit(
            self._changes.add, variant_id, packages, dry_run=dry_run, operation_id=operation_id
        )

    async def update_deps(
        self,
        *,
        variant_id: str,
        packages: Packages = (),
        dry_run: bool = False,
        operation_id: Name | None = None,
    ) -> Answer:
        """Upgrade the named packages within what is declared, or all; see `add_deps`."""
        return await self._edit(
            self._changes.update, variant_id, packages, dry_run=dry_run, operation_id=operation_id
        )

    async def remove_deps(
        self,
        *,
        variant_id: str,
        packages: Packages,
        dry_run: bool = False,
        operation_id: Name | None = None,
    ) -> Answer:
        """Remove declared packages, and what only they needed; see `add_deps`."""
        return await self._edit(
            self._changes.remove, variant_id, packages, dry_run=dry_run, operation_id=operation_id
        )

    async def rollback_env(
        self,
        *,
        variant_id: str,
        to: Count | None = None,
        dry_run: bool = False,
        operation_id: Name | None = None,
    ) -> Answer:
        """Make the previous generation, or generation `to`, the current one.

        Raises:
            InvalidInput: there is none, or it was locked for another cluster.
        """
        env_id = await self._asked(variant_id)
        return await self._once(
            ["rollback", str(env_id), to, dry_run],
            lambda: self._changes.rollback(env_id, to, dry_run=dry_run, operation_id=operation_id),
        )

    async def delete_env(
        self,
        *,
        variant_id: str,
        force: bool = False,
        job_id: Name | None = None,
        dry_run: bool = False,
    ) -> Answer:
        """Forget a variant; its history stays. Nothing happens where it is not defined.

        Its environment goes when a collection finds that nobody wants, holds or was promised it.

        Args:
            variant_id: the variant.
            force: also while somebody uses it: what he runs in stays until he has ended.
            job_id: the caller's job, whose own leases are no reason to refuse.
            dry_run: only say whether it would be deleted.

        Raises:
            EnvironmentInUse: somebody uses it; `detail` lists who.
        """
        env_id = EnvId.parse(variant_id)
        await self._awake()
        return await self._once(
            ["delete", str(env_id), force, job_id, dry_run],
            lambda: self._changes.delete(env_id, force=force, job_id=job_id, dry_run=dry_run),
        )

    async def pin_env(self, *, variant_id: str, is_pinned: bool = True) -> Answer:
        """Keep every environment of a variant from being collected, or allow it again."""
        env_id = await self._asked(variant_id)
        return await self._changes.pin(env_id, is_pinned=is_pinned)

    async def sync_env(self, *, variant_id: str, dry_run: bool = False) -> Answer:
        """Make every node match the variant's lock: check, mend, build; lock again where stale.

        Returns:
            `status`, `nodes` (what was found and done on each), `stdout`, `stderr`, `exit_code`,
            `duration_s`. With `dry_run`, nothing is mended.

        Raises:
            NotFound: the variant is not defined.
            RayEnvsError: what keeps a node from matching.
        """
        env_id = await self._asked(variant_id)
        return await self._once(
            ["sync", str(env_id), dry_run],
            lambda: self._inspector.sync(env_id, self._changes, dry_run=dry_run),
        )

    async def cleanup(
        self,
        *,
        idle_hours: Hours | None = None,
        dry_run: bool = False,
        include_current: bool = False,
    ) -> Answer:
        """Collect environments that nobody wants, holds or was promised, on every node.

        Args:
            idle_hours: how long they must not have been used; by default `RAY_ENVS_IDLE_HOURS`.
            dry_run: only say what would go, and why everything else stays.
            include_current: also those of current generations; they are built again on demand.

        Returns:
            `deleted` and `kept`, each with its reason, and `freed_bytes`.
        """
        await self._awake()
        self._reconciler.reload()
        return await self._once(
            ["gc", idle_hours, dry_run, include_current],
            lambda: self._collector.collect(
                dry_run=dry_run, idle_hours=idle_hours, include_current=include_current
            ),
        )

    async def prepare(self, *, variant_ids: Texts) -> Answer:
        """Want these variants on every node, failed ones once more; see `watch` for how it goes.

        Those that were locked for another Ray or Python are locked again, as new generations.

        Raises:
            NotFound: a variant is not defined.
        """
        await self._awake()
        names = [_name(text) for text in variant_ids]
        await self._reconciler.fleet.look_at_disks()
        for name in names:
            record = self._reconciler.get(name)
            if self._reconciler.is_stale(record.current):
                self._relock_soon(name, record.env_id)
            else:
                self._reconciler.want([record.current.key])
        return self._told(names)

    async def watch(self, *, variant_ids: Texts, seen: Position, timeout_s: Seconds = 10) -> Answer:
        """The status of variants, once anything is newer than `seen`, or after `timeout_s`."""
        await self._awake()
        names = [_name(text) for text in variant_ids]
        await self._reconciler.fleet.news(seen, timeout_s)
        return self._told(names)

    async def doctor(self, *, repair: bool = False, variant_id: str | None = None) -> Answer:
        """Examine every node and every environment; with `repair`, mend what is damaged.

        Returns:
            `is_healthy`, `nodes` (probes of each), `environments` (what was found in each),
            `definitions` (those that cannot be read), `history`.
        """
        await self._awake()
        self._reconciler.reload()
        names = [_name(variant_id)] if variant_id else sorted(self._reconciler.variants)
        return await self._inspector.doctor(names, repair=repair)

    async def stop(self) -> None:
        """End the loop and, where the agent lives in this process, its builds."""
        await self._reconciler.stop()
        self._operations.history.close()
        if self._announced is not None:
            os.close(self._announced)
            self._announced = None

    # -- shared -----------------------------------------------------------------------------

    async def _awake(self) -> None:
        if not self._has_awoken:
            self._has_awoken = True
            with suppress(StorageFailed):  # the loop tries again, and verbs say what is wrong
                self._announce()
        await self._reconciler.awake(self._chores)

    def _announce(self) -> None:
        if self._announced is None:
            self._announced = self._registry.announce_manager(self._cluster.address())

    async def _chores(self) -> None:
        """What the loop does besides building: tell that we live, settle, collect, forget."""
        self._announce()  # again each time: another one may have left
        if not self._is_settled:
            self._is_settled = True
            await self._operations.settle_all()
        if time.monotonic() >= self._reload_at:  # every turn would be too often for thousands
            self._reload_at = time.monotonic() + self._settings.tick_s
            self._reconciler.reload()
        if self._announced is not None:  # a guest on this root leaves that to its manager
            await self._collector.turn()
            if time.monotonic() >= self._prune_history_at:
                self._prune_history_at = time.monotonic() + _HISTORY_S
                self._operations.history.prune(datetime.now(timezone.utc))

    async def _once(self, asked: list[Any], act: Callable[[], Awaitable[Answer]]) -> Answer:
        """What `act` gives; whoever asks the same at the same time shares it.

        It goes on for as long as anybody waits for it.
        """
        question = json.dumps(asked)
        flight = self._flights.get(question)
        if flight is None:
            flight = self._flights[question] = _Flight(asyncio.ensure_future(act()))
            mine = flight
            flight.task.add_done_callback(lambda _: self._land(question, mine))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._land(question, flight)
                flight.task.cancel()
                await asyncio.gather(flight.task, return_exceptions=True)

    async def _edit(
        self,
        change: Callable[..., Awaitable[Answer]],
        variant_id: str,
        packages: Packages,
        *,
        dry_run: bool,
        operation_id: str | None,
    ) -> Answer:
        """Change the packages of a variant with one of the verbs of `Changes`."""
        env_id = await self._asked(variant_id)
        names = [packages] if isinstance(packages, str) else list(packages)
        return await self._once(
            [change.__name__, str(env_id), names, dry_run],
            lambda: change(env_id, names, dry_run=dry_run, operation_id=operation_id),
        )

    def _land(self, question: str, flight: _Flight) -> None:
        if self._flights.get(question) is flight:
            del self._flights[question]

    async def _asked(self, variant_id: str) -> EnvId:
        env_id = EnvId.parse(variant_id)
        await self._awake()
        return env_id

    async def _defined(self, variant_id: str) -> VariantRecord:
        await self._awake()
        return self._reconciler.get(_name(variant_id))

    def _told(self, names: Iterable[str]) -> Answer:
        statuses = {name: self._reconciler.status(name) for name in names}
        version = self._reconciler.fleet.version
        return {"life": self._life, "version": version, "variants": statuses}

    def _relock_soon(self, name: str, env_id: EnvId) -> None:
        """Lock a variant for this cluster in the background; its status tells how that goes."""
        if name in self._reconciler.relocking:
            return

        async def relock() -> None:
            try:
                await self._changes.relock(env_id)
                self._reconciler.relock_errors.pop(name, None)
            except RayEnvsError as exc:
                self._reconciler.relock_errors[name] = exc
            finally:
                self._reconciler.relocking.pop(name, None)
                await self._reconciler.fleet.announce()

        self._reconciler.relocking[name] = asyncio.create_task(relock())

    def _lease(self, record: VariantRecord, job_id: str) -> None:
        with suppress(StorageFailed):  # a full disk: the promise holds as long as this process
            self._leases.take(
                record.current.key,
                job_id=job_id,
                session=self._cluster.session(),
                variant_id=str(record.env_id),
            )

    async def _check_start(self, record: VariantRecord, node_id: str) -> None:
        """Start the interpreter once with the variables of a variant.

        Ray would start a worker that dies at once again and again, for ever and in silence.
        """
        variables = record.definition.env_vars
        combination = (record.current.key, json.dumps(variables, sort_keys=True))
        if variables and combination not in self._started:
            node = self._reconciler.fleet.nodes[node_id]
            await node.call("try_start", key=record.current.key, env_vars=variables)
            self._started.add(combination)

    def _say_node(self, info: NodeInfo, has_joined: bool) -> None:
        kind = EventKind.NODE_JOINED if has_joined else EventKind.NODE_LOST
        self._operations.say(kind, node_id=info.node_id, address=info.address)

    def _say_final(self, info: NodeInfo, state: NodeEnvState) -> None:
        is_ready = state.phase is Phase.READY
        names = self._reconciler.sharing(state.key)
        # One for each variant that has it, so that whoever follows a variant hears of it; of
        # hundreds that share an environment, one event tells enough.
        for name in names if len(names) <= _TOLD_EACH else [None]:
            self._operations.say(
                EventKind.PREPARED if is_ready else EventKind.PREPARATION_FAILED,
                variant_id=name,
                key=state.key,
                node_id=info.node_id,
                how=state.how,
                duration_s=state.duration_s,
                error=state.error,
            )


def _name(variant_id: str) -> str:
    return str(EnvId.parse(variant_id))


def _word(kind: Any, text: str) -> Any:
    """`text` as a member of an enumeration.

    Raises:
        InvalidInput: there is none of that value; the nearest one is named.
    """
    try:
        return kind(text)
    except ValueError:
        known = [member.value for member in kind]
        raise InvalidInput(
            f"unknown {kind.__name__} {text!r}", hint=nearest_hint(text, known)
        ) from None


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise InvalidInput(
            f"{text!r} is no moment", hint="write it like 2026-01-31T12:00:00Z"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def start(address: str) -> None:
    """Create the detached EnvManager of the cluster at `address`: the helper driver's only job.

    Settings come from `RAY_ENVS_*`. On an error of ours the last line of stdout is its plain data.
    """
    import ray

    try:
        settings = Settings.from_environment().to_environment()
        ray.init(address=address, namespace=NAMESPACE, logging_level="ERROR", log_to_driver=False)
        ray.get(create_manager(EnvManager, settings).describe.remote())
    except RayEnvsError as exc:
        print(json.dumps(exc.to_dict()))
        sys.exit(exc.exit_code)
