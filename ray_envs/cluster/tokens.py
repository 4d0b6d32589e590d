"""Uses Ray's token where a cluster asks for it. Ray itself would try for 20 s, and say nothing.

`ray.init()` of a newcomer writes `~/.ray/auth_token`; a `ray start` after it asks for that token,
but a program with the cluster's address sends it only if `RAY_AUTH_MODE=token` is set. Older
versions of Ray have no tokens, or make none by themselves; `ray_versions` knows which.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ray_envs.cluster import ray_versions
from ray_envs.cluster.ray_versions import AUTH_MODE
from ray_envs.errors import ManagerUnavailable


def use_token(address: str) -> None:
    """Make this process send this user's token if the cluster at `address` asks for one.

    Without `grpcio`, which `ray[default]` brings, nothing is found out.

    Raises `ManagerUnavailable`: it asks for a token, and this user has none or another one.
    """
    mode = os.environ.get(AUTH_MODE)
    if not ray_versions.has_tokens():
        if mode == "token":
            ray_versions.note_no_tokens()
        if ray_versions.is_refused(address, {}):
            raise ManagerUnavailable(
                f"the cluster at {address} wants a token, and this Ray has no tokens",
                hint="install the Ray of that cluster here",
            )
        return
    token = ray_versions.token_header()
    if not ray_versions.is_refused(address, token if mode == "token" else {}):
        if mode == "token" and not token:
            raise _refused(f"{AUTH_MODE} is token, and this user has none")
        return
    if token and mode is None and not ray_versions.is_refused(address, token):
        ray_versions.send_token()
        return
    why = "this user has another one" if token else "this user has none"
    if mode not in (None, "token"):
        why = f"{AUTH_MODE} is {mode}"
    raise _refused(f"the cluster at {address} wants a token, and {why}")


def _refused(why: str) -> ManagerUnavailable:
    return ManagerUnavailable(
        why,
        hint="export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN with the token of the cluster: "
        "`ray get-auth-token` prints it there",
    )


def make_token_if_home_is_closed() -> None:
    """Give the embedded Ray a token in memory where its file could not be written.

    Newer versions of Ray write `~/.ray/auth_token` at their first local start. Containers often
    have no such home.
    """
    mode = os.environ.get(AUTH_MODE)
    if mode not in (None, "token") or not ray_versions.has_tokens():
        return
    if mode is None and not ray_versions.makes_tokens():
        return
    if not ray_versions.token_header() and not _can_write_home():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray_versions.read_token_again()


def _can_write_home() -> bool:
    try:
        folder = Path.home() / ".ray"
    except RuntimeError:  # this user has no entry among the users of the machine
        return False
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)
