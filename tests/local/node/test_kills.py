"""kill -9 at every step of every verb loses nothing: each step is a parameter, with its name.

A step of ours is a change of the disk, of uv a stop point. The disk that a step leaves is the one
that the next step finds: whoever dies before each of them has died after each of them, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ray_envs.cluster.nodes import LocalNodes
from ray_envs.decisions import locks
from ray_envs.errors import InvalidPackages, StorageFailed, UvFailed
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.node.agent import NodeAgent
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.testing import FakeUv
from tests.local.conftest import broken_promises, processes_of, tried, wait_until
from tests.local.killing import END, Killer

#: The wheels and what the index says of them are in the cache: nothing has to wait for a network.
OFFLINE = {"UV_OFFLINE": "1"}

BARE = Definition().model_dump(mode="json")
SIX = Definition(packages=("six",)).model_dump(mode="json")
OLD_SIX = Definition(packages=("six==1.16.0",)).model_dump(mode="json")

Arguments = dict[str, Any]
Snapshot = dict[str, Any]

#: What the roots of these tests take, with room to spare, in bytes.
ROOM = 2 * 2**30

#: How long anything may take that is not uv's work.
WAIT_S = 60


@dataclass(frozen=True)
class Verb:
    """A verb to die in, and what it finds."""

    method: str
    arguments: Arguments
    #: What was done before, in the words of `Lab._prepared`.
    before: tuple[str, ...]
    #: The environments that are on the disk, by the names of `Lab.keys`.
    there: tuple[str, ...]
    #: The environment of the variant when it is done.
    runs_in: str = ""
    #: What is damaged in the environment "bare": "a module" or "the interpreter".
    damage: str = ""


def _verbs() -> dict[str, Verb]:
    v, n = {"variant_id": "v"}, {"variant_id": "n", "wait_s": 60}
    old = {"packages": ["six==1.16.0"]}
    alone, both, all_three = ("bare",), ("bare", "six"), ("bare", "six", "old")
    # "other" has gone the same way: where nothing differs, its lock and environment are used.
    first, second = ("v", "other"), ("v", "v add", "other")
    replacing = {**v, "spec": OLD_SIX, "replace": True}
    six = {**v, "packages": ["six"]}
    back = ("other", "other remove")
    return {
        "create": Verb("create_env", {**n, "spec": SIX}, ("other",), alone, "six"),
        "replace": Verb("create_env", replacing, (*first, "old"), all_three, "old"),
        "add": Verb("add_deps", six, first, alone, "six"),
        "update": Verb("update_deps", {**v, **old}, (*second, "old"), all_three, "old"),
        "remove": Verb("remove_deps", six, ("v", "v add", *back), both, "bare"),
        "rollback": Verb("rollback_env", {**v, "to": 1}, second, both, "bare"),
        "delete": Verb("delete_env", v, second, both),
        "sync": Verb("sync_env", v, first, both, "bare", "a module"),
        "gc": Verb("cleanup", {"idle_hours": 0}, first, all_three),
        "import": Verb("import_env", n, ("other",), both, "six"),
        "pin": Verb("pin_env", v, first, both, "bare"),
        "promise": Verb("get_environment", {**v, "job_id": "01"}, first, both, "bare"),
        # the same where uv has to work
        "replace anew": Verb("create_env", replacing, first, both, "old"),
        "add anew": Verb("add_deps", six, ("v",), alone, "six"),
        "update anew": Verb("update_deps", {**v, **old}, second, both, "old"),
        "remove anew": Verb("remove_deps", six, ("v", "v add"), ("six",), "bare"),
        "rollback anew": Verb("rollback_env", {**v, "to": 1}, second, ("six",), "bare"),
        "sync anew": Verb("sync_env", v, first, both, "bare", "the interpreter"),
        "import anew": Verb("import_env", n, ("other",), alone, "six"),
    }


VERBS = _verbs()

#: What uv is asked to do, by verb.
UV_COMMANDS = {
    "create": ("lock", "sync"),
    "replace anew": ("lock", "sync"),
    "add anew": ("lock", "sync"),
    "update anew": ("lock", "sync"),
    "remove anew": ("lock", "sync"),
    "rollback anew": ("sync",),
    "sync anew": ("sync",),
    "gc": ("cache",),
    "import anew": ("lock", "sync"),
}

_BEGUN = ("row running", "event EnvironmentLockAcquired")
_STARTED = (*_BEGUN, "event EnvironmentCreationStarted")
_LOCKED = (
    "mkdir scratch/*",
    "make scratch/*/pyproject.toml",
    "make scratch/*/uv.lock",
    "remove scratch/*/pyproject.toml",
    "remove scratch/*/uv.lock",
    "rmdir scratch/*",
)
_BUILT = (
    "make store/KEY.hold",
    "make store/KEY/.venv/lib/_ray_envs_inside.py",
    "make store/KEY/.venv/lib/__pycache__/_ray_envs_inside.pyc.*",
    "rename store/KEY/.venv/lib/__pycache__/_ray_envs_inside.pyc",
    "make store/KEY/.venv/lib/_ray_envs_inside.pth",
    "rename worker-starts.json",
    "rename store/KEY/record.json",
    "event EnvironmentPrepared",
)


def _staged(folder: str, number: int, how: str) -> tuple[str, ...]:
    place = f"{folder}/generations/{number}"
    return (
        f"mkdir {place}",
        f"rename {place}/pyproject.toml",
        f"{how} {place}/uv.lock",
        f"rename {place}/generation.json",
        "row running #2",
    )


def _written(folder: str) -> tuple[str, ...]:
    names = ("metadata.json", "pyproject.toml", "uv.lock")
    return tuple(f"rename {folder}/{name}" for name in names)


def _ended(event: str) -> tuple[str, ...]:
    return ("row succeeded", f"event {event}", "event EnvironmentLockReleased", END)


_V, _N = "envs/v", "envs/n"
_SWITCHED = (*_written(_V), f"rename {_V}/.venv/…")
_FIRST = (
    f"mkdir {_N}",
    f"mkdir {_N}/generations",
    *_staged(_N, 1, "rename"),
    *_written(_N),
    f"mkdir {_N}/.venv",
    *(f"{how} {_N}/.venv/…" for how in ("mkdir", "rename", "symlink")),
)

#: Every step of ours in each verb; of many that are alike ("…"), the first and one in the middle.
STEPS = {
    "create": (
        *("history BEGIN IMMEDIATE", "history COMMIT"),
        *_STARTED,
        *(step for step in _LOCKED if step != "make scratch/*/uv.lock"),
        *_FIRST,
        "mkdir store/KEY",
        *(f"{step} #2" for step in _LOCKED if step != "make scratch/*/uv.lock"),
        "make scratch/*/uv.lock",
        *_BUILT,
        *_ended("EnvironmentCreated"),
    ),
    "replace": (*_STARTED, *_staged(_V, 2, "link"), *_SWITCHED, *_ended("EnvironmentCreated")),
    "add": (
        *_BEGUN,
        *_staged(_V, 2, "link"),
        "mkdir store/KEY",
        *_LOCKED,
        *_BUILT,
        *_SWITCHED,
        *_ended("DependenciesAdded"),
    ),
    "update": (
        *_BEGUN,
        *_LOCKED,
        *_staged(_V, 3, "rename"),
        *_SWITCHED,
        *_ended("DependenciesUpdated"),
    ),
    "remove": (*_BEGUN, *_staged(_V, 3, "link"), *_SWITCHED, *_ended("DependenciesRemoved")),
    "rollback": (*_BEGUN, *_SWITCHED, *_ended("EnvironmentRolledBack")),
    "delete": (
        *_BEGUN,
        *(f"remove {_V}/{name}" for name in ("metadata.json", "pyproject.toml", "uv.lock")),
        *(
            f"remove {_V}/generations/{number}/{name}"
            for number in (1, 2)
            for name in ("generation.json", "pyproject.toml", "uv.lock")
        ),
        *(f"rmdir {_V}/generations{place}" for place in ("/1", "/2", "")),
        *(f"{how} {_V}/.venv/…" for how in ("remove", "rmdir")),
        f"rmdir {_V}/.venv",
        f"rmdir {_V}",
        *_ended("EnvironmentDeleted"),
    ),
    "sync": (
        *_BEGUN,
        "link store/KEY/.venv/lib/packaging/.ray_envs-mend-*",
        "rename store/KEY/.venv/lib/packaging/version.py",
        "link store/KEY/.venv/lib/packaging/__pycache__/.ray_envs-mend-*",
        "rename store/KEY/.venv/lib/packaging/__pycache__/version.pyc",
        "remove store/KEY/.venv/lib/packaging/__pycache__/.ray_envs-mend-*",
        "rename worker-starts.json",
        "event EnvironmentDamaged",
        "event EnvironmentRepaired",
        *_ended("EnvironmentSynced"),
    ),
    "gc": (
        *_BEGUN,
        "event EnvironmentCleanupStarted",
        "make store/KEY.hold",
        "rename trash/*",
        "remove trash/*/…",
        "remove trash/*/… #1000",
        "rmdir trash/*/…",
        "rmdir trash/*",
        "event EnvironmentCollected",
        "remove uv-cache/wheels-v8/…",
        "remove uv-cache/wheels-v8/… #2",
        "rmdir uv-cache/wheels-v8/…",
        "row running #2",
        *_ended("EnvironmentCleanupCompleted"),
    ),
    "import": (*_STARTED, *_LOCKED, *_FIRST, *_ended("EnvironmentCreated")),
    "pin": (*_BEGUN, *_written(_V), *("row succeeded", "event EnvironmentLockReleased", END)),
    "promise": ("rename leases.json", END),
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
        self._killer = Killer(folder / "log")
        self.close = self._killer.close
        #: The environments' keys, by what they hold besides Ray.
        self.keys: dict[str, str] = {}
        self._exported: dict[str, str] = {}
        self._befores: dict[tuple[str, ...], Path] = {}
        self._snapshots: dict[str, tuple[Snapshot, Snapshot]] = {}
        #: The key whose environment was damaged, until it is put back.
        self._stained = ""
        self.root.mkdir()
        subprocess.run(["cp", "-a", warm_cache, self.store.cache], check=True)
        self._make_environments()

    def _make_environments(self) -> None:
        async def act(manager: EnvManager) -> None:
            for name, spec in (("bare", BARE), ("six", SIX), ("old", OLD_SIX)):
                told = await manager.create_env(variant_id=name, spec=spec, wait_s=60)
                self.keys[name] = told["key"]
            await manager.add_deps(variant_id="bare", packages=["six"])
            await manager.remove_deps(variant_id="bare", packages=["six"])
            self._exported.update((await manager.export_env(variant_id="six"))["files"])

        self.manage(act, is_offline=False)
        for key in self.keys.values():
            os.rename(self.store.folder / key, self._pristine / key)
        os.rename(self.store.cache, self._pristine / "uv-cache")
        with closing(sqlite3.connect(self.root / "history.db")) as history, history:
            for table in ("events", "operations", "sqlite_sequence"):
                history.execute(
                    f"UPDATE {table} SET seq = 0" if table[0] == "s" else f"DELETE FROM {table}"
                )
        shutil.move(self.root / "history.db", self._pristine)
        shutil.rmtree(self.root)

    def manage(
        self, act: Callable[[EnvManager], Awaitable[Any]], *, is_offline: bool = True
    ) -> Any:
        """What `act(manager)` returns, with a manager in this process."""

        async def main() -> Any:
            manager = EnvManager(
                settings=self.settings.to_environment(), nodes=LocalNodes(NodeAgent)
            )
            try:
                return await asyncio.wait_for(act(manager), 2 * WAIT_S)
            finally:
                await manager.stop()

        with pytest.MonkeyPatch.context() as patch:
            for name, value in OFFLINE.items() if is_offline else ():
                patch.setenv(name, value)
            return asyncio.run(main())

    def run(self, name: str, **options: Any) -> tuple[int, list[str]]:
        """Perform a verb in another process; see `Killer.run`."""
        return self._killer.run(
            self.settings.to_environment(),
            VERBS[name].method,
            self.arguments(name),
            environ=OFFLINE,
            **options,
        )

    def arguments(self, name: str) -> Arguments:
        verb, files = VERBS[name], self._exported
        if verb.method != "import_env":
            return verb.arguments
        texts = {"pyproject": files["pyproject.toml"], "uv_lock": files["uv.lock"]}
        return {**verb.arguments, **texts, "options": json.loads(files["options.json"])}

    def snapshots(self, name: str) -> tuple[Snapshot, Snapshot]:
        """The definitions before and after a verb; to be asked once before the root is used."""
        if name not in self._snapshots:
            self._put_back(name)
            before = definitions(self)
            code, _ = self.run(name)
            assert code == 0
            self._snapshots[name] = (before, definitions(self))
        return self._snapshots[name]

    # -- what a verb finds ------------------------------------------------------------------

    def put_back(self, name: str) -> None:
        """Make the root what it is before the verb."""
        self.snapshots(name)
        self._put_back(name)

    def _put_back(self, name: str) -> None:
        verb = VERBS[name]
        if verb.before not in self._befores:
            self._lay_out(("bare", "six", "old"))
            self._befores[verb.before] = self._prepared(verb.before)
        self._lay_out(verb.there)
        subprocess.run(["cp", "-a", self._befores[verb.before], self.root / "envs"], check=True)
        if name != "create":  # the first verb of a root
            shutil.copy(self._pristine / "history.db", self.root)
        if verb.damage:
            self._stained = self.keys["bare"]
            self.damaged_file(verb).unlink()
        if verb.damage == "a module":
            self.damaged_file(verb).write_text("raise ImportError('damaged')\n")

    def damaged_file(self, verb: Verb) -> Path:
        venv = self.store.venv(self.keys["bare"])
        if verb.damage == "the interpreter":
            return venv / "bin" / "python"
        return next(venv.glob("lib/*/site-packages/packaging")) / "version.py"

    def pristine(self, file: Path) -> Path:
        """A file of an environment as it was before any damage."""
        return self._pristine / file.relative_to(self.store.folder)

    def _lay_out(self, names: tuple[str, ...]) -> None:
        """These environments and uv's cache, and no more; what is as it was is left as it is."""
        wanted = {self.keys[name] for name in names}
        self.store.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.store.folder.iterdir(), *self.root.iterdir()]:
            if path in (self.store.folder, self.store.cache):
                continue
            if path.name not in wanted or not self._is_pristine(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._stained = ""
        tried(self.settings)
        for key in wanted:
            if not (self.store.folder / key).exists():
                subprocess.run(["cp", "-al", self._pristine / key, self.store.folder], check=True)
        if not self._is_cache_pristine():
            shutil.rmtree(self.store.cache, ignore_errors=True)
            subprocess.run(["cp", "-al", self._pristine / "uv-cache", self.root], check=True)

    def _is_pristine(self, environment: Path) -> bool:
        record = environment / "record.json"
        return (
            environment.name != self._stained
            and record.exists()
            and record.samefile(self.pristine(record))
        )

    def _is_cache_pristine(self) -> bool:
        """Pruning takes from these folders; linking does not write there."""
        here, there = self.store.cache, self._pristine / "uv-cache"
        return all(
            (here / name).is_dir() and set(os.listdir(here / name)) == set(os.listdir(there / name))
            for name in ("archive-v0", "wheels-v8/pypi", "wheels-v8/pypi/six")
        )

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


@pytest.fixture(scope="module")
def lab(warm_cache: Path) -> Iterator[Lab]:
    # In memory, where there is such a place: thousands of files are made and removed in each test.
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) and disk_usage(memory).free > ROOM else None
    with TemporaryDirectory(prefix="ray_envs-kills-", dir=place) as folder:
        made = Lab(Path(folder), warm_cache)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUv]:
    made = FakeUv(tmp_path / "fake-uv")
    yield made
    for process in processes_of(made.executable):  # a failed test must not leave them for ever
        process.kill()


# -- what must be true whenever it is looked at


def definitions(lab: Lab) -> Snapshot:
    """Every variant as it is defined, with all that is kept of each of its generations."""
    registry = Registry(lab.settings)
    damaged: list[StorageFailed] = []
    found: Snapshot = {}
    for record in registry.all(damaged=damaged):
        generations = {}
        for number in record.numbers:
            made = registry.generation(record.env_id, number)
            pyproject, uv_lock = registry.lock_text(record.env_id, number)
            assert locks.lock_sha256(uv_lock) == made.lock_sha256
            assert number != record.current.number or made == record.current
            told = made.model_dump(exclude={"created_at"})
            generations[number] = {**told, "pyproject.toml": pyproject, "uv.lock": uv_lock}
        found[str(record.env_id)] = {
            "current": record.current.number,
            "is_pinned": record.is_pinned,
            "generations": generations,
        }
    assert damaged == []
    return found


def rubbish(lab: Lab) -> list[str]:
    """What nobody names, and nobody will ever clear."""
    registry = Registry(lab.settings)
    known = {record.env_id.folder: record for record in registry.all()}
    left = [str(path) for kind in ("scratch", "trash") for path in (lab.root / kind).glob("*")]
    left += map(str, lab.store.cache.glob(".ray_envs-forgotten-*"))
    for folder in (path for path in (lab.root / "envs").iterdir() if path.is_dir()):
        if folder.name not in known:
            left.append(str(folder))
            continue
        names = {path.name for path in (folder / "generations").iterdir()}
        left += [
            f"{folder}/generations/{n}" for n in names - {*map(str, known[folder.name].numbers)}
        ]
    return left


def stale_copies(lab: Lab) -> list[str]:
    """The files for people that do not show the current generation, or are half of a file."""
    registry, found = Registry(lab.settings), []
    for record in registry.all():
        folder = registry.folder(record.env_id)
        texts = registry.lock_text(record.env_id, record.current.number)
        for name, text in zip(("pyproject.toml", "uv.lock"), texts, strict=True):
            file = folder / name
            if not file.is_file() or file.read_text() != text:
                found.append(str(file))
        pth = next(iter(folder.glob(".venv/lib/*/site-packages/ray_envs_store.pth")), None)
        if pth is None or record.current.key not in pth.read_text():
            found.append(f"{folder}/.venv")
        found += [str(path) for path in folder.rglob(".*.????????")]
    return found


def check_promises(lab: Lab, *, but_record: bool = False) -> None:
    """Nobody works on the root, nothing is locked, and what is ready runs.

    Args:
        lab: whose root.
        but_record: an environment that was ready had lost its interpreter before.
    """
    wait_until(lambda: processes_of(lab.root) == [], "every process is gone")
    broken = broken_promises(lab.settings)
    assert [each for each in broken if not (but_record and "does not count" in each)] == []
    leases = lab.root / "leases.json"
    assert not leases.exists() or isinstance(json.loads(leases.read_text()), dict)


def is_settled(manager: EnvManager) -> Callable[[], Awaitable[bool]]:
    async def ask() -> bool:
        return not (await manager.get_operations(status="running"))["rows"]

    return ask


async def is_there(path: Path) -> bool:
    return path.exists()


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + WAIT_S
    while not await holds():
        if loop.time() > deadline:
            raise TimeoutError(f"not within {WAIT_S} s: {what}")
        await asyncio.sleep(0.01)


def check_history(name: str, told: dict[str, Any], *, is_new: bool, changes: bool) -> None:
    """At most one row, which says what is on the disk; and an event, if it was settled."""
    operation = "create" if name.startswith("replace") else name.partition(" ")[0]
    rows = told["rows"]
    assert [row["operation"] for row in rows] in ([], [operation])
    interrupted = [e for e in told["events"] if e["kind"] == "OperationInterrupted"]
    if not rows:
        assert (is_new, interrupted) == (False, [])
        return
    (row,) = rows
    if row["status"] == "succeeded":
        assert (is_new, interrupted) == (changes, [])
        return
    assert row["status"] == "interrupted"
    assert row["finished_at"] is not None
    outcome = "done" if is_new else "undone"
    assert row["metadata"]["outcome"] == outcome
    assert outcome in row["error"]["message"]
    (event,) = interrupted
    assert (event["operation_id"], event["variant_id"]) == (row["operation_id"], row["variant_id"])
    assert event["data"] == {"operation": operation, "outcome": outcome}


def check_after_death(lab: Lab, name: str) -> None:
    """Nothing is lost; a new manager says what happened; the verb, asked again, is done."""
    verb = VERBS[name]
    before, after = lab.snapshots(name)
    changes = before != after
    check_promises(lab, but_record=verb.damage == "the interpreter")
    there = definitions(lab)
    assert there in (before, after)
    is_new = changes and there == after

    async def act(manager: EnvManager) -> tuple[dict[str, Any], Any]:
        await manager.describe()
        await until(is_settled(manager), "what was interrupted is settled")
        told = {
            "rows": (await manager.get_operations())["rows"],
            "events": (await manager.events())["events"],
        }
        assert definitions(lab) == there
        try:
            answer = await getattr(manager, verb.method)(**lab.arguments(name))
        except InvalidPackages:
            assert (verb.method, is_new) == ("remove_deps", True)  # nothing is left to remove
            answer = await manager.get_env_status(variant_id="v")
        return told, answer

    told, answer = lab.manage(act)
    check_history(name, told, is_new=is_new, changes=changes)
    check_end(lab, name, answer)


def check_end(lab: Lab, name: str, answer: Any) -> None:
    """The verb is done, all of it, and nothing is left of what was not."""
    verb = VERBS[name]
    assert definitions(lab) == lab.snapshots(name)[1]
    assert rubbish(lab) == []
    check_promises(lab)
    ready = {word for word, key in lab.keys.items() if key in lab.store.records()}
    if name == "gc":
        assert ready == {"bare", "six"}
    elif name == "delete":
        assert answer["status"] == "NOT_EXISTS"
    else:
        assert answer["status"] == "ACTIVE"
        assert verb.runs_in in ready
    if verb.damage:
        file = lab.damaged_file(verb)
        assert file.read_bytes() == lab.pristine(file).read_bytes()


# -- our own steps


@pytest.mark.parametrize("name", STEPS)
def test_every_step_of_a_verb_is_a_stage_here(lab: Lab, name: str) -> None:
    lab.put_back(name)
    code, steps = lab.run(name)
    assert code == 0
    steps = [
        step for step in steps if step != "event EnvironmentPrepared #2"
    ]  # told twice at times
    assert sorted(steps) == sorted(step for step in STEPS[name] if "… #" not in step)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, id=f"{name}, before: {step}")
        for name, steps in STEPS.items()
        for step in steps
    ],
)
def test_a_manager_that_dies_before_any_step_loses_nothing(lab: Lab, name: str, step: str) -> None:
    lab.put_back(name)
    code, _ = lab.run(name, last=step)
    assert code == -signal.SIGKILL
    check_after_death(lab, name)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, id=f"{name}, before: {step}")
        for name, steps in (("create", (*_written(_N)[1:], *_FIRST[-4:])), ("add", _SWITCHED))
        for step in steps
    ],
)
def test_what_people_read_is_the_current_generation_also_after_a_death(
    lab: Lab, name: str, step: str
) -> None:
    lab.put_back(name)
    code, _ = lab.run(name, last=step)
    assert code == -signal.SIGKILL

    async def act(manager: EnvManager) -> None:
        await manager.describe()
        await until(is_settled(manager), "what was interrupted is settled")
        await getattr(manager, VERBS[name].method)(**lab.arguments(name))

    lab.manage(act)
    assert stale_copies(lab) == []


# -- uv's steps


UV_STEPS = pytest.mark.parametrize(
    ("name", "command", "is_done"),
    [
        pytest.param(name, command, is_done, id=f"{name}, {when} {command}")
        for name, commands in UV_COMMANDS.items()
        for command in commands
        for is_done, when in ((False, "before"), (True, "after"))
    ],
)


@UV_STEPS
def test_a_manager_that_dies_while_uv_works_loses_nothing(
    lab: Lab, fake: FakeUv, name: str, command: str, is_done: bool
) -> None:
    lab.put_back(name)
    stop = fake.hang(command, is_done=is_done)

    def kill(pid: int) -> None:
        stop.wait()
        os.kill(pid, signal.SIGKILL)

    code, _ = lab.run(name, uv=str(fake.executable), meanwhile=kill)
    assert code == -signal.SIGKILL
    check_after_death(lab, name)


@UV_STEPS
def test_a_uv_that_is_killed_changes_nothing_and_leaves_no_process(
    lab: Lab, fake: FakeUv, monkeypatch: pytest.MonkeyPatch, name: str, command: str, is_done: bool
) -> None:
    lab.put_back(name)
    # What fails offline is tried again online.
    kinds = (True, False) if command == "sync" else (None,)
    stops = [fake.hang(command, is_offline=kind, is_done=is_done) for kind in kinds]
    monkeypatch.setattr("ray_envs.node.uv.uv.find_uv_bin", lambda: str(fake.executable))

    async def act(manager: EnvManager) -> Any:
        async def ask() -> Any:
            return await getattr(manager, VERBS[name].method)(**lab.arguments(name))

        asked = asyncio.ensure_future(ask())
        for number, stop in enumerate(stops):
            await until(partial(is_there, stop.reached), f"uv {command}")
            os.kill(fake.calls(command)[number].pid, signal.SIGKILL)
        if name == "gc":  # the environments are gone; the cache can wait for the next time
            return await asked
        with pytest.raises(UvFailed):
            await asked
        assert definitions(lab) == lab.snapshots(name)[0]
        assert rubbish(lab) == []
        (row,) = (await manager.get_operations())["rows"]
        assert (row["status"], row["exit_code"]) == ("failed", UvFailed.exit_code)
        return await ask()

    check_end(lab, name, lab.manage(act))
