"""Opens a provider for a command, and waits for what it does."""

from __future__ import annotations

import contextlib
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
#: How often a command looks how its change goes.
_LOOK_S = 0.1


@contextlib.contextmanager
def opened() -> Iterator[RayEnvironmentProvider]:
    """A provider of this machine's root: through its manager where one lives, else without Ray.

    Ctrl-C undoes what is done in this process. A manager's actor goes on: that is said.
    """
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.manager.registry import Registry

    settings = Settings.from_environment()
    has_manager = Registry(settings).manager_address() is not None
    with RayEnvironmentProvider.without_cluster(settings) as provider:
        try:
            yield provider
        except KeyboardInterrupt:
            if has_manager:
                raise KeyboardInterrupt(
                    "interrupted; the manager of this root may go on: see `ray-envs operations`"
                ) from None
            raise


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call `function` in a thread that an interrupted command does not wait for."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future


def patiently(function: Callable[[], T]) -> T:
    """What `function` gives; Ctrl-C ends the wait at once, whatever it does."""
    future = in_background(function)
    while not future.done():
        futures_wait([future], timeout=_LOOK_S)
    return future.result()


def watched(provider: RayEnvironmentProvider, name: str, change: Callable[[], Answer]) -> Answer:
    """What `change`, of the variant `name`, answers; meanwhile its new phases are said."""
    phases = Phases()
    future = in_background(change)
    while not future.done():
        with contextlib.suppress(RayEnvsError):  # what is wrong, the change itself tells
            phases.tell(name, provider.status(name))
        futures_wait([future], timeout=_LOOK_S)
    answer = future.result()
    if not answer.get("dry_run") and answer.get("is_changed", True):
        phases.tell(name, answer, is_done=True)
    return answer


class Phases:
    """Says in a line, once, what is being done about environments."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str, str]] = set()

    def tell(self, name: str, status: Mapping[str, Any], *, is_done: bool = False) -> None:
        """Say what `status` has that is new; of one that is not being changed, only when done."""
        change = status.get("change")
        if change:  # it runs as it is, and the next generation is being prepared
            self._say(name, change["key"], change["nodes"])
        elif is_done or status["status"] == Status.CREATING.value:
            self._say(name, status.get("key", ""), status["nodes"])

    def _say(self, name: str, key: str, nodes: Mapping[str, Any]) -> None:
        for state in nodes.values():
            phase = state["phase"]
            if (name, key, phase) not in self._said and phase != Phase.FAILED.value:
                self._said.add((name, key, phase))
                say(f"{name}: {phase} {state.get('progress', '')}".rstrip())
