"""What happened, and what is the matter: operations, events, gc, explain and doctor.

The history is read from its file, without a manager: it can be asked whatever else is broken. The
others ask the manager that lives on the root, or do its work in this process.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from ray_envs.cli.console import (
    KEY_SHOWN,
    Answer,
    Hours,
    Variant,
    address,
    columns,
    complain,
    disk,
    dry_run_option,
    found,
    json_option,
    mib,
    opened,
    patiently,
    put,
    put_fields,
    put_json,
    say,
    variant_argument,
)
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.events import EventKind, OperationStatus
from ray_envs.models import EnvId
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from ray_envs.events import EnvEvent, Operation
    from ray_envs.manager.operations import Operations

_UNHEALTHY = 1
_INTERRUPTED = 130
_NODE_SHOWN = 12

#: How often `events --follow` looks for what is new.
_LOOK_S = 0.25
#: Events that are read at once.
_PAGE = 1000

#: What an operation can be, for people who filter by it.
OPERATIONS = (
    "create", "import", "add", "update", "remove", "relock", "rollback", "sync", "pin", "unpin",
    "delete", "gc",
)  # fmt: skip

_variant = click.argument("variant", required=False, type=Variant())


# -- operations ----------------------------------------------------------------------------------


@click.command()
@_variant
@click.option("--operation", type=click.Choice(OPERATIONS), help="Only these.")
@click.option("--status", type=click.Choice([s.value for s in OperationStatus]), help="Only these.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Leave out the newest N.")
@click.option("--delete", "is_delete", is_flag=True, help="Delete those that match and have ended.")
@click.option("--before", metavar="MOMENT", help="With --delete: only what began before it.")
@json_option
def operations(
    variant: str | None,
    operation: str | None,
    status: str | None,
    limit: int,
    offset: int,
    is_delete: bool,
    before: str | None,
    as_json: bool,
) -> None:
    """What was done to all variants or to VARIANT, newest first.

    \b
    Example: ray-envs operations old --status failed
             ray-envs operations --delete --before 2026-01-31
    """
    if before is not None and not is_delete:
        raise click.UsageError("--before goes with --delete.")
    log = _operations()
    filters: dict[str, Any] = {
        "variant_id": None if variant is None else str(EnvId.parse(variant)),
        "operation": operation,
        "status": None if status is None else OperationStatus(status),
    }
    if is_delete:
        moment = None if before is None else _moment(before)
        count = log.history.delete_operations(before=moment, **filters)
        if log.history.problem:
            raise StorageFailed("the history cannot be changed now", detail=log.history.problem)
        if as_json:
            put_json({"deleted": count})
        else:
            say(f"{count} operations are deleted")
        return
    asyncio.run(log.settle_all())
    rows, total = log.history.operations(limit=limit, offset=offset, **filters)
    if variant is not None and not total:
        _check_known(log, variant)
    if as_json:
        put_json({"rows": [row.model_dump(mode="json") for row in rows], "total": total})
    elif rows:
        header = ("started", "operation", "variant", "status", "took", "exit", "id", "error")
        put(columns(header, map(_operation_cells, rows), right="took exit"))
    if not as_json and total != len(rows):
        say(f"{len(rows)} of {total} operations that match")
    elif not as_json and not rows:
        say("no operations match")


def _operations() -> Operations:
    """The log of this root. It reads the disk; what it settles, it settles there."""
    from ray_envs.manager.operations import Operations

    return Operations(Settings.from_environment(), disk()[0])


def _check_known(log: Operations, variant: str) -> None:
    """Refuse a variant that neither is defined nor was ever told of: it was misspelt."""
    name = str(EnvId.parse(variant))
    events, _ = log.history.events(variant_id=name, limit=1)
    if not events and not log.history.operations(variant_id=name, limit=1)[1]:
        with suppress(StorageFailed):  # it is defined, and damaged
            found(disk()[0], variant)


def _operation_cells(row: Operation) -> tuple[object, ...]:
    took = None if row.duration_ms is None else f"{row.duration_ms / 1000:.2f} s"
    error = row.error["message"] if row.error else None
    return (
        _clock(row.started_at), row.operation, row.variant_id, row.status.value, took,
        row.exit_code, row.operation_id[:KEY_SHOWN], error,
    )  # fmt: skip


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise InvalidInput(
            f"{text!r} is no moment",
            where="--before",
            hint="write it like 2026-01-31 or 2026-01-31T12:00:00Z (UTC where no zone is given)",
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _clock(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- events --------------------------------------------------------------------------------------


@click.command()
@_variant
@click.option("--since", metavar="N", type=click.IntRange(min=0), help="Only what came after N.")
@click.option(
    "--kind",
    "kinds",
    type=click.Choice([kind.value for kind in EventKind]),
    metavar="KIND",
    multiple=True,
    help="Only these; repeatable.",
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@json_option
def events(
    variant: str | None, since: int | None, kinds: tuple[str, ...], follow: bool, as_json: bool
) -> int:
    """What happened to all variants or to VARIANT, in order.

    Each event has its number N. With --follow: what happens from now on (with --since, also what
    happened after N), with --json one object a line; Ctrl-C ends it without a word and, as
    `tail -f`, with exit code 130.

    \b
    Example: ray-envs events old --kind EnvironmentDamaged --follow
    """
    name = None if variant is None else str(EnvId.parse(variant))
    log = _operations()
    if follow:
        try:
            return _follow(log, since, kinds, name, as_json=as_json)
        except KeyboardInterrupt:
            return _INTERRUPTED
    asyncio.run(log.settle_all())
    following = since or 0
    told: list[EnvEvent] = []
    for page, number in _pages(log, since or 0, kinds, name):
        told, following = told + page, number
    if variant is not None and not told:
        _check_known(log, variant)
    if as_json:
        rows = [event.model_dump(mode="json") for event in told]
        put_json({"events": rows, "next": following})
    elif told:
        put("\n".join(map(_line, told)))
    else:
        say("no events match")
    return 0


def _follow(
    log: Operations, since: int | None, kinds: Iterable[str], name: str | None, *, as_json: bool
) -> int:
    """Print events as they come; returns when nobody reads them any more."""
    following = log.history.last_number() if since is None else since
    while True:
        for page, number in _pages(log, following, kinds, name):
            following = number
            for event in page:
                if not put(event.model_dump_json() if as_json else _line(event)):
                    return 0
        time.sleep(_LOOK_S)


def _pages(
    log: Operations, since: int, kinds: Iterable[str], name: str | None
) -> Iterator[tuple[list[EnvEvent], int]]:
    """Events after number `since`, and the number to go on from, until there are no more."""
    wanted = [EventKind(kind) for kind in kinds]
    while True:
        page, since = log.history.events(since=since, kinds=wanted, variant_id=name, limit=_PAGE)
        yield page, since
        if len(page) < _PAGE:
            return


def _line(event: EnvEvent) -> str:
    parts = [f"{event.number:>6}", _clock(event.at), event.kind.value]
    parts += [event.variant_id] if event.variant_id else []
    parts += [f"environment {event.key[:KEY_SHOWN]}"] if event.key else []
    parts += [f"node {event.node_id[:_NODE_SHOWN]}"] if event.node_id else []
    parts += [f"{name}={_short(value)}" for name, value in event.data.items() if value is not None]
    return "  ".join(parts)


def _short(value: Any) -> str:
    """A particular of an event in a few words."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping) and "message" in value:  # an error
        return str(value["message"]).splitlines()[0] if value["message"] else str(value["type"])
    if isinstance(value, Mapping) and set(value) == {"added", "removed", "changed"}:
        return "+{} -{} ~{}".format(*(len(value[w]) for w in ("added", "removed", "changed")))
    if isinstance(value, Mapping | list):
        return json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split())


# -- gc ------------------------------------------------------------------------------------------


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
        row["node_id"][:_NODE_SHOWN], row["because"],
    )  # fmt: skip


# -- what is the matter --------------------------------------------------------------------------


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
        put(f"{'collection':16} node {row['node_id'][:_NODE_SHOWN]} {fate}: {row['because']}")
    rows = [
        (node_id[:_NODE_SHOWN], state["phase"], state["because"] or _why(state))
        for node_id, state in answer["nodes"].items()
    ]
    put(columns(("node", "phase", "because"), rows))


def _why(state: Mapping[str, Any]) -> str:
    error = state.get("error")
    return str(error["message"] if error else state.get("progress") or state.get("how") or "")


@click.command()
@_variant
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
            yield node_id[:_NODE_SHOWN], "agent", "FAIL", node["error"]["message"], None
        for probe in node["probes"]:
            mark = "ok" if probe["ok"] else "FAIL"
            yield node_id[:_NODE_SHOWN], probe["name"], mark, probe["value"], probe["hint"] or None


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
    return row["key"][:KEY_SHOWN], row["variant_id"], row["node_id"][:_NODE_SHOWN], mark, text


def _damage(damage: Any) -> str:
    if isinstance(damage, Mapping):
        return " ".join(str(value) for value in damage.values() if value)
    return str(damage)


def _told(error: dict[str, str]) -> str:
    from ray_envs.errors import from_dict

    return str(from_dict(error))
