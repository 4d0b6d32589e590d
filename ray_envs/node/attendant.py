"""Attends the gate of this node, where workers wait for their environments.

It passes on what they ask for, and fails those whose environment has failed, or whose workers end
again and again before they have registered with Ray.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from ray_envs.errors import InvalidInput, RayEnvsError, WorkerCannotStart, from_dict
from ray_envs.models import NodeEnvState, Phase
from ray_envs.node.failed_starts import MANY, FailedStarts, Failures
from ray_envs.plugin.gate import PLUGINS_VARIABLE, Gate, has_plugin

#: The time between two looks at the files of the gate, and at those of starts.
_ATTEND_S = 0.3
_STARTS_S = 2.0


class Attendant:
    """The gate of one node."""

    def __init__(
        self,
        gate: Gate,
        states: Mapping[str, NodeEnvState],
        *,
        changed: Callable[[], None],
        starts: FailedStarts | None,
        start_error: Callable[[str], Awaitable[WorkerCannotStart | None]],
    ) -> None:
        """Attend `gate` from `begin` to `end`.

        Args:
            gate: the gate.
            states: the state of each key, by the agent.
            changed: called when `asked` has changed.
            starts: the starts of workers, if they can be watched here.
            start_error: examines the environment of a key; returns why no worker starts there.
        """
        self.asked: dict[str, int] = {}
        self._gate = gate
        self._states = states
        self._changed = changed
        self._starts = starts
        self._start_error = start_error
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self) -> None:
        """Look at the gate now, and from now on."""
        if not self._tasks:
            self.asked = self._gate.asked()
            self._tasks = [asyncio.create_task(_again(self._look, _ATTEND_S))]
            if self._starts is not None and self._starts.set_up():
                self._tasks.append(asyncio.create_task(_again(self._watch, _STARTS_S)))

    def end(self) -> None:
        for task in self._tasks:
            task.cancel()

    def clear(self, key: str) -> None:
        """Let workers pass that wait for `key`, which is ready."""
        self._gate.clear(key)

    def refuse(self, key: str, reason: str) -> None:
        """Fail the workers that wait here for `key`, which will not be built."""
        asked = self._gate.asked()
        if key in asked:
            self._refuse(key, asked[key], reason)

    def _refuse(self, key: str, attempt: int, reason: str) -> None:
        with suppress(OSError):  # a full disk: they give up by themselves
            self._gate.refuse(key, attempt, reason)
            self._gate.withdraw(key)

    async def _look(self) -> None:
        """Read the requests at the gate, and refuse those for environments that have failed."""
        asked = self._gate.asked()
        for key, attempt in asked.items():
            state = self._states.get(key)
            if state is not None and state.phase is Phase.FAILED:
                self._refuse(key, attempt, str(from_dict(state.error or {})))
        if asked != self.asked:
            self.asked = asked
            self._changed()

    async def _watch(self) -> None:
        """Fail the workers whose starts fail in a row, when Ray starts the next one."""
        if self._starts is None:
            return
        for start, failures in (await asyncio.to_thread(self._starts.look)).items():
            error = await self._examined(failures)
            if error is not None:
                self._refuse(start, 0, str(error))

    async def _examined(self, failures: Failures) -> RayEnvsError | None:
        error = await self._start_error(failures.key)
        if error is not None:
            return error
        if len(failures.pids) < MANY or self._starts is None:
            return None
        return WorkerCannotStart(
            f"{len(failures.pids)} workers in a row have ended before they had registered with Ray",
            detail=await asyncio.to_thread(self._starts.said, failures.pids),
            hint="its imports are in order: do the task's env_vars break it? See raylet.err and "
            "raylet.out in Ray's folder of logs on this node",
        )


async def _again(look: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Call `look` again and again, whatever errors it raises."""
    told = ""
    while True:
        try:
            await look()
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
            if said != told:  # several times a second
                print(f"ray_envs: NodeAgent: {said}", file=sys.stderr)
            told = said
        await asyncio.sleep(pause_s)


def has_gate() -> bool:
    """Whether the Ray that started this process has our plugin."""
    try:
        return has_plugin(os.environ.get(PLUGINS_VARIABLE))
    except InvalidInput:  # set after Ray was started: it could not have read it
        return False
