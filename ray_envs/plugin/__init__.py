"""Runs in Ray's own runtime-env agent, one process on each node.

In: the `ray_envs` field of a task's runtime_env. Out: a worker whose environment is ready, or the
reason why it cannot be. Knows no actor of ours: it speaks with the node's agent through files.

To change …                            go to
what Ray calls before a worker starts  environment_plugin
the files between plugin and agent     gate
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ray_envs.plugin.EnvironmentPlugin`, the name that `RAY_RUNTIME_ENV_PLUGINS` holds.

    Imported at its use: other processes that need the gate's files must not pay for Ray.
    """
    if name != "EnvironmentPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ray_envs.plugin.environment_plugin import EnvironmentPlugin

    return EnvironmentPlugin
