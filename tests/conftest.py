"""What all tests share: one hypothesis profile.

Two processes run the tests at once, each file in one of them: the tests of a file share roots and
clusters (`--dist=loadfile` in pyproject.toml).
"""

from __future__ import annotations

from hypothesis import settings

#: A busy machine is no reason to fail.
settings.register_profile("ray_envs", deadline=None)
settings.load_profile("ray_envs")
