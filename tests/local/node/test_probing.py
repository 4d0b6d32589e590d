"""Probing: each answer is what the node really does, and no folder or disk can make it raise."""

from __future__ import annotations

import fcntl
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest

from ray_envs.models import Target
from ray_envs.node.probing import Probe, probe

HERE = Target(python="3.11.7", ray="2.60.0")
NAMES = [
    "root", "locks", "free space", "free inodes", "links", "open files", "uv", "python", "ray",
]  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A root, a cache and a store."""
    root = tmp_path / "root"
    for folder in (root / "uv-cache", root / "store"):
        folder.mkdir(parents=True)
    return root, root / "uv-cache", root / "store"


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than the temporary files of the tests."""
    places = [place for place in ("/dev/shm", gettempdir()) if os.access(place, os.W_OK)]
    others = [place for place in places if os.stat(place).st_dev != tmp_path.stat().st_dev]
    if not others:
        pytest.skip("this machine has one file system")
    with TemporaryDirectory(dir=others[0]) as folder:
        yield Path(folder)


def probed(
    folders: tuple[Path, Path, Path],
    *,
    min_free_bytes: int = 1,
    expected: Target | None = HERE,
    actual: Target = HERE,
    uv: str = "0.13.9",
    uv_problem: str = "",
) -> dict[str, Probe]:
    """The probes by their names; all of them, whatever was found."""
    found = probe(
        *folders, min_free_bytes=min_free_bytes, expected=expected, actual=actual, uv=uv,
        uv_problem=uv_problem,
    )  # fmt: skip
    assert [each.name for each in found] == NAMES
    assert all(each.value and (each.ok or each.hint) for each in found), found
    return {each.name: each for each in found}


def test_a_good_node_is_good_in_everything_and_nothing_stays_behind(
    folders: tuple[Path, Path, Path],
) -> None:
    found = probed(folders)
    assert [name for name, each in found.items() if not each.ok] == []
    assert found["links"].value in ("reflink", "hard link")
    assert (found["uv"].value, found["python"].value, found["ray"].value) == (
        "0.13.9", "3.11.7", "2.60.0 (tried)",
    )  # fmt: skip
    assert sorted(path.name for path in folders[0].rglob("*")) == ["store", "uv-cache"]


def test_folders_that_are_not_there_are_told(tmp_path: Path) -> None:
    found = probed((tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    bad = [name for name, each in found.items() if not each.ok]
    assert bad == ["root", "locks", "free space", "free inodes", "links"]
    assert found["root"].value == f"No such file or directory: {tmp_path / 'a'}"
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_the_root_is_told(tmp_path: Path) -> None:
    file = tmp_path / "root"
    file.write_text("")
    found = probed((file, file, file))
    assert not any(found[name].ok for name in ("root", "locks", "links"))


def test_a_root_that_may_not_be_written_is_told(unprivileged: Path) -> None:
    if unprivileged.stat().st_uid == os.geteuid():
        unprivileged.chmod(0o555)
    found = probed((unprivileged, unprivileged, unprivileged))
    assert [name for name, each in found.items() if not each.ok] == ["root", "locks", "links"]
    assert "writable" in found["root"].hint


def test_another_disk_means_copies(folders: tuple[Path, Path, Path], other_disk: Path) -> None:
    root, cache, _ = folders
    links = probed((root, cache, other_disk))["links"]
    assert (links.ok, links.value, bool(links.hint)) == (True, "copy", True)
    assert (os.listdir(other_disk), os.listdir(cache)) == ([], [])


def test_a_reflink_is_found_where_the_disk_has_them(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def clone(made: object, request: int, given: int) -> None:
        assert request == 0x40049409
        os.sendfile(made.fileno(), given, 0, 4096)  # type: ignore[attr-defined]

    monkeypatch.setattr(fcntl, "ioctl", clone)
    assert probed(folders)["links"].value == "reflink"
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: None)  # a disk that says so and does nothing
    assert probed(folders)["links"].value == "hard link"


@pytest.mark.parametrize(
    ("answer", "value"),
    [(None, "does not exclude"), (OSError(38, "Function not implemented"), "not implemented")],
)
def test_locks_that_exclude_nobody_are_told(
    folders: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    answer: OSError | None,
    value: str,
) -> None:
    def flock(*_: object) -> None:
        if answer is not None:
            raise answer

    monkeypatch.setattr(fcntl, "flock", flock)
    locks = probed(folders)["locks"]
    assert (locks.ok, value in locks.value, "local disk" in locks.hint) == (False, True, True)


def test_too_little_space_is_told_with_what_is_needed(folders: tuple[Path, Path, Path]) -> None:
    space = probed(folders, min_free_bytes=2**60)["free space"]
    assert (space.ok, str(2**40) in space.hint) == (False, True)


def test_inodes_may_run_out_or_not_be_counted(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(folders[0])

    def with_inodes(total: int, free: int) -> Probe:
        answer = os.statvfs_result((*real[:5], total, free, free, *real[8:]))
        monkeypatch.setattr(os, "statvfs", lambda _: answer)
        return probed(folders)["free inodes"]

    assert with_inodes(10**6, 10**5).ok
    assert (with_inodes(10**6, 5).ok, with_inodes(10**6, 5).value) == (False, "5")
    uncounted = with_inodes(0, 0)
    assert (uncounted.ok, "does not count" in uncounted.value) == (True, True)


@pytest.mark.parametrize(
    ("limit", "value", "has_hint"),
    [(1024, "1024", True), (4096, "4096", False), (resource.RLIM_INFINITY, "unlimited", False)],
)
def test_a_low_limit_of_open_files_is_a_hint(
    folders: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    value: str,
    has_hint: bool,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    files = probed(folders)["open files"]
    assert (files.ok, files.value, bool(files.hint)) == (True, value, has_hint)


def test_versions_are_those_of_the_cluster_to_the_last_digit(
    folders: tuple[Path, Path, Path],
) -> None:
    other = Target(python="3.11.8", ray="2.60.1")
    found = probed(folders, expected=other)
    assert [name for name, each in found.items() if not each.ok] == ["python", "ray"]
    assert "2.60.1" in found["ray"].hint
    assert all(each.ok for each in probed(folders, expected=None).values())
    missing = probed(folders, expected=None, actual=Target(python="3.11.7", ray=""))["ray"]
    assert (missing.ok, missing.value) == (False, "not installed")


@pytest.mark.parametrize(("version", "problem"), [("", ""), ("", "why"), ("0.99.1", "why")])
def test_a_uv_that_cannot_be_used_is_told_with_the_reason(
    folders: tuple[Path, Path, Path], version: str, problem: str
) -> None:
    found = probed(folders, uv=version, uv_problem=problem)["uv"]
    assert (found.ok, found.value) == (False, problem or "not installed")


def test_a_ray_that_was_not_tried_is_good_and_told(folders: tuple[Path, Path, Path]) -> None:
    newer = Target(python="3.11.7", ray="2.99.0")
    found = probed(folders, expected=newer, actual=newer)["ray"]
    assert found.ok
    assert found.value.startswith("2.99.0 (not one of the tried versions: 2.51.2,")


def test_no_probe_ever_raises(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("not even an OSError")

    for place, name in (
        (os, "statvfs"), (fcntl, "flock"), (tempfile, "mkstemp"),
        (resource, "getrlimit"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, fail)
    found = probed(folders)
    assert [name for name, each in found.items() if each.ok] == ["uv", "python", "ray"]
