"""The builder: uv's words come back, secrets do not, no process outlives its time or parent."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray_envs import builder as builder_module
from ray_envs.builder import Builder
from ray_envs.errors import ResolutionFailed, StorageFailed, UvFailed
from ray_envs.models import BuildRequest
from ray_envs.settings import Settings
from ray_envs.store import Store
from ray_envs.testing import FakeUv
from tests.local.conftest import wait_until

if TYPE_CHECKING:
    from tests.local.conftest import Locked

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
        return await builder.lock(project, **options)  # type: ignore[arg-type]

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


@pytest.mark.parametrize("size", [2**16 - 1, 2**16 + 1, 2**20])
def test_a_line_of_any_length_from_uv_is_an_ordinary_failure(
    fake_uv: FakeUv, settings: Settings, project: Path, size: int
) -> None:
    fake_uv.fail("lock", stderr="x" * size)
    with pytest.raises(UvFailed):
        run_lock(settings, project)


# -- processes


def test_uv_is_killed_when_its_time_is_over(
    fake_uv: FakeUv, settings: Settings, project: Path
) -> None:
    stop = fake_uv.hang("lock")
    hasty = settings.model_copy(update={"uv_lock_timeout_s": 0.5})
    with pytest.raises(UvFailed, match=r"uv did not end within 0\.5 s") as caught:
        run_lock(hasty, project)
    assert "RAY_ENVS_UV_LOCK_TIMEOUT_S" in caught.value.hint
    assert stop.reached.exists()
    (call,) = fake_uv.calls()
    assert not Path(f"/proc/{call.pid}").exists()


def test_the_whole_group_of_uv_is_killed_with_it(
    tmp_path: Path, settings: Settings, project: Path
) -> None:
    script = tmp_path / "uv"
    script.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{tmp_path}/pid\nwait\n")
    script.chmod(0o755)
    hasty = settings.model_copy(update={"uv_lock_timeout_s": 3})

    async def main() -> None:
        builder = Builder(hasty, settings.root / "uv-cache", uv_command=(str(script),))
        await builder.lock(project)

    with pytest.raises(UvFailed):
        asyncio.run(main())
    child = int((tmp_path / "pid").read_text())
    # The signal was sent to it with the others; when the kernel delivers it is not ours to say.
    wait_until(lambda: is_gone(child), f"the end of {child}")


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def test_uv_is_killed_when_its_caller_is_cancelled(
    fake_uv: FakeUv, settings: Settings, project: Path
) -> None:
    stop = fake_uv.hang("lock")

    async def main() -> None:
        builder = Builder(settings, settings.root / "uv-cache")
        task = asyncio.create_task(builder.lock(project))
        await asyncio.to_thread(stop.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    (call,) = fake_uv.calls()
    assert not Path(f"/proc/{call.pid}").exists()


def test_a_uv_that_cannot_be_started_is_named(settings: Settings, project: Path) -> None:
    async def main() -> None:
        await Builder(settings, settings.root, uv_command=("/no/such/uv",)).lock(project)

    with pytest.raises(StorageFailed, match="/no/such/uv"):
        asyncio.run(main())


def test_uv_takes_nothing_over_from_the_project_of_its_caller(
    tmp_path: Path, settings: Settings, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in builder_module._NOT_FOR_UV:
        monkeypatch.setenv(name, "of-the-caller")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "kept")
    script = tmp_path / "uv"
    script.write_text(f"#!/bin/sh\nenv >{tmp_path}/seen\npwd >{tmp_path}/cwd\nexit 3\n")
    script.chmod(0o755)
    cache = settings.root / "uv-cache"

    async def main() -> None:
        await Builder(settings, cache, uv_command=(str(script),)).lock(project)

    with pytest.raises(UvFailed, match="exit code 3"):
        asyncio.run(main())
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert "of-the-caller" not in seen.values()
    assert seen["UV_DEFAULT_INDEX"] == "kept"
    assert (seen["UV_CACHE_DIR"], seen["UV_PYTHON_DOWNLOADS"]) == (str(cache), "never")
    assert (tmp_path / "cwd").read_text().strip() == str(project)


# -- byte-code


@pytest.fixture
def sync(warm: Settings, tmp_path: Path, locked: Locked) -> Callable[[BuildRequest, str], Path]:
    """A function that installs a request with uv alone; returns its site-packages."""
    store = Store(warm)
    store.set_up()

    def install(request: BuildRequest, name: str) -> Path:
        venv = tmp_path / "root" / name
        minor = request.target.python_minor

        async def main() -> None:
            builder = Builder(warm, store.cache)
            with store.scratch(
                {"pyproject.toml": request.pyproject, "uv.lock": request.uv_lock}
            ) as project:
                await builder.sync(project, venv, request, is_offline=False)

        asyncio.run(main())
        return venv / "lib" / f"python{minor}" / "site-packages"

    return install


def run_compile(settings: Settings, site: Path, names: list[str]) -> bool:
    async def main() -> bool:
        return await Builder(settings, Store(settings).cache).compile(site, names)

    return asyncio.run(main())


def test_byte_code_goes_into_the_cache_and_every_later_environment_has_it(
    warm: Settings, sync: Callable[[BuildRequest, str], Path], locked: Locked
) -> None:
    request = locked("iniconfig")
    first = sync(request, "first")
    builder = Builder(warm, Store(warm).cache)
    late = builder.without_bytecode(first, before=float("inf"))
    assert [name.partition("-")[0] for name in late] == ["iniconfig"]
    assert run_compile(warm, first, late)
    second = sync(request, "second")
    for file in second.glob("iniconfig/*.py"):
        pyc = Path(importlib.util.cache_from_source(str(file)))
        assert pyc.read_bytes()[4:8] == (0b01).to_bytes(4, "little"), "not an unchecked hash"
    # The first was linked before: it must be linked again, and the marker says so.
    assert not (first / late[0] / builder_module._marker_name()).exists()
    marker = second / late[0] / builder_module._marker_name()
    made_at = float(marker.read_text())
    assert builder.without_bytecode(second, before=made_at + 1) == []
    assert late[0] in builder.without_bytecode(second, before=made_at)


def test_what_is_compiled_is_not_compiled_again(
    warm: Settings,
    sync: Callable[[BuildRequest, str], Path],
    locked: Locked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = sync(locked(), "first")
    builder = Builder(warm, Store(warm).cache)

    async def no_compiler(*_: object) -> None:
        pytest.fail("the byte-code compiler was started")

    monkeypatch.setattr(Builder, "_compile_folders", no_compiler)
    assert run_compile(warm, site, builder.without_bytecode(site, before=0))


def test_a_source_that_is_no_python_keeps_nothing_else_from_being_compiled(
    warm: Settings, sync: Callable[[BuildRequest, str], Path], locked: Locked
) -> None:
    site = sync(locked("iniconfig"), "first")
    (archive,) = [p.parent for p in Store(warm).cache.glob("archive-v*/*/iniconfig")]
    (archive / "iniconfig" / "template.py").write_text("{{ not python }}")
    late = [name for name in os.listdir(site) if name.startswith("iniconfig-")]
    assert run_compile(warm, site, late)
    assert Path(
        importlib.util.cache_from_source(str(archive / "iniconfig" / "__init__.py"))
    ).exists()


def test_wheels_that_the_cache_does_not_have_are_reported(
    warm: Settings, sync: Callable[[BuildRequest, str], Path], locked: Locked
) -> None:
    site = sync(locked(), "first")
    assert not run_compile(warm, site, ["of_nowhere-1.0.dist-info"])


# -- verification


def test_an_environment_without_the_promised_ray_is_refused(
    warm: Settings, locked: Locked, tmp_path: Path
) -> None:
    async def main() -> None:
        builder = Builder(warm, Store(warm).cache)
        await builder.verify(Path(sys.executable), locked(), tmp_path)

    with pytest.raises(UvFailed, match=r"did not install .*ray"):
        asyncio.run(main())


def test_an_interpreter_that_takes_no_hold_is_refused(
    warm: Settings, sync: Callable[[BuildRequest, str], Path], locked: Locked
) -> None:
    request = locked()
    site = sync(request, "first")
    python = warm.root / "first" / "bin" / "python"

    async def main() -> None:
        await Builder(warm, Store(warm).cache).verify(python, request, site)

    with pytest.raises(UvFailed, match="the new interpreter says"):
        asyncio.run(main())
