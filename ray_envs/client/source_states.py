"""Tells whether a local package may have changed since it was built: its files, and its git tags.

`local_packages` keeps what it built as long as the state stays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: Folders that no build depends on: what builds, tools and version control leave.
_SKIPPED = frozenset(
    {".git", ".hg", "node_modules", "__pycache__", ".eggs", ".mypy_cache", ".pytest_cache",
     ".ruff_cache", ".tox", ".nox"}
)  # fmt: skip
_SKIPPED_AT_TOP = frozenset({"build", "dist", ".venv", "venv"})
#: Where git keeps which commit is checked out, and the tags: the version of many packages.
_GIT_REFS = ("packed-refs", "refs/heads", "refs/tags", "reftable")


def state_of(path: Path) -> str:
    """Return a hash of the names, sizes and times of all files that a build may depend on.

    Args:
        path: a folder or a source archive; an absolute path.
    """
    digest = hashlib.sha256()
    for file in sorted({*_files_of(path), *_files_of_git(path)}):
        with suppress(OSError, ValueError):  # it has just vanished, or git names no path
            told = os.stat(file)
            told_of = f"{file}\0{told.st_size}\0{told.st_mtime_ns}\0"
            digest.update(told_of.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _files_of(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield str(path)
        return
    seen: set[str] = set()
    for place, folders, files in os.walk(path, followlinks=True):
        skipped = _SKIPPED_AT_TOP | _SKIPPED if place == str(path) else _SKIPPED
        real = os.path.realpath(place)
        if real in seen:  # a link that leads around in a circle
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = [
            name
            for name in folders
            if name not in skipped
            and not name.endswith(".egg-info")
            and not os.path.exists(os.path.join(place, name, "pyvenv.cfg"))
        ]
        yield from (os.path.join(place, name) for name in files)


def _files_of_git(path: Path) -> Iterator[str]:
    """Yield the files that change with a commit, a checkout or a tag of the repository."""
    git = next((p / ".git" for p in (path, *path.parents) if os.path.exists(p / ".git")), None)
    if git is None:
        return
    if git.is_file():  # of a worktree or a submodule
        git = git.parent / _line_of(git).removeprefix("gitdir:").strip()
    yield str(git / "HEAD")
    shared = git / _line_of(git / "commondir")
    for name in _GIT_REFS:
        yield from _files_of(shared / name)


def _line_of(file: Path) -> str:
    """Return the text of one of git's files; "" if it cannot be read: it tells nothing then."""
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except (OSError, ValueError):
        return ""
