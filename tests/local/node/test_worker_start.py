"""Whether a Ray worker can start in an environment: checked once for the same files."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_envs.errors import WorkerCannotStart
from ray_envs.models import Phase
from ray_envs.node.startup import run_clean
from ray_envs.node.store import Store
from ray_envs.node.worker_start import WorkerStart
from ray_envs.settings import Settings
from tests.local.conftest import Locked, build

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"

FILES = [
    "ray/__init__.py",
    "ray/_private/__init__.py",
    "ray/_private/workers/__init__.py",
    "ray/_private/workers/default_worker.py",
]

Place = Callable[[str], Path]


@pytest.fixture
def place(environment: Callable[[str], Store], settings: Settings) -> Place:
    """A function that makes an environment whose `ray` is a few files, linked from one cache."""
    cache = settings.root / "uv-cache"

    def make(key: str) -> Path:
        site = environment(key).site_packages(key, MINOR)
        for name in FILES:
            kept = cache / name
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text("import ray_needs_me\n" if "default" in name else "")
            (site / name).parent.mkdir(exist_ok=True)
            os.link(kept, site / name)
        (site / "ray_needs_me.py").write_text("")
        return site

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders in which the imports were really done."""
    done: list[str] = []

    async def counted(settings: Settings, command: list[str], cwd: Path, **more: Any) -> Any:
        done.append(cwd.parents[3].name)
        return await run_clean(settings, command, cwd, **more)

    monkeypatch.setattr("ray_envs.node.worker_start.run_clean", counted)
    return done


def check(settings: Settings, site: Path, **more: Any) -> None:
    asyncio.run(WorkerStart(settings).check(site.parents[2] / "bin" / "python", site, **more))


def share(site: Path, first: Path) -> None:
    """Make the last file of the worker's imports the same in both, as uv's links are."""
    (site / "ray_needs_me.py").unlink()
    os.link(first / "ray_needs_me.py", site / "ray_needs_me.py")


def test_the_same_files_are_imported_once_also_by_the_next_agent(
    settings: Settings, place: Place, runs: list[str]
) -> None:
    first, second, third = place("one"), place("two"), place("three")
    share(second, first)
    (second / "more_packages").mkdir()
    check(settings, first)
    check(settings, second)
    assert runs == ["one"]
    check(settings, third)  # a file of its own
    assert runs == ["one", "three"]
    check(settings, second, is_forced=True)
    check(settings, second, env_vars={"X": "1"})
    assert runs == ["one", "three", "two", "two"]


@pytest.mark.parametrize(
    "name", ["sitecustomize.py", "usercustomize.py", "extra.pth", "optional/__init__.py"]
)
def test_what_could_change_the_imports_is_checked_again(
    settings: Settings, place: Place, runs: list[str], name: str
) -> None:
    worker = settings.root / "uv-cache" / "ray" / "_private" / "workers" / "default_worker.py"
    first, second = place("one"), place("two")
    share(second, first)
    worker.write_text("import ray_needs_me\ntry: import optional\nexcept ImportError: pass\n")
    check(settings, first)
    (second / name).parent.mkdir(exist_ok=True)
    (second / name).write_text("")
    check(settings, second)
    assert runs == ["one", "two"]


def test_what_is_remembered_may_be_damaged_or_of_another_version(
    settings: Settings, place: Place, runs: list[str]
) -> None:
    site = place("one")
    for content in ("", "[]", '{"starts": [{"python": 1}]}', "\0" * 100):
        (settings.root / "worker-starts.json").write_text(content)
        check(settings, site)
    assert runs == ["one"] * 4
    check(settings, site)
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("content", "detail", "hint"),
    [
        ("import zz_idna", "No module named 'zz_idna'", "Ray needs zz_idna: do not exclude it"),
        ("import zz_idna.core", "No module named 'zz_idna'", "Ray needs zz_idna"),
        ("import os; os._exit(3)", "", "Ray's worker imports it"),
        ("raise OSError('x.so: cannot open shared object file')", "x.so", "system library"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "", "Ray's worker imports it"),
    ],
)
def test_an_import_that_fails_is_told_with_its_reason_and_not_remembered(
    settings: Settings, place: Place, content: str, detail: str, hint: str
) -> None:
    site = place("one")
    (site / "ray_needs_me.py").write_text(content)
    for _ in range(2):
        with pytest.raises(WorkerCannotStart) as caught:
            check(settings, site)
        assert detail in caught.value.detail
        assert hint in caught.value.hint


def test_variables_that_break_the_start_are_named(settings: Settings, place: Place) -> None:
    site = place("one")
    (site / "ray_needs_me.py").write_text("import os\nassert 'LC_X' not in os.environ, 'no locale'")
    check(settings, site)
    with pytest.raises(WorkerCannotStart, match="no locale") as caught:
        check(settings, site, env_vars={"LC_X": "de"})
    assert "env_vars LC_X" in caught.value.hint


def test_a_new_environment_of_a_node_is_checked_and_the_next_one_with_the_same_ray_is_not(
    warm: Settings, locked: Locked, runs: list[str]
) -> None:
    (warm.root / "worker-starts.json").unlink()
    first, second = locked("six==1.16.0"), locked("six==1.17.0")
    for request in (first, second):
        assert build(warm, request).phase is Phase.READY
    assert runs == [first.key]
