"""Ray's private parts that ray_envs uses, and which versions of Ray have been tried.

Runs wherever Ray is asked something. Besides the plugin and `worker.forked`, which cannot import
it, no other module names a private module of Ray. A part that a version of Ray lacks is left out
here, and its function says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from ray_envs.errors import WrongEnvironment

#: The oldest series that works, and the versions that the tests have run with, in order.
OLDEST = "2.51"
TESTED = ("2.51.2", "2.55.1", "2.60.0")
#: What a worker of Ray runs when it starts.
WORKER_MODULE = "ray._private.workers.default_worker"
#: How a program says whether it sends its token.
AUTH_MODE = "RAY_AUTH_MODE"
#: How many bytes at the end of an actor's id are the id of its job.
_JOB_ID_BYTES = 4
#: How long the head may take to answer or refuse.
_ASK_S = 3.0


def check(version: str) -> None:
    """Check that ray_envs works with this version of Ray. Note once if it is newer than all tried.

    Raises `WrongEnvironment`: it is too old.
    """
    try:
        found = Version(version)
    except InvalidVersion:
        _note_untried(version)
        return
    if found.release < Version(OLDEST).release:
        raise WrongEnvironment(
            f"Ray {version} is too old for ray_envs, which needs {OLDEST} or newer",
            hint=f"install another Ray here and on every node: `pip install 'ray>={OLDEST},<3'`",
        )
    if found > Version(TESTED[-1]):
        _note_untried(version)


@cache
def _note_untried(version: str) -> None:
    logging.getLogger("ray_envs").warning(
        "ray_envs has not been tried with Ray %s; the newest that it was tried with is %s",
        version,
        TESTED[-1],
    )


def described(version: str) -> str:
    """Return a version of Ray with whether it was tried, for people."""
    if version in TESTED:
        return f"{version} (tried)"
    return f"{version} (not one of the tried versions: {', '.join(TESTED)})"


def own_node() -> Any:
    """Return Ray's object for the node that this process works through; None if there is none."""
    import ray

    return ray._private.worker._global_node


def logs_folder() -> Path | None:
    """Return the folder where Ray's processes on this node write logs; None without a cluster."""
    node = own_node()
    return None if node is None else Path(node.get_logs_dir_path())


def address_of_ray_start() -> str:
    """Return the address of the cluster that `ray start` started on this machine, or ""."""
    from ray._private.utils import read_ray_address

    return read_ray_address() or ""


def set_uv_run_hook(is_on: bool) -> None:
    """Set whether a driver under `uv run` starts its workers with `uv run`.

    Ray reads the variable at its import, so a change of the variable alone may be too late.
    """
    from ray._private import ray_constants

    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = is_on


def job_table() -> list[dict[str, Any]]:
    """Return a row for each job of the cluster. The public function needs the dashboard."""
    return list(_state().job_table())


def detached_actors() -> list[tuple[str, str]]:
    """Return the job id (hex) and serialized runtime_env of detached actors that live on."""
    from ray.core.generated.gcs_pb2 import ActorTableData

    rows = _accessor().get_actor_table(None, None)
    actors = (ActorTableData.FromString(row) for row in rows)
    return [
        (actor.actor_id[-_JOB_ID_BYTES:].hex(), actor.serialized_runtime_env)
        for actor in actors
        if actor.is_detached and actor.state != ActorTableData.DEAD
    ]


def _accessor() -> Any:
    """Return the connection behind Ray's view of its tables, which 2.51 keeps elsewhere."""
    state = _state()
    if hasattr(state, "_connect_and_get_accessor"):
        return state._connect_and_get_accessor()
    state._check_connected()
    return state.global_state_accessor


def _state() -> Any:
    """Return Ray's private view of its tables."""
    from ray._private import state

    return state.state


def has_tokens() -> bool:
    """Whether this Ray can ask for a token: since 2.52."""
    return _token_loader() is not None


@cache
def note_no_tokens() -> None:
    """Log once that this Ray ignores the wish for a token."""
    logging.getLogger("ray_envs").warning(
        "%s is token, and this Ray has no tokens: its clusters are open to everyone who reaches "
        "them; Ray 2.52 and newer have tokens",
        AUTH_MODE,
    )


def makes_tokens() -> bool:
    """Whether this Ray makes a token for a local cluster by itself: 2.60 does, 2.55 does not."""
    if not has_tokens():
        return False
    from ray._private.authentication import authentication_token_setup as setup

    return hasattr(setup, "enable_token_auth_by_default")


def token_header() -> dict[str, str]:
    """Return the header with this user's token; empty if there is none, or Ray has no tokens.

    Ray keeps what it has read, and a process that has a token refuses all that come without one,
    whatever its mode is: workers of a cluster without tokens could not give it their results.
    """
    loader = _token_loader()
    if loader is None:
        return {}
    from ray.exceptions import AuthenticationError

    try:
        return dict(loader.get_token_for_http_header(ignore_auth_mode=True))
    except AuthenticationError:
        return {}
    finally:
        if os.environ.get(AUTH_MODE) != "token":
            loader.reset_cache()


def read_token_again() -> None:
    """Make Ray read this user's token again, because it has changed."""
    loader = _token_loader()
    if loader is not None:
        loader.reset_cache()


def send_token() -> None:
    """Make this process and its children send this user's token to its cluster."""
    from ray._raylet import Config  # type: ignore[attr-defined, unused-ignore]

    os.environ[AUTH_MODE] = "token"
    Config.initialize("")  # Ray read its settings at its import


def _token_loader() -> Any | None:
    try:
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return AuthenticationTokenLoader.instance()


def is_refused(address: str, headers: Mapping[str, str]) -> bool:
    """Whether the head at `address` refuses a question with these headers.

    Without `grpcio`, which `ray[default]` brings, nothing is found out.
    """
    try:
        import grpc  # type: ignore[import-untyped, unused-ignore]  # it has no stubs
        from ray.core.generated import gcs_service_pb2 as messages
        from ray.core.generated import gcs_service_pb2_grpc as services
    except ImportError:
        return False
    with grpc.insecure_channel(address) as channel:
        try:
            services.NodeInfoGcsServiceStub(channel).CheckAlive(
                messages.CheckAliveRequest(), timeout=_ASK_S, metadata=tuple(headers.items())
            )
        except grpc.RpcError as exc:
            return bool(exc.code() is grpc.StatusCode.UNAUTHENTICATED)
    return False
