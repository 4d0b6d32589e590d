"""Packs ray_envs and uv for nodes that lack them, and warns users about such nodes.

Runs in the manager and in the user's program. `bare_node` runs on the node.
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
#: Every node has it and its dependencies, so they are not packed.
_ON_EVERY_NODE = "ray"
#: How many nodes are named; the others are counted.
_NAMED = 8
#: Two thirds of a pack are uv's executable: zip's default saves 10 % and takes four times longer.
_ZIP_LEVEL = 1
#: One time for all files, so that equal packages give equal bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_GATE_NOTE = """\
{where} without the plugin of ray_envs: tasks are placed only on nodes that are ready when \
they are submitted, and nodes that join later are used from the next call of options() on.
To load it, on every node where ray_envs is installed, before `ray start`:
export RAY_RUNTIME_ENV_PLUGINS='[{{"class": "ray_envs.plugin.EnvironmentPlugin"}}]'"""
#: What this process has already warned about.
_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class Pack:
    """ray_envs, what it requires besides Ray, and uv, as they are installed here."""

    data: bytes
    sha256: str
    site: str


def own_version() -> str:
    """Return the version of ray_envs in this process; empty if it is not installed."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return ""


def packed() -> Pack:
    """Return what a bare node needs. Uses no package index; ray_envs may be an editable install.

    Raises `RayEnvsError`: a package is missing, or has no list of its files.
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
    """Yield each file of the pack: its name in the pack, and its path here."""
    import uv

    yield "bin/uv", Path(uv.find_uv_bin())
    ours = Path(__file__).parents[1]  # the folder of ray_envs
    for path in ours.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            yield f"{ours.name}/{path.relative_to(ours).as_posix()}", path
    for name, distribution in _closure().items():
        if distribution.files is None:
            raise RayEnvsError(
                f"cannot pack {name}: it has no list of its files",
                hint="install ray_envs with pip or uv on the head node",
            )
        for file in distribution.files:
            # Not the scripts (`../../../bin/…`), and not the `.pth` of an editable install.
            is_kept = file.parts[0] != ".." and "__pycache__" not in file.parts
            if is_kept and (name != _DISTRIBUTION or file.name == "METADATA"):
                yield file.as_posix(), Path(str(file.locate()))


def _closure() -> dict[str, importlib.metadata.Distribution]:
    """Return ray_envs and its dependencies, without Ray's, by name."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, importlib.metadata.Distribution] = {}
    names = [_DISTRIBUTION]
    while names:
        name = canonicalize_name(names.pop())
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
    return found


def warn_of_bare(nodes: Mapping[str, Mapping[str, Any]], *, stacklevel: int) -> None:
    """Warn once about each node that gets no environments, with the command that helps."""
    texts = [_named(name, node) for name, node in sorted(nodes.items()) if node["error"]]
    fresh = [text for text in texts if text not in _said]
    _said.update(fresh)
    for text in fresh[:_NAMED]:
        warnings.warn(text, RayEnvsWarning, stacklevel=stacklevel + 1)
    if fresh[_NAMED:]:
        text = f"{len(fresh) - _NAMED} more nodes get no environments: see `ray-envs doctor`"
        warnings.warn(text, RayEnvsWarning, stacklevel=stacklevel + 1)


def _named(node_id: str, node: Mapping[str, Any]) -> str:
    """Return the error of a node, with the node's name."""
    text = str(from_dict(node["error"]))
    if node_id[:12] in text:
        return text
    return f"node {node_id[:12]} ({node['address']}) gets no environments: {text}"


def note_missing_gate(nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Log once that some nodes were started without our plugin.

    This is no warning: without the plugin, tasks are placed on ready nodes, which may be enough.
    """
    without = sorted(
        name[:12]
        for name, node in nodes.items()
        if not node["error"] and node.get("has_gate") is False  # else see `warn_of_bare`
    )
    if without and "gate" not in _said:
        _said.add("gate")
        where = "this cluster runs"
        if len(without) < len(nodes):
            more = f" and {len(without) - _NAMED} more" if len(without) > _NAMED else ""
            where = f"nodes {', '.join(without[:_NAMED])}{more} run"
        logging.getLogger("ray_envs").warning(_GATE_NOTE.format(where=where))
