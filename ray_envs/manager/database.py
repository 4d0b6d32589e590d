"""One SQLite file that several threads and processes use, and that may be damaged or missing.

It opens the file; `history` knows its content. A write that fails raises nothing, since the logged
operation matters more: `problem` has the reason. A damaged file is put aside, never repaired.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ray_envs.disk.files import storage_errors, sync_folder
from ray_envs.errors import StorageFailed

T = TypeVar("T")

#: How long one call waits for another process that writes.
_PATIENCE_S = 2.0
_POLL_S = 0.01

#: A database that is begun after another one counts from the next multiple on, so that no number
#: is given twice on a root. A guess at what no log reaches; numbers stay exact in JSON.
_ERA = 10**9

_HINTS = {
    "database or disk is full": "free space on that file system, or set RAY_ENVS_ROOT elsewhere",
    "disk I/O error": "free space on that file system, or set RAY_ENVS_ROOT elsewhere",
    "attempt to write a readonly database": "make the folder writable for this user",
    "unable to open database file": "make the folder and the file writable for this user",
    "database is locked": "another process keeps it locked: end that process",
}


class Database:
    """A SQLite file with one AUTOINCREMENT table whose numbers are never given twice on a root.

    Opened at the first use, by any thread. `write` never raises for what the storage does;
    `read` creates nothing.

    Args:
        path: the database; SQLite keeps `-wal` and `-shm` beside it, we keep `.lock`.
        schema: the statements that make the tables of an empty file.
        counted: the table that numbers its rows.
        format: `PRAGMA user_version`. Another format takes another file name; nothing is migrated
            in place.
    """

    def __init__(self, path: Path, schema: Sequence[str], *, counted: str, format: int) -> None:
        self._path = path
        self._schema = schema
        self._counted = counted
        self._format = format
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

    def close(self) -> None:
        """Close the files; a later call opens them again."""
        with self._mutex:
            self._disconnect()

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The result of `work`, or None if there is no history yet."""
        with self._mutex:
            self._wait_at_most(_PATIENCE_S)
            try:
                return self._done(work, creates=False)
            except StorageFailed:
                self._disconnect()
                raise

    def write(self, work: Callable[[sqlite3.Connection], T], *, creates: bool = True) -> T | None:
        """The result of `work`, or None if it could not be stored: `problem` has the reason."""
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
                f"{self._path.absolute().as_uri()}?{self._mode(creates=creates)}",
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
            elif version != self._format:
                raise StorageFailed(
                    f"the history {self._path} has format {version}, and we write {self._format}",
                    hint="use the ray_envs that wrote it, or move it elsewhere",
                )
            connection.execute("PRAGMA synchronous = NORMAL")
        if self._checked != self._identity:
            finding = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if finding != "ok":
                raise sqlite3.DatabaseError(finding)
            self._checked = self._identity
        return connection

    def _mode(self, *, creates: bool) -> str:
        """How SQLite opens the file."""
        if creates:
            return "mode=rwc"
        # SQLite reads a write-ahead log only where it can create its -shm. Where that is forbidden,
        # no process writes, and the closed file can be read as it is.
        can_write = os.access(self._path.parent, os.W_OK)
        if not can_write and not os.path.exists(f"{self._path}-shm"):
            return "mode=ro&immutable=1"
        return "mode=rw"

    def _begin(self, connection: sqlite3.Connection, lock: int) -> None:
        """Make the tables in an empty file, in one step; its numbers follow all earlier ones."""
        begun = max(_begun(lock), *self._aside().values(), 0)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        for statement in self._schema:
            connection.execute(statement)
        connection.execute(
            "INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (self._counted, begun * _ERA)
        )
        connection.execute(f"PRAGMA user_version = {self._format}")
        connection.execute("COMMIT")
        os.pwrite(lock, b"%d\n" % (begun + 1), 0)

    @contextmanager
    def _alone(self, *, is_needed: bool) -> Iterator[int | None]:
        """Hold the lock for opening, closing, creating and putting aside the database.

        Its file holds the number of databases that were created on this root. Where this user may
        not write, the block runs without the lock unless `is_needed`.

        Raises:
            StorageFailed: another process keeps the lock.
            OSError: it is needed, and cannot be taken.
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
            connection.close()  # a closed one may be closed again

    def _put_aside(self) -> bool:
        """Rename the damaged database; False where another process has done so."""
        doing = f"put the damaged history {self._path} aside"
        with storage_errors(doing), self._alone(is_needed=True) as lock:
            assert lock is not None
            is_first = _identity(self._path) == self._identity
            if is_first:
                number = max(_begun(lock), *(n + 1 for n in self._aside().values()), 1)
                # The database last: a process that dies in between leaves a damaged database,
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
        """Set `problem` if the file that was open has been put aside."""
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
    """The number of created databases in the lock file; 0 in an empty one."""
    text = os.pread(lock, 20, 0).strip()
    return int(text) if text.isdigit() else 0
