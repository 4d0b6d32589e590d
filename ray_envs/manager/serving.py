"""How the EnvManager takes a verb: arguments become a request; equal requests share an answer."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any, TypeVar

from ray_envs.errors import InvalidInput
from ray_envs.validation import nearest_hint
from ray_envs.verbs import VERBS, Request, request_of

T = TypeVar("T")
RequestT = TypeVar("RequestT", bound=Request)
WordT = TypeVar("WordT", bound=Enum)


def serves(
    method: Callable[[Any, RequestT], Coroutine[Any, Any, T]],
) -> Callable[..., Coroutine[Any, Any, T]]:
    """Make a method of the manager, named like its verb, take the verb's keyword arguments.

    They are checked against the verb's request. The manager is awake when the method runs.
    """
    request = VERBS[method.__name__].request

    @functools.wraps(method)
    async def call(self: Any, **arguments: Any) -> T:
        asked = request_of(request, arguments)
        await self._awake()
        return await method(self, asked)  # type: ignore[arg-type]

    call.__doc__ = request.__doc__
    return call


@dataclass(slots=True)
class _Shared:
    """A request that is being carried out, and how many callers wait for it."""

    task: asyncio.Future[Any]
    waiting: int = 0


class Sharing:
    """Carries out equal requests once. A request is cancelled when no caller waits for it."""

    def __init__(self) -> None:
        self._running: dict[str, _Shared] = {}

    async def once(self, request: Request, act: Callable[[], Awaitable[T]]) -> T:
        """The answer of `act`, or of the equal request that is being carried out already."""
        # Every repetition of a request has an operation id of its own.
        question = f"{type(request).__name__} {request.model_dump_json(exclude={'operation_id'})}"
        shared = self._running.get(question)
        if shared is None:
            shared = self._running[question] = _Shared(asyncio.ensure_future(act()))
            mine = shared
            shared.task.add_done_callback(lambda _: self._forget(question, mine))
        shared.waiting += 1
        try:
            answer: T = await asyncio.shield(shared.task)
            return answer
        finally:
            shared.waiting -= 1
            if not shared.waiting and not shared.task.done():
                self._forget(question, shared)
                shared.task.cancel()
                await asyncio.gather(shared.task, return_exceptions=True)

    def _forget(self, question: str, shared: _Shared) -> None:
        if self._running.get(question) is shared:
            del self._running[question]


def word(kind: type[WordT], text: str) -> WordT:
    """`text` as a member of an enumeration.

    Raises `InvalidInput`: no member has that value; the nearest one is named.
    """
    try:
        return kind(text)
    except ValueError:
        known = [member.value for member in kind]
        raise InvalidInput(
            f"unknown {kind.__name__} {text!r}", hint=nearest_hint(text, known)
        ) from None


def moment(text: str) -> datetime:
    """An RFC 3339 time; UTC where it names no zone. Raises `InvalidInput` for any other text."""
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise InvalidInput(
            f"{text!r} is not a time", hint="write it like 2026-01-31T12:00:00Z"
        ) from None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
