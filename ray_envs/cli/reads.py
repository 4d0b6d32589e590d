"""The commands that only read this machine's disk: list, status, deps, generations, diff.

They use neither a manager nor Ray: they answer at once, whatever else is broken.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import click

from ray_envs.cli.arguments import disk, json_option, record_of, variant_argument
from ray_envs.cli.printing import (
    KEY_SHOWN,
    columns,
    complain,
    put,
    put_diff,
    put_fields,
    put_json,
    put_rows,
    say,
)
from ray_envs.errors import StorageFailed
from ray_envs.models import Status

if TYPE_CHECKING:
    from ray_envs.manager.registry import Registry
    from ray_envs.models import VariantRecord
    from ray_envs.node.store import Store

_NOT_BUILT = "NOT_BUILT"


@click.command(name="list")
@json_option
def list_variants(as_json: bool) -> None:
    """List all variants, and whether each is ready on this machine.

    \b
    Example: ray-envs list --json
    """
    gc.disable()  # nothing read here becomes garbage, and looking for it doubles the time
    registry, store = disk()
    damaged: list[StorageFailed] = []
    there: dict[str, dict[str, Any]] = {}
    rows = []
    for record in registry.all(damaged=damaged):
        key = record.current.key
        if key not in there:  # thousands of variants can share one
            there[key] = _local_state(key, store)
        count = len(record.current.packages)
        rows.append({**_description(record, registry, store), **there[key], "package_count": count})
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
    """Show the state of VARIANT on this machine, and its packages.

    \b
    Example: ray-envs status old
    """
    registry, store = disk()
    record = record_of(registry, variant)
    packages = dict(sorted(record.current.packages.items()))
    row = {
        **_description(record, registry, store),
        **_local_state(record.current.key, store),
        "made_by": record.current.made_by,
        "generations": list(record.numbers),
        "env_vars": dict(record.definition.env_vars),
        "packages": packages,
    }
    if as_json:
        put_json(row)
    else:
        put_fields({**row, "packages": [f"{n}=={v}" for n, v in packages.items()]})


def _description(record: VariantRecord, registry: Registry, store: Store) -> dict[str, Any]:
    from ray_envs.manager.registry import describe_record

    return describe_record(record, registry, store.venv(record.current.key))


def _local_state(key: str, store: Store) -> dict[str, Any]:
    """Return the state of an environment on this machine."""
    ready = store.record(key)
    return {
        "status": Status.ACTIVE.value if ready else _NOT_BUILT,
        "is_held": store.is_held(key) if ready else False,
        "how": ready.how if ready else None,
    }


@click.command()
@variant_argument
@json_option
def deps(variant: str, as_json: bool) -> None:
    """Show the declared and the locked packages of VARIANT.

    \b
    Example: ray-envs deps old
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    from ray_envs.manager import exports

    registry, _ = disk()
    record = record_of(registry, variant)
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
    # A marker can exclude a declared package on this platform.
    rows += [(name, None, "; ".join(asked[name])) for name in sorted(asked.keys() - locked.keys())]
    put(columns(("package", "locked", "declared"), rows))


@click.command()
@variant_argument
@json_option
def generations(variant: str, as_json: bool) -> None:
    """List the generations of VARIANT, oldest first.

    `*` marks the current one. +1 -0 ~2 means: 1 package added, 0 removed, 2 changed.

    \b
    Example: ray-envs generations old
    """
    from ray_envs.manager import exports

    registry, store = disk()
    record = record_of(registry, variant)
    rows = exports.generations(
        registry, record, facts=lambda made: {"is_ready": store.record(made.key) is not None}
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
    changed = "+{} -{} ~{}".format(*(len(row["diff"][w]) for w in ("added", "removed", "changed")))
    return (
        number, row["made_by"], row["created_at"][:19] + "Z", row["key"][:KEY_SHOWN],
        "yes" if row["is_ready"] else "no", row["python_version"], row["ray_version"], changed,
    )  # fmt: skip


@click.command()
@variant_argument
@click.argument("from_", metavar="FROM", type=click.IntRange(min=1))
@click.argument("to", required=False, type=click.IntRange(min=1))
@json_option
def diff(variant: str, from_: int, to: int | None, as_json: bool) -> None:
    """Show the packages that differ between generations of VARIANT.

    Compares generation FROM with TO, by default with the current one.

    \b
    Example: ray-envs diff old 1 3
    """
    from ray_envs.manager import exports

    registry, _ = disk()
    record = record_of(registry, variant)
    told = exports.difference(registry, record, from_, to)
    if as_json:
        put_json(told)
        return
    put_diff(told["diff"])
    if not any(told["diff"].values()):
        if told["from"] == told["to"]:
            say(f"generation {told['to']} has the same packages as itself: give TO, another one")
        else:
            say(f"generations {told['from']} and {told['to']} have the same packages")
