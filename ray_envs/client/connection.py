"""Calls the verbs of an EnvManager: of the cluster's actor, or of an object in this process.

Runs in the user's program. `provider` uses a `Connection` and does not know which kind it is.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from ray_envs.cluster import actors, calls, connecting, nodes
from ray_envs.errors import ManagerUnavailable
from ray_envs.manager.fleet import ended
from ray_envs.manager.manager import EnvManager
from ray_envs.node.agent import NodeAgent
from ray_envs.settings import Settings
from ray_envs.verbs import READING_S

#: How long a call is repeated while the manager restarts, and the pause between two tries.
RESTART_S = 60.0
_AGAIN_S = 0.5

#: An upper limit for the time of every call; see `call_limit`.
_call_limit_s: ContextVar[float] = ContextVar("call_limit_s", default=math.inf)


@contextmanager
def call_limit(limit_s: float) -> Iterator[None]:
    """Limit each call of this thread to a cluster's manager, in the block, to `limit_s` seconds.

    For a caller that has other work while the manager does not answer.
    """
    token = _call_limit_s.set(limit_s)
    try:
        yield
    finally:
        _call_limit_s.reset(token)


class ActorConnection:
    """Calls the EnvManager actor of a cluster. `close` calls `on_close`, once."""

    def __init__(self, handle: Any, *, on_close: Callable[[], None] | None = None) -> None:
        self._handle = handle
        self._on_close = on_close
        #: The calls that have no answer yet.
        self._pending: set[Any] = set()

    def call(self, verb: str, *, within_s: float = READING_S, **arguments: Any) -> Any:
        """Return the answer of a verb; raise `ManagerUnavailable` if none comes in time."""
        import ray

        within_s = min(within_s, _call_limit_s.get())
        deadline = time.monotonic() + min(within_s, RESTART_S)
        while True:
            call = getattr(self._handle, verb).remote(**arguments)
            self._pending.add(call)
            try:
                return ray.get(call, timeout=within_s)
            except Exception as exc:
                error = calls.unwrapped(exc)
                # Ray restarts a killed manager, and every verb may be called twice.
                if not isinstance(error, ManagerUnavailable) or time.monotonic() >= deadline:
                    raise error from exc
            finally:
                self._pending.discard(call)
            time.sleep(_AGAIN_S)
            self._find_again()

    def _find_again(self) -> None:
        """Use the manager that lives now: the old one may have been ended and replaced."""
        with suppress(Exception):  # if Ray does not answer, the next call raises
            self._handle = actors.find_manager() or self._handle

    def job_id(self) -> str | None:
        """Return the id of this program's Ray job; None without a cluster."""
        import ray

        return str(ray.get_runtime_context().get_job_id())

    def close(self) -> None:
        import ray

        if ray.is_initialized() and not connecting.raylet_answers():
            return  # with its node gone, Ray would hang here, or end this process
        for call in list(self._pending):  # of other threads; the manager undoes a cancelled change
            with suppress(Exception):
                ray.cancel(call)
        if self._on_close is not None:
            self._on_close()
            self._on_close = None


class LocalConnection:
    """Calls an EnvManager object in this process: for this machine only, without Ray."""

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._manager = EnvManager(
            settings=settings.to_environment(), nodes=nodes.LocalNodes(NodeAgent)
        )

    def call(self, verb: str, *, within_s: float = READING_S, **arguments: Any) -> Any:
        if self._loop.is_closed():
            raise ManagerUnavailable("this provider is closed", hint="connect a new one")
        coroutine = getattr(self._manager, verb)(**arguments)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(within_s)
        except (TimeoutError, concurrent.futures.TimeoutError):
            future.cancel()
            raise ManagerUnavailable(f"{verb} did not end within {within_s:g} s") from None
        except BaseException:
            future.cancel()
            raise

    def job_id(self) -> str | None:
        return None

    def close(self) -> None:
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._manager.stop()
        # Another thread may still wait for a verb: end it, or that thread waits for ever.
        await ended(asyncio.all_tasks() - {asyncio.current_task()})


Connection = ActorConnection | LocalConnection
