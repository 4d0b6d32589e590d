"""The commands of the history: operations and events. They read its file, without a manager."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import click

from ray_envs.cli.arguments import disk, json_option, optional_variant, record_of
from ray_envs.cli.printing import KEY_SHOWN, NODE_SHOWN, columns, put, put_json, say
from ray_envs.cli.verb_options import verb_option
from ray_envs.cli.waiting import INTERRUPTED
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.events import EventKind, OperationStatus
from ray_envs.models import EnvId
from ray_envs.settings import Settings
from ray_envs.verbs import GetOperations

if TYPE_CHECKING:
    from ray_envs.events import EnvEvent, Operation
    from ray_envs.manager.operations import Operations

#: The time between two looks of `events --follow`.
_LOOK_S = 0.25
#: How many events are read together.
_PAGE = 1000
OPERATIONS = (
    "create", "import", "add", "update", "remove", "relock", "rollback", "sync", "pin", "unpin",
    "delete", "gc",
)  # fmt: skip


@click.command()
@optional_variant
@click.option("--operation", type=click.Choice(OPERATIONS), help="Only of this kind.")
@click.option("--status", type=click.Choice([s.value for s in OperationStatus]), help="Only these.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True)
@verb_option(GetOperations, "offset", type=click.IntRange(min=0), default=0)
@click.option("--delete", "is_delete", is_flag=True, help="Delete those that match and have ended.")
@click.option("--before", metavar="TIME", help="With --delete: only those that began before TIME.")
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
    """List the operations on variants or on VARIANT, newest first.

    \b
    Example: ray-envs operations old --status failed
             ray-envs operations --delete --before 2026-01-31
    """
    if before is not None and not is_delete:
        raise click.UsageError("--before needs --delete.")
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
    """Return the log of this root."""
    from ray_envs.manager.operations import Operations

    return Operations(Settings.from_environment(), disk()[0])


def _check_known(log: Operations, variant: str) -> None:
    """Raise `NotFound` if `variant` is not defined and not in the history: it is misspelt."""
    name = str(EnvId.parse(variant))
    events, _ = log.history.events(variant_id=name, limit=1)
    if not events and not log.history.operations(variant_id=name, limit=1)[1]:
        with suppress(StorageFailed):  # it is defined, but damaged
            record_of(disk()[0], variant)


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
            f"{text!r} is not a time",
            where="--before",
            hint="write it like 2026-01-31 or 2026-01-31T12:00:00Z (UTC if no zone is given)",
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _clock(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@click.command()
@optional_variant
@click.option("--since", metavar="N", type=click.IntRange(min=0), help="Only those after number N.")
@click.option(
    "--kind",
    "kinds",
    type=click.Choice([kind.value for kind in EventKind]),
    metavar="KIND",
    multiple=True,
    help="Only of this kind. Repeatable.",
)
@click.option("--follow", "-f", is_flag=True, help="Print new events as they come, until Ctrl-C.")
@json_option
def events(
    variant: str | None, since: int | None, kinds: tuple[str, ...], follow: bool, as_json: bool
) -> int:
    """List the events of all variants or of VARIANT, oldest first.

    The first column is the number of the event. --follow prints only new events, or with --since N
    those after number N; with --json it prints one object on each line. Ctrl-C ends it with exit
    code 130.

    \b
    Example: ray-envs events old --kind EnvironmentDamaged --follow
    """
    name = None if variant is None else str(EnvId.parse(variant))
    log = _operations()
    if follow:
        try:
            return _follow(log, since, kinds, name, as_json=as_json)
        except KeyboardInterrupt:
            return INTERRUPTED
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
    """Print events as they come. Returns when their reader has ended."""
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
    """Yield pages of the events after number `since`, each with the `since` of the next page."""
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
    parts += [f"node {event.node_id[:NODE_SHOWN]}"] if event.node_id else []
    parts += [f"{name}={_short(value)}" for name, value in event.data.items() if value is not None]
    return "  ".join(parts)


def _short(value: Any) -> str:
    """Return a value of `EnvEvent.data` in a few words."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping) and "message" in value:  # an error
        return str(value["message"]).splitlines()[0] if value["message"] else str(value["type"])
    if isinstance(value, Mapping) and set(value) == {"added", "removed", "changed"}:
        return "+{} -{} ~{}".format(*(len(value[w]) for w in ("added", "removed", "changed")))
    if isinstance(value, Mapping | list):
        return json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split())
