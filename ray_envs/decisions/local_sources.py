"""Local packages of a project: what its pyproject.toml says of them, and their wheels in its place.

`client.local_packages` builds the wheels. `[tool.uv.sources]` and `[tool.uv.workspace]` come from
uv; uv applies a source to direct requirements and to constraints only, so every local package
becomes a constraint, and then its source holds for what other local packages require, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import tomlkit
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from tomlkit.exceptions import TOMLKitError

from ray_envs.decisions.local_wheels import Described
from ray_envs.decisions.parsing import parsed_toml, strings, table
from ray_envs.errors import InvalidInput

#: The name of a project that installs the user's own one.
ENVIRONMENT = "ray-envs-environment"

_EXTRAS = (("project", "optional-dependencies"),)
_REQUIREMENTS = (
    ("project", "dependencies"),
    *_EXTRAS,
    ("dependency-groups",),
    ("tool", "uv", "dev-dependencies"),
    ("tool", "uv", "constraint-dependencies"),
    ("tool", "uv", "override-dependencies"),
)
#: Entries of a workspace root's [tool.uv] that do not hold for its members.
_ROOT_ONLY = ("workspace", "sources", "package", "dev-dependencies", "default-groups", "conflicts")
_SHAPES: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (("project",), dict, "write [project] with name and version"),
    (("project", "dependencies"), list, 'write it like ["numpy>=1.26"]'),
    (("project", "dynamic"), list, 'write it like ["version"]'),
    (("project", "optional-dependencies"), dict, 'write it like { more = ["six"] }'),
    (("tool",), dict, "write [tool.uv]"),
    (("tool", "uv"), dict, "write [tool.uv]"),
    (("tool", "uv", "sources"), dict, 'write it like { lib = { path = "../lib" } }'),
    (("tool", "uv", "index"), list, "write [[tool.uv.index]] with name and url"),
    (("tool", "uv", "constraint-dependencies"), list, 'write it like ["numpy<2"]'),
    (("tool", "uv", "workspace"), dict, "write [tool.uv.workspace] with members"),
    (("tool", "uv", "workspace", "members"), list, 'write it like ["packages/*"]'),
    (("tool", "uv", "workspace", "exclude"), list, 'write it like ["packages/old"]'),
)
#: What decides which of several sources of a name is used.
_CONDITIONS = ("marker", "extra", "group")


@dataclass(frozen=True, slots=True)
class LocalSource:
    """An entry of [tool.uv.sources] that names local files."""

    #: The package, in canonical form.
    name: str
    #: Its position, where a package has a list of sources.
    number: int
    #: A folder, a wheel or a source archive, relative to the file; None for a workspace member.
    path: str | None
    is_editable: bool


@dataclass(frozen=True)
class Replacement:
    """What takes the place of local sources."""

    #: The wheel of each `LocalSource`.
    wheels: Mapping[LocalSource, Described]
    #: All local packages, also those that only others of them require.
    names: tuple[str, ...]
    #: The project's own package, if it is installed.
    project: Described | None = None
    #: [tool.uv] of the workspace.
    workspace: Mapping[str, Any] = field(default_factory=dict)
    #: What the local packages require from sources that are not local: requirements, the sources
    #: by name, and the indexes that these name.
    requirements: tuple[str, ...] = ()
    sources: Mapping[str, Any] = field(default_factory=dict)
    indexes: tuple[Mapping[str, Any], ...] = ()


def check_shapes(data: Mapping[str, Any], *, where: str) -> None:
    """Raise `InvalidInput` if an entry that is read or changed here is of a wrong type."""
    for path, kind, example in _SHAPES:
        found: Any = data
        for part in path:
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None and not isinstance(found, kind):
            word = "table" if kind is dict else "list"
            raise InvalidInput(
                f"this is not a {word}", where=f"{where}: {'.'.join(path)}", hint=example
            )

    for number, index in enumerate(table(data, "tool", "uv").get("index", [])):
        if not isinstance(index, dict):
            place = f"{where}: tool.uv.index[{number}]"
            hint = "write [[tool.uv.index]] with name and url"
            raise InvalidInput("this is not a table", where=place, hint=hint)


def local_sources(data: Mapping[str, Any], *, where: str) -> list[LocalSource]:
    """Return the local sources of a pyproject.toml.

    Raises `InvalidInput`: a source is not a table, or says that its package is not installed.
    """
    found = []
    for name, number, source in _sources(data, where=where):
        place = f"{where}: tool.uv.sources.{name}"
        if not isinstance(source, dict):
            raise InvalidInput(
                "this is not a table", where=place, hint='write it like { path = "../lib" }'
            )
        path = source.get("path")
        if path is None and not source.get("workspace"):
            continue
        if path is not None and not isinstance(path, str):
            raise InvalidInput("its path is not a string", where=place)
        if source.get("package") is False:
            raise InvalidInput(
                "a package that is not installed (package = false) cannot be used here",
                where=place,
                hint="leave package out, or write its dependencies into the project",
            )
        is_editable = bool(source.get("editable"))
        found.append(LocalSource(str(canonicalize_name(name)), number, path, is_editable))
    return found


def other_sources(
    data: Mapping[str, Any], uv: Mapping[str, Any], *, where: str
) -> tuple[list[str], dict[str, Any]]:
    """Return what a local package requires from sources that are not local.

    uv would not see these sources in the package's wheel, so that the project itself has to
    require them.

    Args:
        data: the pyproject.toml of the package.
        uv: the [tool.uv] whose sources hold for it: its own, or that of its workspace.
        where: the file, for messages.

    Returns:
        The requirements, and the sources by canonical name.

    Raises `InvalidInput`: such a package is required by an extra only.
    """
    holder = {"tool": {"uv": uv}}
    local = {source.name for source in local_sources(holder, where=where)}
    sources: dict[str, list[Any]] = {}
    for name, _, source in _sources(holder, where=where):
        if canonicalize_name(name) not in local:
            sources.setdefault(str(canonicalize_name(name)), []).append(source)
    found, project = [], data.get("project")
    own = project.get("dependencies", []) if isinstance(project, dict) else []
    for text in strings(own):
        if (name := _name_of(text)) in sources:
            found.append(text)
    names = {_name_of(text) for text in found}
    in_extras = required(data, only=_EXTRAS) & sources.keys() - names
    if in_extras:
        raise InvalidInput(
            f"an extra requires {', '.join(sorted(in_extras))} from a source of its own",
            where=where,
            hint="declare that requirement and its source in the project itself",
        )
    return found, {name: given for name, given in sources.items() if name in names}


def required(data: Mapping[str, Any], *, only: Iterable[tuple[str, ...]] | None = None) -> set[str]:
    """Return the names of all packages that a pyproject.toml requires, anywhere or in places."""
    names = set()
    for path in _REQUIREMENTS if only is None else only:
        value: Any = data
        for part in path:
            value = value.get(part, {}) if isinstance(value, dict) else {}
        names |= {_name_of(text) for text in strings(value)}
    return names - {""}


def _name_of(requirement: str) -> str:
    """The canonical name in a requirement; "" if it is malformed: `resolving` raises the error."""
    try:
        return str(canonicalize_name(Requirement(requirement).name))
    except InvalidRequirement:
        return ""


def is_package(data: Mapping[str, Any], *, has_setup_files: bool) -> bool:
    """Return whether the project of a pyproject.toml is a package, as uv decides it.

    Args:
        data: the content of the file.
        has_setup_files: whether a setup.py or setup.cfg is beside it.
    """
    said = table(data, "tool", "uv").get("package")
    if isinstance(said, bool):
        return said
    return "build-system" in data or ("project" not in data and has_setup_files)


def replaced(text: str, replacement: Replacement, *, where: str) -> str:
    """Return the text of a pyproject.toml with wheels in place of its local sources.

    It keeps its comments where its layout allows that.

    Raises `InvalidInput`: it is not usable TOML.
    """
    plain = parsed_toml(text, where=where)
    _replace(plain, replacement, where=where)
    try:
        document = tomlkit.parse(text)
        _replace(document, replacement, where=where)
        edited = document.as_string()
        if parsed_toml(edited, where=where) == plain:
            return edited
    except (TOMLKitError, InvalidInput, TypeError, AttributeError):
        pass  # an unusual layout
    return tomlkit.dumps(plain)


def _sources(data: Mapping[str, Any], *, where: str) -> Iterator[tuple[str, int, Any]]:
    try:
        sources = table(data, "tool", "uv", "sources")
    except InvalidInput as exc:
        raise exc.about(where=where) from None
    for name, given in sources.items():
        for number, source in enumerate(given if isinstance(given, list) else [given]):
            yield name, number, source


def _replace(data: MutableMapping[str, Any], new: Replacement, *, where: str) -> None:
    uv = data.setdefault("tool", {}).setdefault("uv", {})
    for name, value in new.workspace.items():
        if name not in _ROOT_ONLY:
            uv.setdefault(name, value)
    uv.pop("workspace", None)
    by_place = {(source.name, source.number): built for source, built in new.wheels.items()}
    sources: dict[str, Any] = {}
    for name, number, source in list(_sources(data, where=where)):
        built = by_place.get((str(canonicalize_name(name)), number))
        value = source
        if built is not None:
            conditions = {each: source[each] for each in _CONDITIONS if each in source}
            value = {"path": built.wheel.path, **conditions}
        sources.setdefault(name, []).append(value)
    known = {str(canonicalize_name(name)) for name in sources}
    for name, given in new.sources.items():
        if name not in known:
            sources[name] = list(given)
    names = {place.name for place in new.wheels}
    inherited = {"tool": {"uv": {"sources": new.workspace.get("sources", {})}}}
    for name, number, source in _sources(inherited, where=where):
        plain = str(canonicalize_name(name))
        if plain in names - known and not {"extra", "group"} & source.keys():
            built = by_place.get((plain, number))
            conditions = {each: source[each] for each in _CONDITIONS if each in source}
            value = source if built is None else {"path": built.wheel.path, **conditions}
            sources.setdefault(plain, []).append(value)
    for place, built in new.wheels.items():
        if place.name not in known:  # of another local package
            sources.setdefault(place.name, [{"path": built.wheel.path}])
    if new.project is not None:
        sources[new.project.wheel.name] = [{"path": new.project.wheel.path}]
        _install_project(data, new.project)
    if new.requirements:
        project = data.setdefault("project", {})
        project["dependencies"] = [*project.get("dependencies", []), *new.requirements]
    if sources:
        uv["sources"] = {
            name: given[0] if len(given) == 1 else given for name, given in sources.items()
        }
    if new.names:
        limits = list(uv.get("constraint-dependencies", []))
        uv["constraint-dependencies"] = [*limits, *(n for n in new.names if n not in limits)]
    indexes = list(uv.get("index", []))
    there = {index.get("name") for index in indexes}
    more = [dict(index) for index in new.indexes if index.get("name") not in there]
    if more:
        uv["index"] = [*indexes, *more]


def _install_project(data: MutableMapping[str, Any], built: Described) -> None:
    """Make the project one that requires its own package."""
    name = built.wheel.name
    project = data.setdefault("project", {})
    project["name"] = ENVIRONMENT
    dynamic = list(project.get("dynamic", []))
    if "version" not in project and "version" not in dynamic:
        project["version"] = "0"
    project["dependencies"] = [*project.get("dependencies", []), name]
    extras = project.get("optional-dependencies", {})
    known = {canonicalize_name(extra) for extra in extras}
    more = {e: [f"{name}[{e}]"] for e in built.extras if canonicalize_name(e) not in known}
    if more:
        project["optional-dependencies"] = {**extras, **more}
    if {"dependencies", "optional-dependencies"} & {*dynamic}:  # its metadata has them
        project["dynamic"] = [
            each for each in dynamic if each not in ("dependencies", "optional-dependencies")
        ]
    conflicts = data["tool"]["uv"].get("conflicts")
    if isinstance(conflicts, list) and all(isinstance(each, list) for each in conflicts):
        # An item without a package means this project.
        data["tool"]["uv"]["conflicts"] = [
            [_of_environment(item, name) for item in choice] for choice in conflicts
        ]


def _of_environment(item: Any, name: str) -> Any:
    if isinstance(item, dict) and canonicalize_name(str(item.get("package", ""))) == name:
        return {key: value for key, value in item.items() if key != "package"}
    return item
