"""Locked uv environments for Ray tasks, prepared ahead on every node, handed out by variant id.

A module imports only from the floors below its own:

    faces       cli (cli_*, console) · display · testing · batch · flight · in_memory · provider ·
                lifecycle · doors; plugin, which Ray loads
    manager     manager · inspector · exports · changes · collector · resolver · reconciler ·
                operations · fleet
    agent       agent · making · upkeep · exchange
    hands       bundles · transfer · wheels · probing · store · registry · history · leases ·
                wishes · builder · cluster · inputs · code; below them bytecode · bootstrap ·
                gate · processes · uv_cache · database · files · usage
    decisions   changing · planning · collecting · placement · resolving · locks · policy · targets
    words       settings · events · models · errors · inside
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
    from ray_envs.models import EnvSpec
    from ray_envs.settings import Settings

#: Where each public name lives; imported at first use, so that a read does not pay for a batch.
_HOMES = {
    "BatchSpec": "batch_models",
    "BatchState": "client.runner",
    "CaseSpec": "batch_models",
    "EnvSpec": "models",
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
    "BatchSpec",
    "BatchState",
    "CaseSpec",
    "EnvSpec",
    "EnvironmentProvider",
    "InMemoryEnvironmentProvider",
    "ItemResult",
    "Progress",
    "RayBatchRunner",
    "RayEnvironmentProvider",
    "RayEnvsError",
    "Settings",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
