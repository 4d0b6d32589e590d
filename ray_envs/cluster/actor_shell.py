"""The class that Ray runs in place of an actor of ours. Sent by value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ray_envs.worker.paths import put_foreign_paths_last


def actor_shell(module: str, name: str, verbs: Iterable[str]) -> type:
    """Return a class that imports `module.name` in the actor's process and calls its verbs.

    Ray puts the folders of the job that creates an actor before the packages, and a `tomlkit.py`
    there would break the actor: so they are moved to the end first. An error of ours could only
    be unpickled by a process that has ray_envs: so each verb raises a `RuntimeError` with its text
    and a plain dict instead.
    """

    def __init__(self: Any, **arguments: Any) -> None:
        put_foreign_paths_last()
        import importlib

        self._actor = getattr(importlib.import_module(module), name)(**arguments)

    def forwarding(verb: str) -> Callable[..., Any]:
        async def call(self: Any, **arguments: Any) -> Any:
            try:
                return await getattr(self._actor, verb)(**arguments)
            except Exception as exc:
                if not hasattr(exc, "to_dict"):
                    raise
                raise RuntimeError(f"{type(exc).__name__}: {exc}", exc.to_dict()) from None

        call.__name__ = call.__qualname__ = verb
        return call

    return type(name, (), {"__init__": __init__, **{verb: forwarding(verb) for verb in verbs}})
