"""What is the matter: gc, explain and doctor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from ray_envs.cli.arguments import (
    Hours,
    address,
    dry_run_option,
    json_option,
    optional_variant,
    variant_argument,
)
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
from ray_envs.cli.waiting import opened, patiently

_UNHEALTHY = 1


@click.command()
@dry_run_option
@click.option("--idle-hours", type=Hours(), help="By default RAY_ENVS_IDLE_HOURS.")
@click.option(
    "--include-current",
    is_flag=True,
    help="Also those of variants that are not pinned; they are built again on demand.",
)
@json_option
def gc(dry_run: bool, idle_hours: float | None, include_current: bool, as_json: bool) -> None:
    """Collect environments that nobody needs any more.

    Nobody wants, holds or was promised them, and they were idle for long enough. Says for every
    environment whether it goes or stays, and why. uv's cache is pruned behind them.

    \b
    Example: ray-envs gc --dry-run --idle-hours 24
    """
    with opened() as provider:
        answer = patiently(
            lambda: provider.gc(
                idle_hours=idle_hours, dry_run=dry_run, include_current=include_current
            )
        )
    if as_json:
        put_json(answer)
        return
    gone = "would go" if dry_run else "collected"
    rows = [_verdict(row, gone) for row in answer["deleted"]]
    rows += [_verdict(row, "stays") for row in answer["kept"]]
    if rows:
        header = ("environment", "size", "idle", "verdict", "node", "reason")
        put(columns(header, rows, right="size idle"))
    else:
        say("there are no environments")
    freed = mib(answer["freed_bytes"])
    say(f"a dry run: {freed} would be freed" if dry_run else f"{freed} are free again")


def _verdict(row: Answer, verdict: str) -> tuple[object, ...]:
    hours, minutes = divmod(int(row["idle_s"]) // 60, 60)
    return (
        row["key"], mib(row["bytes"]), f"{hours}:{minutes:02} h", verdict,
        row["node_id"][:NODE_SHOWN], row["because"],
    )  # fmt: skip


@click.command()
@variant_argument
@json_option
def explain(variant: str, as_json: bool) -> None:
    """Why VARIANT is as it is.

    Each node and its reason, who uses the environment, and what a collection would do with it.

    \b
    Example: ray-envs explain old
    """
    name = address(variant)
    with opened() as provider:
        answer = patiently(lambda: provider.explain(name))
    if as_json:
        put_json(answer)
        return
    error = answer["error"]
    put_fields(
        {
            "variant_id": answer["variant_id"],
            "status": answer["status"],
            "generation": answer["generation"],
            "key": answer["key"],
            "asked for": "yes" if answer["is_asked_for"] else "no",
            "shared with": answer["shared_with"],
            "error": error["message"] if error else None,
        }
    )
    for user in answer["users"]:
        put(f"{'in use':16} {user}")
    for row in answer["collection"]:
        fate = "would collect it" if row["collect"] else "keeps it"
        put(f"{'collection':16} node {row['node_id'][:NODE_SHOWN]} {fate}: {row['because']}")
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
@click.option("--repair", is_flag=True, help="Mend what is damaged, and build what was lost.")
@json_option
def doctor(variant: str | None, repair: bool, as_json: bool) -> int:
    """Examine nodes and environments, file by file.

    All environments, or that of VARIANT; with --repair what is damaged is mended.

    \b
    Example: ray-envs doctor --repair
    Exit code: 0 all is well (after --repair: again), 1 it is not.
    """
    name = None if variant is None else address(variant)
    with opened() as provider:
        answer = patiently(lambda: provider.doctor(repair=repair, variant_id=name))
    is_healthy = bool(answer["is_healthy"])
    if as_json:
        put_json(answer)
        return 0 if is_healthy else _UNHEALTHY
    put(columns(("node", "probe", "", "found", "hint"), _probes(answer["nodes"])))
    if answer["environments"]:
        header = ("environment", "variant", "node", "", "found")
        put("\n" + columns(header, map(_examined, answer["environments"])))
    for error in answer["definitions"]:
        complain(_told(error))
    if answer["history"] != "ok":
        complain(f"history: {answer['history']}")
    if is_healthy:
        say("all is well")
    else:
        complain("something is wrong" + ("" if repair else "; --repair mends environments"))
    return 0 if is_healthy else _UNHEALTHY


def _probes(nodes: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for node_id, node in nodes.items():
        if node["error"]:
            yield node_id[:NODE_SHOWN], "agent", "FAIL", node["error"]["message"], None
        for probe in node["probes"]:
            mark = "ok" if probe["ok"] else "FAIL"
            yield node_id[:NODE_SHOWN], probe["name"], mark, probe["value"], probe["hint"] or None


def _examined(row: Mapping[str, Any]) -> tuple[object, ...]:
    if row["error"]:
        mark, text = "FAIL", row["error"]["message"]
    elif not row["is_ready"]:
        mark, text = "FAIL", "not there; `ray-envs sync` or --repair builds it"
    elif not row["damaged_files"]:
        mark, text = "ok", "matches its lock"
    else:
        mark = "FAIL" if row["left"] else "ok"
        text = f"{row['damaged_files']} files differ, {len(row['left'])} left as they are"
        text += ", given up, to be built again" if row["is_discarded"] else ""
        text += "".join(f"; {_damage(each)}" for each in (row["left"] or row["damage"])[:3])
        if row["sharers"]:
            text += f"; shared with {', '.join(key[:KEY_SHOWN] for key in row['sharers'])}"
    return row["key"][:KEY_SHOWN], row["variant_id"], row["node_id"][:NODE_SHOWN], mark, text


def _damage(damage: Any) -> str:
    if isinstance(damage, Mapping):
        return " ".join(str(value) for value in damage.values() if value)
    return str(damage)


def _told(error: dict[str, str]) -> str:
    from ray_envs.errors import from_dict

    return str(from_dict(error))
