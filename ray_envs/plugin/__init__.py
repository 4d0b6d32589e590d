"""Runs in Ray's own runtime-env agent, one process on each node.

In: the `ray_envs` field of a task's runtime_env. Out: a worker whose environment is ready, or the
reason why not. It never calls an actor of ours: it and the node's agent exchange files.

To change …                                                        go to
how long a task waits for its environment, and what it is told     environment_plugin
the files that they exchange, and the field of the runtime_env     gate
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `EnvironmentPlugin` at its first use: `gate` must not import Ray.

    `RAY_RUNTIME_ENV_PLUGINS` names it `ray_envs.plugin.EnvironmentPlugin`.
    """
    if name != "EnvironmentPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ray_envs.plugin.environment_plugin import EnvironmentPlugin

    return EnvironmentPlugin
