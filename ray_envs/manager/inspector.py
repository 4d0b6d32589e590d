"""Examines environments: their users, and whether they match their lock. Repairs them.

Damage is an event before it is repaired. `maintenance` does the work on each node.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray_envs.decisions import resolving
from ray_envs.errors import (
    EnvironmentNotReady,
    ManagerUnavailable,
    NotFound,
    RayEnvsError,
    StorageFailed,
    from_dict,
)
from ray_envs.events import EventKind
from ray_envs.manager.changes import Changes
from ray_envs.manager.collector import Collector
from ray_envs.manager.leases import Leases
from ray_envs.manager.operations import Operations
from ray_envs.manager.reconciler import Reconciler
from ray_envs.manager.registry import Registry
from ray_envs.manager.statuses import Statuses
from ray_envs.manager.variants import Variants
from ray_envs.models import EnvId, Generation, Phase, Target, VariantRecord
from ray_envs.settings import Settings
from ray_envs.specs import Definition

#: The command line of a Ray worker that waits for work: it does not count as use.
_IDLE = "ray::IDLE"
#: How many letters of a key or node id are shown.
_SHORT = 12

Rows = list[dict[str, Any]]


@dataclass(eq=False)
class Inspector:
    """Examines and repairs the environments of one cluster."""

    _settings: Settings
    _registry: Registry
    _variants: Variants
    _statuses: Statuses
    _reconciler: Reconciler
    _operations: Operations
    _collector: Collector
    _leases: Leases
    _target: Target

    async def users(self, keys: list[str], but_job: str | None = None) -> list[str]:
        """The users of any of `keys` now, in words: processes that hold them, jobs with a lease.

        Idle Ray workers and the leases of `but_job` do not count.
        """
        found = []
        await self._collector.end_leases()
        for node in self._reconciler.fleet.healthy():
            try:
                held = await node.call("users", keys=keys)
            except ManagerUnavailable:  # it restarts, and cannot delete anything meanwhile
                continue
            for key, processes in held.items():
                for process in processes:
                    command = " ".join(process["command"]) or "?"
                    if not command.startswith(_IDLE):
                        found.append(
                            f"process {process['pid']} on node {node.info.node_id[:_SHORT]} "
                            f"({command[:80]}) runs in {key[:_SHORT]}"
                        )
        for key in keys:
            jobs = self._leases.of(key, but_job=but_job)
            found += [f"job {job} was promised {key[:_SHORT]}" for job in jobs]
        return found

    async def explain(self, record: VariantRecord) -> dict[str, Any]:
        """See `EnvManager.explain`."""
        name, key = str(record.env_id), record.current.key
        nodes = {}
        for node_id, state in self._statuses.states(record.current).items():
            because = self._reconciler.fleet.becauses.get((node_id, key), "")
            nodes[node_id] = {**state.model_dump(mode="json"), "because": because}
        verdicts = [verdict for verdict, _ in await self._collector.plan()]
        status = self._statuses.status(name)
        return {
            "variant_id": name,
            "status": status["status"],
            "key": key,
            "generation": record.current.number,
            "is_asked_for": key in self._variants.wishes,
            "shared_with": [other for other in self._variants.sharing(key) if other != name],
            "users": await self.users([key]),
            "leases": self._leases.of(key),
            "collection": [v.model_dump(mode="json") for v in verdicts if v.key == key],
            "nodes": nodes,
            "error": status["error"],
        }

    async def sync(self, env_id: EnvId, changes: Changes, *, dry_run: bool) -> dict[str, Any]:
        """See `EnvManager.sync_env`."""
        name = str(env_id)
        if self._statuses.is_stale(self._variants.get(name).current):
            relocked = await changes.relock(env_id, dry_run=dry_run)
            if dry_run:
                return {**self._statuses.status(name), **relocked, "checks": []}
        async with self._operations.on_variant(
            env_id, "sync", failed=EventKind.SYNC_FAILED
        ) as change:
            record = self._variants.get(name)
            if not dry_run:
                change.begin()
            rows = await self.check(record.env_id, record.current, repair=not dry_run)
            if not dry_run:
                for row in rows:
                    if row["error"]:
                        raise from_dict(row["error"])
                await self._reconciler.fleet.look_at_disks()
                limit_s = self._settings.prepare_timeout_s
                await self._reconciler.make_ready(record.current, limit_s, variant_id=name)
                self._tell_repaired(record.env_id, record.current, rows)
                change.told("\n".join(map(in_words, rows)))
                change.succeed(EventKind.SYNCED, key=record.current.key)
        return {
            **self._statuses.status(name),
            "dry_run": dry_run,
            "checks": rows,
            "stdout": "",
            "stderr": "\n".join(map(in_words, rows)),
            "exit_code": 0,
            "duration_s": change.duration_s,
        }

    async def doctor(self, names: list[str], *, repair: bool) -> dict[str, Any]:
        """See `EnvManager.doctor`; `names` are the variants to examine."""
        damaged: list[StorageFailed] = []
        self._registry.all(damaged=damaged)
        nodes = await self._probes()
        environments: Rows = []
        for key, (env_id, made) in self._kept_by(names).items():
            name = str(env_id)
            known = self._variants.by_name.get(name)
            if known is None:  # it was deleted meanwhile
                continue
            is_current = known.current.key == key
            try:
                # A kept generation may be absent, but not damaged.
                rows = await self.check(env_id, made, repair=repair, may_be_gone=not is_current)
            except RayEnvsError as exc:  # its lock cannot be read; go on with the others
                rows = [{**_row(""), "error": exc.to_dict()}]
            if (
                is_current
                and repair
                and any(row["is_discarded"] or not row["is_ready"] for row in rows)
            ):
                await self._rebuilt(name, made, rows)
            environments += [
                {"variant_id": name, "generation": made.number, "key": key, **row} for row in rows
            ]
            if repair:
                self._tell_repaired(env_id, made, rows)
        history = self._operations.history.problem
        probes = [probe for each in nodes.values() for probe in each["probes"]]
        return {
            "is_healthy": not damaged
            and not history
            and all(probe["ok"] for probe in probes)
            and not any(each["error"] for each in nodes.values())
            and all(row["is_ready"] or row["is_discarded"] for row in environments)
            and not any(row["left"] or row["error"] for row in environments),
            "nodes": nodes,
            "environments": environments,
            "definitions": [error.to_dict() for error in damaged],
            "history": history or "ok",
        }

    def _kept_by(self, names: list[str]) -> dict[str, tuple[EnvId, Generation]]:
        """The current and kept generations of variants, once for each key; current ones first."""
        found: dict[str, tuple[EnvId, Generation]] = {}
        records = []
        for name in names:
            with suppress(NotFound):  # it was deleted meanwhile
                records.append(self._variants.get(name))
        for record in records:
            found.setdefault(record.current.key, (record.env_id, record.current))
        for record in records:
            for made in self._collector.kept(record):
                found.setdefault(made.key, (record.env_id, made))
        return {
            key: (env_id, made)
            for key, (env_id, made) in found.items()
            if not self._statuses.is_stale(made)
        }

    async def _rebuilt(self, name: str, made: Generation, rows: Rows) -> None:
        """Build what is missing or was discarded, and put the results into `rows`."""
        self._reconciler.want([made.key])
        await self._reconciler.fleet.look_at_disks()
        limit_s = self._settings.prepare_timeout_s
        with suppress(EnvironmentNotReady):  # the rows say so
            await self._reconciler.until_final(made, limit_s, variant_id=name)
        states = self._statuses.states(made)
        for row in rows:
            state = states.get(row["node_id"])
            row["is_ready"] = state is not None and state.phase is Phase.READY
            row["error"] = row["error"] or (state.error if state else None)

    async def _probes(self) -> dict[str, Any]:
        bare = resolving.project_text(Definition(), self._target)
        nodes: dict[str, Any] = {}
        for node in self._reconciler.fleet.nodes.values():
            told: dict[str, Any] = {"error": node.error, "probes": []}
            if node.error is None:
                try:
                    told["probes"] = await node.call(
                        "probe",
                        expected=self._target.model_dump(mode="json"),
                        index_project=bare if node.info.is_head else "",
                    )
                except RayEnvsError as exc:
                    told["error"] = exc.to_dict()
            nodes[node.info.node_id] = told
        return nodes

    async def check(
        self, env_id: EnvId, made: Generation, *, repair: bool, may_be_gone: bool = False
    ) -> Rows:
        """The findings of each node about its environment of a generation, and its repairs.

        `may_be_gone` leaves nodes without it out.
        """
        key = made.key
        request = self._reconciler.request(env_id, made)
        rows: Rows = []
        for node in self._statuses.eligible(made):
            row = _row(node.info.node_id)
            try:
                row |= await node.call("check", request=request, repair=repair)
            except RayEnvsError as exc:
                row["error"] = exc.to_dict()
            if row["is_discarded"]:
                self._reconciler.fleet.forget_state(node, key)
            if may_be_gone and not row["is_ready"] and not row["error"]:
                continue
            if row["damaged_files"]:
                self._operations.say(
                    EventKind.DAMAGED,
                    **_about(env_id, made, row),
                    damage=row["damage"],
                    damaged_files=row["damaged_files"],
                    sharers=row["sharers"],
                )
            rows.append(row)
        return rows

    def _tell_repaired(self, env_id: EnvId, made: Generation, rows: Rows) -> None:
        for row in rows:
            if row["damaged_files"] and not row["error"]:
                self._operations.say(
                    EventKind.REPAIRED,
                    **_about(env_id, made, row),
                    left=row["left"],
                    is_rebuilt=row["is_discarded"],
                )


def _about(env_id: EnvId, made: Generation, row: Mapping[str, Any]) -> dict[str, str]:
    """The ids of an event about an environment on a node."""
    return {"variant_id": str(env_id), "key": made.key, "node_id": row["node_id"]}


def _row(node_id: str) -> dict[str, Any]:
    """The findings of a node that has not answered yet."""
    return {
        "node_id": node_id,
        "is_ready": False,
        "damage": [],
        "damaged_files": 0,
        "left": [],
        "sharers": [],
        "is_discarded": False,
        "error": None,
    }


def in_words(row: Mapping[str, Any]) -> str:
    """The findings of one node in a line."""
    where = f"node {row['node_id'][:_SHORT]}"
    if row["error"]:
        return f"{where}: {row['error']['message']}"
    if not row["is_ready"]:
        return f"{where}: not there"
    if not row["damaged_files"]:
        return f"{where}: matches its lock"
    done = "built again" if row["is_discarded"] else f"{len(row['left'])} left as they are"
    return f"{where}: {row['damaged_files']} files differ from the lock, {done}"
