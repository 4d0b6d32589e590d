"""Opens a provider for a command and waits for its verbs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from typing import TYPE_CHECKING, Any, TypeVar

from ray_envs.cli.printing import Answer, say
from ray_envs.errors import RayEnvsError
from ray_envs.models import Phase, Status
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from ray_envs.client.provider import RayEnvironmentProvider

T = TypeVar("T")
#: The exit code after Ctrl-C.
INTERRUPTED = 130
#: The time between two looks at a verb that runs.
_LOOK_S = 0.1


@contextlib.contextmanager
def open_provider() -> Iterator[RayEnvironmentProvider]:
    """Open a provider for this machine's root. It calls the root's manager if that lives.

    Without one the work is done in this process, and Ctrl-C undoes it. A manager goes on after
    Ctrl-C: the user is told so.
    """
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.manager import presence

    settings = Settings.from_environment()
    has_manager = presence.address_of(settings.root) is not None
    address = os.environ.get("RAY_ADDRESS")
    if address and not has_manager:
        say(
            f"ray-envs: note: RAY_ADDRESS is {address}, but no EnvManager serves {settings.root}: "
            "this is done on this machine only; `ray-envs up` starts the cluster's manager"
        )
    with RayEnvironmentProvider.without_cluster(settings) as provider:
        try:
            yield provider
        except KeyboardInterrupt:
            if has_manager:
                raise KeyboardInterrupt(
                    "interrupted; the manager may go on: see `ray-envs operations`"
                ) from None
            raise


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call `function` in a thread. The end of the command does not wait for it."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future


def wait_for(function: Callable[[], T]) -> T:
    """Return what `function` returns. Ctrl-C ends the wait at once."""
    future = in_background(function)
    while not future.done():
        futures_wait([future], timeout=_LOOK_S)
    return future.result()


def watch(provider: RayEnvironmentProvider, name: str, change: Callable[[], Answer]) -> Answer:
    """Return the answer of `change`. Meanwhile print each new phase of the variant `name`."""
    phases = Phases()
    future = in_background(change)
    while not future.done():
        with contextlib.suppress(RayEnvsError):  # `change` raises it too
            phases.tell(name, provider.status(name))
        futures_wait([future], timeout=_LOOK_S)
    answer = future.result()
    if not answer.get("dry_run") and answer.get("is_changed", True):
        phases.tell(name, answer, is_done=True)
    return answer


class Phases:
    """Prints each phase of each environment once."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str, str]] = set()

    def tell(self, name: str, status: Mapping[str, Any], *, is_done: bool = False) -> None:
        """Print what is new in `status`.

        If the variant does not change now, print its phases only when its change `is_done`.
        """
        change = status.get("change")
        if change:  # the current generation works, and the next one is being prepared
            self._say(name, change["key"], change["nodes"])
        elif is_done or status["status"] == Status.CREATING.value:
            self._say(name, status.get("key", ""), status["nodes"])

    def tell_all(self, statuses: Mapping[str, Answer]) -> None:
        for name, status in statuses.items():
            self.tell(name, status)

    def _say(self, name: str, key: str, nodes: Mapping[str, Any]) -> None:
        for state in nodes.values():
            phase = state["phase"]
            if (name, key, phase) not in self._said and phase != Phase.FAILED.value:
                self._said.add((name, key, phase))
                say(f"{name}: {phase} {state.get('progress', '')}".rstrip())
