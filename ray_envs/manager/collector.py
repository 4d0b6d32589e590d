"""Deletes unused environments on every node.

Collects the facts for `collecting`, tells the agents what to delete, and prunes uv's cache.
An agent keeps an environment that is held when it asks for the exclusive lock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray_envs.cluster.nodes import Nodes
from ray_envs.decisions import collecting
from ray_envs.decisions.collecting import EnvUse, Limits, Verdict
from ray_envs.errors import ManagerUnavailable, RayEnvsError, StorageFailed
from ray_envs.events import EventKind
from ray_envs.manager import presence
from ray_envs.manager.fleet import Node
from ray_envs.manager.leases import Leases
from ray_envs.manager.operations import Change, Operations
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.variants import Variants
from ray_envs.models import Generation, VariantRecord
from ray_envs.settings import Settings

_HOUR_S = 3600.0

#: How long a node may take to measure its store, in seconds; a collection goes on without it.
_INVENTORY_S = 30.0

Planned = tuple[Verdict, EnvUse]


@dataclass(eq=False)
class Collector:
    """Collects the environments of one cluster."""

    _settings: Settings
    _cluster: Nodes
    _registry: Registry
    _variants: Variants
    _reconciler: Reconciler
    _leases: Leases
    _operations: Operations

    def __post_init__(self) -> None:
        self._next_at = time.monotonic() + self._settings.gc_interval_s

    async def turn(self) -> None:
        """End the leases of dead jobs and, when it is time, collect. Called by the loop."""
        await self.end_leases()
        interval_s = self._settings.gc_interval_s
        if interval_s > 0 and time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + interval_s
            await self.collect(dry_run=False)

    async def end_leases(self) -> None:
        """End the leases of jobs that have ended, unless a detached actor has the environment.

        Those of other clusters on this root, which only their manager can ask, end with it.
        """
        # Before the cluster is asked: its answer lacks a job that begins meanwhile.
        holders = self._leases.jobs()
        others = presence.sessions(self._settings.root) - {self._cluster.session()}
        holders = {holder for holder in holders if holder.rpartition("/")[0] not in others}
        dead = holders - await self._cluster.living_jobs() if holders else set()
        if dead:
            given = "\n".join(await self._cluster.given_to_detached())
            self._leases.end(dead, [key for key in self._leases.all() if key in given])

    async def plan(
        self, *, idle_hours: float | None = None, include_current: bool = False
    ) -> list[Planned]:
        """A verdict for each environment folder of each node that answers, and its use."""
        await self.end_leases()
        hours = self._settings.idle_hours if idle_hours is None else idle_hours
        limits = Limits(
            idle_s=hours * _HOUR_S,
            max_bytes=self._settings.max_bytes,
            max_inodes=self._settings.max_inodes,
        )
        found: list[Planned] = []
        for node, told in await self._inventories():
            uses = {}
            for plain in told["uses"]:
                use = EnvUse.model_validate({**plain, "node_id": node.info.node_id})
                uses[use.key] = use
            verdicts = collecting.plan_collection(
                uses.values(),
                wanted=self.wanted(include_current=include_current),
                leases=self._leases.all(),
                busy=self._busy(),
                limits=limits,
                now=told["now"],  # the clock of the node, as for the times of use
            )
            found += [(verdict, uses[verdict.key]) for verdict in verdicts]
        return found

    async def _inventories(self) -> list[tuple[Node, dict[str, Any]]]:
        """What each node has, without nodes that do not answer soon: the next turn asks again."""
        asked = {
            asyncio.ensure_future(node.call("inventory")): node
            for node in self._reconciler.fleet.healthy()
        }
        found = []
        try:
            if asked:
                await asyncio.wait(asked, timeout=_INVENTORY_S)
            for task, node in asked.items():
                if task.done():
                    with suppress(ManagerUnavailable):
                        found.append((node, task.result()))
        finally:
            for task in asked:
                task.cancel()
        return found

    async def collect(
        self,
        *,
        dry_run: bool,
        idle_hours: float | None = None,
        include_current: bool = False,
        prune_cache: bool = True,
    ) -> dict[str, Any]:
        """See `EnvManager.cleanup`."""
        async with self._operations.on_store() as change:
            planned = await self.plan(idle_hours=idle_hours, include_current=include_current)
            doomed = [(verdict, use) for verdict, use in planned if verdict.collect]
            kept = [verdict for verdict, _ in planned if not verdict.collect]
            deleted: list[dict[str, Any]] = []
            freed_bytes = 0
            if not dry_run:
                change.begin(keys=sorted({verdict.key for verdict, _ in doomed}))
                change.say(EventKind.CLEANUP_STARTED, environments=len(doomed))
                answered = {verdict.node_id for verdict, _ in planned}
                for node in self._reconciler.fleet.healthy():
                    if node.info.node_id not in answered:
                        continue
                    mine = [each for each in doomed if each[0].node_id == node.info.node_id]
                    gone, stayed = await self._discard(
                        change, node, mine, include_current=include_current
                    )
                    deleted += gone
                    kept += stayed
                    if prune_cache:
                        freed_bytes += await self._prune(change, node)
                freed_bytes += sum(row["freed_bytes"] for row in deleted)
                change.note(deleted=len(deleted), freed_bytes=freed_bytes)
                change.succeed(
                    EventKind.CLEANUP_COMPLETED, deleted=len(deleted), freed_bytes=freed_bytes
                )
            else:
                deleted = [verdict.model_dump(mode="json") for verdict, _ in doomed]
                freed_bytes = sum(verdict.bytes for verdict, _ in doomed)
        return {
            "dry_run": dry_run,
            "deleted": deleted,
            "freed_bytes": freed_bytes,
            "kept": [verdict.model_dump(mode="json") for verdict in kept],
            **({} if dry_run else {"operation_id": change.row.operation_id}),
        }

    async def _discard(
        self, change: Change, node: Node, doomed: list[Planned], *, include_current: bool
    ) -> tuple[list[dict[str, Any]], list[Verdict]]:
        """Collect on one node; returns what was deleted, and what had to stay."""
        gone: list[dict[str, Any]] = []
        stayed: list[Verdict] = []
        for verdict, use in doomed:
            key = verdict.key
            # It may have been asked for after the plan was made.
            wanted = self.wanted(include_current=include_current)
            if key in self._busy() or key in self._leases.all() or key in wanted:
                stayed.append(_kept(verdict, "it was asked for in the meantime"))
                continue
            was_wanted = self._variants.wishes.drop(key)  # or the loop would build it again
            try:
                freed = await node.call("collect", key=key, planned=use.model_dump(mode="json"))
            except RayEnvsError as exc:
                stayed.append(_kept(verdict, exc.message))
                if was_wanted:
                    self._variants.wishes.want(key)
                continue
            self._reconciler.fleet.forget_state(node, key)
            self._variants.wishes.outdate(key)
            gone.append({**verdict.model_dump(mode="json"), "freed_bytes": int(freed)})
            change.say(
                EventKind.COLLECTED,
                key=key,
                node_id=node.info.node_id,
                because=verdict.because,
                freed_bytes=int(freed),
            )
        await self._reconciler.fleet.announce()
        return gone, stayed

    async def _prune(self, change: Change, node: Node) -> int:
        """Remove from uv's cache on a node what no lock needs; returns the freed bytes."""
        try:
            local = await asyncio.to_thread(self._registry.local_wheels)
            told = await node.call("prune_cache", needed=self._needed(), local=local)
        except RayEnvsError as exc:  # uv is busy; the next collection prunes
            change.told(str(exc))
            return 0
        change.told(told["output"])
        return int(told["freed_bytes"])

    def wanted(self, *, include_current: bool = False) -> dict[str, str]:
        """The keys that variants want, with the reason; `include_current` leaves pinned ones."""
        found: dict[str, str] = {}
        for folder in self._variants.damaged:  # in doubt, keep
            why = f"a generation of the definition in {folder}, which cannot be read"
            found.update(dict.fromkeys(self._registry.keys_in(folder), why))
        for name, record in self._variants.by_name.items():
            if record.is_pinned or not include_current:
                word = "pinned" if record.is_pinned else "current"
                found.setdefault(
                    record.current.key, f"{word} generation {record.current.number} of {name}"
                )
                for made in self.kept(record):
                    found.setdefault(made.key, f"kept generation {made.number} of {name}")
        return found

    def kept(self, record: VariantRecord) -> Iterable[Generation]:
        """The older generations that are kept for a rollback; all of a pinned variant."""
        older = [number for number in record.numbers if number != record.current.number]
        if not record.is_pinned:
            older = older[max(0, len(older) - self._settings.keep_generations + 1) :]
        for number in older:
            with suppress(StorageFailed):  # no rollback to one that cannot be read
                yield self._registry.generation(record.env_id, number)

    def _busy(self) -> set[str]:
        """The keys that are being built on a node, or prepared for a change."""
        busy = {generation.key for generation in self._variants.staged.values()}
        busy |= {key for key, count in self._reconciler.awaited.items() if count > 0}
        for node in self._reconciler.fleet.healthy():
            busy |= {key for key, state in node.states.items() if not state.phase.is_final}
        return busy

    def _needed(self) -> dict[str, list[str]]:
        """The versions of each package in all kept generations."""
        needed: dict[str, set[str]] = {}
        for generation in self._variants.staged.values():
            for name, version in generation.packages.items():
                needed.setdefault(name, set()).add(version)
        for record in self._variants.by_name.values():
            for generation in (record.current, *self.kept(record)):
                for name, version in generation.packages.items():
                    needed.setdefault(name, set()).add(version)
        return {name: sorted(versions) for name, versions in needed.items()}


def _kept(verdict: Verdict, because: str) -> Verdict:
    return verdict.model_copy(update={"collect": False, "because": because})
