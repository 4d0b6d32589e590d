"""Makes one environment ready on one node: from uv's cache, from other nodes, from the index.

Each source is used only for wheels that the one before does not have. `agent` decides when, `uv`
runs the commands, `store` has the paths.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from ray_envs.decisions import locks
from ray_envs.disk import local_wheels
from ray_envs.errors import RayEnvsError, StorageFailed, UvFailed
from ray_envs.models import BuildRequest, EnvRecord, Installed, Phase
from ray_envs.node import bytecode, startup
from ray_envs.node.exchange import Exchange
from ray_envs.node.interpreter import this_platform, uv_version
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.node.worker_start import WorkerStart
from ray_envs.settings import Settings

#: The first pause before a failed download is tried again; it doubles. A guess.
_RETRY_PAUSE_S = 1.0
#: How uv reports ENOSPC; uv has no exit code for it, and may have freed the space again.
_NO_SPACE = f"os error {errno.ENOSPC}"

#: Called with the phase of a build, and the last line about it.
Progress = Callable[[Phase, str], None]
How = Literal["linked", "fetched", "built"]


@dataclass(eq=False)
class Provisioning:
    """The builds of one node."""

    _settings: Settings
    _store: Store
    _builder: Builder
    _exchange: Exchange
    _worker_start: WorkerStart

    #: Packages that a build is fetching; the event is set when it has them.
    _getting: dict[Installed, asyncio.Event] = field(default_factory=dict, init=False)

    async def make(
        self, request: BuildRequest, peers: Iterable[str], progress: Progress
    ) -> EnvRecord:
        """Build at the final place; the caller holds the key's lock and found no record."""
        key, store, builder = request.key, self._store, self._builder
        started = time.monotonic()
        venv, site = store.venv(key), store.site_packages(key, request.target.python_minor)
        store.begin(key)
        try:
            with store.scratch(_texts(request)) as project:
                how, linked_at = await self._install(project, venv, request, peers, progress)
                late = bytecode.without_bytecode(site, before=linked_at)
                is_compiled = True
                if late:
                    is_compiled = await self._compile(site, late, progress)
                    # Links made before the byte-code was there do not show it: link once more.
                    progress(Phase.LINKING, "")
                    store.begin(key)
                    await builder.sync(project, venv, request, is_offline=True)
            progress(Phase.VERIFYING, "")
            store.install_hold(key, request.target.python_minor)
            await startup.verify(self._settings, store.python(key), request, site)
            await self._worker_start.check(store.python(key), site)
        except UvFailed as exc:
            raise self.blamed(exc) from exc
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

    async def cache(self, request: BuildRequest, progress: Progress) -> None:
        """Get the wheels of an environment that this node shall not have, for other nodes.

        Raises:
            as `make`.
        """
        try:
            with self._store.scratch(_texts(request)) as project:
                venv = project / ".venv"
                _, linked_at = await self._install(project, venv, request, (), progress)
                site = venv / "lib" / f"python{request.target.python_minor}" / "site-packages"
                late = bytecode.without_bytecode(site, before=linked_at)
                if late:
                    await self._compile(site, late, progress)
        except UvFailed as exc:
            raise self.blamed(exc) from exc

    async def _install(
        self,
        project: Path,
        venv: Path,
        request: BuildRequest,
        peers: Iterable[str],
        progress: Progress,
    ) -> tuple[How, float]:
        """Install into `venv`; returns where the wheels came from, and when uv began to link."""
        await self._get_local(request, peers, progress)
        packages = self._packages(request)
        async with self._getting_alone(await self._exchange.lacking(packages)):
            return await self._got(project, venv, request, packages, peers, progress)

    async def _get_local(
        self, request: BuildRequest, peers: Iterable[str], progress: Progress
    ) -> None:
        """Get the local packages that this node lacks: only other nodes have them.

        Raises `UvFailed`: no peer gives one.
        """
        lacking = local_wheels.missing(self._settings.root, request.wheels)
        for wheel in lacking:
            progress(Phase.FETCHING, wheel.filename)
            content = await self._exchange.fetch_local(wheel, peers)
            await asyncio.to_thread(
                local_wheels.take, self._settings.root, [wheel], {wheel.sha256: content}
            )

    @asynccontextmanager
    async def _getting_alone(self, packages: list[Installed]) -> AsyncIterator[None]:
        """Wait while another build of this node gets any of `packages`; then others wait.

        Builds that begin at once lack the same wheels, Ray's for one: each uv would download them,
        and each would be sent them.
        """
        while busy := [self._getting[each] for each in packages if each in self._getting]:
            await busy[0].wait()
        mine = asyncio.Event()
        self._getting.update(dict.fromkeys(packages, mine))
        try:
            yield
        finally:
            for each in packages:
                self._getting.pop(each, None)
            mine.set()

    async def _got(
        self,
        project: Path,
        venv: Path,
        request: BuildRequest,
        packages: tuple[Installed, ...],
        peers: Iterable[str],
        progress: Progress,
    ) -> tuple[How, float]:
        how: How = "linked"
        reasons: list[str] = []
        if not self._settings.malware_check:  # what is cached was perhaps never checked
            if peers and await self._exchange.lacking(packages):
                progress(Phase.FETCHING, "")
                how = "fetched"
                reasons = await self._exchange.fetch(
                    packages, peers, lambda line: progress(Phase.FETCHING, line)
                )
            if not reasons:
                progress(Phase.LINKING, "")
                with suppress(UvFailed):
                    began_at = time.time()
                    await self._builder.sync(project, venv, request, is_offline=True)
                    return how, began_at
        began_at = time.time()
        try:
            await self._download(project, venv, request, progress)
        except UvFailed as exc:
            if not reasons:
                raise
            raise UvFailed(
                exc.message, detail="\n".join([*reasons, exc.detail]), hint=exc.hint
            ) from exc
        return "built", began_at

    def _packages(self, request: BuildRequest) -> tuple[Installed, ...]:
        """What comes from uv's cache, other nodes or an index: all but local packages."""
        found = locks.installed(
            request.uv_lock, this_platform(), extras=request.extras, groups=request.groups
        )
        local = {f"sha256:{wheel.sha256}" for wheel in request.wheels}
        return tuple(package for package in found if package.pin not in local)

    async def _compile(self, site: Path, late: list[str], progress: Progress) -> bool:
        progress(Phase.COMPILING, f"{len(late)} package{'s' * (len(late) > 1)}")
        async with self._store.compile_lock():
            return await self._builder.compile(site, late)

    async def _download(
        self, project: Path, venv: Path, request: BuildRequest, progress: Progress
    ) -> None:
        pause_s = _RETRY_PAUSE_S
        for left in range(self._settings.uv_retries, -1, -1):
            if venv == self._store.venv(request.key):
                # uv would take what a failed try left for complete: it checks names, not files.
                self._store.begin(request.key)
            progress(Phase.DOWNLOADING, "")
            try:
                await self._builder.sync(
                    project,
                    venv,
                    request,
                    is_offline=False,
                    on_line=lambda line: _tell_download(line, progress),
                )
                return
            except UvFailed as exc:
                if not left or self._store.is_full() or _NO_SPACE in exc.detail:
                    raise
                progress(Phase.DOWNLOADING, f"trying again in {pause_s:g} s: {exc.message}")
                await asyncio.sleep(pause_s)
                pause_s *= 2

    def blamed(self, exc: UvFailed) -> RayEnvsError:
        """`exc`, or the full disk behind it."""
        if self._store.is_full() or _NO_SPACE in exc.detail:
            return StorageFailed(
                f"the disk of {self._settings.root} is full",
                detail=exc.detail,
                hint="free space there, or set RAY_ENVS_ROOT to another file system",
            )
        return exc


def _texts(request: BuildRequest) -> dict[str, str]:
    return {"pyproject.toml": request.pyproject, "uv.lock": request.uv_lock}


def _tell_download(line: str, progress: Progress) -> None:
    kind, _, rest = line.strip().partition(" ")
    if kind in ("Downloading", "Building"):  # the others are one for each package, or none's
        progress(Phase.DOWNLOADING, rest)
