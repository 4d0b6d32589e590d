"""A full disk and a read-only root: a clear error at any moment, and what there was still runs.

The roots are small file systems in memory that these tests mount, fill and unmount.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ray_envs.cluster.nodes import LocalNodes
from ray_envs.errors import RayEnvsError, StorageFailed
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.node.agent import NodeAgent
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.testing import FakeUv
from tests.local.conftest import broken_promises, processes_of, wait_until

#: What is free on the disk before it is filled: more than any verb here needs.
_ROOM = 64 * 2**20
#: How long anything may take.
WAIT_S = 60

BARE = Definition().model_dump(mode="json")
SIX = Definition(packages=("iniconfig", "six")).model_dump(mode="json")
OLD_SIX = Definition(packages=("six==1.16.0",)).model_dump(mode="json")

Act = Callable[[EnvManager], Awaitable[Any]]


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A file system in memory at `folder`, gone after the block whatever happened in it."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    folder.mkdir()
    try:
        run("mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", folder)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"this machine does not let root mount a small disk: {exc}")
    try:
        yield
    finally:
        try:
            run("umount", folder)
        except subprocess.CalledProcessError:  # somebody still has a file open there
            run("umount", "--lazy", folder)
            raise


class Disk:
    """A small disk whose root has two variants: `v` (two generations) and `other`."""

    def __init__(self, folder: Path, warm_cache: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"
        self.settings = Settings(
            root=folder / "root",
            lock_timeout_s=20,
            tick_s=0.5,
            uv_retries=0,
            build_niceness=0,
            min_free_bytes=2**20,
        )
        self.store = Store(self.settings)
        self.settings.root.mkdir()
        run("cp", "-a", warm_cache, self.store.cache)

        async def act(manager: EnvManager) -> dict[str, str]:
            keys = {}
            for name, spec in (("other", BARE), ("doomed", OLD_SIX), ("v", BARE)):
                told = await manager.create_env(variant_id=name, spec=spec, wait_s=WAIT_S)
                keys[name] = told["key"]
            told = await manager.add_deps(variant_id="v", packages=["iniconfig"])
            await manager.delete_env(variant_id="doomed")
            await manager.cleanup()  # nothing is old enough
            return {**keys, "v": told["key"]}

        self.keys: dict[str, str] = self.manage(act)

    def manage(self, act: Act) -> Any:
        """What `act(manager)` returns."""

        async def main() -> Any:
            manager = EnvManager(
                settings=self.settings.to_environment(), nodes=LocalNodes(NodeAgent)
            )
            try:
                return await asyncio.wait_for(act(manager), 2 * WAIT_S)
            finally:
                await manager.stop()

        return asyncio.run(main())

    def fill(self) -> None:
        """Leave not one free page, whatever has been written meanwhile."""
        with open(self._filler, "ab", buffering=0) as file:
            size = 2**20
            while size:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    size //= 2
        assert shutil.disk_usage(self.folder).free == 0
        told = os.statvfs(self.folder)  # a file system in memory has inodes of a fixed number, too
        run("mount", "-o", f"remount,nr_inodes={told.f_files - told.f_ffree}", self.folder)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)
        run("mount", "-o", "remount,nr_inodes=1m", self.folder)

    @contextmanager
    def history_in_use(self) -> Iterator[None]:
        """Somebody reads the history: SQLite frees nothing where a manager lets go of it."""
        with closing(sqlite3.connect(self.settings.root / "history.db")) as reader:
            reader.execute("SELECT COUNT(*) FROM events").fetchone()
            yield

    def limit(self) -> None:
        """Make the disk as small as what is on it, and a little."""
        used = shutil.disk_usage(self.folder).used
        run("mount", "-o", f"remount,size={used + _ROOM}", self.folder)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        run("mount", "-o", "remount,ro", self.folder)
        try:
            yield
        finally:
            run("mount", "-o", "remount,rw", self.folder)

    def check_runs(self) -> None:
        """The current generation of `v` starts, and has its packages."""
        done = subprocess.run(
            [self.store.python(self.keys["v"]), "-c", "import iniconfig, msgpack; print('runs')"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (0, "runs\n"), done.stderr


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Disk:
    """A disk as every test finds it; its content is kept beside it."""
    folder = tmp_path_factory.mktemp("disks") / "disk"
    with mounted(folder):
        disk = Disk(folder, warm_cache)
        run("cp", "-a", disk.settings.root, folder.with_name("content"))
    folder.rmdir()
    return disk


@pytest.fixture
def disk(pristine: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk with room for what a verb needs; after the test, every promise must hold."""
    monkeypatch.setenv("UV_OFFLINE", "1")
    with mounted(pristine.folder):
        try:
            run("cp", "-a", pristine.folder.with_name("content"), pristine.settings.root)
            pristine.limit()
            yield pristine
            root = pristine.settings.root
            wait_until(lambda: processes_of(root) == [], "every process is gone")
            assert broken_promises(pristine.settings) == []
        finally:
            pristine.empty()
    pristine.folder.rmdir()


@dataclass(frozen=True)
class Verb:
    """A verb, and what uv does for it."""

    method: str
    arguments: dict[str, Any]
    commands: tuple[str, ...] = ()
    #: Whether it needs no space: it makes some.
    frees: bool = False


VERBS = {
    "create": Verb(
        "create_env", {"variant_id": "n", "spec": SIX, "wait_s": WAIT_S}, ("lock", "sync")
    ),
    "add": Verb("add_deps", {"variant_id": "v", "packages": ["six"]}, ("lock", "sync")),
    "rollback": Verb("rollback_env", {"variant_id": "v", "to": 1}),
    "rollback to what is gone": Verb("rollback_env", {"variant_id": "v", "to": 1}, ("sync",)),
    "sync": Verb("sync_env", {"variant_id": "other"}, ("sync",)),
    "gc": Verb("cleanup", {"idle_hours": 0}, ("cache",), frees=True),
    "delete": Verb("delete_env", {"variant_id": "v"}, frees=True),
}


def definitions(disk: Disk) -> dict[str, Any]:
    """Every variant as it is defined; raises where one is damaged."""
    damaged: list[StorageFailed] = []
    registry = Registry(disk.settings)
    found = {
        str(r.env_id): (r, registry.lock_text(r.env_id, r.current.number))
        for r in registry.all(damaged=damaged)
    }
    assert damaged == []
    return found


def prepare(disk: Disk, name: str) -> None:
    """Take away what the verb shall make again."""
    if name in ("sync", "rollback to what is gone"):
        disk.store.discard(disk.keys["other"])


@pytest.mark.parametrize(
    ("name", "command", "is_done"),
    [
        pytest.param(name, command, is_done, id=f"{name}, {when} {command}".rstrip())
        for name, verb in VERBS.items()
        for command, is_done, when in (
            ("", False, "from the start"),
            *((c, d, w) for c in verb.commands for d, w in ((False, "before"), (True, "after"))),
        )
    ],
)
def test_a_disk_that_fills_up_is_named_and_takes_nothing_away(
    disk: Disk, fake_uv: FakeUv, name: str, command: str, is_done: bool
) -> None:
    verb = VERBS[name]
    prepare(disk, name)
    before = definitions(disk)
    stop = fake_uv.hang(command, is_done=is_done) if command else None

    async def act(manager: EnvManager) -> Any:
        async def ask() -> Any:
            return await getattr(manager, verb.method)(**verb.arguments)

        await manager.describe()
        if stop is None:
            disk.fill()
        asked = asyncio.ensure_future(ask())
        if stop is not None:
            await until(stop.reached.exists, f"uv {command}")
            disk.fill()
            stop.open()
        if verb.frees:
            return await asked
        with pytest.raises(StorageFailed) as caught:
            await asked
        assert (caught.value.exit_code, caught.value.retryable) == (11, False)
        assert "RAY_ENVS_ROOT" in caught.value.hint
        assert "free space" in caught.value.hint
        assert definitions(disk) == before
        disk.fill()  # what the failure gave back, too
        assert (await manager.get_env_status(variant_id="v"))["generation"] == 2
        disk.check_runs()
        disk.empty()
        return await ask()

    with disk.history_in_use():
        answer = disk.manage(act)
    disk.check_runs()
    if not verb.frees:
        assert answer["status"] == "ACTIVE"
    elif name == "gc":
        assert disk.keys["doomed"] not in disk.store.records()
        assert answer["freed_bytes"] > 0
    else:
        assert set(definitions(disk)) == {"other"}
    disk.empty()


async def until(holds: Callable[[], bool], what: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while not holds():
        if loop.time() > deadline:
            raise TimeoutError(f"not within {WAIT_S} s: {what}")
        await asyncio.sleep(0.01)


#: What is asked of a root that cannot be written; the variant `v` has two generations.
CHANGING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (verb.method, verb.arguments) for name, verb in VERBS.items()},
    "update": ("update_deps", {"variant_id": "v"}),
    "remove": ("remove_deps", {"variant_id": "v", "packages": ["iniconfig"]}),
    "pin": ("pin_env", {"variant_id": "v"}),
    "replace": ("create_env", {"variant_id": "v", "spec": SIX, "replace": True}),
}
READING: dict[str, dict[str, Any]] = {
    "describe": {},
    "list_envs": {},
    "get_env_status": {"variant_id": "v"},
    "get_environment": {"variant_id": "v"},
    "list_deps": {"variant_id": "v"},
    "list_generations": {"variant_id": "v"},
    "diff_env": {"variant_id": "v", "from_": 1},
    "export_env": {"variant_id": "v"},
    "explain": {"variant_id": "v"},
    "doctor": {},
}


def test_a_read_only_root_refuses_every_change_in_plain_words(disk: Disk) -> None:
    before = definitions(disk)

    async def refused(manager: EnvManager) -> dict[str, RayEnvsError]:
        errors = {}
        for name, (method, arguments) in CHANGING.items():
            with pytest.raises(RayEnvsError) as caught:
                await getattr(manager, method)(**arguments)
            errors[name] = caught.value
        return errors

    with disk.read_only():
        errors = disk.manage(refused)
        disk.check_runs()
    assert {name: error.exit_code for name, error in errors.items()} == dict.fromkeys(CHANGING, 11)
    for error in errors.values():
        assert "read-only" in str(error).lower()
        assert "RAY_ENVS_ROOT" in error.hint
    assert definitions(disk) == before

    async def accepted(manager: EnvManager) -> list[str]:
        asked = [CHANGING[name] for name in ("create", "rollback", "sync", "pin", "gc", "delete")]
        told = [await getattr(manager, method)(**arguments) for method, arguments in asked]
        return [answer["status"] for answer in told if "status" in answer]

    assert disk.manage(accepted) == ["ACTIVE"] * 4 + ["NOT_EXISTS"]


def test_a_read_only_root_answers_every_question(disk: Disk) -> None:
    async def ask(manager: EnvManager) -> dict[str, Any]:
        return {name: await getattr(manager, name)(**given) for name, given in READING.items()}

    with disk.read_only():
        answers = disk.manage(ask)
        disk.check_runs()
    assert [row["variant_id"] for row in answers["list_envs"]] == ["other", "v"]
    assert answers["get_env_status"]["generation"] == 2
    assert answers["get_environment"]["python_path"] == str(disk.store.python(disk.keys["v"]))
    assert "iniconfig" in answers["list_deps"]["locked_versions"]
    assert [row["generation"] for row in answers["list_generations"]] == [1, 2]
    assert list(answers["diff_env"]["diff"]["added"]) == ["iniconfig"]
    assert "iniconfig" in answers["export_env"]["files"]["uv.lock"]
    assert answers["explain"]["key"] == disk.keys["v"]
    assert answers["doctor"]["is_healthy"] is False


def test_a_promise_that_cannot_be_taken_back_on_the_disk_hinders_no_question(disk: Disk) -> None:
    async def ask(manager: EnvManager) -> Any:
        await manager.get_environment(variant_id="v", job_id="01")
        return await manager.explain(variant_id="v")

    with disk.read_only():
        assert disk.manage(ask)["key"] == disk.keys["v"]


def test_the_history_of_a_read_only_root_can_be_read(disk: Disk) -> None:
    async def ask(manager: EnvManager) -> tuple[Any, Any]:
        return await manager.events(), await manager.get_operations()

    with disk.read_only():
        events, operations = disk.manage(ask)
    assert events["events"]
    assert operations["total"] == 6
