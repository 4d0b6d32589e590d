"""Starts, finds and ends the EnvManager; makes Ray actors of our classes."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from ray_envs import worker
from ray_envs.cluster import actor_shell, bare_node
from ray_envs.cluster.connecting import NAMESPACE, UV_RUN_HOOK, is_client
from ray_envs.errors import ManagerUnavailable, from_dict

MANAGER = "EnvManager"
#: How long the helper that starts the manager may take; importing Ray alone takes seconds.
_START_TIMEOUT_S = 120
#: How often the start is tried, and the pause in between.
_START_TRIES = 3
_START_PAUSE_S = 1.0
#: How long a manager may take to stop by itself, and then its agents.
_END_TIMEOUT_S = 30
#: The helper must not inherit these variables of the calling job (beginnings of their names).
_OF_THE_JOB = ("RAY_JOB_", "RAY_RUNTIME_ENV", "RAY_CLIENT_", "RAY_OVERRIDE_", "PYTHON")


def actor_class(cls: type, *, version: str | None = None) -> Any:
    """Return `cls` as a Ray actor; see `actor_shell`. `calls.unwrapped` restores its errors.

    If `version` is given, the node may lack this version of ray_envs; see `bare_node.node_shell`.
    """
    import ray

    verbs = [
        name
        for name, _ in inspect.getmembers(cls, inspect.iscoroutinefunction)
        if not name.startswith("_")
    ]
    with by_value([worker, actor_shell, bare_node]):
        shell = actor_shell.actor_shell(cls.__module__, cls.__name__, verbs)
        if version is not None:
            shell = bare_node.node_shell(shell, cls.__module__, cls.__name__, version)
        # Ray pickles the class at its first use, when `by_value` is over: make a copy now that
        # belongs to no module.
        return ray.remote(ray.cloudpickle.loads(ray.cloudpickle.dumps(shell)))


@contextmanager
def by_value(modules: Iterable[ModuleType]) -> Iterator[None]:
    """Pickle what is in `modules` by value in this block, because workers cannot import it."""
    from ray import cloudpickle

    registered = []
    try:
        for module in modules:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def find_manager() -> Any | None:
    """Return the handle of the cluster's EnvManager, or None if there is none."""
    import ray

    try:
        return ray.get_actor(MANAGER, namespace=NAMESPACE)
    except ValueError:
        return None


def create_manager(manager_class: type, settings: dict[str, str]) -> Any:
    """Create the detached EnvManager on the head node, or return the one that is there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    head = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" in node.get("Resources", {})
    ]
    placement = {"scheduling_strategy": NodeAffinitySchedulingStrategy(head[0], soft=False)}
    return (
        actor_class(manager_class)
        .options(
            name=MANAGER,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
            **(placement if head else {}),
        )
        .remote(settings=settings)
    )


def start_manager(settings: dict[str, str]) -> Any:
    """Start the EnvManager from a short helper process, and return its handle.

    A detached actor keeps the working_dir and env_vars of the job that creates it, so the user's
    job must not create it. The helper is another job: an isolated interpreter in the folder `/`,
    without the variables of the user's job.

    Raises `ManagerUnavailable`: the helper failed; `detail` has its last lines.
    """
    if is_client():
        raise ManagerUnavailable(
            "this cluster has no EnvManager, and a program on Ray Client cannot start it",
            hint="run `ray-envs up` on a node of the cluster",
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    for left in reversed(range(_START_TRIES)):
        try:
            return _started_manager(settings, deadline - time.monotonic())
        except ManagerUnavailable:  # it may have been killed while it started
            if not left or time.monotonic() + _START_PAUSE_S > deadline:
                raise
            time.sleep(_START_PAUSE_S)
    raise AssertionError("the last try returns or raises")


def _started_manager(settings: dict[str, str], timeout_s: float) -> Any:
    """Start the EnvManager once; see `start_manager`."""
    import ray

    address = ray.get_runtime_context().gcs_address
    environ = {k: v for k, v in os.environ.items() if not k.startswith((*_OF_THE_JOB, "RAY_ENVS_"))}
    environ.update(settings, **{UV_RUN_HOOK: "0"})
    code = "import sys; from ray_envs.manager.start import start; start(sys.argv[1])"
    command = [sys.executable, "-I", "-c", code, address]
    try:
        done = subprocess.run(
            command, cwd="/", env=environ, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ManagerUnavailable(
            f"the EnvManager did not start within {_START_TIMEOUT_S} s",
            hint="see Ray's logs of the actor EnvManager, then try again",
        ) from None
    lines = done.stdout.strip().splitlines()
    if done.returncode and lines and lines[-1].startswith("{"):
        raise from_dict(json.loads(lines[-1]))
    if done.returncode:
        raise ManagerUnavailable(
            "the EnvManager could not be started",
            detail="\n".join(done.stderr.strip().splitlines()[-8:]),
            hint=_start_hint(done.stderr),
        )
    handle = find_manager()
    if handle is None:
        raise ManagerUnavailable(
            "the EnvManager ended right after its start", hint="see Ray's logs"
        )
    return handle


def _start_hint(stderr: str) -> str:
    if "No module named" in stderr or "has no attribute" in stderr:
        return "ray_envs must be installed in the Python that runs the cluster's nodes"
    return "see Ray's logs of the actor EnvManager, then try again"


def end_manager() -> list[str]:
    """End the cluster's EnvManager and its agents; all files stay.

    Returns the names of the actors that ended; empty if there was no manager.

    Raises `ManagerUnavailable`: some actors still run.
    """
    import ray

    handle = find_manager()
    if handle is None:
        return []
    names = _our_actors()
    with suppress(Exception):  # if it hangs or dies at this moment, it is killed below
        ray.get(handle.stop.remote(), timeout=_END_TIMEOUT_S)
    ray.kill(handle, no_restart=True)
    deadline = time.monotonic() + _END_TIMEOUT_S
    while left := _our_actors() & names:  # the agents end with the manager that owns them
        if time.monotonic() >= deadline:
            raise ManagerUnavailable(
                f"still running after {_END_TIMEOUT_S} s: {', '.join(sorted(left))}",
                hint="try again, or read Ray's logs of these actors",
            )
        time.sleep(0.1)
    return sorted(names)


def _our_actors() -> set[str]:
    """Return the names of the manager and the agents that run."""
    from ray.util import list_named_actors

    rows = list_named_actors(all_namespaces=True)
    return {row["name"] for row in rows if row["namespace"] == NAMESPACE}
