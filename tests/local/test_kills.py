"""kill -9 at every step of every verb loses nothing: each step is a parameter, with its name.

A step of ours is a change of the disk, of uv a stop point. The disk that a step leaves is the one
that the next step finds: whoever dies before each of them has died after each of them, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ray_envs import locks
from ray_envs.agent import NodeAgent
from ray_envs.cluster import LocalNodes
from ray_envs.errors import InvalidPackages
from ray_envs.manager import EnvManager
from ray_envs.models import Definition, EnvId
from ray_envs.registry import Registry
from ray_envs.settings import Settings
from ray_envs.store import Store
from ray_envs.testing import FakeUv
from tests.local.conftest import broken_promises, processes_of, wait_until
from tests.local.killing import END, Killer

#: The wheels and what the index says of them are in the cache: nothing has to wait for a network.
OFFLINE = {"UV_OFFLINE": "1"}

BARE = Definition().model_dump(mode="json")
SIX = Definition(packages=("six",)).model_dump(mode="json")
OLD_SIX = Definition(packages=("six==1.16.0",)).model_dump(mode="json")

Arguments = dict[str, Any]
Snapshot = dict[str, Any]


@dataclass(frozen=True)
class Verb:
    """A verb to die in, and what there is before it."""

    method: str
    arguments: Arguments
    #: What was done before, in words of `Lab.prepared`.
    before: tuple[str, ...]
    #: The environments that are on the disk, by name.
    there: tuple[str, ...] = ()
    #: What is damaged: "a file", "the interpreter".
    damage: str = ""


VERBS = {
    "create": Verb(
        "create_env", {"variant_id": "n", "spec": SIX, "wait_s": 60}, ("other",), ("bare",)
    ),
    "replace": Verb(
        "create_env",
        {"variant_id": "v", "spec": OLD_SIX, "replace": True},
        ("v", "other", "old"),
        ("bare", "six", "old"),
    ),
    "add": Verb("add_deps", {"variant_id": "v", "packages": ["six"]}, ("v", "other"), ("bare",)),
    "update": Verb(
        "update_deps",
        {"variant_id": "v", "packages": ["six==1.16.0"]},
        ("v", "v add", "other", "old"),
        ("bare", "six", "old"),
    ),
    "remove": Verb(
        "remove_deps",
        {"variant_id": "v", "packages": ["six"]},
        ("v", "v add", "other", "other remove"),
        ("bare", "six"),
    ),
    "rollback": Verb(
        "rollback_env", {"variant_id": "v", "to": 1}, ("v", "v add", "other"), ("bare", "six")
    ),
    "delete": Verb("delete_env", {"variant_id": "v"}, ("v", "v add", "other"), ("bare", "six")),
    "sync": Verb("sync_env", {"variant_id": "v"}, ("v", "other"), ("bare", "six"), "a file"),
    "gc": Verb("cleanup", {"idle_hours": 0}, ("v", "other"), ("bare", "six", "old")),
    "import": Verb("import_env", {"variant_id": "n", "wait_s": 60}, ("other",), ("bare", "six")),
    "pin": Verb("pin_env", {"variant_id": "v"}, ("v", "other"), ("bare", "six")),
    "promise": Verb(
        "get_environment", {"variant_id": "v", "job_id": "01"}, ("v", "other"), ("bare", "six")
    ),
}


class Lab:
    """One root that is put back to what a verb finds, as often as it is wanted."""

    def __init__(self, folder: Path, warm_cache: Path) -> None:
        self.settings = Settings(
            root=folder / "root", lock_timeout_s=60, tick_s=0.5, uv_retries=0, build_niceness=0
        )
        self.root, self.store = self.settings.root, Store(self.settings)
        self._pristine = folder / "pristine"
        self._pristine.mkdir()
        self.killer = Killer(folder / "log")
        self.keys: dict[str, str] = {}
        self.exported: dict[str, str] = {}
        self._befores: dict[tuple[str, ...], Path] = {}
        self._afters: dict[str, Snapshot] = {}
        self.root.mkdir()
        subprocess.run(["cp", "-al", warm_cache, self.store.cache], check=True)
        self._make_environments()

    def _make_environments(self) -> None:
        async def act(manager: EnvManager) -> None:
            for name, spec in (("bare", BARE), ("six", SIX), ("old", OLD_SIX)):
                told = await manager.create_env(variant_id=name, spec=spec, wait_s=60)
                self.keys[name] = told["key"]
            await manager.add_deps(variant_id="bare", packages=["six"])
            await manager.remove_deps(variant_id="bare", packages=["six"])
            self.exported.update((await manager.export_env(variant_id="six"))["files"])

        self.manage(act, is_offline=False)
        for key in self.keys.values():
            os.rename(self.store.folder / key, self._pristine / key)
        os.rename(self.store.cache, self._pristine / "uv-cache")
        shutil.rmtree(self.root)

    def manage(self, act: Callable[[EnvManager], Awaitable[Any]], *, is_offline: bool = True) -> Any:
        """What `act(manager)` returns, with a manager in this process."""

        async def main() -> Any:
            manager = EnvManager(
                settings=self.settings.to_environment(), nodes=LocalNodes(NodeAgent)
            )
            try:
                return await asyncio.wait_for(act(manager), 120)
            finally:
                await manager.stop()

        with pytest.MonkeyPatch.context() as patch:
            for name, value in OFFLINE.items() if is_offline else ():
                patch.setenv(name, value)
            return asyncio.run(main())

    # -- what a verb finds ------------------------------------------------------------------

    def put_back(self, verb: Verb) -> None:
        """Make the root what it is before `verb`."""
        if verb.before not in self._befores:
            self._lay_out(("bare", "six", "old"))
            self._befores[verb.before] = self._prepared(verb.before)
        self._lay_out(verb.there)
        shutil.rmtree(self.root / "envs", ignore_errors=True)
        subprocess.run(["cp", "-a", self._befores[verb.before], self.root / "envs"], check=True)
        site = self.store.site_packages(self.keys["bare"], "3.{}".format(*os.sys.version_info[1:2]))
        if verb.damage == "a file":
            self._stained = self.keys["bare"]
            victim = next(site.glob("packaging/version.py"))
            victim.unlink()
            victim.write_text("raise ImportError('damaged')\n")
        elif verb.damage == "the interpreter":
            self._stained = self.keys["bare"]
            (self.store.venv(self.keys["bare"]) / "bin" / "python").unlink()

    _stained = ""

    def _lay_out(self, names: tuple[str, ...]) -> None:
        """The environments of `names` and uv's cache, and no more."""
        self.root.mkdir(exist_ok=True)
        wanted = {self.keys[name] for name in names}
        self.store.folder.mkdir(exist_ok=True)
        for path in [*self.store.folder.iterdir(), *self.root.iterdir()]:
            if path in (self.store.folder, self.store.cache):
                continue
            if path.name in wanted and path.name != self._stained and self._is_pristine(path):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._stained = ""
        for key in wanted:
            if not (self.store.folder / key).exists():
                source = self._pristine / key
                subprocess.run(["cp", "-al", source, self.store.folder], check=True)
        if not self._is_cache_pristine():
            shutil.rmtree(self.store.cache, ignore_errors=True)
            subprocess.run(["cp", "-al", self._pristine / "uv-cache", self.root], check=True)

    def _is_pristine(self, path: Path) -> bool:
        record = path / "record.json"
        source = self._pristine / path.name / "record.json"
        return record.exists() and record.samefile(source)

    def _is_cache_pristine(self) -> bool:
        """Pruning takes from these folders; linking does not write there."""
        here, there = self.store.cache, self._pristine / "uv-cache"
        return all(
            sorted(os.listdir(here / each)) == sorted(os.listdir(there / each))
            for each in ("archive-v0", "wheels-v8/pypi")
            if (here / each).exists() or self.store.cache.exists()
        ) and here.exists()

    def _prepared(self, words: tuple[str, ...]) -> Path:
        async def act(manager: EnvManager) -> None:
            for word in words:
                name, _, what = word.partition(" ")
                if what == "add":
                    await manager.add_deps(variant_id=name, packages=["six"])
                elif what == "remove":
                    await manager.remove_deps(variant_id=name, packages=["six"])
                elif name == "old":
                    await manager.create_env(variant_id=name, spec=OLD_SIX, wait_s=60)
                else:
                    await manager.create_env(variant_id=name, spec=BARE, wait_s=60)
                    if name == "other":
                        await manager.add_deps(variant_id=name, packages=["six"])

        self.manage(act)
        place = self._pristine / f"envs-{len(self._befores)}"
        os.rename(self.root / "envs", place)
        return place

    def arguments(self, verb: Verb) -> Arguments:
        if verb.method != "import_env":
            return verb.arguments
        files = self.exported
        return {
            **verb.arguments,
            "pyproject": files["pyproject.toml"],
            "uv_lock": files["uv.lock"],
            "options": json.loads(files["options.json"]),
        }

    def run(self, verb: Verb, **options: Any) -> tuple[int, list[str]]:
        return self.killer.run(
            self.settings.to_environment(),
            verb.method,
            self.arguments(verb),
            environ=OFFLINE,
            **options,
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("kills"), warm_cache)
    yield made
    made.killer.close()


@pytest.mark.parametrize("name", VERBS)
def test_record(lab: Lab, name: str) -> None:
    import time
    t = time.monotonic()
    lab.put_back(VERBS[name])
    a = time.monotonic() - t
    t = time.monotonic()
    code, steps = lab.run(VERBS[name])
    b = time.monotonic() - t
    t = time.monotonic()
    lab.put_back(VERBS[name])
    c = time.monotonic() - t
    with open("/tmp/kk/steps", "a") as f:
        print("=====", name, code, len(steps), f"{a:.2f} {b:.2f} {c:.2f}", file=f)
        last = None
        for s in steps:
            base = s.partition(" #")[0]
            if base != last:
                print(s, file=f)
            last = base
    assert code == 0
