"""Packs ray_envs and uv for nodes that lack them, and tells people which nodes these are.

Runs beside the manager and in the user's program. `bare_node` is the half that runs on the node.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_envs.cluster.bare_node import python_site
from ray_envs.errors import RayEnvsError, RayEnvsWarning, from_dict

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
#: The warnings that this process has given already.
_said: set[str] = set()


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

    Raises `RayEnvsError`: a package is installed in a way that does not tell its files.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as pack:
        for name, path in sorted(_files()):
            member = zipfile.ZipInfo(name, _ZIP_TIME)
            member.compress_type = zipfile.ZIP_DEFLATED
            pack.writestr(member, path.read_bytes(), compresslevel=_ZIP_LEVEL)
    data = buffer.getvalue()
    return Pack(data, hashlib.sha256(data).hexdigest(), python_site())


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


def warn_of_bare(nodes: Mapping[str, Mapping[str, Any]], *, stacklevel: int) -> None:
    """Warn, once in a process, of each node that gets no environment, with the line that helps."""
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

    Not a warning: placement alone works, too.
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
