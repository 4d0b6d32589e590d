"""uv's cache: what is forgotten is fetched again, what is needed stays, uv's own lock is kept."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import shutil
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import mkdtemp

import pytest
import uv
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.errors import LockTimeout
from ray_envs.node.uv_cache import UvCache
from tests.local.conftest import wait_until

#: A build backend that needs nothing: it zips one module.
BACKEND = """\
import os, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "mini-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        info = "mini-1.0.dist-info"
        wheel.writestr("mini.py", "value = 1\\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: mini\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\n"
                       "Root-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", f"mini.py,,\\n{info}/RECORD,,\\n")
    return name
"""


def make_wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> Path:
    """A wheel in `folder` with a correct RECORD; `{data}` in a path is its data folder."""
    stem = f"{name}-{version}"
    info = f"{stem}.dist-info"
    content = {path.format(data=f"{stem}.data"): text for path, text in files.items()}
    content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    content[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    rows = []
    for path, text in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rows.append(f"{path},sha256={digest.rstrip('=')},{len(text.encode())}\n")
    content[f"{info}/RECORD"] = "".join(rows) + f"{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(place, "w") as wheel:
        for path, text in content.items():
            wheel.writestr(path, text)
    return place


def make_source_archive(folder: Path, scratch: Path) -> None:
    """The source archive of `mini` 1.0 in `folder`."""
    source = scratch / "mini-1.0"
    source.mkdir()
    (source / "backend.py").write_text(BACKEND)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "mini"\nversion = "1.0"\n'
    )
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: mini\nVersion: 1.0\n")
    with tarfile.open(folder / "mini-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "mini-1.0")


def uv_command(cache: Path, *words: str | Path) -> tuple[list[str], dict[str, str]]:
    """The command line and the variables of the real uv with this cache."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    clean["NO_PROXY"] = "127.0.0.1"
    return [uv.find_uv_bin(), *map(str, words), "--no-config", "--cache-dir", str(cache)], clean


def run_uv(cache: Path, *words: str | Path) -> str:
    """What the real uv says; raises `CalledProcessError` where it fails."""
    command, environ = uv_command(cache, *words)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def install(cache: Path, venv: Path, *words: str | Path) -> Path:
    """Make `venv` with the packages that `words` name; returns its site-packages."""
    run_uv(cache, "venv", "--quiet", "--clear", "--no-project", venv)
    run_uv(cache, "pip", "install", "--python", venv / "bin" / "python", *words)
    return next(venv.glob("lib/python3*/site-packages"))


class Index:
    """A package index on this machine; it counts the wheels that it hands out, and can wait."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads: list[str] = []
        self.may_answer = threading.Event()
        self.may_answer.set()
        index = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.endswith(".whl"):
                    index.downloads.append(self.path.rpartition("/")[2])
                    index.may_answer.wait(60)
                super().do_GET()

            def log_message(self, format: str, *args: object) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.options = ("--default-index", f"http://127.0.0.1:{self.server.server_port}/")

    def add(self, name: str, version: str) -> None:
        place = self.folder / name
        make_wheel(place, name, version, {f"{name}.py": f"value = {version!r}\n"})
        links = "".join(f'<a href="{each.name}">{each.name}</a>\n' for each in place.glob("*.whl"))
        (place / "index.html").write_text(f"<html>{links}</html>")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    made = Index(tmp_path / "index")
    for name, version in (("one", "1.0"), ("one", "2.0"), ("two", "1.0")):
        made.add(name, version)
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.may_answer.set()
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> UvCache:
    return UvCache(tmp_path / "cache", lock_timeout_s=30)


def bucket_texts(cache: UvCache) -> list[bytes]:
    """Every pointer of uv's cache: the targets of links and the content of files."""
    found = []
    for kind in ("wheels-v*", "sdists-v*"):
        for path in cache.folder.glob(f"{kind}/**/*"):
            if path.is_symlink():
                found.append(os.readlink(path).encode())
            elif path.is_file():
                found.append(path.read_bytes())
    return found


def own_bytes(folder: Path) -> int:
    """The bytes below `folder` that nothing else has a link to."""
    files = (path.lstat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(status.st_size for status in files if status.st_nlink == 1)


# -- what is there


def test_unpacked_wheels_are_found_by_their_dist_info(
    cache: UvCache, index: Index, tmp_path: Path
) -> None:
    assert cache.archives() == {}
    install(cache.folder, tmp_path / "venv", "one==1.0", "two", *index.options)
    found = cache.archives()
    assert sorted(found) == ["one-1.0.dist-info", "two-1.0.dist-info"]
    for name, (archive,) in found.items():
        assert (archive / name / "RECORD").is_file()


def test_broken_pieces_of_a_cache_are_passed_over(cache: UvCache) -> None:
    archives = cache.folder / "archive-v0"
    (archives / "empty").mkdir(parents=True)
    (archives / "file").write_text("")
    (archives / "link").symlink_to("nowhere")
    assert cache.archives() == {}
    cache.forget(archives / "link")
    cache.forget(archives / "gone")
    assert cache.forget_unneeded({}) == (0, 0)
    assert sorted(os.listdir(archives)) == ["empty", "file"]


# -- forgetting one wheel


def test_a_forgotten_wheel_is_downloaded_again(
    cache: UvCache, index: Index, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    site = install(cache.folder, venv, "one==1.0", *index.options)
    (archive,) = cache.archives()["one-1.0.dist-info"]
    assert any(archive.name.encode() in text for text in bucket_texts(cache))

    cache.forget(archive)

    assert cache.archives() == {}
    assert not any(archive.name.encode() in text for text in bucket_texts(cache))
    assert not list(cache.folder.glob(".ray_envs*"))
    assert (site / "one.py").read_text() == "value = '1.0'\n"  # environments keep their links
    with pytest.raises(subprocess.CalledProcessError) as failed:
        install(cache.folder, venv, "one==1.0", "--offline", *index.options)
    assert "connectivity is disabled" in " ".join(failed.value.stderr.split())
    index.downloads.clear()
    install(cache.folder, venv, "one==1.0", *index.options)
    assert index.downloads == ["one-1.0-py3-none-any.whl"]
    (again,) = cache.archives()["one-1.0.dist-info"]
    assert again != archive


def test_a_forgotten_wheel_that_uv_built_is_unpacked_again_without_the_network(
    cache: UvCache, tmp_path: Path
) -> None:
    venv, source = tmp_path / "venv", tmp_path / "source"
    source.mkdir()
    make_source_archive(source, tmp_path)
    words = ("mini", "--no-index", "--find-links", source, "--offline")
    install(cache.folder, venv, *words)
    (archive,) = cache.archives()["mini-1.0.dist-info"]
    cache.forget(archive)
    assert cache.archives() == {}
    said = install(cache.folder, venv, *words)
    assert (said / "mini.py").read_text() == "value = 1\n"
    assert archive not in cache.archives()["mini-1.0.dist-info"]


def test_only_an_unpacked_wheel_can_be_forgotten(cache: UvCache, tmp_path: Path) -> None:
    for other in (tmp_path, cache.folder, cache.folder / "wheels-v8" / "pypi"):
        with pytest.raises(ValueError, match="no unpacked wheel"):
            cache.forget(other)


def test_what_a_killed_process_was_deleting_is_no_wheel_and_goes_with_the_next(
    cache: UvCache, index: Index, tmp_path: Path
) -> None:
    install(cache.folder, tmp_path / "venv", "one==1.0", "two", *index.options)
    (archive,) = cache.archives()["one-1.0.dist-info"]
    trash = cache.folder / ".ray_envs-forgotten-0"
    shutil.copytree(archive, trash)
    assert cache.archives()["one-1.0.dist-info"] == [archive]
    cache.forget(archive)
    assert not trash.exists()


# -- forgetting what nobody needs


def test_what_nobody_needs_goes_and_the_bytes_are_those_that_become_free(
    cache: UvCache, index: Index, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make_source_archive(source, tmp_path)
    install(cache.folder, tmp_path / "a", "one==1.0", *index.options)
    install(cache.folder, tmp_path / "b", "one==2.0", "two", *index.options)
    install(cache.folder, tmp_path / "c", "mini", "--no-index", "--find-links", source)
    shutil.rmtree(tmp_path / "b")  # its links keep nothing any more
    run_uv(cache.folder, "cache", "prune")  # what building left
    before = own_bytes(cache.folder)

    entries, free = cache.forget_unneeded({"One": ["1"], "mini": ["2.0"]})
    run_uv(cache.folder, "cache", "prune")

    assert entries == 3  # one 2.0, two 1.0, mini 1.0
    assert sorted(cache.archives()) == ["one-1.0.dist-info"]
    assert (free > 0, free) == (True, before - own_bytes(cache.folder))
    install(cache.folder, tmp_path / "d", "one==1.0", "--offline", *index.options)
    with pytest.raises(subprocess.CalledProcessError):
        install(cache.folder, tmp_path / "d", "one==2.0", "--offline", *index.options)
    assert cache.forget_unneeded({"one": ["1.0"]}) == (0, 0)


def test_needed_entries_that_are_built_stay(cache: UvCache, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make_source_archive(source, tmp_path)
    words = ("mini", "--no-index", "--find-links", source)
    install(cache.folder, tmp_path / "a", *words)
    assert cache.forget_unneeded({"mini": {"1.0"}}) == (0, 0)
    run_uv(cache.folder, "cache", "prune")
    assert list(cache.archives()) == ["mini-1.0.dist-info"]


@pytest.mark.parametrize(
    "path",
    [
        "wheels-v8/pypi/one/nonsense",
        "wheels-v8/pypi/one/1.0",  # no tag
        "wheels-v8/pypi/One_/1.0-py3-none-any.http",  # uv writes names otherwise
        "wheels-v8/README",
        "sdists-v11/pypi/one/latest/revision.http",
        "sdists-v11/url/0123/abc/whatever.whl",
        "sdists-v11/git/0123/abc/metadata.msgpack",
        "other-v1/pypi/one/1.0-py3-none-any.http",
    ],
)
def test_what_cannot_be_told_stays(cache: UvCache, path: str) -> None:
    file = cache.folder / path
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert cache.forget_unneeded({}) == (0, 0)
    assert file.exists()


def test_a_source_archive_goes_only_with_all_that_was_built_from_it(cache: UvCache) -> None:
    folder = cache.folder / "sdists-v11" / "url" / "0123"
    for name in ("a/one-1.0-py3-none-any.whl", "b/two-1.0-py3-none-any.whl"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("12345")
    assert cache.forget_unneeded({"two": ["1.0"]}) == (0, 0)
    assert cache.forget_unneeded({"two": ["1.1"]}) == (1, 10)
    assert not folder.exists()


Releases = st.sets(st.tuples(st.sampled_from(["a", "b-c"]), st.sampled_from(["1.0", "2.0+x"])))


@given(wheels=Releases, sources=Releases, needed=Releases)
def test_all_and_only_the_needed_releases_stay(
    wheels: set[tuple[str, str]], sources: set[tuple[str, str]], needed: set[tuple[str, str]]
) -> None:
    cache = UvCache(Path(mkdtemp()), lock_timeout_s=30)
    try:
        for number, (name, version) in enumerate(sorted(wheels)):
            folder = cache.folder / "wheels-v8" / ("pypi" if number % 2 else "index/0123") / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{version}-py3-none-any").symlink_to("../../../archive-v0/nowhere")
            for suffix in (".http", ".msgpack", ".lock"):
                (folder / f"{version}-py3-none-any{suffix}").touch()
        for name, version in sources:
            folder = cache.folder / "sdists-v11" / "pypi" / name / version
            folder.mkdir(parents=True)
            (folder / "revision.http").touch()

        entries, _ = cache.forget_unneeded(
            {name: [v for n, v in needed if n == name] for name, _ in needed}
        )

        assert entries == len(wheels - needed) + len(sources - needed)
        left = list(cache.folder.glob("wheels-v8/**/*-py3-none-any*"))
        stems = [(path.parent.name, path.name.partition("-")[0]) for path in left]
        assert sorted(stems) == sorted([*(wheels & needed)] * 4)
        left = list(cache.folder.glob("sdists-v11/pypi/*/*/revision.http"))
        assert {(p.parent.parent.name, p.parent.name) for p in left} == sources & needed
    finally:
        shutil.rmtree(cache.folder)


# -- uv's lock


def test_nothing_is_forgotten_while_uv_works(cache: UvCache, index: Index, tmp_path: Path) -> None:
    install(cache.folder, tmp_path / "a", "one==1.0", *index.options)
    (archive,) = cache.archives()["one-1.0.dist-info"]
    index.downloads.clear()
    index.may_answer.clear()
    run_uv(cache.folder, "venv", "--quiet", "--no-project", tmp_path / "b")
    command, environ = uv_command(
        cache.folder, "pip", "install", "--python", tmp_path / "b/bin/python", "two", *index.options
    )
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: index.downloads, "uv downloads", timeout_s=60)
            impatient = UvCache(cache.folder, lock_timeout_s=0)
            with pytest.raises(LockTimeout, match="in use") as refused:
                impatient.forget(archive)
            assert "RAY_ENVS_LOCK_TIMEOUT_S" in refused.value.hint
            with pytest.raises(LockTimeout):
                impatient.forget_unneeded({})
            assert cache.archives()["one-1.0.dist-info"] == [archive]
            with impatient.in_use():  # users do not exclude each other
                pass
        finally:
            index.may_answer.set()
        assert process.wait(60) == 0
    cache.forget(archive)
    assert list(cache.archives()) == ["two-1.0.dist-info"]


def test_uv_prunes_nothing_while_the_cache_is_in_use(cache: UvCache) -> None:
    dangling = cache.folder / "archive-v0" / "dangling"
    run_uv(cache.folder, "cache", "prune")
    dangling.mkdir(parents=True)
    with cache.in_use():
        command, environ = uv_command(cache.folder, "cache", "prune")
        process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert "in-use" in process.stderr.readline()
        assert dangling.exists()
    process.communicate(timeout=60)
    assert (process.returncode, dangling.exists()) == (0, False)


def test_a_waiter_gets_the_lock_as_soon_as_it_is_free(cache: UvCache) -> None:
    cache.folder.mkdir()
    archive = cache.folder / "archive-v0" / "x"
    archive.mkdir(parents=True)
    fd = os.open(cache.folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_SH)
    waiter = threading.Thread(target=cache.forget, args=(archive,))
    waiter.start()
    assert archive.exists()
    os.close(fd)
    waiter.join(60)
    assert (waiter.is_alive(), archive.exists()) == (False, False)
