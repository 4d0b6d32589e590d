"""The files of local wheels under a root: `wheels/<sha256>/<file name>`, complete or not there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ray_envs.decisions.local_wheels import check_content
from ray_envs.disk.files import storage_errors, sync_folder, write_atomically
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.specs import LocalWheel

_FOLDER = "wheels"
#: How long a wheel stays that no definition names, in seconds: one may be on its way.
_GRACE_S = 3600.0


def place(root: Path, wheel: LocalWheel) -> Path:
    return root / _FOLDER / wheel.sha256 / wheel.filename


def missing(root: Path, wheels: Iterable[LocalWheel]) -> list[LocalWheel]:
    """The wheels whose content is not under `root`."""
    return [wheel for wheel in wheels if not _is_there(root, wheel)]


def _is_there(root: Path, wheel: LocalWheel) -> bool:
    """Whether the content is under `root`; then no sweep takes it for old from now on."""
    file = place(root, wheel)
    try:
        os.utime(file.parent)
        return file.stat().st_size == wheel.size
    except OSError:
        return False


def take(root: Path, wheels: Iterable[LocalWheel], contents: Mapping[str, bytes]) -> None:
    """Keep the wheels of a definition under `root`.

    Args:
        root: the root of this node.
        wheels: the wheels.
        contents: their contents by sha256; those that are there already need none.

    Raises:
        InvalidInput: a content is missing, or is not what its wheel says.
        StorageFailed: it cannot be written.
    """
    for wheel in wheels:
        if _is_there(root, wheel):
            continue
        file = place(root, wheel)
        content = contents.get(wheel.sha256)
        if content is None:
            raise InvalidInput(
                f"the content of {wheel.filename} was not sent",
                hint="define the variant with a provider or `ray-envs create`, which build and "
                "send local packages",
            )
        check_content(wheel, content)
        with storage_errors(f"write {file.name}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, content)
            sync_folder(file.parent.parent)


def read(root: Path, wheel: LocalWheel) -> bytes:
    """The content of a wheel. Raises `StorageFailed`: it is not there, or damaged."""
    with storage_errors(f"read {wheel.filename}"):
        content = place(root, wheel).read_bytes()
    try:
        check_content(wheel, content)
    except InvalidInput as exc:
        raise StorageFailed(
            f"{place(root, wheel)} is damaged",
            hint="remove the file, and create the variant again from its files",
        ) from exc
    return content


def sweep(root: Path, keep: Collection[str]) -> int:
    """Delete the wheels whose sha256 is not in `keep`, unless they are new; returns the bytes."""
    freed = 0
    try:
        entries = list(os.scandir(root / _FOLDER))
    except OSError:  # there never was one
        return 0
    for entry in entries:
        with suppress(OSError):
            is_old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _GRACE_S
            if entry.name in keep or not is_old or not entry.is_dir(follow_symlinks=False):
                continue
            freed += sum(each.stat(follow_symlinks=False).st_size for each in os.scandir(entry))
            shutil.rmtree(entry, ignore_errors=True)
    return freed
