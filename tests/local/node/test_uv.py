"""The builder: what is asked of uv, what its words become, and that no secret is among them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from ray_envs.decisions import policy
from ray_envs.errors import InvalidPackages, RayEnvsError, ResolutionFailed, StorageFailed, UvFailed
from ray_envs.models import BuildRequest
from ray_envs.node import startup
from ray_envs.node.interpreter import this_platform, this_target, uv_version
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder, Locked
from ray_envs.settings import Settings
from ray_envs.testing import FakeUv
from tests.local.conftest import BUILT_S
from tests.local.conftest import Locked as LockedRequest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

Lines = list[str]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    write_project(folder)
    return folder


def write_project(folder: Path, *packages: str) -> None:
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "p"\nversion = "0"\nrequires-python = ">=3.10"\n'
        f"dependencies = {list(packages)!r}\n"
    )


def run_lock(settings: Settings, project: Path, **options: object) -> str:
    async def main() -> str:
        builder = Builder(settings, settings.root / "uv-cache")
        return (await builder.resolve(project, **options)).text  # type: ignore[arg-type]

    return asyncio.run(main())


# -- the fake uv is a real one


def test_the_fake_uv_does_what_uv_does_and_logs_it(
    fake_uv: FakeUv, settings: Settings, project: Path
) -> None:
    write_project(project, "iniconfig")
    assert 'name = "iniconfig"' in run_lock(settings, project)
    (call,) = fake_uv.calls()
    assert (call.command, call.is_offline) == ("lock", False)
    assert fake_uv.calls("sync") == []


def test_the_fake_uv_fails_as_often_as_it_was_told(fake_uv: FakeUv) -> None:
    fake_uv.fail("lock", times=2, exit_code=7, stderr="no\n")
    codes = [
        subprocess.run([fake_uv.executable, word], capture_output=True, check=False).returncode
        for word in ("version", "lock", "lock", "version")
    ]
    assert codes == [0, 7, 7, 0]


def test_the_fake_uv_waits_before_or_after_its_work(fake_uv: FakeUv, tmp_path: Path) -> None:
    before, after = fake_uv.hang("venv"), fake_uv.hang("venv", is_done=True)
    for stop, is_there in ((before, False), (after, True)):
        venv = tmp_path / f"venv-{is_there}"
        with subprocess.Popen([fake_uv.executable, "venv", "-q", venv]) as process:
            stop.wait()
            assert (venv / "pyvenv.cfg").exists() == is_there
            stop.open()
        assert process.returncode == 0
        assert (venv / "pyvenv.cfg").exists()


# -- what uv says


def test_a_resolution_that_fails_carries_the_words_of_uv(settings: Settings, project: Path) -> None:
    write_project(project, "iniconfig>2", "iniconfig<1")
    with pytest.raises(ResolutionFailed) as caught:
        run_lock(settings, project)
    assert "iniconfig" in caught.value.detail
    assert "Using CPython" not in caught.value.detail
    assert not (project / "uv.lock").exists()


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ('[project.optional-dependencies]\na = ["six==1.15.0"]\nb = ["six==1.17.0"]\n',
         "[tool.uv] conflicts"),
        ('[dependency-groups]\na = ["six==1.15.0"]\nb = ["six==1.17.0"]\n', "./folder[extra]"),
        ('[project.optional-dependencies]\na = ["six==0.0.99"]\n', "[tool.uv] conflicts"),
        ('[dependency-groups]\nray-envs = ["six==1.15.0"]\nb = ["six==1.17.0"]\n',
         "the cluster's Ray"),
        ('dependencies = ["six==1.15.0", "six==1.17.0"]\n', "the cluster's Ray"),
    ],
    ids=["extras", "groups", "one-extra", "ray", "dependencies"],
)  # fmt: skip
def test_extras_that_exclude_each_other_are_a_hint_of_their_own(
    settings: Settings, project: Path, more: str, hint: str
) -> None:
    head = '[project]\nname = "p"\nversion = "0"\nrequires-python = ">=3.10"\n'
    (project / "pyproject.toml").write_text(head + more)
    with pytest.raises(ResolutionFailed) as caught:
        run_lock(settings, project)
    assert hint in caught.value.hint


def test_an_index_that_does_not_answer_is_no_resolution_failure(
    settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(project, "iniconfig")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(UvFailed) as caught:
        run_lock(settings, project)
    assert "127.0.0.1:9" in caught.value.detail
    assert caught.value.retryable


@pytest.mark.parametrize(
    "secret", ["user:pa55w0rd", "pa55w0rd", ":pa55w0rd", "user:pa55w0rd@x", "a%40b:pa55w0rd"]
)
def test_credentials_never_leave_in_what_uv_says(
    fake_uv: FakeUv, settings: Settings, project: Path, secret: str
) -> None:
    url = f"https://{secret}@index.example/simple/"
    fake_uv.fail("lock", stderr=f"error: cannot fetch `{url}`\n  from ({url})\n")
    lines: Lines = []
    with pytest.raises(UvFailed) as caught:
        run_lock(settings, project, on_line=lines.append)
    for text in (str(caught.value), *lines):
        assert "pa55w0rd" not in text
    assert "https://***@index.example/simple/" in caught.value.detail
    assert "https://***@index.example/simple/" in lines[0]


def test_the_words_of_uv_come_line_by_line_while_it_works(
    fake_uv: FakeUv, settings: Settings, project: Path
) -> None:
    lines: Lines = []
    run_lock(settings, project, on_line=lines.append)
    assert any(line.startswith("Resolved ") for line in lines)


# -- how uv is started


def test_uv_is_killed_when_its_time_is_over(
    fake_uv: FakeUv, settings: Settings, project: Path
) -> None:
    stop = fake_uv.hang("lock", times=None)
    for timeout_s in (0.5, 2, 8, 32):  # however long it takes to start here
        hasty = settings.model_copy(update={"uv_lock_timeout_s": timeout_s})
        with pytest.raises(UvFailed, match=f"uv did not end within {timeout_s:g} s") as caught:
            run_lock(hasty, project)
        assert "RAY_ENVS_UV_LOCK_TIMEOUT_S" in caught.value.hint
        if stop.reached.exists():
            break
    assert fake_uv.calls()
    for call in fake_uv.calls():
        assert not Path(f"/proc/{call.pid}").exists()


def test_a_uv_that_cannot_be_started_is_named(settings: Settings, project: Path) -> None:
    async def main() -> None:
        await Builder(settings, settings.root, uv_command=("/no/such/uv",)).resolve(project)

    with pytest.raises(StorageFailed, match="/no/such/uv"):
        asyncio.run(main())


def test_uv_takes_nothing_over_from_the_project_of_its_caller(
    tmp_path: Path, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in startup.NOT_INHERITED:
        monkeypatch.setenv(name, "of-the-caller")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "kept")
    script = tmp_path / "uv"
    script.write_text(f"#!/bin/sh\nenv >{tmp_path}/seen\npwd >{tmp_path}/cwd\nexit 3\n")
    script.chmod(0o755)
    cache = settings.root / "uv-cache"

    async def main() -> None:
        await Builder(settings, cache, uv_command=(str(script),)).resolve(project)

    with pytest.raises(UvFailed, match="exit code 3"):
        asyncio.run(main())
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert "of-the-caller" not in seen.values()
    assert seen["UV_DEFAULT_INDEX"] == "kept"
    assert (seen["UV_CACHE_DIR"], seen["UV_PYTHON_DOWNLOADS"]) == (str(cache), "never")
    assert (tmp_path / "cwd").read_text().strip() == str(project)


# -- a package index of our own, for which one needs a password


def wheel(name: str, version: str) -> bytes:
    """The smallest wheel that uv installs."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for path, text in {**files, f"{info}/RECORD": record}.items():
                archive.writestr(path, text)
        return file.getvalue()


def sdist(name: str, version: str) -> bytes:
    """A source archive that says all about itself: uv resolves it without building it."""
    text = f"Metadata-Version: 2.2\nName: {name}\nVersion: {version}\n".encode()
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            entry = tarfile.TarInfo(f"{name}-{version}/PKG-INFO")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))
        return file.getvalue()


class Index:
    """A simple index (PEP 503) on this machine. It knows `user` with `pa55w0rd`."""

    def __init__(self) -> None:
        self.files = {
            f"{name}-{version}-py3-none-any.whl": wheel(name, version)
            for name in ("alpha", "beta", "gamma", "ray")
            for version in ("1.0", "2.0")
        }
        self.files["onlysource-1.0.tar.gz"] = sdist("onlysource", "1.0")
        #: What every request is answered with, if not 200.
        self.status = 200
        index = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                code, body = index.answer(self.path, self.headers.get("Authorization"))
                self.send_response(code)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/simple"

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes]:
        _, kind, name = path.rstrip("/").split("/")
        if self.status != 200:
            return self.status, b""
        if authorization != "Basic " + base64.b64encode(b"user:pa55w0rd").decode():
            return 401, b""
        if kind == "files":
            return 200, self.files[name]
        links = [
            f'<a href="/files/{file}#sha256={hashlib.sha256(data).hexdigest()}">{file}</a>'
            for file, data in self.files.items()
            if file.startswith(f"{name}-")
        ]
        return (200, "".join(links).encode()) if links else (404, b"")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    index = Index()
    thread = threading.Thread(target=index.server.serve_forever, args=(0.01,))
    thread.start()
    yield index
    index.server.shutdown()
    thread.join()
    index.server.server_close()


def use(index: Index, folder: Path, *packages: str, rest: str = "") -> None:
    """A project that takes everything from `index`, by its name, and nothing from elsewhere."""
    names = [Requirement(package).name for package in (*packages, "beta", "gamma", "ray")]
    sources = "".join(f'{name} = {{ index = "mine" }}\n' for name in dict.fromkeys(names))
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "p"\nversion = "0"\nrequires-python = ">=3.10"\n'
        f"dependencies = {list(packages)!r}\n"
        f'[project.optional-dependencies]\nfast = ["beta"]\n'
        f'[dependency-groups]\nray-envs = ["ray"]\ncheck = ["gamma"]\ndev = ["beta"]\n'
        f"[tool.uv]\npackage = false\n{rest}"
        f'[[tool.uv.index]]\nname = "mine"\nurl = "{index.url}"\nexplicit = true\n'
        f"[tool.uv.sources]\n{sources}"
    )


@pytest.fixture
def let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_INDEX_MINE_USERNAME", "user")
    monkeypatch.setenv("UV_INDEX_MINE_PASSWORD", "pa55w0rd")


def new_builder(settings: Settings, **changes: object) -> Builder:
    return Builder(settings.model_copy(update=changes), settings.root / "uv-cache")


def resolve(settings: Settings, project: Path, **options: Any) -> Locked:
    return asyncio.run(new_builder(settings).resolve(project, **options))


def versions(lock: str) -> dict[str, str]:
    return {each["name"]: each["version"] for each in tomllib.loads(lock)["package"]}


def request_of(project: Path, **options: Any) -> BuildRequest:
    return BuildRequest(
        key="k",
        pyproject=(project / "pyproject.toml").read_text(),
        uv_lock=(project / "uv.lock").read_text(),
        target=this_target("2.0"),
        platform=this_platform().name,
        lock_sha256="",
        packages={},
        **options,
    )


def run_sync(
    settings: Settings,
    project: Path,
    *,
    is_offline: bool = False,
    on_line: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[str, list[str]]:
    """uv's words, and the modules that it installed."""
    venv = settings.root / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    changes = {name: options.pop(name) for name in ("malware_check",) if name in options}
    builder = new_builder(settings, **changes)
    request = request_of(project, **options)
    said = asyncio.run(builder.sync(project, venv, request, is_offline=is_offline, on_line=on_line))
    names = (path.stem for path in venv.glob("lib/*/site-packages/*.py"))
    return said, sorted(name for name in names if not name.startswith("_"))


@pytest.mark.parametrize("way", ["variables", "netrc", "url"])
def test_a_password_reaches_the_index_and_nothing_else(
    way: str, index: Index, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "variables":
        monkeypatch.setenv("UV_INDEX_MINE_USERNAME", "user")
        monkeypatch.setenv("UV_INDEX_MINE_PASSWORD", "pa55w0rd")
    elif way == "netrc":
        netrc = project.parent / "netrc"
        netrc.write_text("machine 127.0.0.1\nlogin user\npassword pa55w0rd\n")
        netrc.chmod(0o600)
        monkeypatch.setenv("NETRC", str(netrc))
    else:
        monkeypatch.setenv("UV_INDEX", f"mine=http://user:pa55w0rd@{index.host}/simple")
    use(index, project, "alpha<2")
    lines: Lines = []
    locked = resolve(settings, project, on_line=lines.append)
    assert versions(locked.text) == {
        "alpha": "1.0", "beta": "2.0", "gamma": "2.0", "ray": "2.0", "p": "0"
    }  # fmt: skip
    said, names = run_sync(settings, project, on_line=lines.append)
    assert names == ["alpha", "ray"]
    assert index.url in locked.text
    assert " + alpha==1.0" in said
    for text in (locked.text, locked.output, said, *lines):
        assert "pa55w0rd" not in text


@pytest.mark.parametrize(
    ("status", "password", "error", "said"),
    [
        (200, "pa55wrong", ResolutionFailed, "401 Unauthorized"),
        (403, "pa55w0rd", ResolutionFailed, "403 Forbidden"),
        (500, "pa55w0rd", UvFailed, "500 Internal Server Error"),
    ],
)
def test_an_index_that_refuses_is_named_and_the_password_is_not(
    status: int,
    password: str,
    error: type[RayEnvsError],
    said: str,
    index: Index,
    settings: Settings,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("UV_INDEX", f"mine=http://user:{password}@{index.host}/simple")
    index.status = status
    use(index, project, "alpha")
    lines: Lines = []
    with pytest.raises(error) as caught:
        resolve(settings, project, on_line=lines.append)
    assert said in " ".join(caught.value.detail.split())
    assert index.host in caught.value.detail
    if error is ResolutionFailed:
        assert "UV_INDEX_<NAME>_PASSWORD" in caught.value.hint
    for text in (str(caught.value), *lines):
        assert password not in text


#: Where a secret can stand in a setting of uv; some of these uv cannot even read.
SECRET_SETTINGS = {
    "password": ("UV_INDEX", "mine=http://user:{secret}@{host}/simple"),
    "password with a slash": ("UV_INDEX", "mine=http://user:pa5/{secret}@{host}/simple"),
    "password with a space": ("UV_DEFAULT_INDEX", "http://user:pa5 {secret}@{host}/simple"),
    "password with a quote": ("UV_DEFAULT_INDEX", 'http://user:pa5"{secret}@{host}/simple'),
    "password with an apostrophe": ("UV_DEFAULT_INDEX", "http://user:it's{secret}@{host}/simple"),
    "password with a percent": ("UV_DEFAULT_INDEX", "http://user:%7B{secret}%7D@{host}/simple"),
    "user name": ("UV_DEFAULT_INDEX", "http://{secret}@{host}/simple"),
    "no scheme": ("UV_DEFAULT_INDEX", "user:{secret}@{host}/simple"),
    "no host": ("UV_DEFAULT_INDEX", "http://user:{secret}@"),
    "path": ("UV_DEFAULT_INDEX", "http://{host}/{secret}/simple"),
    "parameter token": ("UV_INDEX", "mine=http://{host}/simple?token={secret}"),
    "parameter key": ("UV_INDEX", "mine=http://{host}/simple?key={secret}"),
    "parameter of any name": ("UV_INDEX", "mine=http://{host}/simple?x={secret}"),
    "links": ("UV_FIND_LINKS", "http://user:{secret}@{host}/links"),
    "old name": ("UV_EXTRA_INDEX_URL", "http://user:{secret}@{host}/simple"),
    "insecure host": ("UV_INSECURE_HOST", "user:{secret}@{host}:x"),
    "proxy": ("HTTP_PROXY", "http://user:{secret}@127.0.0.1:9"),
    "separate password": ("UV_INDEX_MINE_PASSWORD", "{secret}"),
    "another program's": ("SOME_API_TOKEN", "{secret}"),
}
SECRET_ENTRIES = {
    "index": '[[tool.uv.index]]\nname = "b"\nurl = "http://user:{secret}@{host}/simple"\n',
    "index with a space": '[[tool.uv.index]]\nurl = "http://user:pa5 {secret}@{host}/simple"\n',
    "insecure host": 'allow-insecure-host = ["user:{secret}@{host}:x"]\n',
    "links": 'find-links = ["user:{secret}@{host}"]\n',
    "requirement": 'constraint-dependencies = ["six @ user:{secret}@{host}"]\n',
    "unknown key": 'indexes = "http://user:{secret}@{host}/simple"\n',
    "broken": 'index-url = "http://user:{secret}@{host}/simple" x\n',
}


def said_by_uv(settings: Settings, project: Path) -> str:
    """All that comes from uv about a project, which it may resolve or not."""
    lines: Lines = []
    with suppress(RayEnvsError):
        lines.append(resolve(settings, project, on_line=lines.append).output)
    try:
        resolve(settings, project, on_line=lines.append)
    except RayEnvsError as exc:
        lines += [str(exc), repr(exc.to_dict())]
    return "\n".join(lines)


@pytest.mark.parametrize("place", SECRET_SETTINGS)
def test_a_secret_of_the_environment_is_never_told_whatever_uv_makes_of_it(
    place: str, index: Index, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, setting = SECRET_SETTINGS[place]
    use(index, project, "alpha")
    monkeypatch.setenv(name, setting.format(secret="pa55w0rd-17x", host=index.host))
    said = said_by_uv(settings, project)
    assert said
    assert "pa55w0rd-17x" not in said


@pytest.mark.parametrize("place", SECRET_ENTRIES)
def test_a_secret_of_a_project_is_never_told_whatever_uv_makes_of_it(
    place: str, index: Index, settings: Settings, project: Path
) -> None:
    use(index, project, "alpha")
    file = project / "pyproject.toml"
    entry = SECRET_ENTRIES[place].format(secret="pa55w0rd-17x", host=index.host)
    file.write_text(file.read_text().replace("[tool.uv]\n", "") + entry)
    assert "pa55w0rd-17x" not in said_by_uv(settings, project)


def test_a_password_of_a_netrc_file_is_never_told(
    index: Index, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host = index.host.partition(":")[0]
    (tmp_path / "netrc").write_text(f"machine {host} login user password pa55w0rd-17x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ended = asyncio.run(
        startup.run_clean(settings, ["cat", str(tmp_path / "netrc")], project, timeout_s=20)
    )
    assert ended.output == f"machine {host} login user password ***"


def test_an_index_that_fails_during_a_sync_is_named_and_the_password_is_not(
    let_in: None, index: Index, settings: Settings, project: Path
) -> None:
    use(index, project, "alpha")
    resolve(settings, project)
    shutil.rmtree(settings.root / "uv-cache")
    index.status = 500
    with pytest.raises(UvFailed) as caught:
        run_sync(settings, project)
    assert "500 Internal Server Error" in caught.value.detail
    assert "pa55w0rd" not in str(caught.value)


# -- what is asked of uv


def test_pins_move_only_for_the_packages_that_are_to_be_upgraded(
    let_in: None, index: Index, settings: Settings, project: Path
) -> None:
    def now(*packages: str, **options: Any) -> dict[str, str]:
        use(index, project, *packages)
        found = versions(resolve(settings, project, **options).text)
        return {name: found[name] for name in ("alpha", "gamma")}

    assert now("alpha<2", "gamma<2") == {"alpha": "1.0", "gamma": "1.0"}
    old = (project / "uv.lock").read_text()
    assert now("alpha", "gamma") == {"alpha": "1.0", "gamma": "1.0"}
    assert now("alpha", "gamma", upgrade=["gamma"]) == {"alpha": "1.0", "gamma": "2.0"}
    (project / "uv.lock").write_text(old)
    assert now("alpha", "gamma", upgrade=()) == {"alpha": "2.0", "gamma": "2.0"}


def test_where_only_wheels_are_allowed_a_source_archive_does_not_exist(
    let_in: None, index: Index, settings: Settings, project: Path
) -> None:
    use(index, project, "onlysource")
    with pytest.raises(ResolutionFailed, match="no packages that satisfy") as caught:
        resolve(settings, project, only_binary=True)
    assert "has no usable wheels" in caught.value.detail
    assert "`--no-build`" in caught.value.detail
    assert "RAY_ENVS_ONLY_BINARY" in caught.value.hint
    # A lock that is there is kept by uv all the same: the policy has the last word, and the node.
    text = resolve(settings, project).text
    assert resolve(settings, project, only_binary=True).text == text
    with pytest.raises(InvalidPackages, match=r"onlysource 1\.0 has no wheel"):
        policy.check_lock(text, settings, only_binary=True)
    with pytest.raises(ResolutionFailed, match="no wheel for this node") as caught:
        run_sync(settings, project, only_binary=True)
    assert "onlysource==1.0" in caught.value.detail


def test_a_lock_that_was_made_with_another_index_is_refused_by_the_policy(
    index: Index, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(project, "alpha")
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://user:pa55w0rd@{index.host}/simple/")
    text = resolve(settings, project).text
    own = settings.model_copy(update={"allowed_indexes": (index.url.upper().replace("S", "s"),)})
    with pytest.raises(InvalidPackages, match=r"alpha 2\.0 comes from registry http"):
        policy.check_lock(text, own)
    for allowed in ((), (index.url,), (f"{index.url}/",), ("https://h.example/s", index.url)):
        policy.check_lock(text, settings.model_copy(update={"allowed_indexes": allowed}))


def test_an_export_holds_what_the_environment_does_and_is_the_same_everywhere(
    let_in: None, index: Index, settings: Settings, project: Path, tmp_path: Path
) -> None:
    use(index, project, "alpha")
    resolve(settings, project)
    other = tmp_path / "other"
    shutil.copytree(project, other)
    index.status = 500  # an export needs no network

    def export(folder: Path, **options: Any) -> str:
        return asyncio.run(new_builder(settings).export(folder, **options))

    text = export(project)
    pins = [line.partition(" ")[0] for line in text.splitlines() if line[0] not in " #"]
    assert pins == ["alpha==2.0", "ray==2.0"]
    assert text.count("--hash=sha256:") == 2
    both = {"extras": ["fast"], "groups": ["check"]}
    data = tomllib.loads(export(project, format="pylock", **both))
    assert [each["name"] for each in data["packages"]] == ["alpha", "beta", "gamma", "ray"]
    for form in ("requirements", "pylock"):
        text = export(project, format=form, **both)
        assert text == export(other, format=form, **both)
        assert str(tmp_path) not in text
        assert "uv export" not in text
        assert "pa55w0rd" not in text
    assert sorted(path.name for path in other.iterdir()) == ["pyproject.toml", "uv.lock"]


def test_an_export_without_a_lock_is_a_failure_with_the_words_of_uv(
    settings: Settings, project: Path
) -> None:
    with pytest.raises(UvFailed, match="uv export ended with exit code") as caught:
        asyncio.run(new_builder(settings).export(project))
    assert "uv.lock" in caught.value.detail


def test_pruning_takes_what_nothing_refers_to_and_leaves_what_is_needed(
    let_in: None, index: Index, settings: Settings, project: Path
) -> None:
    assert "cache" in asyncio.run(new_builder(settings).prune_cache())  # there is none yet
    use(index, project, "alpha")
    resolve(settings, project)
    run_sync(settings, project)
    (bucket,) = (settings.root / "uv-cache").glob("archive-v*")
    rubbish = bucket / "rubbish"
    rubbish.mkdir()
    (rubbish / "file").write_text("x")
    assert "Removed" in asyncio.run(new_builder(settings).prune_cache())
    assert not rubbish.exists()
    assert run_sync(settings, project, is_offline=True)[1] == ["alpha", "ray"]


def test_an_index_is_asked_although_the_cache_knows_the_answer(
    let_in: None, index: Index, settings: Settings, project: Path
) -> None:
    use(index, project, "alpha")
    text = resolve(settings, project).text
    builder = new_builder(settings)
    asyncio.run(builder.check_index(project, BUILT_S))
    index.status = 500
    assert resolve(settings, project).text == text
    with pytest.raises(UvFailed) as caught:
        asyncio.run(builder.check_index(project, BUILT_S))
    assert "500 Internal Server Error" in caught.value.detail
    index.status = 403
    with pytest.raises(UvFailed, match="exit code 1"):
        asyncio.run(builder.check_index(project, BUILT_S))
    assert (project / "uv.lock").read_text() == text


def test_an_index_that_does_not_answer_in_time_is_a_failure(
    fake_uv: FakeUv, settings: Settings, project: Path
) -> None:
    fake_uv.hang("lock")
    with pytest.raises(UvFailed, match=r"did not end within 0\.5 s") as caught:
        asyncio.run(new_builder(settings).check_index(project, 0.5))
    assert "reachable" in caught.value.hint


# -- known malware


#: Only newer versions of uv have the check.
HAS_CHECK = Version(uv_version()) >= Version("0.11.16")


@pytest.fixture
def osv() -> Iterator[str]:
    """A service like OSV, which takes every package for malware; its address."""

    known = {"id": "MAL-2026-1", "modified": "2026-01-01T00:00:00Z"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.tell({"results": [{"vulns": [known]} for _ in asked["queries"]]})

        def do_GET(self) -> None:
            self.tell(known)

        def tell(self, data: object) -> None:
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(not HAS_CHECK, reason="this uv has no check for malware")
def test_known_malware_is_not_installed_where_the_check_is_on(
    osv: str, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_MALWARE_CHECK_URL", osv)
    write_project(project, "iniconfig")
    with (project / "pyproject.toml").open("a") as file:
        file.write("[dependency-groups]\nray-envs = []\n[tool.uv]\npackage = false\n")
    resolve(settings, project)
    with pytest.raises(InvalidPackages, match="known malware") as caught:
        run_sync(settings, project, malware_check=True)
    assert "iniconfig" in caught.value.detail
    run_sync(settings, project)
    # Nobody can be asked offline: what the cache has was checked when it came.
    monkeypatch.setenv("UV_MALWARE_CHECK", "1")
    run_sync(settings, project, malware_check=True, is_offline=True)


def test_a_uv_without_the_check_installs_nothing_where_the_check_is_on(
    osv: str, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(project, "iniconfig")
    with (project / "pyproject.toml").open("a") as file:
        file.write("[dependency-groups]\nray-envs = []\n[tool.uv]\npackage = false\n")
    resolve(settings, project)
    for version in ("0.9.30", "0.11.15"):
        monkeypatch.setattr("ray_envs.node.uv.uv_version", lambda version=version: version)
        with pytest.raises(UvFailed, match=f"uv {version} has no check for malware") as caught:
            run_sync(settings, project, malware_check=True)
        assert "uv>=0.11.16,<1" in caught.value.hint
    assert not list(project.parent.rglob("iniconfig/__init__.py"))
    run_sync(settings, project)


# -- verification


def test_an_environment_without_the_promised_ray_is_refused(
    warm: Settings, locked: LockedRequest, tmp_path: Path
) -> None:
    with pytest.raises(UvFailed, match=r"did not install .*ray"):
        asyncio.run(startup.verify(warm, Path(sys.executable), locked(), tmp_path))


def test_an_interpreter_that_takes_no_hold_is_refused(
    warm: Settings, locked: LockedRequest
) -> None:
    request, store, venv = locked(), Store(warm), warm.root / "venv"
    store.set_up()

    async def main() -> None:
        builder = new_builder(warm)
        files = {"pyproject.toml": request.pyproject, "uv.lock": request.uv_lock}
        with store.scratch(files) as project:
            await builder.sync(project, venv, request, is_offline=False)
        site = venv / "lib" / f"python{request.target.python_minor}" / "site-packages"
        await startup.verify(warm, venv / "bin" / "python", request, site)

    with pytest.raises(UvFailed, match="failed its start-up check"):
        asyncio.run(main())
