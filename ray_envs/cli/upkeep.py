"""The commands that look after environments: gc, explain, doctor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from ray_envs.cli.arguments import Hours, full_id, json_option, optional_variant, variant_argument
from ray_envs.cli.printing import (
    KEY_SHOWN,
    NODE_SHOWN,
    Answer,
    columns,
    complain,
    mib,
    put,
    put_fields,
    put_json,
    say,
)
from ray_envs.cli.verb_options import dry_run_option, verb_option
from ray_envs.cli.waiting import open_provider, wait_for
from ray_envs.errors import from_dict
from ray_envs.verbs import Cleanup, Doctor

_UNHEALTHY = 1


@click.command()
@dry_run_option
@verb_option(Cleanup, "idle_hours", type=Hours())
@verb_option(Cleanup, "include_current")
@json_option
def gc(dry_run: bool, idle_hours: float | None, include_current: bool, as_json: bool) -> None:
    """Delete unused environments. Shows why each remaining one is kept.

    An environment is unused if no variant wants it, no process runs in it, no job was promised it,
    and it was idle for long enough. Also deletes unused entries of uv's cache.

    \b
    Example: ray-envs gc --dry-run --idle-hours 24
    """
    with open_provider() as provider:
        answer = wait_for(
            lambda: provider.gc(
                idle_hours=idle_hours, dry_run=dry_run, include_current=include_current
            )
        )
    if as_json:
        put_json(answer)
        return
    deleted = "would be deleted" if dry_run else "deleted"
    rows = [_cells(row, deleted) for row in answer["deleted"]]
    rows += [_cells(row, "kept") for row in answer["kept"]]
    if rows:
        header = ("environment", "size", "idle", "result", "node", "reason")
        put(columns(header, rows, right="size idle"))
    else:
        say("there are no environments")
    freed = mib(answer["freed_bytes"])
    say(f"dry run: {freed} would be freed" if dry_run else f"{freed} freed")


def _cells(row: Answer, result: str) -> tuple[object, ...]:
    hours, minutes = divmod(int(row["idle_s"]) // 60, 60)
    return (
        row["key"], mib(row["bytes"]), f"{hours}:{minutes:02} h", result,
        row["node_id"][:NODE_SHOWN], row["because"],
    )  # fmt: skip


@click.command()
@variant_argument
@json_option
def explain(variant: str, as_json: bool) -> None:
    """Show why VARIANT is in its state.

    Shows the state on each node with its reason, who uses the environment, and whether `gc` would
    delete it.

    \b
    Example: ray-envs explain old
    """
    name = full_id(variant)
    with open_provider() as provider:
        answer = wait_for(lambda: provider.explain(name))
    if as_json:
        put_json(answer)
        return
    error = answer["error"]
    put_fields(
        {
            **{name: answer[name] for name in ("variant_id", "status", "generation", "key")},
            "asked for": "yes" if answer["is_asked_for"] else "no",
            "shared with": answer["shared_with"],
            "error": error["message"] if error else None,
        }
    )
    for user in answer["users"]:
        put(f"{'in use':16} {user}")
    for row in answer["collection"]:
        fate = "would delete it" if row["collect"] else "keeps it"
        put(f"{'gc':16} node {row['node_id'][:NODE_SHOWN]} {fate}: {row['because']}")
    rows = [
        (node_id[:NODE_SHOWN], state["phase"], state["because"] or _why(state))
        for node_id, state in answer["nodes"].items()
    ]
    put(columns(("node", "phase", "because"), rows))


def _why(state: Mapping[str, Any]) -> str:
    error = state.get("error")
    return str(error["message"] if error else state.get("progress") or state.get("how") or "")


@click.command()
@optional_variant
@verb_option(Doctor, "repair")
@json_option
def doctor(variant: str | None, repair: bool, as_json: bool) -> int:
    """Check the nodes and all environments, or that of VARIANT.

    Compares each file with the lock.

    \b
    Example: ray-envs doctor --repair
    Exit code: 0 if all is well (with --repair: afterwards), 1 if not.
    """
    name = None if variant is None else full_id(variant)
    with open_provider() as provider:
        answer = wait_for(lambda: provider.doctor(repair=repair, variant_id=name))
    code = 0 if answer["is_healthy"] else _UNHEALTHY
    if as_json:
        put_json(answer)
        return code
    put(columns(("node", "probe", "", "found", "hint"), _probe_cells(answer["nodes"])))
    if answer["environments"]:
        header = ("environment", "variant", "node", "", "found")
        put("\n" + columns(header, map(_environment_cells, answer["environments"])))
    for error in answer["definitions"]:
        complain(str(from_dict(error)))
    if answer["history"] != "ok":
        complain(f"history: {answer['history']}")
    if answer["is_healthy"]:
        say("all is well")
    else:
        complain("something is wrong" + ("" if repair else "; --repair repairs environments"))
    return code


def _probe_cells(nodes: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for node_id, node in nodes.items():
        if node["error"]:
            yield node_id[:NODE_SHOWN], "agent", "FAIL", node["error"]["message"], None
        for probe in node["probes"]:
            mark = "ok" if probe["ok"] else "FAIL"
            yield node_id[:NODE_SHOWN], probe["name"], mark, probe["value"], probe["hint"] or None


def _environment_cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    if row["error"]:
        mark, text = "FAIL", row["error"]["message"]
    elif not row["is_ready"]:
        mark, text = "FAIL", "missing; `ray-envs sync` or --repair builds it"
    elif not row["damaged_files"]:
        mark, text = "ok", "matches its lock"
    else:
        mark = "FAIL" if row["left"] else "ok"
        text = f"{row['damaged_files']} files differ, {len(row['left'])} not repaired"
        text += ", removed to be built again" if row["is_discarded"] else ""
        text += "".join(f"; {_damage(each)}" for each in (row["left"] or row["damage"])[:3])
        if row["sharers"]:
            text += f"; shared with {', '.join(key[:KEY_SHOWN] for key in row['sharers'])}"
    return row["key"][:KEY_SHOWN], row["variant_id"], row["node_id"][:NODE_SHOWN], mark, text


def _damage(damage: Any) -> str:
    if isinstance(damage, Mapping):
        return " ".join(str(value) for value in damage.values() if value)
    return str(damage)
