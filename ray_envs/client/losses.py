"""What becomes of an item whose Ray task was lost: another start, or the loss as its result."""

from __future__ import annotations

from typing import Any

from ray_envs.batch_models import ItemResult
from ray_envs.client.items import Item, broken
from ray_envs.plugin import gate


def is_loss(exc: Exception) -> bool:
    """Whether a task has ended with this error. Otherwise its value has come and is unreadable."""
    from ray import exceptions

    return isinstance(exc, (StopIteration, exceptions.RayTaskError, *_lost()))


def of(item: Item, exc: Exception) -> ItemResult | None:
    """Return the result of an item whose task ended with an error; None: start it again."""
    from ray import exceptions

    if isinstance(exc, StopIteration):
        return again_or(item, "WorkerLost", "the worker ended without a result")
    if isinstance(exc, _lost()):
        text = str(exc)
        return again_or(item, type(exc).__name__, gate.reason_in(text) or text)
    if isinstance(exc, exceptions.RayTaskError):
        if item.began is None:  # Ray failed in a worker that an item before it has spoilt
            return again_or(item, type(exc.cause).__name__, str(exc.cause))
        return broken(item, type(exc.cause).__name__, str(exc.cause), str(exc))
    return broken(item, type(exc).__name__, str(exc))


def _lost() -> tuple[type[Exception], ...]:
    """Return Ray's errors for a task that did not fail by itself."""
    from ray import exceptions

    return (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.LocalRayletDiedError,
        exceptions.OutOfMemoryError,
        exceptions.TaskUnschedulableError,  # the named nodes are gone
        exceptions.RuntimeEnvSetupError,
    )


def again_or(item: Item, kind: str, message: str) -> ItemResult | None:
    """Return None: a lost item is started again; if no retry is left, the loss as its result."""
    if item.attempts - item.refusals - item.unfit_workers <= item.limits.retries:
        return None
    return broken(item, kind, message)


def has_lost_words(stream: Any) -> bool:
    """Whether a task has ended whose last messages have not come: its network was cut meanwhile.

    Ray reports each message once. It would wait for those that are lost for ever.
    """
    import ray

    is_over = bool(ray.wait([stream.completed()], timeout=0, fetch_local=False)[0])
    return is_over and not ray.wait([stream], timeout=0, fetch_local=False)[0]
