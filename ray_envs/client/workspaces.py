"""Finds the uv workspace that a project belongs to, and the folders of its members."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from ray_envs.client.texts import read_utf8
from ray_envs.decisions.local_sources import check_shapes
from ray_envs.decisions.parsing import parsed_toml, strings, table
from ray_envs.disk.files import kind_of
from ray_envs.errors import InvalidInput

_PYPROJECT = "pyproject.toml"


@dataclass(frozen=True)
class Workspace:
    """A uv workspace: its root, its members by canonical name, and the root's [tool.uv]."""

    root: Path
    members: Mapping[str, Path]
    uv: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, data: Mapping[str, Any]) -> Workspace | None:
        """Return the workspace of the project in `folder`, whose pyproject.toml has `data`.

        Raises `InvalidInput`: a pyproject.toml above it, or of a member, is not TOML.
        """
        folder = Path(os.path.abspath(folder))
        if "workspace" in table(data, "tool", "uv"):
            return cls._at(folder, data)
        for above in folder.parents:
            if kind_of(above / _PYPROJECT) != "file":
                continue
            root = pyproject_of(above)
            if "workspace" in _uv(root):
                found = cls._at(above, root)
                return found if folder in found.members.values() else None
        return None

    @classmethod
    def _at(cls, root: Path, data: Mapping[str, Any]) -> Workspace:
        uv = _uv(data)
        given = uv["workspace"] if isinstance(uv["workspace"], dict) else {}
        excluded = {
            place for each in strings(given.get("exclude", [])) for place in _at(root, each)
        }
        members = {_name_of(data, root): root} if "project" in data else {}
        for pattern in strings(given.get("members", [])):
            for place in _at(root, pattern):
                if place not in excluded and kind_of(place / _PYPROJECT) == "file":
                    name = _name_of(pyproject_of(place), place)
                    members[name] = Path(os.path.abspath(place))
        return cls(root, members, uv)

    def member(self, name: str, *, where: str) -> Path:
        """Return the folder of a member. Raises `InvalidInput`: there is none of that name."""
        if name not in self.members:
            raise InvalidInput(
                f"{name} is no member of the workspace {self.root}",
                where=where,
                hint=f"its members: {', '.join(sorted(self.members)) or 'none'}",
            )
        return self.members[name]


def _at(root: Path, pattern: str) -> list[Path]:
    """Return the paths below `root` that match. Raises `InvalidInput`: it is no such pattern."""
    try:
        if os.path.normpath(pattern) == ".":
            return [root]
        return sorted(root.glob(pattern.rstrip("/")))
    except (ValueError, IndexError, NotImplementedError):
        raise InvalidInput(
            f"{pattern!r} is not a pattern of folders below the workspace",
            where=f"{root / _PYPROJECT}: tool.uv.workspace",
            hint='write it like "packages/*"',
        ) from None


def pyproject_of(folder: Path) -> dict[str, Any]:
    """Return the content of the pyproject.toml in `folder`; {} if there is none.

    Raises `InvalidInput`: it cannot be read, or is not TOML.
    """
    file = folder / _PYPROJECT
    if kind_of(file) == "missing":
        return {}
    data = parsed_toml(read_utf8(file), where=str(file))
    check_shapes(data, where=str(file))
    return data


def _uv(data: Mapping[str, Any]) -> dict[str, Any]:
    tool = data.get("tool")
    uv = tool.get("uv") if isinstance(tool, dict) else None
    return uv if isinstance(uv, dict) else {}


def _name_of(data: Mapping[str, Any], folder: Path) -> str:
    project = data.get("project")
    name = project.get("name") if isinstance(project, dict) else None
    return str(canonicalize_name(name if isinstance(name, str) else folder.name))
