"""Calls of actors: their time limits, and our errors as Ray carries them back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ray_envs.errors import ManagerUnavailable, from_dict

Call = Callable[..., Awaitable[Any]]
#: How long an agent may take; guesses. For a verb that only reads or notes something, in addition
#: to the time that the verb itself waits:
_QUICK_S = 15.0
#: For the first verb, on a busy machine:
_FIRST_S = 30.0
#: For each other verb, before the agent is asked whether it is alive:
_LONG_S = 60.0
_LIMITS_S = {"describe": _FIRST_S, **dict.fromkeys(("watch", "ensure", "refuse"), _QUICK_S)}


async def in_time(handle: Any, who: str, verb: str, arguments: dict[str, Any]) -> Any:
    """Call a verb of an agent and return its answer; see `answered` for what it raises."""

    async def is_alive() -> None:
        with suppress(Exception):  # an error is an answer, too
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
    """Wait for the answer of an actor: `within_s` seconds, or with `is_alive` while it lives.

    `is_alive` calls a short verb of the actor; its answer starts the time limit again.

    Raises `ManagerUnavailable`: no answer: the actor's process may be stopped, or get no CPU time.
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
                    hint="ray_envs tries again by itself; check that its process is not stopped",
                )
        return answer.result()
    finally:
        for future in filter(None, (answer, short)):
            future.cancel()


def unwrapped(exc: BaseException, who: str = "the EnvManager") -> BaseException:
    """Return the error that our actor raised, without Ray's wrapping; other errors unchanged."""
    from ray import exceptions

    match exc:
        case exceptions.RayTaskError(cause=RuntimeError(args=(_, dict() as fields))):
            return from_dict(fields)
    lost = (exceptions.RayActorError, exceptions.GetTimeoutError, exceptions.ObjectLostError)
    if isinstance(exc, lost):
        return ManagerUnavailable(
            f"{who} did not answer: {type(exc).__name__}",
            detail=str(exc)[:500],
            hint="try again; Ray's logs of that actor say more",
        )
    return exc
