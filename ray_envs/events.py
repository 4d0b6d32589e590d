"""Data of the history: events, and the operations that caused them.

Data only: manager and agents record them, `manager.history` keeps them.
"""

from __future__ import annotations

from datetime import datetime
from enum import Enum
from typing import Any

from pydantic import Field

from ray_envs.validation import Model


class EventKind(str, Enum):
    """The kinds of events. Users filter by these names."""

    CREATION_STARTED = "EnvironmentCreationStarted"
    CREATED = "EnvironmentCreated"
    #: `data["rollback_performed"]`: whether the previous definition was restored.
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
    """One event."""

    #: Orders all events of a root; 0 before the history has assigned it.
    number: int = Field(default=0, ge=0)
    at: datetime
    kind: EventKind
    variant_id: str | None = None
    key: str | None = None
    node_id: str | None = None
    operation_id: str | None = None
    #: Details of the kind, as JSON: packages, durations (`…_s`), exit code, error.
    data: dict[str, Any] = Field(default_factory=dict)


class OperationStatus(str, Enum):
    """The state of an operation."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: Its process died; `metadata["outcome"]`: done or undone.
    INTERRUPTED = "interrupted"


class Operation(Model):
    """One change that somebody asked for."""

    operation_id: str
    #: create, sync, add, update, remove, import, delete, rollback, gc, …
    operation: str
    status: OperationStatus = OperationStatus.RUNNING
    #: None for an operation on many variants (gc).
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
    #: What `RayEnvsError.to_dict` returns.
    error: dict[str, str] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
