"""Sent by value to a node that has Ray but not ray_envs. Standard library only.

The actor starts there, tells what is missing, and can unpack what `bootstrap` sends. What is
unpacked is on the sys.path of that agent alone: no environment sees it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray_envs.worker.paths import put_foreign_paths_last


def node_shell(shell: type, module: str, name: str, version: str) -> type:
    """`shell`, which is an `actor_shell.actor_shell` of `module.name`, for a node that may lack us.

    Its process does not fail there: each verb raises `WrongEnvironment` with what is missing and
    the line that adds it, until `equip` has brought it. ray_envs must be of `version`, unless that
    is empty.
    """
    verbs = [verb for verb in vars(shell) if not verb.startswith("_")]

    def begin(self: Any) -> None:
        self._lack = None
        try:
            self._actor = _imported(module, name, version)(**self._arguments)
        except Exception as exc:
            self._lack = _travelling(exc)
            self._actor = SimpleNamespace(**dict.fromkeys(verbs, _refusing(self._lack)))

    def __init__(self: Any, **arguments: Any) -> None:
        put_foreign_paths_last()
        self._arguments = arguments
        begin(self)

    async def equip(self: Any, **pack: Any) -> None:
        """Unpack what `packed` made, unless that was done before, and begin again with it."""
        if self._lack is None:
            return
        if pack["site"] != python_site():
            raise _lack(
                f"needs ray_envs for {python_site()}, the manager has {pack['site']}", version
            )
        base = os.path.join(self._arguments["settings"]["RAY_ENVS_ROOT"], "bootstrap")
        try:
            # Where it is there already, nothing is fetched.
            is_there = os.path.isdir(os.path.join(base, pack["sha256"]))
            data = b"" if is_there else await pack["data"][0]
            folder, self._hold = await asyncio.get_running_loop().run_in_executor(
                None, _unpacked, base, pack["sha256"], data
            )
        except OSError as exc:
            raise _told("StorageFailed", f"cannot unpack ray_envs below {base}: {exc}") from None
        _prefer(folder)
        begin(self)

    return type(name, (shell,), {"__init__": __init__, "equip": equip})


def _refusing(lack: RuntimeError) -> Callable[..., Any]:
    async def refuse(**_arguments: Any) -> None:
        raise RuntimeError(*lack.args)

    return refuse


# No classes here: pickle would send one that this process knows by name.
def _told(type_name: str, message: str, **fields: str) -> RuntimeError:
    """An error of ours, as `actor_shell.actor_shell` lets it travel."""
    return RuntimeError(message, {"type": type_name, "message": message, **fields})


def _travelling(exc: Exception) -> RuntimeError:
    """Why an actor could not be made."""
    if isinstance(exc, RuntimeError) and len(exc.args) == 2:
        return exc
    if hasattr(exc, "to_dict"):
        return RuntimeError(str(exc), exc.to_dict())
    return _told("RayEnvsError", f"{type(exc).__name__}: {exc}")


def _imported(module: str, name: str, version: str) -> Any:
    try:
        found = importlib.metadata.version("ray-envs")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("ray_envs") is None:
            raise _lack("has Ray but not ray_envs", version) from None
        found = version  # a folder on PYTHONPATH says no version
    if version and found != version:
        raise _lack(f"has ray_envs {found}, but the manager is {version}", version)
    try:
        cls = getattr(importlib.import_module(module), name)
        importlib.import_module("uv").find_uv_bin()
    except ImportError as exc:
        missing = exc.name if isinstance(exc, ModuleNotFoundError) else None
        said = f"not {missing}" if missing else f"cannot import it ({exc})"
        raise _lack(f"has ray_envs but {said}", version) from None
    except FileNotFoundError:
        raise _lack("has ray_envs but no executable of uv", version) from None
    return cls


def _lack(what: str, version: str) -> RuntimeError:
    """`WrongEnvironment`: this node `what`; with the line that mends it."""
    ray = sys.modules["ray"]
    node_id = ray.get_runtime_context().get_node_id()
    wanted = f"ray-envs=={version}" if version else "ray-envs"
    return _told(
        "WrongEnvironment",
        f"node {node_id[:12]} ({ray.util.get_node_ip_address()}) {what}",
        hint=f"run there: {sys.executable} -m pip install {wanted}\n"
        "or start the EnvManager with RAY_ENVS_BOOTSTRAP=1, which brings it to such nodes",
        node_id=node_id,
    )


def python_site() -> str:
    """What compiled packages must match, as far as one process can say it of itself."""
    libc = platform.libc_ver()[0]
    return f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}{libc and '-' + libc}"


def _unpacked(base: str, sha256: str, data: bytes) -> tuple[str, int]:
    """The folder with a pack, and the open file whose shared lock keeps it.

    The folder gets its name when it is complete. Folders that no process holds are deleted: they
    are of another version, or half a pack.
    """
    import fcntl

    os.makedirs(base, exist_ok=True)
    folder, part = os.path.join(base, sha256), os.path.join(base, sha256 + ".part")
    with open(os.path.join(base, ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until this process has its hold, no other one deletes
        for name in os.listdir(base):
            if name not in (".lock", sha256) and not _is_held(os.path.join(base, name)):
                shutil.rmtree(os.path.join(base, name))
        if not os.path.isdir(folder):
            if hashlib.sha256(data).hexdigest() != sha256:
                raise OSError("what arrived is not what was sent")
            with zipfile.ZipFile(io.BytesIO(data)) as pack:
                pack.extractall(part)
            os.chmod(os.path.join(part, "bin", "uv"), 0o755)  # noqa: S103 - an executable
            os.sync()  # after a power failure, no name without its files
            os.rename(part, folder)
        hold = os.open(os.path.join(folder, "held"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(hold, fcntl.LOCK_SH)
    return folder, hold


def _is_held(folder: str) -> bool:
    import fcntl

    try:
        with open(os.path.join(folder, "held")) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _prefer(folder: str) -> None:
    """Let this process import from `folder` first, and use the uv that is there."""
    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name.split(".")[0] in ("ray_envs", "uv")]:
        del sys.modules[name]  # of an installation that is not complete, or another version
    importlib.invalidate_caches()
    executable = os.path.join(folder, "bin", "uv")
    # It would take one that stands beside this Python first, whatever its version.
    importlib.import_module("uv").find_uv_bin = lambda: executable  # type: ignore[attr-defined]
