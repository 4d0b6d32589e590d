"""The event and operation log of a root, in SQLite: for people to query; no restart needs it.

A write that fails raises nothing, since the logged operation matters more: `problem` has the
reason. Threads and processes of one machine may use it at once. `database` opens the file.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ray_envs.decisions.credentials import redacted
from ray_envs.disk.secrets import known_secrets
from ray_envs.errors import InvalidInput
from ray_envs.events import EnvEvent, EventKind, Operation, OperationStatus
from ray_envs.manager.database import Database
from ray_envs.validation import Model

ModelT = TypeVar("ModelT", bound=Model)

_FORMAT = 1

#: How much of each output of uv is kept: its end, which has the error.
_KEPT_BYTES = 64 * 1024

#: Rows that one step of `prune` deletes: others may write between two steps.
_PRUNED_AT_ONCE = 1000

_SCHEMA = (
    """
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, kind TEXT NOT NULL,
        variant_id TEXT, key TEXT, node_id TEXT, operation_id TEXT, data TEXT NOT NULL)
    """,
    "CREATE INDEX events_at ON events (at)",
    """
    CREATE TABLE operations (
        operation_id TEXT PRIMARY KEY, operation TEXT NOT NULL, status TEXT NOT NULL,
        variant_id TEXT, workflow_id TEXT, node_id TEXT, version_id TEXT,
        started_at TEXT NOT NULL, finished_at TEXT, duration_ms INTEGER,
        stdout TEXT NOT NULL, stderr TEXT NOT NULL, exit_code INTEGER,
        error TEXT, metadata TEXT NOT NULL)
    """,
    "CREATE INDEX operations_started_at ON operations (started_at)",
)
_JSON_COLUMNS = ("data", "error", "metadata")

_ADD_EVENT = """
    INSERT INTO events (at, kind, variant_id, key, node_id, operation_id, data)
    VALUES (:at, :kind, :variant_id, :key, :node_id, :operation_id, :data)
"""
_LAST_NUMBER = "SELECT seq FROM sqlite_sequence WHERE name = 'events'"
_EVENTS = """
    SELECT * FROM events
    WHERE number > :since AND number <= :last
        AND (:kinds IS NULL OR kind IN (SELECT value FROM json_each(:kinds)))
        AND (:variant_id IS NULL OR variant_id = :variant_id)
    ORDER BY number LIMIT :limit
"""
#: An upsert keeps the rowid, which orders operations that began in the same microsecond.
_PUT_OPERATION = """
    INSERT INTO operations VALUES (
        :operation_id, :operation, :status, :variant_id, :workflow_id, :node_id, :version_id,
        :started_at, :finished_at, :duration_ms, :stdout, :stderr, :exit_code, :error, :metadata)
    ON CONFLICT (operation_id) DO UPDATE SET
        operation = excluded.operation, status = excluded.status, variant_id = excluded.variant_id,
        workflow_id = excluded.workflow_id, node_id = excluded.node_id,
        version_id = excluded.version_id, started_at = excluded.started_at,
        finished_at = excluded.finished_at, duration_ms = excluded.duration_ms,
        stdout = excluded.stdout, stderr = excluded.stderr, exit_code = excluded.exit_code,
        error = excluded.error, metadata = excluded.metadata
"""
_MATCHING = """
    FROM operations
    WHERE (:variant_id IS NULL OR variant_id = :variant_id)
        AND (:operation IS NULL OR operation = :operation)
        AND (:status IS NULL OR status = :status)
        AND (:since IS NULL OR started_at >= :since)
        AND (:before IS NULL OR started_at < :before)
"""
_COUNT_OPERATIONS = "SELECT COUNT(*)" + _MATCHING
_OPERATIONS = (
    "SELECT *" + _MATCHING + "ORDER BY started_at DESC, rowid DESC LIMIT :limit OFFSET :offset"
)
_DELETE_OPERATIONS = "DELETE" + _MATCHING + "AND status != 'running'"
_PRUNE = (
    """
    DELETE FROM events
    WHERE number IN (SELECT number FROM events WHERE at < :before LIMIT :limit)
    """,
    """
    DELETE FROM operations WHERE operation_id IN (
        SELECT operation_id FROM operations
        WHERE status != 'running' AND COALESCE(finished_at, started_at) < :before LIMIT :limit)
    """,
)


class History:
    """The events and operations of one root, for as long as `keep_s` seconds.

    Opened at the first use, by any thread. Methods that write raise no error of the storage:
    `problem` has it, and the next call tries again. Methods that read raise `StorageFailed`, and
    create no file.
    """

    def __init__(self, path: Path, *, keep_s: float) -> None:
        self._keep_s = keep_s
        self._database = Database(path, _SCHEMA, counted="events", format=_FORMAT)

    @property
    def problem(self) -> str:
        """Why the last write failed, and what was put aside since the start; "" if all is well."""
        return self._database.problem

    def record(self, event: EnvEvent) -> EnvEvent | None:
        """Store `event`; returns it as stored, with its number, or None where that failed."""
        row = _row_of(event)

        def add(connection: sqlite3.Connection) -> EnvEvent:
            number = connection.execute(_ADD_EVENT, row).lastrowid
            return _model_of(EnvEvent, {**row, "number": number})

        return self._database.write(add)

    def events(
        self,
        *,
        since: int = 0,
        kinds: Iterable[EventKind] = (),
        variant_id: str | None = None,
        limit: int = 1000,
    ) -> tuple[list[EnvEvent], int]:
        """The first `limit` matching events after number `since`, and the `since` of the next call.

        The latter is the number of the last event that was looked at, whether it matched or not:
        a caller that goes on from there sees every event once.

        Raises:
            InvalidInput: `limit` is not positive.
            StorageFailed: the history cannot be read.
        """
        if limit < 1:
            raise InvalidInput(f"limit: {limit} is not positive", hint="ask for 1 or more")
        names = [kind.value for kind in kinds]
        wanted = {
            "since": since,
            "kinds": json.dumps(names) if names else None,
            "variant_id": variant_id,
            "limit": limit,
        }

        def select(connection: sqlite3.Connection) -> tuple[list[EnvEvent], int]:
            # Asked first: an event that is committed between the two queries belongs to the next
            # call, and must not be passed over.
            last = max(since, _last_number(connection))
            rows = connection.execute(_EVENTS, {**wanted, "last": last}).fetchall()
            if len(rows) == limit:
                last = rows[-1]["number"]
            return _models_of(EnvEvent, rows), last

        return self._database.read(select) or ([], since)

    def last_number(self) -> int:
        """The number of the last event that was ever recorded here; 0 before the first."""
        return self._database.read(_last_number) or 0

    def begin(self, operation: Operation) -> None:
        """Store that `operation` runs."""
        self._put(operation)

    def finish(self, operation: Operation) -> None:
        """Store how `operation` ended, whether or not its beginning could be stored."""
        self._put(operation)

    def _put(self, operation: Operation) -> None:
        row = _row_of(operation)
        row.update({name: _end_of(row[name]) for name in ("stdout", "stderr")})
        self._database.write(lambda connection: connection.execute(_PUT_OPERATION, row))

    def operation(self, operation_id: str) -> Operation | None:
        """The operation of that id, or None where there is none."""

        def select(connection: sqlite3.Connection) -> list[Operation]:
            query = "SELECT * FROM operations WHERE operation_id = ?"
            return _models_of(Operation, connection.execute(query, (operation_id,)).fetchall())

        return next(iter(self._database.read(select) or ()), None)

    def running(self) -> list[Operation]:
        """The operations whose end was not stored, the newest first."""
        # A negative limit is none, for SQLite.
        return self._operations(_filters(status=OperationStatus.RUNNING), limit=-1, offset=0)[0]

    def operations(
        self,
        *,
        variant_id: str | None = None,
        operation: str | None = None,
        status: OperationStatus | None = None,
        since: datetime | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> tuple[list[Operation], int]:
        """The matching operations that began at `since` or later, the newest first.

        Returns at most `limit` of them after the first `offset`, and how many match in all.

        Raises:
            InvalidInput: `limit` or `offset` is negative.
            StorageFailed: the history cannot be read.
        """
        for name, value in (("limit", limit), ("offset", offset)):
            if value < 0:
                raise InvalidInput(f"{name}: {value} is negative", hint="give 0 or more")
        filters = _filters(variant_id=variant_id, operation=operation, status=status, since=since)
        return self._operations(filters, limit=limit, offset=offset)

    def _operations(
        self, filters: dict[str, str | None], *, limit: int, offset: int
    ) -> tuple[list[Operation], int]:
        def select(connection: sqlite3.Connection) -> tuple[list[Operation], int]:
            page = {**filters, "limit": limit, "offset": offset}
            rows = connection.execute(_OPERATIONS, page).fetchall()
            total = connection.execute(_COUNT_OPERATIONS, filters).fetchone()[0]
            return _models_of(Operation, rows), int(total)

        return self._database.read(select) or ([], 0)

    def delete_operations(
        self,
        *,
        variant_id: str | None = None,
        operation: str | None = None,
        status: OperationStatus | None = None,
        before: datetime | None = None,
    ) -> int:
        """Delete the matching operations that have ended and began before `before`.

        Returns how many went; 0 with a `problem` where the history cannot be written.

        Raises `InvalidInput`: no filter is given: this is no way to empty the history.
        """
        filters = _filters(variant_id=variant_id, operation=operation, status=status, before=before)
        if not any(filters.values()):
            raise InvalidInput(
                "no filter is given: that would delete every operation",
                hint="name a variant, an operation, a status or a moment before which they began",
            )
        return self._delete(_DELETE_OPERATIONS, filters)

    def prune(self, now: datetime) -> int:
        """Delete events and ended operations older than `keep_s`; returns how many rows went."""
        try:
            before = _moment(now - timedelta(seconds=self._keep_s))
        except OverflowError:  # kept for longer than there are dates
            return 0
        removed = 0
        for statement in _PRUNE:
            while went := self._delete(statement, {"before": before, "limit": _PRUNED_AT_ONCE}):
                removed += went
        return removed

    def _delete(self, statement: str, values: Mapping[str, str | int | None]) -> int:
        def delete(connection: sqlite3.Connection) -> int:
            return connection.execute(statement, values).rowcount

        return self._database.write(delete, creates=False) or 0

    def close(self) -> None:
        """Close the files; a later call opens them again."""
        self._database.close()


def _last_number(connection: sqlite3.Connection) -> int:
    return int(connection.execute(_LAST_NUMBER).fetchone()[0])


def _row_of(model: Model) -> dict[str, Any]:
    """What the table holds of `model`: without credentials, moments in UTC, dicts as JSON."""
    shown = {name: _shown(value) for name, value in model.model_dump().items()}
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
        for name, value in shown.items()
    }


def _shown(value: Any) -> Any:
    """`value` as JSON can hold it, without credentials; what JSON does not know as its text."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {_shown(str(name)): _shown(each) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shown(each) for each in value]
    if isinstance(value, datetime):
        return _moment(value)
    # Bytes of a process that are no UTF-8 may stand in it as lone surrogates; SQLite refuses them.
    return redacted(str(value), _own_secrets()).encode("utf-8", "replace").decode("utf-8")


@cache
def _own_secrets() -> frozenset[str]:
    return known_secrets()


def _end_of(text: str) -> str:
    """The last bytes of `text`, which is redacted: half a URL would hide its credentials."""
    return text.encode("utf-8")[-_KEPT_BYTES:].decode("utf-8", "ignore")


def _moment(at: datetime) -> str:
    """`at` in UTC, in a form whose order is that of time; without a zone it is taken as UTC."""
    at = at.replace(tzinfo=timezone.utc) if at.tzinfo is None else at.astimezone(timezone.utc)
    return at.isoformat(timespec="microseconds")


def _filters(
    *,
    variant_id: str | None = None,
    operation: str | None = None,
    status: OperationStatus | None = None,
    since: datetime | None = None,
    before: datetime | None = None,
) -> dict[str, str | None]:
    return {
        "variant_id": variant_id,
        "operation": operation,
        "status": None if status is None else status.value,
        "since": None if since is None else _moment(since),
        "before": None if before is None else _moment(before),
    }


def _model_of(kind: type[ModelT], row: Mapping[str, Any]) -> ModelT:
    values = dict(row)
    for name in _JSON_COLUMNS:
        if values.get(name) is not None:
            values[name] = json.loads(values[name])
    return kind.model_validate(values)


def _models_of(kind: type[ModelT], rows: Iterable[sqlite3.Row]) -> list[ModelT]:
    """The rows that we understand: one that a later release wrote must not hide the others."""
    found = []
    for row in rows:
        with suppress(ValueError):
            found.append(_model_of(kind, dict(row)))
    return found
