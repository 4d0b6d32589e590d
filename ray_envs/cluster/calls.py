"""Calls of actors: time limits, and the errors of ours that Ray carries back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ray_envs.errors import ManagerUnavailable, from_dict  # fmt: skip

Call = Callable[..., Awaitable[Any]]
#: Time limits of verbs: of one that only reads or notes something (besides the time that it is
#: the verb is given to wait; over the first one it is asked, on a busy machine; and before it is
#: asked whether it is alive, over one that examines, makes or removes something. Guesses.
_QUICK_S = 15.0
_FIRST_S = 30.0
_LONG_S = 60.0
_LIMITS_S = {"describe": _FIRST_S, **dict.fromkeys(("watch", "ensure", "refuse"), _QUICK_S)}


async def in_time(handle: Any, who: str, verb: str, arguments: dict[str, Any]) -> Any:
    """What an agent answers; `ManagerUnavailable` where it has stopped to answer anything."""

    async def is_alive() -> None:
        with suppress(Exception):  # that is an answer, too
            await handle.watch.remote(seen=-1, timeout_s=0)

    asked = getattr(handle, verb).remote(**arguments)
    if verb in _LIMITS_S:
        return await answered(asked, who, _LIMITS_S[verb] + arguments.get("timeout_s", 0))
    return await answered(asked, who, _LONG_S, is_alive=is_alive)


async def answered(
    asked: Awaitable[Any],
    who: str,
    within_s: float,
    *,
    is_alive: Callable[[], Awaitable[object]] | None = None,
) -> Any:
    """What an actor answers within `within_s` seconds; with `is_alive`, whenever it answers.

    Raises:
        ManagerUnavailable: it did not answer: its process may be stopped, or have no share of a
            busy machine.
    """
    answer = asyncio.ensure_future(asked)
    short: asyncio.Future[object] | None = None
    try:
        while not (await asyncio.wait({answer}, timeout=within_s))[0]:
            ended: set[asyncio.Future[Any]] = set()
            if is_alive is not None:
                short = asyncio.ensure_future(is_alive())
                ended, _ = await asyncio.wait(
                    {answer, short}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED
                )
            if not ended:
                raise ManagerUnavailable(
                    f"{who} did not answer within {within_s:g} s",
                    hint="it is met again by itself, unless its process is stopped",
                )
        return answer.result()
    finally:
        for future in filter(None, (answer, short)):
            future.cancel()


def unwrapped(exc: BaseException, who: str = "the EnvManager") -> BaseException:
    """The error that our actor raised, freed from Ray's wrapping; any other error as it is."""
    from ray import exceptions

    if isinstance(exc, exceptions.RayTaskError):
        cause = exc.cause
        if (
            isinstance(cause, RuntimeError)
            and len(cause.args) == 2
            and isinstance(cause.args[1], dict)
        ):
            return from_dict(cause.args[1])
    lost = (exceptions.RayActorError, exceptions.GetTimeoutError, exceptions.ObjectLostError)
    if isinstance(exc, lost):
        return ManagerUnavailable(
            f"{who} did not answer: {type(exc).__name__}",
            detail=str(exc)[:500],
            hint="try again; Ray's logs of that actor say more",
        )
    return exc
