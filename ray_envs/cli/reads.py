"""The commands that only read: what the disk says of variants and of their generations.

No manager and no Ray, so that they answer at once, whatever else is broken. An export that uv has
to write goes through a manager; what changes variants is `cli_variants`, next door.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_envs.cli.console import (
    KEY_SHOWN,
    columns,
    complain,
    disk,
    found,
    json_option,
    opened,
    patiently,
    put,
    put_diff,
    put_fields,
    put_json,
    put_rows,
    say,
    variant_argument,
)
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.models import Status

if TYPE_CHECKING:
    from ray_envs.manager.registry import Registry
    from ray_envs.models import VariantRecord
    from ray_envs.node.store import Store

#: The parts of a definition that the texts of an exported project say themselves.
_IN_PROJECT = {"packages", "pyproject", "uv_lock"}
_NOT_BUILT = "NOT_BUILT"


@click.command(name="list")
@json_option
def list_variants(as_json: bool) -> None:
    """The variants under the root, and which of them are ready on this machine.

    \b
    Example: ray-envs list --json
    """
    gc.disable()  # all that is read lives to the end: to look for garbage in it doubles the time
    registry, store = disk()
    damaged: list[StorageFailed] = []
    there: dict[str, dict[str, Any]] = {}
    rows = []
    for record in registry.all(damaged=damaged):
        key = record.current.key
        if key not in there:  # thousands of variants may share one
            there[key] = _there(key, store)
        count = len(record.current.packages)
        rows.append({**_described(record, registry, store), **there[key], "package_count": count})
    if as_json:
        put_rows(rows)
    elif rows:
        header = ("variant", "status", "generation", "environment", "python", "packages", "updated")
        cells = [
            (r["variant_id"], r["status"], r["generation"], r["key"][:KEY_SHOWN],
             r["python_version"], r["package_count"], r["updated_at"][:19] + "Z")
            for r in rows
        ]  # fmt: skip
        put(columns(header, cells, right="generation packages"))
    else:
        say(f"no variants are defined under {store.root}")
    if damaged:
        for other in damaged[1:]:
            complain(str(other))
        raise damaged[0]


@click.command()
@variant_argument
@json_option
def status(variant: str, as_json: bool) -> None:
    """What this machine's disk says of VARIANT.

    \b
    Example: ray-envs status old
    """
    registry, store = disk()
    record = found(registry, variant)
    packages = dict(sorted(record.current.packages.items()))
    row = {
        **_described(record, registry, store),
        **_there(record.current.key, store),
        "made_by": record.current.made_by,
        "generations": list(record.numbers),
        "env_vars": dict(record.definition.env_vars),
        "packages": packages,
    }
    if as_json:
        put_json(row)
    else:
        put_fields({**row, "packages": [f"{n}=={v}" for n, v in packages.items()]})


def _described(record: VariantRecord, registry: Registry, store: Store) -> dict[str, Any]:
    from ray_envs.manager.registry import describe_record

    return describe_record(record, registry, store.venv(record.current.key))


def _there(key: str, store: Store) -> dict[str, Any]:
    """What this machine's store has of an environment."""
    ready = store.record(key)
    return {
        "status": Status.ACTIVE.value if ready else _NOT_BUILT,
        "is_held": store.is_held(key) if ready else False,
        "how": ready.how if ready else None,
    }


# -- generations ---------------------------------------------------------------------------------


@click.command()
@variant_argument
@json_option
def deps(variant: str, as_json: bool) -> None:
    """What VARIANT declares, and what is locked for it.

    \b
    Example: ray-envs deps old
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from ray_envs.manager import exports

    registry, _ = disk()
    record = found(registry, variant)
    told = exports.deps(registry, record)
    if as_json:
        put_json(told)
        return
    declared, locked = told["dependencies"], told["locked_versions"]
    asked: dict[str, list[str]] = {}
    for line in declared:
        asked.setdefault(str(canonicalize_name(Requirement(line).name)), []).append(line)
    rows: list[tuple[str, str | None, str]] = [
        (name, version, "; ".join(asked.get(name, ()))) for name, version in locked.items()
    ]
    # A marker may keep a declared package away from this platform.
    rows += [(name, None, "; ".join(asked[name])) for name in sorted(asked.keys() - locked.keys())]
    put(columns(("package", "locked", "declared"), rows))


@click.command()
@variant_argument
@json_option
def generations(variant: str, as_json: bool) -> None:
    """Every generation of VARIANT, oldest first.

    `*` marks the current one; the change counts packages added, removed and changed.

    \b
    Example: ray-envs generations old
    """
    from ray_envs.manager import exports

    registry, store = disk()
    record = found(registry, variant)
    rows = exports.generations(
        registry,
        record,
        facts=lambda made: {"is_ready": store.record(made.key) is not None},
    )
    if as_json:
        put_rows(rows)
        return
    header = ("generation", "made by", "created", "environment", "ready", "python", "ray", "change")
    put(columns(header, [_generation_cells(row) for row in rows], right="generation"))


def _generation_cells(row: dict[str, Any]) -> tuple[object, ...]:
    number = f"{'*' if row['is_current'] else ''}{row['generation']}"
    if row["error"]:
        return (number, *[None] * 6, row["error"]["message"])
    return (
        number,
        row["made_by"],
        row["created_at"][:19] + "Z",
        row["key"][:KEY_SHOWN],
        "yes" if row["is_ready"] else "no",
        row["python_version"],
        row["ray_version"],
        "+{} -{} ~{}".format(*(len(row["diff"][w]) for w in ("added", "removed", "changed"))),
    )


@click.command()
@variant_argument
@click.argument("from_", metavar="FROM", type=click.IntRange(min=1))
@click.argument("to", required=False, type=click.IntRange(min=1))
@json_option
def diff(variant: str, from_: int, to: int | None, as_json: bool) -> None:
    """The packages that differ between two generations of VARIANT.

    Those are FROM and TO, which is the current one where it is not given.

    \b
    Example: ray-envs diff old 1 3
    """
    from ray_envs.manager import exports

    registry, _ = disk()
    record = found(registry, variant)
    told = exports.difference(registry, record, from_, to)
    if as_json:
        put_json(told)
        return
    put_diff(told["diff"])
    if not any(told["diff"].values()):
        say(f"generations {told['from']} and {told['to']} have the same packages")


# -- export --------------------------------------------------------------------------------------


@click.command()
@variant_argument
@click.option(
    "--format",
    "form",
    type=click.Choice(["project", "requirements", "pylock"]),
    default="project",
    help="A project for `import` and uv (the default), requirements with hashes, or pylock.toml.",
)
@click.option("--generation", type=click.IntRange(min=1), help="By default the current one.")
@click.option("--to", "folder", type=click.Path(path_type=Path), help="The folder to write into.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="One file with the project and all its wheels, for a cluster without a package index.",
)
@click.option("--force", is_flag=True, help="Overwrite files there that differ.")
@json_option
def export(
    variant: str,
    form: str,
    generation: int | None,
    folder: Path | None,
    bundle: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a generation of VARIANT for other tools or `import`.

    A project is written into a folder, by default one of the variant's name here; the other formats
    are printed, unless there is a --to. A bundle takes the wheels from this machine, where the
    variant must have been prepared.

    \b
    Example: ray-envs export old --to exported && ray-envs import copy exported
    """
    from ray_envs.manager import exports

    registry, store = disk()
    record = found(registry, variant)
    made = exports.generation(registry, record, generation)
    if bundle is not None:
        if folder is not None or form != "project":
            raise InvalidInput(
                "a bundle is a format of its own", hint="leave --to and --format out"
            )
        if os.path.lexists(bundle) and not force:
            raise InvalidInput(f"{bundle} is there already", hint="name another file, or --force")
        files = exports.put_bundle(registry, store, record, made, bundle)
        folder = bundle.parent
    elif form == "project":
        files = exports.project_files(registry, record, made)
        folder = folder or Path(record.env_id.node_id)
    else:
        name = str(record.env_id)
        with opened() as provider:
            files = patiently(lambda: provider.export(name, form, generation=made.number)["files"])
    if folder is not None and bundle is None:
        _write(files, folder, force=force)
    if as_json:
        put_json(
            {
                "variant_id": str(record.env_id),
                "generation": made.number,
                "key": made.key,
                "lock_sha256": made.lock_sha256,
                "folder": None if folder is None else str(folder),
                **({} if bundle is None else {"bundle": str(bundle)}),
                "files": files,
            }
        )
    elif bundle is not None:
        put(str(bundle))
    elif folder is None:
        for text in files.values():
            put(text.rstrip("\n"))
    else:
        for name in files:
            put(str(folder / name))


def _write(files: dict[str, str], folder: Path, *, force: bool) -> None:
    """Write all of `files` into `folder`, or nothing where one stands there that differs.

    Raises:
        InvalidInput: one differs and is not to be overwritten, or the folder cannot be written.
    """
    from ray_envs.disk.files import write_atomically

    try:
        for name, text in files.items():
            file = folder / name
            if not force and os.path.lexists(file) and file.read_bytes() != text.encode():
                raise InvalidInput(
                    f"{file} is there already and differs",
                    hint="give another folder with --to, or --force to overwrite it",
                )
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(folder / name, text)
    except OSError as exc:
        raise InvalidInput(
            f"cannot write to {folder}: {exc.strerror or exc}",
            hint="give another folder with --to",
        ) from exc
