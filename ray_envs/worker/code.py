"""Unpacks the code folder of a batch, once on each machine, and puts it on sys.path."""

from __future__ import annotations

import os
import sys
from typing import Any

from ray_envs.worker.hold import INSTALLED_AS
from ray_envs.worker.paths import is_foreign, module_names

#: The folder `<root>/code-<uid>` has the code of one user; the agent sweeps it.
CODE_OF_USER = "code-"
#: What a folder there is called while a worker unpacks into it.
UNPACKING = "unpacking-"


def _memory() -> dict[str, Any]:
    """What this process remembers from batch to batch: each sends a new copy of this file."""
    return vars(sys.modules[INSTALLED_AS])


def _code_folders(root: str) -> str:
    """Return the folder for the code of this user: below `root`, where no other user writes.

    In a folder that belongs to somebody else, or is a link, others could prepare or replace files.
    Where the root does not let this user make one, the process has a temporary folder of its own.
    """
    import stat

    folder = os.path.join(root, f"{CODE_OF_USER}{os.getuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return _own_folder()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    if is_ours and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
        return folder
    return _own_folder()


def _own_folder() -> str:
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="ray_envs-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def unpacked(root: str, sha256: str, code: bytes) -> str:
    """Unpack the archive `code`, unless this root has it already, and return the folder.

    Its time stamp is its last use. The agent deletes what was not used for a week.
    """
    import io
    import shutil
    import tempfile
    import zipfile

    memory = _memory()
    if "_code_folders" not in memory:
        memory["_code_folders"] = _code_folders(root)
    parent = memory["_code_folders"]
    folder = os.path.join(parent, sha256)
    checked: set[str] = memory.setdefault("_checked_code", set())  # each worker checks once
    if folder in checked and os.path.isdir(folder):
        os.utime(folder)
        return folder
    with zipfile.ZipFile(io.BytesIO(code)) as archive:
        if not _is_unpacked(archive, folder):
            scratch = tempfile.mkdtemp(prefix=UNPACKING, dir=parent)
            try:
                archive.extractall(scratch)
                if not _is_unpacked(archive, folder):  # else another worker was first
                    if os.path.islink(folder):
                        os.unlink(folder)
                    elif os.path.lexists(folder):  # changed by a payload
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
    return os.path.isdir(folder) and not os.path.islink(folder)


def use_code(folder: str | None) -> None:
    """Put `folder` behind the environment on sys.path; remove other code and its modules."""
    memory = _memory()
    if folder == memory.get("_code_in_use") and (folder is None or folder in sys.path):
        return  # to look at all modules takes 20 ms
    memory["_code_in_use"] = folder
    # The worker may have run other code before. It is found by its path.
    folders: str | None = memory.get("_code_folders")
    parent = folders and os.path.realpath(folders) + os.sep
    keep = None if folder is None else os.path.realpath(folder) + os.sep

    def is_old(path: str) -> bool:
        real = os.path.realpath(path) + os.sep
        return bool(parent and real.startswith(parent)) and not (keep and real.startswith(keep))

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
