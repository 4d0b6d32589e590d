"""Whoever holds the manager's handle can use it: workers of one variant start work in another.

What they run is sent by value and imports nothing of ours: no environment holds ray_envs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import ray

from ray_envs import RayEnvironmentProvider, Settings
from ray_envs.node.store import Store
from tests.cluster.conftest import NEW_SIX, Processes, wait_until

pytestmark = pytest.mark.timeout(300)

#: How long a worker may take on a machine that does other things too.
STARTED_S = 60

#: What a worker asks for: plain data, as `EnvSpec` names it.
SPEC = {"packages": list(NEW_SIX.packages)}


def start_in_another_variant(variant_id: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Define a variant, wait for it, and run a task and an actor there; tells all it saw."""
    import importlib.util
    import sys
    import time

    import ray

    manager: Any = ray.get_actor("EnvManager", namespace="ray_envs")

    def ask(verb: str, **arguments: Any) -> Any:
        return ray.get(getattr(manager, verb).remote(**arguments), timeout=50)

    def look() -> tuple[str, str]:
        import sys

        import six  # type: ignore[import-untyped, unused-ignore]

        return sys.prefix, six.__version__

    class Looker:
        def look(self) -> tuple[str, str]:
            return look()

    created = ask("create_env", variant_id=variant_id, spec=spec)
    told = ask("prepare", variant_ids=[variant_id])
    deadline = time.monotonic() + 50
    while told["variants"][variant_id]["status"] != "ACTIVE":
        if time.monotonic() > deadline:  # pytest would put its own into an assertion
            raise TimeoutError(str(told))
        told = ask("watch", variant_ids=[variant_id], seen=told["version"], timeout_s=5)
    environment = ask("get_environment", variant_id=variant_id)
    options = ask(
        "get_options",
        variant_id=variant_id,
        job_id=ray.get_runtime_context().get_job_id(),
        options={"num_cpus": 0, "runtime_env": {"env_vars": {"MINE": "1"}}},
    )
    actor = ray.remote(Looker).options(**options).remote()
    return {
        "has_ours": importlib.util.find_spec("ray_envs") is not None,
        "prefix": sys.prefix,
        "created": created,
        "environment": environment,
        "options": options,
        "task": ray.get(ray.remote(look).options(**options).remote(), timeout=50),
        "actor": ray.get(actor.look.remote(), timeout=50),
    }


def check_told(told: dict[str, Any], store: Store, variant_id: str, a: str, b: str) -> None:
    """What `start_in_another_variant` must have seen from the environment `a`, of `b`."""
    there = (str(store.venv(b)), "1.17.0")
    assert (told["has_ours"], told["prefix"]) == (False, str(store.venv(a)))
    assert (told["task"], told["actor"]) == (there, there)
    assert (told["created"]["variant_id"], told["created"]["key"]) == (variant_id, b)
    assert told["environment"]["python_path"] == str(store.python(b))
    options = told["options"]
    assert (options["num_cpus"], options["runtime_env"]["env_vars"]["MINE"]) == (0, "1")
    plain = [told["created"], told["environment"], options]
    assert json.loads(json.dumps(plain)) == plain


@pytest.fixture
def store(root: Path) -> Store:
    return Store(Settings(root=root))


@pytest.fixture
def keys(cluster: RayEnvironmentProvider) -> tuple[str, str]:
    """The keys of the variant that asks and of the one that it asks for."""
    old, new = (cluster.status(name)["key"] for name in ("kept/old-six", "kept/new-six"))
    return old, new


@pytest.fixture
def forget(cluster: RayEnvironmentProvider) -> Iterator[Callable[[str], str]]:
    """Names a variant that a worker will define; it is forgotten after the test."""
    named: list[str] = []

    def name(variant_id: str) -> str:
        named.append(variant_id)
        return variant_id

    yield name
    for variant_id in named:
        cluster.delete(variant_id, force=True)


def test_a_worker_of_one_variant_starts_a_task_and_an_actor_in_another(
    cluster: RayEnvironmentProvider,
    store: Store,
    keys: tuple[str, str],
    forget: Callable[[str], str],
) -> None:
    variant_id = forget("users/asked-by-a-task")
    task: Any = ray.remote(start_in_another_variant)
    options = cluster.options("kept/old-six", num_cpus=0)
    # of a module that no environment can import
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        told = ray.get(task.options(**options).remote(variant_id, SPEC), timeout=STARTED_S)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    check_told(told, store, variant_id, *keys)
    assert told["options"] == cluster.options(
        variant_id, num_cpus=0, runtime_env={"env_vars": {"MINE": "1"}}
    )
    assert cluster.explain(variant_id)["leases"] == [ray.get_runtime_context().get_job_id()]


def test_a_worker_without_ray_envs_can_read_each_refusal(cluster: RayEnvironmentProvider) -> None:
    def be_refused(asked: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, Any]]:
        import ray

        manager: Any = ray.get_actor("EnvManager", namespace="ray_envs")
        heard = []
        for verb, arguments in asked:
            try:
                ray.get(getattr(manager, verb).remote(**arguments), timeout=50)
            except RuntimeError as exc:
                heard.append((str(exc), exc.cause.args[1]))  # type: ignore[attr-defined]
        return heard

    kept = "kept/old-six"
    given: dict[str, Any] = {"runtime_env": {"pip": ["six"]}}
    asked: list[tuple[str, dict[str, Any], str, str]] = [
        ("get_options", {"variant_id": "nobody"}, "NotFound", "nobody"),
        ("get_environment", {"variant_id": "nobody"}, "NotFound", "nobody"),
        ("get_options", {"variant_id": kept, "options": given}, "InvalidInput", "'pip'"),
        ("get_options", {"variant_id": kept, "options": [1]}, "InvalidInput", "options: "),
        ("create_env", {"variant_id": "../x", "spec": SPEC}, "InvalidId", "'..'"),
        ("create_env", {"variant_id": "x", "spec": {"packges": []}}, "InvalidInput", "packages"),
        ("create_env", {"variant_id": "x", "spec": {"packages": ["!"]}}, "InvalidPackages", "!"),
        ("watch", {"variant_ids": ["nobody"], "seen": "?"}, "InvalidInput", "seen: "),
    ]
    task: Any = ray.remote(be_refused)
    heard = ray.get(
        task.options(**cluster.options(kept, num_cpus=0)).remote([row[:2] for row in asked]),
        timeout=STARTED_S,
    )
    assert len(heard) == len(asked)
    for (verb, _, kind, word), (text, error) in zip(asked, heard, strict=True):
        assert (verb, error["type"]) == (verb, kind)
        assert word in error["message"] + error.get("hint", ""), (verb, error)
        assert error["message"] in text  # also for whoever only prints it
        assert json.loads(json.dumps(error)) == error


#: A driver that leaves a detached actor behind, in the environment of a variant.
LEAVER = """\
import json, sys
import ray
import tests.cluster.client.test_handle_users as sent
from ray_envs import RayEnvironmentProvider

envs = RayEnvironmentProvider.connect(sys.argv[1])
ray.cloudpickle.register_pickle_by_value(sent)
start = sent.start_in_another_variant

class Asker:
    def ask(self, variant_id, spec):
        return start(variant_id, spec)

    def pid(self):
        import os
        return os.getpid()

actor = ray.remote(Asker).options(
    **envs.options("kept/old-six", num_cpus=0), name="asker", namespace="users", lifetime="detached"
).remote()
print(json.dumps([ray.get_runtime_context().get_job_id(), ray.get(actor.pid.remote())]))
"""


def test_a_detached_actor_does_so_after_the_driver_that_made_it_has_gone(
    cluster: RayEnvironmentProvider,
    root: Path,
    store: Store,
    keys: tuple[str, str],
    forget: Callable[[str], str],
    processes: Processes,
    tmp_path: Path,
) -> None:
    variant_id = forget("users/asked-by-an-actor")
    left = subprocess.run(
        [sys.executable, "-c", LEAVER, ray.get_runtime_context().gcs_address],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd=tmp_path,  # workers look for modules in the driver's folder, too
        env={
            **os.environ,
            "RAY_ENVS_ROOT": str(root),
            "PYTHONPATH": str(Path(__file__).parents[3]),
        },
    )
    assert left.returncode == 0, left.stderr
    job, pid = json.loads(left.stdout.strip().splitlines()[-1])
    actor = ray.get_actor("asker", namespace="users")
    try:
        processes.must_end(pid)
        wait_until(
            lambda: job in {row["JobID"] for row in _jobs() if row["IsDead"]},
            "the end of the job",
            within_s=STARTED_S,
        )
        assert psutil.pid_exists(pid)
        told = ray.get(actor.ask.remote(variant_id, SPEC), timeout=STARTED_S)
    finally:
        ray.kill(actor)
    check_told(told, store, variant_id, *keys)


def _jobs() -> list[dict[str, Any]]:
    from ray._private import state

    rows: list[dict[str, Any]] = state.state.job_table()
    return rows


# -- what Ray hands on to the tasks of a task ------------------------------------------------------


def test_the_tasks_of_a_task_run_in_its_environment_or_where_their_options_say(
    cluster: RayEnvironmentProvider, store: Store, keys: tuple[str, str]
) -> None:
    """Ray hands on the runtime_env, and no label selector: see README, Limits."""

    def start(variant_id: str) -> list[str]:
        import ray

        def where() -> str:
            import sys

            return sys.prefix

        manager: Any = ray.get_actor("EnvManager", namespace="ray_envs")
        asked = manager.get_options.remote(variant_id=variant_id, options={"num_cpus": 0})
        child: Any = ray.remote(num_cpus=0)(where)
        plain, placed = child.remote(), child.options(**ray.get(asked, timeout=50)).remote()
        found: list[str] = ray.get([plain, placed], timeout=50)
        return found

    task: Any = ray.remote(start)
    options = cluster.options("kept/old-six", num_cpus=0)
    found = ray.get(task.options(**options).remote("kept/new-six"), timeout=STARTED_S)
    assert found == [str(store.venv(key)) for key in keys]
