"""The definitions on disk: variants and their generations, on the manager's node.

A definition is there when its `metadata.json` is there; it names the current generation, and is
replaced in one step. Whether an environment is built is known to `node.store`.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import AbstractAsyncContextManager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ray_envs.disk.files import locked, storage_errors, sync_folder, write_atomically
from ray_envs.errors import InvalidId, StorageFailed
from ray_envs.models import EnvId, Generation, VariantRecord
from ray_envs.settings import Settings

_METADATA = "metadata.json"
#: The names of files that `write_atomically` has not renamed yet.
_HALF = re.compile(
    r"\.(metadata\.json|pyproject\.toml|uv\.lock|generation\.json|pyvenv\.cfg|ray_envs_store\.pth)"
    r"\.[^.]+"
)


class Registry:
    """The variants that are defined under one root.

    Layout: `envs/{workflow}_{node}[_{version}]/` with `metadata.json`, `pyproject.toml` and
    `uv.lock` of the current generation, and `generations/N/` with the same of every generation.

    Methods raise `StorageFailed` for what cannot be read or written; the latter changes nothing.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._envs = settings.root / "envs"

    def folder(self, env_id: EnvId) -> Path:
        return self._envs / env_id.folder

    def _place(self, env_id: EnvId, number: int) -> Path:
        return self.folder(env_id) / "generations" / str(number)

    def lock(
        self, env_id: EnvId, *, timeout_s: float | None = None
    ) -> AbstractAsyncContextManager[None]:
        """The lock for changes of this definition, across processes; see `files.locked`."""
        with storage_errors(f"use {self._envs}"):
            self._envs.mkdir(parents=True, exist_ok=True)
        return locked(
            self._envs / f"{env_id.folder}.lock",
            what=f"variant {env_id}",
            timeout_s=self._settings.lock_timeout_s if timeout_s is None else timeout_s,
        )

    def get(self, env_id: EnvId) -> VariantRecord | None:
        """The definition of `env_id`, or None where there is none."""
        record = self._read(self.folder(env_id) / _METADATA)
        if record is not None and record.env_id != env_id:
            raise StorageFailed(
                f"the folder of {env_id} holds the variant {record.env_id}",
                hint="this file system does not tell upper from lower case: choose another id",
            )
        return record

    def all(self, *, damaged: list[StorageFailed] | None = None) -> list[VariantRecord]:
        """Every definition under the root that can be read, by its id."""
        found = []
        for folder in self.stamps():
            try:
                found.append(self.read(folder))
            except StorageFailed as exc:
                if damaged is not None:
                    damaged.append(exc)
        return sorted((r for r in found if r is not None), key=lambda r: str(r.env_id))

    def _read(self, path: Path | str) -> VariantRecord | None:
        with storage_errors("read a definition"):
            try:  # without a buffer: there may be ten thousand of them
                with open(path, "rb", buffering=0, opener=_not_waiting) as file:
                    text = file.read() or b""
            except FileNotFoundError:
                return None
        try:
            return VariantRecord.model_validate_json(text)
        except (ValidationError, InvalidId) as exc:
            raise StorageFailed(
                f"{path} is damaged",
                detail=_reason(exc),
                hint="restore it, or remove the folder "
                f"{os.path.dirname(path)} to forget the variant",
            ) from exc

    def stamp(self, env_id: EnvId) -> int:
        """A number that changes with every change of the definition; 0 where there is none."""
        return _stamp(os.path.join(self._envs, env_id.folder))

    def keys_in(self, folder: str) -> set[str]:
        """The keys of all generations in the folder of that name, as far as they can be read."""
        found = set()
        for path in sorted((self._envs / folder / "generations").glob("*/generation.json")):
            with storage_errors(f"read {path}"):
                text = path.read_bytes()
            try:
                found.add(Generation.model_validate_json(text).key)
            except ValidationError as exc:
                raise StorageFailed(f"{path} is damaged", detail=_reason(exc)) from exc
        return found

    def local_wheels(self) -> list[str] | None:
        """The sha256 of the local packages of all generations; None if that cannot be known."""
        found = set()
        try:
            folders = [entry.path for entry in os.scandir(self._envs) if entry.is_dir()]
            places = [Path(folder, "generations") for folder in folders]
            numbers = [Path(n.path) for p in places if p.is_dir() for n in os.scandir(p)]
            for path in numbers:
                text = (path / "generation.json").read_bytes()
                if b'.whl"' in text:
                    made = Generation.model_validate_json(text)
                    found |= {wheel.sha256 for wheel in made.definition.wheels}
        except (OSError, ValidationError):  # damaged, or on its way out
            return None
        return sorted(found)

    def stamps(self) -> dict[str, int]:
        """The stamp of every definition, by its folder's name; cheap, for a look at changes."""
        with storage_errors("read the definitions"):
            try:
                with os.scandir(self._envs) as entries:
                    folders = [(e.name, _stamp(e.path)) for e in entries if e.is_dir()]
            except FileNotFoundError:
                return {}
        return {name: stamp for name, stamp in folders if stamp}

    def read(self, folder: str) -> VariantRecord | None:
        """The definition in the folder of that name."""
        return self._read(f"{self._envs}/{folder}/{_METADATA}")

    def lock_text(self, env_id: EnvId, number: int) -> tuple[str, str]:
        """The pyproject.toml and uv.lock of one generation."""
        folder = self._place(env_id, number)
        with storage_errors(f"read generation {number} of {env_id}"):
            return (
                (folder / "pyproject.toml").read_text(encoding="utf-8"),
                (folder / "uv.lock").read_text(encoding="utf-8"),
            )

    def generation(self, env_id: EnvId, number: int) -> Generation:
        """One generation of `env_id`, whether it is the current one or not."""
        path = self._place(env_id, number) / "generation.json"
        with storage_errors(f"read generation {number} of {env_id}"):
            text = path.read_bytes()
        reason = f"it holds another generation than {number}"
        try:
            found = Generation.model_validate_json(text)
            if found.number == number:
                return found
        except ValidationError as exc:
            reason = _reason(exc)
        raise StorageFailed(
            f"{path} is damaged",
            detail=reason,
            hint="restore it; the other generations are not concerned",
        )

    def stage(
        self,
        env_id: EnvId,
        generation: Generation,
        *,
        pyproject: str,
        uv_lock: str,
        same_lock: VariantRecord | None = None,
    ) -> None:
        """Write `generation` beside the current one, complete; the caller holds the lock.

        A process that dies before `switch` leaves a folder that no definition names; the next
        change overwrites it.

        Args:
            env_id: the variant.
            generation: its number is `next_number`.
            pyproject: the text that uv locked.
            uv_lock: the text of the lock.
            same_lock: a variant whose current generation has the same lock: its file is linked,
                so that many variants of one lock cost the disk of one.
        """
        before = self.get(env_id)  # refuses a folder that holds another id
        place = self._place(env_id, generation.number)
        with storage_errors(f"write the definition of {env_id}"):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            try:
                write_atomically(place / "pyproject.toml", pyproject)
                if not self._link_lock(same_lock, place, uv_lock):
                    write_atomically(place / "uv.lock", uv_lock)
                    os.chmod(place / "uv.lock", 0o444)
                write_atomically(place / "generation.json", generation.model_dump_json(indent=1))
                sync_folder(place.parent)
            except OSError:
                self.unstage(env_id, generation.number)
                if before is None:
                    shutil.rmtree(self.folder(env_id), ignore_errors=True)
                raise

    def _link_lock(self, other: VariantRecord | None, place: Path, uv_lock: str) -> bool:
        if other is None:
            return False
        try:
            source = self._place(other.env_id, other.current.number) / "uv.lock"
            os.link(source, place / "uv.lock")
            if (place / "uv.lock").read_text(encoding="utf-8") == uv_lock:
                return True
            (place / "uv.lock").unlink()
        except OSError:  # no hard links here, or too many: write a file instead
            pass
        return False

    def unstage(self, env_id: EnvId, number: int) -> None:
        """Remove a generation that did not become the current one. Never raises."""
        shutil.rmtree(self._place(env_id, number), ignore_errors=True)
        folder = self.folder(env_id)
        if not (folder / _METADATA).exists():
            shutil.rmtree(folder, ignore_errors=True)

    def switch(
        self, env_id: EnvId, generation: Generation, *, pyproject: str, uv_lock: str
    ) -> VariantRecord:
        """Make a complete generation the current one, in one step; the caller holds the lock."""
        before = self.get(env_id)
        now = datetime.now(timezone.utc)
        numbers = before.numbers if before else ()
        if generation.number not in numbers:
            numbers = (*numbers, generation.number)
        record = VariantRecord(
            env_id=env_id,
            current=generation,
            numbers=numbers,
            is_pinned=before.is_pinned if before else False,
            created_at=before.created_at if before else now,
            updated_at=now,
        )
        self._write(record, pyproject, uv_lock)
        return record

    def point_to(self, record: VariantRecord) -> None:
        """Make an earlier state of a definition the current one; its generation is complete."""
        self._write(record, *self.lock_text(record.env_id, record.current.number))

    def pin(self, record: VariantRecord, *, is_pinned: bool) -> VariantRecord:
        """Say whether the environments of a variant may be collected; the caller holds its lock."""
        data = {**record.model_dump(), "is_pinned": is_pinned}
        pinned = VariantRecord.model_validate(data)
        self.point_to(pinned)
        return pinned

    def _write(self, record: VariantRecord, pyproject: str, uv_lock: str) -> None:
        folder = self.folder(record.env_id)
        with storage_errors(f"write the definition of {record.env_id}"):
            write_atomically(folder / _METADATA, record.model_dump_json(indent=1) + "\n")
        with suppress(StorageFailed):  # copies for people; `generations/` is what programs read
            self._copy(record.env_id, pyproject, uv_lock)

    def write_copies(self, record: VariantRecord) -> None:
        """Copy the texts of the current generation beside the definition, for people."""
        self._copy(record.env_id, *self.lock_text(record.env_id, record.current.number))

    def clear_halves(self, env_id: EnvId) -> None:
        """Remove half-written files of dead processes. The caller holds the lock."""
        for path in self.folder(env_id).rglob(".*"):
            if _HALF.fullmatch(path.name):
                with suppress(OSError):
                    path.unlink()

    def _copy(self, env_id: EnvId, pyproject: str, uv_lock: str) -> None:
        folder = self.folder(env_id)
        with storage_errors(f"write the copies of {env_id}"):
            write_atomically(folder / "pyproject.toml", pyproject, is_durable=False)
            write_atomically(folder / "uv.lock", uv_lock, is_durable=False)

    def next_number(self, env_id: EnvId) -> int:
        """The next free number for a generation of the variant.

        A folder of that number was left by a change that died or failed.
        """
        record = self.get(env_id)
        return max(record.numbers) + 1 if record else 1

    def delete(self, env_id: EnvId) -> bool:
        """Delete a definition; returns whether it existed. The caller holds its lock."""
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


def _not_waiting(path: str, flags: int) -> int:
    """Open a file without waiting: a pipe in its place reads as empty."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _reason(exc: ValidationError | InvalidId) -> str:
    """The reason why a file is damaged, in one line."""
    if isinstance(exc, InvalidId):
        return exc.message
    first = exc.errors()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _stamp(folder: str) -> int:
    """A number that is different for two states of a definition, also within a clock tick."""
    try:
        told = os.stat(os.path.join(folder, _METADATA))
    except OSError:
        return 0
    return told.st_mtime_ns << 64 | told.st_ino


def describe_record(record: VariantRecord, registry: Registry, venv: Path) -> dict[str, Any]:
    """The facts of a definition as plain data; `venv` is the place of its environment."""
    key = record.current.key
    folder = registry.folder(record.env_id)
    return {
        "variant_id": str(record.env_id),
        "workflow_id": record.env_id.workflow_id,
        "node_id": record.env_id.node_id,
        "version_id": record.env_id.version_id,
        "key": key,
        "generation": record.current.number,
        "lock_sha256": record.current.lock_sha256,
        "env_path": str(folder),
        "venv_path": str(venv),
        "python_path": str(venv / "bin" / "python"),
        "python_version": record.current.target.python,
        "ray_version": record.current.target.ray,
        "is_pinned": record.is_pinned,
        "created_at": record.created_at.isoformat(),
        "updated_at": record.updated_at.isoformat(),
    }
