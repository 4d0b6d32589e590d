"""Hands an environment out to a program: where it is ready, how a worker starts, the lease."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from ray_envs.decisions import placement
from ray_envs.errors import StorageFailed
from ray_envs.manager.wiring import Parts
from ray_envs.models import VariantRecord
from ray_envs.plugin import gate

#: The fields of a status that `get_environment` returns.
_FOR_PROGRAMS = (
    "variant_id", "workflow_id", "node_id", "version_id", "status", "key", "generation",
    "lock_sha256", "env_path", "venv_path", "python_path", "python_version", "ray_version", "error",
)  # fmt: skip


class HandingOut:
    """Answers programs that want to run in a variant, and takes leases for their jobs."""

    def __init__(self, parts: Parts) -> None:
        self._variants, self._statuses, self._fleet = parts.variants, parts.statuses, parts.fleet
        self._leases, self._cluster = parts.leases, parts.cluster
        #: The jobs that have asked, as `session/job`.
        self._seen: set[str] = set()
        #: The keys and variables with which an interpreter has started successfully.
        self._started: set[tuple[str, str]] = set()

    async def environment(self, record: VariantRecord, job_id: str | None) -> dict[str, Any]:
        """The answer of `get_environment`; takes a lease for the job."""
        name = str(record.env_id)
        status = self._statuses.status(name)
        places = self._statuses.places(name)
        if self._statuses.is_stale(record.current):  # no task may run in it any more
            places = {**places, "ready_nodes": [], "preparing_nodes": [], "may_spread": False}
        elif job_id is not None:
            await self._lease(record, job_id)
        if places["ready_nodes"]:
            await self._check_start(record, places["ready_nodes"][0])
        env_vars, key = record.definition.env_vars, record.current.key
        field = gate.field(key, self._variants.wishes.epoch(key))
        return {
            **{name: status[name] for name in _FOR_PROGRAMS},
            "env_vars": dict(env_vars),
            "runtime_env": placement.runtime_env(
                status["venv_path"], env_vars, field if places["is_gated"] else None
            ),
            **places,
        }

    async def _lease(self, record: VariantRecord, job_id: str) -> None:
        session = self._cluster.session()
        holder = f"{session}/{job_id}"
        if holder not in self._seen:  # it may have ended before this process began
            if holder not in await self._cluster.living_jobs():
                self._leases.note_ended([holder])
            self._seen.add(holder)
        with suppress(StorageFailed):  # on a full disk the lease lasts as long as this process
            self._leases.take(
                record.current.key, job_id=job_id, session=session, variant_id=str(record.env_id)
            )

    async def _check_start(self, record: VariantRecord, node_id: str) -> None:
        """Start the interpreter once with the environment variables of a variant.

        Ray restarts a worker that dies at its start for ever, without an error.
        """
        variables = record.definition.env_vars
        combination = (record.current.key, json.dumps(variables, sort_keys=True))
        if variables and combination not in self._started:
            node = self._fleet.nodes[node_id]
            await node.call("try_start", key=record.current.key, env_vars=variables)
            self._started.add(combination)
