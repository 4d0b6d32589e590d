"""Changes uv's cache: moves wheels in, forgets damaged or unneeded ones. Uses uv's own lock.

Nothing is built or downloaded here: that is uv's work. `uv_entries` knows the layout. Methods raise
`LockTimeout` when uv works for longer than they wait, and `StorageFailed` for the disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from packaging.utils import canonicalize_name

from ray_envs.disk.files import storage_errors
from ray_envs.errors import InvalidInput, LockTimeout
from ray_envs.models import Installed
from ray_envs.node.uv_entries import (
    Cached,
    built_entries,
    built_of,
    is_led_to,
    pointers_to,
    reachable,
    version_of,
    wheel_entries,
    wheels_of,
)  # fmt: skip

#: What is on its way out, below the cache; `uv cache prune` removes folders that it does not know.
_TRASH = ".ray_envs-forgotten-"
#: What is on its way in. Its owner holds the shared lock: under the exclusive one it is rubbish.
_ARRIVING = ".ray_envs-arriving-"
#: How often a waiter tries the lock again, in seconds. Short against any work of uv.
_POLL_S = 0.05


class UvCache:
    """uv's cache of one node, which uv and several of our processes use at once.

    Calls block: for as long as uv works (up to the time-out), and for as long as deleting takes.
    """

    def __init__(self, folder: Path, *, lock_timeout_s: float = 60) -> None:
        self.folder = folder
        self._lock_timeout_s = lock_timeout_s

    def archives(self) -> dict[str, list[Path]]:
        """The unpacked wheels by the name of their dist-info folder."""
        found: dict[str, list[Path]] = {}
        for archive in self.folder.glob("archive-v*/*"):
            with suppress(OSError):
                for entry in os.scandir(archive):
                    if entry.name.endswith(".dist-info"):
                        found.setdefault(entry.name, []).append(archive)
        return found

    def cached(self, package: Installed) -> Cached | None:
        """The entries of a package with its pinned content, if they are complete.

        Of what uv built from source, the source is left out: uv installs offline without it.
        """
        with storage_errors("read uv's cache"):
            built = (
                built_of(self.folder, package)
                if package.is_built
                else wheels_of(self.folder, package)
            )
            found = list(built)
        if not found:
            return None
        archives = dict.fromkeys(archive for each in found for archive in each.archives)
        return Cached(tuple(archives), tuple(lead for each in found for lead in each.leads))

    @contextmanager
    def arriving(self) -> Iterator[Path]:
        """A new folder for what shall be moved in during the block; see `move_in`.

        The cache is in use meanwhile (`in_use`), as it is while uv downloads. What a killed
        process leaves is removed by the next `forget`, `forget_unneeded` or `uv cache prune`.
        """
        with self.in_use():
            folder = self.folder / f"{_ARRIVING}{uuid.uuid4().hex}"
            with storage_errors("receive into uv's cache"):
                folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def move_in(
        self, arriving: Path, archives: Iterable[str], leads: Iterable[tuple[str, str | None]]
    ) -> None:
        """Put what has arrived in its place; all paths are relative, as in the cache.

        uv sees it from the last step on. An archive of the same id is the same one: it stays where
        something leads to it. Otherwise it is what a killed `forget` left, and makes room.

        Args:
            arriving: what `arriving` gave, laid out as the cache is.
            archives: the unpacked wheels.
            leads: what leads to them, in the order of `Cached.leads`: a file, or a link with the
                archive that it leads to.

        Raises:
            InvalidInput: a path leads through a link of the cache; nothing was moved.
            StorageFailed: it cannot be moved; doing all of it again is safe.
        """
        archives, leads = list(archives), list(leads)
        with storage_errors("move a wheel into uv's cache"):
            for path in (*archives, *(lead for lead, _ in leads)):
                self._check_place(path)
            for archive in archives:
                place = self.folder / archive
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_dir() and not is_led_to(self.folder, place):
                    self._let_go(place)
                try:
                    os.rename(arriving / archive, place)
                except OSError:
                    if not place.is_dir():
                        raise
            for lead, archive_of_link in leads:
                place = self.folder / lead
                place.parent.mkdir(parents=True, exist_ok=True)
                if archive_of_link is not None:
                    (arriving / lead).parent.mkdir(parents=True, exist_ok=True)
                    target = os.path.relpath(self.folder / archive_of_link, place.parent)
                    os.symlink(target, arriving / lead)
                os.replace(arriving / lead, place)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep everybody, uv too, from removing anything of the cache during the block."""
        with self._lock(fcntl.LOCK_SH):
            yield

    def forget(self, archive: Path) -> None:
        """Drop a damaged unpacked wheel, so that uv fetches it again; gone already is fine.

        A wheel that uv built itself is unpacked again from uv's copy, without the network.
        """
        if archive.parent.parent != self.folder or not archive.parent.match("archive-v*"):
            raise ValueError(f"{archive} is no unpacked wheel of {self.folder}")
        with storage_errors("remove a wheel from uv's cache"):
            with self._lock(fcntl.LOCK_EX):
                self._give_up_arriving()
                self._let_go(archive)
            self._empty_trash()

    def forget_unneeded(self, needed: Mapping[str, Collection[str]]) -> tuple[int, int]:
        """Drop the entries of every package and version that `needed` does not hold.

        `uv cache prune` then removes unreferenced unpacked wheels. Entries of an unknown package or
        version stay.

        Returns:
            How many entries went, and how many bytes that and the pruning free. Files that an
            environment has a link to do not count.
        """
        wanted = {
            (str(canonicalize_name(name)), parsed)
            for name, versions in needed.items()
            for version in versions
            if (parsed := version_of(version)) is not None
        }
        with storage_errors("remove wheels from uv's cache"):
            with self._lock(fcntl.LOCK_EX):
                self._give_up_arriving()
                entries = [*wheel_entries(self.folder), *built_entries(self.folder)]
                doomed = [entry for entry in entries if not entry.holds & wanted]
                before = reachable(self.folder)
                free = sum(_free_bytes(path) for entry in doomed for path in entry.paths)
                for path in (path for entry in doomed for path in entry.paths):
                    if path.is_dir() and not path.is_symlink():
                        self._move_away(path)
                    else:
                        path.unlink(missing_ok=True)
                    with suppress(OSError):  # others of the same package are in it
                        path.parent.rmdir()
                free += sum(_free_bytes(archive) for archive in before - reachable(self.folder))
            self._empty_trash()
        return len(doomed), free

    @contextmanager
    def _lock(self, how: int) -> Iterator[None]:
        """uv's own lock: shared while uv works, exclusive while it prunes or cleans."""
        with storage_errors("lock uv's cache"):
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            deadline = time.monotonic() + self._lock_timeout_s
            while True:
                with storage_errors("lock uv's cache"), suppress(BlockingIOError):
                    fcntl.flock(fd, how | fcntl.LOCK_NB)
                    break
                if time.monotonic() >= deadline:
                    raise LockTimeout(
                        f"uv's cache {self.folder} is in use; waited {self._lock_timeout_s:g} s",
                        hint="try again when uv has ended, or raise RAY_ENVS_LOCK_TIMEOUT_S",
                    )
                time.sleep(_POLL_S)
            yield
        finally:
            os.close(fd)

    def _check_place(self, path: str) -> None:
        """Refuse a path through a link: it would lead into another wheel."""
        place = self.folder / path
        if any(above.is_symlink() for above in place.parents if self.folder in above.parents):
            raise InvalidInput(
                f"{path} leads through a link of uv's cache",
                hint="take it from another node, or from the package index",
            )

    def _let_go(self, archive: Path) -> None:
        """Move `archive` away after its links and pointers: none may lead nowhere."""
        for pointer in list(pointers_to(self.folder, archive)):
            pointer.unlink(missing_ok=True)
        self._move_away(archive)

    def _move_away(self, path: Path) -> None:
        """Take `path` out of uv's sight, whole: half a wheel would be linked as if it were one."""
        with suppress(FileNotFoundError):
            os.rename(path, self.folder / f"{_TRASH}{uuid.uuid4().hex}")

    def _give_up_arriving(self) -> None:
        """Move away what dead processes were receiving; the caller has the exclusive lock."""
        for path in self.folder.glob(f"{_ARRIVING}*"):
            self._move_away(path)

    def _empty_trash(self) -> None:
        """Delete what this and dead processes have moved away. Never raises."""
        for path in self.folder.glob(f"{_TRASH}*"):
            shutil.rmtree(path, ignore_errors=True)


def _free_bytes(path: Path) -> int:
    """The bytes of the files at or below `path` that have no other link."""
    total = 0
    below = (os.path.join(place, name) for place, _, files in os.walk(path) for name in files)
    for file in (str(path), *(() if path.is_symlink() else below)):
        with suppress(OSError):
            status = os.lstat(file)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                total += status.st_size
    return total
