"""Deletes the code folders that workers of this user have unpacked and no item uses any more."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from ray_envs.worker.code import CODE_OF_USER, UNPACKING

#: How long an unpacked code folder is kept after its last use.
_IDLE_S = 7 * 24 * 3600.0
_FOLDER = re.compile(rf"[0-9a-f]{{64}}|{UNPACKING}\w+(\.old)?")


def sweep(root: Path) -> None:
    """Delete the code folders below `root` that no item has used for a week.

    Only folders that workers name so, and never through a link: if somebody has put a link there,
    nothing behind it is ours.
    """
    parent = root / f"{CODE_OF_USER}{os.getuid()}"
    if parent.is_symlink():
        return
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            with suppress(OSError):  # a worker has just renamed it
                is_old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _IDLE_S
                if is_old and _FOLDER.fullmatch(entry.name) and not entry.is_symlink():
                    shutil.rmtree(entry.path, ignore_errors=True)
