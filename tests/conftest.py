"""What all tests share: one hypothesis profile."""

from __future__ import annotations

from hypothesis import settings

#: A busy machine is no reason to fail.
settings.register_profile("ray_envs", deadline=None)
settings.load_profile("ray_envs")
