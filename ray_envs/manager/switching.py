"""From one generation of a variant to the next: lock, write, prepare, switch.

All of it, or nothing: a step that fails leaves the variant as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ray_envs.decisions import edits
from ray_envs.errors import RayEnvsError, StorageFailed
from ray_envs.events import EventKind
from ray_envs.manager import venv_view
from ray_envs.manager.operations import Change
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.resolver import Resolved, Resolver
from ray_envs.manager.statuses import Statuses
from ray_envs.manager.variants import Variants
from ray_envs.models import EnvId, Generation, VariantRecord
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.specs import Definition

#: The answer of a verb: plain data.
Answer = dict[str, Any]


@dataclass(eq=False)
class Switching:
    """Makes generations of variants and makes them current."""

    _settings: Settings
    _registry: Registry
    _variants: Variants
    _statuses: Statuses
    _reconciler: Reconciler
    _resolver: Resolver
    _paths: Store

    async def made(
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
        """Lock `definition`, prepare it, make it current. The caller holds the variant's lock."""
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
            answer = self.difference(before, generation, dry_run=dry_run)
            if dry_run:
                return answer
            if before is not None and _is_same(before.current, generation):
                change.succeed()
                return {**self.unchanged(before, dry_run=False), **facts(change)}
            if before is None or self._statuses.is_stale(before.current):
                await self._commit(change, env_id, before, resolved, wait_s)
            else:
                await self._replace(change, env_id, resolved, wait_s)
        except RayEnvsError as exc:
            raise exc.about(variant_id=name) from exc
        change.succeed(success, key=generation.key, diff=answer["diff"])
        return {**answer, **facts(change)}

    async def _commit(
        self,
        change: Change,
        env_id: EnvId,
        before: VariantRecord | None,
        resolved: Resolved,
        wait_s: float,
    ) -> None:
        """Make a generation current before it is ready, since no other one could run instead."""
        generation, name = resolved.generation, str(env_id)
        self._stage(env_id, resolved)
        change.note(generation=generation.number)
        try:
            self.switch(env_id, generation, resolved.pyproject, resolved.uv_lock)
        except StorageFailed:
            self._registry.unstage(env_id, generation.number)
            raise
        if wait_s <= 0:
            return
        try:
            await self._reconciler.make_ready(generation, wait_s, variant_id=name)
        except BaseException:  # also when the caller has gone
            if before is None:
                self._registry.delete(env_id)
                self._variants.forget(env_id)
            else:
                self._registry.point_to(before)
                self._variants.remember(before)
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
            await self.prepared(change, env_id, generation, limit_s)
            self.switch(env_id, generation, resolved.pyproject, resolved.uv_lock)
        except BaseException:  # also when the caller has gone: nothing half-made may stay
            self._registry.unstage(env_id, generation.number)
            raise

    async def prepared(
        self, change: Change, env_id: EnvId, generation: Generation, timeout_s: float
    ) -> None:
        """Return when a generation on disk is ready on every node that shall have it."""
        name = str(env_id)
        await (
            self._reconciler.fleet.look_at_disks()
        )  # environments may have been lost since the last look
        if self._statuses.is_ready(generation):
            return
        self._variants.staged[name] = generation
        self._variants.changing[name] = change.row.operation
        try:
            await self._reconciler.make_ready(generation, timeout_s, variant_id=name)
        finally:
            del self._variants.staged[name]
            del self._variants.changing[name]
            self._variants.unwant(generation.key)
            await self._reconciler.fleet.announce()

    def _stage(self, env_id: EnvId, resolved: Resolved) -> None:
        self._registry.stage(
            env_id,
            resolved.generation,
            pyproject=resolved.pyproject,
            uv_lock=resolved.uv_lock,
            same_lock=resolved.same_lock,
        )

    def switch(self, env_id: EnvId, generation: Generation, pyproject: str, uv_lock: str) -> None:
        before = self._variants.by_name.get(str(env_id))
        record = self._registry.switch(env_id, generation, pyproject=pyproject, uv_lock=uv_lock)
        self._variants.remember(record)
        self._reconciler.want([generation.key])
        if before is not None:
            self._variants.unwant(before.current.key)
        venv_view.show(self._registry, self._paths, record)

    def fits(self, record: VariantRecord) -> bool:
        """Whether it was locked for the Ray, Python and platform of this cluster."""
        return self._resolver.fits(record.current)

    def unchanged(self, record: VariantRecord, *, dry_run: bool) -> Answer:
        return self.difference(record, record.current, dry_run=dry_run)

    def difference(
        self, before: VariantRecord | None, generation: Generation, *, dry_run: bool
    ) -> Answer:
        """The packages that a change adds, removes and changes, and whether it changes anything."""
        packages = edits.versions(before.current) if before else {}
        answer: Answer = {
            "dry_run": dry_run,
            "diff": edits.diff(packages, edits.versions(generation)),
            "is_changed": before is None or not _is_same(before.current, generation),
        }
        if dry_run:
            answer |= {
                "generation": generation.number,
                "key": generation.key,
                "lock_sha256": generation.lock_sha256,
                "packages": dict(generation.packages),
                "is_ready": self._statuses.is_ready(generation),
            }
        return answer


def _is_same(one: Generation, other: Generation) -> bool:
    return (one.definition, one.lock_sha256, one.key, one.target) == (
        other.definition,
        other.lock_sha256,
        other.key,
        other.target,
    )


def facts(change: Change) -> Answer:
    """The fields about itself that the answer of every change has."""
    return {
        "operation_id": change.row.operation_id,
        "stdout": change.row.stdout,
        "stderr": change.row.stderr,
        "exit_code": 0,
        "duration_s": change.duration_s,
    }
