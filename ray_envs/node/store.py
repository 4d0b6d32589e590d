"""One node's environments on disk; the only module that knows a path in the store.

An environment is there when its record is there, which is written last. A directory without one is
rubbish; one with a record is never changed, and is removed under the exclusive hold only.
"""

from __future__ import annotations

import fcntl
import os
import py_compile
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ray_envs.decisions.collecting import EnvUse
from ray_envs.disk.files import locked, storage_errors, write_atomically
from ray_envs.errors import EnvironmentInUse, StorageFailed
from ray_envs.models import EnvRecord
from ray_envs.node import usage
from ray_envs.settings import Settings
from ray_envs.worker import hold

#: Changes with the layout below; an older layout is left alone, never migrated in place.
_STORE = "store"
#: The format of all files below a root. A root without a number was written before there was one.
FORMAT = 1
_FORMAT = "format"


class Store:
    """The environments of one node.

    Layout: `store/<key>/.venv`, `store/<key>/record.json`, and beside the directory, never in it,
    `store/<key>.lock` (of the builder) and `store/<key>.hold` (of running processes). `uv-cache/`
    is on the same file system, so that uv can link; `scratch/` and `trash/` may be deleted.
    `code-<uid>/<sha256>` is a code folder that a worker of that user has unpacked.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.root = settings.root
        self.cache = self.root / "uv-cache"
        self.folder = self.root / _STORE
        #: The lock of a collection. It is made early, before the disk may be full.
        self.gc_lock = self.root / "gc.lock"
        self._scratch = self.root / "scratch"
        self._trash = self.root / "trash"

    def set_up(self) -> None:
        """Make the folders, and check that they can be written.

        Raises:
            StorageFailed: the root cannot be made or written, or is too full to build anything.
        """
        with storage_errors(f"use the root {self.root}"):
            for folder in (self.folder, self.cache, self._scratch, self._trash):
                folder.mkdir(parents=True, exist_ok=True)
            self.gc_lock.touch()
            probe = self._scratch / f"{os.getpid()}-{uuid.uuid4().hex}"
            with probe.open("wb") as file:
                file.write(b"x")
                fcntl.flock(file, fcntl.LOCK_EX)  # a file system without it cannot hold the store
            probe.unlink(missing_ok=True)  # another process sweeps
            if not self.check_format():
                write_atomically(self.root / _FORMAT, f"{FORMAT}\n", is_durable=False)
        self._check_free()

    def check_format(self) -> bool:
        """Return whether the root has a format number.

        Raises `StorageFailed`: it has another one than this ray_envs knows.
        """
        with storage_errors(f"read the root {self.root}"):
            try:
                text = (self.root / _FORMAT).read_text(encoding="utf-8", errors="replace").strip()
            except FileNotFoundError:
                return False
        if text != str(FORMAT):
            raise StorageFailed(
                f"the root {self.root} has the format {text[:20]!r}, and this ray_envs reads "
                f"{FORMAT}",
                hint="update ray_envs on this machine, or set RAY_ENVS_ROOT to another folder",
            )
        return True

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
        return self.folder / key / ".venv"

    def python(self, key: str) -> Path:
        """The interpreter of an environment, whether it is there or not."""
        return self.venv(key) / "bin" / "python"

    def site_packages(self, key: str, python_minor: str) -> Path:
        return self.venv(key) / "lib" / f"python{python_minor}" / "site-packages"

    def _record_file(self, key: str) -> Path:
        return self.folder / key / "record.json"

    def _hold_file(self, key: str) -> Path:
        return self.folder / f"{key}.hold"

    def record(self, key: str) -> EnvRecord | None:
        """The record of a ready environment; None where there is none or it cannot be read."""
        try:
            record = EnvRecord.model_validate_json(self._record_file(key).read_bytes())
        except (OSError, ValidationError):
            return None
        return record if record.key == key and self.python(key).exists() else None

    def records(self) -> dict[str, EnvRecord]:
        """Every ready environment of this node by its key."""
        found = ((key, self.record(key)) for key in self._keys())
        return {key: record for key, record in found if record is not None}

    def _keys(self) -> list[str]:
        """The name of every directory in the store, with a record or without."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())
        except FileNotFoundError:
            return []

    def lock(self, key: str) -> AbstractAsyncContextManager[None]:
        """The lock for building and removing `key`; see `files.locked`."""
        return locked(
            self.folder / f"{key}.lock",
            what=f"the environment {key}",
            timeout_s=self._settings.lock_timeout_s,
        )

    def compile_lock(self) -> AbstractAsyncContextManager[None]:
        """The lock for writing byte-code into uv's cache on this node."""
        return locked(
            self.folder / "bytecode.lock",
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
            (self.folder / key).mkdir(parents=True)

    def discard(self, key: str) -> int | None:
        """Move the directory of `key` away and delete it; None if there is none.

        Returns:
            The bytes that the disk got back: files that uv's cache or another environment has too
            free none.

        Raises `EnvironmentInUse`: a living process holds it.
        """
        place = self.folder / key
        with storage_errors(f"remove the environment {key}"):
            if not os.path.lexists(place):
                return None
            try:
                with self._exclusive_hold(key):
                    self._trash.mkdir(exist_ok=True)
                    doomed = self._trash / f"{key}-{uuid.uuid4().hex}"
                    os.rename(place, doomed)
            except EnvironmentInUse as exc:
                users = (f"process {u['pid']} ({' '.join(u['command'])})" for u in self.users(key))
                raise exc.about(detail="\n".join(users)) from None
            _, _, there = usage.measured(doomed)
            _delete(doomed)
            # The rest is in the trash; the next sweep of any process removes it.
            _, _, left = usage.measured(doomed)
        return there - left

    def install_hold(self, key: str, python_minor: str) -> None:
        """Make every interpreter that starts in `key` take the hold before anything else."""
        with storage_errors(f"write into the environment {key}"):
            self._hold_file(key).touch()
            site = self.site_packages(key, python_minor)
            module = site / f"{hold.INSTALLED_AS}.py"
            shutil.copyfile(hold.__file__, module)
            # `unchecked-hash`: valid whatever happens to time stamps.
            py_compile.compile(
                str(module),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            (site / f"{hold.INSTALLED_AS}.pth").write_text(
                f"import {hold.INSTALLED_AS}; {hold.INSTALLED_AS}.take_hold()\n"
            )

    def commit(self, record: EnvRecord) -> None:
        """Declare the environment ready. It is never changed after this."""
        with storage_errors(f"write the record of {record.key}"):
            write_atomically(self._record_file(record.key), record.model_dump_json(indent=1) + "\n")

    def open_hold(self, key: str) -> int:
        """An inheritable descriptor that holds `key` for as long as any process has it open.

        Raises `EnvironmentInUse`: the environment is being removed right now.
        """
        with storage_errors(f"hold the environment {key}"):
            fd = os.open(self._hold_file(key), os.O_RDONLY | os.O_CREAT, 0o666)
        if not hold.shared_lock(fd):
            os.close(fd)
            raise EnvironmentInUse(f"the environment {key} is being removed", key=key)
        os.set_inheritable(fd, True)
        with suppress(OSError):  # the file is another user's
            os.utime(fd)
        return fd

    def is_held(self, key: str) -> bool:
        """Whether a living process runs in the environment."""
        if not self._hold_file(key).exists():
            return False
        try:
            with self._exclusive_hold(key):
                return False
        except EnvironmentInUse:
            return True

    @contextmanager
    def _exclusive_hold(self, key: str) -> Iterator[None]:
        try:
            fd = _locked_alone(self._hold_file(key), os.O_CREAT)
        except BlockingIOError:
            raise EnvironmentInUse(
                f"the environment {key} is in use", key=key, hint="wait until its processes end"
            ) from None
        try:
            yield
        finally:
            os.close(fd)

    @contextmanager
    def no_use(self, key: str) -> Iterator[None]:
        """Start the interpreter of `key` in the block without counting that as a use."""
        hold = self._hold_file(key)
        before = hold.stat() if hold.exists() else None
        try:
            yield
        finally:
            if before is not None and not self.is_held(key):
                with suppress(OSError):
                    os.utime(hold, ns=(before.st_atime_ns, before.st_mtime_ns))

    def renew(self, key: str) -> None:
        """Make now the last use of a ready environment."""
        with suppress(OSError):
            os.utime(self._hold_file(key))

    def renew_held(self) -> int:
        """Make now the last use of every held environment; returns their number.

        A process renews only at its start and its end: work of days must not look idle.
        """
        renewed = 0
        for key in self._keys():
            with suppress(OSError):  # another user's file
                if self.is_held(key):
                    os.utime(self._hold_file(key))
                    renewed += 1
        return renewed

    def inventory(self) -> list[EnvUse]:
        """The size and last use of every directory of the store, also without a record.

        Looks at every file: for many environments that is seconds.
        """
        return [use for key in self._keys() if (use := self.use(key)) is not None]

    def use(self, key: str) -> EnvUse | None:
        """The size and last use of `key`; None if it is not there."""
        place, record = self.folder / key, self.record(key)
        size, inodes, _ = usage.measured(place)
        try:
            last_used_at = place.stat().st_mtime  # its creation: the record was written here
        except OSError:  # removed meanwhile
            return None
        is_held = True  # if that cannot be found out
        with suppress(OSError):
            is_held = self.is_held(key)
        # After the hold: a process that starts in between has renewed it.
        with suppress(OSError):
            last_used_at = max(last_used_at, self._hold_file(key).stat().st_mtime)
        return EnvUse(
            key=key,
            bytes=size,
            inodes=inodes,
            last_used_at=last_used_at,
            is_held=is_held,
            is_ready=record is not None,
            created_at=record.created_at.timestamp() if record else None,
        )

    def users(self, key: str) -> list[dict[str, Any]]:
        """The processes that hold `key`, as far as the kernel shows them: pid, command, job_id."""
        return [usage.told_of(pid) for pid in usage.holders(self._hold_file(key))]

    @contextmanager
    def scratch(self, files: dict[str, str]) -> Iterator[Path]:
        """A folder with `files` (name to text) in it, gone after the block."""
        with storage_errors("write a scratch folder"):
            folder, lock = self._new_scratch()
        try:
            with storage_errors("write a scratch folder"):
                for name, text in files.items():
                    (folder / name).write_text(text, encoding="utf-8")
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # the next start sweeps the rest
            os.close(lock)

    def _new_scratch(self) -> tuple[Path, int]:
        """A folder, and the lock on it that keeps every sweep away until it is closed."""
        while True:
            folder = self._scratch / f"{os.getpid()}-{uuid.uuid4().hex}"
            folder.mkdir(parents=True)
            with suppress(FileNotFoundError, BlockingIOError):  # swept before it was locked
                lock = _locked_alone(folder)
                if folder.exists():
                    return folder, lock
                os.close(lock)

    def sweep(self) -> None:
        """Delete what dead processes left in scratch and trash. Doubt keeps.

        A lock shows whether a process lives. A pid does not: containers have their own pids.
        Two processes may sweep at once: each deletes what the other has not.
        """
        for entry in self._entries(self._scratch):
            if entry.name.partition("-")[0].isdigit():
                with suppress(OSError):  # in use, or gone
                    lock = _locked_alone(entry)
                    _delete(entry)
                    os.close(lock)
        for entry in self._entries(self._trash):
            _delete(entry)

    @staticmethod
    def _entries(folder: Path) -> list[Path]:
        return list(folder.iterdir()) if folder.is_dir() else []


def _locked_alone(path: Path, flags: int = 0) -> int:
    """A descriptor of the file or folder `path` that has the exclusive lock until it is closed.

    Raises `BlockingIOError`: a living process has it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _delete(path: Path) -> None:
    """Delete a folder, file or link as far as possible; others may be deleting it too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
