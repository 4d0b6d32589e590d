"""The event and operation log of a root, in SQLite: for people to query; no restart needs it.

The only module that knows `history.db`. What is being logged comes first: a write that fails hurts
nobody, and `problem` says why it failed. Any threads and local processes may use one root at once.
A damaged file is put aside, never mended. Its words are those of `events`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.events import EnvEvent, EventKind, Operation, OperationStatus
from ray_envs.files import storage_errors, sync_folder
from ray_envs.models import Model
from ray_envs.policy import redacted

T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=Model)

#: `PRAGMA user_version`. Another format takes another file name; nothing is migrated in place.
_FORMAT = 1

#: How long one call waits for another process that writes.
_PATIENCE_S = 2.0
_POLL_S = 0.01

#: What is kept of each of uv's outputs: the end says what went wrong.
_KEPT_BYTES = 64 * 1024

#: A database that is begun after another one counts from the next multiple on, so that no number
#: is given twice on a root. A guess at what no log reaches; numbers stay exact in JSON.
_ERA = 10**9

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

_HINTS = {
    "database or disk is full": "free space on that file system, or set RAY_ENVS_ROOT elsewhere",
    "disk I/O error": "free space on that file system, or set RAY_ENVS_ROOT elsewhere",
    "attempt to write a readonly database": "make the folder writable for this user",
    "unable to open database file": "make the folder and the file writable for this user",
    "database is locked": "another process keeps it locked: end that process",
}


class History:
    """What happened on one root, for as long as `keep_s` seconds after `prune`.

    Opened at the first use, by any thread. Methods that write never raise for what the storage
    does: `problem` has the reason, and the next call tries again. Methods that read create nothing.

    Args:
        path: the database; SQLite keeps `-wal` and `-shm` beside it, we keep `.lock`.
        keep_s: how old an event or an ended operation becomes before `prune` deletes it.
    """

    def __init__(self, path: Path, *, keep_s: float) -> None:
        self._path = path
        self._keep_s = keep_s
        self._mutex = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        #: The file that the connection has open; another one may have taken its name.
        self._identity: tuple[int, int] | None = None
        #: The file whose integrity this process has checked.
        self._checked: tuple[int, int] | None = None
        self._patience_s = _PATIENCE_S
        self._failure = ""
        self._damage = ""

    @property
    def problem(self) -> str:
        """Why the last write failed, and what was put aside since the start; "" if all is well."""
        return "; ".join(text for text in (self._failure, self._damage) if text)

    # -- events

    def record(self, event: EnvEvent) -> EnvEvent | None:
        """Store `event`; returns it as stored, with its number, or None where that failed."""
        row = _row_of(event)

        def add(connection: sqlite3.Connection) -> EnvEvent:
            number = connection.execute(_ADD_EVENT, row).lastrowid
            return _model_of(EnvEvent, {**row, "number": number})

        return self._write(add)

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
        whoever goes on from there sees every event once.

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

        return self._read(select) or ([], since)

    def last_number(self) -> int:
        """The number of the last event that was ever recorded here; 0 before the first.

        Raises:
            StorageFailed: the history cannot be read.
        """
        return self._read(_last_number) or 0

    # -- operations

    def begin(self, operation: Operation) -> None:
        """Store that `operation` runs."""
        self._put(operation)

    def finish(self, operation: Operation) -> None:
        """Store how `operation` ended, whether or not its beginning could be stored."""
        self._put(operation)

    def _put(self, operation: Operation) -> None:
        row = _row_of(operation)
        row.update({name: _end_of(row[name]) for name in ("stdout", "stderr")})
        self._write(lambda connection: connection.execute(_PUT_OPERATION, row))

    def operation(self, operation_id: str) -> Operation | None:
        """The operation of that id, or None where there is none.

        Raises:
            StorageFailed: the history cannot be read.
        """

        def select(connection: sqlite3.Connection) -> list[Operation]:
            query = "SELECT * FROM operations WHERE operation_id = ?"
            return _models_of(Operation, connection.execute(query, (operation_id,)).fetchall())

        return next(iter(self._read(select) or ()), None)

    def running(self) -> list[Operation]:
        """The operations whose end was not stored, the newest first.

        Raises:
            StorageFailed: the history cannot be read.
        """
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

        Returns:
            At most `limit` of them after the first `offset`, and how many match in all.

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

        return self._read(select) or ([], 0)

    def delete_operations(
        self,
        *,
        variant_id: str | None = None,
        operation: str | None = None,
        status: OperationStatus | None = None,
        before: datetime | None = None,
    ) -> int:
        """Delete the matching operations that have ended and began before `before`.

        Returns:
            How many went; 0 with a `problem` where the history cannot be written.

        Raises:
            InvalidInput: no filter is given: this is no way to empty the history.
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

        return self._write(delete, creates=False) or 0

    def close(self) -> None:
        """Let go of the files; a later call opens them again."""
        with self._mutex:
            self._disconnect()

    # -- how the database is reached

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """What `work` gives, or None where there is no history yet."""
        with self._mutex:
            self._wait_at_most(_PATIENCE_S)
            try:
                return self._done(work, creates=False)
            except StorageFailed:
                self._disconnect()
                raise

    def _write(self, work: Callable[[sqlite3.Connection], T], *, creates: bool = True) -> T | None:
        """What `work` gives, or None where it could not be stored: `problem` says why."""
        with self._mutex:
            # Once for each trouble: until a write succeeds, every further one only tries.
            self._wait_at_most(0 if self._failure else _PATIENCE_S)
            try:
                result = self._done(work, creates=creates)
            except StorageFailed as exc:
                self._failure = f"{exc.message}: {exc.hint}"
                # A connection that SQLite has opened for reading alone never writes again.
                self._disconnect()
                return None
            if result is not None:  # where there is no file, there was nothing to delete
                self._failure = ""
            return result

    def _done(self, work: Callable[[sqlite3.Connection], T], *, creates: bool) -> T | None:
        doing = f"use the history {self._path}"
        with storage_errors(doing):
            for _ in range(3):  # a new one every time: two may be damaged, more is no accident
                try:
                    connection = self._connected(creates=creates)
                    if connection is None:
                        return None
                    result = work(connection)
                except sqlite3.Error as exc:
                    # SQLite's "malformed" and "not a database", and only they, are this very class.
                    if type(exc) is not sqlite3.DatabaseError:
                        raise StorageFailed(
                            f"cannot {doing}: {exc}",
                            hint=_HINTS.get(str(exc), "see `ray-envs doctor`"),
                        ) from exc
                    if self._put_aside() and not creates:
                        raise StorageFailed(
                            f"the history {self._path} was damaged: {exc}",
                            hint="it is kept as *.damaged-*, and a new one is begun: ask again",
                        ) from exc
                else:
                    # Put aside by another process in the meantime: what was written went with it.
                    if _identity(self._path) == self._identity:
                        return result
        raise StorageFailed(
            f"cannot {doing}: it is damaged again and again", hint="check the disk below it"
        )

    def _wait_at_most(self, patience_s: float) -> None:
        if patience_s != self._patience_s:
            self._disconnect()  # a connection keeps its own
            self._patience_s = patience_s

    def _connected(self, *, creates: bool) -> sqlite3.Connection | None:
        """The open database; None where there is none and none is created."""
        there = _identity(self._path)
        if self._connection is not None:
            if there == self._identity:
                return self._connection
            self._disconnect()
            self._note_damage()
        if creates:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        elif there is None:
            return None
        # SQLite finds its -wal by name at the first read. Were the file put aside between `connect`
        # and that read, the damaged file would be joined to the log of the new one.
        with self._alone(is_needed=creates) as lock:
            self._connection = connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode={'rwc' if creates else 'rw'}",
                uri=True,
                timeout=self._patience_s,
                isolation_level=None,
                check_same_thread=False,
            )
            connection.row_factory = sqlite3.Row
            self._identity = _identity(self._path)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if not version and not tables:
                if not creates or lock is None:
                    connection.close()
                    self._connection = None
                    return None
                self._begin(connection, lock)
            elif version != _FORMAT:
                raise StorageFailed(
                    f"the history {self._path} has format {version}, and we write {_FORMAT}",
                    hint="use the ray_envs that wrote it, or move it elsewhere",
                )
            connection.execute("PRAGMA synchronous = NORMAL")
        if self._checked != self._identity:
            finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if finding != "ok":
                raise sqlite3.DatabaseError(finding)
            self._checked = self._identity
        return connection

    def _begin(self, connection: sqlite3.Connection, lock: int) -> None:
        """Make the tables in an empty file, in one step; its numbers follow all earlier ones."""
        begun = max(_begun(lock), *self._aside().values(), 0)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO sqlite_sequence (name, seq) VALUES ('events', ?)", (begun * _ERA,)
        )
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
        connection.execute("COMMIT")
        os.pwrite(lock, b"%d\n" % (begun + 1), 0)

    @contextmanager
    def _alone(self, *, is_needed: bool) -> Iterator[int | None]:
        """Hold the lock of whoever opens, closes, begins or puts aside the database, on any thread.

        Its file says how many databases were begun on this root. Where it cannot be had, because
        this user may not write here, the block runs without it unless `is_needed`: who cannot write
        puts nothing aside.

        Raises:
            StorageFailed: another process keeps the lock.
            OSError: it is needed and cannot be had.
        """
        path = f"{self._path}.lock"
        lock = None
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            if is_needed:
                raise
        try:
            deadline = time.monotonic() + self._patience_s
            while lock is not None:
                with suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= deadline:
                    raise StorageFailed(
                        f"another process keeps {path} locked", hint="end that process"
                    )
                time.sleep(_POLL_S)
            yield lock
        finally:
            if lock is not None:
                os.close(lock)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        # The last one to close deletes the -wal by name. Were the file put aside at this moment, it
        # would be that of the new one.
        with suppress(OSError, StorageFailed, sqlite3.Error), self._alone(is_needed=False):
            connection.close()
        with suppress(sqlite3.Error):
            connection.close()  # nothing, if it is closed

    def _put_aside(self) -> bool:
        """Rename the damaged database; False where another process has done so."""
        doing = f"put the damaged history {self._path} aside"
        with storage_errors(doing), self._alone(is_needed=True) as lock:
            assert lock is not None
            is_first = _identity(self._path) == self._identity
            if is_first:
                number = max(_begun(lock), *(n + 1 for n in self._aside().values()), 1)
                # The database last: whoever dies in between leaves a damaged one to be found again,
                # never a log beside a new one.
                for end in ("-wal", "-shm", ""):
                    with suppress(FileNotFoundError):
                        os.rename(f"{self._path}{end}", f"{self._path}.damaged-{number}{end}")
                sync_folder(self._path.parent)
            if self._connection is not None:
                with suppress(sqlite3.Error):  # after the move, SQLite deletes no -wal any more
                    self._connection.close()
                self._connection = None
        self._note_damage()
        return is_first

    def _note_damage(self) -> None:
        """Say so, if the file that was open is one of those that were put aside."""
        for path in self._aside():
            if _identity(path) == self._identity:
                self._damage = f"the history was damaged and is kept as {path}; a new one is begun"

    def _aside(self) -> dict[Path, int]:
        """The files that were put aside, with their numbers."""
        name = re.compile(re.escape(self._path.name) + r"\.damaged-([0-9]+)(?:-wal|-shm)?")
        try:
            entries = os.listdir(self._path.parent)
        except FileNotFoundError:  # the whole root is gone
            return {}
        found = ((entry, name.fullmatch(entry)) for entry in entries)
        return {self._path.with_name(entry): int(match[1]) for entry, match in found if match}


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _begun(lock: int) -> int:
    """How many databases were begun, as the lock file says; 0 where it says nothing."""
    text = os.pread(lock, 20, 0).strip()
    return int(text) if text.isdigit() else 0


def _last_number(connection: sqlite3.Connection) -> int:
    return int(connection.execute(_LAST_NUMBER).fetchone()[0])


# -- rows


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
    return redacted(str(value)).encode("utf-8", "replace").decode("utf-8")


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
