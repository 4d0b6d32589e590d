"""Repairs damaged files of an environment with good ones from uv's cache, never from the network.

A file is replaced, never written into: the cache and other environments share it.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ray_envs.disk.files import storage_errors
from ray_envs.node.uv_cache import UvCache
from ray_envs.node.wheels import (
    Damage,
    Rows,
    damaged,
    dist_infos,
    is_bytecode,
    package_of,
    place_of,
    read_record,
    source_of,
)  # fmt: skip


def mend(
    site_packages: Path, damage: Sequence[Damage], cache: UvCache
) -> tuple[list[Damage], list[str]]:
    """Replace missing and changed files by good ones from uv's cache.

    A file is replaced, never written into: the cache and other environments share it. A wheel in
    the cache is used only if it matches its RECORD completely; else it is forgotten. Modules
    get its byte-code, or none where it has none. Extra files stay.

    Returns:
        What is still damaged, and the packages that uv must fetch into the cache (with a sync of
        a scratch environment) before another call can repair more. What is damaged and is no file
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
    with storage_errors(f"repair the packages in {site_packages}"):
        with cache.in_use():
            archives = cache.archives()
            for package, broken in by_package.items():
                unmended, worse, is_lacking = _mend(site_packages, package, broken, archives)
                left += unmended
                bad += worse
                if worse or is_lacking:
                    to_fetch.append(package)
        for archive in bad:
            cache.forget(archive)
    return sorted(left, key=lambda each: (each.package, each.path, each.kind)), sorted(to_fetch)


def sharers(site_packages: Path, damage: Iterable[Damage], others: Iterable[Path]) -> list[Path]:
    """The environments in `others` that share a changed file, and so the damage.

    Call it before `mend`, which gives the repaired one a file of its own.
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
        status = os.stat(place_of(site_packages, path))
        return status.st_dev, status.st_ino
    return None


def _mend(
    site_packages: Path, package: str, broken: list[Damage], archives: Mapping[str, list[Path]]
) -> tuple[list[Damage], list[Path], bool]:
    """Repair one package.

    Returns what is left, the damaged archives, and whether the cache has no good one.
    """
    infos = [info for info in dist_infos(site_packages) if package_of(info) == package]
    rows = read_record(site_packages, infos[0]) if len(infos) == 1 else "missing"
    wanted: dict[str, list[Damage]] = {}
    left = []
    for each in broken:
        path = source_of(each.path)
        if isinstance(rows, dict) and rows.get(path):
            wanted.setdefault(path, []).append(each)
        else:
            left.append(each)
    if not wanted:
        return left, [], False
    assert isinstance(rows, dict)
    good, bad = _sorted_out(archives.get(infos[0], []), infos[0], site_packages, rows)
    for path, damages in wanted.items():
        place = Path(place_of(site_packages, path))
        sources = (
            archive / source
            for archive, its_rows in good
            if (source := _offered(its_rows, path, rows[path])) is not None
        )
        if not any(_replace(source, place, site_packages) for source in sources):
            left += damages
    return left, bad, not good


def _sorted_out(
    archives: Iterable[Path], info: str, site_packages: Path, rows: Rows
) -> tuple[list[tuple[Path, Rows]], list[Path]]:
    """The good archives of an installed wheel with their rows, and the bad ones.

    An archive with other rows, that the environment is not linked to, is left out: it is the same
    version for another platform, or another build.
    """
    good: list[tuple[Path, Rows]] = []
    bad: list[Path] = []
    for archive in archives:
        its_rows = read_record(archive, info)
        if not isinstance(its_rows, dict):
            bad.append(archive)
            continue
        is_same = all(
            rows.get(path) == digest
            for path, digest in its_rows.items()
            if digest and not is_bytecode(path) and not _is_data(path)
        )
        wheel = _identity(archive, f"{info}/WHEEL")
        is_linked = wheel is not None and wheel == _identity(site_packages, f"{info}/WHEEL")
        if is_same and not damaged(archive, [(package_of(info), its_rows)]):
            good.append((archive, its_rows))
        elif is_same or is_linked:
            bad.append(archive)
    return good, bad


def _is_data(path: str) -> bool:
    """Whether a row of a wheel is of its data, which is installed elsewhere."""
    return path.partition("/")[0].endswith(".data")


def _offered(rows: Rows, path: str, digest: str) -> str | None:
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
        # It still exists if both were the same file: then renaming does nothing.
        scratch.unlink(missing_ok=True)
