"""What the tests of the hands share: a warm uv cache, real locks, a look for broken promises."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest

from ray_envs.decisions import locks, resolving
from ray_envs.models import BuildRequest, NodeEnvState
from ray_envs.node.agent import NodeAgent
from ray_envs.node.interpreter import this_platform, this_target, uv_version
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.node.uv_trial import layout_here
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.testing import FakeUv

RAY = version("ray")

#: How long a process that was killed may take to be gone, and everything that it had started.
_GONE_S = 10.0

#: How long a build in a test may take, on a machine that does other things too.
BUILT_S = 120.0

Locked = Callable[..., BuildRequest]


def new_agent(settings: Settings) -> NodeAgent:
    return NodeAgent(settings=settings.to_environment(), node_id="local", ray_version=RAY)


async def built(agent: NodeAgent, request: BuildRequest, *, attempt: int = 0) -> NodeEnvState:
    """The state of `request` once the agent has made it ready or given up."""
    await agent.ensure(request=request.model_dump(mode="json"), attempt=attempt)
    seen, deadline = -1, time.monotonic() + BUILT_S
    while time.monotonic() < deadline:
        told = await agent.watch(seen=seen, timeout_s=1)
        seen = told["version"]
        for data in told["states"]:
            state = NodeEnvState.model_validate(data)
            if state.key == request.key and state.phase.is_final:
                return state
    raise TimeoutError(f"{request.key} is still being built: {told['states']}")


def build(settings: Settings, request: BuildRequest, *, attempt: int = 0) -> NodeEnvState:
    """Build `request` with an agent of this process, from its start to its end."""

    async def whole() -> NodeEnvState:
        agent = new_agent(settings)
        try:
            return await built(agent, request, attempt=attempt)
        finally:
            await agent.stop()

    return asyncio.run(whole())


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every living process, apart from this one, that has to do with `folder`."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = [process.cwd(), *process.cmdline(), *process.environ().values()]
            if any(str(folder) in word for word in words):
                found.append(process)
    return found


def wait_until(is_true: Callable[[], Any], what: str, timeout_s: float = _GONE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)


def broken_promises(settings: Settings) -> list[str]:
    """What is wrong below a root where nobody works any more."""
    broken = [
        f"left behind: {process.pid} {process.cmdline()}"
        for process in processes_of(settings.root)
        if process.is_running()
    ]
    store = Store(settings)
    for file in settings.root.glob("store/*/record.json"):
        key = file.parent.name
        if store.record(key) is None:
            broken.append(f"{key} has a record that does not count")
            continue
        check = subprocess.run(
            [store.python(key), "-c", "import sys; print(sys.prefix)"],
            capture_output=True,
            text=True,
            check=False,
        )
        if check.returncode:
            broken.append(f"{key} is ready and does not start: {check.stderr}")
    kinds = ("*.lock", "envs/*.lock", "store/*.lock", "store/*.hold")
    for lock in (path for kind in kinds for path in settings.root.glob(kind)):
        fd = os.open(lock, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            broken.append(f"{lock} is still held")
        finally:
            os.close(fd)
    return broken


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder, and a process that may not read what is closed to it; root drops its rights."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(folder)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An empty root; after the test, every promise about it must hold."""
    folder = tmp_path / "root"
    yield folder
    settings = Settings(root=folder)
    with suppress(TimeoutError):  # the kernel may take a moment to clear what was killed
        wait_until(lambda: not processes_of(folder), "every process is gone")
    assert broken_promises(settings) == []
    shutil.rmtree(folder, ignore_errors=True)  # pytest keeps folders, and each has a whole cache


@pytest.fixture
def settings(root: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings for impatient people."""
    monkeypatch.setattr("ray_envs.node.provisioning._RETRY_PAUSE_S", 0.01)
    return Settings(root=root, lock_timeout_s=60, tick_s=0.5, uv_retries=2, build_niceness=0)


@pytest.fixture
def fake_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeUv:
    """The uv of every Builder that this test makes."""
    fake = FakeUv(tmp_path / "fake-uv")
    monkeypatch.setattr("ray_envs.node.uv.uv.find_uv_bin", lambda: str(fake.executable))
    return fake


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Locked:
    """A function that gives the build request of some packages; each is resolved once a session."""
    folder = tmp_path_factory.mktemp("locks")
    builder = Builder(Settings(root=folder), folder / "cache")
    target, platform = this_target(RAY), this_platform()
    known: dict[tuple[str, ...], BuildRequest] = {}

    def request(*packages: str) -> BuildRequest:
        if packages not in known:
            project = folder / str(len(known))
            project.mkdir()
            text = resolving.project_text(Definition(packages=packages), target)
            (project / "pyproject.toml").write_text(text)
            uv_lock = asyncio.run(builder.resolve(project)).text
            installed = locks.installed(uv_lock, platform)
            known[packages] = BuildRequest(
                key=locks.key_of(installed, target, platform),
                pyproject=text,
                uv_lock=uv_lock,
                target=target,
                platform=platform.name,
                lock_sha256=locks.lock_sha256(uv_lock),
                packages={package.name: package.version for package in installed},
            )
        return known[packages]

    return request


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory, locked: Locked) -> Path:
    """A uv cache that holds ray and what it needs, with byte-code, and nothing else."""
    settings = Settings(root=tmp_path_factory.mktemp("warm"))
    state = build(settings, locked())
    assert state.phase.value == "ready", state
    return Store(settings).cache


def link_cache(warm_cache: Path, settings: Settings) -> None:
    """Give a root links to a warm cache, and what is known of workers' starts and uv from it."""
    subprocess.run(["cp", "-al", warm_cache, Store(settings).cache], check=True)
    for name in ("worker-starts.json", "uv-trials.json"):
        shutil.copy(warm_cache.parent / name, settings.root)


def tried(settings: Settings) -> Settings:
    """The same settings, whose root knows that the real uv can be used: a fake one is not tried."""
    settings.root.mkdir(parents=True, exist_ok=True)
    trials = {"layouts": {uv_version(): layout_here()}}
    (settings.root / "uv-trials.json").write_text(json.dumps(trials))
    return settings


@pytest.fixture
def warm(settings: Settings, warm_cache: Path) -> Settings:
    """Settings whose root has its own links to the warm cache."""
    settings.root.mkdir()
    link_cache(warm_cache, settings)
    return settings


@pytest.fixture
def environment(settings: Settings) -> Callable[[str], Store]:
    """A function that makes an environment by hand, without uv: an interpreter and the hold."""
    store = Store(settings)
    store.set_up()

    def make(key: str) -> Store:
        minor = f"{sys.version_info.major}.{sys.version_info.minor}"
        store.begin(key)
        base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        store.site_packages(key, minor).mkdir(parents=True)
        store.python(key).parent.mkdir()
        store.python(key).symlink_to(base)
        (store.venv(key) / "pyvenv.cfg").write_text(f"home = {os.path.dirname(base)}\n")
        store.install_hold(key, minor)
        return store

    return make


class Child:
    """A real process that runs an environment's interpreter until it is told to end."""

    def __init__(self, python: Path, code: str = "") -> None:
        self.process = subprocess.Popen(
            [python, "-c", f"{code}\nprint('up', flush=True)\nimport sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline().strip()

    def kill(self) -> None:
        """`kill -9`, and wait until the kernel has cleared the process."""
        self.process.kill()
        self.process.communicate()

    def end(self) -> None:
        self.process.communicate("")


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def start(python: Path, code: str = "") -> Child:
        children.append(Child(python, code))
        return children[-1]

    yield start
    for each in children:
        each.kill()
