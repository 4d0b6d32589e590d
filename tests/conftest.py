"""What all tests share: one hypothesis profile, and what may run beside what.

Two processes run the tests at once. All tests on Ray are in one of them, since they share clusters,
and two that start at once are too much for two cores; those without it stay together by file, since
a file shares its roots.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

#: A busy machine is no reason to fail.
settings.register_profile("ray_envs", deadline=None)
settings.load_profile("ray_envs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        is_on_ray = item.path.parent.name in ("cluster", "multihost")
        item.add_marker(pytest.mark.xdist_group("ray" if is_on_ray else item.path.name))
