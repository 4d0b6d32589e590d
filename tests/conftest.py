"""What all tests share: a hypothesis profile, a quick disk, and what runs side by side."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped, unused-ignore]

#: A busy machine is no reason to fail.
settings.register_profile("ray_envs", deadline=None)
settings.load_profile("ray_envs")

#: Thousands of small files in each environment: in memory, where there is enough of it.
_MEMORY, _ENOUGH_BYTES = "/dev/shm", 12 << 30
_FLOORS = ("tests/multihost/", "tests/cluster/", "tests/local/", "tests/unit/")

with suppress(OSError):
    free = min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available)
    if free > _ENOUGH_BYTES and os.access(_MEMORY, os.W_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def floor(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(_FLOORS) if item.nodeid.startswith(start)), 0)

    items.sort(key=floor)  # a stable sort: within a floor they stay as they are


class _ByFile(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
    """A whole file to a process, and all that boot hosts to one; two processes at most begin there.

    Two cores have no room for three clusters: the other processes begin with what needs none.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _FLOORS[0] if nodeid.startswith(_FLOORS[0]) else nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        if self.nodes.index(node) >= 2:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)
