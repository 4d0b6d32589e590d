"""EnvManager: knows which variants are wanted. A plain class; `cluster` makes it a detached actor.

Verbs answer from memory and write wishes; only the loop acts on nodes. The state after a restart is
the registry and a new look at the agents: start-up and recovery are the same code. Everything that
crosses its boundary is plain data, so that any worker can call it without having ray_envs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ray_envs import locks, placement, planning, resolving
from ray_envs.agent import NodeAgent
from ray_envs.builder import base_python, index_settings, this_platform, this_target
from ray_envs.cluster import NAMESPACE, Nodes, RayNodes, create_manager
from ray_envs.errors import (
    AlreadyExists,
    EnvironmentNotReady,
    InvalidInput,
    ManagerUnavailable,
    NotFound,
    RayEnvsError,
    ResolutionFailed,
    StorageFailed,
    from_dict,
)
from ray_envs.fleet import Fleet, Node, ended, site_name
from ray_envs.models import (
    Definition,
    EnvId,
    Generation,
    NodeEnvState,
    Phase,
    Platform,
    Status,
    Target,
    VariantRecord,
    validated,
)
from ray_envs.registry import Registry, build_request, describe_record
from ray_envs.settings import Settings
from ray_envs.store import Store

#: What `get_environment` takes from a status.
_FOR_PROGRAMS = (
    "variant_id", "workflow_id", "node_id", "version_id", "status", "key", "generation",
    "lock_sha256", "env_path", "venv_path", "python_path", "python_version", "ray_version", "error",
)  # fmt: skip


class EnvManager:
    """The variants of one cluster. All methods are keyword-only; they take and return plain data.

    A variant is addressed by `variant_id`: "node", "workflow/node" or "workflow/node/version".

    Args:
        settings: as `Settings.to_environment` writes them.
        nodes: who answers about the cluster; by default the Ray cluster of this process.
    """

    def __init__(self, *, settings: dict[str, str], nodes: Nodes | None = None) -> None:
        self._settings = Settings.from_environment(settings)
        cluster = nodes or RayNodes(NodeAgent)
        self._fleet = Fleet(cluster, settings)
        self._address = cluster.address
        self._registry = Registry(self._settings)
        self._paths = Store(self._settings)
        self._platform: Platform = this_platform()
        self._target: Target = this_target(cluster.ray_version())
        self._variants: dict[str, VariantRecord] = {}
        self._stamps: dict[str, int] = {}
        #: The keys that somebody asked for, with the attempt that the last request began.
        self._wishes: dict[str, int] = {}
        #: The keys and variables with which an interpreter has been seen to start.
        self._started: set[tuple[str, str]] = set()
        self._resolving: dict[str, asyncio.Task[str]] = {}
        #: Tells clients that a restart has forgotten their wishes.
        self._life = uuid.uuid4().hex
        self._loop_task: asyncio.Task[None] | None = None
        self._first_look = asyncio.Event()
        self._is_stopping = False
        #: The open lock that tells other processes that this manager serves the root.
        self._announced: int | None = None

    # -- verbs ------------------------------------------------------------------------------

    async def describe(self) -> dict[str, Any]:
        """The manager's root, interpreter, Ray and nodes."""
        await self._awake()
        return {
            "root": str(self._settings.root),
            "target": self._target.model_dump(mode="json"),
            "platform": self._platform.name,
            "nodes": {
                node.info.node_id: {
                    "address": node.info.address,
                    "is_head": node.info.is_head,
                    "is_eligible": node.site == self._site and node.error is None,
                    "site": node.site,
                    "error": node.error,
                }
                for node in self._fleet.nodes.values()
            },
        }

    async def create_env(
        self,
        *,
        variant_id: str,
        spec: Mapping[str, Any],
        replace: bool = False,
        wait_s: float = 0,
    ) -> dict[str, Any]:
        """Define a variant and want it on every node; returns its status.

        Idempotent for an equal spec. A different one needs `replace` and makes a new generation.

        Args:
            variant_id: the variant.
            spec: the fields of `models.Definition`: texts, not paths.
            replace: accept that the variant exists with another spec.
            wait_s: how long to wait until it is ready on every eligible node, in seconds. If it
                fails within that time, the definition is again what it was before.

        Raises:
            InvalidId, InvalidInput, InvalidPackages: the input cannot be accepted.
            AlreadyExists: it is defined differently and `replace` is false.
            ResolutionFailed, UvFailed, StorageFailed, LockTimeout: nothing was changed.
        """
        env_id = EnvId.parse(variant_id)
        definition = self._checked(spec, where=f"variant {env_id}")
        await self._awake()
        async with self._registry.lock(env_id):
            before = self._registry.get(env_id)
            record = before
            if before is None or not self._is_current(before, definition):
                if before is not None and before.definition != definition and not replace:
                    raise AlreadyExists(
                        f"variant {env_id} exists with another spec",
                        variant_id=str(env_id),
                        hint="give replace=True (--replace) for a new generation, or another id",
                    )
                record = await self._resolved(env_id, definition)
            assert record is not None
            self._remember(record)
            self._want([record.current.key])
            if wait_s > 0 and record is not before:
                try:
                    await self._until_final(env_id, wait_s)
                    self._raise_failure(record)
                except RayEnvsError:
                    self._restore(env_id, before)
                    raise
        if wait_s > 0 and record is before:
            await self._until_final(env_id, wait_s)
            self._raise_failure(record)
        return self._status(str(env_id))

    async def prepare(self, *, variant_ids: Iterable[str]) -> dict[str, Any]:
        """Want these variants on every node, failed ones once more; see `watch` for how it goes.

        Raises:
            NotFound: a variant is not defined.
        """
        await self._awake()
        ids = [str(EnvId.parse(text)) for text in variant_ids]
        await self._fleet.look_at_disks()
        self._want([self._get(name).current.key for name in ids])
        return self._told(ids)

    async def watch(
        self, *, variant_ids: Iterable[str], seen: int, timeout_s: float = 10
    ) -> dict[str, Any]:
        """The status of variants, once anything is newer than `seen`, or after `timeout_s`."""
        await self._awake()
        ids = [str(EnvId.parse(text)) for text in variant_ids]
        await self._fleet.news(seen, timeout_s)
        return self._told(ids)

    def _told(self, ids: Iterable[str]) -> dict[str, Any]:
        statuses = {name: self._status(name) for name in ids}
        return {"life": self._life, "version": self._fleet.version, "variants": statuses}

    async def get_env_status(self, *, variant_id: str) -> dict[str, Any]:
        """What is known of a variant; NOT_EXISTS where it is not defined. Never counts as use."""
        await self._awake()
        return self._status(str(EnvId.parse(variant_id)))

    async def get_environment(self, *, variant_id: str) -> dict[str, Any]:
        """What a program needs to run in a variant: paths, variables, and the nodes that are ready.

        Raises:
            NotFound: the variant is not defined.
        """
        await self._awake()
        record = self._get(str(EnvId.parse(variant_id)))
        status = self._status(str(record.env_id))
        ready_nodes = sorted(
            node_id
            for node_id, state in status["nodes"].items()
            if state["phase"] == Phase.READY.value
        )
        if ready_nodes:
            await self._check_start(record, ready_nodes[0])
        return {
            **{name: status[name] for name in _FOR_PROGRAMS},
            "env_vars": dict(record.definition.env_vars),
            "runtime_env": placement.runtime_env(status["venv_path"], record.definition.env_vars),
            "ready_nodes": ready_nodes,
        }

    async def _check_start(self, record: VariantRecord, node_id: str) -> None:
        """Start the interpreter once with the variables of a variant.

        Ray would start a worker that dies at once again and again, for ever and in silence.
        """
        variables = record.definition.env_vars
        combination = (record.current.key, json.dumps(variables, sort_keys=True))
        if variables and combination not in self._started:
            node = self._fleet.nodes[node_id]
            await node.call("try_start", key=record.current.key, env_vars=variables)
            self._started.add(combination)

    async def list_envs(self) -> list[dict[str, Any]]:
        """The status of every variant."""
        await self._awake()
        self._reload()
        return [self._status(name) for name in sorted(self._variants)]

    async def delete_env(self, *, variant_id: str) -> dict[str, Any]:
        """Forget a variant. Its environment stays in the store for whoever runs in it."""
        env_id = EnvId.parse(variant_id)
        await self._awake()
        async with self._registry.lock(env_id):
            was_there = self._registry.delete(env_id)
        record = self._variants.pop(str(env_id), None)
        self._stamps.pop(str(env_id), None)
        if record and not any(r.current.key == record.current.key for r in self._variants.values()):
            self._wishes.pop(record.current.key, None)
        await self._fleet.announce()
        return {"variant_id": str(env_id), "deleted": was_there, "status": "NOT_EXISTS"}

    async def stop(self) -> None:
        """End the loop and, where the agent lives in this process, its builds."""
        self._is_stopping = True
        if self._loop_task is not None:
            await ended({self._loop_task})
        await self._fleet.stop()
        if self._announced is not None:
            os.close(self._announced)
            self._announced = None

    # -- definitions ------------------------------------------------------------------------

    def _checked(self, spec: Mapping[str, Any], *, where: str) -> Definition:
        definition = validated(Definition, dict(spec), where=where)
        packages = resolving.requirement_lines(definition.packages, where=where)
        resolving.check_python(definition.python, self._target, where=where)
        return definition.model_copy(update={"packages": packages})

    def _is_current(self, record: VariantRecord, definition: Definition) -> bool:
        return (
            record.definition == definition
            and record.current.target == self._target
            and record.current.platform == self._platform.name
        )

    async def _resolved(self, env_id: EnvId, definition: Definition) -> VariantRecord:
        """Lock `definition` and commit it as the newest generation of `env_id`."""
        if definition.uv_lock is not None:
            locks.check_lock(definition.uv_lock)
        project = resolving.project_text(definition, self._target)
        fingerprint = resolving.fingerprint(
            project,
            definition.uv_lock,
            definition,
            self._target,
            index_settings=index_settings(),
        )
        uv_lock = await self._locked_text(fingerprint, project, definition)
        if definition.uv_lock is not None and not definition.allow_moved_pins:
            moved = locks.moved_pins(definition.uv_lock, uv_lock, self._platform)
            if moved:
                raise ResolutionFailed(
                    f"adding ray {self._target.ray} to the project moves pins of its uv.lock",
                    detail="\n".join(moved),
                    hint="lock the project with this ray in it, or set allow_moved_pins = true",
                    variant_id=str(env_id),
                )
        packages = locks.installed(
            uv_lock, self._platform, extras=definition.extras, groups=definition.groups
        )
        generation = Generation(
            number=self._registry.next_number(env_id),
            key=locks.key_of(
                packages,
                self._target,
                self._platform,
                build_options=resolving.build_options(project),
            ),
            lock_sha256=locks.lock_sha256(uv_lock),
            fingerprint=fingerprint,
            target=self._target,
            platform=self._platform.name,
            created_at=datetime.now(timezone.utc),
            packages={package.name: package.version for package in packages},
        )
        record = self._registry.commit(
            env_id, definition, generation, pyproject=project, uv_lock=uv_lock
        )
        with suppress(StorageFailed):  # it is for people; the definition is committed
            self._registry.write_view(
                env_id,
                base_python=Path(base_python()),
                python=self._target.python,
                site=self._paths.site_packages(generation.key, self._target.python_minor),
            )
        return record

    async def _locked_text(self, fingerprint: str, project: str, definition: Definition) -> str:
        """The lock of a resolution: a known one, or uv's; equal ones at once share one uv."""
        for record in self._variants.values():
            if record.current.fingerprint == fingerprint:
                with suppress(RayEnvsError):
                    text = self._registry.lock_text(record.env_id, record.current.number)[1]
                    if locks.lock_sha256(text) == record.current.lock_sha256:
                        return text
        task = self._resolving.get(fingerprint)
        if task is None:
            task = asyncio.create_task(self._ask_uv(project, definition))
            self._resolving[fingerprint] = task
            task.add_done_callback(lambda _: self._resolving.pop(fingerprint, None))
        return await asyncio.shield(task)

    async def _ask_uv(self, project: str, definition: Definition) -> str:
        home = next((n for n in self._fleet.nodes.values() if n.info.is_head), None)
        if home is None or home.error is not None:
            error = from_dict(home.error) if home and home.error else None
            raise error or InvalidInput("the head node of the cluster is not there")
        answer = await home.call(
            "lock",
            pyproject=project,
            uv_lock=definition.uv_lock,
            exclude_newer=definition.exclude_newer,
        )
        return str(answer["uv_lock"])

    def _restore(self, env_id: EnvId, before: VariantRecord | None) -> None:
        if before is None:
            self._registry.delete(env_id)
            self._variants.pop(str(env_id), None)
            return
        self._registry.point_to(before)
        self._remember(before)

    def _remember(self, record: VariantRecord) -> None:
        self._variants[str(record.env_id)] = record
        self._stamps[str(record.env_id)] = self._registry.stamp(record.env_id)

    def _reload(self) -> None:
        """Take over what other processes changed in the registry."""
        found = {str(record.env_id): record for record in self._registry.all()}
        if found != self._variants:
            self._variants = found
            self._fleet.version += 1

    def _get(self, name: str) -> VariantRecord:
        record = self._variants.get(name)
        if record is None or self._registry.stamp(record.env_id) != self._stamps.get(name):
            record = self._registry.get(EnvId.parse(name))
            if record is None:
                self._variants.pop(name, None)
                raise NotFound(
                    f"no variant {name!r} is defined under {self._settings.root}",
                    variant_id=name,
                    hint="`ray-envs list` shows the defined ones, `ray-envs create` makes one",
                )
            self._remember(record)
        return record

    # -- status -----------------------------------------------------------------------------

    @property
    def _site(self) -> str:
        return site_name(self._platform.name, self._target)

    def _eligible(self, generation: Generation) -> list[Node]:
        site = site_name(generation.platform, generation.target)
        return [node for node in self._fleet.nodes.values() if node.error or node.site == site]

    def _status(self, name: str) -> dict[str, Any]:
        try:
            record = self._get(name)
        except NotFound:
            return {"variant_id": name, "status": Status.NOT_EXISTS.value, "nodes": {}}
        generation = record.current
        key = generation.key
        nodes = {node.info.node_id: self._state(node, key) for node in self._eligible(generation)}
        status = planning.status_of(key, nodes, {n: {key: state} for n, state in nodes.items()})
        failed = next((state.error for state in nodes.values() if state.error), None)
        return {
            **describe_record(record, self._registry, self._paths.venv(key)),
            "status": status.value,
            "nodes": {node_id: state.model_dump(mode="json") for node_id, state in nodes.items()},
            "error": failed,
        }

    def _state(self, node: Node, key: str) -> NodeEnvState:
        if node.error is not None:
            return NodeEnvState(key=key, phase=Phase.FAILED, error=node.error)
        state = node.states.get(key)
        if state is None or planning.is_to_try_again(state, self._wishes.get(key, 0)):
            return NodeEnvState(key=key, phase=Phase.WAITING)
        return state

    def _raise_failure(self, record: VariantRecord) -> None:
        status = self._status(str(record.env_id))
        if status["error"]:
            raise from_dict(status["error"]).about(variant_id=str(record.env_id))

    async def _until_final(self, env_id: EnvId, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self._fleet.version
            if self._status(str(env_id))["status"] != Status.CREATING.value:
                return
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise EnvironmentNotReady(
                    f"variant {env_id} was not ready after {timeout_s:g} s",
                    variant_id=str(env_id),
                    hint="allow more time; what is built so far is used again",
                )
            await self._fleet.news(seen, left_s)

    # -- the loop ---------------------------------------------------------------------------

    def _want(self, keys: Iterable[str]) -> None:
        for key in keys:
            failed = any(
                node.states[key].phase is Phase.FAILED
                for node in self._fleet.nodes.values()
                if key in node.states
            )
            self._wishes[key] = self._wishes.get(key, 0) + (1 if failed else 0)
        self._fleet.wake_up.set()

    async def _awake(self) -> None:
        """Start the loop with the first verb: an actor's constructor has no running loop."""
        if self._loop_task is None:
            self._reload()
            self._loop_task = asyncio.create_task(self._loop())
        await self._first_look.wait()

    async def _loop(self) -> None:
        while not self._is_stopping:
            self._fleet.wake_up.clear()
            try:
                if self._announced is None:  # again each time: another one may have left
                    self._announced = self._registry.announce_manager(self._address())
                await self._tick()
            except Exception as exc:
                print(f"ray_envs: EnvManager: {type(exc).__name__}: {exc}", file=sys.stderr)
            self._first_look.set()
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._fleet.wake_up.wait(), self._settings.tick_s)

    async def _tick(self) -> None:
        await self._fleet.look_at_nodes()
        platforms: dict[str, str] = {}
        wishes: dict[str, list[VariantRecord]] = {}
        for record in self._variants.values():
            key = record.current.key
            if key in self._wishes:
                platforms[key] = site_name(record.current.platform, record.current.target)
                wishes.setdefault(key, []).append(record)
        actions = planning.plan(
            [
                planning.Wish(key, self._wishes[key], tuple(str(r.env_id) for r in records))
                for key, records in wishes.items()
            ],
            [
                planning.NodeView(node.info.node_id, node.site, dict(node.states))
                for node in self._fleet.nodes.values()
                if node.error is None
            ],
            platforms,
        )
        for action in actions:
            await self._act(action, wishes[action.key][0])

    async def _act(self, action: planning.Build, record: VariantRecord) -> None:
        node = self._fleet.nodes[action.node_id]
        try:
            pyproject, uv_lock = self._registry.lock_text(record.env_id, record.current.number)
            request = build_request(record, pyproject, uv_lock).model_dump(mode="json")
            state = await node.call("ensure", request=request, attempt=action.attempt)
            node.states[action.key] = NodeEnvState.model_validate(state)
        except ManagerUnavailable:  # the agent is restarting: it is met again, and told again
            self._fleet.lose(node)
        except RayEnvsError as exc:
            node.states[action.key] = NodeEnvState(
                key=action.key, phase=Phase.FAILED, error=exc.to_dict(), attempt=action.attempt
            )
        await self._fleet.announce()


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
