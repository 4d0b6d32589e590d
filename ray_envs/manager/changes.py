"""What changes a variant: each verb, from the lock to the last event. All of it, or nothing.

A variant that exists keeps its current generation until the next one is ready on every node: it is
written beside the current one, prepared, and then switched to in one step. `reconciler` prepares;
`resolver` locks; `operations` keeps the rows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from ray_envs.decisions import edits
from ray_envs.errors import (
    AlreadyExists,
    EnvironmentInUse,
    InvalidInput,
    NotFound,
    RayEnvsError,
    StorageFailed,
)
from ray_envs.events import EventKind
from ray_envs.manager.operations import Change, Operations, write_view
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.resolver import Resolved, Resolver
from ray_envs.models import Definition, EnvId, Generation, VariantRecord
from ray_envs.node.store import Store
from ray_envs.settings import Settings

#: What a verb gives back: plain data.
Answer = dict[str, Any]
#: Names who uses any of some keys, in words; given a job whose own leases do not count.
Users = Callable[[list[str], str | None], Awaitable[list[str]]]

_FAILED = EventKind.DEPENDENCY_OPERATION_FAILED


class Changes:
    """The verbs that change variants.

    Args:
        settings: how long a change may take.
        registry: where definitions are written.
        reconciler: prepares environments, and knows what is there.
        resolver: makes generations.
        operations: keeps rows and tells events.
        users: says who uses environments now.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        reconciler: Reconciler,
        resolver: Resolver,
        operations: Operations,
        *,
        users: Users,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._reconciler = reconciler
        self._resolver = resolver
        self._operations = operations
        self._users = users
        self._paths = Store(settings)

    # -- verbs ------------------------------------------------------------------------------

    async def create(
        self,
        env_id: EnvId,
        definition: Definition,
        *,
        replace: bool,
        wait_s: float,
        dry_run: bool,
        made_by: str = "create",
    ) -> Answer:
        """See `EnvManager.create_env`."""
        name = str(env_id)
        async with self._operations.on_variant(
            env_id, made_by, failed=EventKind.CREATION_FAILED
        ) as change:
            before = self._registry.get(env_id)
            if before is not None and before.definition == definition and self._fits(before):
                self._reconciler.remember(before)
                if not dry_run:
                    self._reconciler.want([before.current.key])
                answer = self._unchanged(before, dry_run=dry_run)
            else:
                if before is not None and before.definition != definition and not replace:
                    raise AlreadyExists(
                        f"variant {name} exists with another spec",
                        variant_id=name,
                        hint="give replace=True (--replace) for a new generation, or another id",
                    )
                base_lock = None
                if before is not None and before.definition == definition:  # another cluster
                    base_lock = self._registry.lock_text(env_id, before.current.number)[1]
                answer = await self._made(
                    change,
                    env_id,
                    before,
                    definition,
                    dry_run=dry_run,
                    wait_s=wait_s,
                    base_lock=base_lock,
                )
        if wait_s > 0 and before is not None and not dry_run:
            # Also where nothing changed: whoever waits wants it ready.
            current = self._reconciler.get(name).current
            await self._reconciler.until_final(current, wait_s, variant_id=name)
            self._reconciler.raise_failure(current, variant_id=name)
        if not dry_run:
            current = self._reconciler.get(name).current
            answer["pyproject_toml"] = self._registry.lock_text(env_id, current.number)[0]
        return {**self._reconciler.status(name), **answer}

    async def add(
        self, env_id: EnvId, packages: Any, *, dry_run: bool, operation_id: str | None = None
    ) -> Answer:
        """See `EnvManager.add_deps`."""

        def edit(before: VariantRecord) -> tuple[Definition, None]:
            return edits.added(before.definition, packages, where="add"), None

        return await self._edited(
            env_id,
            "add",
            edit,
            EventKind.DEPENDENCIES_ADDED,
            dry_run=dry_run,
            operation_id=operation_id,
            asked=packages,
        )

    async def remove(
        self, env_id: EnvId, packages: Any, *, dry_run: bool, operation_id: str | None = None
    ) -> Answer:
        """See `EnvManager.remove_deps`."""

        def edit(before: VariantRecord) -> tuple[Definition, None]:
            return edits.removed(before.definition, packages, where="remove"), None

        return await self._edited(
            env_id,
            "remove",
            edit,
            EventKind.DEPENDENCIES_REMOVED,
            dry_run=dry_run,
            operation_id=operation_id,
            asked=packages,
        )

    async def update(
        self, env_id: EnvId, packages: Any, *, dry_run: bool, operation_id: str | None = None
    ) -> Answer:
        """See `EnvManager.update_deps`."""

        def edit(before: VariantRecord) -> tuple[Definition, tuple[str, ...]]:
            locked = before.current.packages
            return edits.upgraded(before.definition, packages, locked, where="update")

        return await self._edited(
            env_id,
            "update",
            edit,
            EventKind.DEPENDENCIES_UPDATED,
            dry_run=dry_run,
            operation_id=operation_id,
            asked=packages,
        )

    async def relock(self, env_id: EnvId, *, dry_run: bool = False) -> Answer:
        """Lock a variant again for this cluster's Ray, Python and platform.

        Its current generation cannot run here, so that the new one takes its place at once.
        """
        async with self._operations.on_variant(env_id, "relock", failed=_FAILED) as change:
            before = self._existing(env_id)
            if self._fits(before):  # somebody else was first
                return self._unchanged(before, dry_run=dry_run)
            return await self._made(
                change,
                env_id,
                before,
                self._resolver.checked(before.definition.model_dump(), where=f"variant {env_id}"),
                dry_run=dry_run,
                base_lock=self._registry.lock_text(env_id, before.current.number)[1],
                success=EventKind.DEPENDENCIES_UPDATED,
            )

    async def rollback(
        self, env_id: EnvId, to: int | None, *, dry_run: bool, operation_id: str | None = None
    ) -> Answer:
        """See `EnvManager.rollback_env`."""
        name = str(env_id)
        async with self._operations.on_variant(
            env_id, "rollback", failed=_FAILED, operation_id=operation_id, asked=to
        ) as change:
            before = self._existing(env_id)
            number = before.current.number if change.was_done else self._earlier(before, to)
            generation = self._registry.generation(env_id, number)
            if self._reconciler.is_stale(generation):
                raise InvalidInput(
                    f"generation {generation.number} of {name} was locked for ray "
                    f"{generation.target.ray} and python {generation.target.python}, "
                    f"this cluster is {self._reconciler.site}",
                    hint="import its export under another id, or create it again",
                )
            answer = self._difference(before, generation, dry_run=dry_run)
            if dry_run or generation.number == before.current.number:
                facts = _facts(change) if change.was_done else {}
                return {**self._reconciler.status(name), **answer, **facts}
            change.begin(generation=generation.number, before=before.current.number)
            self._reconciler.request(env_id, generation)  # its lock is what it was
            pyproject, uv_lock = self._registry.lock_text(env_id, generation.number)
            await self._prepared(change, env_id, generation, self._settings.prepare_timeout_s)
            self._switch(env_id, generation, pyproject, uv_lock)
            change.succeed(EventKind.ROLLED_BACK, key=generation.key, **_shown(answer))
        return {**self._reconciler.status(name), **answer, **_facts(change)}

    async def delete(
        self, env_id: EnvId, *, force: bool, job_id: str | None, dry_run: bool
    ) -> Answer:
        """See `EnvManager.delete_env`."""
        name = str(env_id)
        answer = {"variant_id": name, "deleted": False, "status": "NOT_EXISTS", "dry_run": dry_run}
        async with self._operations.on_variant(
            env_id, "delete", failed=EventKind.DELETION_FAILED
        ) as change:
            try:
                record = self._registry.get(env_id)
            except StorageFailed:  # damaged: forgetting it is what helps
                record = None
            else:
                if record is None:
                    if not dry_run:
                        self._registry.delete(env_id)  # a folder may be left of it
                    self._reconciler.forget(env_id)
                    return answer
            if record is not None and not force:
                await self._refuse_used(record, job_id)
            if dry_run:
                return {
                    **answer,
                    "would_delete": True,
                    "status": self._reconciler.status(name)["status"],
                }
            change.begin(generation=None)
            self._reconciler.changing[name] = "delete"
            try:
                self._registry.delete(env_id)
            finally:
                del self._reconciler.changing[name]
            self._reconciler.forget(env_id)
            change.succeed(EventKind.DELETED, key=record.current.key if record else None)
        await self._reconciler.fleet.announce()
        return {**answer, "deleted": True, **_facts(change)}

    async def pin(self, env_id: EnvId, *, is_pinned: bool) -> Answer:
        """See `EnvManager.pin_env`."""
        async with self._operations.on_variant(
            env_id, "pin" if is_pinned else "unpin", failed=_FAILED
        ) as change:
            before = self._existing(env_id)
            if before.is_pinned != is_pinned:
                change.begin(is_pinned=is_pinned)
                self._reconciler.remember(self._registry.pin(before, is_pinned=is_pinned))
                change.succeed()
        return self._reconciler.status(str(env_id))

    # -- from one generation to the next ------------------------------------------------------

    async def _edited(
        self,
        env_id: EnvId,
        operation: str,
        edit: Callable[[VariantRecord], tuple[Definition, Iterable[str] | None]],
        success: EventKind,
        *,
        dry_run: bool,
        operation_id: str | None,
        asked: Any,
    ) -> Answer:
        """Change the packages of a variant: `edit` gives the definition, and what may move."""
        name = str(env_id)
        async with self._operations.on_variant(
            env_id, operation, failed=_FAILED, operation_id=operation_id, asked=asked
        ) as change:
            before = self._existing(env_id)
            if change.was_done:
                return {
                    **self._reconciler.status(name),
                    **self._unchanged(before, dry_run=dry_run),
                    **_facts(change),
                }
            definition, upgrade = edit(before)
            if upgrade is None and definition == before.definition and self._fits(before):
                self._reconciler.want([before.current.key])
                await self._reconciler.fleet.look_at_disks()
                return {
                    **self._reconciler.status(name),
                    **self._unchanged(before, dry_run=dry_run),
                }
            answer = await self._made(
                change,
                env_id,
                before,
                self._resolver.checked(definition.model_dump(), where=f"variant {name}"),
                dry_run=dry_run,
                base_lock=self._registry.lock_text(env_id, before.current.number)[1],
                upgrade=upgrade,
                success=success,
            )
        return {**self._reconciler.status(name), **answer}

    async def _made(
        self,
        change: Change,
        env_id: EnvId,
        before: VariantRecord | None,
        definition: Definition,
        *,
        dry_run: bool,
        wait_s: float = 0,
        base_lock: str | None = None,
        upgrade: Iterable[str] | None = None,
        success: EventKind = EventKind.CREATED,
    ) -> Answer:
        """Lock `definition`, prepare it, and make it current; the caller holds the lock."""
        name, operation = str(env_id), change.row.operation
        if not dry_run:
            change.begin(packages=list(definition.packages))
        try:
            resolved = await self._resolver.resolve(
                definition,
                number=self._registry.next_number(env_id),
                made_by=operation,
                base_lock=base_lock,
                upgrade=upgrade,
            )
            change.told(resolved.output)
            generation = resolved.generation
            answer = self._difference(before, generation, dry_run=dry_run)
            if dry_run:
                return answer
            if before is not None and _is_same(before.current, generation):
                change.succeed()
                return {**self._unchanged(before, dry_run=False), **_facts(change)}
            if before is None or self._reconciler.is_stale(before.current):
                await self._commit(change, env_id, before, resolved, wait_s)
            else:
                await self._replace(change, env_id, resolved, wait_s)
        except RayEnvsError as exc:
            raise exc.about(variant_id=name) from exc
        change.succeed(success, key=generation.key, **_shown(answer))
        return {**answer, **_facts(change)}

    async def _commit(
        self,
        change: Change,
        env_id: EnvId,
        before: VariantRecord | None,
        resolved: Resolved,
        wait_s: float,
    ) -> None:
        """Make a generation current before it is ready: there is none that could run instead."""
        generation, name = resolved.generation, str(env_id)
        self._stage(env_id, resolved)
        change.note(generation=generation.number)
        try:
            self._switch(env_id, generation, resolved.pyproject, resolved.uv_lock)
        except StorageFailed:
            self._registry.unstage(env_id, generation.number)
            raise
        self._reconciler.want([generation.key])
        if wait_s <= 0:
            return
        try:
            await self._reconciler.until_final(generation, wait_s, variant_id=name)
            self._reconciler.raise_failure(generation, variant_id=name)
        except BaseException:  # also where the caller has gone
            if before is None:
                self._registry.delete(env_id)
                self._reconciler.forget(env_id)
            else:
                self._registry.point_to(before)
                self._reconciler.remember(before)
                self._registry.unstage(env_id, generation.number)
            raise

    async def _replace(
        self, change: Change, env_id: EnvId, resolved: Resolved, wait_s: float
    ) -> None:
        """Prepare a generation beside the current one, and switch to it when it is ready."""
        generation = resolved.generation
        self._stage(env_id, resolved)
        try:
            change.note(generation=generation.number)
            limit_s = wait_s if wait_s > 0 else self._settings.prepare_timeout_s
            await self._prepared(change, env_id, generation, limit_s)
            self._switch(env_id, generation, resolved.pyproject, resolved.uv_lock)
        except BaseException:  # also where the caller has gone: nothing half-made stays
            self._registry.unstage(env_id, generation.number)
            raise

    async def _prepared(
        self, change: Change, env_id: EnvId, generation: Generation, timeout_s: float
    ) -> None:
        """Return when a generation that is on disk is ready on every node that shall have it."""
        name = str(env_id)
        await self._reconciler.fleet.look_at_disks()  # what was told a while ago may be gone
        if self._reconciler.is_ready(generation):
            return
        self._reconciler.staged[name] = generation
        self._reconciler.changing[name] = change.row.operation
        try:
            self._reconciler.want([generation.key])
            await self._reconciler.until_final(generation, timeout_s, variant_id=name)
            self._reconciler.raise_failure(generation, variant_id=name)
        finally:
            del self._reconciler.staged[name]
            del self._reconciler.changing[name]
            self._reconciler.unwant(generation.key)
            await self._reconciler.fleet.announce()

    def _stage(self, env_id: EnvId, resolved: Resolved) -> None:
        self._registry.stage(
            env_id,
            resolved.generation,
            pyproject=resolved.pyproject,
            uv_lock=resolved.uv_lock,
            same_lock=resolved.same_lock,
        )

    def _switch(self, env_id: EnvId, generation: Generation, pyproject: str, uv_lock: str) -> None:
        before = self._reconciler.variants.get(str(env_id))
        record = self._registry.switch(env_id, generation, pyproject=pyproject, uv_lock=uv_lock)
        self._reconciler.remember(record)
        self._reconciler.want([generation.key])
        if before is not None:
            self._reconciler.unwant(before.current.key)
        write_view(self._registry, self._paths, record)

    # -- small questions ----------------------------------------------------------------------

    def _existing(self, env_id: EnvId) -> VariantRecord:
        record = self._registry.get(env_id)
        if record is None:
            raise NotFound(
                f"no variant {str(env_id)!r} is defined under {self._settings.root}",
                variant_id=str(env_id),
                hint="`ray-envs list` shows the defined ones, `ray-envs create` makes one",
            )
        self._reconciler.remember(record)
        return record

    def _fits(self, record: VariantRecord) -> bool:
        return self._resolver.fits(record.current)

    @staticmethod
    def _earlier(record: VariantRecord, to: int | None) -> int:
        """The generation that a rollback to `to` means; None is the one before the current."""
        current = record.current.number
        earlier = [number for number in record.numbers if number < current]
        if to is None and earlier:
            return max(earlier)
        if to in record.numbers:
            return int(to)
        known = ", ".join(map(str, record.numbers))
        raise InvalidInput(
            f"variant {record.env_id} has no earlier generation than {current}"
            if to is None
            else f"variant {record.env_id} has no generation {to}",
            hint=f"its generations: {known}",
        )

    async def _refuse_used(self, record: VariantRecord, job_id: str | None) -> None:
        """Refuse to forget a variant whose environments somebody uses, and nobody else defines."""
        keys = {record.current.key}
        for number in record.numbers:
            with suppress(StorageFailed):
                keys.add(self._registry.generation(record.env_id, number).key)
        name = str(record.env_id)
        own = [key for key in sorted(keys) if self._reconciler.sharing(key) in ([], [name])]
        users = await self._users(own, job_id)
        if users:
            raise EnvironmentInUse(
                f"variant {name} is in use",
                variant_id=name,
                detail="\n".join(users),
                hint="wait until they end, or give force (--force): what they run in stays then "
                "until the last of them has ended",
            )

    def _unchanged(self, record: VariantRecord, *, dry_run: bool) -> Answer:
        return self._difference(record, record.current, dry_run=dry_run)

    def _difference(
        self, before: VariantRecord | None, generation: Generation, *, dry_run: bool
    ) -> Answer:
        """What a change makes of a variant, as far as its packages are concerned."""
        packages = before.current.packages if before else {}
        answer: Answer = {
            "dry_run": dry_run,
            "diff": edits.diff(packages, generation.packages),
            "is_changed": before is None or not _is_same(before.current, generation),
        }
        if dry_run:
            answer |= {
                "generation": generation.number,
                "key": generation.key,
                "lock_sha256": generation.lock_sha256,
                "packages": dict(generation.packages),
                "is_ready": self._reconciler.is_ready(generation),
            }
        return answer


def _is_same(one: Generation, other: Generation) -> bool:
    return (one.definition, one.lock_sha256, one.key, one.target) == (
        other.definition,
        other.lock_sha256,
        other.key,
        other.target,
    )


def _facts(change: Change) -> Answer:
    """What every verb that changed something says about itself."""
    return {
        "operation_id": change.row.operation_id,
        "stdout": change.row.stdout,
        "stderr": change.row.stderr,
        "exit_code": 0,
        "duration_s": change.duration_s,
    }


def _shown(answer: Answer) -> Answer:
    return {"diff": answer["diff"]}
