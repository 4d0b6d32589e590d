"""The files of an environment, compared with the RECORDs of their wheels.

A RECORD protects from accidents, not from malice: a file that was changed together with its hash is
not seen. Format: PyPA, "Recording installed projects". `mending` repairs what is found here.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import importlib.util
import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.utils import canonicalize_name

from ray_envs.disk.files import has_vanished, storage_errors
from ray_envs.validation import Model
from ray_envs.worker.hold import INSTALLED_AS

Kind = Literal["missing", "changed", "extra"]
#: The files of one wheel, relative to site-packages, with "<algorithm>=<digest>"; "" without one.
Rows = dict[str, str]
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
    """The files that do not match the RECORDs of the wheels, sorted.

    Every file with a hash is read. An unreadable RECORD counts as one changed file: what it names
    is not known, and then no file is called extra either.

    Byte-code has no hash that means something: it is made here, and uv drops a wheel's own. It
    counts as changed where Python would use it although it was compiled from another source than
    the good one that is there. A flipped bit in it is not seen.

    Args:
        site_packages: the folder of the environment.
        packages: names and versions that must be there; without it, a package that is gone
            together with its RECORD is not missed.

    Raises `StorageFailed`: the folder cannot be read.
    """
    with storage_errors(f"check the packages in {site_packages}"):
        found: list[Damage] = []
        wheels: list[tuple[str, Rows]] = []
        installed = set()
        infos = dist_infos(site_packages)
        for info in infos:
            package = package_of(info)
            installed.add(package)
            rows = read_record(site_packages, info)
            if isinstance(rows, dict):
                wheels.append((package, rows))
            else:
                found.append(Damage(package=package, path=f"{info}/RECORD", kind=rows))
        for name, version in (packages or {}).items():
            if canonicalize_name(name) not in installed:
                path = f"{canonicalize_name(name).replace('-', '_')}-{version}.dist-info/RECORD"
                found.append(Damage(package=canonicalize_name(name), path=path, kind="missing"))
        if packages is not None:  # installed by hand, with a RECORD
            locked = {canonicalize_name(name) for name in packages}
            for info in infos:
                if package_of(info) not in locked:
                    path = f"{info}/RECORD"
                    found.append(Damage(package=package_of(info), path=path, kind="extra"))
        if len(wheels) == len(infos):
            found += _extra(site_packages, (path for _, rows in wheels for path in rows))
        found += damaged(site_packages, wheels)
    return sorted(found, key=lambda each: (each.package, each.path, each.kind))


def dist_infos(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(each.name for each in entries if each.name.endswith(".dist-info"))


def package_of(info: str) -> str:
    return str(canonicalize_name(info.removesuffix(".dist-info").rpartition("-")[0]))


def read_record(folder: Path, info: str) -> Rows | Literal["missing", "changed"]:
    """The rows of the RECORD of `info` below `folder`, or what is wrong with it."""
    name = f"{info}/RECORD"
    try:
        with _opened(place_of(folder, name)) as file:
            rows = list(csv.reader(io.StringIO(file.read().decode("utf-8"), newline="")))
    except OSError as exc:
        return _kind_of_error(exc)
    except (ValueError, csv.Error):
        return "changed"
    if any(len(row) != 3 or "\0" in row[0] for row in rows if row):
        return "changed"
    found = {row[0]: row[1] for row in rows if row}
    return found if name in found else "changed"


def place_of(folder: Path, path: str) -> str:
    """Where the file of a row stands; `..` by name, as installers write it."""
    return os.path.normpath(os.path.join(folder, path))


def is_bytecode(path: str) -> bool:
    return path.endswith(".pyc") and os.path.basename(os.path.dirname(path)) == "__pycache__"


def _extra(site_packages: Path, named: Iterable[str]) -> Iterator[Damage]:
    known = {place_of(site_packages, path) for path in named}
    for place, folders, files in os.walk(site_packages):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in (*files, *links):
            path = os.path.join(place, name)
            if path not in known and not name.startswith(_OURS):
                yield Damage(package="", path=os.path.relpath(path, site_packages), kind="extra")


def damaged(folder: Path, wheels: Iterable[tuple[str, Rows]]) -> list[Damage]:
    """The files of `wheels` below `folder` that are not there or not as their rows say.

    Wheels overwrite each other's files, `tests/__init__.py` for one: such a file is good where it
    is as one of them has it.
    """
    claims: dict[str, list[tuple[str, str]]] = {}
    for package, rows in wheels:
        for path, digest in rows.items():
            if digest and not is_bytecode(path):
                claims.setdefault(path, []).append((package, digest))
    jobs = list(claims.items())
    shares = [jobs[start : start + _SHARE] for start in range(0, len(jobs), _SHARE)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        return [each for found in pool.map(partial(_check, folder), shares) for each in found]


def _check(folder: Path, jobs: list[tuple[str, list[tuple[str, str]]]]) -> list[Damage]:
    found = []
    for path, claims in jobs:
        place = place_of(folder, path)
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
        return True  # this Python cannot compute such a hash
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


def source_of(path: str) -> str:
    """The module whose byte-code `path` is; `path` itself, where it is none."""
    if not (is_bytecode(path) and path.endswith(_BYTECODE)):
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

    Raises `OSError`: there is none; ENXIO for what is no regular file.
    """
    fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "is no regular file", place)
    return io.FileIO(fd)


def _kind_of_error(exc: OSError) -> Literal["missing", "changed"]:
    """The kind of damage of a file that cannot be read.

    Raises `OSError`: `exc`, if it is no damage of the file.
    """
    if has_vanished(exc):
        return "missing"
    if exc.errno in _DAMAGED:
        return "changed"
    raise exc
