"""What the tests of an environment's whole life share: a warm root for a whole file, and words.

A root costs seconds (ray is thousands of links), an id nothing: tests of one file share a root and
have variants of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_envs.cluster.nodes import LocalNodes, Nodes
from ray_envs.manager.manager import EnvManager
from ray_envs.models import EnvId
from ray_envs.node.agent import NodeAgent
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.testing import FakeUv
from tests.local.conftest import broken_promises, link_cache, processes_of, wait_until

Act = Callable[[EnvManager], Awaitable[Any]]

#: How long a whole test may take, and a manager to stop, on a machine that does other things too.
_TEST_S = 240
_STOP_S = 60

#: What all packages of an environment without any are: ray, and what it needs.
BARE: dict[str, Any] = {}
NOTHING: dict[str, Any] = {"added": {}, "removed": {}, "changed": {}}


#: Small packages without dependencies: any choice of them is an environment of its own, which needs
#: no download after `stocked`.
SIX, INI, ZIPP, TABULATE, TOML, PLUGGY, SORTED = PANTRY = (
    "six==1.16.0", "iniconfig==2.0.0", "zipp==3.7.0", "tabulate==0.9.0", "toml==0.10.2",
    "pluggy==1.5.0", "sortedcontainers==2.4.0",
)  # fmt: skip


def spec(*packages: str, **options: Any) -> dict[str, Any]:
    """A spec as clients give it."""
    return Definition(packages=packages, **options).model_dump(mode="json", exclude_defaults=True)


@contextmanager
def warm_root(folder: Path, warm_cache: Path, **options: Any) -> Iterator[Settings]:
    """Settings with a root that has links to the warm cache; every promise holds at the end."""
    folder.mkdir(parents=True)
    options = {"lock_timeout_s": 60, "tick_s": 0.5, "uv_retries": 0, "build_niceness": 0, **options}
    settings = Settings(root=folder, **options)
    link_cache(warm_cache, settings)
    yield settings
    with suppress(TimeoutError):  # what is left then is told by the next line
        wait_until(lambda: not processes_of(folder), "every process is gone")
    broken = broken_promises(settings)
    assert broken == [], broken
    shutil.rmtree(folder, ignore_errors=True)


def managed(settings: Settings, act: Act, *, nodes: Nodes | None = None) -> Any:
    """What the coroutine `act(manager)` returns; the manager is stopped afterwards."""

    async def main() -> Any:
        manager = EnvManager(
            settings=settings.to_environment(), nodes=nodes or LocalNodes(NodeAgent)
        )
        try:
            return await asyncio.wait_for(act(manager), _TEST_S)
        finally:
            await asyncio.wait_for(manager.stop(), _STOP_S)

    return asyncio.run(main())


async def created(manager: EnvManager, variant_id: str, *packages: str, **options: Any) -> Any:
    """The status of a variant that is ready everywhere."""
    told = await manager.create_env(
        variant_id=variant_id, spec=spec(*packages, **options), wait_s=120
    )
    assert told["status"] == "ACTIVE", told
    return told


async def stocked(manager: EnvManager) -> None:
    """Have the wheels of PANTRY, and ray's, in uv's cache, whatever is collected."""
    await created(manager, "pantry", *PANTRY)
    await manager.pin_env(variant_id="pantry")


async def until(manager: EnvManager, variant_id: str, *statuses: str) -> dict[str, Any]:
    """The status of a variant, as soon as it is one of `statuses`."""
    seen = -1
    while True:
        told = await manager.watch(variant_ids=[variant_id], seen=seen, timeout_s=1)
        status: dict[str, Any] = told["variants"][variant_id]
        if status["status"] in statuses:
            return status
        seen = told["version"]


async def prepared(manager: EnvManager, variant_id: str) -> dict[str, Any]:
    """The status of a variant after it was asked for, and is ready or has failed."""
    await manager.prepare(variant_ids=[variant_id])
    return await until(manager, variant_id, "ACTIVE", "ERROR")


async def rows_of(manager: EnvManager, variant_id: str | None = None) -> list[dict[str, Any]]:
    """The operations of a variant, oldest first."""
    told = await manager.get_operations(variant_id=variant_id, limit=1000)
    assert told["total"] == len(told["rows"])
    return list(reversed(told["rows"]))


async def events_of(
    manager: EnvManager, variant_id: str | None = None, since: int = 0
) -> list[dict[str, Any]]:
    """The events of a variant in their order."""
    told = await manager.events(variant_id=variant_id, since=since)
    return list(told["events"])


async def kinds_of(manager: EnvManager, variant_id: str, since: int = 0) -> list[str]:
    return [event["kind"] for event in await events_of(manager, variant_id, since)]


def definition_files(settings: Settings, variant_id: str) -> dict[str, str]:
    """Every text of a variant's folder, by its path; without the view of people."""
    folder = settings.root / "envs" / EnvId.parse(variant_id).folder
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".venv" not in path.relative_to(folder).parts
    }


def tree(settings: Settings, *keys: str) -> dict[str, tuple[int, int, int]]:
    """Every file of the definitions, the records, and all files of the environments `keys`.

    Each with its inode, size and time of change. Without locks and holds, which are taken and not
    changed.
    """
    found = {}
    store = settings.root / "store"
    todo = [settings.root / "envs", settings.root / "trash", *(store / key for key in keys)]
    records = [path / "record.json" for path in store.glob("*") if path.is_dir()]
    walked = (
        Path(place, name) for top in todo for place, _, names in os.walk(top) for name in names
    )
    for path in (*walked, *(path for path in records if path.exists())):
        if path.suffix not in (".hold", ".holder", ".lock") or path.name == "uv.lock":
            status = path.lstat()
            told = (status.st_ino, status.st_size, status.st_mtime_ns)
            found[str(path.relative_to(settings.root))] = told
    return found


def mentions(settings: Settings, word: str) -> list[str]:
    """Every file below the root that has `word` in its name or in its content."""
    found, seen = [], set()
    for place, _, files in os.walk(settings.root):
        for path in (Path(place, name) for name in files):
            inode = path.lstat().st_ino
            is_known, is_text = inode in seen, path.is_file() and not path.is_symlink()
            seen.add(inode)
            if word in str(path) or (is_text and not is_known and word.encode() in _bytes(path)):
                found.append(str(path.relative_to(settings.root)))
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # the log of the database comes and goes
        return b""


#: Calls one verb in a process of its own, and prints its answer.
_PROCESS = """\
import asyncio, json, sys
from ray_envs.node import uv as builder
from ray_envs.node.agent import NodeAgent
from ray_envs.cluster.nodes import LocalNodes
from ray_envs.errors import RayEnvsError
from ray_envs.manager.manager import EnvManager
settings, uv, verb, arguments = json.loads(sys.argv[1])
builder.uv.find_uv_bin = lambda: uv

async def main():
    manager = EnvManager(settings=settings, nodes=LocalNodes(NodeAgent))
    try:
        print(json.dumps(await getattr(manager, verb)(**arguments)))
    except RayEnvsError as error:
        print(json.dumps({"failed": error.to_dict()}))
    await manager.stop()

asyncio.run(main())
"""


def manager_process(
    settings: Settings, uv: FakeUv, verb: str, **arguments: Any
) -> subprocess.Popen[str]:
    """A process whose manager does one verb, with the fake uv, and prints the answer as JSON."""
    told = json.dumps([settings.to_environment(), str(uv.executable), verb, arguments])
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, told], stdout=subprocess.PIPE, text=True
    )


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What `manager_process` printed."""
    said, _ = process.communicate(timeout=_TEST_S)
    answer: dict[str, Any] = json.loads(said.splitlines()[-1])
    return answer


#: Takes the lock at a path, says so, and keeps it until it is told to end.
_LOCK = """\
import asyncio, sys
from pathlib import Path
from ray_envs.disk.files import locked

async def main():
    async with locked(Path(sys.argv[1]), what="it", timeout_s=60):
        print("locked", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


@contextmanager
def locked_by_another(path: Path) -> Iterator[int]:
    """A real process has the lock `path` during the block; gives its pid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [sys.executable, "-c", _LOCK, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process.pid
        finally:
            process.communicate("")
