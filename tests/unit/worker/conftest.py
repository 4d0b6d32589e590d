"""What the worker keeps in its process is as it was, and its code folders are temporary ones."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ray_envs.worker import paths
from ray_envs.worker.hold import INSTALLED_AS


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore `sys.path` and `sys.modules` after each test; a worker has the installed module."""
    monkeypatch.setitem(sys.modules, INSTALLED_AS, ModuleType(INSTALLED_AS))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(paths, "_shadowed_by_folder", {})
    monkeypatch.setattr(paths, "_in_order", {})
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]
