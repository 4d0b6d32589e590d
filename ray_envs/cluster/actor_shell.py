"""Sent by value with our actors: imports the real class only where the actor runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ray_envs.worker.paths import put_foreign_paths_last


def actor_shell(module: str, name: str, verbs: Iterable[str]) -> type:
    """A class that is `module.name` for Ray, and imports it only where it runs.

    Sent by value to a worker of the cluster's own Python. Ray puts the folders of the job that
    creates an actor before its packages: a `tomlkit.py` there would end the actor. So they go
    behind first. And an error of ours would need ray_envs where it arrives, so that each verb
    turns it into a `RuntimeError` of its text and a plain dict.
    """

    def __init__(self: Any, **arguments: Any) -> None:
        put_foreign_paths_last()
        import importlib

        self._actor = getattr(importlib.import_module(module), name)(**arguments)

    def travelling(verb: str) -> Callable[..., Any]:
        async def call(self: Any, **arguments: Any) -> Any:
            try:
                return await getattr(self._actor, verb)(**arguments)
            except Exception as exc:
                if not hasattr(exc, "to_dict"):
                    raise
                raise RuntimeError(f"{type(exc).__name__}: {exc}", exc.to_dict()) from None

        call.__name__ = call.__qualname__ = verb
        return call

    return type(name, (), {"__init__": __init__, **{verb: travelling(verb) for verb in verbs}})
