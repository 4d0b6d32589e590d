"""Code folders: packed the same everywhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

import pytest

from ray_envs.client import code_folder
from ray_envs.client.code_folder import pack_code
from ray_envs.disk.files import read_at_most
from ray_envs.errors import InvalidInput


def written(path: Path, text: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def closed(path: Path) -> Path:
    """`path`, written by its owner and readable for nobody."""
    user = os.geteuid()
    os.seteuid(os.getuid())
    written(path, "x").chmod(0)
    os.seteuid(user)
    return path


def names_in(content: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def test_equal_folders_give_equal_archives_whatever_their_times_and_modes(tmp_path: Path) -> None:
    for name, order in (("a", ("x.py", "sub/y.txt")), ("b", ("sub/y.txt", "x.py"))):
        for file in order:
            written(tmp_path / name / file, file)
    os.utime(tmp_path / "b" / "x.py", (1, 1))
    (tmp_path / "b" / "x.py").chmod(0o700)
    (tmp_path / "b" / "empty").mkdir()
    digest, content = pack_code(tmp_path / "a")
    assert pack_code(tmp_path / "b") == (digest, content)
    assert digest == hashlib.sha256(content).hexdigest()
    assert names_in(content) == ["sub/y.txt", "x.py"]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("x.py") == b"x.py"

    written(tmp_path / "b" / "x.py", "other")
    assert pack_code(tmp_path / "b")[0] != digest


def test_caches_environments_results_and_version_control_are_left_out(tmp_path: Path) -> None:
    kept = ["digits.py", "pkg/__init__.py", "pkg/data.json", "venv.py", "results.jsonl"]
    left_out = [
        ".git/config",
        "pkg/.git",
        ".hg/x",
        ".venv/a.py",
        "pkg/venv/a.py",
        "node_modules/a.js",
        "pkg/__pycache__/a.py",
        "old.pyc",
        ".mypy_cache/a",
        ".pytest_cache/a",
        ".ruff_cache/a",
        "myenv/pyvenv.cfg",
        "myenv/lib/a.py",
        "batch.results.jsonl",
        "batch.results.jsonl.previous",
    ]
    for name in kept + left_out:
        written(tmp_path / name, name)
    assert names_in(pack_code(tmp_path)[1]) == sorted(kept)


def test_only_links_to_files_inside_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    written(folder / "sub" / "real.py", "1")
    secret = written(tmp_path / "secret.txt", "2")
    (folder / "alias.py").symlink_to("sub/real.py")
    (folder / "outside.txt").symlink_to(secret)
    (folder / "up").symlink_to("..")
    (folder / "again").symlink_to("sub")
    (folder / "broken").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (tmp_path / "entry").symlink_to("code")
    assert names_in(pack_code(folder)[1]) == ["alias.py", "sub/real.py"]
    assert pack_code(tmp_path / "entry") == pack_code(folder)


def test_too_much_code_is_refused_and_the_biggest_entries_are_named(tmp_path: Path) -> None:
    written(tmp_path / "data" / "a.bin", b"0" * 3000)
    written(tmp_path / "data" / "b.bin", b"0" * 3000)
    written(tmp_path / "model.bin", b"0" * 2000)
    written(tmp_path / "digits.py", b"0" * 10)
    with pytest.raises(InvalidInput, match=r"biggest: data/ \(.*\), model\.bin") as caught:
        pack_code(tmp_path, limit_bytes=8009)
    assert caught.value.where == str(tmp_path)
    assert "keep data outside the code folder" in caught.value.hint
    assert len(names_in(pack_code(tmp_path, limit_bytes=8010)[1])) == 4


def test_a_file_that_vanishes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.py", "1")
    written(tmp_path / "b.py", "2")

    def read_after_another_process_removed_it(path: Path, size: int) -> bytes:
        if path.name == "a.py":
            path.unlink()
        return read_at_most(path, size)

    monkeypatch.setattr(code_folder, "read_at_most", read_after_another_process_removed_it)
    assert names_in(pack_code(tmp_path)[1]) == ["b.py"]


def test_a_file_that_grows_meanwhile_cannot_pass_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.py", "1")
    monkeypatch.setattr(code_folder, "read_at_most", lambda _path, size: b"0" * size)
    with pytest.raises(InvalidInput, match=r"biggest: a\.py"):
        pack_code(tmp_path, limit_bytes=50)


def test_too_many_files_are_refused_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        written(tmp_path / str(number % 3) / f"{number}.py", "1")
    monkeypatch.setattr(code_folder, "_MOST_ENTRIES", 32)
    with pytest.raises(InvalidInput, match="more than 32 files and folders"):
        pack_code(tmp_path)
    monkeypatch.setattr(code_folder, "_MOST_ENTRIES", 33)
    assert len(names_in(pack_code(tmp_path)[1])) == 30


@pytest.mark.timeout(20)
@pytest.mark.parametrize("folder", ["/proc", "/proc/self", "/proc/sys/kernel", "/dev"])
def test_a_folder_of_the_kernel_is_refused_soon_or_read_to_its_end(folder: str) -> None:
    """Some files there have no end, no size, or wait for events."""
    began = time.monotonic()
    with contextlib.suppress(InvalidInput):
        pack_code(Path(folder))
    assert time.monotonic() - began < 10


def test_a_code_file_that_may_not_be_read_is_named(unprivileged: Path) -> None:
    file = closed(unprivileged / "pkg" / "secret.py")
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        pack_code(unprivileged)
    assert caught.value.where == str(file)
    assert caught.value.detail == "Permission denied"


def test_a_code_folder_that_may_not_be_read_is_named(unprivileged: Path) -> None:
    folder = closed(unprivileged / "pkg" / "a.py").parent
    user = os.geteuid()
    os.seteuid(os.getuid())
    folder.chmod(0)
    os.seteuid(user)
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        pack_code(unprivileged)
    assert str(folder) in caught.value.where
    os.seteuid(os.getuid())
    folder.chmod(0o755)
    os.seteuid(user)


@pytest.mark.skipif(os.name != "posix", reason="such names exist on POSIX only")
def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    written(tmp_path / os.fsdecode(b"caf\xe9.txt"), "1")
    with pytest.raises(InvalidInput, match="is not UTF-8") as caught:
        pack_code(tmp_path)
    assert "rename" in caught.value.hint
    assert str(caught.value).encode()


@pytest.mark.parametrize("name", ["gone", "file.py"])
def test_a_code_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path / "file.py")
    with pytest.raises(InvalidInput, match=name) as caught:
        pack_code(tmp_path / name)
    assert caught.value.where == "code"
    assert caught.value.hint
