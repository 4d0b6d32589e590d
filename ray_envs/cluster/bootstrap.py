"""Nodes that have Ray but not what an agent needs: tells what is missing, and can bring it there.

Two halves. `node_shell` and what it calls are sent by value to such a node and use the standard
library only; `packed` runs beside the manager, and so does what tells people. `cluster` carries
one to the other. What is brought is on the sys.path of the agent alone: no environment sees it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import platform
import shutil
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray_envs.errors import RayEnvsError, RayEnvsWarning, from_dict
from ray_envs.worker.inside import _put_foreign_paths_last

_DISTRIBUTION = "ray-envs"
#: Every node has it and what it requires: our closure ends there.
_ON_EVERY_NODE = "ray"
#: How many nodes are named one by one.
_NAMED = 8
#: Two thirds of a pack are uv's executable; the default saves a tenth and takes four times longer.
_ZIP_LEVEL = 1
#: All members have the same time: equal packages give equal bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)

_GATE_NOTE = """\
{where} without the plugin of ray_envs: tasks are placed only on nodes that are ready when \
they are submitted, and nodes that join later wait for the next call of options().
To load it, on every node where ray_envs is installed, before `ray start`:
export RAY_RUNTIME_ENV_PLUGINS='[{{"class": "ray_envs.plugin.EnvironmentPlugin"}}]'"""

#: What this process has told already.
_said: set[str] = set()


# -- on the node, by value -----------------------------------------------------------------------


def node_shell(shell: type, module: str, name: str, version: str) -> type:
    """`shell`, which is an `inside.actor_shell` of `module.name`, for a node that may lack us.

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
        _put_foreign_paths_last()
        self._arguments = arguments
        begin(self)

    async def equip(self: Any, **pack: Any) -> None:
        """Unpack what `packed` made, unless that was done before, and begin again with it."""
        if self._lack is None:
            return
        if pack["site"] != _site():
            raise _lack(f"needs ray_envs for {_site()}, the manager has {pack['site']}", version)
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
    """An error of ours, as `inside.actor_shell` lets it travel."""
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


def _site() -> str:
    """What compiled packages must match, as far as one process can say it of itself."""
    libc = platform.libc_ver()[0]
    return f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}{libc and '-' + libc}"


def _unpacked(base: str, sha256: str, data: bytes) -> tuple[str, int]:
    """The folder with a pack, and the open file whose shared lock keeps it.

    The folder is complete from the moment it has its name. What no process holds goes: it is of
    another version, or half a pack.
    """
    import fcntl

    os.makedirs(base, exist_ok=True)
    folder, part = os.path.join(base, sha256), os.path.join(base, sha256 + ".part")
    with open(os.path.join(base, ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it has its hold, nobody else removes anything
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


# -- beside the manager --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pack:
    """ray_envs, what it requires besides Ray, and uv, as they are installed here."""

    data: bytes
    sha256: str
    site: str


def own_version() -> str:
    """The version of ray_envs in this process; empty where it is not installed."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""


def packed() -> Pack:
    """What a bare node needs. No package index takes part; an editable install of ours will do.

    Raises:
        RayEnvsError: a package is installed in a way that does not tell its files.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pack:
        for name, path in sorted(_files()):
            member = zipfile.ZipInfo(name, _ZIP_TIME)
            member.compress_type = zipfile.ZIP_DEFLATED
            pack.writestr(member, path.read_bytes(), compresslevel=_ZIP_LEVEL)
    data = buffer.getvalue()
    return Pack(data, hashlib.sha256(data).hexdigest(), _site())


def _files() -> Iterator[tuple[str, Path]]:
    """Where each file of a pack is now, by its name in the pack."""
    import uv

    yield "bin/uv", Path(uv.find_uv_bin())
    ours = Path(__file__).parents[1]  # the folder of ray_envs
    for path in ours.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{ours.name}/{path.relative_to(ours).as_posix()}", path
    for distribution in _closure():
        is_ours = _canonical(distribution.metadata["Name"]) == _DISTRIBUTION
        if distribution.files is None:
            raise RayEnvsError(
                f"cannot pack {distribution.metadata['Name']}: it has no list of its files",
                hint="install ray_envs with pip or uv on the head node",
            )
        for file in distribution.files:
            # `../../../bin/…` are scripts of this environment; `.pth` of an editable install.
            is_kept = file.parts[0] != ".." and "__pycache__" not in file.parts
            if is_kept and (not is_ours or file.name == "METADATA"):
                yield file.as_posix(), Path(str(file.locate()))


def _closure() -> list[importlib.metadata.Distribution]:
    """The distributions of ray_envs and of what it requires on this platform, but Ray's."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    names = [_DISTRIBUTION]
    while names:
        name = _canonical(names.pop())
        if name in found or name == _ON_EVERY_NODE:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise RayEnvsError(
                f"cannot pack {name}: it is not installed beside the EnvManager",
                hint="install ray_envs with pip or uv on the head node",
            ) from None
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)
    return list(found.values())


def _canonical(name: str) -> str:
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(name))


# -- to people -----------------------------------------------------------------------------------


def warn_of_bare(nodes: Mapping[str, Mapping[str, Any]], *, stacklevel: int) -> None:
    """Warn of each node that gets no environment, with the line that mends it; once a process.

    Args:
        nodes: as `EnvManager.describe` tells of them.
        stacklevel: of `warnings.warn`, as its caller would give it.
    """
    texts = [_named(name, node) for name, node in sorted(nodes.items()) if node["error"]]
    fresh = [text for text in texts if text not in _said]
    _said.update(fresh)
    for text in fresh[:_NAMED]:
        warnings.warn(text, RayEnvsWarning, stacklevel=stacklevel + 1)
    if fresh[_NAMED:]:
        text = f"{len(fresh) - _NAMED} more nodes get no environments: see `ray-envs doctor`"
        warnings.warn(text, RayEnvsWarning, stacklevel=stacklevel + 1)


def _named(node_id: str, node: Mapping[str, Any]) -> str:
    """The error of a node, with the node's name."""
    text = str(from_dict(node["error"]))
    if node_id[:12] in text:
        return text
    return f"node {node_id[:12]} ({node['address']}) gets no environments: {text}"


def note_missing_gate(nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell, once a process, that nodes have been started without our plugin.

    No warning: who is content with placement has nothing to mend.
    """
    without = sorted(
        name[:12]
        for name, node in nodes.items()
        if not node["error"] and node.get("has_gate") is False  # others have been told of
    )
    if without and "gate" not in _said:
        _said.add("gate")
        where = "this cluster runs"
        if len(without) < len(nodes):
            more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
            where = f"nodes {', '.join(without[:_NAMED])}{more} run"
        logging.getLogger("ray_envs").warning(_GATE_NOTE.format(where=where))
