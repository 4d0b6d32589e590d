"""Byte-code in uv's cache: finds wheels without it, and compiles it for all environments.

Environments link to the cache's files, so that byte-code there is ready in every later one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from ray_envs.disk import processes
from ray_envs.errors import UvFailed
from ray_envs.node.uv_cache import UvCache
from ray_envs.settings import Settings


def without_bytecode(site_packages: Path, *, before: float) -> list[str]:
    """The names of dist-info folders that were linked before their byte-code was complete.

    Args:
        site_packages: of the environment.
        before: when uv began to link it (seconds since the epoch). A marker that is younger
            may stand for byte-code that came too late for this environment.
    """
    names = []
    for entry in os.scandir(site_packages):
        if entry.name.endswith(".dist-info"):
            try:
                made_at = float(Path(entry.path, marker_name()).read_text())
            except (OSError, ValueError):
                made_at = float("inf")
            if made_at >= before:
                names.append(entry.name)
    return sorted(names)


async def compile_wheels(
    cache: Path, site_packages: Path, dist_infos: Iterable[str], *, python: str, settings: Settings
) -> bool:
    """Byte-compile, in uv's cache, the wheels that these dist-info folders were linked from.

    The caller holds the node's compile lock. As `unchecked-hash`: by time stamp, byte-code is
    worthless where uv copies instead of linking.

    Returns:
        Whether the cache had all of them: where uv cannot cache a wheel (some local builds), there
        is nothing to compile there.

    Raises `UvFailed`: the compiler failed or did not end in time.
    """
    archives = UvCache(cache).archives()
    todo: list[Path] = []
    has_all = True
    for name in dist_infos:
        found = [path for path in archives.get(name, []) if _is_linked(path, site_packages, name)]
        found = found or archives.get(name, [])
        has_all = has_all and bool(found)
        todo += [path for path in found if not (path / name / marker_name()).exists()]
    if todo:
        await _compile_folders(todo, cache, python=python, settings=settings)
    for path in todo:
        for info in path.glob("*.dist-info"):
            (info / marker_name()).write_text(repr(time.time()))
        _make_read_only(path)
    return has_all


def marker_name() -> str:
    """The file in a wheel's dist-info folder that says: byte-code of this Python is complete.

    Its content is the moment at which it was. It is linked into environments with the rest, and
    so tells for each whether the byte-code was there in time.
    """
    return f"ray_envs-bytecode.{sys.implementation.cache_tag}"


async def _compile_folders(
    folders: list[Path], cwd: Path, *, python: str, settings: Settings
) -> None:
    """Compile the modules below `folders`, with one process for each processor.

    Not with compileall's own pool: its workers would outlive us when we are killed.
    """
    modules = sorted(
        (os.path.getsize(path), path) for folder in folders for path in _modules_below(folder)
    )
    count = max(1, min(os.cpu_count() or 1, len(modules)))
    shares = [[path for _, path in modules[start::count]] for start in range(count)]
    command = [python, "-I", "-m", "compileall", "-qq"]
    command += ["--invalidation-mode", "unchecked-hash", "-i", "-"]
    ended = await asyncio.gather(
        *(
            processes.run(
                command,
                cwd,
                timeout_s=settings.uv_sync_timeout_s,
                niceness=settings.build_niceness,
                stdin="\n".join(share) + "\n",
                hint="raise RAY_ENVS_UV_SYNC_TIMEOUT_S",
            )
            for share in shares
        )
    )
    for each in ended:
        # 1: a file is not Python of this version; some wheels contain such files.
        if each.code not in (0, 1):
            raise UvFailed(
                f"compileall ended with exit code {each.code}",
                detail=processes.last_words(each.output),
            )


def _make_read_only(folder: Path) -> None:
    """Take the right to write from the files of an unpacked wheel; folders keep it.

    Environments link to these very files: an edit in one would reach all others. Superusers are
    not stopped by this.
    """
    for place, _, files in os.walk(folder):
        for name in files:
            path = os.path.join(place, name)
            with suppress(OSError):  # a link that leads nowhere
                os.chmod(path, os.stat(path).st_mode & ~0o222)


def _modules_below(folder: Path) -> Iterator[str]:
    """The modules of an unpacked wheel. Outside `*.data/`: a `__pycache__` among a wheel's
    scripts makes uv refuse the wheel.
    """
    for place, folders, files in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if not name.endswith(".data")]
        for name in files:
            if name.endswith(".py"):
                yield os.path.join(place, name)


def _is_linked(archive: Path, site_packages: Path, dist_info: str) -> bool:
    try:
        return os.path.samefile(archive / dist_info / "WHEEL", site_packages / dist_info / "WHEEL")
    except OSError:
        return False
