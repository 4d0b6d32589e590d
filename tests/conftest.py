"""What all tests share: one hypothesis profile, and what may run beside what.

Two processes run the tests at once. All tests on one machine's Ray are in one of them, since they
share it, and so are those on several hosts; those without Ray stay together by file, since a file
shares its roots.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

#: A busy machine is no reason to fail.
settings.register_profile("ray_envs", deadline=None)
settings.load_profile("ray_envs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        floor = item.path.parent.name
        item.add_marker(
            pytest.mark.xdist_group(floor if floor in ("cluster", "multihost") else item.path.name)
        )
