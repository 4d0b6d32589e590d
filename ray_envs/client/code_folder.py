"""The code folder of a batch: which files belong to it, and the archive that workers get.

The worker unpacks that archive. `entrypoints` checks the function that the batch calls.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from ray_envs.disk.files import (
    check_folder,
    entries_of,
    has_vanished,
    is_file,
    read_at_most,
    unreadable,
)
from ray_envs.errors import InvalidInput

#: The size limit of a code folder. A guess: code is kilobytes, and every worker gets all of it.
CODE_LIMIT_BYTES = 100 * 1024 * 1024

#: The most files and folders that are looked at: far more than code has.
_MOST_ENTRIES = 50_000

#: Never part of the code: version control, environments, caches, results.
_SKIPPED_NAMES = frozenset({".git", ".hg"})
_SKIPPED_FOLDERS = frozenset(
    {".venv", "venv", "node_modules", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
)
_SKIPPED_FILES = ("*.pyc", "*.results.jsonl*")

#: The earliest moment that a zip archive can hold.
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def source_sha256(folder: Path) -> str:
    """Return a hash of the Python files of a code folder, on which a result depends.

    Other files do not count: a batch file in the folder changes with every new case.
    """
    digest = hashlib.sha256()
    _, archive = pack_code(folder)
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name in files.namelist():
            if name.endswith(".py"):
                digest.update(f"{name}\0{files.getinfo(name).CRC}\0".encode())
    return digest.hexdigest()


def pack_code(folder: Path, *, limit_bytes: int = CODE_LIMIT_BYTES) -> tuple[str, bytes]:
    """Return the archive of a code folder as (sha256 in hex, zip bytes).

    Equal content gives equal bytes on every machine: names are sorted, time stamps and modes are
    fixed, and nothing is compressed, because zlib versions compress differently. Left out: version
    control, caches, environments, result files, links to folders or to the outside, and files that
    vanish meanwhile.

    Raises `InvalidInput`: no such folder, too large, too many files, or a file cannot be read.
    """
    check_folder(folder, f"the code folder {str(folder)!r}", where="code")
    root = folder.resolve()
    sizes: Counter[str] = Counter()
    files = sorted(_code_files(root, root, count(1)))
    for name, path in files:
        try:
            sizes[name] = path.stat().st_size
        except OSError:
            sizes[name] = 0  # reading it, below, raises the error
    _check_size(sizes, folder, limit_bytes)

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, path in files:
            try:
                content = read_at_most(path, limit_bytes + 1)
            except OSError as err:
                if has_vanished(err):
                    continue
                raise unreadable(path, err) from None
            sizes[name] = len(content)  # it may have grown since it was measured
            _check_size(sizes, folder, limit_bytes)
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.create_system = 3  # Unix, whatever this machine is
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, content)
    content = packed.getvalue()
    return hashlib.sha256(content).hexdigest(), content


def _code_files(
    folder: Path, root: Path, entry_numbers: Iterator[int]
) -> Iterator[tuple[str, Path]]:
    """Yield (archive name, path) of every regular file below `folder` that belongs to the code."""
    for entry in entries_of(folder):
        if next(entry_numbers) > _MOST_ENTRIES:
            raise InvalidInput(
                f"the code folder has more than {_MOST_ENTRIES:,} files and folders",
                where=str(root),
                hint="point code at a folder with the module alone",
            )
        path = Path(entry.path)
        if entry.name in _SKIPPED_NAMES:
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS and not is_file(path / "pyvenv.cfg"):
                yield from _code_files(path, root, entry_numbers)
            continue
        if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _SKIPPED_FILES):
            continue
        if entry.is_symlink() and not _leads_inside(path, root):
            continue
        if is_file(path):  # not a pipe or device: reading one may wait for ever
            yield _archive_name(path, root), path


def _archive_name(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InvalidInput(
            f"the file name {os.fsencode(name)!r} is not UTF-8",
            where=str(root),
            hint="rename the file or keep it outside the code folder",
        ) from None
    return name


def _leads_inside(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):  # a broken link; RuntimeError: a loop, before Python 3.13
        return False


def _check_size(sizes: Counter[str], folder: Path, limit_bytes: int) -> None:
    total = sum(sizes.values())
    if total <= limit_bytes:
        return
    entries: Counter[str] = Counter()
    for name, size in sizes.items():
        first, slash, _ = name.partition("/")
        entries[first + slash] += size
    biggest = ", ".join(f"{name} ({_mib(size)})" for name, size in entries.most_common(3))
    raise InvalidInput(
        f"the code folder holds {_mib(total)}, more than {_mib(limit_bytes)}; biggest: {biggest}",
        where=str(folder),
        hint="keep data outside the code folder, or point code at a folder with the module alone",
    )


def _mib(size: int) -> str:
    return f"{size / 1024 / 1024:.1f} MiB"
