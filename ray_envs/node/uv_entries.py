"""The entries of uv's cache, read: which packages they hold, and what leads to what.

The layout is that of uv 0.9 to 0.13; `uv_trial` tries each uv. `archive-v*/<id>` are unpacked
wheels. What leads to them: in `wheels-v*`, at `<index>/<name>/<version>-<tag>`, a link with its
pointer (`.http`, `.rev`), metadata (`.msgpack`) and lock beside it; in `sdists-v*`, a link beside
each wheel that uv built.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from ray_envs.models import Installed

#: The folders of a cache whose format counts. Their numbers differ between versions of uv.
_BUCKETS = ("archive-v*", "sdists-v*", "wheels-v*")
#: What stands beside the link of a wheel. The first two say which archive it is, in their text.
_POINTERS = (".http", ".rev")
_SUFFIXES = (*_POINTERS, ".msgpack", ".lock")
#: How much of a commit uv has in the name of a folder.
_COMMIT_LENGTH = 16
Release = tuple[str, Version]


@dataclass(frozen=True, slots=True)
class Entry:
    """What uv keeps of a wheel, or of a source archive with the wheels built from it."""

    #: The packages and versions in it; never empty.
    holds: frozenset[Release]
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


def layout_of(cache: Path) -> str:
    """The names of the folders in a cache that one uv has used, as in "archive-v0 sdists-v11"."""
    return " ".join(sorted(path.name for kind in _BUCKETS for path in cache.glob(kind)))


def wheels_of(cache: Path, package: Installed) -> Iterator[Cached]:
    """The entries of a downloaded wheel; of each index that it was taken from."""
    release = _release(package.name, package.version)
    pin = package.pin.rpartition(":")[2].encode()
    for kind in ("pypi", "index/*", "url/*"):
        for pointer in cache.glob(f"wheels-v*/{kind}/{package.name}/*"):
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


def built_of(cache: Path, package: Installed) -> Iterator[Cached]:
    """The entries of wheels that uv built from the source that is pinned."""
    kind, _, pin = package.pin.partition(":")
    if kind == "git":
        commit = pin.partition(":")[0]
        for folder in cache.glob(f"sdists-v*/git/*/{commit[:_COMMIT_LENGTH]}"):
            yield from _built_in(folder, package, ())
        return
    for place in (f"pypi/{package.name}/*", f"index/*/{package.name}/*", "url/*"):
        for pointer in cache.glob(f"sdists-v*/{place}/revision.*"):
            text = pointer.read_bytes()
            if pointer.suffix in _POINTERS and pin.encode() in text:
                for folder in pointer.parent.iterdir():
                    if folder.is_dir() and os.fsencode(folder.name) in text:
                        yield from _built_in(folder, package, (pointer,))


def pointers_to(cache: Path, archive: Path) -> Iterator[Path]:
    """What leads to `archive`: pointers of uv first, as uv trusts them without the link."""
    links = []
    name = os.fsencode(archive.name)
    for path in bucket_files(cache):
        with suppress(OSError):
            if path.is_symlink():
                if _target(path) == archive:
                    links.append(path)
            elif path.suffix in _POINTERS and name in path.read_bytes():
                yield path
    yield from links


def is_led_to(cache: Path, archive: Path) -> bool:
    """Whether uv may use `archive`. The link of a downloaded wheel alone is not enough."""
    built = tuple(cache.glob("sdists-v*"))
    return any(
        not path.is_symlink() or any(bucket in path.parents for bucket in built)
        for path in pointers_to(cache, archive)
    )


def reachable(cache: Path) -> set[Path]:
    """The unpacked wheels that something leads to, in the eyes of `uv cache prune`."""
    return {_target(path) for path in bucket_files(cache) if path.is_symlink()}


def bucket_files(cache: Path) -> Iterator[Path]:
    """Every file and link of the buckets, apart from unpacked source archives."""
    for kind in ("wheels-v*", "sdists-v*"):
        for bucket in cache.glob(kind):
            for place, folders, files in os.walk(bucket):
                links = [name for name in folders if os.path.islink(os.path.join(place, name))]
                if kind == "sdists-v*":
                    folders[:] = [name for name in folders if name != "src"]
                yield from (Path(place, name) for name in (*files, *links))


def wheel_entries(cache: Path) -> Iterator[Entry]:
    """The entries of downloaded wheels."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for path in bucket_files(cache):
        if path.relative_to(cache).parts[0].startswith("wheels-v"):
            stem = path.name
            if path.suffix in _SUFFIXES:
                stem = stem[: -len(path.suffix)]
            found.setdefault((path.parent, stem), []).append(path)
    for (folder, stem), paths in found.items():
        version, dash, _ = stem.partition("-")
        release = _release(folder.name, version)
        if dash and release is not None:
            paths.sort(key=lambda path: (path.suffix not in _POINTERS, path.name))
            yield Entry(frozenset([release]), tuple(paths))


def built_entries(cache: Path) -> Iterator[Entry]:
    """The entries of source archives, by their index or by the names of their wheels."""
    for kind in ("pypi/*/*", "index/*/*/*"):
        for folder in cache.glob(f"sdists-v*/{kind}"):
            release = _release(folder.parent.name, folder.name)
            if release is not None:
                yield Entry(frozenset([release]), (folder,))
    for kind in ("url", "path", "git", "editable"):
        for folder in cache.glob(f"sdists-v*/{kind}/*"):
            releases = {_release_of_wheel(path.name) for path in folder.glob("*/*.whl")}
            if releases and None not in releases:
                yield Entry(frozenset(r for r in releases if r is not None), (folder,))


def _target(link: Path) -> Path:
    return Path(os.path.normpath(link.parent / os.readlink(link)))


def _unpacked(link: Path) -> Path | None:
    """The unpacked wheel that `link` leads to, if it is there."""
    if not link.is_symlink():
        return None
    archive = _target(link)
    return archive if archive.is_dir() and not archive.is_symlink() else None


def _built_in(folder: Path, package: Installed, pointers: tuple[Path, ...]) -> Iterator[Cached]:
    """The entry of `folder`, where uv built from one source, if there is a wheel of it."""
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


def _release(name: str, version: str) -> Release | None:
    """The package and version that uv means by a folder called `name`; None if it means none."""
    parsed = version_of(version)
    return (name, parsed) if parsed is not None and canonicalize_name(name) == name else None


def _release_of_wheel(file: str) -> Release | None:
    try:
        name, version, _, _ = parse_wheel_filename(file)
    except InvalidWheelFilename:
        return None
    return str(name), version


def version_of(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None
