"""Runs in the agent of a node that has Ray but not ray_envs. Sent by value; standard library only.

The agent starts, says what is missing, and can unpack what `bootstrap` sends. Only the agent has
the unpacked folder on its sys.path: no environment sees it.
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
    """Return `shell` (the `actor_shell` of `module.name`) for a node that may lack ray_envs.

    There the actor starts, but each verb raises `WrongEnvironment` with what is missing and the
    command that installs it, until `equip` has unpacked it. ray_envs must have this `version`,
    unless that is empty.
    """
    verbs = [verb for verb in vars(shell) if not verb.startswith("_")]

    def begin(self: Any) -> None:
        self._lack = None
        try:
            self._actor = _imported(module, name, version)(**self._arguments)
        except Exception as exc:
            self._lack = _sendable(exc)
            self._actor = SimpleNamespace(**dict.fromkeys(verbs, _refusing(self._lack)))

    def __init__(self: Any, **arguments: Any) -> None:
        put_foreign_paths_last()
        self._arguments = arguments
        begin(self)

    async def equip(self: Any, **pack: Any) -> None:
        """Unpack what `packed` made, unless that was done before, and start the real actor."""
        if self._lack is None:
            return
        if pack["site"] != python_site():
            raise _lack(
                f"needs ray_envs for {python_site()}, the manager has {pack['site']}", version
            )
        base = os.path.join(self._arguments["settings"]["RAY_ENVS_ROOT"], "bootstrap")
        try:
            # If the folder is there already, the data is not fetched.
            is_there = os.path.isdir(os.path.join(base, pack["sha256"]))
            data = b"" if is_there else await pack["data"][0]
            folder, self._hold = await asyncio.get_running_loop().run_in_executor(
                None, _unpacked, base, pack["sha256"], data
            )
        except OSError as exc:
            raise _error("StorageFailed", f"cannot unpack ray_envs below {base}: {exc}") from None
        _prefer(folder)
        begin(self)

    return type(name, (shell,), {"__init__": __init__, "equip": equip})


def _refusing(lack: RuntimeError) -> Callable[..., Any]:
    async def refuse(**_arguments: Any) -> None:
        raise RuntimeError(*lack.args)

    return refuse


# No error class: pickle would send it by name, and the node could not import it.
def _error(type_name: str, message: str, **fields: str) -> RuntimeError:
    """Return an error of ours in the form that `actor_shell` gives it."""
    return RuntimeError(message, {"type": type_name, "message": message, **fields})


def _sendable(exc: Exception) -> RuntimeError:
    """Return the error that says why the actor could not be made."""
    if isinstance(exc, RuntimeError) and len(exc.args) == 2:
        return exc
    if hasattr(exc, "to_dict"):
        return RuntimeError(str(exc), exc.to_dict())
    return _error("RayEnvsError", f"{type(exc).__name__}: {exc}")


def _imported(module: str, name: str, version: str) -> Any:
    try:
        found = importlib.metadata.version("ray-envs")
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec("ray_envs") is None:
            raise _lack("has Ray but not ray_envs", version) from None
        found = version  # a folder on PYTHONPATH has no version
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
    """Return a `WrongEnvironment` that says what this node lacks, and how to install it."""
    ray = sys.modules["ray"]
    node_id = ray.get_runtime_context().get_node_id()
    wanted = f"ray-envs=={version}" if version else "ray-envs"
    return _error(
        "WrongEnvironment",
        f"node {node_id[:12]} ({ray.util.get_node_ip_address()}) {what}",
        hint=f"run there: {sys.executable} -m pip install {wanted}\n"
        "or start the EnvManager with RAY_ENVS_BOOTSTRAP=1, which sends it to such nodes",
        node_id=node_id,
    )


def python_site() -> str:
    """Return what compiled packages must match: Python's version, platform and C library."""
    libc = platform.libc_ver()[0]
    return f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}{libc and '-' + libc}"


def _unpacked(base: str, sha256: str, data: bytes) -> tuple[str, int]:
    """Unpack a pack if needed; return its folder, and the open file whose shared lock keeps it.

    A folder gets its name when it is complete. Folders that no process holds are deleted: they
    are of another version, or half unpacked.
    """
    import fcntl

    os.makedirs(base, exist_ok=True)
    folder, part = os.path.join(base, sha256), os.path.join(base, sha256 + ".part")
    with open(os.path.join(base, ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that no other agent deletes it before it is held
        for name in os.listdir(base):
            is_other = name != sha256 and len(name.removesuffix(".part")) == len(sha256)
            if is_other and not _is_held(os.path.join(base, name)):
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
        del sys.modules[name]  # of an incomplete installation or another version
    importlib.invalidate_caches()
    executable = os.path.join(folder, "bin", "uv")
    # uv would prefer an executable beside this Python, of any version.
    importlib.import_module("uv").find_uv_bin = lambda: executable  # type: ignore[attr-defined]
