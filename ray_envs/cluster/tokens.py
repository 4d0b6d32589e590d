"""Uses Ray's token where a cluster asks for it. Ray itself would try for 20 s, and say nothing.

`ray.init()` of a newcomer writes `~/.ray/auth_token`; a `ray start` after it asks for that token,
but a program with the cluster's address sends it only if `RAY_AUTH_MODE=token` is set.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ray_envs.errors import ManagerUnavailable

#: How long the head may take to answer or refuse.
_ASK_S = 3.0


def use_token(address: str) -> None:
    """Make this process send this user's token if the cluster at `address` asks for one.

    Without `grpcio`, which `ray[default]` brings, nothing is found out.

    Raises `ManagerUnavailable`: it asks for a token, and this user has none or another one.
    """
    from ray._private.authentication import authentication_token_setup as setup

    mode = os.environ.get(setup.AUTH_MODE_ENV_VAR)
    token = _own_token()
    if not _is_refused(address, token if mode == "token" else {}):
        if mode == "token" and not token:
            raise _refused("RAY_AUTH_MODE is token, and this user has none")
        return
    if token and mode is None and not _is_refused(address, token):
        setup._enable_token_auth()
        return
    why = "this user has another one" if token else "this user has none"
    if mode not in (None, "token"):
        why = f"{setup.AUTH_MODE_ENV_VAR} is {mode}"
    raise _refused(f"the cluster at {address} wants a token, and {why}")


def _refused(why: str) -> ManagerUnavailable:
    return ManagerUnavailable(
        why,
        hint="export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN with the token of the cluster: "
        "`ray get-auth-token` prints it there",
    )


def _own_token() -> dict[str, str]:
    """Return the header with this user's token; empty if there is none."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined, unused-ignore]
    from ray.exceptions import AuthenticationError

    try:
        loader = AuthenticationTokenLoader.instance()
        return dict(loader.get_token_for_http_header(ignore_auth_mode=True))
    except AuthenticationError:
        return {}


def make_token_if_home_is_closed() -> None:
    """Give the embedded Ray a token in memory where its file could not be written.

    Ray writes `~/.ray/auth_token` at its first local start. Containers often have no such home.
    """
    from ray._private.authentication import authentication_token_setup as setup
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined, unused-ignore]

    if os.environ.get(setup.AUTH_MODE_ENV_VAR, "token") != "token":
        return
    if not _own_token() and not _can_write_home():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        AuthenticationTokenLoader.instance().reset_cache()


def _can_write_home() -> bool:
    try:
        folder = Path.home() / ".ray"
    except RuntimeError:  # this user has no entry among the users of the machine
        return False
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _is_refused(address: str, headers: Mapping[str, str]) -> bool:
    """Whether the head at `address` refuses a question with these headers."""
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
