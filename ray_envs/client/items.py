"""One item of a batch, a variant with a case, and the results that it can have."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from ray_envs.errors import RayEnvsError
from ray_envs.models import CaseSpec, ErrorInfo, ItemResult, RunDefaults


@dataclass(slots=True, eq=False)
class Item:
    variant_id: str
    case: CaseSpec
    limits: RunDefaults
    call_sha256: str | None
    attempts: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    fetched_at: float = 0.0
    nodes: tuple[str, ...] = ()
    began: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    deadline: float | None = None
    launched_at: float = 0.0
    #: Since when it waits for an environment that no node has any more.
    unready_at: float | None = None
    #: How often it met a node without its environment, and nothing of it ran.
    refusals: int = 0


def result_of(item: Item, value: Any) -> ItemResult:
    outcome = item.outcome or {}
    error = outcome.get("error")
    return _filled(
        item,
        ok=error is None,
        value=value if error is None else None,
        error=ErrorInfo(**error) if error else None,
        python=outcome.get("python"),
        ray=outcome.get("ray"),
        duration_s=round(outcome.get("duration_s", 0.0), 6),
        shadowed=tuple(outcome.get("shadowed", ())),
    )


def broken(item: Item, kind: str, message: str, traceback: str = "") -> ItemResult:
    began = (item.began or {}).get("started_at")
    return _filled(
        item,
        ok=False,
        error=ErrorInfo(type=kind, message=message.strip(), traceback=traceback),
        duration_s=round(time.time() - began, 6) if began else 0.0,
    )


def not_run(item: Item, error: RayEnvsError) -> ItemResult:
    return _filled(item, ok=False, error=ErrorInfo(type=type(error).__name__, message=str(error)))


def _filled(item: Item, **fields: Any) -> ItemResult:
    began = item.began or {}
    started = began.get("started_at")
    return ItemResult(
        variant_id=item.variant_id,
        case_id=item.case.id,
        key=item.environment.get("key"),
        lock_sha256=item.environment.get("lock_sha256"),
        node_id=began.get("node_id"),
        attempts=item.attempts,
        started_at=datetime.fromtimestamp(started, timezone.utc) if started else None,
        call_sha256=item.call_sha256,
        **fields,
    )
