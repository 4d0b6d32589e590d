"""From what was asked to what uv resolves: requirements, project texts and their fingerprints.

Pure: texts in, values out; no disk, no processes, no clock. `builder` runs uv on the texts made
here, and `locks`, next door, reads what uv answers. Formats come from elsewhere: requirements from
PEP 508, dependency groups from PEP 735, `[tool.uv]` from uv 0.13.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import tomlkit
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from tomlkit.exceptions import TOMLKitError

from ray_envs.decisions.policy import check_credentials
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import RAY_GROUP, Definition, Target, nearest_hint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_PYPROJECT = "pyproject.toml"

_COMMIT = re.compile(r"[0-9a-fA-F]{40}")

#: Entries of [tool.uv] that leave what a lock installs as it is: they choose what goes into the
#: lock, or say how uv works. Whatever else uv knows, or will know, is taken to change it.
_NOT_INSTALLED = (
    # what the lock says already
    "*index*", "constraint-dependencies", "default-groups", "dependency-groups",
    "dependency-metadata", "dev-dependencies", "environments", "exclude-dependencies",
    "exclude-newer*", "find-links", "fork-strategy", "no-sources*", "override-dependencies",
    "prerelease*", "required-environments", "resolution", "sources", "upgrade*",
    # what concerns the project itself, which is never installed, or other commands
    "add-bounds", "audit", "build-backend", "check-url", "managed", "package", "pip",
    "publish-url", "trusted-publishing",
    # how uv reaches, keeps and lays out files whose hashes are fixed
    "allow-insecure-host", "cache-*", "compile-bytecode", "concurrent-*", "http-*", "https-*",
    "keyring-provider", "link-mode", "native-tls", "no-cache", "no-proxy", "offline", "preview*",
    "*-install-mirror", "python-*", "reinstall*", "required-version", "system-certs",
)  # fmt: skip
_LOCAL_HINT = "build a wheel, publish it to an index that every node reaches, and name it here"
_OPTION_HINTS = (
    (("-e", "--editable"), f"{_LOCAL_HINT}, or give the folder as a project"),
    (("-r", "--requirement"), 'give the file as `requirements = "…"`'),
    (("-c", "--constraint"), "write the constraints into [tool.uv] constraint-dependencies"),
    (
        ("-i", "--index-url", "--extra-index-url", "--default-index", "--index", "-f"),
        "set UV_DEFAULT_INDEX or UV_INDEX in the environment of the cluster's nodes, "
        "or write [[tool.uv.index]] in a project",
    ),
)


def requirement_lines(
    text_or_lines: str | Iterable[str], *, where: str = "packages"
) -> tuple[str, ...]:
    """The requirements of a text in their canonical form: sorted, each once.

    Args:
        text_or_lines: a requirements text, or its lines. Blank lines and comments are dropped,
            lines that end with a backslash go on in the next, and an entry such as "numpy,pandas"
            is two requirements.
        where: the file or option that holds them, for messages.

    Raises:
        InvalidPackages: an option, a local path, an unpinned repository, credentials in a URL, or
            a malformed entry.
    """
    entries = (part for entry in _entries(text_or_lines) for part in _split(entry))
    return tuple(sorted({_requirement(entry, where=where) for entry in entries}))


def check_python(wanted: str | None, target: Target, *, where: str) -> None:
    """Nothing, if `wanted` admits the cluster's interpreter.

    Args:
        wanted: a version ("3.11" admits every 3.11), a specifier (">=3.11"), or None for any.
        target: the cluster's interpreter and Ray.
        where: the file or option that holds it, for messages.

    Raises:
        InvalidInput: it does not admit it, or is neither a version nor a specifier.
    """
    if wanted is None:
        return
    text = wanted.strip()
    if re.fullmatch(r"\d+(\.\d+){0,2}", text):
        parts = text.split(".")
        is_admitted = target.python.split(".")[: len(parts)] == parts
    else:
        try:
            # An empty set of specifiers would admit everything: nobody means that.
            is_admitted = SpecifierSet(text or "?").contains(target.python, prereleases=True)
        except InvalidSpecifier:
            raise InvalidInput(
                f"{wanted!r} is neither a Python version nor a specifier",
                where=where,
                hint="write it like 3.11, 3.11.7 or >=3.11,<3.13",
            ) from None
    if not is_admitted:
        raise InvalidInput(
            f"Python {wanted} is asked for, and the cluster runs Python {target.python}",
            where=where,
            hint=f"ask for {target.python_minor} or leave it out; Ray needs the same Python "
            "everywhere, so another version needs another cluster",
        )


def project_text(definition: Definition, target: Target) -> str:
    """The `pyproject.toml` that uv locks and installs for `definition` on this cluster.

    A project's own text is kept, with its comments, apart from what must be ours: the group
    `ray-envs`, `requires-python`, `tool.uv.package` and additional packages. A text that has all
    of this already (an export that comes back) is returned byte for byte.

    Raises:
        InvalidInput: the text is no usable TOML project, excludes the cluster's interpreter, needs
            a local source or a workspace, or lacks an extra or group that is asked for.
        InvalidPackages: a dependency that `requirement_lines` would refuse.
    """
    check_python(definition.python, target, where="python")
    packages = requirement_lines(definition.packages)
    requires_python = f"=={target.python_minor}.*"
    ray = f"ray=={target.ray}"
    text = definition.pyproject
    if text is None:
        _check_names(definition, {}, {})
        return (
            f'[project]\nname = "ray-envs-environment"\nversion = "0"\n'
            f'requires-python = "{requires_python}"\ndependencies = {_toml_array(packages)}\n\n'
            f"[dependency-groups]\n{RAY_GROUP} = {_toml_array([ray])}\n\n"
            "[tool.uv]\npackage = false\n"
        )
    data = _toml(text, where=_PYPROJECT)
    _check_project(data, target)
    groups = _table(data, "dependency-groups")
    _check_names(definition, _table(data, "project", "optional-dependencies"), groups)

    # A group of that name in another spelling is the same group to uv, and two are an error.
    group = next((name for name in groups if canonicalize_name(name) == RAY_GROUP), RAY_GROUP)
    own = data["project"].get("dependencies", [])
    known = {_requirement(entry, where=_PYPROJECT) for entry in own}
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
        # uv would run the build backend for it, whose files are elsewhere; nobody installs it.
        edits["project", "dynamic"] = [name for name in dynamic if name != "version"]
        edits["project", "version"] = "0"
    return _edited(text, data, edits)


def build_options(project_text: str) -> str:
    """What [tool.uv] says that changes what is installed from the same lock; "" for nothing.

    Files are pinned by their hash, but whether a wheel or the source archive is taken, and how that
    is built, is not (`no-binary`, `config-settings`, `extra-build-dependencies`, …).

    Returns:
        Canonical JSON, for `locks.key_of`.

    Raises:
        InvalidInput: the text is no TOML.
    """
    uv = _table(_toml(project_text, where=_PYPROJECT), "tool", "uv")
    found = {
        name: value
        for name, value in uv.items()
        if not any(fnmatchcase(name, pattern) for pattern in _NOT_INSTALLED)
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
    """A sha256 (hex) that is equal for what resolves to the same lock, given the same index.

    Args:
        project: the result of `project_text`; extras and groups choose from a lock and do not
            change it.
        user_lock: the text of the project's own uv.lock, if it has one.
        definition: where `exclude_newer` and `only_binary` come from.
        target: the cluster's interpreter and Ray.
        index_settings: the variables of uv's process that decide a resolution too.
    """
    asked = [project, user_lock, definition.exclude_newer, target.python, target.ray]
    if definition.only_binary:
        asked.append("only-binary")
    return hashlib.sha256(_canonical([*asked, dict(index_settings)]).encode()).hexdigest()


def declared(project_text: str) -> tuple[str, ...]:
    """The requirements that [project] declares, as they are written there.

    Raises:
        InvalidInput: the text is no TOML.
    """
    project = _toml(project_text, where=_PYPROJECT).get("project", {})
    return tuple(project.get("dependencies", ()))


def _canonical(value: Any) -> str:
    """`value` as JSON, equal for equal values; a date of TOML becomes its text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _toml(text: str, *, where: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InvalidInput(f"not valid TOML: {exc}", where=where) from None
    return data


def _table(data: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """The table at `path` of a pyproject.toml, empty where there is none."""
    found: Any = data
    for part in path:
        found = found.get(part, {})
        if not isinstance(found, dict):
            raise InvalidInput(f"{'.'.join(path)} is no table", where=_PYPROJECT)
    return dict(found)


def _toml_array(items: Iterable[str]) -> str:
    lines = "".join(f"    {json.dumps(item, ensure_ascii=False)},\n" for item in items)
    return f"[\n{lines}]" if lines else "[]"


# -- requirements


def _entries(text_or_lines: str | Iterable[str]) -> Iterator[str]:
    """The entries of a requirements text, without comments and with continued lines joined."""
    texts = [text_or_lines] if isinstance(text_or_lines, str) else text_or_lines
    pending = ""
    for line in (line for text in texts for line in text.lstrip("\ufeff").splitlines()):
        # As pip does: a comment never goes on in the next line.
        is_comment = line.lstrip().startswith("#")
        if line.endswith("\\") and not is_comment:
            pending += line[:-1]
            continue
        entry = re.sub(r"(^|\s+)#.*", "", pending + ("" if is_comment else line)).strip()
        pending = ""
        if entry:
            yield entry
    if pending.strip():
        yield pending.strip()


def _split(entry: str) -> list[str]:
    """`entry`, or the requirements that it lists with commas if it is not one itself."""
    try:
        Requirement(entry)
    except InvalidRequirement:
        if not re.search(r"\s", entry):
            # A comma inside brackets separates extras, not requirements.
            return [part for part in re.split(r",(?![^\[]*\])", entry) if part] or [entry]
    return [entry]


def _requirement(entry: str, *, where: str) -> str:
    """`entry` in its canonical form; see `requirement_lines` for what is refused."""
    # First of all, so that no later message can repeat a secret.
    check_credentials(entry, InvalidPackages, where=where)

    def refused(what: str, hint: str = "") -> InvalidPackages:
        return InvalidPackages(f"{entry!r} {what}", hint=hint, where=where)

    if entry.startswith("-"):
        option, value = re.findall(r"(--[^=\s]+|-.?)[=\s]*(.*)", entry)[0]
        hints = [hint for names, hint in _OPTION_HINTS if option in names]
        hint = (hints or ["leave it out"])[0].replace("…", value)
        raise refused("is an option, not a requirement", hint)
    if re.search(r"\s--[a-z]", entry):
        is_hash = "--hash" in entry
        raise refused(
            "has options of its own",
            "drop the hashes: uv.lock pins every file by its hash" if is_hash else "leave them out",
        )
    head = entry.partition(";")[0].strip()
    is_path = re.match(r"\.|/|~|\\|[A-Za-z]:\\", head) or ("@" not in head and "/" in head)
    is_file = head.lower().endswith((".whl", ".tar.gz", ".zip"))
    if "://" not in head and (is_path or is_file):
        raise refused("is a local path, and other nodes do not have it", _LOCAL_HINT)
    try:
        requirement = Requirement(entry)
    except InvalidRequirement as exc:
        if re.match(r"[A-Za-z+]+://", entry):
            raise refused("does not say what it is", 'write "name @ URL"') from None
        reason = str(exc).splitlines()[0]
        raise refused(f"is not a requirement: {reason}", 'write it like "numpy>=1.26"') from None
    if requirement.url is not None:
        problem = _url_problem(requirement.url)
        if problem:
            raise refused(*problem)
    requirement.name = canonicalize_name(requirement.name)
    requirement.extras = {canonicalize_name(extra) for extra in requirement.extras}
    return str(requirement)


def _url_problem(url: str) -> tuple[str, str] | None:
    """What is wrong with the URL of a requirement, and what to do about it."""
    scheme, is_absolute, rest = url.partition("://")
    scheme = scheme.lower()
    if not is_absolute or scheme.endswith("file"):
        return "is a local path, and other nodes do not have it", _LOCAL_HINT
    if scheme in ("git+https", "git+http", "git+ssh"):
        revision = rest.split("#")[0].rpartition("@")[2]
        if _COMMIT.fullmatch(revision):
            return None
        return "may change: it names no commit", "write git+https://…@<commit>, all 40 characters"
    if scheme not in ("https", "http"):
        return f"uses {scheme}, which is not supported", "use https or git+https"
    return None


# -- projects


def _refused(what: str, hint: str, table: str = "") -> InvalidInput:
    return InvalidInput(what, hint=hint, where=f"{_PYPROJECT}: {table}" if table else _PYPROJECT)


def _check_project(data: Mapping[str, Any], target: Target) -> None:
    """Refuse what cannot mean the same on every node, or not what the text says."""
    if "project" not in data:
        raise _refused("no [project] table", "add one with name, version and dependencies")
    project = _table(data, "project")
    for name in ("dependencies", "optional-dependencies"):
        if name in project.get("dynamic", []):
            raise _refused(f"{name} are dynamic", f"write the {name} into [project]", "project")
    if "requires-python" in project:
        where = f"{_PYPROJECT}: project.requires-python"
        check_python(str(project["requires-python"]), target, where=where)
    _check_uv(_table(data, "tool", "uv"))
    lists = {"project.dependencies": project.get("dependencies", [])}
    for path in (("project", "optional-dependencies"), ("dependency-groups",)):
        lists |= {".".join((*path, name)): value for name, value in _table(data, *path).items()}
    for table, entries in lists.items():
        if not isinstance(entries, list):
            raise _refused("this is no list", 'write it like ["numpy>=1.26"]', table)
        for entry in entries:
            if isinstance(entry, str):
                _requirement(entry, where=f"{_PYPROJECT}: {table}")
            elif not (isinstance(entry, dict) and table.startswith("dependency-groups.")):
                # A table in a group includes another group.
                raise _refused(f"{entry!r} is no string", "write requirements only", table)


def _check_uv(uv: Mapping[str, Any]) -> None:
    """Refuse workspaces, conflicts, credentials and sources that other nodes do not have."""
    for name, hint in (
        ("workspace", _LOCAL_HINT),
        ("conflicts", "make one variant of each alternative"),
    ):
        if name in uv:
            raise _refused(f"{name} cannot be used here", hint, f"tool.uv.{name}")
    for text in _strings(uv):
        check_credentials(text, InvalidInput, where=f"{_PYPROJECT}: tool.uv")
    for name, given in _table(uv, "sources").items():
        table = f"tool.uv.sources.{name}"
        for source in given if isinstance(given, list) else [given]:
            if not isinstance(source, dict):
                raise _refused("this is no table", 'write it like { index = "…" }', table)
            if {"path", "workspace", "editable"} & source.keys():
                raise _refused("a local source, which other nodes lack", _LOCAL_HINT, table)
            if "git" in source and not _COMMIT.fullmatch(str(source.get("rev", ""))):
                hint = 'write rev = "<commit>", all 40 characters'
                raise _refused("the repository may change: no commit is named", hint, table)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


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
    """`text` with the values at the given paths replaced; `text` itself where they are there.

    Raises:
        InvalidInput: its layout is one that tomlkit cannot edit faithfully.
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
                # One by one: the comments between the others stay.
                for item in value[len(before) :]:
                    table[path[-1]].append(item)
            else:
                table[path[-1]] = value
        result = document.as_string() if is_changed else text
        is_faithful = tomllib.loads(result) == data
    except (TOMLKitError, tomllib.TOMLDecodeError):
        is_faithful = False
    if not is_faithful:
        raise InvalidInput(
            "the layout of the file is too unusual to be edited",
            where=_PYPROJECT,
            hint="write [project], [dependency-groups] and [tool.uv] as plain tables",
        )
    return result
