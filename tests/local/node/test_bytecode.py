"""Byte-code: made once in uv's cache, in every later environment, and never doubted by time."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ray_envs.errors import UvFailed
from ray_envs.models import BuildRequest
from ray_envs.node import bytecode
from ray_envs.node.interpreter import base_python
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from tests.local.conftest import Locked


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
        return await bytecode.compile_wheels(
            Store(settings).cache, site, names, python=base_python(), settings=settings
        )

    return asyncio.run(main())


def test_byte_code_goes_into_the_cache_and_every_later_environment_has_it(
    warm: Settings, sync: Callable[[BuildRequest, str], Path], locked: Locked
) -> None:
    request = locked("iniconfig")
    first = sync(request, "first")
    late = bytecode.without_bytecode(first, before=float("inf"))
    assert [name.partition("-")[0] for name in late] == ["iniconfig"]
    assert run_compile(warm, first, late)
    second = sync(request, "second")
    for file in second.glob("iniconfig/*.py"):
        pyc = Path(importlib.util.cache_from_source(str(file)))
        assert pyc.read_bytes()[4:8] == (0b01).to_bytes(4, "little"), "not an unchecked hash"
    # The first was linked before: it must be linked again, and the marker says so.
    assert not (first / late[0] / bytecode.marker_name()).exists()
    marker = second / late[0] / bytecode.marker_name()
    made_at = float(marker.read_text())
    assert bytecode.without_bytecode(second, before=made_at + 1) == []
    assert late[0] in bytecode.without_bytecode(second, before=made_at)


def test_what_is_compiled_is_not_compiled_again(
    warm: Settings,
    sync: Callable[[BuildRequest, str], Path],
    locked: Locked,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = sync(locked(), "first")

    async def no_compiler(*_: object, **__: object) -> None:
        pytest.fail("the byte-code compiler was started")

    monkeypatch.setattr(bytecode, "_compile_folders", no_compiler)
    assert run_compile(warm, site, bytecode.without_bytecode(site, before=0))


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


def test_a_marker_that_is_damaged_or_missing_means_no_byte_code(tmp_path: Path) -> None:
    for name, text in (("early", "5.0"), ("late", "10.0"), ("damaged", "x"), ("empty", "")):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / bytecode.marker_name()).write_text(text)
    (tmp_path / "none-1.dist-info").mkdir()
    (tmp_path / "package").mkdir()
    late = bytecode.without_bytecode(tmp_path, before=10)
    assert late == [f"{name}-1.dist-info" for name in ("damaged", "empty", "late", "none")]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """An unpacked wheel, as uv's cache holds it."""
    folder = tmp_path / "cache" / "archive-v0" / "x"
    for name in ("a-1.dist-info/WHEEL", "a/m.py", "a-1.data/scripts/s.py"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return folder


def compile_wheel(wheel: Path, settings: Settings, python: str) -> bool:
    return asyncio.run(
        bytecode.compile_wheels(
            wheel.parents[1], wheel, ["a-1.dist-info"], python=python, settings=settings
        )
    )


def test_what_is_compiled_is_read_only_and_the_scripts_are_left_alone(
    wheel: Path, settings: Settings
) -> None:
    assert compile_wheel(wheel, settings, base_python())
    compiled = [str(path.relative_to(wheel)) for path in sorted(wheel.rglob("*.pyc"))]
    assert compiled == [f"a/__pycache__/m.{sys.implementation.cache_tag}.pyc"]
    files = [path for path in wheel.rglob("*") if path.is_file()]
    assert not [path for path in files if path.stat().st_mode & 0o222]
    assert os.access(wheel / "a", os.W_OK)


def test_a_compiler_that_fails_leaves_no_marker(
    wheel: Path, settings: Settings, tmp_path: Path
) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho broken\nexit 9\n")
    script.chmod(0o755)
    with pytest.raises(UvFailed, match="compileall ended with exit code 9") as caught:
        compile_wheel(wheel, settings, str(script))
    assert caught.value.detail == "broken"
    assert not (wheel / "a-1.dist-info" / bytecode.marker_name()).exists()
