"""NodeAgent: makes true on one node what the manager wants. `cluster` makes it an actor.

It takes requests, has them built (`provisioning`), and reports their progress, also to workers
that wait at this node's gate. What to build is decided by the manager.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from ray_envs.cluster import ray_versions
from ray_envs.cluster.bootstrap import own_version
from ray_envs.cluster.peers import RayPeers
from ray_envs.decisions.collecting import EnvUse
from ray_envs.errors import RayEnvsError, StorageFailed, UvFailed, WorkerCannotStart
from ray_envs.models import BuildRequest, NodeEnvState, Phase, Target
from ray_envs.node import unpacked_code
from ray_envs.node.attendant import Attendant, has_gate
from ray_envs.node.exchange import Exchange
from ray_envs.node.failed_starts import FailedStarts
from ray_envs.node.interpreter import this_platform, this_target, uv_version
from ray_envs.node.maintenance import Maintenance
from ray_envs.node.provisioning import Progress, Provisioning
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.node.uv_cache import UvCache
from ray_envs.node.uv_trial import UvTrial
from ray_envs.node.worker_start import WorkerStart
from ray_envs.plugin.gate import Gate
from ray_envs.settings import Settings


class NodeAgent:
    """The environments of one node. All methods are keyword-only and return plain data.

    `settings` come from `Settings.to_environment`; `node_id` is "local" without a cluster.
    """

    def __init__(self, *, settings: dict[str, str], node_id: str, ray_version: str) -> None:
        self._settings = Settings.from_environment(settings)
        self._node_id = node_id
        self._target = this_target(ray_version)
        self._store = Store(self._settings)
        self._builder = Builder(self._settings, self._store.cache)
        self._worker_start = WorkerStart(self._settings)
        self._uv_trial = UvTrial(self._store)
        self._maintenance = Maintenance(
            self._settings, self._store, self._builder, self._worker_start, self._uv_trial
        )
        cache = UvCache(self._store.cache, lock_timeout_s=self._settings.lock_timeout_s)
        self._exchange = Exchange(cache, RayPeers())
        self._provisioning = Provisioning(
            self._settings, self._store, self._builder, self._exchange, self._worker_start
        )
        self._states: dict[str, NodeEnvState] = {}
        #: Where workers of this node wait, if Ray was started here with our plugin.
        self._attendant = self._new_attendant() if has_gate() else None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(self._settings.max_parallel_builds)
        #: Resolutions have places of their own: they must not wait behind long builds.
        self._lock_slots = asyncio.Semaphore(self._settings.max_parallel_builds)
        self._version = 0
        self._changed = asyncio.Condition()
        self._is_set_up = False

    async def describe(self) -> dict[str, Any]:
        """What this node is and which environments it has ready."""
        error = None
        try:
            await self._set_up()
        except RayEnvsError as exc:
            error = exc.about(node_id=self._node_id).to_dict()
        for key, record in self._store.records().items():
            if key not in self._states:
                self._states[key] = NodeEnvState(key=key, phase=Phase.READY, how=record.how)
        self._forget_lost()
        if self._attendant is not None:
            self._attendant.begin()
        return {
            "node_id": self._node_id,
            "platform": this_platform().model_dump(mode="json"),
            "target": self._target.model_dump(mode="json"),
            "root": str(self._settings.root),
            "states": [state.model_dump(mode="json") for state in self._states.values()],
            "version": self._version,
            "asked": self._asked(),
            "has_gate": self._attendant is not None,
            "software": {"ray_envs": own_version(), "uv": uv_version()},
            "error": error,
        }

    async def watch(self, *, seen: int, timeout_s: float) -> dict[str, Any]:
        """The states of all environments, as soon as there is something newer than `seen`.

        Returns after `timeout_s` seconds at the latest, changed or not. `seen=-1` returns at once.
        """
        self._forget_lost()
        await self._maintenance.renew()
        async with self._changed:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._version > seen), timeout_s
                )
        return {
            "version": self._version,
            "states": [state.model_dump(mode="json") for state in self._states.values()],
            "asked": self._asked(),
        }

    async def lock(
        self,
        *,
        pyproject: str,
        uv_lock: str | None,
        exclude_newer: str | None,
        only_binary: bool = False,
        upgrade: list[str] | None = None,
    ) -> dict[str, Any]:
        """Resolve a project; returns the text of its uv.lock, uv's words and how long it took."""
        await self._set_up()
        started = time.monotonic()
        files = {"pyproject.toml": pyproject}
        if uv_lock is not None:
            files["uv.lock"] = uv_lock
        async with self._lock_slots:
            with self._store.scratch(files) as project:
                try:
                    locked = await self._builder.resolve(
                        project,
                        exclude_newer=exclude_newer,
                        only_binary=only_binary,
                        upgrade=upgrade,
                    )
                except UvFailed as exc:
                    raise self._provisioning.blamed(exc) from exc
        return {
            "uv_lock": locked.text,
            "output": locked.output,
            "duration_s": time.monotonic() - started,
        }

    async def export(
        self,
        *,
        pyproject: str,
        uv_lock: str,
        extras: list[str],
        groups: list[str],
        format: Literal["requirements", "pylock"],
    ) -> str:
        """A lock in another format; see `Builder.export`."""
        await self._set_up()
        files = {"pyproject.toml": pyproject, "uv.lock": uv_lock}
        with self._store.scratch(files) as project:
            return await self._builder.export(project, extras=extras, groups=groups, format=format)

    async def ensure(
        self,
        *,
        request: dict[str, Any],
        attempt: int,
        peers: Sequence[str] = (),
        is_cache_only: bool = False,
    ) -> dict[str, Any]:
        """Begin to make an environment ready, unless it is or is being made; returns its state.

        Args:
            request: a `BuildRequest`.
            attempt: of the wish.
            peers: nodes that have its wheels; other wheels come from the package index.
            is_cache_only: only get its wheels, for other nodes.
        """
        wanted = BuildRequest.model_validate(request)
        key = wanted.key
        task = self._tasks.get(key)
        if task is None or task.done():
            record = self._store.record(key)
            if record is not None and not is_cache_only and not self._has_failed(key):
                self._store.renew(key)
                await self._tell(key, Phase.READY, attempt=attempt, how=record.how)
            else:
                making = self._cache if is_cache_only else self._make_ready
                if self._has_failed(key) and not is_cache_only:
                    making = self._try_again
                await self._tell(key, Phase.WAITING, attempt=attempt)
                self._tasks[key] = asyncio.create_task(
                    self._guarded(partial(making, wanted, attempt, list(peers)), key, attempt)
                )
        return self._states[key].model_dump(mode="json")

    async def refuse(self, *, key: str, reason: str) -> None:
        """Fail the workers that wait here for `key`, which will not be built."""
        if self._attendant is not None:
            self._attendant.refuse(key, reason)

    async def offers(self, *, packages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The packages that this node can send; see `Exchange`."""
        return await self._exchange.offers(packages)

    async def manifest(self, *, wheel: dict[str, Any]) -> dict[str, Any]:
        """The manifest of one of the `offers`."""
        return await self._exchange.manifest(wheel)

    async def chunk(self, *, wheel: dict[str, Any], identity: str, number: int) -> list[Any]:
        """A piece of what the manifest of that identity describes, as a reference."""
        return await self._exchange.chunk(wheel, identity, number)

    async def local_wheel(self, *, wheel: dict[str, Any]) -> list[Any]:
        """The whole of a local package, as a reference."""
        return await self._exchange.local_wheel(wheel)

    async def try_start(self, *, key: str, env_vars: dict[str, str]) -> None:
        """Start a worker of `key` with these variables, as far as its imports.

        Raises `WorkerCannotStart`: it does not start; `detail` is its output.
        """
        site = self._store.site_packages(key, self._target.python_minor)
        await self._worker_start.check(self._store.python(key), site, env_vars=env_vars)

    async def inventory(self) -> dict[str, Any]:
        """What this node has, and when it was used last; see `Maintenance.inventory`."""
        return await self._maintenance.inventory()

    async def users(self, *, keys: list[str]) -> dict[str, list[dict[str, Any]]]:
        """Which processes hold each of `keys`."""
        return await self._maintenance.users(keys)

    async def collect(self, *, key: str, planned: dict[str, Any]) -> int:
        """Remove an environment; returns the freed bytes; see `Maintenance.collect`."""
        freed = await self._maintenance.collect(key, planned=EnvUse.model_validate(planned))
        self._forget_lost()
        return freed

    async def prune_cache(
        self, *, needed: dict[str, list[str]], local: list[str] | None = None
    ) -> dict[str, Any]:
        """Prune uv's cache; see `Maintenance.prune_cache`."""
        await self._set_up()
        return await self._maintenance.prune_cache(needed, local)

    async def check(self, *, request: dict[str, Any], repair: bool) -> dict[str, Any]:
        """Check an environment and, on request, repair it; see `Maintenance.check`."""
        await self._set_up()
        told = await self._maintenance.check(BuildRequest.model_validate(request), repair=repair)
        self._forget_lost()
        return told

    async def probe(self, *, expected: dict[str, Any], index_project: str) -> list[Any]:
        """What this node can do; see `Maintenance.probe`."""
        return await self._maintenance.probe(
            Target.model_validate(expected), self._target, index_project
        )

    async def stop(self) -> None:
        """End every build; what is half-built has no record and is cleared by the next one."""
        if self._attendant is not None:
            self._attendant.end()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _new_attendant(self) -> Attendant:
        logs = ray_versions.logs_folder()
        patience_s = self._settings.worker_start_timeout_s
        return Attendant(
            Gate(self._settings.root),
            self._states,
            changed=self._wake,
            starts=None
            if logs is None
            else FailedStarts(self._settings.root, self._node_id, logs, patience_s=patience_s),
            start_error=self._start_error,
        )

    def _asked(self) -> dict[str, int]:
        """The latest attempt of each environment that workers wait for."""
        return {} if self._attendant is None else dict(self._attendant.asked)

    async def _start_error(self, key: str) -> WorkerCannotStart | None:
        """Examine an environment whose worker has not started; one that is broken fails."""
        record = self._store.record(key)
        if record is None:
            return None
        error = await self._maintenance.start_error(record)
        if not isinstance(error, WorkerCannotStart):
            return None
        await self._fail(key, self._states[key].attempt if key in self._states else 0, error)
        return error

    def _forget_lost(self) -> None:
        """Stop calling ready what the disk has lost, so that it is built again."""
        ready = [key for key, state in self._states.items() if state.phase is Phase.READY]
        for key in ready:
            if self._store.record(key) is None:
                del self._states[key]
                self._version += 1

    async def _set_up(self) -> None:
        if not self._is_set_up:
            self._store.set_up()
            self._store.sweep()
            unpacked_code.sweep(self._settings.root)
            await self._uv_trial.check()
            self._is_set_up = True

    async def _make_ready(self, request: BuildRequest, attempt: int, peers: list[str]) -> None:
        started, key = time.monotonic(), request.key
        await self._set_up()
        async with self._slots, self._store.lock(key):
            record = self._store.record(key)  # another process may have been first
            if record is None:
                record = await self._provisioning.make(request, peers, self._progress(key, attempt))
        duration_s = time.monotonic() - started
        await self._tell(key, Phase.READY, attempt=attempt, how=record.how, duration_s=duration_s)

    async def _try_again(self, request: BuildRequest, attempt: int, peers: list[str]) -> None:
        """`_make_ready`; an environment that is there may have failed at the starts of workers."""
        record = self._store.record(request.key)
        error = None if record is None else await self._maintenance.start_error(record)
        if error is not None:
            raise error
        await self._make_ready(request, attempt, peers)

    def _has_failed(self, key: str) -> bool:
        return key in self._states and self._states[key].phase is Phase.FAILED

    async def _cache(self, request: BuildRequest, attempt: int, _peers: list[str]) -> None:
        started = time.monotonic()
        await self._set_up()
        async with self._slots:
            await self._provisioning.cache(request, self._progress(request.key, attempt))
        duration_s = time.monotonic() - started
        await self._tell(request.key, Phase.CACHED, attempt=attempt, duration_s=duration_s)

    def _progress(self, key: str, attempt: int) -> Progress:
        def progress(phase: Phase, line: str) -> None:
            self._states[key] = NodeEnvState(key=key, phase=phase, progress=line, attempt=attempt)
            self._wake()

        return progress

    async def _guarded(
        self, making: Callable[[], Coroutine[Any, Any, None]], key: str, attempt: int
    ) -> None:
        """`making`, whose failure becomes the state of `key`."""
        started = time.monotonic()
        try:
            await making()
        except Exception as exc:
            error: RayEnvsError = RayEnvsError(f"{type(exc).__name__}: {exc}")
            if isinstance(exc, RayEnvsError):
                error = exc
            elif isinstance(exc, OSError):
                error = StorageFailed(f"{exc}")
            await self._fail(key, attempt, error, time.monotonic() - started)
        except asyncio.CancelledError:
            stopped = UvFailed("the build was stopped")
            await self._fail(key, attempt, stopped, time.monotonic() - started)
            raise

    async def _fail(self, key: str, attempt: int, exc: RayEnvsError, duration_s: float = 0) -> None:
        error = exc.about(key=key, node_id=self._node_id).to_dict()
        await self._tell(key, Phase.FAILED, attempt=attempt, error=error, duration_s=duration_s)

    async def _tell(self, key: str, phase: Phase, **fields: Any) -> None:
        if phase is Phase.READY and self._attendant is not None:
            self._attendant.clear(key)
        self._states[key] = NodeEnvState(key=key, phase=phase, **fields)
        self._version += 1
        async with self._changed:
            self._changed.notify_all()

    def _wake(self) -> None:
        """Like `_tell`, from a callback that cannot wait."""
        self._version += 1

        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._waking = asyncio.ensure_future(notify())
