"""The leases: promises to jobs that an environment is kept, before a process holds it.

A lease ends with its job, or with the last detached actor that was given the environment. Leases
are kept on disk, so that the manager knows them after a restart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter

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

    def take(self, key: str, *, job_id: str, session: str, variant_id: str) -> None:
        """Give a job a lease on `key`, if it has none yet.

        Raises `StorageFailed`: the lease is valid, but will be lost at a restart of the manager.
        """
        leases = self._all()
        holder = f"{session}/{job_id}"
        if holder not in leases.setdefault(key, {}):
            leases[key][holder] = variant_id
            self._write()

    def of(self, key: str, *, but_job: str | None = None) -> list[str]:
        """The jobs with a lease on `key`, without `but_job`."""
        jobs = {holder.rpartition("/")[2] for holder in self._all().get(key, {})}
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
        leases, keep, gone = self._all(), set(kept_keys), set(dead)
        freed, is_changed = [], False
        for key, holders in list(leases.items()):
            if key in keep:
                continue
            rest = {holder: name for holder, name in holders.items() if holder not in gone}
            is_changed = is_changed or rest != holders
            leases[key] = rest
            if not rest:
                del leases[key]
                freed.append(key)
        if is_changed:
            with suppress(StorageFailed):  # leases that stay in the file only keep more
                self._write()
        return freed

    def _all(self) -> dict[str, Holders]:
        if self._leases is None:
            with storage_errors("read the leases"):
                try:
                    text = self._path.read_bytes()
                except FileNotFoundError:
                    text = b"{}"
            try:
                self._leases = _SHAPE.validate_json(text)
            except ValueError as exc:
                raise StorageFailed(
                    f"{self._path} is damaged",
                    hint="remove it when no job runs in an environment of this root",
                ) from exc
        return self._leases

    def _write(self) -> None:
        with storage_errors("write the leases"):
            write_atomically(self._path, json.dumps(self._leases, indent=1) + "\n")
