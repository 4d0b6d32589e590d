"""Writes definitions without a manager, as tests of the disk need them."""

from __future__ import annotations

from ray_envs.errors import StorageFailed
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId, Generation, VariantRecord


def commit(
    registry: Registry, env_id: EnvId, generation: Generation, *, pyproject: str, uv_lock: str
) -> VariantRecord:
    """Make `generation` the current one at once, or leave everything as it was."""
    registry.stage(env_id, generation, pyproject=pyproject, uv_lock=uv_lock)
    try:
        return registry.switch(env_id, generation, pyproject=pyproject, uv_lock=uv_lock)
    except StorageFailed:
        registry.unstage(env_id, generation.number)
        raise
