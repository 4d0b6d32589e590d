"""Puts the environment first on sys.path, and finds module names that are there twice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any


def current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def is_foreign(path: str) -> bool:
    """Whether `path` belongs to neither the environment nor the standard library."""
    if not path and current_folder() is None:
        return True
    real = os.path.realpath(path or ".") + os.sep
    if real.startswith(os.path.realpath(sys.prefix) + os.sep) or path.endswith(".zip"):
        return False
    base = os.path.realpath(sys.base_prefix) + os.sep
    return not (real.startswith(base) and "site-packages" not in real and real != base)


def put_foreign_paths_last() -> list[str]:
    """Move foreign folders to the end of sys.path; return the names of modules that both have."""
    # Ray puts the driver's folders first in every worker: a local `pgvector/` would win over the
    # locked one.
    if _in_order.get("path") != (sys.path, current_folder()):
        foreign = [path for path in sys.path if is_foreign(path)]
        sys.path[:] = [path for path in sys.path if path not in foreign] + foreign
        _in_order["path"] = (list(sys.path), current_folder())
        _in_order["shadowed"] = shadowed(foreign)
    return list(_in_order["shadowed"])


#: `sys.path` and the current folder as they were put in order last, and what that returned.
_in_order: dict[str, Any] = {}


_shadowed_by_folder: dict[str, set[str]] = {}


def shadowed(folders: Iterable[str]) -> list[str]:
    """Return the names of modules that are in `folders` and in site-packages."""
    names: set[str] = set()
    for folder in folders:
        if folder not in _shadowed_by_folder:
            site = [path for path in sys.path if path.endswith("site-packages")]
            theirs = set().union(*(module_names(path) for path in site)) if site else set()
            _shadowed_by_folder[folder] = module_names(folder) & theirs
        names |= _shadowed_by_folder[folder]
    return sorted(names)


def module_names(folder: str) -> set[str]:
    try:
        entries = list(os.scandir(folder or "."))
    except OSError:
        return set()
    names = set()
    for entry in entries:
        stem, extension = os.path.splitext(entry.name)
        if extension in (".py", ".so") or (
            not extension and os.path.isfile(os.path.join(entry.path, "__init__.py"))
        ):
            names.add(stem.split(".")[0])
    return names
