"""The life of a variant on a real Ray: what runs keeps what it began with, what is promised stays.

Another driver is a real process with a job of its own on the session's Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import ray

from ray_envs import EnvSpec, RayEnvironmentProvider, Settings
from ray_envs.errors import EnvironmentInUse, NotFound, ResolutionFailed
from ray_envs.node.store import Store
from tests.cluster.conftest import Processes, wait_until

pytestmark = pytest.mark.timeout(120)

#: How long a task may take to start on a machine that does other things too.
STARTED_S = 60

INI = "iniconfig==2.0.0"
ADDED = {"added": {"iniconfig": "2.0.0"}, "removed": {}, "changed": {}}
REMOVED = {"added": {}, "removed": {"iniconfig": "2.0.0"}, "changed": {}}

Make = Callable[..., str]


@pytest.fixture
def make(cluster: RayEnvironmentProvider) -> Iterator[Make]:
    """Creates variants that are ready; forgets them after the test."""
    made: list[str] = []

    def create(variant_id: str, *packages: str) -> str:
        cluster.create(variant_id, EnvSpec(packages=packages))
        made.append(variant_id)
        return str(cluster.prepare(variant_id)[variant_id]["key"])

    yield create
    for variant_id in made:
        cluster.delete(variant_id, force=True)


@pytest.fixture
def store(root: Path) -> Store:
    return Store(Settings(root=root))


class Running:
    """A task that runs in a variant until it is told to end."""

    def __init__(self, cluster: RayEnvironmentProvider, variant_id: str, folder: Path) -> None:
        def look_when_told(folder: str) -> tuple[int, str, bool]:
            import importlib.util
            import os
            import pathlib
            import sys
            import time

            place = pathlib.Path(folder)
            (place / "begun").write_text(str(os.getpid()))
            while not (place / "go").exists():
                time.sleep(0.02)
            return os.getpid(), sys.prefix, importlib.util.find_spec("iniconfig") is not None

        self._folder = folder
        task: Any = ray.remote(look_when_told)
        self._answer = task.options(**cluster.options(variant_id, num_cpus=0)).remote(str(folder))
        begun = folder / "begun"
        wait_until(
            lambda: begun.exists() and bool(begun.read_text()), "its start", within_s=STARTED_S
        )
        self.pid = int(begun.read_text())

    def end(self) -> tuple[str, bool]:
        (self._folder / "go").touch()
        pid, prefix, has_iniconfig = ray.get(self._answer, timeout=STARTED_S)
        assert pid == self.pid  # it was not started anew
        return prefix, has_iniconfig


@pytest.fixture
def run(cluster: RayEnvironmentProvider, tmp_path: Path) -> Iterator[Callable[[str], Running]]:
    running: list[Running] = []

    def start(variant_id: str) -> Running:
        running.append(Running(cluster, variant_id, tmp_path))
        return running[-1]

    yield start
    (tmp_path / "go").touch()


def looked(cluster: RayEnvironmentProvider, variant_id: str) -> tuple[str, bool]:
    """Where a task of the variant runs, and whether iniconfig is there."""

    def look() -> tuple[str, bool]:
        import importlib.util
        import sys

        return sys.prefix, importlib.util.find_spec("iniconfig") is not None

    task: Any = ray.remote(look)
    options = cluster.options(variant_id, num_cpus=0)
    found: tuple[str, bool] = ray.get(task.options(**options).remote(), timeout=STARTED_S)
    return found


#: Connects to the Ray at argv[1], does what argv[2] says, and stays until it is told to end.
DRIVER = """\
import json, sys
import ray
from ray_envs import RayEnvironmentProvider

envs = RayEnvironmentProvider.connect(sys.argv[1])
told = {}
exec(sys.argv[2])
print(json.dumps({"job": ray.get_runtime_context().get_job_id(), **told}), flush=True)
sys.stdin.read()
"""

Driver = Callable[[str], tuple["subprocess.Popen[str]", dict[str, Any]]]


@pytest.fixture
def driver(root: Path, tmp_path: Path, processes: Processes) -> Iterator[Driver]:
    """Starts another driver; gives its process and what it told."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        address = ray.get_runtime_context().gcs_address
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "RAY_ENVS_ROOT": str(root)},
        )
        started.append(process)
        processes.must_end(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                return process, json.loads(line)
        raise AssertionError(f"the driver ended with {process.wait()}")

    yield start
    for process in started:
        process.kill()
        process.communicate()


def becauses(cluster: RayEnvironmentProvider, **options: Any) -> dict[str, tuple[bool, str]]:
    """What a collection of everything idle does with each key, and why."""
    told = cluster.gc(idle_hours=0, **options)
    rows = [*told["deleted"], *told["kept"]]
    return {row["key"]: (row["collect"], row["because"]) for row in rows}


# -- what runs


def test_what_runs_keeps_its_generation_and_what_starts_gets_the_new_one(
    cluster: RayEnvironmentProvider, make: Make, run: Callable[[str], Running], store: Store
) -> None:
    old = make("life/grows", "six==1.16.0")
    running = run("life/grows")
    added = cluster.add("life/grows", [INI])
    assert (added["status"], added["generation"], added["diff"]) == ("ACTIVE", 2, ADDED)
    new = added["key"]
    assert looked(cluster, "life/grows") == (str(store.venv(new)), True)
    back = cluster.rollback("life/grows")
    assert (back["status"], back["generation"], back["key"]) == ("ACTIVE", 1, old)
    assert looked(cluster, "life/grows") == (str(store.venv(old)), False)
    again = cluster.rollback("life/grows", 2)
    assert (again["generation"], again["diff"]) == (2, ADDED)
    assert running.end() == (str(store.venv(old)), False)
    rows = cluster.generations("life/grows")
    assert [(row["generation"], row["is_current"]) for row in rows] == [(1, False), (2, True)]


def test_a_variant_that_is_used_is_deleted_only_by_force_and_its_task_ends_well(
    cluster: RayEnvironmentProvider, make: Make, run: Callable[[str], Running], store: Store
) -> None:
    key = make("life/used", "six==1.15.0")
    running = run("life/used")
    with pytest.raises(EnvironmentInUse, match="life/used is in use") as caught:
        cluster.delete("life/used")
    (user,) = caught.value.detail.splitlines()  # our own lease is no reason
    assert user.startswith(f"process {running.pid} on node ")
    assert "look_when_told" in user
    assert "--force" in caught.value.hint
    assert cluster.status("life/used")["status"] == "ACTIVE"
    cluster.delete("life/used", force=True)
    assert cluster.status("life/used")["status"] == "NOT_EXISTS"
    assert becauses(cluster)[key] == (False, "a process runs in it")
    assert running.end() == (str(store.venv(key)), False)
    assert key in store.records()


def test_a_worker_without_ray_envs_speaks_to_the_manager_in_plain_data(
    cluster: RayEnvironmentProvider, make: Make
) -> None:
    def speak(variant_id: str) -> tuple[bool, Any, Any, Any]:
        import importlib.util

        import ray

        manager: Any = ray.get_actor("EnvManager", namespace="ray_envs")
        status = ray.get(manager.get_env_status.remote(variant_id=variant_id))
        added = ray.get(
            manager.add_deps.remote(variant_id=variant_id, packages=["iniconfig==2.0.0"])
        )
        try:
            ray.get(manager.add_deps.remote(variant_id="nobody", packages=["six"]))
        except RuntimeError as exc:
            error = exc.cause.args[1]  # type: ignore[attr-defined]
        return importlib.util.find_spec("ray_envs") is not None, status, added, error

    key = make("life/speaks", "six==1.16.0")
    task: Any = ray.remote(speak)
    options = cluster.options("life/speaks", num_cpus=0)
    has_ours, status, added, error = ray.get(
        task.options(**options).remote("life/speaks"), timeout=STARTED_S
    )
    assert has_ours is False
    assert (status["status"], status["key"]) == ("ACTIVE", key)
    assert (added["generation"], added["diff"]) == (2, ADDED)
    assert (error["type"], error["variant_id"]) == ("NotFound", "nobody")
    assert json.loads(json.dumps([status, added, error])) == [status, added, error]


# -- what is promised


def test_what_a_job_was_promised_stays_until_its_driver_was_killed(
    cluster: RayEnvironmentProvider, make: Make, driver: Driver, store: Store
) -> None:
    key = make("life/promised", "six==1.11.0")
    process, told = driver('envs.options("life/promised")')
    with pytest.raises(EnvironmentInUse) as caught:
        cluster.delete("life/promised")
    assert caught.value.detail == f"job {told['job']} was promised {key[:12]}"
    cluster.delete("life/promised", force=True)
    assert becauses(cluster)[key] == (False, f"leased to job {told['job']}")
    assert key in store.records()
    process.kill()
    process.wait()
    wait_until(lambda: becauses(cluster, dry_run=True)[key][0], "the end of the lease", within_s=60)
    assert becauses(cluster)[key][0] is True
    assert key not in store.records()


DETACHED = """
class Sitter:
    def where(self):
        import os, sys
        return os.getpid(), sys.prefix

def make(variant_id, **options):
    actor = ray.remote(Sitter).options(
        **envs.options(variant_id, num_cpus=0), name="sitter", namespace="life",
        lifetime="detached", max_restarts=-1, **options
    ).remote()
    told["pid"], told["prefix"] = ray.get(actor.where.remote())

envs.options("life/left")
make("life/sits")
"""


def test_what_a_detached_actor_was_given_stays_after_its_job_and_it_can_restart(
    cluster: RayEnvironmentProvider, make: Make, driver: Driver, store: Store, processes: Processes
) -> None:
    key, left = make("life/sits", "six==1.13.0"), make("life/left", "six==1.12.0")
    process, told = driver(DETACHED)
    assert told["prefix"] == str(store.venv(key))
    actor = ray.get_actor("sitter", namespace="life")
    try:
        process.communicate("")  # the job ends as jobs do
        wait_until(
            lambda: cluster.explain("life/left")["leases"] == [], "the job's end", within_s=60
        )
        assert cluster.explain("life/sits")["leases"] == [told["job"]]
        for name in ("life/sits", "life/left"):
            cluster.delete(name, force=True)
        gone = becauses(cluster)
        assert (gone[key][0], gone[left][0]) == (False, True)
        psutil.Process(told["pid"]).kill()
        assert becauses(cluster)[key][0] is False

        def restarted() -> bool:
            try:
                pid, prefix = ray.get(actor.where.remote(), timeout=STARTED_S)
            except ray.exceptions.ActorUnavailableError:
                return False
            processes.must_end(pid)
            return bool(pid != told["pid"] and prefix == told["prefix"])

        wait_until(restarted, "the actor's new life", within_s=STARTED_S)
    finally:
        ray.kill(actor)
    wait_until(lambda: becauses(cluster, dry_run=True)[key][0], "the end of the lease", within_s=60)


# -- every verb, as programs say it


def test_a_provider_has_every_verb(cluster: RayEnvironmentProvider, make: Make) -> None:
    heard: list[dict[str, Any]] = []
    is_over = threading.Event()

    def hear(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["variant_id"] == "life/copy":
            is_over.set()

    position = cluster.events(since=-1)["next"]
    end = cluster.subscribe(hear, kinds=["DependenciesAdded", "EnvironmentCreated"])
    first = make("life/verbs", "six==1.16.0")
    try:
        dry = cluster.add("life/verbs", [INI], dry_run=True)
        assert (dry["dry_run"], dry["diff"], dry["generation"]) == (True, ADDED, 2)
        assert cluster.add("life/verbs", f"# tools\n{INI}\n")["diff"] == ADDED
        updated = cluster.update("life/verbs", ["six==1.17.0"])
        assert updated["diff"]["changed"] == {"six": ["1.16.0", "1.17.0"]}
        assert cluster.remove("life/verbs", ["iniconfig"])["diff"] == REMOVED
        with pytest.raises(ResolutionFailed) as caught:
            cluster.add("life/verbs", ["six==99"])
        assert "six==99" in caught.value.detail
        assert cluster.diff("life/verbs", 1, 4)["diff"]["changed"] == {"six": ["1.16.0", "1.17.0"]}
        assert cluster.rollback("life/verbs", 1)["key"] == first
        assert cluster.deps("life/verbs")["dependencies"] == ["six==1.16.0"]
        synced = cluster.sync("life/verbs")
        assert (synced["status"], synced["exit_code"]) == ("ACTIVE", 0)
        assert [row["damaged_files"] for row in synced["checks"]] == [0]

        exported = cluster.export("life/verbs")
        files = exported["files"]
        copy = cluster.import_project(
            "life/copy",
            pyproject=files["pyproject.toml"],
            uv_lock=files["uv.lock"],
            options=json.loads(files["options.json"]),
            wait_s=60,
        )
        assert (copy["status"], copy["key"]) == ("ACTIVE", first)
        assert cluster.export("life/copy")["files"] == files
        assert (
            "six==1.16.0"
            in cluster.export("life/copy", "requirements")["files"]["requirements.txt"]
        )
        assert cluster.pin("life/copy")["is_pinned"] is True
        assert becauses(cluster, dry_run=True)[first] in (
            (False, "pinned generation 1 of life/copy"),
            (False, "current generation 1 of life/verbs"),
            (False, "a process runs in it"),
        )
        told = cluster.doctor(variant_id="life/copy")
        (row,) = told["environments"]
        assert (row["variant_id"], row["key"], row["left"]) == ("life/copy", first, [])
        assert told["history"] == "ok"
        assert is_over.wait(60)
    finally:
        end()
        cluster.delete("life/copy", force=True)
    with pytest.raises(NotFound):
        cluster.rollback("life/copy")

    rows = cluster.operations(variant_id="life/verbs")["rows"]
    told_rows = [(row["operation"], row["status"]) for row in reversed(rows)]
    assert told_rows[-7:] == [
        ("create", "succeeded"), ("add", "succeeded"), ("update", "succeeded"),
        ("remove", "succeeded"), ("add", "failed"), ("rollback", "succeeded"),
        ("sync", "succeeded"),
    ]  # fmt: skip
    events = cluster.events(position, variant_id="life/verbs")["events"]
    kinds = [event["kind"] for event in events if not event["kind"].startswith("EnvironmentLock")]
    assert [kind for kind in kinds if kind != "EnvironmentPrepared"] == [
        "EnvironmentCreationStarted", "EnvironmentCreated", "DependenciesAdded",
        "DependenciesUpdated", "DependenciesRemoved", "DependencyOperationFailed",
        "EnvironmentRolledBack", "EnvironmentSynced",
    ]  # fmt: skip
    ours = [event for event in heard if str(event["variant_id"]).startswith("life/")]
    assert [(event["kind"], event["variant_id"]) for event in ours] == [
        ("EnvironmentCreated", "life/verbs"),
        ("DependenciesAdded", "life/verbs"),
        ("EnvironmentCreated", "life/copy"),
    ]
    assert cluster.delete_operations(variant_id="life/copy") >= 2
    assert cluster.operations(variant_id="life/copy")["total"] == 0
