"""Checks, repairs and deletes the environments of one node, and prunes its uv cache.

Works under the same locks as the builds of `agent`. What may be deleted is decided by the manager
(`collecting`) and by the exclusive hold.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from typing import Any

from ray_envs.decisions.collecting import EnvUse
from ray_envs.disk import local_wheels
from ray_envs.errors import EnvironmentInUse, RayEnvsError, StorageFailed, UvFailed
from ray_envs.models import BuildRequest, EnvRecord, Target
from ray_envs.node import bytecode, mending, startup, unpacked_code, wheels
from ray_envs.node.interpreter import uv_version
from ray_envs.node.probing import probe
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.node.uv_cache import UvCache
from ray_envs.node.uv_trial import UvTrial
from ray_envs.node.wheels import Damage
from ray_envs.node.worker_start import WorkerStart
from ray_envs.settings import Settings

#: How often the last use of held environments is renewed. Short against any idle limit.
_RENEW_S = 60.0
#: How long uv may take to answer whether it reaches the package index.
_INDEX_TIMEOUT_S = 60.0
#: The damage of an environment that has to be built again as a whole.
_GONE = Damage(package="", path=".", kind="missing")
#: How many damaged files are listed.
_TOLD = 50


class Maintenance:
    """Keeps the environments of one node whole."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        builder: Builder,
        worker_start: WorkerStart,
        uv_trial: UvTrial,
    ) -> None:
        self._settings = settings
        self._uv_trial = uv_trial
        self._worker_start = worker_start
        self._store = store
        self._builder = builder
        self._cache = UvCache(store.cache, lock_timeout_s=settings.lock_timeout_s)
        self._renewed_at = 0.0

    async def renew(self) -> None:
        """Say of held environments that they are used now, once in a while."""
        if time.monotonic() - self._renewed_at > _RENEW_S:
            self._renewed_at = time.monotonic()
            await asyncio.to_thread(self._store.renew_held)

    async def inventory(self) -> dict[str, Any]:
        """Every directory of the store as `uses`, and `now`, by the same clock.

        A collection begins with it, and so does the sweep of unpacked code.
        """
        await asyncio.to_thread(unpacked_code.sweep, self._store.root)
        uses = await asyncio.to_thread(self._store.inventory)
        return {"now": time.time(), "uses": [use.model_dump(mode="json") for use in uses]}

    async def collect(self, key: str, *, planned: EnvUse) -> int:
        """Remove an environment; returns the bytes that were freed.

        Raises:
            EnvironmentInUse: a process holds it, or it was used or built since.
            LockTimeout: it is being built.
        """
        async with self._store.lock(key):
            there = await asyncio.to_thread(self._store.use, key)
            if there is None:
                return 0
            if there.last_used_at > planned.last_used_at or there.is_ready > planned.is_ready:
                raise EnvironmentInUse(f"the environment {key} was used meanwhile", key=key)
            return await asyncio.to_thread(self._store.discard, key) or 0

    async def prune_cache(
        self, needed: Mapping[str, list[str]], local: list[str] | None
    ) -> dict[str, Any]:
        """Remove from uv's cache what neither `needed` nor an environment of this node has.

        Local packages go if their sha256 is not in `local`; all stay if that is None.

        Raises `LockTimeout`: uv works for longer than we wait.
        """
        keep = {name: set(versions) for name, versions in needed.items()}
        for record in (await asyncio.to_thread(self._store.records)).values():
            for name, version in record.packages.items():
                keep.setdefault(name, set()).add(version)
        entries, freed = await asyncio.to_thread(self._cache.forget_unneeded, keep)
        if local is not None:
            freed += await asyncio.to_thread(local_wheels.sweep, self._store.root, local)
        output = await self._builder.prune_cache()
        return {"entries": entries, "freed_bytes": freed, "output": output}

    async def check(self, request: BuildRequest, *, repair: bool) -> dict[str, Any]:
        """Compare an environment with the RECORDs of its wheels and, on request, repair it.

        Returns:
            `is_ready`: whether it has a record. `damage`: what was found. `left`: what is still
            damaged. `sharers`: the keys of environments with the same damaged files.
            `is_discarded`: whether it was given up, and has to be built again. `error`: it can
            only be built again, and a living process holds it; or no worker can start in it.
        """
        key, store = request.key, self._store
        began = time.monotonic()
        async with store.lock(key):
            record = store.record(key)
            damage, left, shared, is_discarded = [_GONE], [_GONE], [], False
            error = None
            if record is None and repair:  # `agent` clears what is left of it, and builds
                left, is_discarded = [], True
            elif record is not None:
                damage = await self._damage(record, request)
                left = damage
                shared = await self._sharers(key, request, damage)
                if damage and repair:
                    try:
                        left, is_discarded = await self._mend(request, damage)
                    except EnvironmentInUse as exc:
                        error = exc.to_dict()
                if error is None and not is_discarded:
                    found = await self.start_error(record)
                    error = found.to_dict() if found is not None else None
        return {
            "is_ready": record is not None,
            "damage": [each.model_dump() for each in damage[:_TOLD]],
            "damaged_files": len(damage),
            "left": [each.model_dump() for each in left[:_TOLD]],
            "sharers": shared,
            "is_discarded": is_discarded,
            "error": error,
            "duration_s": time.monotonic() - began,
        }

    async def _damage(self, record: EnvRecord, request: BuildRequest) -> list[Damage]:
        """What is wrong with a ready environment, its interpreter included."""
        site = self._store.site_packages(record.key, request.target.python_minor)
        found = []
        try:
            found = await asyncio.to_thread(wheels.inspect, site, packages=record.packages)
        except RayEnvsError:  # the folder itself is gone
            found = [_GONE]
        try:
            with self._store.no_use(record.key):
                await startup.verify(self._settings, self._store.python(record.key), request, site)
        except (RayEnvsError, OSError):
            found.append(Damage(package="", path="../../../bin/python", kind="changed"))
        return found

    async def start_error(self, record: EnvRecord) -> RayEnvsError | None:
        """Why no Ray worker can start in an environment that matches its lock; None if one can."""
        site = self._store.site_packages(record.key, ".".join(record.python.split(".")[:2]))
        try:
            with self._store.no_use(record.key):
                await self._worker_start.check(self._store.python(record.key), site, is_forced=True)
        except RayEnvsError as exc:
            return exc
        return None

    async def _sharers(self, key: str, request: BuildRequest, damage: list[Damage]) -> list[str]:
        minor = request.target.python_minor
        others = {
            self._store.site_packages(other, minor): other
            for other in await asyncio.to_thread(self._store.records)
            if other != key
        }
        site = self._store.site_packages(key, minor)
        found = await asyncio.to_thread(mending.sharers, site, damage, others)
        return sorted(others[path] for path in found)

    async def _mend(self, request: BuildRequest, damage: list[Damage]) -> tuple[list[Damage], bool]:
        """Repair in place, or discard the environment. The caller holds its lock.

        Returns what is left, and whether it has to be built again.
        """
        key, store = request.key, self._store
        site = store.site_packages(key, request.target.python_minor)
        odd: set[str] = set()
        try:
            _, to_fetch = await asyncio.to_thread(mending.mend, site, damage, self._cache)
            if to_fetch:
                await self._fetch(request)
                # A wheel that was just fetched and differs from its own RECORD was published so.
                _, again = await asyncio.to_thread(mending.mend, site, damage, self._cache)
                odd = set(again)
        except (RayEnvsError, OSError):  # no network, a folder that is gone: build it again
            pass
        record = store.record(key)
        left = await self._damage(record, request) if record is not None else damage
        # A file that a payload left stays; a package that the lock does not have is another
        # environment than was promised.
        beyond = [
            each
            for each in left
            if (each.package if each.kind == "extra" else each.package not in odd)
        ]
        if not beyond:
            return left, False
        try:
            await asyncio.to_thread(store.discard, key)
        except EnvironmentInUse as exc:
            raise EnvironmentInUse(
                f"the environment {key} is damaged and in use: it cannot be built again now",
                key=key,
                detail="\n".join(
                    [
                        *(f"{each.kind} {each.package} {each.path}" for each in beyond[:9]),
                        exc.detail,
                    ]
                ),
                hint="end the processes that `ray-envs explain` names, then sync again",
            ) from exc
        return [], True

    async def _fetch(self, request: BuildRequest) -> None:
        """Fetch into uv's cache whatever it lacks of a lock."""
        files = {"pyproject.toml": request.pyproject, "uv.lock": request.uv_lock}
        with self._store.scratch(files) as project:
            venv = project / ".venv"
            await self._builder.sync(project, venv, request, is_offline=False)
            site = venv / "lib" / f"python{request.target.python_minor}" / "site-packages"
            late = bytecode.without_bytecode(site, before=time.time())
            async with self._store.compile_lock():
                await self._builder.compile(site, late)

    async def users(self, keys: list[str]) -> dict[str, list[dict[str, Any]]]:
        """The processes that hold each key, without keys that are not held."""
        found = {key: await asyncio.to_thread(self._store.users, key) for key in keys}
        return {key: users for key, users in found.items() if users}

    async def probe(self, expected: Target, actual: Target, index_project: str) -> list[Any]:
        """What the node can do; see `probing`. With `index_project`, also ask the package index."""
        uv_problem = ""
        try:
            await self._uv_trial.check(is_forced=True)
        except UvFailed as exc:
            uv_problem = exc.message
        except StorageFailed:  # the probes of the disk say so
            pass
        found = await asyncio.to_thread(
            probe,
            self._store.root,
            self._store.cache,
            self._store.folder,
            min_free_bytes=self._settings.min_free_bytes,
            expected=expected,
            actual=actual,
            uv=uv_version(),
            uv_problem=uv_problem,
        )
        told = [each.model_dump() for each in found]
        if index_project:
            told.append(await self._index_probe(index_project))
        return told

    async def _index_probe(self, pyproject: str) -> dict[str, Any]:
        name = "package index"
        if os.environ.get("UV_OFFLINE", "0") not in ("", "0", "false"):
            return {"name": name, "ok": True, "value": "not asked: UV_OFFLINE is set", "hint": ""}
        try:
            with self._store.scratch({"pyproject.toml": pyproject}) as project:
                await self._builder.check_index(project, _INDEX_TIMEOUT_S)
        except RayEnvsError as exc:
            last = (exc.detail or exc.message).strip().splitlines()[-1]
            return {"name": name, "ok": False, "value": last, "hint": exc.hint}
        return {"name": name, "ok": True, "value": "answers", "hint": ""}
