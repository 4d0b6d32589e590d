"""One node's environments on disk; the only module that knows a path in the store.

An environment is there when its record is there: the record is written last, and a directory
without one is rubbish. What has a record is never changed. Whoever removes a directory needs the
exclusive hold, which no living process of that environment leaves him.
"""

from __future__ import annotations

import fcntl
import os
import py_compile
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path

from pydantic import ValidationError

from ray_envs import inside
from ray_envs.errors import EnvironmentInUse, StorageFailed
from ray_envs.files import locked, storage_errors, write_atomically
from ray_envs.models import EnvRecord
from ray_envs.settings import Settings

#: Changes with the layout below; an older layout is left alone, never migrated in place.
_STORE = "store"


class Store:
    """The environments of one node.

    Layout: `store/<key>/.venv`, `store/<key>/record.json`, and beside the directory, never in it,
    `store/<key>.lock` (who builds) and `store/<key>.hold` (who runs). `uv-cache/` is on the same
    file system, so that uv can link; `scratch/` and `trash/` hold what nobody will miss.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.root = settings.root
        self.cache = self.root / "uv-cache"
        self._store = self.root / _STORE
        self._scratch = self.root / "scratch"
        self._trash = self.root / "trash"

    def set_up(self) -> None:
        """Make the folders, and check that they can be written.

        Raises:
            StorageFailed: the root cannot be made or written, or is too full to build anything.
        """
        with storage_errors(f"use the root {self.root}"):
            for folder in (self._store, self.cache, self._scratch, self._trash):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self._scratch / f"{os.getpid()}-{uuid.uuid4().hex}"
            with probe.open("wb") as file:
                file.write(b"x")
                fcntl.flock(file, fcntl.LOCK_EX)  # a file system without it cannot hold the store
            probe.unlink()
        self._check_free()

    def _check_free(self) -> None:
        with storage_errors(f"read the free space of {self.root}"):
            free = shutil.disk_usage(self.root).free
        if free < self._settings.min_free_bytes:
            raise StorageFailed(
                f"only {free // 2**20} MiB are free below {self.root}",
                hint="free space there, or set RAY_ENVS_ROOT to another file system",
            )

    def is_full(self) -> bool:
        """Whether the file system of the root has less space than any build needs."""
        return shutil.disk_usage(self.root).free < self._settings.min_free_bytes

    def venv(self, key: str) -> Path:
        return self._store / key / ".venv"

    def python(self, key: str) -> Path:
        """The interpreter of an environment, whether it is there or not."""
        return self.venv(key) / "bin" / "python"

    def site_packages(self, key: str, python_minor: str) -> Path:
        return self.venv(key) / "lib" / f"python{python_minor}" / "site-packages"

    def _record_file(self, key: str) -> Path:
        return self._store / key / "record.json"

    def record(self, key: str) -> EnvRecord | None:
        """The record of a ready environment; None where there is none or it cannot be read."""
        try:
            record = EnvRecord.model_validate_json(self._record_file(key).read_bytes())
        except (OSError, ValidationError):
            return None
        return record if record.key == key and self.python(key).exists() else None

    def records(self) -> dict[str, EnvRecord]:
        """Every ready environment of this node by its key."""
        try:
            names = sorted(entry.name for entry in os.scandir(self._store) if entry.is_dir())
        except FileNotFoundError:
            return {}
        found = ((name, self.record(name)) for name in names)
        return {name: record for name, record in found if record is not None}

    def lock(self, key: str) -> AbstractAsyncContextManager[None]:
        """The lock of whoever builds or removes `key`; see `files.locked` for what it promises."""
        return locked(
            self._store / f"{key}.lock",
            what=f"the environment {key}",
            timeout_s=self._settings.lock_timeout_s,
        )

    def compile_lock(self) -> AbstractAsyncContextManager[None]:
        """The lock of whoever writes byte-code into uv's cache on this node."""
        return locked(
            self._store / "bytecode.lock",
            what="the byte-code of uv's cache",
            timeout_s=self._settings.lock_timeout_s,
        )

    def begin(self, key: str) -> None:
        """Clear the place of `key` for a build; the caller holds its lock and found no record.

        Raises:
            EnvironmentInUse: a process runs from what stands there without a record.
            StorageFailed: it cannot be cleared, or the disk is full.
        """
        self.discard(key)
        self._check_free()
        with storage_errors(f"make the environment {key}"):
            (self._store / key).mkdir(parents=True)

    def discard(self, key: str) -> int:
        """Move the directory of `key` away and delete it; returns how many went: 0 or 1.

        Raises:
            EnvironmentInUse: a living process holds it.
        """
        place = self._store / key
        with storage_errors(f"remove the environment {key}"):
            if not os.path.lexists(place):
                return 0
            with self._exclusive_hold(key):
                self._trash.mkdir(exist_ok=True)
                doomed = self._trash / f"{key}-{uuid.uuid4().hex}"
                os.rename(place, doomed)
            if doomed.is_symlink() or not doomed.is_dir():
                doomed.unlink(missing_ok=True)
            # What stays is rubbish in the trash; the next sweep, of any process, removes it.
            shutil.rmtree(doomed, ignore_errors=True)
        return 1

    def install_hold(self, key: str, python_minor: str) -> None:
        """Make every interpreter that starts in `key` take the hold before anything else."""
        with storage_errors(f"write into the environment {key}"):
            (self._store / f"{key}.hold").touch()
            site = self.site_packages(key, python_minor)
            module = site / f"{inside.INSTALLED_AS}.py"
            shutil.copyfile(inside.__file__, module)
            # `unchecked-hash`: valid whatever happens to time stamps.
            py_compile.compile(
                str(module),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            (site / f"{inside.INSTALLED_AS}.pth").write_text(
                f"import {inside.INSTALLED_AS}; {inside.INSTALLED_AS}.take_hold()\n"
            )

    def commit(self, record: EnvRecord) -> None:
        """Declare the environment ready. Nothing of it changes after this."""
        with storage_errors(f"write the record of {record.key}"):
            write_atomically(self._record_file(record.key), record.model_dump_json(indent=1) + "\n")

    def open_hold(self, key: str) -> int:
        """An inheritable descriptor that holds `key` for as long as any process has it open.

        Raises:
            EnvironmentInUse: the environment is being removed right now.
        """
        with storage_errors(f"hold the environment {key}"):
            fd = os.open(self._store / f"{key}.hold", os.O_RDONLY | os.O_CREAT, 0o666)
        if not inside.shared_lock(fd):
            os.close(fd)
            raise EnvironmentInUse(f"the environment {key} is being removed", key=key)
        os.set_inheritable(fd, True)
        return fd

    def is_held(self, key: str) -> bool:
        """Whether a living process runs in the environment."""
        try:
            with self._exclusive_hold(key):
                return False
        except EnvironmentInUse:
            return True

    @contextmanager
    def _exclusive_hold(self, key: str) -> Iterator[None]:
        fd = os.open(self._store / f"{key}.hold", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EnvironmentInUse(
                    f"the environment {key} is in use", key=key, hint="wait until its processes end"
                ) from None
            yield
        finally:
            os.close(fd)

    @contextmanager
    def scratch(self, files: dict[str, str]) -> Iterator[Path]:
        """A folder with `files` (name to text) in it, gone after the block."""
        folder = self._scratch / f"{os.getpid()}-{uuid.uuid4().hex}"
        with storage_errors("write a scratch folder"):
            folder.mkdir(parents=True)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what stays is swept at the next start

    def sweep(self) -> None:
        """Delete what dead processes left in scratch and trash. Doubt keeps."""
        for entry in self._entries(self._scratch):
            pid = entry.name.partition("-")[0]
            if pid.isdigit() and not _is_alive(int(pid)):
                shutil.rmtree(entry, ignore_errors=True)
        for entry in self._entries(self._trash):
            shutil.rmtree(entry, ignore_errors=True)

    @staticmethod
    def _entries(folder: Path) -> list[Path]:
        return list(folder.iterdir()) if folder.is_dir() else []


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
