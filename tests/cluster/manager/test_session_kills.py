"""kill -9 of the manager, an agent and the whole Ray session in the middle of a verb, on real Ray.

The session belongs to a driver that the tests start. Its interpreter is in a virtual environment
whose uv is a `FakeUv`: so is that of every actor, and a stop point of uv is the middle of a verb.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from ray_envs import Settings
from ray_envs.manager.registry import Registry
from ray_envs.node.store import Store
from ray_envs.testing import FakeUv, StopPoint
from tests.cluster.conftest import is_running, left_after, wait_until

pytestmark = pytest.mark.timeout(120)

#: Says what each verb of a provider answers, for as long as somebody asks.
DRIVER = """\
import json, sys
from ray_envs import RayEnvironmentProvider
from ray_envs.errors import RayEnvsError

provider = RayEnvironmentProvider.connect("local")
print("ANSWER null", flush=True)
for line in sys.stdin:
    verb, ids, arguments = json.loads(line)
    try:
        answer = getattr(provider, verb)(*ids, **arguments)
    except RayEnvsError as exc:
        answer = {"error": exc.to_dict()}
    print("ANSWER " + json.dumps(answer), flush=True)
provider.close()
"""

BARE: dict[str, Any] = {}
OLD, NEW = {"packages": ["six==1.16.0"]}, {"packages": ["six==1.17.0"]}

#: The verbs, and the command of uv in which somebody dies.
VERBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "create": ("create", {"variant_id": "n", "spec": NEW, "wait_s": 60}, "sync"),
    "add": ("add", {"variant_id": "v", "packages": ["six==1.17.0"]}, "sync"),
    "rollback": ("rollback", {"variant_id": "v", "to": 1}, "sync"),
    "gc": ("gc", {"idle_hours": 0}, "cache"),
}
Definitions = dict[str, tuple[int, tuple[int, ...], str]]


class Session:
    """A Ray of its own, and the driver that embeds it."""

    def __init__(self, python: Path, environ: dict[str, str]) -> None:
        self._driver = subprocess.Popen(
            [python, "-c", DRIVER],
            env=environ,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._root = psutil.Process(self._driver.pid)
        self.answer()

    def is_alive(self) -> bool:
        return self._driver.poll() is None

    def ask(self, verb: str, *ids: str, **arguments: Any) -> None:
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps([verb, ids, arguments]) + "\n")
        self._driver.stdin.flush()

    def answer(self) -> Any:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:  # Ray passes on what its workers print
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the driver ended with exit code {self._driver.wait()}")

    def __call__(self, verb: str, *ids: str, **arguments: Any) -> Any:
        self.ask(verb, *ids, **arguments)
        return self.answer()

    def actor(self, name: str) -> psutil.Process:
        """The process of the only actor of a class."""
        found = []
        for process in self._root.children(recursive=True):
            with suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(f"ray::{name}"):
                    found.append(process)
        assert len(found) == 1, found
        return found[0]

    def kill(self) -> None:
        """`kill -9` of the driver and of every process of its Ray, and wait until they are gone."""
        doomed = [self._root, *self._root.children(recursive=True)]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._driver.communicate()
        assert left_after(doomed, 30) == []

    def close(self) -> None:
        if self._driver.poll() is None:
            ours = self._root.children(recursive=True)
            try:
                self._driver.communicate(timeout=60)
            finally:
                for process in ours:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                left_after(ours, 30)


class World:
    """A root, and one session after the other on it."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(root=folder / "root")
        self.store, self.registry = Store(self.settings), Registry(self.settings)
        self._uv_folder = folder / "fake-uv"
        self.uv = FakeUv(self._uv_folder)
        self._python = self._interpreter(folder / "venv")
        self._ray_tmp = tempfile.mkdtemp(prefix="rk-")  # short: Ray's sockets are in it
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "UV_"))}
        self._environ = {
            **inherited,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_TMPDIR": self._ray_tmp,
            **self.settings.model_copy(update={"tick_s": 0.5}).to_environment(),
        }
        self.start()

    def _interpreter(self, venv: Path) -> Path:
        """An interpreter with all that this one has, and with the fake uv beside it."""
        home = Path(os.path.realpath(sys.executable))
        (venv / "bin").mkdir(parents=True)
        (venv / "bin" / "python").symlink_to(home)
        (venv / "bin" / "uv").symlink_to(self.uv.executable)
        (venv / "pyvenv.cfg").write_text(f"home = {home.parent}\n")
        site = venv / f"lib/python3.{sys.version_info.minor}/site-packages"
        site.mkdir(parents=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "tests.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        return venv / "bin" / "python"

    def start(self) -> None:
        self.session = Session(self._python, self._environ)

    def close(self) -> None:
        try:
            self.session.close()
        finally:
            shutil.rmtree(self._ray_tmp, ignore_errors=True)

    def put_back(self, name: str) -> None:
        """The variants `v` and `other`, and what the verb needs; what it makes is not there."""
        if not self.session.is_alive():
            self.start()
        session = self.session
        for variant_id in ("n", "v", "doomed"):
            session("delete", variant_id=variant_id, force=True)
        wanted = [("v", BARE), ("other", OLD), *([("doomed", NEW)] * (name == "gc"))]
        for variant_id, spec in wanted:
            told = session("create", variant_id=variant_id, spec=spec, wait_s=60)
            assert told["status"] == "ACTIVE", told
        if name == "gc":
            session("delete", variant_id="doomed")
            return
        gone = self.new_keys()
        if name == "rollback":
            gone = [str(session("status", variant_id="v")["key"])]
            session("add", variant_id="v", packages=["six==1.17.0"])
        for key in gone:
            self.store.discard(key)
        session("prepare", "other")  # the manager looks at the disk

    def new_keys(self) -> list[str]:
        """The environments that have the newer six."""
        records = self.store.records()
        return [key for key, found in records.items() if found.packages.get("six") == "1.17.0"]

    def definitions(self) -> Definitions:
        damaged: list[Any] = []
        found = {
            str(record.env_id): (record.current.number, record.numbers, record.current.key)
            for record in self.registry.all(damaged=damaged)
        }
        assert damaged == []
        return found

    def begun(self, name: str) -> StopPoint:
        """Begin a verb and come to the middle of it."""
        self.put_back(name)
        session = self.session
        self._last = session("events", since=-1)["next"]
        self.before = self.definitions()
        verb, arguments, command = VERBS[name]
        stop = self.uv.hang(command)
        session.ask(verb, **arguments)
        stop.wait()
        return stop

    def uv_processes(self) -> list[psutil.Process]:
        found = []
        for call in self.uv.calls():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(call.pid)
                if is_running(process) and str(self._uv_folder) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def settled(self, name: str) -> list[str]:
        """The outcomes of interrupted operations since the verb began, as events tell them."""
        events = self.session("events", since=self._last)["events"]
        told = [event for event in events if event["kind"] == "OperationInterrupted"]
        for event in told:
            rows = self.session("operations", operation=event["data"]["operation"])["rows"]
            row = next(r for r in rows if r["operation_id"] == event["operation_id"])
            assert (row["operation"], row["status"]) == (name, "interrupted")
            assert row["metadata"]["outcome"] == event["data"]["outcome"]
        assert self.session("operations", status="running")["total"] == 0
        return [event["data"]["outcome"] for event in told]

    def check_done(self, name: str, answer: Any) -> None:
        """The verb is done, and nothing else has changed."""
        assert not answer.get("error"), answer
        after = self.definitions()
        changed = {"create": "n", "gc": ""}.get(name, "v")
        unchanged = {k: v for k, v in self.before.items() if k != changed}
        assert {k: v for k, v in after.items() if k != changed} == unchanged
        if name == "gc":
            assert self.new_keys() == []
        else:
            number = {"create": 1, "add": 2, "rollback": 1}[name]
            assert after[changed][0] == number
            assert self.session("status", variant_id=changed)["status"] == "ACTIVE"
            check = [self.store.python(after[changed][2]), "-c", "import msgpack"]
            subprocess.run([str(word) for word in check], check=True)
        wait_until(lambda: not self.uv_processes(), "the end of uv")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("kills"))
    yield made
    made.close()


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("victim", ["EnvManager", "NodeAgent"])
def test_a_verb_in_which_an_actor_is_killed_is_done_when_it_answers(
    world: World, victim: str, name: str
) -> None:
    stop = world.begun(name)
    actor = world.session.actor(victim)
    actor.kill()
    assert left_after([actor], 10) == []
    stop.open()
    world.check_done(name, world.session.answer())
    outcomes = world.settled(name)
    if victim == "EnvManager":  # a variant is defined before it is built
        assert outcomes == ["done" if name == "create" else "undone"]
    else:
        assert outcomes == []


@pytest.mark.parametrize("name", VERBS)
def test_a_new_session_has_everything_and_says_what_its_dead_one_was_doing(
    world: World, name: str
) -> None:
    world.begun(name)
    world.session.kill()
    wait_until(lambda: not world.uv_processes(), "the end of uv")
    there = world.definitions()
    expected = {**world.before, "n": there.get("n")} if name == "create" else world.before
    assert there == expected
    for key, record in world.store.records().items():
        check = [world.store.python(key), "-c", "import msgpack"]
        assert record.key == key
        subprocess.run([str(word) for word in check], check=True)
    world.start()
    assert {row["variant_id"] for row in world.session("list_variants")} == set(there)
    wait_until(lambda: world.session("operations", status="running")["total"] == 0, "it is settled")
    assert world.settled(name) == ["done" if name == "create" else "undone"]
    verb, arguments, _ = VERBS[name]
    world.check_done(name, world.session(verb, **arguments))
