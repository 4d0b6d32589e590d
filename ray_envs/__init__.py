"""Locked uv environments for Ray tasks, prepared ahead on every node, handed out by variant id.

A folder is a process. It imports only from the folders below it:

    cli         a shell                         manager     the EnvManager actor
    client      the user's program              node        the NodeAgent actors
    cluster     wherever Ray is asked           plugin      Ray's runtime-env agent
    disk        files and child processes       decisions   pure functions
    worker      workers of prepared environments

Here are the words that all share: `verbs` (what the manager can be asked), `models`,
`batch_models`, `validation`, `events`, `settings`, `errors`; and `testing`, a fake uv for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_envs.batch_models import BatchSpec, CaseSpec, ItemResult
    from ray_envs.client.environments import EnvironmentProvider
    from ray_envs.client.in_memory import InMemoryEnvironmentProvider
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.client.runner import BatchState, Progress, RayBatchRunner
    from ray_envs.errors import RayEnvsError
    from ray_envs.settings import Settings
    from ray_envs.specs import EnvSpec

#: Where each public name lives; imported at first use, so that a read does not pay for a batch.
_HOMES = {
    "BatchSpec": "batch_models",
    "BatchState": "client.runner",
    "CaseSpec": "batch_models",
    "EnvSpec": "specs",
    "EnvironmentProvider": "client.environments",
    "InMemoryEnvironmentProvider": "client.in_memory",
    "ItemResult": "batch_models",
    "Progress": "client.runner",
    "RayBatchRunner": "client.runner",
    "RayEnvironmentProvider": "client.provider",
    "RayEnvsError": "errors",
    "Settings": "settings",
}

__all__ = [
    "BatchSpec", "BatchState", "CaseSpec", "EnvSpec", "EnvironmentProvider",
    "InMemoryEnvironmentProvider", "ItemResult", "Progress", "RayBatchRunner",
    "RayEnvironmentProvider", "RayEnvsError", "Settings",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
