"""An item of a batch (a variant with a case), and how its `ItemResult` is made."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from ray_envs.batch_models import CaseSpec, ErrorInfo, ItemResult, RunDefaults
from ray_envs.errors import RayEnvsError, WrongEnvironment


@dataclass(slots=True, eq=False)
class Item:
    """A variant with a case: what to run, and the state of its last start."""

    variant_id: str
    case: CaseSpec
    limits: RunDefaults
    call_sha256: str | None
    #: Its place in the order of the batch.
    number: int = 0
    attempts: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    fetched_at: float = 0.0
    nodes: tuple[str, ...] = ()
    #: The worker's messages: before it calls the user's function, and after it.
    began: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    deadline: float | None = None
    launched_at: float = 0.0
    #: Since when no node has its environment ready; None while one has.
    unready_at: float | None = None
    #: How often its environment was missing on the node, before the user's function was called.
    refusals: int = 0
    #: How often it met a worker that an earlier item had made unfit.
    unfit_workers: int = 0
    #: Whether it was in a lane whose worker was lost: it is perhaps the one that ended it.
    is_suspect: bool = False

    @property
    def key(self) -> str:
        """The key of its environment."""
        return str(self.environment["key"])

    @property
    def may_share(self) -> bool:
        """Whether it may be started together with others."""
        # An item whose lane was lost runs again; without retries, none may run twice.
        is_alone = self.limits.isolation == "fresh" or not self.limits.retries or self.is_suspect
        return not (is_alone or self.attempts or self.refusals or self.unfit_workers)


def result_of(item: Item, value: Any) -> ItemResult:
    """The result of an item whose worker has reported an outcome."""
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


def valued(item: Item, message: Any) -> ItemResult:
    """The result of an item whose value came as a message of its own."""
    is_pickled = (item.outcome or {}).get("is_pickled")  # in the child process that it ran in
    return result_of(item, pickle.loads(message) if is_pickled else message)  # noqa: S301


def broken(item: Item, kind: str, message: str, traceback: str = "") -> ItemResult:
    """The result of an item that ended without an outcome; `kind` is the type of the error."""
    began = (item.began or {}).get("started_at")
    return _filled(
        item,
        ok=False,
        error=ErrorInfo(type=kind, message=message.strip(), traceback=traceback),
        duration_s=round(time.time() - began, 6) if began else 0.0,
    )


def unreadable(item: Item, exc: Exception) -> ItemResult:
    """The result of an item that ended well, but whose value this process cannot unpickle."""
    outcome = item.outcome or {}
    missing = re.search(r"No module named '[\w.]+'|Can't get attribute .*", str(exc))
    reason = missing[0] if missing else (str(exc).strip().splitlines() or [type(exc).__name__])[-1]
    message = (
        f"the value cannot be read here ({reason}); return plain data, such as numbers, lists and "
        f"dicts. It was: {outcome.get('text', '')}"
    )
    item.outcome = {**outcome, "error": {"type": "UnreadableValue", "message": message}}
    return result_of(item, None)


def not_run(item: Item, error: RayEnvsError) -> ItemResult:
    """The result of an item that was not run because of `error`."""
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


def check_key(name: str, environment: Mapping[str, Any], key: str | None) -> None:
    """Check that a variant still has the environment `key`; None accepts any.

    Raises `WrongEnvironment`: it has another one, because its spec was replaced.
    """
    if key is not None and environment["key"] != key:
        raise WrongEnvironment(
            f"variant {name!r} was replaced while the batch ran: its environment is now "
            f"{environment['key'][:10]}, not {key[:10]}",
            variant_id=name,
            key=key,
            hint="another run or `create --replace` changed it: run one batch at a time, or use "
            "other ids",
        )
