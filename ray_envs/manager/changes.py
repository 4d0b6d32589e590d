"""The verbs that change a variant. Each is an operation, under the variant's lock.

How a generation is made and becomes current is `switching`; rows and events are `operations`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray_envs.decisions import edits
from ray_envs.errors import AlreadyExists, EnvironmentInUse, InvalidInput, StorageFailed
from ray_envs.events import EventKind
from ray_envs.manager.operations import Operations
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.resolver import Resolver
from ray_envs.manager.statuses import Statuses
from ray_envs.manager.switching import Answer, Switching, facts
from ray_envs.manager.variants import Variants
from ray_envs.models import EnvId, VariantRecord
from ray_envs.settings import Settings
from ray_envs.specs import Definition

#: Returns the users of any of some keys, in words, without the leases of the given job.
Users = Callable[[list[str], str | None], Awaitable[list[str]]]
#: Returns the new definition, and the names whose pins may move (None keeps all pins).
Edit = Callable[[VariantRecord, Any], tuple[Definition, Iterable[str] | None]]

_FAILED = EventKind.DEPENDENCY_OPERATION_FAILED
_EDITS: dict[str, tuple[Edit, EventKind]] = {
    "add": (
        lambda before, packages: (edits.added(before.definition, packages, where="add"), None),
        EventKind.DEPENDENCIES_ADDED,
    ),
    "remove": (
        lambda before, packages: (edits.removed(before.definition, packages, where="remove"), None),
        EventKind.DEPENDENCIES_REMOVED,
    ),
    "update": (
        lambda before, packages: edits.upgraded(
            before.definition, packages, before.current.packages, where="update"
        ),
        EventKind.DEPENDENCIES_UPDATED,
    ),
}


@dataclass(eq=False)
class Changes:
    """The verbs that change variants."""

    _settings: Settings
    _registry: Registry
    _variants: Variants
    _statuses: Statuses
    _reconciler: Reconciler
    _resolver: Resolver
    _operations: Operations
    _users: Users
    _switching: Switching

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
        """See `verbs.CreateEnv`."""
        name = str(env_id)
        async with self._operations.on_variant(
            env_id, made_by, failed=EventKind.CREATION_FAILED
        ) as change:
            before = self._registry.get(env_id)
            is_same = before is not None and before.definition == definition
            if before is not None and is_same and self._switching.fits(before):
                self._variants.remember(before)
                if not dry_run:
                    self._reconciler.want([before.current.key])
                answer = self._switching.unchanged(before, dry_run=dry_run)
            else:
                if before is not None and not is_same and not replace:
                    raise AlreadyExists(
                        f"variant {name} exists with another spec",
                        variant_id=name,
                        hint="give replace=True (--replace) for a new generation, or another id",
                    )
                base_lock = None
                if before is not None and is_same:  # it was locked for another cluster
                    base_lock = self._registry.lock_text(env_id, before.current.number)[1]
                answer = await self._switching.made(
                    change,
                    env_id,
                    before,
                    definition,
                    dry_run=dry_run,
                    wait_s=wait_s,
                    base_lock=base_lock,
                )
        if wait_s > 0 and before is not None and not dry_run:
            # Also if nothing changed: a caller that waits wants the environment ready.
            current = self._variants.get(name).current
            await self._reconciler.make_ready(current, wait_s, variant_id=name)
        if not dry_run:
            current = self._variants.get(name).current
            answer["pyproject_toml"] = self._registry.lock_text(env_id, current.number)[0]
        return {**self._statuses.status(name), **answer}

    async def relock(self, env_id: EnvId, *, dry_run: bool = False) -> Answer:
        """Lock a variant again for this cluster's Ray, Python and platform.

        Its current generation cannot run here, so that the new one takes its place at once.
        """
        async with self._operations.on_variant(env_id, "relock", failed=_FAILED) as change:
            before = self._variants.get(str(env_id))
            if self._switching.fits(before):  # another process has done it
                return self._switching.unchanged(before, dry_run=dry_run)
            return await self._switching.made(
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
        """See `verbs.RollbackEnv`."""
        name = str(env_id)
        async with self._operations.on_variant(
            env_id, "rollback", failed=_FAILED, operation_id=operation_id, asked=to
        ) as change:
            before = self._variants.get(str(env_id))
            number = before.current.number if change.was_done else self._earlier(before, to)
            generation = self._registry.generation(env_id, number)
            if self._statuses.is_stale(generation):
                raise InvalidInput(
                    f"generation {generation.number} of {name} was locked for ray "
                    f"{generation.target.ray} and python {generation.target.python}, "
                    f"this cluster is {self._statuses.site}",
                    hint="import its export under another id, or create it again",
                )
            answer = self._switching.difference(before, generation, dry_run=dry_run)
            if dry_run or generation.number == before.current.number:
                told = facts(change) if change.was_done else {}
                return {**self._statuses.status(name), **answer, **told}
            change.begin(generation=generation.number, before=before.current.number)
            self._reconciler.request(env_id, generation)  # raises if its lock was edited
            pyproject, uv_lock = self._registry.lock_text(env_id, generation.number)
            await self._switching.prepared(
                change, env_id, generation, self._settings.prepare_timeout_s
            )
            self._switching.switch(env_id, generation, pyproject, uv_lock)
            change.succeed(EventKind.ROLLED_BACK, key=generation.key, diff=answer["diff"])
        return {**self._statuses.status(name), **answer, **facts(change)}

    async def delete(
        self, env_id: EnvId, *, force: bool, job_id: str | None, dry_run: bool
    ) -> Answer:
        """See `verbs.DeleteEnv`."""
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
                    self._variants.forget(env_id)
                    return answer
            if record is not None and not force:
                await self._refuse_used(record, job_id)
            if dry_run:
                return {
                    **answer,
                    "would_delete": True,
                    "status": self._statuses.status(name)["status"],
                }
            change.begin(generation=None)
            self._variants.changing[name] = "delete"
            try:
                self._registry.delete(env_id)
            finally:
                del self._variants.changing[name]
            self._variants.forget(env_id)
            change.succeed(EventKind.DELETED, key=record.current.key if record else None)
        await self._reconciler.fleet.announce()
        return {**answer, "deleted": True, **facts(change)}

    async def pin(self, env_id: EnvId, *, is_pinned: bool) -> Answer:
        """See `verbs.PinEnv`."""
        async with self._operations.on_variant(
            env_id, "pin" if is_pinned else "unpin", failed=_FAILED
        ) as change:
            before = self._variants.get(str(env_id))
            if before.is_pinned != is_pinned:
                change.begin(is_pinned=is_pinned)
                self._variants.remember(self._registry.pin(before, is_pinned=is_pinned))
                change.succeed()
        return self._statuses.status(str(env_id))

    async def edit(
        self,
        operation: str,
        env_id: EnvId,
        packages: list[str],
        *,
        dry_run: bool,
        operation_id: str | None = None,
    ) -> Answer:
        """Add, update or remove packages; see `verbs.AddDeps`."""
        name = str(env_id)
        async with self._operations.on_variant(
            env_id, operation, failed=_FAILED, operation_id=operation_id, asked=packages
        ) as change:
            before = self._variants.get(str(env_id))
            if change.was_done:
                return {
                    **self._statuses.status(name),
                    **self._switching.unchanged(before, dry_run=dry_run),
                    **facts(change),
                }
            edit, success = _EDITS[operation]
            definition, upgrade = edit(before, packages)
            if upgrade is None and definition == before.definition and self._switching.fits(before):
                self._reconciler.want([before.current.key])
                await self._reconciler.fleet.look_at_disks()
                return {
                    **self._statuses.status(name),
                    **self._switching.unchanged(before, dry_run=dry_run),
                }
            answer = await self._switching.made(
                change,
                env_id,
                before,
                self._resolver.checked(definition.model_dump(), where=f"variant {name}"),
                dry_run=dry_run,
                base_lock=self._registry.lock_text(env_id, before.current.number)[1],
                upgrade=upgrade,
                success=success,
            )
        return {**self._statuses.status(name), **answer}

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
        """Raise if the variant is the only one that has an environment in use."""
        keys = {record.current.key}
        for number in record.numbers:
            with suppress(StorageFailed):
                keys.add(self._registry.generation(record.env_id, number).key)
        name = str(record.env_id)
        own = [key for key in sorted(keys) if self._variants.sharing(key) in ([], [name])]
        users = await self._users(own, job_id)
        if users:
            raise EnvironmentInUse(
                f"variant {name} is in use",
                variant_id=name,
                detail="\n".join(users),
                hint="wait until they end, or give force (--force): what they run in stays then "
                "until the last of them has ended",
            )
