"""The wheels of an environment against their own RECORDs, and how damage is mended.

Paths in, values out: `store` knows the paths, `agent` decides what follows. Good files come from
uv's cache (`uv_cache`), never from the network. A RECORD protects from accidents, not from malice:
who changes a file and its hash is not seen. Format of RECORD: PyPA, "Recording installed projects".
"""

from __future__ import annotations

import base64
import csv
import errno
import glob
import hashlib
import importlib.util
import io
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.utils import canonicalize_name

from ray_envs.disk.files import has_vanished, storage_errors
from ray_envs.models import Model
from ray_envs.node.uv_cache import UvCache
from ray_envs.worker.hold import INSTALLED_AS

Kind = Literal["missing", "changed", "extra"]
#: The files of one wheel, relative to site-packages, with "<algorithm>=<digest>"; "" without one.
_Rows = dict[str, str]

#: What is found beside the wheels and belongs there: our own, the marker of complete byte-code,
#: what uv puts into a virtual environment, and what `_put` leaves where it is killed.
_OURS = (f"{INSTALLED_AS}.", "ray_envs-bytecode.", "_virtualenv.", ".ray_envs-mend-")

#: A file that is read in one piece, in bytes: nearly all, and every module.
_SMALL = 1024 * 1024
#: How many files a thread takes at once.
_SHARE = 64

#: A file that answers with one of these is damaged; other errors say something about us.
_DAMAGED = frozenset([errno.EACCES, errno.EIO, errno.ELOOP, errno.ENXIO, errno.EPERM])

#: Flags in the second word of byte-code (PEP 552): used whatever its source is by now.
_UNCHECKED = 1
#: How the name of byte-code of this Python ends.
_BYTECODE = f".{sys.implementation.cache_tag}.pyc"


class Damage(Model):
    """One file of an environment that is not as its wheel has it."""

    #: The package that it belongs to; "" for an extra file, which belongs to none.
    package: str
    #: As in RECORD: relative to site-packages, with `../` for what stands outside.
    path: str
    kind: Kind


def inspect(site_packages: Path, *, packages: Mapping[str, str] | None = None) -> list[Damage]:
    """What is not as the wheels' RECORDs say, sorted; nothing for an environment as uv made it.

    Every file with a hash is read. An unreadable RECORD counts as one changed file: what it names
    is not known, and then no file is called extra either.

    Byte-code has no hash that means something: it is made here, and uv drops a wheel's own. It
    counts as changed where Python would use it although it was compiled from another source than
    the good one that is there. A flipped bit in it is not seen.

    Args:
        site_packages: the folder of the environment.
        packages: names and versions that must be there; without it, a package that is gone
            together with its RECORD is not missed.

    Raises:
        StorageFailed: the folder cannot be read.
    """
    with storage_errors(f"check the packages in {site_packages}"):
        found: list[Damage] = []
        wheels: list[tuple[str, _Rows]] = []
        installed = set()
        infos = _dist_infos(site_packages)
        for info in infos:
            package = _package_of(info)
            installed.add(package)
            rows = _read_record(site_packages, info)
            if isinstance(rows, dict):
                wheels.append((package, rows))
            else:
                found.append(Damage(package=package, path=f"{info}/RECORD", kind=rows))
        for name, version in (packages or {}).items():
            if canonicalize_name(name) not in installed:
                path = f"{canonicalize_name(name).replace('-', '_')}-{version}.dist-info/RECORD"
                found.append(Damage(package=canonicalize_name(name), path=path, kind="missing"))
        if packages is not None:  # installed by somebody, with a RECORD of its own
            locked = {canonicalize_name(name) for name in packages}
            for info in infos:
                if _package_of(info) not in locked:
                    path = f"{info}/RECORD"
                    found.append(Damage(package=_package_of(info), path=path, kind="extra"))
        if len(wheels) == len(infos):
            found += _extra(site_packages, (path for _, rows in wheels for path in rows))
        found += _damaged(site_packages, wheels)
    return sorted(found, key=lambda each: (each.package, each.path, each.kind))


def mend(
    site_packages: Path, damage: Sequence[Damage], cache: UvCache
) -> tuple[list[Damage], list[str]]:
    """Put good files from uv's cache in the place of missing and changed ones.

    A file is replaced, never written into: the cache and other environments share it. A wheel in
    the cache gives files only where all of it is as its RECORD says; else it is forgotten. Modules
    get its byte-code, or none where it has none. Extra files stay.

    Args:
        site_packages: the folder of the environment.
        damage: the result of `inspect`, or a part of it.
        cache: the cache that the environment was linked from.

    Returns:
        What is still damaged, and the packages that uv must fetch into the cache (with a sync of
        a scratch environment) before another call can mend more. What is damaged and is no file
        of a package to fetch was made by uv at install time: the environment must be built again.

    Raises:
        LockTimeout: uv works for longer than `cache` waits. Calling again is safe.
        StorageFailed: a file cannot be put in its place.
    """
    left: list[Damage] = []
    to_fetch: list[str] = []
    bad: list[Path] = []
    by_package: dict[str, list[Damage]] = {}
    for each in damage:
        if each.kind != "extra":
            by_package.setdefault(each.package, []).append(each)
    with storage_errors(f"mend the packages in {site_packages}"):
        with cache.in_use():
            archives = cache.archives()
            for package, broken in by_package.items():
                unmended, damaged, is_lacking = _mend(site_packages, package, broken, archives)
                left += unmended
                bad += damaged
                if damaged or is_lacking:
                    to_fetch.append(package)
        for archive in bad:
            cache.forget(archive)
    return sorted(left, key=lambda each: (each.package, each.path, each.kind)), sorted(to_fetch)


def sharers(site_packages: Path, damage: Iterable[Damage], others: Iterable[Path]) -> list[Path]:
    """Those of `others` that have the very same changed file, and so the same damage.

    To be asked before `mend`, which parts them.

    Args:
        site_packages: the folder of the environment that is damaged.
        damage: the result of `inspect`.
        others: the site-packages folders of other environments.
    """
    # What belongs to no package is not from the cache: all environments share their base Python.
    changed = {each.path for each in damage if each.kind == "changed" and each.package}
    ours = {path: identity for path in changed if (identity := _identity(site_packages, path))}
    return [
        other
        for other in others
        if other != site_packages
        and any(_identity(other, path) == identity for path, identity in ours.items())
    ]


def _identity(site_packages: Path, path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        status = os.stat(_place(site_packages, path))
        return status.st_dev, status.st_ino
    return None


# -- what RECORDs say


def _dist_infos(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(each.name for each in entries if each.name.endswith(".dist-info"))


def _package_of(info: str) -> str:
    return str(canonicalize_name(info.removesuffix(".dist-info").rpartition("-")[0]))


def _read_record(folder: Path, info: str) -> _Rows | Literal["missing", "changed"]:
    """The rows of the RECORD of `info` below `folder`, or what is wrong with it."""
    name = f"{info}/RECORD"
    try:
        with _opened(_place(folder, name)) as file:
            rows = list(csv.reader(io.StringIO(file.read().decode("utf-8"), newline="")))
    except OSError as exc:
        return _kind_of_error(exc)
    except (ValueError, csv.Error):
        return "changed"
    if any(len(row) != 3 or "\0" in row[0] for row in rows if row):
        return "changed"
    found = {row[0]: row[1] for row in rows if row}
    return found if name in found else "changed"


def _place(folder: Path, path: str) -> str:
    """Where the file of a row stands; `..` by name, as installers write it."""
    return os.path.normpath(os.path.join(folder, path))


def _is_bytecode(path: str) -> bool:
    return path.endswith(".pyc") and os.path.basename(os.path.dirname(path)) == "__pycache__"


def _extra(site_packages: Path, named: Iterable[str]) -> Iterator[Damage]:
    known = {_place(site_packages, path) for path in named}
    for place, folders, files in os.walk(site_packages):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in (*files, *links):
            path = os.path.join(place, name)
            if path not in known and not name.startswith(_OURS):
                yield Damage(package="", path=os.path.relpath(path, site_packages), kind="extra")


# -- what files are


def _damaged(folder: Path, wheels: Iterable[tuple[str, _Rows]]) -> list[Damage]:
    """The files of `wheels` below `folder` that are not there or not as their rows say.

    Wheels overwrite each other's files, `tests/__init__.py` for one: such a file is good where it
    is as one of them has it.
    """
    claims: dict[str, list[tuple[str, str]]] = {}
    for package, rows in wheels:
        for path, digest in rows.items():
            if digest and not _is_bytecode(path):
                claims.setdefault(path, []).append((package, digest))
    jobs = list(claims.items())
    shares = [jobs[start : start + _SHARE] for start in range(0, len(jobs), _SHARE)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return [each for found in pool.map(partial(_check, folder), shares) for each in found]


def _check(folder: Path, jobs: list[tuple[str, list[tuple[str, str]]]]) -> list[Damage]:
    found = []
    for path, claims in jobs:
        place = _place(folder, path)
        wrong, kind = path, None
        try:
            with _opened(place) as file:
                content = file.read() if os.fstat(file.fileno()).st_size <= _SMALL else None
                if not any(_has_hash(file, content, digest) for _, digest in claims):
                    kind = "changed"
            if kind is None and path.endswith(".py") and _is_stale(_bytecode_of(place), content):
                wrong, kind = _bytecode_of(path), "changed"
        except OSError as exc:
            kind = _kind_of_error(exc)
        if kind is not None:
            found.append(Damage(package=claims[0][0], path=wrong, kind=kind))
    return found


def _has_hash(file: io.FileIO, content: bytes | None, digest: str) -> bool:
    """Whether the content of `file`, read already where it is small, has the hash `digest`."""
    algorithm, _, wanted = digest.partition("=")
    if algorithm not in hashlib.algorithms_guaranteed or algorithm.startswith("shake"):
        return True  # a hash that this Python cannot make tells us nothing
    made = hashlib.new(algorithm, content or b"", usedforsecurity=False)
    if content is None:
        file.seek(0)
        buffer = bytearray(_SMALL)
        while size := file.readinto(buffer):
            made.update(memoryview(buffer)[:size])
    return base64.urlsafe_b64encode(made.digest()).decode().rstrip("=") == wanted.rstrip("=")


def _bytecode_of(path: str) -> str:
    """Where this Python looks for the byte-code of the module `path`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, "__pycache__", name.removesuffix(".py") + _BYTECODE)


def _source_of(path: str) -> str:
    """The module whose byte-code `path` is; `path` itself, where it is none."""
    if not (_is_bytecode(path) and path.endswith(_BYTECODE)):
        return path
    folder, name = os.path.split(path)
    return os.path.join(os.path.dirname(folder), name.removesuffix(_BYTECODE) + ".py")


def _is_stale(bytecode: str, source: bytes | None) -> bool:
    """Whether Python would run the file `bytecode` although it is not that of `source`."""
    if source is None:  # a module of that size is data
        return False
    try:
        with _opened(bytecode) as file:
            header = file.read(16)
    except OSError:
        return False
    is_used = header[:4] == importlib.util.MAGIC_NUMBER and len(header) == 16
    is_unchecked = int.from_bytes(header[4:8], "little") == _UNCHECKED
    return is_used and is_unchecked and header[8:] != importlib.util.source_hash(source)


def _opened(place: str) -> io.FileIO:
    """The regular file `place`, open for reading; a pipe there would keep us for ever.

    Raises:
        OSError: there is none; ENXIO for what is no regular file.
    """
    fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "is no regular file", place)
    return io.FileIO(fd)


def _kind_of_error(exc: OSError) -> Literal["missing", "changed"]:
    """What it says about a file that it cannot be read.

    Raises:
        OSError: `exc`, where it says nothing about the file.
    """
    if has_vanished(exc):
        return "missing"
    if exc.errno in _DAMAGED:
        return "changed"
    raise exc


# -- mending


def _mend(
    site_packages: Path, package: str, broken: list[Damage], archives: Mapping[str, list[Path]]
) -> tuple[list[Damage], list[Path], bool]:
    """Mend one package.

    Returns:
        What is left, the damaged archives, and whether the cache has no good one.
    """
    infos = [info for info in _dist_infos(site_packages) if _package_of(info) == package]
    rows = _read_record(site_packages, infos[0]) if len(infos) == 1 else "missing"
    wanted: dict[str, list[Damage]] = {}
    left = []
    for each in broken:
        path = _source_of(each.path)
        if isinstance(rows, dict) and rows.get(path):
            wanted.setdefault(path, []).append(each)
        else:
            left.append(each)
    if not wanted:
        return left, [], False
    assert isinstance(rows, dict)
    good, bad = _sorted_out(archives.get(infos[0], []), infos[0], site_packages, rows)
    for path, damages in wanted.items():
        place = Path(_place(site_packages, path))
        sources = (
            archive / source
            for archive, its_rows in good
            if (source := _offered(its_rows, path, rows[path])) is not None
        )
        if not any(_replace(source, place, site_packages) for source in sources):
            left += damages
    return left, bad, not good


def _sorted_out(
    archives: Iterable[Path], info: str, site_packages: Path, rows: _Rows
) -> tuple[list[tuple[Path, _Rows]], list[Path]]:
    """The good archives of an installed wheel with their rows, and the bad ones.

    An archive with other rows, that the environment is not linked to, is left out: it is the same
    version for another platform, or another build.
    """
    good: list[tuple[Path, _Rows]] = []
    bad: list[Path] = []
    for archive in archives:
        its_rows = _read_record(archive, info)
        if not isinstance(its_rows, dict):
            bad.append(archive)
            continue
        is_same = all(
            rows.get(path) == digest
            for path, digest in its_rows.items()
            if digest and not _is_bytecode(path) and not _is_data(path)
        )
        wheel = _identity(archive, f"{info}/WHEEL")
        is_linked = wheel is not None and wheel == _identity(site_packages, f"{info}/WHEEL")
        if is_same and not _damaged(archive, [(_package_of(info), its_rows)]):
            good.append((archive, its_rows))
        elif is_same or is_linked:
            bad.append(archive)
    return good, bad


def _is_data(path: str) -> bool:
    """Whether a row of a wheel is of its data, which is installed elsewhere."""
    return path.partition("/")[0].endswith(".data")


def _offered(rows: _Rows, path: str, digest: str) -> str | None:
    """Where a wheel with these rows has the file that is installed as `path`, if it does.

    Not from `*.data/scripts`: uv rewrites what stands there and makes it executable.
    """
    if rows.get(path) == digest:
        return path
    for source, its_digest in rows.items():
        is_script = source.split("/")[1:2] == ["scripts"]
        is_same = its_digest == digest and os.path.basename(source) == os.path.basename(path)
        if _is_data(source) and is_same and not is_script:
            return source
    return None


def _replace(source: Path, place: Path, site_packages: Path) -> bool:
    """Put `source`, and its byte-code if it is a module, in the place of `place`.

    Returns whether that could be done: not where a folder is in the way, or a link leads out of
    the environment.
    """
    venv = os.path.realpath(site_packages.parents[2])
    if not os.path.realpath(place.parent).startswith(venv + os.sep):
        return False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _put(source, place)
        if place.suffix == ".py":
            _replace_bytecode(source, place)
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        return False
    return True


def _replace_bytecode(source: Path, place: Path) -> None:
    """Give the module `place` the byte-code that `source` has, and no other."""
    pattern = f"__pycache__/{glob.escape(place.stem)}.*.pyc"
    fresh = {each.name: each for each in source.parent.glob(pattern)}
    for old in place.parent.glob(pattern):
        if old.name not in fresh:
            old.unlink(missing_ok=True)
    for name, each in fresh.items():
        folder = place.parent / "__pycache__"
        folder.mkdir(exist_ok=True)
        _put(each, folder / name)


def _put(source: Path, place: Path) -> None:
    """Link `source`, or copy it where that does not work, in the place of `place`, at once."""
    scratch = place.with_name(f".ray_envs-mend-{uuid.uuid4().hex}")
    try:
        try:
            os.link(source, scratch)
        except OSError:
            shutil.copy2(source, scratch)
        os.replace(scratch, place)
    finally:
        # It is still there where both were the same file: then renaming does nothing.
        scratch.unlink(missing_ok=True)


__all__ = ["Damage", "inspect", "mend", "sharers"]
