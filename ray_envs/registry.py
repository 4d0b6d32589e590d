"""The definitions on disk: variants and their generations, on the manager's node.

A definition is there when its `metadata.json` is there; it names the current generation, and is
replaced in one step. Nothing here knows whether an environment is built: that is `store`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import AbstractAsyncContextManager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ray_envs.errors import InvalidId, StorageFailed
from ray_envs.files import locked, storage_errors, sync_folder, write_atomically
from ray_envs.models import BuildRequest, Definition, EnvId, Generation, VariantRecord
from ray_envs.settings import Settings

_METADATA = "metadata.json"


class Registry:
    """The variants that are defined under one root.

    Layout: `envs/{workflow}_{node}[_{version}]/` with `metadata.json`, `pyproject.toml` and
    `uv.lock` of the current generation, and `generations/N/` with those of every generation.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._envs = settings.root / "envs"

    def folder(self, env_id: EnvId) -> Path:
        return self._envs / env_id.folder

    def lock(self, env_id: EnvId) -> AbstractAsyncContextManager[None]:
        """The lock of whoever changes this definition, in any process."""
        with storage_errors(f"use {self._envs}"):
            self._envs.mkdir(parents=True, exist_ok=True)
        return locked(
            self._envs / f"{env_id.folder}.lock",
            what=f"variant {env_id}",
            timeout_s=self._settings.lock_timeout_s,
        )

    def get(self, env_id: EnvId) -> VariantRecord | None:
        """The definition of `env_id`, or None where there is none.

        Raises:
            StorageFailed: it is there but cannot be read, or the folder belongs to another id
                (on file systems that do not tell upper case from lower case).
        """
        record = self._read(self.folder(env_id) / _METADATA)
        if record is not None and record.env_id != env_id:
            raise StorageFailed(
                f"the folder of {env_id} holds the variant {record.env_id}",
                hint="this file system does not tell upper from lower case: choose another id",
            )
        return record

    def all(self, *, damaged: list[StorageFailed] | None = None) -> list[VariantRecord]:
        """Every definition under the root that can be read, by its id.

        Args:
            damaged: receives an error for each definition that cannot be read; one of them must
                not hide the others.
        """
        with storage_errors("read the definitions"):
            try:
                with os.scandir(self._envs) as entries:
                    folders = [entry.path for entry in entries if entry.is_dir()]
            except FileNotFoundError:
                return []
        found = []
        for folder in folders:
            try:
                found.append(self._read(Path(folder, _METADATA)))
            except StorageFailed as exc:
                if damaged is not None:
                    damaged.append(exc)
        return sorted((r for r in found if r is not None), key=lambda r: str(r.env_id))

    def _read(self, path: Path) -> VariantRecord | None:
        with storage_errors("read a definition"):
            try:
                text = path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            return VariantRecord.model_validate_json(text)
        except (ValidationError, InvalidId) as exc:
            raise StorageFailed(
                f"{path} is damaged",
                detail=str(exc).splitlines()[-1],
                hint=f"restore it, or remove the folder {path.parent} to forget the variant",
            ) from exc

    def stamp(self, env_id: EnvId) -> int:
        """A number that changes with every change of the definition; 0 where there is none."""
        try:
            return os.stat(self.folder(env_id) / _METADATA).st_mtime_ns
        except OSError:
            return 0

    def lock_text(self, env_id: EnvId, number: int) -> tuple[str, str]:
        """The pyproject.toml and uv.lock of one generation.

        Raises:
            StorageFailed: they cannot be read.
        """
        folder = self.folder(env_id) / "generations" / str(number)
        with storage_errors(f"read generation {number} of {env_id}"):
            return (
                (folder / "pyproject.toml").read_text(encoding="utf-8"),
                (folder / "uv.lock").read_text(encoding="utf-8"),
            )

    def commit(
        self,
        env_id: EnvId,
        definition: Definition,
        generation: Generation,
        *,
        pyproject: str,
        uv_lock: str,
    ) -> VariantRecord:
        """Make `generation` the current one of `env_id`; the caller holds its lock.

        The generation's folder is complete before `metadata.json` names it. A process that dies
        in between leaves a folder that nobody names, and the next commit writes it again.

        Raises:
            StorageFailed: it could not be written; what was before is unchanged.
        """
        folder = self.folder(env_id)
        before = self.get(env_id)
        now = datetime.now(timezone.utc)
        record = VariantRecord(
            env_id=env_id,
            definition=definition,
            current=generation,
            created_at=before.created_at if before else now,
            updated_at=now,
        )
        with storage_errors(f"write the definition of {env_id}"):
            place = folder / "generations" / str(generation.number)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            try:
                write_atomically(place / "pyproject.toml", pyproject)
                write_atomically(place / "uv.lock", uv_lock)
                write_atomically(place / "generation.json", generation.model_dump_json(indent=1))
                sync_folder(place.parent)
                write_atomically(folder / _METADATA, record.model_dump_json(indent=1) + "\n")
            except OSError:
                shutil.rmtree(place, ignore_errors=True)
                if before is None:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
        with suppress(OSError):  # copies for people; `generations/` is what programs read
            write_atomically(folder / "pyproject.toml", pyproject)
            write_atomically(folder / "uv.lock", uv_lock)
        return record

    def point_to(self, record: VariantRecord) -> None:
        """Make an earlier state of a definition the current one; its generation is complete.

        Raises:
            StorageFailed: it could not be written; the definition is as it was.
        """
        folder = self.folder(record.env_id)
        pyproject, uv_lock = self.lock_text(record.env_id, record.current.number)
        with storage_errors(f"restore the definition of {record.env_id}"):
            write_atomically(folder / _METADATA, record.model_dump_json(indent=1) + "\n")
        with suppress(OSError):
            write_atomically(folder / "pyproject.toml", pyproject)
            write_atomically(folder / "uv.lock", uv_lock)

    def next_number(self, env_id: EnvId) -> int:
        """The number after the current one; a folder of that number is a failed attempt's."""
        record = self.get(env_id)
        return record.current.number + 1 if record else 1

    def write_view(self, env_id: EnvId, *, base_python: Path, python: str, site: Path) -> None:
        """Give people a `.venv` beside the definition that shows the store's packages.

        It has its own `pyvenv.cfg` and folder: a stray `uv sync` or `pip install` there changes
        the view, never the store. Programs use the store's own interpreter.
        """
        venv = self.folder(env_id) / ".venv"
        minor = ".".join(python.split(".")[:2])
        packages = venv / "lib" / f"python{minor}" / "site-packages"
        with storage_errors(f"write the view of {env_id}"):
            packages.mkdir(parents=True, exist_ok=True)
            (venv / "bin").mkdir(exist_ok=True)
            write_atomically(
                venv / "pyvenv.cfg",
                f"home = {base_python.parent}\nversion_info = {python}\n"
                "include-system-site-packages = false\n",
            )
            link = venv / "bin" / "python"
            if not link.is_symlink():
                link.symlink_to(base_python)
            write_atomically(
                packages / "ray_envs_store.pth", f"import site; site.addsitedir({str(site)!r})\n"
            )

    def announce_manager(self, address: str) -> int | None:
        """Tell other processes on this machine that a manager serves this root at `address`.

        Returns a descriptor whose lock says so for as long as it is open, or None where another
        manager lives on the same root.
        """
        with storage_errors(f"use {self._settings.root}"):
            self._settings.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._manager_lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            try:
                write_atomically(self._settings.root / "manager.address", address + "\n")
            except OSError:
                os.close(fd)
                raise
        return fd

    def manager_address(self) -> str | None:
        """The Ray address of the manager that lives on this root, or None where none does."""
        try:
            fd = os.open(self._manager_lock, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            try:
                return (self._settings.root / "manager.address").read_text().strip() or None
            except OSError:  # it is just coming up
                return None
        finally:
            os.close(fd)

    @property
    def _manager_lock(self) -> Path:
        return self._settings.root / "manager.lock"

    def delete(self, env_id: EnvId) -> bool:
        """Forget `env_id`; returns whether it was there. The caller holds its lock."""
        folder = self.folder(env_id)
        with storage_errors(f"delete the definition of {env_id}"):
            try:
                (folder / _METADATA).unlink()
                is_there = True
            except FileNotFoundError:
                is_there = False
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)
        return is_there


def build_request(record: VariantRecord, pyproject: str, uv_lock: str) -> BuildRequest:
    """What a node needs to build the current generation of `record`."""
    generation, definition = record.current, record.definition
    return BuildRequest(
        key=generation.key,
        pyproject=pyproject,
        uv_lock=uv_lock,
        extras=definition.extras,
        groups=definition.groups,
        exclude_newer=definition.exclude_newer,
        target=generation.target,
        platform=generation.platform,
        lock_sha256=generation.lock_sha256,
        packages=generation.packages,
    )


def describe_record(record: VariantRecord, registry: Registry, venv: Path) -> dict[str, Any]:
    """What the registry says of a variant, as plain data; `venv` is where the store has it."""
    key = record.current.key
    return {
        "variant_id": str(record.env_id),
        "workflow_id": record.env_id.workflow_id,
        "node_id": record.env_id.node_id,
        "version_id": record.env_id.version_id,
        "key": key,
        "generation": record.current.number,
        "lock_sha256": record.current.lock_sha256,
        "env_path": str(registry.folder(record.env_id)),
        "venv_path": str(venv),
        "python_path": str(venv / "bin" / "python"),
        "python_version": record.current.target.python,
        "ray_version": record.current.target.ray,
        "packages": dict(record.current.packages),
        "created_at": record.created_at.isoformat(),
        "updated_at": record.updated_at.isoformat(),
    }
