"""NodeAgent: makes true on one node what the manager wants. `cluster` makes it an actor.

It takes requests, runs them through `store` and `builder`, and tells how far each one is. What
to build is not decided here (`planning`), nor where anything lies (`store`).
"""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any, Literal

from ray_envs.builder import Builder, this_platform, this_target, uv_version
from ray_envs.errors import RayEnvsError, StorageFailed, UvFailed
from ray_envs.models import BuildRequest, EnvRecord, NodeEnvState, Phase, Target
from ray_envs.planning import EnvUse
from ray_envs.settings import Settings
from ray_envs.store import Store
from ray_envs.upkeep import Upkeep

#: The first pause before a failed download is tried again; it doubles. A guess.
_RETRY_PAUSE_S = 1.0
#: How uv reports ENOSPC; uv has no exit code for it, and may have freed the space again.
_NO_SPACE = f"os error {errno.ENOSPC}"


class NodeAgent:
    """The environments of one node. All methods are keyword-only and return plain data.

    Args:
        settings: as `Settings.to_environment` writes them.
        node_id: the Ray node this runs on, or "local" without a cluster.
        ray_version: the cluster's.
    """

    def __init__(self, *, settings: dict[str, str], node_id: str, ray_version: str) -> None:
        self._settings = Settings.from_environment(settings)
        self._node_id = node_id
        self._target = this_target(ray_version)
        self._store = Store(self._settings)
        self._builder = Builder(self._settings, self._store.cache)
        self._upkeep = Upkeep(self._settings, self._store, self._builder)
        self._states: dict[str, NodeEnvState] = {}
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
        return {
            "node_id": self._node_id,
            "platform": this_platform().model_dump(mode="json"),
            "target": self._target.model_dump(mode="json"),
            "root": str(self._settings.root),
            "states": [state.model_dump(mode="json") for state in self._states.values()],
            "version": self._version,
            "error": error,
        }

    async def watch(self, *, seen: int, timeout_s: float) -> dict[str, Any]:
        """The states of all environments, as soon as there is something newer than `seen`.

        Returns after `timeout_s` seconds at the latest, changed or not. `seen=-1` returns at once.
        """
        self._forget_lost()
        await self._upkeep.renew()
        async with self._changed:
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: self._version > seen), timeout_s
                )
        return {
            "version": self._version,
            "states": [state.model_dump(mode="json") for state in self._states.values()],
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
        """Resolve a project; returns the text of its uv.lock, uv's words and how long it took.

        Raises:
            ResolutionFailed, UvFailed, StorageFailed: see `Builder.resolve`.
        """
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
                    raise self._blamed(exc) from exc
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

    async def ensure(self, *, request: dict[str, Any], attempt: int) -> dict[str, Any]:
        """Begin to make an environment ready, unless it is or is being made; returns its state."""
        wanted = BuildRequest.model_validate(request)
        task = self._tasks.get(wanted.key)
        if task is None or task.done():
            record = self._store.record(wanted.key)
            if record is not None:
                self._store.renew(wanted.key)
                await self._tell(wanted.key, Phase.READY, attempt=attempt, how=record.how)
            else:
                await self._tell(wanted.key, Phase.WAITING, attempt=attempt)
                self._tasks[wanted.key] = asyncio.create_task(self._make_ready(wanted, attempt))
        return self._states[wanted.key].model_dump(mode="json")

    async def try_start(self, *, key: str, env_vars: dict[str, str]) -> None:
        """Start the interpreter of `key` with these variables.

        Raises:
            InvalidInput: it does not start; `detail` is what it said.
        """
        await self._builder.try_start(self._store.python(key), env_vars)

    async def inventory(self) -> dict[str, Any]:
        """What this node has, and when it was used last; see `Upkeep.inventory`."""
        return await self._upkeep.inventory()

    async def users(self, *, keys: list[str]) -> dict[str, list[dict[str, Any]]]:
        """Which processes hold each of `keys`."""
        return await self._upkeep.users(keys)

    async def collect(self, *, key: str, planned: dict[str, Any]) -> int:
        """Remove an environment; returns the freed bytes; see `Upkeep.collect`."""
        freed = await self._upkeep.collect(key, planned=EnvUse.model_validate(planned))
        self._forget_lost()
        return freed

    async def prune_cache(self, *, needed: dict[str, list[str]]) -> dict[str, Any]:
        """Prune uv's cache; see `Upkeep.prune_cache`."""
        await self._set_up()
        return await self._upkeep.prune_cache(needed)

    async def check(self, *, request: dict[str, Any], repair: bool) -> dict[str, Any]:
        """Check an environment, and mend it where that is wanted; see `Upkeep.check`."""
        await self._set_up()
        told = await self._upkeep.check(BuildRequest.model_validate(request), repair=repair)
        self._forget_lost()
        return told

    async def probe(self, *, expected: dict[str, Any], index_project: str) -> list[Any]:
        """What this node can do; see `Upkeep.probe`."""
        return await self._upkeep.probe(
            Target.model_validate(expected), self._target, index_project
        )

    async def stop(self) -> None:
        """End every build; what is half-built has no record and is cleared by the next one."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

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
            self._is_set_up = True

    async def _make_ready(self, request: BuildRequest, attempt: int) -> None:
        started = time.monotonic()
        try:
            await self._set_up()
            async with self._slots, self._store.lock(request.key):
                record = self._store.record(request.key)  # another process may have been first
                if record is None:
                    record = await self._build(request, attempt)
            await self._tell(
                request.key,
                Phase.READY,
                attempt=attempt,
                how=record.how,
                duration_s=time.monotonic() - started,
            )
        except Exception as exc:
            error: RayEnvsError = RayEnvsError(f"{type(exc).__name__}: {exc}")
            if isinstance(exc, RayEnvsError):
                error = exc
            elif isinstance(exc, OSError):
                error = StorageFailed(f"{exc}")
            await self._fail(request.key, attempt, error, started)
        except asyncio.CancelledError:
            await self._fail(request.key, attempt, UvFailed("the build was stopped"), started)
            raise

    async def _build(self, request: BuildRequest, attempt: int) -> EnvRecord:
        """Build at the final place; the caller holds the key's lock and found no record."""
        key, store, builder = request.key, self._store, self._builder
        started = time.monotonic()
        venv, site = store.venv(key), store.site_packages(key, request.target.python_minor)
        store.begin(key)

        def progress(phase: Phase, line: str = "") -> None:
            self._states[key] = NodeEnvState(key=key, phase=phase, progress=line, attempt=attempt)
            self._wake()

        try:
            with store.scratch(
                {"pyproject.toml": request.pyproject, "uv.lock": request.uv_lock}
            ) as project:

                async def link() -> float:
                    began_at = time.time()
                    await builder.sync(project, venv, request, is_offline=True)
                    return began_at

                progress(Phase.LINKING)
                how: Any = "linked"
                linked_at = 0.0
                if not self._settings.malware_check:  # what is cached was perhaps never checked
                    with suppress(UvFailed):
                        linked_at = await link()
                if not linked_at:
                    how, linked_at = "built", time.time()
                    await self._download(project, request, progress)
                late = builder.without_bytecode(site, before=linked_at)
                is_compiled = True
                if late:
                    progress(Phase.COMPILING, f"{len(late)} package{'s' * (len(late) > 1)}")
                    async with store.compile_lock():
                        is_compiled = await builder.compile(site, late)
                    # Links made before the byte-code was there do not show it: link once more.
                    progress(Phase.LINKING)
                    store.begin(key)
                    await link()
            progress(Phase.VERIFYING)
            store.install_hold(key, request.target.python_minor)
            await builder.verify(store.python(key), request, site)
        except UvFailed as exc:
            raise self._blamed(exc) from exc
        record = EnvRecord(
            key=key,
            python=request.target.python,
            ray=request.target.ray,
            platform=request.platform,
            packages=request.packages,
            lock_sha256=request.lock_sha256,
            uv=uv_version(),
            how=how,
            is_compiled=is_compiled,
            created_at=datetime.now(timezone.utc),
            duration_s=time.monotonic() - started,
        )
        store.commit(record)
        return record

    async def _download(self, project: Any, request: BuildRequest, progress: Any) -> None:
        pause_s = _RETRY_PAUSE_S
        for left in range(self._settings.uv_retries, -1, -1):
            # uv would take what a failed try left for complete: it checks names, not files.
            self._store.begin(request.key)
            progress(Phase.DOWNLOADING)
            try:
                await self._builder.sync(
                    project,
                    self._store.venv(request.key),
                    request,
                    is_offline=False,
                    on_line=lambda line: self._tell_download(line, progress),
                )
                return
            except UvFailed as exc:
                if not left or self._store.is_full() or _NO_SPACE in exc.detail:
                    raise
                progress(Phase.DOWNLOADING, f"trying again in {pause_s:g} s: {exc.message}")
                await asyncio.sleep(pause_s)
                pause_s *= 2

    @staticmethod
    def _tell_download(line: str, progress: Any) -> None:
        kind, _, rest = line.strip().partition(" ")
        if kind in ("Downloading", "Building"):  # the others are one for each package, or none's
            progress(Phase.DOWNLOADING, rest)

    def _blamed(self, exc: UvFailed) -> RayEnvsError:
        """`exc`, or the full disk behind it."""
        if self._store.is_full() or _NO_SPACE in exc.detail:
            return StorageFailed(
                f"the disk of {self._settings.root} is full",
                detail=exc.detail,
                hint="free space there, or set RAY_ENVS_ROOT to another file system",
            )
        return exc

    async def _fail(self, key: str, attempt: int, exc: RayEnvsError, started: float) -> None:
        error = exc.about(key=key, node_id=self._node_id).to_dict()
        duration_s = time.monotonic() - started
        await self._tell(key, Phase.FAILED, attempt=attempt, error=error, duration_s=duration_s)

    async def _tell(self, key: str, phase: Phase, **fields: Any) -> None:
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
