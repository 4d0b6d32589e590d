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
_HOSTS, _CLUSTER = "tests/multihost/", "tests/cluster/"
#: The tests on the embedded Ray of `tests/cluster/conftest.py`.
_ON_ONE_CLUSTER = f"{_CLUSTER}client/"
#: Who begins first: the longest.
_ORDER = (_HOSTS, f"{_CLUSTER}cli/test_commands.py", _CLUSTER, "tests/local/", "tests/unit/")

with suppress(OSError):
    free = min(shutil.disk_usage(_MEMORY).free, psutil.virtual_memory().available)
    if free > _ENOUGH_BYTES and os.access(_MEMORY, os.W_OK):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, start in enumerate(_ORDER) if item.nodeid.startswith(start)), 0)

    items.sort(key=place)  # a stable sort: what is in the same place stays as it is


class _ByFile(LoadScopeScheduling):  # type: ignore[misc, unused-ignore]
    """A whole file to a process, and all with the same cluster to one.

    Two processes begin with clusters: two cores have no room for three. The others begin at the
    end, with what needs none.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((f for f in (_HOSTS, _ON_ONE_CLUSTER) if file.startswith(f)), file)

    def _assign_work_unit(self, node: Any) -> None:
        if self.nodes.index(node) >= 2:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)
