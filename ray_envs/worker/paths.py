"""Which folders on sys.path belong to the environment, and what others shadow of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable


def current_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def is_foreign(path: str) -> bool:
    """Whether `path` is neither the environment's, the standard library's nor Python's zip."""
    if not path and current_folder() is None:
        return True
    real = os.path.realpath(path or ".") + os.sep
    if real.startswith(os.path.realpath(sys.prefix) + os.sep) or path.endswith(".zip"):
        return False
    base = os.path.realpath(sys.base_prefix) + os.sep
    return not (real.startswith(base) and "site-packages" not in real and real != base)


def put_foreign_paths_last() -> list[str]:
    """Move what is neither the environment nor the standard library behind them on sys.path.

    Ray puts the driver's folders first in every worker: a local `pgvector/` would win over the
    locked one. Returns the names of modules that stand in both; the environment's win now.
    """
    foreign = [path for path in sys.path if is_foreign(path)]
    sys.path[:] = [path for path in sys.path if path not in foreign] + foreign
    return shadowed(foreign)


_shadowed_by_folder: dict[str, set[str]] = {}


def shadowed(folders: Iterable[str]) -> list[str]:
    """The names of modules in `folders` that site-packages of this environment has too."""
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
