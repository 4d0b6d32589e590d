"""One hypothesis profile for all tests: a busy machine is no reason to fail."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ray_envs", deadline=None)
settings.load_profile("ray_envs")
