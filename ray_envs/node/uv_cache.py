"""uv's cache on disk; the only module that knows its layout, which is that of uv 0.13.

`archive-v*/<id>` are unpacked wheels. The entries that lead to them: in `wheels-v*`, at
`<index>/<name>/<version>-<tag>`, a link with its pointer (`.http`, `.rev`), metadata (`.msgpack`)
and lock beside it; in `sdists-v*` a link beside each wheel that uv built. Nothing is built or
downloaded here: `builder` runs uv, and `wheels`, above, decides what is damaged.
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
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ray_envs.disk.files import storage_errors
from ray_envs.errors import InvalidInput, LockTimeout
from ray_envs.models import Installed

#: The uv whose layout this is; another one finds, or leaves, a cache that is read differently.
UV_SERIES = "0.13"

#: What stands beside the link of a wheel. The first two say which archive it is, in their text.
_POINTERS = (".http", ".rev")
_SUFFIXES = (*_POINTERS, ".msgpack", ".lock")

#: What is on its way out, below the cache; `uv cache prune` removes folders that it does not know.
_TRASH = ".ray_envs-forgotten-"
#: What is on its way in. Its owner holds the shared lock: under the exclusive one it is rubbish.
_ARRIVING = ".ray_envs-arriving-"

#: How often a waiter tries the lock again, in seconds. Short against any work of uv.
_POLL_S = 0.05

#: How much of a commit uv has in the name of a folder.
_COMMIT_LENGTH = 16

_Release = tuple[str, Version]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What uv keeps of a wheel, or of a source archive with the wheels built from it."""

    #: The packages and versions in it; never empty.
    holds: frozenset[_Release]
    #: Files, links and folders; the pointers first, so that no pointer ever leads nowhere.
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Cached:
    """A package as uv needs it to install it offline."""

    #: The unpacked wheels.
    archives: tuple[Path, ...]
    #: The files and links that lead to them, in the order in which they may appear: each is of no
    #: use, and does no harm, without the next; pointers last.
    leads: tuple[Path, ...]


class UvCache:
    """uv's cache of one node, which uv and several of our processes use at once.

    Calls block: for as long as uv works (up to the time-out), and for as long as deleting takes.

    Args:
        folder: uv's cache folder.
        lock_timeout_s: how long to wait for uv to end, in seconds.
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
        """What there is of a package with the very content that its pin names, if it is complete.

        Of what uv built from source, the source is left out: uv installs offline without it.

        Raises:
            StorageFailed: the cache cannot be read.
        """
        with storage_errors("read uv's cache"):
            built = self._built_of(package) if package.is_built else self._wheels_of(package)
            found = list(built)
        if not found:
            return None
        archives = dict.fromkeys(archive for each in found for archive in each.archives)
        return Cached(tuple(archives), tuple(lead for each in found for lead in each.leads))

    @contextmanager
    def arriving(self) -> Iterator[Path]:
        """A new folder for what shall be moved in during the block; see `move_in`.

        The cache is in use meanwhile (`in_use`), as it is while uv downloads. What a killed
        process leaves of it goes with the next `forget`, `forget_unneeded` or `uv cache prune`.

        Raises:
            LockTimeout, StorageFailed: as `in_use`.
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
                if place.is_dir() and not self._is_led_to(place):
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
        """Keep everybody, uv too, from removing anything of the cache during the block.

        Raises:
            LockTimeout: somebody is removing for longer than we wait.
            StorageFailed: the lock file cannot be made, or the file system has no flock.
        """
        with self._lock(fcntl.LOCK_SH):
            yield

    def forget(self, archive: Path) -> None:
        """Drop a damaged unpacked wheel, so that uv fetches it again; gone already is fine.

        A wheel that uv built itself is unpacked again from uv's copy, without the network.

        Args:
            archive: one of `archives`.

        Raises:
            LockTimeout: uv works for longer than we wait.
            StorageFailed: it cannot be removed.
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

        `uv cache prune` then removes the unpacked wheels that nothing leads to any more. What
        cannot be told to be a certain package and version stays.

        Args:
            needed: the versions of each package that stay.

        Returns:
            How many entries went, and how many bytes that and the pruning free. Files that an
            environment has a link to do not count.

        Raises:
            LockTimeout: uv works for longer than we wait.
            StorageFailed: something cannot be removed.
        """
        wanted = {
            (str(canonicalize_name(name)), parsed)
            for name, versions in needed.items()
            for version in versions
            if (parsed := _version(version)) is not None
        }
        with storage_errors("remove wheels from uv's cache"):
            with self._lock(fcntl.LOCK_EX):
                self._give_up_arriving()
                entries = [*self._wheels(), *self._built()]
                doomed = [entry for entry in entries if not entry.holds & wanted]
                before = self._reachable()
                free = sum(_free_bytes(path) for entry in doomed for path in entry.paths)
                for path in (path for entry in doomed for path in entry.paths):
                    if path.is_dir() and not path.is_symlink():
                        self._move_away(path)
                    else:
                        path.unlink(missing_ok=True)
                    with suppress(OSError):  # others of the same package are in it
                        path.parent.rmdir()
                free += sum(_free_bytes(archive) for archive in before - self._reachable())
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

    def _wheels_of(self, package: Installed) -> Iterator[Cached]:
        """The entries of a downloaded wheel; of each index that it was taken from."""
        release = _release(package.name, package.version)
        pin = package.pin.rpartition(":")[2].encode()
        for kind in ("pypi", "index/*", "url/*"):
            for pointer in self.folder.glob(f"wheels-v*/{kind}/{package.name}/*"):
                if pointer.suffix not in _POINTERS:
                    continue
                link = pointer.with_name(pointer.name[: -len(pointer.suffix)])
                if _release(package.name, link.name.partition("-")[0]) != release:
                    continue
                archive = _unpacked(link)
                text = pointer.read_bytes()
                if archive and pin in text and os.fsencode(archive.name) in text:
                    metadata = link.with_name(f"{link.name}.msgpack")
                    more = (metadata,) if metadata.is_file() else ()
                    yield Cached((archive,), (*more, link, pointer))

    def _built_of(self, package: Installed) -> Iterator[Cached]:
        """The entries of wheels that uv built from the source that is pinned."""
        kind, _, pin = package.pin.partition(":")
        if kind == "git":
            commit = pin.partition(":")[0]
            for folder in self.folder.glob(f"sdists-v*/git/*/{commit[:_COMMIT_LENGTH]}"):
                yield from _built_in(folder, package, ())
            return
        for place in (f"pypi/{package.name}/*", f"index/*/{package.name}/*", "url/*"):
            for pointer in self.folder.glob(f"sdists-v*/{place}/revision.*"):
                text = pointer.read_bytes()
                if pointer.suffix in _POINTERS and pin.encode() in text:
                    for folder in pointer.parent.iterdir():
                        if folder.is_dir() and os.fsencode(folder.name) in text:
                            yield from _built_in(folder, package, (pointer,))

    def _pointers_to(self, archive: Path) -> Iterator[Path]:
        """What leads to `archive`: pointers of uv first, as uv trusts them without the link."""
        links = []
        name = os.fsencode(archive.name)
        for path in self._bucket_files():
            with suppress(OSError):
                if path.is_symlink():
                    if _target(path) == archive:
                        links.append(path)
                elif path.suffix in _POINTERS and name in path.read_bytes():
                    yield path
        yield from links

    def _is_led_to(self, archive: Path) -> bool:
        """Whether uv may use `archive`; the link of a downloaded wheel is nothing on its own."""
        built = tuple(self.folder.glob("sdists-v*"))
        return any(
            not path.is_symlink() or any(bucket in path.parents for bucket in built)
            for path in self._pointers_to(archive)
        )

    def _reachable(self) -> set[Path]:
        """The unpacked wheels that something leads to, in the eyes of `uv cache prune`."""
        return {_target(path) for path in self._bucket_files() if path.is_symlink()}

    def _bucket_files(self) -> Iterator[Path]:
        """Every file and link of the buckets, apart from unpacked source archives."""
        for kind in ("wheels-v*", "sdists-v*"):
            for bucket in self.folder.glob(kind):
                for place, folders, files in os.walk(bucket):
                    links = [name for name in folders if os.path.islink(os.path.join(place, name))]
                    if kind == "sdists-v*":
                        folders[:] = [name for name in folders if name != "src"]
                    yield from (Path(place, name) for name in (*files, *links))

    def _wheels(self) -> Iterator[_Entry]:
        """The entries of downloaded wheels."""
        found: dict[tuple[Path, str], list[Path]] = {}
        for path in self._bucket_files():
            if path.relative_to(self.folder).parts[0].startswith("wheels-v"):
                stem = path.name
                if path.suffix in _SUFFIXES:
                    stem = stem[: -len(path.suffix)]
                found.setdefault((path.parent, stem), []).append(path)
        for (folder, stem), paths in found.items():
            version, dash, _ = stem.partition("-")
            release = _release(folder.name, version)
            if dash and release is not None:
                paths.sort(key=lambda path: (path.suffix not in _POINTERS, path.name))
                yield _Entry(frozenset([release]), tuple(paths))

    def _built(self) -> Iterator[_Entry]:
        """The entries of source archives: those of an index, then those named by the wheels."""
        for kind in ("pypi/*/*", "index/*/*/*"):
            for folder in self.folder.glob(f"sdists-v*/{kind}"):
                release = _release(folder.parent.name, folder.name)
                if release is not None:
                    yield _Entry(frozenset([release]), (folder,))
        for kind in ("url", "path", "git", "editable"):
            for folder in self.folder.glob(f"sdists-v*/{kind}/*"):
                releases = {_release_of_wheel(path.name) for path in folder.glob("*/*.whl")}
                if releases and None not in releases:
                    yield _Entry(frozenset(r for r in releases if r is not None), (folder,))

    def _check_place(self, path: str) -> None:
        """Nothing, if `path` is in the folder that it names: a link leads into another wheel."""
        place = self.folder / path
        if any(above.is_symlink() for above in place.parents if self.folder in above.parents):
            raise InvalidInput(
                f"{path} leads through a link of uv's cache",
                hint="take it from another node, or from the package index",
            )

    def _let_go(self, archive: Path) -> None:
        """Move `archive` away after all that leads to it: nothing ever leads nowhere."""
        for pointer in list(self._pointers_to(archive)):
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
        """Delete what was moved away, by dead processes too; what stays is met again."""
        for path in self.folder.glob(f"{_TRASH}*"):
            shutil.rmtree(path, ignore_errors=True)


def _target(link: Path) -> Path:
    return Path(os.path.normpath(link.parent / os.readlink(link)))


def _unpacked(link: Path) -> Path | None:
    """The unpacked wheel that `link` leads to, if it is there."""
    if not link.is_symlink():
        return None
    archive = _target(link)
    return archive if archive.is_dir() and not archive.is_symlink() else None


def _built_in(folder: Path, package: Installed, pointers: tuple[Path, ...]) -> Iterator[Cached]:
    """The entry of `folder`, where uv built from one source; nothing without a wheel of it."""
    archives: list[Path] = []
    links: list[Path] = []
    files: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "src"]
        for path in sorted(Path(place, name) for name in (*folders, *names)):
            release = _release_of_wheel(f"{path.name}.whl")
            if path.is_symlink():
                archive = _unpacked(path)
                if archive and release and release[0] == package.name:
                    archives.append(archive)
                    links.append(path)
            elif path.is_file() and path.suffix != ".lock" and path.name != ".lock":
                files.append(path)
    if archives:
        yield Cached(tuple(archives), (*files, *links, *pointers))


def _release(name: str, version: str) -> _Release | None:
    """The package and version that uv means by a folder called `name`; None if it means none."""
    parsed = _version(version)
    return (name, parsed) if parsed is not None and canonicalize_name(name) == name else None


def _release_of_wheel(file: str) -> _Release | None:
    try:
        name, version, _, _ = parse_wheel_filename(file)
    except InvalidWheelFilename:
        return None
    return str(name), version


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def _free_bytes(path: Path) -> int:
    """The bytes of the files at or below `path` that nothing else has a link to."""
    total = 0
    below = (os.path.join(place, name) for place, _, files in os.walk(path) for name in files)
    for file in (str(path), *(() if path.is_symlink() else below)):
        with suppress(OSError):
            status = os.lstat(file)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                total += status.st_size
    return total


__all__ = ["UV_SERIES", "Cached", "UvCache"]
