"""What happened: the kinds of events, and the row that an operation leaves. Data only.

`history` keeps them; the actors above say when one happens. Kind names are those that users of
earlier systems know; the particulars of a kind are in `data`, under the names of its own field.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import Any

from pydantic import Field

from ray_envs.models import Model


class EventKind(str, Enum):
    """What an event says."""

    CREATION_STARTED = "EnvironmentCreationStarted"
    CREATED = "EnvironmentCreated"
    #: `data["rollback_performed"]`: whether what was before is there again.
    CREATION_FAILED = "EnvironmentCreationFailed"
    DELETED = "EnvironmentDeleted"
    DELETION_FAILED = "EnvironmentDeletionFailed"
    DEPENDENCIES_ADDED = "DependenciesAdded"
    DEPENDENCIES_UPDATED = "DependenciesUpdated"
    DEPENDENCIES_REMOVED = "DependenciesRemoved"
    DEPENDENCY_OPERATION_FAILED = "DependencyOperationFailed"
    SYNCED = "EnvironmentSynced"
    SYNC_FAILED = "EnvironmentSyncFailed"
    CLEANUP_STARTED = "EnvironmentCleanupStarted"
    CLEANUP_COMPLETED = "EnvironmentCleanupCompleted"
    LOCK_ACQUIRED = "EnvironmentLockAcquired"
    LOCK_RELEASED = "EnvironmentLockReleased"
    LOCK_TIMEOUT = "EnvironmentLockTimeout"
    #: On one node; `data["how"]`: linked or built.
    PREPARED = "EnvironmentPrepared"
    PREPARATION_FAILED = "EnvironmentPreparationFailed"
    DAMAGED = "EnvironmentDamaged"
    REPAIRED = "EnvironmentRepaired"
    ROLLED_BACK = "EnvironmentRolledBack"
    COLLECTED = "EnvironmentCollected"
    NODE_JOINED = "NodeJoined"
    NODE_LOST = "NodeLost"
    #: An operation whose process died; `data["outcome"]`: done or undone.
    OPERATION_INTERRUPTED = "OperationInterrupted"


class EnvEvent(Model):
    """One thing that happened; `number` orders all events of a root."""

    #: 0 until the history has given it its number.
    number: int = Field(default=0, ge=0)
    at: datetime
    kind: EventKind
    variant_id: str | None = None
    key: str | None = None
    node_id: str | None = None
    operation_id: str | None = None
    #: The particulars: packages, durations (`…_s`), exit code, error. JSON-able.
    data: dict[str, Any] = Field(default_factory=dict)


class OperationStatus(str, Enum):
    """How far an operation is, or how it ended."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Its process died; `metadata["outcome"]` says whether the change was done or undone.
    INTERRUPTED = "interrupted"


class Operation(Model):
    """One verb that somebody asked for: the row of the audit."""

    operation_id: str
    #: create, sync, add, update, remove, import, delete, rollback, gc, …
    operation: str
    status: OperationStatus = OperationStatus.RUNNING
    #: None where an operation is about no single variant (gc).
    variant_id: str | None = None
    workflow_id: str | None = None
    node_id: str | None = None
    version_id: str | None = None
    started_at: datetime
    finished_at: datetime | None = None
    duration_ms: int | None = None
    #: What uv wrote, credentials redacted.
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    #: As `RayEnvsError.to_dict` gives it.
    error: dict[str, str] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
