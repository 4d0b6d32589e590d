"""How verbs of an EnvManager are called: as an actor of a cluster, or as an object in this process.

`provider` speaks through a door and does not know which one it is.
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
from typing import Any, Protocol

from ray_envs.cluster import cluster
from ray_envs.errors import ManagerUnavailable
from ray_envs.manager.fleet import ended
from ray_envs.manager.manager import EnvManager
from ray_envs.node.agent import NodeAgent
from ray_envs.settings import Settings

#: How long a verb that neither resolves nor builds may take.
VERB_TIMEOUT_S = 60.0
#: How long a verb is said again while the manager restarts, and the pause in between.
RESTART_S = 60.0
_AGAIN_S = 0.5

#: How long any verb may take; see `call_limit`.
_call_limit_s: ContextVar[float] = ContextVar("call_limit_s", default=math.inf)


@contextmanager
def call_limit(limit_s: float) -> Iterator[None]:
    """No verb that this thread calls of a cluster's manager in the block takes longer.

    For whoever has something else to do while the manager is away.
    """
    token = _call_limit_s.set(limit_s)
    try:
        yield
    finally:
        _call_limit_s.reset(token)


class Connection(Protocol):
    """How verbs of an EnvManager are called."""

    def call(self, verb: str, *, within_s: float = VERB_TIMEOUT_S, **arguments: Any) -> Any: ...

    def job_id(self) -> str | None:
        """The job of Ray that speaks through this door; None where there is none."""

    def close(self) -> None: ...


class ActorConnection:
    """The EnvManager actor of a cluster; `on_close` is called once, at the end."""

    def __init__(self, handle: Any, *, on_close: Callable[[], None] | None = None) -> None:
        self._handle = handle
        self._on_close = on_close
        #: What was asked and not answered yet.
        self._asked: set[Any] = set()

    def call(self, verb: str, *, within_s: float = VERB_TIMEOUT_S, **arguments: Any) -> Any:
        import ray

        within_s = min(within_s, _call_limit_s.get())
        deadline = time.monotonic() + min(within_s, RESTART_S)
        while True:
            asked = getattr(self._handle, verb).remote(**arguments)
            self._asked.add(asked)
            try:
                return ray.get(asked, timeout=within_s)
            except Exception as exc:
                error = cluster.unwrapped(exc)
                # A killed manager restarts by itself, and every verb may be said twice.
                if not isinstance(error, ManagerUnavailable) or time.monotonic() >= deadline:
                    raise error from exc
            finally:
                self._asked.discard(asked)
            time.sleep(_AGAIN_S)
            self._look_up()

    def _look_up(self) -> None:
        """Take the manager that lives now: one that was ended for good has another after it."""
        with suppress(Exception):  # Ray does not answer either: the next call says so
            self._handle = cluster.find_manager() or self._handle

    def job_id(self) -> str | None:
        import ray

        return str(ray.get_runtime_context().get_job_id())

    def close(self) -> None:
        import ray

        for asked in list(self._asked):  # by threads that nobody waits for: the change is undone
            with suppress(Exception):
                ray.cancel(asked)
        if self._on_close is not None:
            self._on_close()
            self._on_close = None


class LocalConnection:
    """The same EnvManager as an object in this process: this machine only, and no Ray."""

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._manager = EnvManager(
            settings=settings.to_environment(), nodes=cluster.LocalNodes(NodeAgent)
        )

    def call(self, verb: str, *, within_s: float = VERB_TIMEOUT_S, **arguments: Any) -> Any:
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
        # A verb that another thread still waits for must not keep that thread for ever.
        await ended(asyncio.all_tasks() - {asyncio.current_task()})
