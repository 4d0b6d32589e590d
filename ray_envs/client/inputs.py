"""Reads and checks the files that people write: specs and batch files.

`source_files` reads the file of a spec; `entrypoints` checks the code that a batch names.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_envs.batch_models import BatchSpec, CaseSpec, split_entrypoint
from ray_envs.client.source_files import read_pylock, read_requirements, read_script
from ray_envs.client.texts import read_utf8
from ray_envs.decisions.entries import Local, is_place, requirement
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.decisions.requirements import requirement_lines
from ray_envs.decisions.sources import Asked, both_pythons
from ray_envs.disk.files import check_folder, kind_of
from ray_envs.errors import InvalidId, InvalidInput
from ray_envs.models import EnvId, checked_id
from ray_envs.specs import Definition, EnvSpec, LocalWheel
from ray_envs.validation import nearest_hint, validated

if TYPE_CHECKING:
    from ray_envs.client.local_packages import LocalPackages

_TOML_HINT = "correct that line; strings need quotes"


def read_definition(spec: EnvSpec, base: Path, *, where: str = "") -> Definition:
    """Return the definition of a spec: the spec with the texts of the files that it names.

    Args:
        spec: the spec.
        base: the folder that the spec's file or project is relative to.
        where: the table that holds the spec, as in "variants[1]", for messages about its packages.

    Raises:
        InvalidInput: a file or folder is missing, unreadable, or not of the format that is needed.
        InvalidPackages: a requirement cannot be accepted.
    """
    asked, uv_lock, wheels = _read_source(spec, base, where=f"{where}.packages" if where else "")
    shared = {name: getattr(spec, name) for name in Definition.model_fields if hasattr(spec, name)}
    shared |= {
        "packages": asked.packages,
        "python": both_pythons(spec.python, asked.python),
        "pyproject": asked.pyproject,
        "uv_lock": uv_lock,
        "hashes": asked.hashes,
        "wheels": wheels,
    }
    return Definition(**shared)


def _read_source(
    spec: EnvSpec, base: Path, *, where: str
) -> tuple[Asked, str | None, tuple[LocalWheel, ...]]:
    """Return what the spec and its file ask for, the text of its lock file, its local packages."""
    asked, uv_lock = Asked(packages=()), None
    locals_: list[tuple[Local, Path]] = []
    local: LocalPackages | None = None
    if spec.requirements is not None:
        asked, found = read_requirements(base / spec.requirements)
        locals_ += found
    elif spec.script is not None:
        file = base / spec.script
        asked, uv_lock = read_script(file)
        locals_ += ((local, file.parent) for local in asked.locals)
    elif spec.pylock is not None:
        file = base / spec.pylock
        asked = read_pylock(file)
        locals_ += ((local, file.parent) for local in asked.locals)
    elif spec.project is not None:
        folder = base / spec.project
        _check_folder(folder)
        text, uv_lock, local = _read_project(folder, install=spec.install_project)
        asked = Asked(packages=(), pyproject=text)
    lines = []
    for entry in spec.packages:
        given = None
        if is_place(entry) and not entry.startswith("-"):
            given = requirement(entry, (), where=where or "packages")
        if isinstance(given, Local):
            locals_.append((given, base))
        else:
            lines.append(entry)
    packages = (*requirement_lines(lines, where=where or "packages"), *asked.packages)
    asked = replace(asked, packages=packages)
    sources = base if spec.script is None else (base / spec.script).parent
    if locals_ or spec.script is not None:
        from ray_envs.client.local_packages import LocalPackages

        local = local or LocalPackages()
        asked = local.of_files(asked, locals_, sources)
    return asked, uv_lock, () if local is None else local.wheels


def _check_folder(folder: Path) -> None:
    names_its_file = folder.name in ("pyproject.toml", "uv.lock")
    check_folder(
        folder,
        "the project folder",
        where=str(folder),
        if_file="name the folder that holds it"
        if names_its_file
        else "for a requirements file write requirements = … instead",
    )


def read_texts(folder: Path) -> tuple[str, str | None]:
    """Return the pyproject.toml and the uv.lock in `folder` as they are; None without a lock.

    Raises `InvalidInput`: there is no pyproject.toml, or a file cannot be read or is not TOML.
    """
    _check_folder(folder)
    text = read_utf8(folder / "pyproject.toml")
    parsed_toml(text, where=str(folder / "pyproject.toml"), hint=_TOML_HINT)
    lock = folder / "uv.lock"
    return text, None if kind_of(lock) == "missing" else read_utf8(lock)


def _read_project(folder: Path, *, install: bool | None) -> tuple[str, str | None, LocalPackages]:
    """Return the texts of a project with wheels in place of its local packages, and these."""
    from ray_envs.client.local_packages import LocalPackages, has_setup_files
    from ray_envs.client.workspaces import Workspace

    file, lock = folder / "pyproject.toml", folder / "uv.lock"
    text = ""
    if kind_of(file) != "missing" or not has_setup_files(folder):
        text = read_utf8(file)
    data = parsed_toml(text, where=str(file), hint=_TOML_HINT)
    local = LocalPackages()
    replaced = local.of_project(folder, text, install=install)
    if kind_of(lock) == "missing":
        workspace = Workspace.of(folder, data)
        lock = lock if workspace is None else workspace.root / "uv.lock"
    uv_lock = None if kind_of(lock) == "missing" else read_utf8(lock)
    return replaced, uv_lock, local


def read_batch(path: Path) -> BatchSpec:
    """Return the batch in the file `path`; its `code` stays relative to that file.

    The files that its variants name are read by `read_definition`.

    Raises:
        InvalidInput: the file is missing or not TOML; or it has an unknown key, a wrong type, no
            variants or cases, an id twice, a malformed entrypoint, an argument that is not JSON, or
            a code folder that does not exist.
        InvalidId: the name, a variant id or a case id is not allowed.
    """
    where = str(path)
    data = parsed_toml(read_utf8(path), where=where, hint=_TOML_HINT)
    for table in ("variants", "cases"):
        _check_table(data, table, where=where)
    batch = validated(BatchSpec, data, where=where)
    _check_ids(batch, where=where)
    split_entrypoint(batch.entrypoint, where=where)
    for index, case in enumerate(batch.cases):
        _check_arguments(case, f"cases[{index}]", where=where)
    if batch.code is not None:
        check_folder(
            path.parent / batch.code,
            f"code: the folder {batch.code!r}",
            where=where,
            if_file="name the folder that holds the module",
        )
    return batch


def _check_table(data: dict[str, Any], table: str, *, where: str) -> None:
    rows = data.get(table)
    if isinstance(rows, dict):
        raise InvalidInput(
            f"{table}: one table was found, a list of tables is needed",
            where=where,
            hint=f"write [[{table}]] with two brackets",
        )
    if rows is None:
        unknown = [key for key in data if key not in BatchSpec.model_fields]
        for key in difflib.get_close_matches(table, unknown, n=1):
            raise InvalidInput(
                f"unknown key {key!r}", where=where, hint=nearest_hint(key, BatchSpec.model_fields)
            )
    if rows is None or rows == []:
        example = 'id = "old" and packages = ["…"]' if table == "variants" else 'id = "first"'
        raise InvalidInput(
            f"an empty matrix: there are no {table}",
            where=where,
            hint=f"add a [[{table}]] table with {example}",
        )


def _check_ids(batch: BatchSpec, *, where: str) -> None:
    _check_id(batch.name, "batch", where=f"{where}: name")
    for table, kind, ids in (
        ("variants", "variant", [variant.id for variant in batch.variants]),
        ("cases", "case", [case.id for case in batch.cases]),
    ):
        for index, value in enumerate(ids):
            _check_id(value, kind, where=f"{where}: {table}[{index}].id")
            if value in ids[:index]:
                raise InvalidInput(
                    f"{table}[{index}] and {table}[{ids.index(value)}] have the same {kind} id "
                    f"{value!r}",
                    where=where,
                    hint=f"give every {kind} an id of its own",
                )
    for index, variant in enumerate(batch.variants):
        try:  # both ids together become one folder name
            EnvId(workflow_id=batch.name, node_id=variant.id)
        except InvalidId as err:
            raise err.about(where=f"{where}: variants[{index}].id") from None


def _check_id(value: str, kind: str, *, where: str) -> None:
    try:
        checked_id(value, kind=kind)
    except InvalidId as err:
        raise err.about(where=where) from None


def _check_arguments(case: CaseSpec, at: str, *, where: str) -> None:
    for index, value in enumerate(case.args):
        _check_json(value, f"{at}.args[{index}]", where=where)
    for name, value in case.kwargs.items():
        if not name.isidentifier():
            raise InvalidInput(
                f"{at}.kwargs: {name!r} cannot be an argument name",
                where=where,
                hint="use letters, digits and _",
            )
        _check_json(value, f"{at}.kwargs.{name}", where=where)


def _check_json(value: Any, at: str, *, where: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_json(inner, f"{at}.{name}", where=where)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _check_json(inner, f"{at}[{index}]", where=where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput(
            f"{at}: {value} is not a JSON value",
            where=where,
            hint="give a finite number or a string",
        )
    elif not isinstance(value, str | int | float):
        raise InvalidInput(
            f"{at}: {value} is a TOML {type(value).__name__}, not a JSON value",
            where=where,
            hint=f'write it as a string: "{value}"',
        )
