"""The Ray plugin: a task starts when its environment is ready, or fails with the reason.

It runs in Ray's runtime-env agent, one for all jobs of a node: a blocking call would stop every
environment, and a failing import would stop the node. So it imports Ray's class and `gate` only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from contextlib import suppress
from typing import Any

from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from ray_envs.errors import RayEnvsError
from ray_envs.plugin.gate import FIELD, Gate, Wish, marked, start_id, wish_of
from ray_envs.worker.hold import START_VARIABLE

#: How long a task may wait here for its environment. A variable of the node, not of the job.
TIMEOUT_VARIABLE = "RAY_ENVS_GATE_TIMEOUT_S"
_TIMEOUT_S = 480.0
#: Ray gives up after 600 s, three times, and reports its own reason instead of ours.
_LONGEST_S = 540.0
_POLL_S = 0.2
#: The agent drops a request that was not renewed for a minute.
_RENEW_S = 3.0
#: Ray repeats a failed setup twice, a second apart; these must not wait again.
_GIVEN_UP_S = 30.0
#: An agent looks about once a second: after so long without a look it is dead. A guess.
_SILENT_S = 30.0


class EnvironmentPlugin(RuntimeEnvPlugin):  # type: ignore[misc, unused-ignore]  # ray is untyped
    """Waits in `create` for the record of the environment that a runtime_env of ours names."""

    name = FIELD

    def __init__(self) -> None:
        #: When and why a wish was given up.
        self._given_up: dict[Wish, tuple[float, str]] = {}

    @staticmethod
    def validate(runtime_env_dict: dict[str, Any]) -> None:
        """Check that our field, if there is one, is as options() made it.

        Raises `ValueError`: it was changed.
        """
        try:
            wish_of(runtime_env_dict)
        except RayEnvsError as exc:
            raise ValueError(marked(str(exc))) from None

    def get_uris(self, runtime_env: Any) -> list[str]:  # noqa: ARG002  # Ray's name
        """Return none: for a URI that Ray knows, deleted or not, it does not call `create`."""
        return []

    async def create(
        self,
        uri: str | None,  # noqa: ARG002  # see `get_uris`
        runtime_env: Any,
        context: Any,
        logger: logging.Logger,
    ) -> float:
        """Wait until the environment is ready on this node.

        Raises `RuntimeError`: it was refused, or is late, or its workers end before they have
        registered with Ray; the text says why and what to do.
        """
        wish = wish_of(runtime_env)
        if wish is not None:
            # Ray repeats a failed setup with the same context, whose variables are those of the
            # runtime_env itself.
            context.env_vars.pop(START_VARIABLE, None)
            start = start_id(wish.key, runtime_env)
            context.env_vars[START_VARIABLE] = start
            reason = await asyncio.to_thread(Gate(wish.root).refusal, start, 0)
            if reason is not None:
                raise _failed(wish, "has no worker that starts", reason, "")
            try:
                await self._wait(wish, _limit_s(runtime_env), logger)
            except OSError as exc:
                raise _failed(
                    wish,
                    "cannot be requested",
                    f"{exc.filename or wish.root}: {exc.strerror or exc}",
                    "make RAY_ENVS_ROOT a folder that this node can write",
                ) from None
        return 0

    async def _wait(self, wish: Wish, limit_s: float, logger: logging.Logger) -> None:
        gate, began = Gate(wish.root), time.monotonic()
        if await _is_ready(gate, wish):
            return
        at, text = self._given_up.get(wish, (0.0, ""))
        if text and began - at <= _GIVEN_UP_S:
            raise RuntimeError(text)
        await asyncio.to_thread(gate.ask, wish.key, wish.attempt)
        logger.info("waiting for the environment %s below %s", wish.key, wish.root)
        asked = began
        try:
            while not await _is_ready(gate, wish):
                now = time.monotonic()
                if now - began >= limit_s:
                    raise self._give_up(wish, await asyncio.to_thread(_late, gate, wish, limit_s))
                if now - asked >= _RENEW_S:
                    with suppress(OSError):  # a build may have filled the disk for a moment
                        await asyncio.to_thread(gate.ask, wish.key, wish.attempt)
                    asked = now
                await asyncio.sleep(_POLL_S)
        finally:
            await asyncio.to_thread(gate.withdraw, wish.key)
        logger.info("the environment %s is ready", wish.key)

    def _give_up(self, wish: Wish, error: RuntimeError) -> RuntimeError:
        now = time.monotonic()
        recent = {w: was for w, was in self._given_up.items() if now - was[0] <= _GIVEN_UP_S}
        self._given_up = {**recent, wish: (now, str(error))}
        return error


async def _is_ready(gate: Gate, wish: Wish) -> bool:
    """Whether the environment is ready. Raises `RuntimeError` if it was refused."""
    # In a thread: a disk may hang.
    if await asyncio.to_thread(gate.is_ready, wish.key):
        return True
    reason = await asyncio.to_thread(gate.refusal, wish.key, wish.attempt)
    if reason is not None:
        hint = "see `ray-envs status`, then take options() again: they carry a new attempt"
        raise _failed(wish, "is not available", reason, "" if "hint: " in reason else hint)
    return False


def _limit_s(runtime_env: Any) -> float:
    """Return how long to wait, in seconds: less than Ray, which gives no reason."""
    try:
        limit_s = float(os.environ.get(TIMEOUT_VARIABLE) or _TIMEOUT_S)
    except ValueError:
        limit_s = _TIMEOUT_S
    rays_s = (runtime_env.get("config") or {}).get("setup_timeout_seconds", -1)
    longest_s = min(_LONGEST_S, 0.9 * rays_s) if rays_s > 0 else _LONGEST_S
    return max(0.0, min(longest_s, limit_s))


def _late(gate: Gate, wish: Wish, limit_s: float) -> RuntimeError:
    """Return the error for an environment that was neither ready nor refused in time."""
    served_s = gate.served_s()
    if served_s is None or served_s > min(limit_s, _SILENT_S):
        last = "never looked" if served_s is None else f"last looked {served_s:.0f} s ago"
        return _failed(
            wish,
            "was not prepared",
            f"no agent of ray_envs answered in {limit_s:.0f} s; one {last} at {wish.root}",
            "see `ray-envs doctor`; RAY_ENVS_ROOT must be the same on every node",
        )
    return _failed(
        wish,
        "was not ready",
        f"its agent is still preparing it after {limit_s:.0f} s",
        f"wait for `ray-envs status`, then take options() again; a node waits {TIMEOUT_VARIABLE} "
        f"seconds, at most {_LONGEST_S:.0f}",
    )


def _failed(wish: Wish, what: str, why: str, hint: str) -> RuntimeError:
    text = f"the environment {wish.key} {what} on node {socket.gethostname()}: {why}"
    return RuntimeError(marked(f"{text}\nhint: {hint}" if hint else text))
