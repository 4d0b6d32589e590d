"""Makes the pyproject.toml that uv resolves for a definition, and its fingerprint.

`node.uv` runs uv on these texts, and `locks` reads the lock file that uv writes. Dependency groups
come from PEP 735, `[tool.uv]` from uv 0.9 to 0.13.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import tomlkit
from packaging.utils import canonicalize_name
from tomlkit.exceptions import TOMLKitError

from ray_envs.decisions.choices import check_choice
from ray_envs.decisions.credentials import check_credentials
from ray_envs.decisions.groups import check_groups
from ray_envs.decisions.local_sources import ENVIRONMENT
from ray_envs.decisions.parsing import parsed_toml, strings, table
from ray_envs.decisions.requirements import (
    COMMIT,
    LOCAL_HINT,
    check_python,
    requirement_line,
    requirement_lines,
)
from ray_envs.errors import InvalidInput
from ray_envs.models import RAY_GROUP, Target
from ray_envs.specs import Definition
from ray_envs.validation import nearest_hint

_PYPROJECT = "pyproject.toml"

#: Entries of [tool.uv] that do not change what is installed from a lock. Every other entry, also
#: one that a later uv adds, is assumed to change it.
_NO_EFFECT_ON_INSTALL = (
    # they decide the content of the lock
    "*index*", "conflicts", "constraint-dependencies", "default-groups", "dependency-groups",
    "dependency-metadata", "dev-dependencies", "environments", "exclude-dependencies",
    "exclude-newer*", "find-links", "fork-strategy", "no-sources*", "override-dependencies",
    "prerelease*", "required-environments", "resolution", "sources", "upgrade*",
    # they concern the project itself, which is never installed, or other commands of uv
    "add-bounds", "audit", "build-backend", "check-url", "managed", "package", "pip",
    "publish-url", "trusted-publishing",
    # they decide how uv downloads, stores and links files whose hashes are fixed
    "allow-insecure-host", "cache-*", "compile-bytecode", "concurrent-*", "http-*", "https-*",
    "keyring-provider", "link-mode", "native-tls", "no-cache", "no-proxy", "offline", "preview*",
    "*-install-mirror", "python-*", "reinstall*", "required-version", "system-certs",
)  # fmt: skip


def project_text(definition: Definition, target: Target) -> str:
    """Return the `pyproject.toml` that uv locks and installs for `definition` on this cluster.

    A project's own text is kept with its comments. Only these are set: the group `ray-envs`,
    `requires-python`, `tool.uv.package`, and additional packages. A text that has them already,
    such as an export that is imported again, is returned byte for byte.

    Raises:
        InvalidInput: the text is not a usable TOML project, excludes the cluster's interpreter,
            needs a local source or a workspace, or lacks an extra or group of the definition; or
            those of the definition exclude each other, or are for another Python.
        InvalidPackages: `requirement_lines` refuses a dependency.
    """
    check_python(definition.python, target, where="python")
    packages = requirement_lines(definition.packages)
    requires_python = f"=={target.python_minor}.*"
    ray = f"ray=={target.ray}"
    text = definition.pyproject
    if text is None:
        _check_names(definition, {}, {})
        return (
            f'[project]\nname = "{ENVIRONMENT}"\nversion = "0"\n'
            f'requires-python = "{requires_python}"\ndependencies = {_toml_array(packages)}\n\n'
            f"[dependency-groups]\n{RAY_GROUP} = {_toml_array([ray])}\n\n"
            "[tool.uv]\npackage = false\n"
        )
    data = parsed_toml(text, where=_PYPROJECT)
    _check_project(data, target, {wheel.path for wheel in definition.wheels})
    groups = table(data, "dependency-groups")
    _check_names(definition, table(data, "project", "optional-dependencies"), groups)
    check_groups(data, definition.groups, target)
    check_choice(data, extras=definition.extras, groups=definition.groups)

    # To uv, another spelling of that name is the same group, and the same group twice an error.
    group = next((name for name in groups if canonicalize_name(name) == RAY_GROUP), RAY_GROUP)
    own = data["project"].get("dependencies", [])
    known = {requirement_line(entry, where=_PYPROJECT) for entry in own}
    edits: dict[tuple[str, ...], Any] = {
        ("project", "requires-python"): requires_python,
        ("project", "dependencies"): [*own, *(p for p in packages if p not in known)],
        ("dependency-groups", group): [ray],
        ("tool", "uv", "package"): False,
    }
    if not edits["project", "dependencies"]:
        del edits["project", "dependencies"]
    dynamic = data["project"].get("dynamic", [])
    if "version" in dynamic:
        # For a dynamic version uv would run the build backend, whose files are not here. The
        # project itself is not installed, so any version will do.
        edits["project", "dynamic"] = [name for name in dynamic if name != "version"]
        edits["project", "version"] = "0"
    return _edited(text, data, edits)


def build_options(project_text: str) -> str:
    """Return the entries of [tool.uv] that change what is installed from the same lock.

    A lock fixes the hashes of files, but not whether a wheel or the source archive is installed,
    nor how the archive is built (`no-binary`, `config-settings`, `extra-build-dependencies`, …).

    Returns canonical JSON for `locks.key_of`; "" if there are none.

    Raises `InvalidInput`: the text is not TOML.
    """
    uv = table(parsed_toml(project_text, where=_PYPROJECT), "tool", "uv")
    found = {
        name: value
        for name, value in uv.items()
        if not any(fnmatchcase(name, pattern) for pattern in _NO_EFFECT_ON_INSTALL)
    }
    return _canonical(found) if found else ""


def fingerprint(
    project: str,
    user_lock: str | None,
    definition: Definition,
    target: Target,
    *,
    index_settings: Mapping[str, str],
) -> str:
    """Return a sha256 (hex): equal inputs of uv, which give the same lock, have the same one.

    Args:
        project: the result of `project_text`. Extras and groups select from a lock and do not
            change it, so they do not count.
        user_lock: the text of the project's own uv.lock, if it has one.
        definition: has `exclude_newer` and `only_binary`.
        target: the cluster's interpreter and Ray.
        index_settings: the UV_* variables that change a resolution.
    """
    asked = [project, user_lock, definition.exclude_newer, target.python, target.ray]
    if definition.only_binary:
        asked.append("only-binary")
    return hashlib.sha256(_canonical([*asked, dict(index_settings)]).encode()).hexdigest()


def declared(project_text: str) -> tuple[str, ...]:
    """Return the requirements in [project], as they are written there.

    Raises `InvalidInput`: the text is not TOML.
    """
    project = parsed_toml(project_text, where=_PYPROJECT).get("project", {})
    return tuple(project.get("dependencies", ()))


def _canonical(value: Any) -> str:
    """Return `value` as JSON, equal for equal values; a TOML date becomes its text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _toml_array(items: Iterable[str]) -> str:
    lines = "".join(f"    {json.dumps(item, ensure_ascii=False)},\n" for item in items)
    return f"[\n{lines}]" if lines else "[]"


def _refused(what: str, hint: str, place: str = "") -> InvalidInput:
    return InvalidInput(what, hint=hint, where=f"{_PYPROJECT}: {place}" if place else _PYPROJECT)


def _check_project(data: Mapping[str, Any], target: Target, wheels: Collection[str]) -> None:
    """Refuse a project that would not install the same on every node.

    Of local sources only the paths of `wheels` are the same there.
    """
    if "project" not in data:
        raise _refused("no [project] table", _project_hint(data))
    project = table(data, "project")
    if not isinstance(project.get("dynamic", []), list):
        raise _refused("this is not a list", 'write it like ["version"]', "project.dynamic")
    for name in ("dependencies", "optional-dependencies"):
        if name in project.get("dynamic", []):
            raise _refused(f"{name} are dynamic", f"write the {name} into [project]", "project")
    if "requires-python" in project:
        where = f"{_PYPROJECT}: project.requires-python"
        check_python(str(project["requires-python"]), target, where=where)
    _check_uv(table(data, "tool", "uv"), wheels)
    lists = {"project.dependencies": project.get("dependencies", [])}
    for path in (("project", "optional-dependencies"), ("dependency-groups",)):
        lists |= {".".join((*path, name)): value for name, value in table(data, *path).items()}
    for place, entries in lists.items():
        if not isinstance(entries, list):
            raise _refused("this is not a list", 'write it like ["numpy>=1.26"]', place)
        for entry in entries:
            if isinstance(entry, str):
                requirement_line(entry, where=f"{_PYPROJECT}: {place}")
            elif not (isinstance(entry, dict) and place.startswith("dependency-groups.")):
                # A table in a group includes another group.
                raise _refused(f"{entry!r} is not a string", "write requirements only", place)


def _project_hint(data: Mapping[str, Any]) -> str:
    """Return what to do about a pyproject.toml without [project], by what it has instead."""
    if table(data, "tool", "poetry"):
        return (
            "move name, version and dependencies from [tool.poetry] to [project], as Poetry 2 "
            "writes them, or give a requirements file (`poetry export`)"
        )
    if "build-system" not in data:
        return (
            "add one with name, version and dependencies; if setup.py or setup.cfg names them, "
            "copy them there, or give a requirements file"
        )
    return "add one with name, version and dependencies"


def _check_uv(uv: Mapping[str, Any], wheels: Collection[str]) -> None:
    """Refuse workspaces, credentials and sources that other nodes do not have."""
    if "workspace" in uv:
        raise _refused("workspace cannot be used here", LOCAL_HINT, "tool.uv.workspace")
    for text in strings(uv):
        check_credentials(text, InvalidInput, where=f"{_PYPROJECT}: tool.uv")
    for name, given in table(uv, "sources").items():
        place = f"tool.uv.sources.{name}"
        for source in given if isinstance(given, list) else [given]:
            if not isinstance(source, dict):
                raise _refused("this is not a table", 'write it like { index = "…" }', place)
            path = source.get("path")
            if isinstance(path, str) and path in wheels:
                continue
            if {"path", "workspace", "editable"} & source.keys():
                raise _refused("a local source, which other nodes do not have", LOCAL_HINT, place)
            if "git" in source and not COMMIT.fullmatch(str(source.get("rev", ""))):
                hint = 'write rev = "<commit>", all 40 characters'
                raise _refused("the repository may change: no commit is named", hint, place)


def _check_names(
    definition: Definition, extras: Mapping[str, Any], groups: Mapping[str, Any]
) -> None:
    """Refuse an extra or group that the project does not declare."""
    for kind, wanted, known in (
        ("extra", definition.extras, extras),
        ("group", definition.groups, groups),
    ):
        names = {canonicalize_name(name) for name in known}
        for name in wanted:
            plain = canonicalize_name(name)
            if plain not in names:
                hint = nearest_hint(plain, names) if names else f"the project declares no {kind}s"
                raise InvalidInput(f"unknown {kind} {name!r}", where=f"{kind}s", hint=hint)


def _edited(text: str, data: dict[str, Any], edits: Mapping[tuple[str, ...], Any]) -> str:
    """Return `text` with the values at the given paths set; unchanged if they are set already.

    Raises `InvalidInput`: tomlkit cannot edit its layout faithfully.
    """
    try:
        document, is_changed = tomlkit.parse(text), False
        for path, value in edits.items():
            plain, table = data, document
            for part in path[:-1]:
                plain = plain.setdefault(part, {})
                if part not in table:
                    table[part] = tomlkit.table()
                table = table[part]
            before = plain.get(path[-1])
            plain[path[-1]] = value
            if before == value and type(before) is type(value):
                continue
            is_changed = True
            if path == ("project", "dependencies") and before is not None:
                # Append one by one, so that comments between the others stay.
                for item in value[len(before) :]:
                    table[path[-1]].append(item)
            else:
                table[path[-1]] = value
        result = document.as_string() if is_changed else text
        is_faithful = parsed_toml(result, where=_PYPROJECT) == data
    except (TOMLKitError, InvalidInput):
        is_faithful = False
    if not is_faithful:
        raise InvalidInput(
            "the layout of the file is too unusual to be edited",
            where=_PYPROJECT,
            hint="write [project], [dependency-groups] and [tool.uv] as plain tables",
        )
    return result
