"""EnvManager: the verbs of one cluster, as `verbs` declares them. `cluster` makes it an actor.

A method is a few lines: `reconciler` knows the state, `changes` changes a variant, `collector`
deletes, `inspector` examines. What they are made of is `wiring`; how requests come in is `serving`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from ray_envs import verbs
from ray_envs.cluster.nodes import Nodes, RayNodes
from ray_envs.decisions import placement
from ray_envs.decisions.local_wheels import from_export, in_export
from ray_envs.disk import local_wheels as files_of_wheels
from ray_envs.errors import InvalidInput, RayEnvsError, StorageFailed
from ray_envs.events import EventKind, OperationStatus
from ray_envs.manager import exports
from ray_envs.manager.chores import Chores
from ray_envs.manager.handing_out import HandingOut
from ray_envs.manager.serving import Sharing, moment, serves, word
from ray_envs.manager.wiring import wired
from ray_envs.models import EnvId, Generation
from ray_envs.node.agent import NodeAgent
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.validation import nearest_hint, validated

#: The formats that uv makes from a lock, and the file that holds each.
_CONVERTED = {"requirements": "requirements.txt", "pylock": "pylock.toml"}

Rows = list[dict[str, Any]]
Answer = dict[str, Any]


class EnvManager:
    """The variants of one cluster. All methods are keyword-only; they take and return plain data.

    `verbs.VERBS` describes each method: its arguments, its time and its errors. `settings` come
    from `Settings.to_environment`; `nodes` are by default those of the Ray cluster of this process.
    """

    def __init__(self, *, settings: dict[str, str], nodes: Nodes | None = None) -> None:
        parts = wired(Settings.from_environment(settings), nodes or RayNodes(NodeAgent))
        self._parts = parts
        self._chores = Chores(parts)
        self._sharing = Sharing()
        self._registry, self._reconciler = parts.registry, parts.reconciler
        self._variants, self._statuses, self._fleet = parts.variants, parts.statuses, parts.fleet
        self._changes, self._history = parts.changes, parts.operations.history
        self._handing_out = HandingOut(parts)
        #: Changes at each start of a manager, so that clients know to repeat their requests.
        self._life = uuid.uuid4().hex

    @serves
    async def describe(self, _: verbs.Describe) -> Answer:
        parts = self._parts
        return {
            "root": str(parts.settings.root),
            "target": parts.target.model_dump(mode="json"),
            "platform": parts.platform.name,
            "history": self._history.problem or "ok",
            "nodes": {
                node.info.node_id: {
                    "address": node.info.address,
                    "is_head": node.info.is_head,
                    "is_eligible": node.site == self._statuses.site and node.error is None,
                    "site": node.site,
                    "has_gate": node.has_gate,
                    "software": dict(node.software),
                    "labels": dict(node.info.labels),
                    "error": node.error,
                }
                for node in self._fleet.nodes.values()
            },
        }

    @serves
    async def get_env_status(self, asked: verbs.GetEnvStatus) -> Answer:
        return self._statuses.status(asked.variant_id)

    @serves
    async def list_envs(self, _: verbs.ListEnvs) -> Rows:
        self._reconciler.reload()
        return self._statuses.summaries()

    @serves
    async def get_environment(self, asked: verbs.GetEnvironment) -> Answer:
        return await self._handed_out(asked)

    @serves
    async def get_options(self, asked: verbs.GetOptions) -> Answer:
        environment = await self._handed_out(asked)
        return placement.options(environment, asked.options or {}, variant_id=asked.variant_id)

    @serves
    async def list_deps(self, asked: verbs.ListDeps) -> Answer:
        return exports.deps(self._registry, self._variants.get(asked.variant_id))

    @serves
    async def list_generations(self, asked: verbs.ListGenerations) -> Rows:
        def facts(made: Generation) -> Answer:
            return {
                "fits_cluster": not self._statuses.is_stale(made),
                "is_ready": self._statuses.is_ready(made),
            }

        record = self._variants.get(asked.variant_id)
        return exports.generations(self._registry, record, facts=facts)

    @serves
    async def diff_env(self, asked: verbs.DiffEnv) -> Answer:
        record = self._variants.get(asked.variant_id)
        return exports.difference(self._registry, record, asked.from_, asked.to)

    @serves
    async def export_env(self, asked: verbs.ExportEnv) -> Answer:
        record = self._variants.get(asked.variant_id)
        made = exports.generation(self._registry, record, asked.generation)
        root = self._parts.settings.root
        if asked.format == "project":
            files = exports.project_files(self._registry, record, made)
        elif asked.format in _CONVERTED:
            pyproject, uv_lock = self._registry.lock_text(record.env_id, made.number)
            text = await self._fleet.head().call(
                "export",
                pyproject=pyproject,
                uv_lock=uv_lock,
                extras=list(made.definition.extras),
                groups=list(made.definition.groups),
                format=asked.format,
            )
            files = {_CONVERTED[asked.format]: in_export(text, made.definition.wheels)}
        else:
            hint = nearest_hint(asked.format, ["project", *_CONVERTED])
            raise InvalidInput(f"unknown format {asked.format!r}", hint=hint)
        return {
            "variant_id": str(record.env_id),
            "generation": made.number,
            "key": made.key,
            "lock_sha256": made.lock_sha256,
            "files": files,
            "wheels": {w.sha256: files_of_wheels.read(root, w) for w in made.definition.wheels},
        }

    @serves
    async def explain(self, asked: verbs.Explain) -> Answer:
        return await self._parts.inspector.explain(self._variants.get(asked.variant_id))

    @serves
    async def events(self, asked: verbs.Events) -> Answer:
        if asked.since < 0:
            return {"events": [], "next": self._history.last_number()}
        found, following = await self._parts.operations.events(
            since=asked.since,
            kinds=[word(EventKind, kind) for kind in asked.kinds],
            variant_id=asked.variant_id,
            limit=asked.limit,
            timeout_s=min(asked.timeout_s, verbs.MAX_POLL_S),
        )
        return {"events": [event.model_dump(mode="json") for event in found], "next": following}

    @serves
    async def get_operations(self, asked: verbs.GetOperations) -> Answer:
        found, total = self._history.operations(
            variant_id=asked.variant_id,
            operation=asked.operation,
            status=None if asked.status is None else word(OperationStatus, asked.status),
            limit=asked.limit,
            offset=asked.offset,
        )
        return {"rows": [row.model_dump(mode="json") for row in found], "total": total}

    @serves
    async def delete_operations(self, asked: verbs.DeleteOperations) -> Answer:
        count = self._history.delete_operations(
            variant_id=asked.variant_id,
            operation=asked.operation,
            status=None if asked.status is None else word(OperationStatus, asked.status),
            before=None if asked.before is None else moment(asked.before),
        )
        if self._history.problem:
            raise StorageFailed("the history cannot be changed now", detail=self._history.problem)
        return {"deleted": count}

    @serves
    async def create_env(self, asked: verbs.CreateEnv) -> Answer:
        return await self._create("create", asked, asked.spec, "spec")

    @serves
    async def import_env(self, asked: verbs.ImportEnv) -> Answer:
        wheels = validated(Definition, asked.options or {}, where="options").wheels
        pyproject, uv_lock = (from_export(t, wheels) for t in (asked.pyproject, asked.uv_lock))
        spec = {**(asked.options or {}), "pyproject": pyproject, "uv_lock": uv_lock}
        return await self._create("import", asked, spec, "options")

    async def _create(
        self,
        made_by: str,
        asked: verbs.CreateEnv | verbs.ImportEnv,
        spec: Mapping[str, Any],
        field: str,
    ) -> Answer:
        """Define a variant. Requests are equal if their definitions are; `field` takes it."""
        where = f"variant {asked.variant_id}"
        definition = self._parts.resolver.checked(spec, where=where)
        root = self._parts.settings.root
        await asyncio.to_thread(files_of_wheels.take, root, definition.wheels, asked.wheels)
        plain = {field: definition.model_dump(mode="json"), "wheels": {}}
        return await self._sharing.once(
            asked.model_copy(update=plain),
            lambda: self._changes.create(
                asked.env_id,
                definition,
                replace=asked.replace,
                wait_s=asked.wait_s,
                dry_run=asked.dry_run,
                made_by=made_by,
            ),
        )

    @serves
    async def add_deps(self, asked: verbs.AddDeps) -> Answer:
        return await self._edit("add", asked)

    @serves
    async def update_deps(self, asked: verbs.UpdateDeps) -> Answer:
        return await self._edit("update", asked)

    @serves
    async def remove_deps(self, asked: verbs.RemoveDeps) -> Answer:
        return await self._edit("remove", asked)

    async def _edit(
        self, operation: str, asked: verbs.AddDeps | verbs.UpdateDeps | verbs.RemoveDeps
    ) -> Answer:
        return await self._sharing.once(
            asked,
            lambda: self._changes.edit(
                operation,
                asked.env_id,
                asked.packages,
                dry_run=asked.dry_run,
                operation_id=asked.operation_id,
            ),
        )

    @serves
    async def rollback_env(self, asked: verbs.RollbackEnv) -> Answer:
        return await self._sharing.once(
            asked,
            lambda: self._changes.rollback(
                asked.env_id, asked.to, dry_run=asked.dry_run, operation_id=asked.operation_id
            ),
        )

    @serves
    async def delete_env(self, asked: verbs.DeleteEnv) -> Answer:
        return await self._sharing.once(
            asked,
            lambda: self._changes.delete(
                asked.env_id, force=asked.force, job_id=asked.job_id, dry_run=asked.dry_run
            ),
        )

    @serves
    async def pin_env(self, asked: verbs.PinEnv) -> Answer:
        return await self._changes.pin(asked.env_id, is_pinned=asked.is_pinned)

    @serves
    async def sync_env(self, asked: verbs.SyncEnv) -> Answer:
        return await self._sharing.once(
            asked,
            lambda: self._parts.inspector.sync(asked.env_id, self._changes, dry_run=asked.dry_run),
        )

    @serves
    async def cleanup(self, asked: verbs.Cleanup) -> Answer:
        self._reconciler.reload()
        return await self._sharing.once(
            asked,
            lambda: self._parts.collector.collect(
                dry_run=asked.dry_run,
                idle_hours=asked.idle_hours,
                include_current=asked.include_current,
            ),
        )

    @serves
    async def prepare(self, asked: verbs.Prepare) -> Answer:
        await self._fleet.look_at_disks()
        for name in asked.variant_ids:
            record = self._variants.get(name)
            if self._statuses.is_stale(record.current):
                self._relock_soon(name, record.env_id)
            else:
                self._reconciler.want([record.current.key])
        return self._told(asked.variant_ids)

    @serves
    async def watch(self, asked: verbs.Watch) -> Answer:
        await self._fleet.news(asked.seen, asked.timeout_s)
        return self._told(asked.variant_ids)

    @serves
    async def doctor(self, asked: verbs.Doctor) -> Answer:
        self._reconciler.reload()
        names = [asked.variant_id] if asked.variant_id else sorted(self._variants.by_name)
        return await self._parts.inspector.doctor(names, repair=asked.repair)

    async def _awake(self) -> None:
        """Start the loop with the first verb, and wait for its first look at the nodes."""
        await self._chores.awake()

    async def stop(self) -> None:
        """End the loop and, where the agent lives in this process, its builds."""
        await self._chores.stop()

    async def _handed_out(self, asked: verbs.GetEnvironment | verbs.GetOptions) -> Answer:
        record = self._variants.get(asked.variant_id)
        return await self._handing_out.environment(record, asked.job_id)

    def _told(self, names: Iterable[str]) -> Answer:
        statuses = {name: self._statuses.status(name) for name in names}
        version = self._fleet.version
        return {"life": self._life, "version": version, "variants": statuses}

    def _relock_soon(self, name: str, env_id: EnvId) -> None:
        """Lock a variant for this cluster in the background; its status shows the progress."""
        if name in self._variants.relocking:
            return

        async def relock() -> None:
            try:
                await self._changes.relock(env_id)
                self._variants.relock_errors.pop(name, None)
            except RayEnvsError as exc:
                self._variants.relock_errors[name] = exc
            finally:
                self._variants.relocking.pop(name, None)
                await self._fleet.announce()

        self._variants.relocking[name] = asyncio.create_task(relock())
