"""Wheels that a peer or a file gives: whole, as they were, with byte-code, and never half."""

from __future__ import annotations

import asyncio
import copy
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uv

from ray_envs.decisions import locks, packs
from ray_envs.decisions.packs import Manifest
from ray_envs.errors import InvalidInput, LockTimeout, StorageFailed
from ray_envs.models import Installed
from ray_envs.node import bundles, bytecode, receiving, sending
from ray_envs.node.bundles import FORMAT, read_bundle, write_bundle
from ray_envs.node.interpreter import base_python, this_platform
from ray_envs.node.receiving import Receiving
from ray_envs.node.store import Store
from ray_envs.node.uv_cache import UvCache
from ray_envs.settings import Settings
from tests.local.conftest import build
from tests.local.node.test_uv_cache import BACKEND, make_source_archive, make_wheel, run_uv

if TYPE_CHECKING:
    from tests.local.conftest import Locked

#: What the project needs: of the real index, of a second one, by URL and by commit; wheels,
#: compiled code, a wheel with data and a script, and source archives that uv builds.
PROJECT = """\
[project]
name = "p"
version = "0"
requires-python = "=={minor}.*"
dependencies = [
  "six", "tabulate", "markupsafe", "docopt==0.6.2", "one", "mini",
  "by-url @ http://127.0.0.1:{port}/by_url-1.0-py3-none-any.whl",
  "source-by-url @ http://127.0.0.1:{port}/source_by_url-1.0.tar.gz",
  "by-git @ git+file://{git}@{commit}",
]
[tool.uv]
package = false
[tool.uv.sources]
one = {{ index = "second" }}
mini = {{ index = "second" }}
[[tool.uv.index]]
name = "second"
url = "http://127.0.0.1:{port}/simple"
explicit = true
"""
MODULES = (
    "six", "tabulate", "markupsafe", "docopt", "one", "mini", "by_url", "source_by_url", "by_git",
)  # fmt: skip


@dataclass(frozen=True)
class Sender:
    """A node that has built an environment; nothing that it was built from is there any more."""

    cache: UvCache
    project: Path
    packages: tuple[Installed, ...]

    def package(self, name: str) -> Installed:
        return next(each for each in self.packages if each.name == name)

    def manifest(self, name: str, *, chunk_bytes: int = packs.CHUNK_BYTES) -> Manifest:
        (wheel,) = sending.offers(self.cache, [self.package(name)])
        return sending.manifest(self.cache, wheel, chunk_bytes=chunk_bytes)

    def chunks(self, manifest: Manifest) -> list[bytes]:
        return [sending.read_chunk(self.cache, manifest, n) for n in range(manifest.chunk_count)]

    def send_all(self, to: UvCache, *, chunk_bytes: int = packs.CHUNK_BYTES) -> None:
        for wheel in sending.offers(self.cache, receiving.missing(to, self.packages)):
            pack = sending.manifest(self.cache, wheel, chunk_bytes=chunk_bytes)
            receiving.receive(to, pack, self.chunks(pack))


def uv_project(cache: Path, project: Path, venv: Path, *words: str) -> str:
    """What uv says about a project, with all its settings; raises where it fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UV_")}
    clean |= {"NO_PROXY": "127.0.0.1", "UV_PROJECT_ENVIRONMENT": str(venv)}
    done = subprocess.run(
        [uv.find_uv_bin(), *words, "--cache-dir", cache, "--python", base_python()],
        cwd=project,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def sync_offline(cache: UvCache, sender: Sender, venv: Path) -> Path:
    """Install the sender's project without any network; returns its site-packages."""
    uv_project(cache.folder, sender.project, venv, "sync", "--frozen", "--offline")
    return next(venv.glob("lib/python3*/site-packages"))


def git(folder: Path, *words: str) -> str:
    who = {
        f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", folder, *words],
        env={**os.environ, **who},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def source_of(folder: Path, name: str) -> None:
    """The source of a package whose build needs nothing."""
    folder.mkdir()
    (folder / "backend.py").write_text(BACKEND.replace("mini", name))
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "{name}"\nversion = "1.0"\n'
    )
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Sender:
    """The sender that all tests read; those that change it take `sender`."""
    base = tmp_path_factory.mktemp("sender")
    web, source, project = base / "web", base / "git", base / "project"
    second = {"{data}/scripts/onetool": "#!python\nprint(1)\n", "{data}/data/share/x.txt": "x"}
    make_wheel(web / "simple" / "one", "one", "1.0", {"one.py": "value = 1\n", **second})
    (web / "simple" / "mini").mkdir()
    make_source_archive(web / "simple" / "mini", base)
    make_wheel(web, "by_url", "1.0", {"by_url.py": "value = 1\n"})
    source_of(base / "source_by_url-1.0", "source_by_url")
    with tarfile.open(web / "source_by_url-1.0.tar.gz", "w:gz") as archive:
        archive.add(base / "source_by_url-1.0", "source_by_url-1.0")
    source_of(source, "by_git")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        git(source, *words)
    for folder in (web / "simple").iterdir():
        links = "".join(
            f'<a href="{file.name}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}">'
            f"{file.name}</a>\n"
            for file in folder.iterdir()
        )
        (folder / "index.html").write_text(links)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(web)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        project.mkdir()
        (project / "pyproject.toml").write_text(
            PROJECT.format(
                minor=sending.made_here().python,
                port=server.server_port,
                git=source,
                commit=git(source, "rev-parse", "HEAD"),
            )
        )
        cache = base / "cache"
        uv_project(cache, project, base / "venv", "lock")
        uv_project(cache, project, base / "venv", "sync", "--frozen")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    shutil.rmtree(source)
    shutil.rmtree(web)
    site = next((base / "venv").glob("lib/python3*/site-packages"))
    late = bytecode.without_bytecode(site, before=0)
    asyncio.run(
        bytecode.compile_wheels(
            cache, site, late, python=base_python(), settings=Settings(root=base / "root")
        )
    )
    packages = locks.installed((project / "uv.lock").read_text(), this_platform())
    return Sender(UvCache(cache, lock_timeout_s=30), project, packages)


@pytest.fixture
def sender(built: Sender, tmp_path: Path) -> Sender:
    """A sender that a test may damage; it has two of the packages."""
    mine = Sender(UvCache(tmp_path / "sender", lock_timeout_s=30), built.project, built.packages)
    for name in ("six", "tabulate"):
        pack = built.manifest(name)
        receiving.receive(mine.cache, pack, built.chunks(pack))
    return mine


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[UvCache]:
    """The receiver's, empty; after the test, nothing in it may lead to what is not there."""
    made = UvCache(tmp_path / "receiver", lock_timeout_s=30)
    yield made
    assert leads_to_nothing(made) == []


def leads_to_nothing(cache: UvCache) -> list[str]:
    """Links and pointers of a cache whose unpacked wheel is not there."""
    wrong = []
    for path in cache.folder.glob("[ws]*s-v*/**/*"):
        if path.is_symlink() and not path.exists():
            wrong.append(f"{path} leads to nothing")
        if path.suffix == ".http" and path.parts[-1] != "revision.http":
            link = path.with_suffix("")
            if not link.is_symlink() or os.path.basename(os.readlink(link)) not in str(
                path.read_bytes()
            ):
                wrong.append(f"{path} is without its link")
    return wrong


def content(cache: UvCache) -> list[str]:
    """What uv sees of a cache."""
    return sorted(
        path.relative_to(cache.folder).as_posix()
        for path in cache.folder.glob("*-v*/**/*")
        if not path.is_dir()
    )


# -- from a node to another


def test_an_environment_is_installed_offline_from_what_a_peer_sent(
    built: Sender, cache: UvCache, tmp_path: Path
) -> None:
    assert len(built.packages) == len(MODULES)
    assert receiving.missing(cache, built.packages) == list(built.packages)
    assert receiving.missing(built.cache, built.packages) == []
    built.send_all(cache, chunk_bytes=10_000)
    assert receiving.missing(cache, built.packages) == []

    began_at = time.time()
    site = sync_offline(cache, built, tmp_path / "venv")
    assert bytecode.without_bytecode(site, before=began_at) == []
    compiled = sorted(site.rglob("*.pyc"))
    subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", f"import {', '.join(MODULES)}"], check=True
    )
    assert sorted(site.rglob("*.pyc")) == compiled
    assert subprocess.check_output([tmp_path / "venv" / "bin" / "onetool"]) == b"1\n"
    assert (tmp_path / "venv" / "share" / "x.txt").read_text() == "x"

    archived = [path for path in cache.folder.glob("archive-v*/*/**/*") if path.is_file()]
    assert [path for path in archived if path.stat().st_mode & 0o222] == []
    assert not list(cache.folder.glob("sdists-v*/**/src"))
    assert not list(cache.folder.glob(".ray_envs-*"))


def test_what_uv_built_is_unpacked_again_without_the_network(
    built: Sender, cache: UvCache, tmp_path: Path
) -> None:
    built.send_all(cache)
    (archive,) = cache.archives()["docopt-0.6.2.dist-info"]
    cache.forget(archive)
    assert [each.name for each in receiving.missing(cache, built.packages)] == ["docopt"]
    sync_offline(cache, built, tmp_path / "venv")
    assert receiving.missing(cache, built.packages) == []


def test_what_was_received_can_be_sent_on_as_the_same(
    built: Sender, cache: UvCache, tmp_path: Path
) -> None:
    built.send_all(cache)
    middle = Sender(cache, built.project, built.packages)
    for name in ("six", "markupsafe", "docopt", "by-git"):
        assert middle.manifest(name).identity == built.manifest(name).identity
    last = UvCache(tmp_path / "last")
    middle.send_all(last)
    sync_offline(last, built, tmp_path / "venv")


def test_the_environment_of_a_node_is_linked_from_what_a_peer_sent(
    settings: Settings, warm_cache: Path, locked: Locked
) -> None:
    request = locked()
    packages = locks.installed(request.uv_lock, this_platform())
    peer, cache = UvCache(warm_cache), UvCache(Store(settings).cache)
    for wheel in sending.offers(peer, packages):
        pack = sending.manifest(peer, wheel)
        pieces = (sending.read_chunk(peer, pack, n) for n in range(pack.chunk_count))
        receiving.receive(cache, pack, pieces)
    before = {path: path.stat().st_mtime_ns for path in cache.folder.glob("archive-v*/*/**/*.pyc")}
    state = build(settings, request)
    assert (state.phase.value, state.how) == ("ready", "linked"), state
    record = Store(settings).record(request.key)
    assert record is not None
    assert record.is_compiled
    after = {path: path.stat().st_mtime_ns for path in cache.folder.glob("archive-v*/*/**/*.pyc")}
    assert after == before, "something was compiled again"


def test_only_the_very_content_counts(built: Sender, cache: UvCache) -> None:
    for name in ("six", "docopt", "by-git", "by-url"):
        package = built.package(name)
        kind, _, pin = package.pin.partition(":")
        other = package.model_copy(update={"pin": f"{kind}:{pin[::-1]}"})
        assert sending.offers(built.cache, [other]) == []
        assert receiving.missing(built.cache, [other]) == [other]
    unknown = Installed(name="of-nowhere", version="1.0", pin="sha256:" + "0" * 64)
    assert sending.offers(built.cache, [unknown, built.package("six")]) == sending.offers(
        built.cache, [built.package("six")]
    )


def test_an_entry_without_its_unpacked_wheel_is_missing(sender: Sender) -> None:
    (archive,) = sender.cache.archives()["six-1.17.0.dist-info"]
    shutil.rmtree(archive)
    six = sender.package("six")
    assert receiving.missing(sender.cache, [six]) == [six]
    assert sending.offers(sender.cache, [six]) == []


def test_the_stream_is_read_in_any_order(built: Sender) -> None:
    whole = b"".join(built.chunks(built.manifest("markupsafe")))
    size = len(whole) // 3 + 1
    pack = built.manifest("markupsafe", chunk_bytes=size)
    assert pack.chunk_count == 3
    assert pack.wheel.total_bytes == len(whole)
    for number in (2, 0, 1):
        wanted = whole[number * size : (number + 1) * size]
        assert sending.read_chunk(built.cache, pack, number) == wanted
    for number in (-1, 3):
        with pytest.raises(ValueError, match="no piece"):
            sending.read_chunk(built.cache, pack, number)
    for file, offset in zip(pack.files, pack.offsets, strict=False):
        assert whole[offset : offset + file.size] == (built.cache.folder / file.path).read_bytes()


def test_a_manifest_survives_the_way_as_plain_data(built: Sender) -> None:
    pack = built.manifest("docopt")
    sent = json.loads(json.dumps(pack.model_dump(mode="json")))
    assert Manifest.parse(sent) == pack
    assert Manifest.parse(sent).identity == pack.identity


def test_a_large_wheel_takes_little_memory(tmp_path: Path, cache: UvCache) -> None:
    size, chunk = 24 * 1024 * 1024, 1024 * 1024
    wheel = make_wheel(tmp_path, "large", "1.0", {"large.txt": "x" * size})
    venv, source = tmp_path / "venv", tmp_path / "source"
    run_uv(source, "venv", "--quiet", "--no-project", venv)
    run_uv(source, "pip", "install", "--python", venv / "bin" / "python", "--offline", wheel)
    peer = UvCache(source)
    (archive,) = peer.archives()["large-1.0.dist-info"]
    # uv keeps a wheel of a folder with other pointers: as if it had come from an index.
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = source / "wheels-v8" / "pypi" / "large"
    entry.mkdir(parents=True)
    (entry / "1.0-py3-none-any").symlink_to(os.path.relpath(archive, entry))
    (entry / "1.0-py3-none-any.http").write_text(f"{archive.name} {digest}")
    (large,) = sending.offers(
        peer, [Installed(name="large", version="1.0", pin=f"sha256:{digest}")]
    )
    pack = sending.manifest(peer, large, chunk_bytes=chunk)
    pieces = (sending.read_chunk(peer, pack, n) for n in range(pack.chunk_count))
    tracemalloc.start()
    try:
        receiving.receive(cache, pack, pieces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pack.wheel.total_bytes > size
    assert peak < 6 * chunk


# -- byte-code


def test_byte_code_counts_from_the_arrival_by_the_receivers_clock(
    sender: Sender, cache: UvCache
) -> None:
    (archive,) = sender.cache.archives()["six-1.17.0.dist-info"]
    marker = archive / "six-1.17.0.dist-info" / bytecode.marker_name()
    marker.chmod(0o644)
    marker.write_text(repr(time.time() + 1e6))
    before = time.time()
    pack = sender.manifest("six")
    receiving.receive(cache, pack, sender.chunks(pack))
    (arrived,) = cache.archives()["six-1.17.0.dist-info"]
    made_at = float((arrived / marker.relative_to(archive)).read_text())
    assert before <= made_at <= time.time()
    assert list(arrived.glob("__pycache__/six.*.pyc"))


def test_byte_code_that_is_not_complete_stays_at_home(sender: Sender, cache: UvCache) -> None:
    (archive,) = sender.cache.archives()["six-1.17.0.dist-info"]
    (archive / "six-1.17.0.dist-info" / bytecode.marker_name()).unlink()
    pack = sender.manifest("six")
    assert not pack.wheel.is_compiled
    receiving.receive(cache, pack, sender.chunks(pack))
    (arrived,) = cache.archives()["six-1.17.0.dist-info"]
    assert not list(arrived.rglob("*.pyc"))
    assert not (arrived / "six-1.17.0.dist-info" / bytecode.marker_name()).exists()


def test_byte_code_of_another_python_stays_at_home(sender: Sender) -> None:
    (archive,) = sender.cache.archives()["six-1.17.0.dist-info"]
    (archive / "__pycache__" / "six.cpython-30.pyc").write_text("")
    (archive / "six-1.17.0.dist-info" / "ray_envs-bytecode.cpython-30").write_text("1.0")
    assert not [file for file in sender.manifest("six").files if "cpython-30" in file.path]


# -- what is refused


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("six", {"uv": "wheels-v99"}, "uv cache with wheels-v99; this node's uv has archive-v"),
        ("six", {"python": "3.9"}, "prepared for Python 3.9; this node has"),
        ("docopt", {"platform": "moon"}, "built on moon; this node is"),
        ("six", {"platform": "moon"}, ""),
    ],
)
def test_a_wheel_is_for_one_uv_one_python_and_a_built_one_for_one_platform(
    built: Sender, cache: UvCache, name: str, change: dict[str, str], words: str
) -> None:
    pack = built.manifest(name)
    assert packs.why_not(pack.wheel, sending.made_here()) == ""
    made_for = pack.wheel.made_for.model_copy(update=change)
    wheel = pack.wheel.model_copy(update={"made_for": made_for})
    other = pack.model_copy(update={"wheel": wheel})
    assert words in packs.why_not(wheel, sending.made_here())
    if words:
        with pytest.raises(InvalidInput, match=words):
            Receiving(cache, other)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_changed_byte_is_found_and_nothing_appears(
    built: Sender, cache: UvCache, where: float
) -> None:
    pack = built.manifest("six", chunk_bytes=10_000)
    stream = bytearray(b"".join(built.chunks(pack)))
    stream[int(where * (len(stream) - 1))] ^= 1
    with pytest.raises(
        InvalidInput, match=r"six 1\.17\.0 was not received: .* was damaged"
    ) as caught:
        receiving.receive(cache, pack, [bytes(stream)])
    assert "another node" in caught.value.hint
    assert content(cache) == []
    assert not list(cache.folder.glob(".ray_envs-*"))


def test_a_stream_that_ends_early_or_goes_on_is_refused(built: Sender, cache: UvCache) -> None:
    pack = built.manifest("six", chunk_bytes=10_000)
    pieces = built.chunks(pack)
    for part, words in (
        (pieces[:-1], "ended after"),
        ([], "ended after 0 of"),
        ([*pieces, b"x"], "more"),
    ):
        with pytest.raises(InvalidInput, match=words):
            receiving.receive(cache, pack, part)
    assert content(cache) == []


def breakers() -> dict[str, Callable[[dict[str, Any]], None]]:
    def path(index: int, value: str) -> Callable[[dict[str, Any]], None]:
        return lambda data: data["files"][index].update(path=value)

    def lead(kind: str, value: str | None) -> Callable[[dict[str, Any]], None]:
        def change(data: dict[str, Any]) -> None:
            link = next(each for each in data["leads"] if each["archive"])
            link[kind] = value

        return change

    def below_a_link(data: dict[str, Any]) -> None:
        link = next(each["path"] for each in data["leads"] if each["archive"])
        empty = {"path": f"{link}/six.py", "size": 0, "sha256": hashlib.sha256().hexdigest()}
        data["files"].append(empty)
        data["leads"].append({"path": empty["path"]})

    inside = "archive-v0/{id}"
    return {
        "absolute": path(0, "/etc/passwd"),
        "upwards": path(0, f"{inside}/../../../evil"),
        "another archive": path(0, "archive-v0/other/x"),
        "the archive itself": path(0, inside),
        "beside": path(0, "interpreter-v4/x/y"),
        "nul": path(0, f"{inside}/a\0b"),
        "doubled slash": path(0, f"{inside}//x"),
        "dot": path(0, f"{inside}/./x"),
        "twice": lambda data: data["files"][1].update(path=data["files"][0]["path"]),
        "a link out": lead("archive", "../../etc"),
        "a link to another archive": lead("archive", "archive-v0/other"),
        "a link elsewhere": lead("path", "archive-v0/{id}/x"),
        "a link upwards": lead("path", "wheels-v8/../../x"),
        "a lead without content": lead("archive", None),
        "an archive elsewhere": lambda data: data["wheel"].update(archives=["archive-v0/.."]),
        "a bucket as an archive": lambda data: data["wheel"].update(archives=["wheels-v8/x"]),
        "sizes": lambda data: data["files"][0].update(size=10**12),
        "a negative size": lambda data: data["files"][0].update(size=-1),
        "a chunk of a terabyte": lambda data: data.update(chunk_bytes=2**40),
        "no leads": lambda data: data.update(leads=[]),
        "a lead below a link": below_a_link,
        "a lead of another package": lead("path", "wheels-v8/pypi/tabulate/1-py3-none-any"),
        "a lead in place of a package": lead("path", "wheels-v8/index/0123/six"),
        "a lead of no kind": lead("path", "wheels-v8/path/six/1.0-py3-none-any"),
        "a file below a file": lambda data: data["files"][1].update(
            path=f"{data['files'][0]['path']}/x"
        ),
        "half a surrogate": path(0, f"{inside}/a\ud800"),
        "half a surrogate in words": lambda data: data["wheel"]["package"].update(pin="\ud800"),
        "a long name": path(0, f"{inside}/{'é' * 128}"),
        "a long path": path(0, f"{inside}{'/x' * 512}"),
        "an unknown key": lambda data: data.update(more=1),
    }


@pytest.mark.parametrize("what", breakers())
def test_a_manifest_that_leads_elsewhere_is_refused(built: Sender, what: str) -> None:
    pack = built.manifest("six")
    data = copy.deepcopy(pack.model_dump(mode="json"))
    breakers()[what](data)
    text = json.dumps(data).replace("{id}", pack.wheel.archives[0].partition("/")[2])
    with pytest.raises(InvalidInput):
        Manifest.parse(json.loads(text))


def rehashed(pack: Manifest, path: str, text: bytes) -> Manifest:
    """A manifest that is right about another content of one of its files."""
    files = tuple(
        file.model_copy(update={"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)})
        if file.path.endswith(path)
        else file
        for file in pack.files
    )
    wheel = pack.wheel.model_copy(update={"total_bytes": sum(file.size for file in files)})
    return Manifest(wheel=wheel, files=files, leads=pack.leads, chunk_bytes=pack.chunk_bytes)


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("/six.py", b"evil = 1\n", "six.py does not match its RECORD"),
        ("/RECORD", b"", "its RECORD is not whole"),
        ("/RECORD", b"\xff", "its RECORD cannot be read"),
        ("/RECORD", b"six-1.17.0.dist-info/RECORD\n", "its RECORD cannot be read"),
    ],
)
def test_a_wheel_must_be_as_its_own_record_says(
    built: Sender, cache: UvCache, path: str, text: bytes, words: str
) -> None:
    pack = built.manifest("six")
    other = rehashed(pack, path, text)
    stream = b"".join(
        text if file.path.endswith(path) else (built.cache.folder / file.path).read_bytes()
        for file in pack.files
    )
    with pytest.raises(InvalidInput, match=words):
        receiving.receive(cache, other, [stream])
    assert content(cache) == []


def test_another_package_in_the_wheel_is_refused(built: Sender, cache: UvCache) -> None:
    pack = built.manifest("six")
    wheel = pack.wheel.model_copy(update={"package": built.package("tabulate")})
    text = pack.model_copy(update={"wheel": wheel}).model_dump_json()
    other = Manifest.parse(json.loads(text.replace("/pypi/six/", "/pypi/tabulate/")))
    with pytest.raises(InvalidInput, match=r"it holds six-1\.17\.0\.dist-info"):
        receiving.receive(cache, other, built.chunks(pack))
    assert content(cache) == []


def test_a_damaged_wheel_is_not_sent(sender: Sender) -> None:
    (archive,) = sender.cache.archives()["six-1.17.0.dist-info"]
    (wheel,) = sending.offers(sender.cache, [sender.package("six")])
    (archive / "six.py").chmod(0o644)
    good = (archive / "six.py").read_bytes()
    (archive / "six.py").write_bytes(good + b"\n")
    with pytest.raises(StorageFailed, match=r"six\.py does not match its RECORD"):
        sending.manifest(sender.cache, wheel)
    (archive / "six.py").write_bytes(good)
    assert sending.manifest(sender.cache, wheel)


def test_a_wheel_that_has_gone_meanwhile_is_told(sender: Sender) -> None:
    (wheel,) = sending.offers(sender.cache, [sender.package("six")])
    pack = sending.manifest(sender.cache, wheel)
    last = sender.cache.folder / pack.files[0].path
    last.chmod(0o644)
    last.write_bytes(b"")
    with pytest.raises(StorageFailed, match="has changed"):
        sending.read_chunk(sender.cache, pack, 0)
    sender.cache.forget(sender.cache.folder / wheel.archives[0])
    with pytest.raises(StorageFailed, match="cannot read six"):
        sending.read_chunk(sender.cache, pack, 0)
    with pytest.raises(StorageFailed, match="not in uv's cache any more"):
        sending.manifest(sender.cache, wheel)


def test_nothing_is_moved_through_a_link(built: Sender, cache: UvCache) -> None:
    for name in ("six", "tabulate"):
        pack = built.manifest(name)
        receiving.receive(cache, pack, built.chunks(pack))
    before = content(cache)
    link = next(lead.path for lead in built.manifest("six").leads if lead.archive)
    good = (cache.folder / link / "six.py").read_bytes()
    with cache.arriving() as arriving:
        (arriving / link).mkdir(parents=True)
        (arriving / link / "six.py").write_text("evil = 1\n")
        (arriving / "archive-v0" / "new").mkdir(parents=True)
        with pytest.raises(InvalidInput, match="leads through a link"):
            cache.move_in(arriving, ["archive-v0/new"], [(f"{link}/six.py", None)])
    assert (cache.folder / link / "six.py").read_bytes() == good
    assert content(cache) == before
    assert not (cache.folder / "archive-v0" / "new").exists()


# -- several at once, and dead ones


@pytest.mark.parametrize(("name", "gone"), [("six", 1), ("six", 2), ("docopt", 2)])
def test_what_a_killed_forget_left_is_not_led_to_again(
    built: Sender, cache: UvCache, name: str, gone: int
) -> None:
    pack, package = built.manifest(name), built.package(name)
    receiving.receive(cache, pack, built.chunks(pack))
    module = cache.folder / pack.wheel.archives[0] / f"{name}.py"
    good = module.read_bytes()
    module.chmod(0o644)
    module.write_text("damaged\n")
    for lead in pack.leads[-gone:]:  # pointers go first
        (cache.folder / lead.path).unlink()
    assert receiving.missing(cache, [package]) == [package]

    receiving.receive(cache, pack, built.chunks(pack))

    assert receiving.missing(cache, [package]) == []
    assert module.read_bytes() == good
    cache.forget_unneeded({name: [package.version]})
    assert not list(cache.folder.glob(".ray_envs-*"))


def test_an_archive_that_something_leads_to_stays(built: Sender, cache: UvCache) -> None:
    pack = built.manifest("six")
    receiving.receive(cache, pack, built.chunks(pack))
    (archive,) = cache.archives()["six-1.17.0.dist-info"]
    before = archive.stat().st_ino
    receiving.receive(cache, pack, built.chunks(pack))
    assert archive.stat().st_ino == before
    assert not list(cache.folder.glob(".ray_envs-*"))


def test_two_receive_the_same_at_once(built: Sender, cache: UvCache, tmp_path: Path) -> None:
    built.send_all(cache)
    (archive,) = cache.archives()["six-1.17.0.dist-info"]
    cache.forget(archive)
    pack = built.manifest("six", chunk_bytes=10_000)
    with Receiving(cache, pack) as one, Receiving(cache, pack) as other:
        for piece in built.chunks(pack):
            one.write(piece)
            other.write(piece)
        one.commit()
        other.commit()
    assert not list(cache.folder.glob(".ray_envs-*"))
    sync_offline(cache, built, tmp_path / "venv")


def test_nothing_is_pruned_while_a_wheel_comes_in(built: Sender, cache: UvCache) -> None:
    impatient = UvCache(cache.folder, lock_timeout_s=0)
    pack = built.manifest("six", chunk_bytes=10_000)
    first, *rest = built.chunks(pack)
    with Receiving(cache, pack) as coming:
        coming.write(first)
        with pytest.raises(LockTimeout):
            impatient.forget_unneeded({})
        for piece in rest:
            coming.write(piece)
        coming.commit()
    assert receiving.missing(cache, [built.package("six")]) == []


#: Receives the wheel of a manifest; ends itself at a point that is named by argv.
RECEIVER = """\
import os, signal, sys
from pathlib import Path
from ray_envs.decisions import packs
from ray_envs.node import receiving, sending
from ray_envs.node.uv_cache import UvCache
peer, cache, manifest, point = UvCache(Path(sys.argv[1])), UvCache(Path(sys.argv[2])), *sys.argv[3:]
pack = packs.Manifest.model_validate_json(Path(manifest).read_bytes())
step = 0
def hear(event, args):
    global step
    if event in ("os.rename", "os.symlink") and sys.argv[2] in str(args[1]):
        if str(step) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        step += 1
with receiving.Receiving(cache, pack) as receiving:
    for number in range(pack.chunk_count):
        receiving.write(sending.read_chunk(peer, pack, number))
        if point == "middle":
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hear)
    receiving.commit()
print(step)
"""


def run_receiver(built: Sender, cache: UvCache, pack: Manifest, folder: Path, point: str) -> int:
    """Receive in a process that dies at `point`; returns its exit code."""
    (folder / "manifest.json").write_text(pack.model_dump_json())
    paths = (built.cache.folder, cache.folder, folder / "manifest.json")
    command = [sys.executable, "-c", RECEIVER, *map(str, paths), point]
    return subprocess.run(command, check=False, capture_output=True, timeout=120).returncode


@pytest.mark.parametrize("sweeper", ["uv", "ours"])
def test_a_receiver_killed_in_the_middle_leaves_only_rubbish(
    built: Sender, cache: UvCache, tmp_path: Path, sweeper: str
) -> None:
    pack = built.manifest("six", chunk_bytes=10_000)
    assert run_receiver(built, cache, pack, tmp_path, "middle") == -9
    assert list(cache.folder.glob(".ray_envs-arriving-*"))
    assert content(cache) == []
    if sweeper == "uv":
        run_uv(cache.folder, "cache", "prune")
    else:
        cache.forget_unneeded({})
    assert not list(cache.folder.glob(".ray_envs-*"))
    receiving.receive(cache, pack, built.chunks(pack))
    assert receiving.missing(cache, [built.package("six")]) == []


@pytest.mark.parametrize("name", ["six", "docopt"])
def test_a_receiver_killed_at_any_step_leaves_all_or_nothing(
    built: Sender, cache: UvCache, tmp_path: Path, name: str
) -> None:
    pack = built.manifest(name)
    package = built.package(name)
    step = 0
    while code := run_receiver(built, cache, pack, tmp_path, str(step)):
        assert code == -9
        assert leads_to_nothing(cache) == []
        assert receiving.missing(cache, [package]) == [package]
        if step % 2:  # from what is left, and from nothing
            run_uv(cache.folder, "cache", "prune")
            is_linked = any(path.is_symlink() for path in cache.folder.glob("wheels-v*/**/*"))
            left = list(cache.folder.glob("archive-v*/*/*.dist-info"))
            assert not left or is_linked or name == "docopt"
        step += 1
    assert step >= 4
    assert receiving.missing(cache, [package]) == []


# -- bundles


TEXTS: dict[str, str | bytes] = {
    "pyproject.toml": "[project]\n",
    "uv.lock": "version = 1\n",
    "options.json": b"{}",
}


@pytest.fixture
def bundle(built: Sender, tmp_path: Path) -> Path:
    path = tmp_path / "six.bundle"
    write_bundle(path, built.cache, [built.manifest("six")], TEXTS, ray="2.60.0")
    return path


def test_a_bundle_is_all_that_an_environment_needs(
    built: Sender, cache: UvCache, tmp_path: Path
) -> None:
    path = tmp_path / "env.bundle"
    packs = [built.manifest(each.name, chunk_bytes=50_000) for each in built.packages]
    texts = {name: (built.project / name).read_text() for name in ("pyproject.toml", "uv.lock")}
    write_bundle(path, built.cache, packs, texts, ray="2.60.0")
    with read_bundle(path) as opened:
        assert opened.files == {name: text.encode() for name, text in texts.items()}
        assert (opened.ray, opened.made_for) == ("2.60.0", sending.made_here())
        assert list(opened.manifests) == packs
        for pack in reversed(opened.manifests):
            receiving.receive(cache, pack, opened.chunks(pack))
    sync_offline(cache, built, tmp_path / "venv")
    with tarfile.open(path) as archive:
        assert archive.getnames()[0] == "bundle.json"


def unpack(bundle: Path, cache: UvCache) -> None:
    with read_bundle(bundle) as opened:
        for pack in opened.manifests:
            receiving.receive(cache, pack, opened.chunks(pack))


def test_a_bundle_that_is_cut_off_anywhere_is_refused(bundle: Path, cache: UvCache) -> None:
    whole = bundle.read_bytes()
    for size in (0, 100, 600, 5_000, len(whole) // 2, len(whole) - 12_000):
        bundle.write_bytes(whole[:size])
        with pytest.raises(InvalidInput) as caught:
            unpack(bundle, cache)
        assert caught.value.where == str(bundle)
    assert content(cache) == []


def test_a_bundle_with_a_changed_byte_is_refused(bundle: Path, cache: UvCache) -> None:
    whole = bundle.read_bytes()
    with tarfile.open(bundle) as archive:
        members = archive.getmembers()
    for member in members:
        broken = bytearray(whole)
        broken[member.offset_data + member.size // 2] ^= 1
        bundle.write_bytes(broken)
        with pytest.raises(InvalidInput) as caught:
            unpack(bundle, cache)
        assert caught.value.where == str(bundle), member.name
    assert content(cache) == []


def repacked(bundle: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """Write the bundle again with other members."""
    with tarfile.open(bundle) as old:
        members = [(each.name, old.extractfile(each).read()) for each in old]  # type: ignore[union-attr]
    with tarfile.open(bundle, "w") as new:
        for name, text in (change(*each) for each in members):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            new.addfile(info, io.BytesIO(text))


def test_a_bundle_of_a_newer_ray_envs_is_refused_by_its_format(bundle: Path) -> None:
    def newer(name: str, text: bytes) -> tuple[str, bytes]:
        if name == "bundle.json":
            text = json.dumps({"format": FORMAT + 1, "unheard": "of"}).encode()
        return name, text

    repacked(bundle, newer)
    words = f"the format {FORMAT + 1}; this ray_envs reads"
    with pytest.raises(InvalidInput, match=words), read_bundle(bundle):
        pass


@pytest.mark.parametrize("evil", ["../evil", "/tmp/evil", "evil"])
def test_a_bundle_with_other_members_is_refused(bundle: Path, evil: str) -> None:
    repacked(bundle, lambda name, text: (evil if name == "uv.lock" else name, text))
    words = r"does not hold what its bundle\.json says"
    with pytest.raises(InvalidInput, match=words), read_bundle(bundle):
        pass


@pytest.mark.parametrize("old", ["uv.lock", "archive-v0/"])
def test_a_bundle_that_names_other_places_is_refused(bundle: Path, old: str) -> None:
    made: dict[str, bytes] = {}

    def change(name: str, text: bytes) -> tuple[str, bytes]:
        if name == "bundle.json":
            made["head"] = text = text.replace(old.encode(), b"../../evil")
        if name == "bundle.sha256":
            text = hashlib.sha256(made["head"]).hexdigest().encode() + b"\n"
        return name, text

    repacked(bundle, change)
    with pytest.raises(InvalidInput, match=re.escape("../../evil")), read_bundle(bundle):
        pass


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the bundle again with another header, which its trailer is right about."""
    made: dict[str, bytes] = {}

    def rewrite(name: str, text: bytes) -> tuple[str, bytes]:
        if name == "bundle.json":
            change(data := json.loads(text))
            made["head"] = text = json.dumps(data).encode()
        if name == "bundle.sha256":
            text = hashlib.sha256(made["head"]).hexdigest().encode() + b"\n"
        return name, text

    repacked(bundle, rewrite)


def test_an_unknown_key_of_a_bundle_is_named(bundle: Path) -> None:
    rewritten(bundle, lambda data: data["files"]["uv.lock"].update(sha265="0"))
    words = r"files\.uv\.lock\.sha265"
    with pytest.raises(InvalidInput, match=words) as caught, read_bundle(bundle):
        pass
    assert caught.value.where == str(bundle)
    assert "'sha256'" in caught.value.hint


@pytest.mark.parametrize("what", ["uv", "python", "platform"])
def test_a_bundle_whose_machine_was_changed_is_refused(
    bundle: Path, cache: UvCache, what: str
) -> None:
    def in_header(data: dict[str, Any]) -> None:
        data["made_for"][what] = "0.1"

    rewritten(bundle, in_header)
    with pytest.raises(InvalidInput, match="prepared for another machine"), read_bundle(bundle):
        pass

    def in_wheels(data: dict[str, Any]) -> None:
        for wheel in data["wheels"]:
            wheel["wheel"]["made_for"][what] = "0.1"

    rewritten(bundle, in_wheels)  # both say the same now
    with read_bundle(bundle) as opened:
        assert getattr(opened.made_for, what) == "0.1"
    if what != "platform":  # which matters for what was built from source only
        with pytest.raises(InvalidInput, match=r"0\.1; this"):
            unpack(bundle, cache)


@pytest.mark.parametrize(
    "head",
    [
        "[" * 100_000,
        '{"format": ' + "[" * 300 + "]" * 300 + "}",
        '{"format": ' + "9" * 9_000 + "}",
        '{"format": ' + "9" * 900 + "}",
        '{"format": NaN}',
        '{"format": 1, "made_for": ' + "9" * 5_000 + "}",
    ],
    ids=lambda head: head[:24],
)
def test_a_bundle_with_a_header_beyond_all_limits_is_refused(bundle: Path, head: str) -> None:
    def change(name: str, text: bytes) -> tuple[str, bytes]:
        if name == "bundle.json":
            text = head.encode()
        if name == "bundle.sha256":
            text = hashlib.sha256(head.encode()).hexdigest().encode() + b"\n"
        return name, text

    repacked(bundle, change)
    with pytest.raises(InvalidInput) as caught, read_bundle(bundle):
        pass
    assert len(caught.value.message) <= 2_100


def test_half_a_surrogate_in_a_bundle_is_refused(bundle: Path) -> None:
    rewritten(bundle, lambda data: data["wheels"][0]["files"][0].update(path="a\ud800"))
    with pytest.raises(InvalidInput, match="in no wheel that is sent"), read_bundle(bundle):
        pass


def raw_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """The header of a member, with any text for its size."""
    made = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    made[124:136], made[148:156], made[156:157] = size, b" " * 8, kind
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


@pytest.mark.parametrize(
    ("name", "size", "kind"),
    [
        ("x", b"\xff" * 10 + b"\xfe\x00", b"0"),  # back to this header, for ever
        ("x", b"\xff" * 12, b"0"),
        ("x", b"\x80" + b"\xff" * 11, b"0"),
        ("x", b"\x80" + b"\xff" * 11, b"L"),
        ("bundle.json", b"\xff" * 10 + b"\xfe\x00", b"0"),
        ("bundle.json", b"\xff" * 12, b"x"),
    ],
)
def test_a_damaged_header_of_a_member_is_refused(
    tmp_path: Path, name: str, size: bytes, kind: bytes
) -> None:
    text = json.dumps({"format": FORMAT}).encode()
    first = raw_header("bundle.json", b"%011o\0" % len(text)) + text.ljust(512, b"\0")
    path = tmp_path / "x.bundle"
    damaged = raw_header(name, size, kind) + b"\0" * 1024
    path.write_bytes(damaged if name == "bundle.json" else first + damaged)
    words = "this is no bundle, or not all of it"
    with pytest.raises(InvalidInput, match=words) as caught, read_bundle(path):
        pass
    assert caught.value.where == str(path)


def test_a_bundle_has_not_any_number_of_members(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(bundle) as archive:
        count = len(archive.getmembers())
    monkeypatch.setattr(bundles, "_MAX_MEMBERS", count)
    with read_bundle(bundle):
        pass
    monkeypatch.setattr(bundles, "_MAX_MEMBERS", count - 1)
    with pytest.raises(InvalidInput, match="it has more than"), read_bundle(bundle):
        pass


@pytest.mark.parametrize("kind", ["missing", "folder", "text"])
def test_what_is_no_bundle_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.bundle"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("hello\n" * 1000)
    with pytest.raises(InvalidInput) as caught, read_bundle(path):
        pass
    assert caught.value.where == str(path)
    assert caught.value.hint


def test_a_bundle_that_cannot_be_written_leaves_the_old_one(
    sender: Sender, tmp_path: Path, bundle: Path
) -> None:
    old = bundle.read_bytes()
    packs = [sender.manifest("six"), sender.manifest("tabulate")]
    (sender.cache.folder / packs[1].files[0].path).unlink()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(StorageFailed):
        write_bundle(bundle, sender.cache, packs, TEXTS, ray="2.60.0")
    with pytest.raises(StorageFailed, match="the bundle cannot be written"):
        write_bundle(tmp_path / "no" / "x", sender.cache, packs[:1], TEXTS, ray="2.60.0")
    assert bundle.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == before
