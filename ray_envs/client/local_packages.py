"""Builds local packages: a project's own one, workspace members, path and editable sources.

They become wheels here, where their files are; each node gets the wheels. What stays as it was is
not built again by this process.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import warnings
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ray_envs.client.source_states import state_of
from ray_envs.client.workspaces import Workspace, pyproject_of
from ray_envs.decisions import local_sources, local_wheels
from ray_envs.decisions.entries import Local
from ray_envs.decisions.local_sources import ENVIRONMENT, LocalSource, Replacement
from ray_envs.decisions.local_wheels import Described
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.decisions.requirements import requirement_line
from ray_envs.decisions.sources import Asked
from ray_envs.disk.files import kind_of, read_at_most, unreadable
from ray_envs.errors import InvalidInput, RayEnvsWarning
from ray_envs.manager.fleet import ended
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.settings import Settings
from ray_envs.specs import LocalWheel

T = TypeVar("T")

_SETUP_FILES = ("setup.py", "setup.cfg")
_ARCHIVES = (".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz")
#: The wheels that this process has built, by path and state of the files; the newest last.
_BUILT: dict[tuple[str, str], Described] = {}
_KEPT_BYTES = 2 * local_wheels.LIMIT_BYTES
_guard = threading.RLock()
_told: set[str] = set()


@dataclass
class LocalPackages:
    """The local packages of one definition."""

    _settings: Settings = field(default_factory=Settings.from_environment)
    _by_name: dict[str, tuple[Path, Described]] = field(default_factory=dict, init=False)
    #: What they require from other sources; see `Replacement`.
    _requirements: dict[str, None] = field(default_factory=dict, init=False)
    _sources: dict[str, Any] = field(default_factory=dict, init=False)
    _indexes: list[dict[str, Any]] = field(default_factory=list, init=False)
    _seen: set[Path] = field(default_factory=set, init=False)

    @property
    def wheels(self) -> tuple[LocalWheel, ...]:
        return tuple(built.wheel for _, (_, built) in sorted(self._by_name.items()))

    def of_project(self, folder: Path, text: str, *, install: bool | None) -> str:
        """Return the text of a project with wheels in place of all its local packages.

        Args:
            folder: the folder of the project.
            text: its pyproject.toml; "" if it has none.
            install: whether its own package is one of them; None if it has a build system.

        Raises:
            InvalidInput: a local source does not exist, or cannot be used.
            InvalidPackages: a package cannot be built.
            UvFailed, StorageFailed: that could not be done now.
        """
        where = str(folder / "pyproject.toml")
        data = parsed_toml(text, where=where)
        local_sources.check_shapes(data, where=where)
        workspace = Workspace.of(folder, data)
        own = None
        if install is None:
            install = local_sources.is_package(data, has_setup_files=has_setup_files(folder))
        if install:
            self._seen.add(Path(os.path.abspath(folder)))  # its sources are those of `data`
            own = self.add(folder, where=where)
        if workspace is not None and "project" not in data and not install:
            raise InvalidInput(
                "this is the root of a workspace, not a project",
                where=where,
                hint=f"name the folder of a member: {', '.join(sorted(workspace.members))}",
            )
        wheels = {
            source: self._of_source(source, folder, workspace, where=where)
            for source in local_sources.local_sources(data, where=where)
        }
        inherited = self._inherited(data, workspace)
        if not self._by_name and workspace is None:
            return text
        named = {source.name for source in wheels}
        wheels |= {source: built for source, built in inherited.items() if source.name not in named}
        new = self._replacement(wheels)
        new = replace(new, project=own, workspace=workspace.uv if workspace is not None else {})
        return local_sources.replaced(text, new, where=where)

    def of_files(self, asked: Asked, locals_: Iterable[tuple[Local, Path]], folder: Path) -> Asked:
        """Return what files ask for, with wheels in place of their local entries.

        Args:
            asked: what they ask for.
            locals_: the local entries, each with the folder that its path is relative to.
            folder: what the sources in the text of `asked` are relative to.

        Raises as `of_project`.
        """
        where = "tool.uv.sources"
        text = asked.pyproject or f'[project]\nname = "{ENVIRONMENT}"\nversion = "0"\n'
        done = {wheel.path for wheel in self.wheels}  # of the project that `text` is
        wheels = {
            source: self._of_source(source, folder, None, where=where)
            for source in local_sources.local_sources(parsed_toml(text, where=where), where=where)
            if source.path not in done
        }
        lines = [self._line_of(local, base) for local, base in locals_]
        if not self._by_name:
            return asked
        own = {wheel.name: (f"sha256:{wheel.sha256}",) for wheel in self.wheels}
        return replace(
            asked,
            packages=tuple(sorted({*asked.packages, *lines})),
            pyproject=local_sources.replaced(text, self._replacement(wheels), where=where),
            hashes={**asked.hashes, **own} if asked.hashes else {},
        )

    def _replacement(self, wheels: Mapping[LocalSource, Described]) -> Replacement:
        """What takes the place of local sources: their `wheels`, and those that these require."""
        named = {source.name for source in wheels}
        others = {
            LocalSource(name, 0, None, is_editable=False): built
            for name, (_, built) in self._by_name.items()
            if name not in named
        }
        return Replacement(
            wheels={**wheels, **others},
            names=tuple(sorted(self._by_name)),
            requirements=tuple(self._requirements),
            sources=self._sources,
            indexes=tuple(self._indexes),
        )

    def _line_of(self, local: Local, folder: Path) -> str:
        """The requirement that stands for a local entry."""
        built = self.add(folder / os.path.expanduser(local.path), where=local.where)
        name = built.wheel.name
        if local.name is not None and local.name != name:
            raise InvalidInput(f"{local.path} is the package {name}", where=local.where)
        extras = f"[{','.join(local.extras)}]" if local.extras else ""
        line = f"{name}{extras}" + (f" ; {local.marker}" if local.marker else "")
        return requirement_line(line, where=local.where)

    def add(self, path: Path, *, where: str, is_editable: bool = False) -> Described:
        """Return the wheel of a folder, a wheel or a source archive, and build it if need be."""
        path = Path(os.path.abspath(path))
        kind = kind_of(path)
        if kind == "missing":
            raise InvalidInput(
                f"the local package {path} does not exist", where=where, hint="correct its path"
            )
        if is_editable and str(path) not in _told:
            _told.add(str(path))
            warnings.warn(
                f"{path} is editable: the environment gets it as it is now",
                RayEnvsWarning,
                stacklevel=2,
            )
        built = _wheel_of(path) if path.suffix == ".whl" else self._built(path, where=where)
        name = built.wheel.name
        before = self._by_name.setdefault(name, (path, built))
        if before[1].wheel.sha256 != built.wheel.sha256:
            raise InvalidInput(
                f"{name} has two local sources: {before[0]} and {path}",
                where=where,
                hint="name one of them; local packages that differ by a marker are not supported",
            )
        if kind == "folder" and before[0] == path and path not in self._seen:
            self._seen.add(path)
            self._add_sources_of(path)
        return built

    def _of_source(
        self, source: LocalSource, folder: Path, workspace: Workspace | None, *, where: str
    ) -> Described:
        place = f"{where}: tool.uv.sources.{source.name}"
        if source.path is not None:
            path = folder / os.path.expanduser(source.path)
        elif workspace is not None:
            path = workspace.member(source.name, where=place)
        else:
            raise InvalidInput(
                "the project belongs to no workspace",
                where=place,
                hint='give a path: { path = "../lib" }',
            )
        built = self.add(path, where=place, is_editable=source.is_editable)
        if built.wheel.name != source.name:
            raise InvalidInput(f"{path} is the package {built.wheel.name}", where=place)
        return built

    def _inherited(
        self, data: Mapping[str, Any], workspace: Workspace | None
    ) -> dict[LocalSource, Described]:
        """What a member gets from the sources of its workspace's root; others of them are noted."""
        if workspace is None or workspace.uv is data.get("tool", {}).get("uv"):
            return {}
        where, root = str(workspace.root / "pyproject.toml"), {"tool": {"uv": workspace.uv}}
        needed = local_sources.required(data)
        found = {
            source: self._of_source(source, workspace.root, workspace, where=where)
            for source in local_sources.local_sources(root, where=where)
            if source.name in needed
        }
        _, sources = local_sources.other_sources(data, workspace.uv, where=where)
        for name, given in sources.items():  # the project itself requires them
            self._sources.setdefault(name, given)
        return found

    def _add_sources_of(self, folder: Path) -> None:
        """Add what a local package requires from local sources, and note its other sources."""
        data = pyproject_of(folder)
        where = str(folder / "pyproject.toml")
        workspace = Workspace.of(folder, data)
        for source in local_sources.local_sources(data, where=where):
            self._of_source(source, folder, workspace, where=where)
        self._inherited(data, workspace)
        own = data.get("tool", {}).get("uv", {})
        for uv in (own, workspace.uv if workspace is not None else {}):
            requirements, sources = local_sources.other_sources(data, uv, where=where)
            self._requirements.update(dict.fromkeys(requirements))
            for name, given in sources.items():
                self._sources.setdefault(name, given)
            if sources:
                self._indexes += [index for index in uv.get("index", []) if "name" in index]

    def _built(self, path: Path, *, where: str) -> Described:
        """Return the wheel of a folder or a source archive."""
        is_archive = kind_of(path) == "file" and path.name.endswith(_ARCHIVES)
        if not is_archive and kind_of(path) != "folder":
            raise InvalidInput(
                f"{path} is neither a folder, nor a wheel, nor a source archive", where=where
            )
        with _guard:  # two variants of one project: one build
            state = state_of(path)
            found = _BUILT.pop((str(path), state), None)
            if found is None:
                found = self._build(path)
            _BUILT[str(path), state] = found
            while sum(each.wheel.size for each in _BUILT.values()) > _KEPT_BYTES:
                _BUILT.pop(next(iter(_BUILT)))
        _refuse_local_urls(found, where=str(path))
        return found

    def _build(self, path: Path) -> Described:
        store = Store(self._settings)
        store.set_up()
        builder = Builder(self._settings, store.cache)
        with tempfile.TemporaryDirectory(prefix="ray_envs-") as folder:
            file = _ended(builder.build_wheel(path, Path(folder)))
            local_wheels.check_size(file.stat().st_size, where=str(path))
            content = local_wheels.normalised(file.read_bytes(), where=str(path))
        return local_wheels.described(file.name, content, where=str(path))


def has_setup_files(folder: Path) -> bool:
    """Whether setuptools alone can build the folder."""
    return any(kind_of(folder / name) == "file" for name in _SETUP_FILES)


def _wheel_of(path: Path) -> Described:
    try:
        content = read_at_most(path, local_wheels.LIMIT_BYTES + 1)
    except OSError as exc:
        raise unreadable(path, exc) from None
    return local_wheels.described(path.name, content, where=str(path))


def _refuse_local_urls(built: Described, *, where: str) -> None:
    for text in built.requires:
        if "file:" in text.partition(";")[0]:
            raise InvalidInput(
                f"{built.wheel.name} requires a path of this machine: {text}",
                where=where,
                hint="name the package only, and its path in [tool.uv.sources]",
            )


def _ended(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, from any thread: an event loop may run in the caller's."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:  # Ctrl-C: the build ends with it
        future.cancel()
        raise
    finally:
        asyncio.run_coroutine_threadsafe(_all_ended(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _all_ended() -> None:
    await ended(asyncio.all_tasks() - {asyncio.current_task()})
