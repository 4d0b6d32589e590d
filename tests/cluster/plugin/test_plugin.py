"""The plugin in Ray's own process: a task starts in its environment, or fails with our reason.

The Ray belongs to a driver that the tests start, on a root of real environments. No agent of ours
lives there: the tests answer at the gate in its place.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from ray.runtime_env import RuntimeEnv

from ray_envs import RayEnvironmentProvider, Settings
from ray_envs.decisions import placement
from ray_envs.node.store import Store
from ray_envs.plugin.environment_plugin import TIMEOUT_VARIABLE, EnvironmentPlugin, _limit_s
from ray_envs.plugin.gate import FIELD, PLUGINS_VARIABLE, Gate, field, reason_in, with_plugin
from tests.cluster.conftest import NEW_SIX, OLD_SIX, left_after, wait_until

#: Long for a machine that is busy; nothing waits so long where all is well.
WITHIN_S = 60

#: Starts a task a line, and tells how each has ended when it is asked.
DRIVER = """\
import json, sys
import ray

ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
tasks = {}

@ray.remote(num_cpus=1, max_retries=0)
def prefix():
    import sys
    return sys.prefix

def ended(name, timeout_s):
    try:
        return {"prefix": ray.get(tasks[name], timeout=timeout_s)}
    except ray.exceptions.GetTimeoutError:
        return {"waits": True}
    except Exception as exc:
        return {"type": type(exc).__name__, "text": str(exc)}

print("ANSWER null", flush=True)
for line in sys.stdin:
    verb, name, argument = json.loads(line)
    if verb == "start":
        tasks[name] = prefix.options(runtime_env=argument).remote()
        answer = None
    else:
        answer = ended(name, argument)
    print("ANSWER " + json.dumps(answer), flush=True)
ray.shutdown()
"""


class Node:
    """A Ray of one node that has the plugin, and what is asked at its gate."""

    def __init__(self, settings: Settings, keys: dict[str, str], environ: dict[str, str]) -> None:
        self.keys, self.store, self.gate = keys, Store(settings), Gate(settings.root)
        self._logs = Path(environ["RAY_TMPDIR"], "ray/session_latest/logs")
        self._numbers = itertools.count(1)
        self._driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env=environ,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._root = psutil.Process(self._driver.pid)

    def attempt(self) -> int:
        """A number that no runtime_env has had: Ray would give an equal one the old answer."""
        return next(self._numbers)

    def runtime_env(self, name: str, attempt: int, **more: Any) -> dict[str, Any]:
        key = self.keys[name]
        environment = placement.runtime_env(str(self.store.venv(key)), {})
        return {**environment, FIELD: field(key, attempt), **more}

    def _ask(self, verb: str, name: str, argument: Any) -> Any:
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps([verb, name, argument]) + "\n")
        self._driver.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise RuntimeError(f"the driver ended with exit code {self._driver.wait()}")

    def start(self, name: str, runtime_env: dict[str, Any]) -> None:
        self._ask("start", name, runtime_env)

    def ended(self, name: str, within_s: float = WITHIN_S) -> dict[str, Any]:
        return dict(self._ask("ended", name, within_s))

    def run(self, runtime_env: dict[str, Any]) -> dict[str, Any]:
        self.start("run", runtime_env)
        return self.ended("run")

    def ran_in(self, name: str) -> dict[str, Any]:
        """How a task ends that ran in the environment `name`."""
        return {"prefix": str(self.store.venv(self.keys[name]))}

    def is_asked_for(self, name: str, attempt: int) -> bool:
        return self.gate.asked().get(self.keys[name]) == attempt

    def waits_in_log(self, name: str) -> int:
        """How often the plugin has begun to wait for the environment `name`."""
        logs = self._logs.glob("runtime_env_setup-*.log")
        begun = f"waiting for the environment {self.keys[name]} "
        return sum(path.read_text().count(begun) for path in logs)

    @contextmanager
    def gone(self, name: str) -> Iterator[Callable[[], None]]:
        """The environment `name` has no record in the block, or until the block puts it back."""
        record = self.store.folder / self.keys[name] / "record.json"
        away = record.with_name("record.away")
        record.rename(away)

        def put_back() -> None:
            away.rename(record)

        try:
            yield put_back
        finally:
            if away.exists():
                put_back()
            self.gate.clear(self.keys[name])

    def close(self) -> None:
        ours = self._root.children(recursive=True) if self._driver.poll() is None else []
        try:
            self._driver.communicate(timeout=60)
        finally:
            for process in [self._root, *ours]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            left = left_after(ours, 30)
        assert left == []


@pytest.fixture(scope="module")
def node(other_root: Callable[[str], Settings]) -> Iterator[Node]:
    settings = other_root("plugin")
    specs = {"there": OLD_SIX, "late": NEW_SIX}
    provider = RayEnvironmentProvider.without_cluster(settings)
    try:
        for name, spec in specs.items():
            provider.create(name, spec)
        provider.prepare(*specs)
        keys = {name: str(provider.status(name)["key"]) for name in specs}
    finally:
        provider.close()
    ray_tmp = tempfile.mkdtemp(prefix="rp-")  # short: Ray's sockets are in it
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "UV_"))}
    environ = {
        **inherited,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": ray_tmp,
        PLUGINS_VARIABLE: with_plugin(None),
    }
    started = started_node(settings, keys, environ)
    try:
        yield started
    finally:
        try:
            started.close()
        finally:
            shutil.rmtree(ray_tmp, ignore_errors=True)


def started_node(settings: Settings, keys: dict[str, str], environ: dict[str, str]) -> Node:
    """A node that answers: Ray gives a raylet 30 s to start, which a busy machine may miss."""
    for _ in range(3):
        started = Node(settings, keys, environ)
        try:
            started.answer()
            return started
        except RuntimeError:
            started.close()
    pytest.fail("no Ray has started")


# -- in a real Ray


def test_a_task_whose_environment_is_there_runs_in_it_and_asks_for_nothing(node: Node) -> None:
    assert node.run(node.runtime_env("there", node.attempt())) == node.ran_in("there")
    assert node.gate.asked() == {}


def test_a_task_waits_for_its_environment_and_hinders_no_other(node: Node) -> None:
    attempt = node.attempt()
    with node.gone("late") as put_back:
        node.start("waiting", node.runtime_env("late", attempt))
        wait_until(lambda: node.is_asked_for("late", attempt), "it is asked for", within_s=WITHIN_S)
        there = node.runtime_env("there", node.attempt())
        assert node.run(there) == node.ran_in("there")
        assert node.run({"env_vars": {"NONE_OF_OUR": "BUSINESS"}}) == {"prefix": sys.prefix}
        assert node.ended("waiting", 0) == {"waits": True}
        assert node.is_asked_for("late", attempt)
        put_back()
        assert node.ended("waiting") == node.ran_in("late")
    assert node.gate.asked() == {}


def test_a_refusal_fails_the_task_with_our_reason_and_the_next_attempt_is_free(node: Node) -> None:
    key, attempt = node.keys["late"], node.attempt()
    with node.gone("late") as put_back:
        node.start("refused", node.runtime_env("late", attempt))
        wait_until(lambda: node.is_asked_for("late", attempt), "it is asked for", within_s=WITHIN_S)
        node.gate.refuse(key, attempt, "uv failed: no space\nhint: free some")
        ended = node.ended("refused")
        assert ended["type"] == "RuntimeEnvSetupError"
        reason = reason_in(ended["text"]) or ended["text"]
        assert reason.startswith(f"the environment {key} is not available on node ")
        assert reason.endswith(": uv failed: no space\nhint: free some")
        assert node.gate.asked() == {}
        later = node.attempt()
        node.start("again", node.runtime_env("late", later))
        wait_until(lambda: node.is_asked_for("late", later), "it is asked for", within_s=WITHIN_S)
        put_back()
        assert node.ended("again") == node.ran_in("late")


def test_a_task_that_waited_too_long_says_so_before_ray_gives_up_and_waits_once(node: Node) -> None:
    shorter = node.runtime_env("late", node.attempt(), config={"setup_timeout_seconds": 5})
    with node.gone("late"):
        waits = node.waits_in_log("late")
        ended = node.run(shorter)
    assert ended["type"] == "RuntimeEnvSetupError"
    assert "no agent of ray_envs answered in 4 s" in (reason_in(ended["text"]) or ended["text"])
    assert node.waits_in_log("late") == waits + 1  # of Ray's three tries


def test_a_root_that_cannot_be_written_fails_the_task(node: Node, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    key = node.keys["there"]
    lost = Store(Settings(root=tmp_path / "file" / "root")).venv(key)
    environment = placement.runtime_env(str(lost), {})
    ended = node.run({**environment, FIELD: field(key, node.attempt())})
    assert ended["type"] == "RuntimeEnvSetupError"
    reason = reason_in(ended["text"]) or ended["text"]
    assert f"{tmp_path / 'file'}" in reason
    assert reason.endswith("hint: make RAY_ENVS_ROOT a folder that this node can write")


def test_a_runtime_env_that_somebody_changed_fails_the_task(node: Node) -> None:
    changed = node.runtime_env("there", node.attempt(), py_executable=sys.executable)
    ended = node.run(changed)
    assert ended["type"] == "RuntimeEnvSetupError"
    assert f"is not the interpreter of the environment {node.keys['there']}" in ended["text"]


# -- the plugin alone


KEY = "wanted"


def create(plugin: EnvironmentPlugin, root: Path, *, attempt: int = 1) -> Any:
    """What Ray awaits, for an environment that is not below `root`."""
    environment = placement.runtime_env(str(Store(Settings(root=root)).venv(KEY)), {})
    runtime_env = RuntimeEnv(**environment, **{FIELD: field(KEY, attempt)})
    return plugin.create(None, runtime_env, SimpleNamespace(env_vars={}), logging.getLogger("test"))


def failed(plugin: EnvironmentPlugin, root: Path, *, attempt: int = 1) -> str:
    with pytest.raises(RuntimeError) as caught:
        asyncio.run(create(plugin, root, attempt=attempt))
    return str(caught.value)


def test_an_attempt_that_was_given_up_is_not_waited_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = EnvironmentPlugin()
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0")
    first = failed(plugin, tmp_path)
    assert f"no agent of ray_envs answered in 0 s; one never looked at {tmp_path}" in first
    monkeypatch.setenv(TIMEOUT_VARIABLE, "20")
    assert failed(plugin, tmp_path) == first
    assert Gate(tmp_path).asked() == {}


def test_a_slow_agent_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.5")
    gate = Gate(tmp_path)
    gate.asked()
    served = tmp_path / "wanted" / ".served"
    os.utime(served, (time.time() + 300,) * 2)  # it looks all the time
    assert "its agent is still preparing it" in failed(EnvironmentPlugin(), tmp_path)
    os.utime(served, (time.time() - 300,) * 2)
    assert "one last looked 30" in failed(EnvironmentPlugin(), tmp_path)


@pytest.mark.parametrize("value", ["", "soon", "nan", "inf", "-1"])
def test_whatever_the_node_says_no_wait_is_without_an_end(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, value)
    assert 0 <= _limit_s(RuntimeEnv()) <= 540


async def until(holds: Callable[[], Any]) -> None:
    async def held() -> None:
        while not holds():  # noqa: ASYNC110  # a file has no event
            await asyncio.sleep(0.02)

    await asyncio.wait_for(held(), WITHIN_S)


def test_a_wait_that_ray_ends_asks_no_more(tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def cancelled() -> None:
        wait = asyncio.create_task(create(EnvironmentPlugin(), tmp_path))
        await until(gate.asked)
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait

    asyncio.run(cancelled())
    assert gate.asked() == {}


def test_a_wait_goes_on_when_another_asker_of_its_key_has_left(tmp_path: Path) -> None:
    gate = Gate(tmp_path)

    async def left() -> None:
        wait = asyncio.create_task(create(EnvironmentPlugin(), tmp_path))
        await until(gate.asked)
        gate.withdraw(KEY)
        await until(gate.asked)
        gate.refuse(KEY, 1, "the end")
        with pytest.raises(RuntimeError, match="the end"):
            await wait

    asyncio.run(left())
