"""sys.path in a worker: the environment first, everything else behind it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ray_envs.worker import paths


def test_foreign_folders_go_behind_the_environment_and_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "driver"
    foreign.mkdir()
    own = list(sys.path)
    ours = [path for path in own if path.startswith(sys.prefix + os.sep)]
    monkeypatch.setattr(sys, "path", [str(foreign), "", *own])
    monkeypatch.chdir(foreign)
    paths.put_foreign_paths_last()
    assert set(sys.path[-2:]) == {str(foreign), ""} or {str(foreign), ""} <= set(sys.path[-4:])
    assert sorted(sys.path) == sorted([str(foreign), "", *own])
    stdlib = os.path.dirname(os.__file__)
    for path in [*ours, stdlib]:
        assert sys.path.index(path) < sys.path.index(str(foreign))
    again = list(sys.path)
    paths.put_foreign_paths_last()
    assert sys.path == again


def test_the_base_pythons_own_packages_are_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray adds them where the cluster's Python is not the environment's."""
    minor = ".".join(map(str, sys.version_info[:2]))
    base = os.path.join(sys.base_prefix, "lib", f"python{minor}", "site-packages")
    monkeypatch.setattr(sys, "path", [base, *(p for p in sys.path if p != base)])
    paths.put_foreign_paths_last()
    own = [n for n, path in enumerate(sys.path) if path.startswith(sys.prefix + os.sep)]
    assert sys.path.index(base) > max(own)


def test_rays_own_bundled_folders_stay_usable() -> None:
    """Inside the environment, wherever they stand: they are what the environment holds."""
    bundled = os.path.join(sys.prefix, "lib", "x", "site-packages", "ray", "thirdparty_files")
    sys.path.insert(0, bundled)
    paths.put_foreign_paths_last()
    assert sys.path[0] == bundled


def test_modules_that_stand_in_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "lib" / "site-packages"
    folder = tmp_path / "driver"
    for place in (site, folder):
        place.mkdir(parents=True)
    for name in ("alone.py", "both.py", "speedups.cpython-311-x86_64-linux-gnu.so", "data.txt"):
        (site / name).touch()
    for name in ("both.py", "mine.py", "speedups.py", "data.txt", "README"):
        (folder / name).touch()
    for name in ("package", "namespace"):
        (site / name).mkdir()
        (folder / name).mkdir()
    (site / "package" / "__init__.py").touch()
    (folder / "package" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(folder), str(site)])
    assert paths.shadowed([str(folder)]) == ["both", "package", "speedups"]
    assert paths.shadowed([str(tmp_path / "missing")]) == []
    assert paths.shadowed([]) == []
