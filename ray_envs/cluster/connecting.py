"""Connects this process to a Ray cluster, or starts an embedded one."""

from __future__ import annotations

import os
import site
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

from ray_envs.cluster import ray_versions
from ray_envs.cluster.tokens import make_token_if_home_is_closed, use_token
from ray_envs.errors import InvalidInput, ManagerUnavailable
from ray_envs.plugin.gate import PLUGINS_VARIABLE, with_plugin

#: The namespace of Ray that holds our actors.
NAMESPACE = "ray_envs"

#: How long the port of a given address may take to answer.
_CONNECT_TIMEOUT_S = 5
#: Ray's switch for copying `uv run` from the driver to the workers.
UV_RUN_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


def is_client() -> bool:
    """Whether this process is connected to its cluster through Ray Client."""
    import ray

    return bool(ray.util.client.ray.is_connected())


def connect(address: str | None) -> bool:
    """Connect this process to Ray. Return whether that started an embedded, local Ray.

    Without an address: the cluster of `RAY_ADDRESS` or of a `ray start` on this machine, else an
    embedded Ray that ends with this process.

    Raises:
        InvalidInput: it is an address of Ray Client.
        ManagerUnavailable: no cluster answers at the address.
        WrongEnvironment: this Ray is too old.
    """
    import ray

    ray_versions.check(str(ray.__version__))
    if ray.is_initialized():
        return False
    _check_answers(address)
    quiet: dict[str, Any] = {"logging_level": "ERROR", "namespace": NAMESPACE}
    # Otherwise Ray uploads the folder of a driver under `uv run`, and starts every worker, also
    # the manager, with `uv run`.
    os.environ.setdefault(UV_RUN_HOOK, "0")
    ray_versions.set_uv_run_hook(os.environ[UV_RUN_HOOK] not in ("0", "false"))
    try:
        with warnings.catch_warnings():  # about future defaults of Ray
            warnings.simplefilter("ignore", FutureWarning)
            # Without an address, Ray finds what `ray start` started. "auto" would also find the
            # embedded Ray of another process, which ends with that process.
            if embeds(address):
                make_token_if_home_is_closed()
            with _plugin_loaded() if embeds(address) else nullcontext():
                ray.init(
                    address=None if address in ("", "auto") else address,
                    include_dashboard=False,
                    **quiet,
                )
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise _no_answer(_address_of(address), str(exc)) from exc
    except OSError as exc:
        raise ManagerUnavailable(
            f"Ray cannot start on this machine: {exc}",
            hint="give Ray a folder that this user can write: set HOME and RAY_TMPDIR",
        ) from exc
    return is_own()


@contextmanager
def _plugin_loaded() -> Iterator[None]:
    """Make a Ray that starts in this block load our plugin, if ray_envs is installed.

    A plugin that Ray cannot import keeps it from starting.
    """
    before = os.environ.get(PLUGINS_VARIABLE)
    if _is_installed():
        os.environ[PLUGINS_VARIABLE] = with_plugin(before)
    try:
        yield
    finally:
        os.environ.pop(PLUGINS_VARIABLE, None)
        if before is not None:
            os.environ[PLUGINS_VARIABLE] = before


def _is_installed() -> bool:
    """Whether every process of this interpreter can import ray_envs, in any folder."""
    try:
        place = os.path.realpath(str(distribution("ray-envs").locate_file("")))
    except PackageNotFoundError:
        return False
    folders = [*site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return place in map(os.path.realpath, folders)


def is_own() -> bool:
    """Whether this process started the Ray that it is connected to; both end together."""
    node = ray_versions.own_node()
    return node is not None and bool(node.head)


def embeds(address: str | None) -> bool:
    """Whether `connect` would start an embedded Ray, because nothing names a cluster."""
    return address == "local" or (address != "auto" and not _address_of(address))


def _address_of(address: str | None) -> str:
    """Return the address that Ray would use: `address`, RAY_ADDRESS, or that of `ray start`."""
    given = "" if address == "auto" else address
    return given or os.environ.get("RAY_ADDRESS") or ray_versions.address_of_ray_start()


def head_answers() -> bool:
    """Whether the head of the cluster that this process is connected to accepts connections.

    Ray itself would wait for a minute, and then end this process without an error.
    """
    import ray

    try:
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def raylet_answers() -> bool:
    """Whether the Ray node process of this machine, through which this process works, lives.

    Soon after its end, Ray ends this process without an error.
    """
    node = ray_versions.own_node()
    if node is None or not node.raylet_socket_name:
        return True
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            probe.connect(node.raylet_socket_name)
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError:  # it is busy
        return True
    return True


def _check_answers(address: str | None) -> None:
    """Check that something listens at the address: Ray itself would try for minutes.

    Raises:
        InvalidInput: it is an address of Ray Client, which cannot tell the cluster's nodes.
        ManagerUnavailable: nothing listens there, or it wants a token that this user lacks.
    """
    named = _address_of(address)
    if address == "auto" and not named:
        raise _no_answer("", "no `ray start` has started one on this machine")
    if named.startswith("ray://"):
        raise InvalidInput(
            f"{named} is an address of Ray Client, which ray_envs does not support",
            hint="use the cluster's own address (host:6379), or `ray job submit`",
        )
    host, colon, port = named.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):  # "local", "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError, OverflowError) as exc:  # also: no such host or port can exist
        raise _no_answer(named, str(exc)) from exc
    use_token(named)


def _no_answer(address: str, reason: str) -> ManagerUnavailable:
    lines = reason.strip().splitlines() or [""]
    return ManagerUnavailable(
        f"no Ray cluster answers at {address or 'this machine'}",
        detail=lines[-1],
        hint="check --address and RAY_ADDRESS (a cluster with tokens needs RAY_AUTH_MODE=token and "
        "the same token); `--address local` uses a local Ray; `ray stop` clears a crashed one",
    )
