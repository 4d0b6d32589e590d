"""All files of the worker: standard library only, in the oldest Python."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from ray_envs import worker

SOURCES = [path.read_text(encoding="utf-8") for path in Path(worker.__file__).parent.glob("*.py")]


@pytest.mark.parametrize("source", SOURCES)
def test_it_imports_nothing_but_the_standard_library(source: str) -> None:
    """It runs where nothing else is sure to be installed."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert not str(node.module).startswith("ray_envs") or "ray_envs.worker" in str(
                node.module
            )
            imported.add(str(node.module).split(".")[0])
    assert imported <= {*sys.stdlib_module_names, "ray_envs"}


@pytest.mark.parametrize("source", SOURCES)
def test_it_is_python_of_the_oldest_version_that_ray_runs_on(source: str) -> None:
    ast.parse(source, feature_version=(3, 10))
