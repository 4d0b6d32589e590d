"""Unpacks the code folder of a batch, once on each machine, and puts it on sys.path."""

from __future__ import annotations

import os
import sys
from typing import Any

from ray_envs.worker.hold import INSTALLED_AS
from ray_envs.worker.paths import is_foreign, module_names


def _code_folders() -> str:
    """Return the folder for all code folders of this user on this machine."""
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"ray_envs-code-{os.getuid()}")


def unpacked(sha256: str, code: bytes) -> str:
    """Unpack the archive `code`, unless this machine has it already, and return the folder."""
    import io
    import shutil
    import tempfile
    import zipfile

    parent = _code_folders()
    os.makedirs(parent, mode=0o700, exist_ok=True)
    if os.stat(parent).st_uid != os.getuid():
        raise PermissionError(f"{parent} belongs to another user")
    folder = os.path.join(parent, sha256)
    # Each worker checks the files once. The installed module remembers it for later batches.
    checked: set[str] = vars(sys.modules.get(INSTALLED_AS, os)).setdefault("_checked_code", set())
    if folder in checked and os.path.isdir(folder):
        os.utime(folder)  # in use: `_sweep` must not delete it
        return folder
    with zipfile.ZipFile(io.BytesIO(code)) as archive:
        if not _is_unpacked(archive, folder):
            _sweep(parent)
            scratch = tempfile.mkdtemp(dir=parent)
            try:
                archive.extractall(scratch)
                if not _is_unpacked(archive, folder):  # else another worker was first
                    if os.path.isdir(folder):  # changed by a payload or a cleaner of /tmp
                        os.rename(folder, scratch + ".old")
                    os.rename(scratch, folder)
            except OSError:
                if not _is_unpacked(archive, folder):
                    raise
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                shutil.rmtree(scratch + ".old", ignore_errors=True)
    checked.add(folder)
    os.utime(folder)
    return folder


def _sweep(parent: str) -> None:
    """Delete code folders that were not used for a week."""
    import shutil
    import time

    with os.scandir(parent) as entries:
        for entry in entries:
            try:
                is_old = time.time() - entry.stat().st_mtime > 7 * 24 * 3600
            except OSError:  # another worker has just renamed its scratch folder
                continue
            if is_old:
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_unpacked(archive: Any, folder: str) -> bool:
    """Whether `folder` has all files of the zip `archive`, unchanged."""
    import zlib

    try:
        for info in archive.infolist():
            if not info.is_dir():
                with open(os.path.join(folder, info.filename), "rb") as file:
                    if zlib.crc32(file.read()) != info.CRC:
                        return False
    except OSError:
        return False
    return os.path.isdir(folder)


def use_code(folder: str | None) -> None:
    """Put `folder` behind the environment on sys.path; remove other code and its modules."""
    # The worker may have run other code before. It is found by its path: each batch sends a new
    # copy of this function, which remembers nothing.
    parent = os.path.realpath(_code_folders()) + os.sep
    keep = None if folder is None else os.path.realpath(folder) + os.sep

    def is_old(path: str) -> bool:
        real = os.path.realpath(path) + os.sep
        return real.startswith(parent) and not (keep and real.startswith(keep))

    names = set() if folder is None else module_names(folder)
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        # Also modules of this code that were imported from the driver's folder.
        is_copy = name.split(".")[0] in names and name != "__main__" and path and is_foreign(path)
        if is_old(path) or (is_copy and not (keep and os.path.realpath(path).startswith(keep))):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != folder and not (path and is_old(path))]
    if folder is not None:
        import importlib

        # Behind the environment, before the driver's folders: those may hold another copy.
        own_places = [n for n, path in enumerate(sys.path) if not is_foreign(path)]
        sys.path.insert(own_places[-1] + 1 if own_places else 0, folder)
        importlib.invalidate_caches()
