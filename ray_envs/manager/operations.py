"""Operations: one change at a time for each variant, with its row in the history and its events.

Takes the variant's lock, and writes the row before anything is changed and after the end. A row
that is still running while its lock is free belongs to a process that died: it is settled here.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import datetime, timezone
from typing import Any

from ray_envs.disk.files import locked
from ray_envs.errors import InvalidInput, LockTimeout, RayEnvsError, StorageFailed
from ray_envs.events import EnvEvent, EventKind, Operation, OperationStatus
from ray_envs.manager import venv_view
from ray_envs.manager.history import History
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId
from ray_envs.node.store import Store
from ray_envs.settings import Settings

#: How often a long-poll looks for events of other processes.
_LOOK_S = 1.0
#: The name of the operation that is about no single variant.
GC = "gc"

#: Operations of many steps, each of them complete in itself.
_STEP_BY_STEP = (GC, "sync")

_DAY_S = 86400.0


class Change:
    """A running operation. `begin` writes its row.

    An operation that changes nothing never begins, and leaves no row and no event.
    """

    def __init__(self, operations: Operations, row: Operation, failed: EventKind) -> None:
        self._operations = operations
        self._failed = failed
        self._began = time.monotonic()
        self.row = row
        self.has_begun = False
        #: Whether it was carried out before, and only the answer was lost.
        self.was_done = False

    def begin(self, **metadata: Any) -> None:
        """Write the row, and send the event that the variant's lock was taken."""
        self.has_begun = True
        self.note(**metadata)
        self.say(EventKind.LOCK_ACQUIRED)
        if self.row.operation in ("create", "import"):
            self.say(EventKind.CREATION_STARTED, **metadata)

    def note(self, **metadata: Any) -> None:
        """Store facts about the operation in its row."""
        self.row = self.row.model_copy(update={"metadata": {**self.row.metadata, **metadata}})
        self._operations.history.begin(self.row)

    def told(self, output: str) -> None:
        """Add uv's output to the row."""
        text = f"{self.row.stderr}\n{output}".strip("\n")
        self.row = self.row.model_copy(update={"stderr": text})

    def say(self, kind: EventKind, *, key: str | None = None, **data: Any) -> None:
        """Send an event of this operation."""
        self._operations.say(
            kind,
            variant_id=self.row.variant_id,
            key=key,
            operation_id=self.row.operation_id,
            operation=self.row.operation,
            **data,
        )

    @property
    def duration_s(self) -> float:
        return time.monotonic() - self._began

    def succeed(
        self, kind: EventKind | None = None, *, key: str | None = None, **data: Any
    ) -> None:
        self._end(OperationStatus.SUCCEEDED, None)
        if kind is not None:
            self.say(kind, key=key, duration_s=self.duration_s, **data)

    def fail(
        self, error: RayEnvsError, *, status: OperationStatus = OperationStatus.FAILED
    ) -> None:
        """End an operation that failed and was undone, and send the event of its failure."""
        self._end(status, error)
        self.say(
            self._failed,
            duration_s=self.duration_s,
            error=error.to_dict(),
            exit_code=error.exit_code,
            rollback_performed=True,
        )

    def _end(self, status: OperationStatus, error: RayEnvsError | None) -> None:
        self.row = self.row.model_copy(
            update={
                "status": status,
                "finished_at": _now(),
                "duration_ms": round(self.duration_s * 1000),
                "exit_code": error.exit_code if error else 0,
                "error": error.to_dict() if error else None,
            }
        )
        self._operations.history.finish(self.row)


class Operations:
    """The operations and events of one root."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._registry = registry
        self.history = History(settings.root / "history.db", keep_s=settings.history_days * _DAY_S)
        self._paths = Store(settings)
        #: The operations that run in this process, by variant.
        self.running: dict[str, Change] = {}
        self._news = asyncio.Event()

    def say(self, kind: EventKind, **fields: Any) -> None:
        """Send an event, and store it. Never raises."""
        own = {name: fields.pop(name, None) for name in EnvEvent.model_fields if name in fields}
        self.history.record(EnvEvent(at=_now(), kind=kind, data=fields, **own))
        self._news.set()
        self._news = asyncio.Event()

    async def events(
        self,
        *,
        since: int,
        kinds: Iterable[EventKind],
        variant_id: str | None,
        limit: int,
        timeout_s: float,
    ) -> tuple[list[EnvEvent], int]:
        """Events after number `since`, as soon as there is one, or after `timeout_s` seconds."""
        kinds = tuple(kinds)
        deadline = time.monotonic() + timeout_s
        while True:
            news = self._news
            found, since = self.history.events(
                since=since, kinds=kinds, variant_id=variant_id, limit=limit
            )
            left_s = deadline - time.monotonic()
            if found or left_s <= 0:
                return found, since
            with suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), min(_LOOK_S, left_s))

    @asynccontextmanager
    async def on_variant(
        self,
        env_id: EnvId,
        operation: str,
        *,
        failed: EventKind,
        operation_id: str | None = None,
        asked: Any = None,
    ) -> AsyncIterator[Change]:
        """Make the block the only change of `env_id`, in any process.

        An error in the block after `begin` is stored in the row and sent as an event, unless the
        block has ended the change itself (`succeed`, `fail`).

        Args:
            env_id: the variant.
            operation: its name.
            failed: the event of its failure.
            operation_id: the caller's, for a request that may be repeated.
            asked: the rest of the request; the same id stands for one request only.

        Raises `LockTimeout`: another process changed it for too long; the message names it.
        """
        name = str(env_id)
        row = Operation(
            operation_id=operation_id or uuid.uuid4().hex,
            operation=operation,
            variant_id=name,
            workflow_id=env_id.workflow_id,
            node_id=env_id.node_id,
            version_id=env_id.version_id,
            started_at=_now(),
            metadata={} if asked is None else {"asked": asked},
        )
        change = Change(self, row, failed)
        async with self._kept(change, self._registry.lock(env_id)):
            self._settle(env_id)
            if operation_id is not None:
                self._look_up(change)
            self.running[name] = change
            try:
                yield change
            finally:
                del self.running[name]

    def _look_up(self, change: Change) -> None:
        """Find out whether this request was carried out before, and its answer was lost."""
        try:
            earlier = self.history.operation(change.row.operation_id)
        except StorageFailed:
            return
        if earlier is None:
            return
        for one, other in (
            (earlier.variant_id, change.row.variant_id),
            (earlier.operation, change.row.operation),
            (earlier.metadata.get("asked"), change.row.metadata.get("asked")),
        ):
            if one != other:
                raise InvalidInput(
                    f"operation_id {earlier.operation_id!r} was used for another request: {one!r}",
                    hint="give each request an id of its own",
                )
        change.was_done = (
            earlier.status is OperationStatus.SUCCEEDED or earlier.metadata.get("outcome") == "done"
        )
        if not change.was_done:  # it has a row already: this try is another one
            change.row = change.row.model_copy(update={"operation_id": uuid.uuid4().hex})

    @asynccontextmanager
    async def on_store(self) -> AsyncIterator[Change]:
        """Make the block the only collection of this root, in any process."""
        row = Operation(operation_id=uuid.uuid4().hex, operation=GC, started_at=_now())
        change = Change(self, row, EventKind.CLEANUP_COMPLETED)
        async with self._kept(change, self._gc_lock(self._settings.lock_timeout_s)):
            self._settle(None)
            yield change

    @asynccontextmanager
    async def _kept(
        self, change: Change, lock: AbstractAsyncContextManager[None]
    ) -> AsyncIterator[None]:
        try:
            await lock.__aenter__()
        except LockTimeout as exc:
            change.row = change.row.model_copy(update={"status": OperationStatus.FAILED})
            change.fail(exc)
            change.say(EventKind.LOCK_TIMEOUT, error=exc.to_dict())
            raise
        try:
            yield
        except BaseException as exc:
            if change.has_begun and change.row.status is OperationStatus.RUNNING:
                if isinstance(exc, RayEnvsError):
                    change.fail(exc)
                elif isinstance(exc, asyncio.CancelledError):
                    change.note(outcome="undone")
                    error = RayEnvsError("interrupted: the caller has gone")
                    change.fail(error, status=OperationStatus.INTERRUPTED)
                else:
                    change.fail(RayEnvsError(f"{type(exc).__name__}: {exc}"))
            raise
        finally:
            await lock.__aexit__(None, None, None)
            if change.has_begun:
                change.say(EventKind.LOCK_RELEASED)

    def _gc_lock(self, timeout_s: float) -> AbstractAsyncContextManager[None]:
        return locked(self._paths.gc_lock, what="the environments' store", timeout_s=timeout_s)

    async def settle_all(self) -> None:
        """Settle the rows of processes that died. A taken lock means that its process lives."""
        for row in self._running_rows():
            if row.variant_id in self.running:
                continue
            with suppress(LockTimeout, StorageFailed):
                if row.variant_id is None:
                    async with self._gc_lock(0):
                        self._settle(None)
                else:
                    env_id = EnvId.parse(row.variant_id)
                    async with self._registry.lock(env_id, timeout_s=0):
                        self._settle(env_id)

    def _running_rows(self) -> list[Operation]:
        try:
            return self.history.running()
        except StorageFailed:  # the manager can go on without its history
            return []

    def _settle(self, env_id: EnvId | None) -> None:
        """End the rows of dead processes on this variant; the caller holds its lock."""
        name = None if env_id is None else str(env_id)
        for row in self._running_rows():
            if row.variant_id != name:
                continue
            is_done = False
            if env_id is not None:
                try:
                    is_done = self._finish_or_undo(env_id, row)
                except StorageFailed:  # a damaged definition; the next change of it raises
                    continue
            outcome = "done" if is_done else "undone"
            how = f"the change was {outcome}"
            if row.operation in _STEP_BY_STEP:
                how = "each environment was treated whole or not at all, the rest is undone"
            error = RayEnvsError(
                f"the process of this {row.operation} died; {how}",
                hint="" if is_done else "ask for it again",
            )
            ended = row.model_copy(
                update={
                    "status": OperationStatus.INTERRUPTED,
                    "finished_at": _now(),
                    "error": error.to_dict(),
                    "metadata": {**row.metadata, "outcome": outcome},
                }
            )
            self.history.finish(ended)
            self.say(
                EventKind.OPERATION_INTERRUPTED,
                variant_id=name,
                operation_id=row.operation_id,
                operation=row.operation,
                outcome=outcome,
            )

    def _finish_or_undo(self, env_id: EnvId, row: Operation) -> bool:
        """Finish or remove a half-done change; returns whether it counts as done."""
        self._registry.clear_halves(env_id)
        record = self._registry.get(env_id)
        if row.operation == "delete":
            if record is None:
                self._registry.delete(env_id)  # the folder may be left
            return record is None
        if "is_pinned" in row.metadata:
            return record is not None and record.is_pinned is row.metadata["is_pinned"]
        number = row.metadata.get("generation")
        if number is None:
            return False
        if record is not None and number in record.numbers:
            with suppress(StorageFailed):  # its process died before it had written them
                self._registry.write_copies(record)
            venv_view.show(self._registry, self._paths, record)
            return bool(record.current.number == number)
        self._registry.unstage(env_id, number)
        return False


def _now() -> datetime:
    return datetime.now(timezone.utc)
