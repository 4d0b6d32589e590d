"""The leases: promises to jobs that an environment is kept, before a process holds it.

A lease ends with its job, or with the last detached actor that was given the environment; one that
such an actor took after its job's end, with the last detached actor of that job. Leases are kept
on disk, so that the manager knows them after a restart. All managers of a root share the file: each
change reads it again, under a lock.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import TypeAdapter

from ray_envs.cluster.nodes import OF_DETACHED
from ray_envs.disk.files import storage_errors, write_atomically
from ray_envs.errors import StorageFailed

#: A lease by its holder: the job, and the session of Ray that the job is one of.
Holders = dict[str, str]
_SHAPE = TypeAdapter(dict[str, Holders])


class Leases:
    """The leases of one root, by environment key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._leases: dict[str, Holders] | None = None
        #: The jobs whose end was seen here, as `session/job`.
        self._ended: set[str] = set()
        #: Identifies the content of the file that was read or written last; None without a file.
        self._stamp: tuple[int, int, int] | None = None

    def take(self, key: str, *, job_id: str, session: str, variant_id: str) -> None:
        """Give a job a lease on `key`, if it has none yet.

        Raises `StorageFailed`: the lease is valid, but will be lost at a restart of the manager.
        """
        holder = f"{session}/{job_id}"
        if holder in self._ended:  # a detached actor of that job asks
            holder += OF_DETACHED
        if holder not in self._all().get(key, {}):
            with self._changing() as leases:
                leases.setdefault(key, {})[holder] = variant_id

    def of(self, key: str, *, but_job: str | None = None) -> list[str]:
        """The jobs with a lease on `key`, without `but_job`."""
        holders = (holder.rpartition("/")[2] for holder in self._all().get(key, {}))
        jobs = {job.removesuffix(OF_DETACHED) for job in holders}
        return sorted(jobs - {but_job})

    def all(self) -> dict[str, str]:
        """The holders of a lease on each key, in words."""
        return {
            key: "job " + ", ".join(self.of(key)) for key, holders in self._all().items() if holders
        }

    def jobs(self) -> set[str]:
        """`session/job` of every holder of a lease."""
        return {holder for holders in self._all().values() for holder in holders}

    def end(self, dead: Iterable[str], kept_keys: Iterable[str] = ()) -> list[str]:
        """End the leases of `dead` (`session/job`); returns the keys without a lease now."""
        keep, gone, freed = set(kept_keys), set(dead), []
        self.note_ended(gone)
        if not gone & self.jobs():
            return []
        with suppress(StorageFailed), self._changing() as leases:  # what stays only keeps more
            for key, holders in list(leases.items()):
                rest = {holder: name for holder, name in holders.items() if holder not in gone}
                if key not in keep and rest != holders:
                    leases[key] = rest
                    if not rest:
                        del leases[key]
                        freed.append(key)
        return freed

    def note_ended(self, jobs: Iterable[str]) -> None:
        """Note that jobs (`session/job`) have ended: only detached actors ask for them now."""
        self._ended.update(jobs)

    def _all(self) -> dict[str, Holders]:
        """The leases of all managers; the file is read again if another one has written it."""
        with storage_errors("read the leases"):
            try:
                found = self._path.stat()
                stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
                if self._leases is not None and stamp == self._stamp:
                    return self._leases
                text = self._path.read_bytes()
            except FileNotFoundError:
                stamp, text = None, b"{}"
                if self._leases is not None and self._stamp is None:
                    return self._leases  # on a full disk they hold as long as this process
        try:
            self._leases, self._stamp = _SHAPE.validate_json(text), stamp
        except ValueError as exc:
            raise StorageFailed(
                f"{self._path} is damaged",
                hint="remove it when no job runs in an environment of this root",
            ) from exc
        return self._leases

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Holders]]:
        """The leases, to be changed in the block and written after it, by one manager at a time."""
        fd = None
        with suppress(OSError):  # a full disk: the lease holds as long as this process
            fd = os.open(self._path.with_suffix(".lock"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            leases = self._all()
            yield leases
            with storage_errors("write the leases"):
                write_atomically(self._path, json.dumps(leases, indent=1) + "\n")
                found = self._path.stat()
                self._stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        finally:
            if fd is not None:
                os.close(fd)
