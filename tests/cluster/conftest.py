"""One real Ray and one root for all tests on this floor, and a check that no process outlives them.

The wheels are downloaded once a session: every other root links to the first one's uv cache.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

# Ray reads this while it is imported; `uv run pytest` would upload the whole checkout otherwise.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"

import psutil  # type: ignore[import-untyped]
import pytest

from ray_envs import EnvSpec, RayEnvironmentProvider, Settings

#: The specs that most tests use. Variants that keep them locked save a resolution a test.
OLD_SIX = EnvSpec(packages=("six==1.16.0",))
NEW_SIX = EnvSpec(packages=("six==1.17.0",))
TABLES = EnvSpec(packages=("tabulate==0.9.0",))
KEPT = {"kept/old-six": OLD_SIX, "kept/new-six": NEW_SIX, "kept/tables": TABLES}

#: A module of this name stands in the driver's folder and in the environment of TABLES.
SHADOWED = "tabulate"


def wait_until(holds: Callable[[], bool], what: str, *, within_s: float = 20) -> None:
    """Return as soon as `holds()`; fail with `what` after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(0.02)


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def left_after(processes: Iterable[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Those that still run after so many seconds; returns as soon as none does.

    `psutil.wait_procs` fails on some kernels when a process ends at the wrong moment.
    """
    deadline = time.monotonic() + within_s
    while (left := [p for p in processes if is_running(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


class Processes:
    """The processes that a test must not leave behind, by their id and start time."""

    def __init__(self) -> None:
        self._doomed: list[psutil.Process] = []

    def must_end(self, pid: int) -> None:
        """Record the running process `pid`; after the test it must be gone."""
        with suppress(psutil.NoSuchProcess):
            self._doomed.append(psutil.Process(pid))

    def left(self) -> list[str]:
        """The recorded processes that still run, and every uv or compiler below this process."""
        found = [p for p in self._doomed if is_running(p)]
        for process in psutil.Process().children(recursive=True):
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if command and (command[0].endswith("/uv") or "compileall" in command):
                found.append(process)
        return [str(process) for process in found if is_running(process)]


@pytest.fixture(autouse=True)
def processes() -> Iterator[Processes]:
    """What must have ended after the test; uv and its children always."""
    recorded = Processes()
    yield recorded
    wait_until(lambda: not recorded.left(), f"the end of {recorded.left()}")


@pytest.fixture(scope="package")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the session's Ray."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="package")
def other_root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Settings]:
    """Makes settings with a root of their own that shares the downloaded wheels."""
    (root / "uv-cache").mkdir(exist_ok=True)

    def make(name: str) -> Settings:
        folder = tmp_path_factory.mktemp(name)
        (folder / "uv-cache").symlink_to(root / "uv-cache")
        for known in ("worker-starts.json", "uv-trials.json"):
            with suppress(FileNotFoundError):  # no worker has started there yet
                shutil.copy(root / known, folder)
        return Settings(root=folder)

    return make


@pytest.fixture(scope="package")
def cluster(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RayEnvironmentProvider]:
    """A provider on an embedded Ray, which ends with these tests and leaves no process."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / f"{SHADOWED}.py").write_text("raise ImportError('the driver folder won')\n")
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENVS_ROOT", str(root))
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        patch.chdir(folder)  # Ray gives every worker the folder that the driver was in
        # "local": another Ray that runs on this machine is none of ours.
        provider = RayEnvironmentProvider.connect("local")
    try:
        for name, spec in KEPT.items():
            provider.create(name, spec)
        provider.prepare(*KEPT)
        yield provider
    finally:
        ours = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
        provider.close()
        provider.close()
        assert left_after(ours, 30) == []
