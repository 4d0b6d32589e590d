"""The trial of uv: a uv that does something else than we read is refused, with what is different.

The real uv runs; where it must be different, a program of the test changes what it has left.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uv

from ray_envs.errors import UvFailed
from ray_envs.node import uv_trial
from ray_envs.node.interpreter import uv_version
from ray_envs.node.store import Store
from ray_envs.node.uv_trial import UvTrial, layout_here, tried
from ray_envs.settings import Settings
from ray_envs.testing import FakeUv
from tests.local.conftest import new_agent

#: Runs the real uv, and then some lines of Python in the folder of the project. `cache` is the
#: folder of the cache, `command` what uv was asked for.
ODD_UV = """\
#!{python} -IS
import glob, os, pathlib, re, shutil, subprocess, sys
command, cache = sys.argv[1], os.environ["UV_CACHE_DIR"]
{before}
code = subprocess.call([{real!r}, *sys.argv[1:]])
if code:
    sys.exit(code)
{after}
"""

OddUv = Callable[..., None]


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has tried no uv yet."""
    monkeypatch.setattr(uv_trial, "_layouts", {})


@pytest.fixture
def odd_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OddUv:
    """A function that makes a uv which does more, and makes it the one of this node."""
    real = uv.find_uv_bin()

    def make(after: str = "", before: str = "") -> None:
        program = tmp_path / "odd-uv"
        text = ODD_UV.format(python=sys.executable, real=real, after=after, before=before)
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setattr("ray_envs.node.uv_trial.uv.find_uv_bin", lambda: str(program))

    return make


@pytest.fixture
def store(settings: Settings) -> Store:
    made = Store(settings)
    made.set_up()
    return made


def test_the_uv_that_is_installed_can_be_used_and_leaves_nothing(store: Store) -> None:
    began = time.monotonic()
    asyncio.run(UvTrial(store).check())
    assert time.monotonic() - began < 30  # 0.15 s on a machine that does nothing else
    layout = layout_here()
    kinds = [bucket.partition("-v")[0] for bucket in layout.split()]
    assert kinds == ["archive", "sdists", "wheels"]
    assert (store.root / "uv-trials.json").read_text() == (
        f'{{"layouts":{{"{uv_version()}":"{layout}"}}}}'
    )
    assert os.listdir(store.cache) == os.listdir(store.root / "scratch") == []


def test_a_uv_is_tried_once_on_a_root_also_by_the_next_agent(store: Store, fake_uv: FakeUv) -> None:
    asyncio.run(UvTrial(store).check())
    assert [call.command for call in fake_uv.calls()] == ["lock", "sync", "sync"]
    asyncio.run(UvTrial(store).check())
    assert len(fake_uv.calls()) == 3
    assert layout_here()
    assert len(fake_uv.calls()) == 3
    asyncio.run(UvTrial(store).check(is_forced=True))
    assert len(fake_uv.calls()) == 6


def test_several_who_ask_at_once_try_it_once(store: Store, fake_uv: FakeUv) -> None:
    async def all_at_once() -> None:
        trial = UvTrial(store)
        await asyncio.gather(*(trial.check() for _ in range(5)))

    asyncio.run(all_at_once())
    assert len(fake_uv.calls()) == 3


@pytest.mark.parametrize(
    "content", ["", "[]", '{"layouts": []}', '{"layouts": {"0.1": 1}}', '{"a": 1}', "\0" * 100]
)
def test_what_is_remembered_may_be_damaged_or_of_another_version(
    store: Store, fake_uv: FakeUv, content: str
) -> None:
    (store.root / "uv-trials.json").write_text(content)
    asyncio.run(UvTrial(store).check())
    asyncio.run(UvTrial(store).check())
    assert len(fake_uv.calls()) == 3


def test_another_version_of_uv_is_tried_too_and_both_are_remembered(
    store: Store, fake_uv: FakeUv, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(UvTrial(store).check())
    monkeypatch.setattr(uv_trial, "uv_version", lambda: "0.99.1")
    asyncio.run(UvTrial(store).check())
    monkeypatch.undo()
    known = (store.root / "uv-trials.json").read_text()
    assert "0.99.1" in known
    assert uv_version() in known


@pytest.mark.parametrize("name", ["UV_OFFLINE", "UV_NO_CACHE", "UV_LINK_MODE", "UV_DEFAULT_INDEX"])
def test_settings_of_the_node_do_not_count(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    values = {"UV_LINK_MODE": "copy", "UV_DEFAULT_INDEX": "https://127.0.0.1:1/simple"}
    monkeypatch.setenv(name, values.get(name, "1"))
    asyncio.run(UvTrial(store).check())


LOCK = "if command == 'lock': lock = pathlib.Path('uv.lock'); text = lock.read_text(); "
SYNC = "if command == 'sync': "


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (LOCK + "lock.write_text(text.replace('version = 1', 'version = 2', 1))", "version 2"),
        (LOCK + "lock.write_text(text.replace('version = 1', '', 1))", "version None"),
        (LOCK + "lock.write_text('{')", "uv.lock cannot be read"),
        (LOCK + "lock.write_text(text.replace('package', 'packs'))", "uv.lock cannot be read"),
        (LOCK + "lock.write_text(text.replace('hash =', 'sum ='))", "uv.lock cannot be read"),
        (LOCK + "lock.write_text(text.replace('\"1.0\"', '\"1.1\"'))", "as another package"),
        (LOCK + "lock.write_text(re.sub('sha256:..', 'sha256:zz', text))", "as another package"),
        (SYNC + "shutil.rmtree('.venv')", "does not install"),
        (SYNC + "os.rename(glob.glob(cache + '/wheels-v*')[0], cache + '/w')", "another layout"),
        (
            SYNC + "index, = glob.glob(cache + '/wheels-v*/index'); os.rename(index, index + 'es')",
            "another layout",
        ),
        (SYNC + "[os.remove(p) for p in glob.glob(cache + '/wheels-v*/*/*/*/*.rev')]", "layout"),
        (
            SYNC + "p, = glob.glob('.venv/lib/*/*/ray_envs_trial.py'); "
            "text = open(p).read(); os.remove(p); open(p, 'w').write(text)",
            "does not link files",
        ),
        (
            SYNC + "p, = glob.glob('.venv/lib/*/*/ray_envs_trial.py'); os.remove(p); "
            "os.symlink(glob.glob(cache + '/archive-v*/*/ray_envs_trial.py')[0], p)",
            "does not link files",
        ),
        ("sys.exit(f'no such option: {command}')", "`uv lock` ends with exit code 1"),
        (SYNC + "sys.exit('gone')", "`uv sync` ends with exit code 1"),
    ],
)
def test_a_uv_that_does_something_else_is_refused_with_what_is_different(
    store: Store, odd_uv: OddUv, after: str, words: str
) -> None:
    odd_uv(after)
    with pytest.raises(UvFailed) as caught:
        asyncio.run(UvTrial(store).check())
    assert f"uv {uv_version()} cannot be used on this node: " in caught.value.message
    assert words in caught.value.message
    assert "uv>=0.9,<1" in caught.value.hint
    assert not (store.root / "uv-trials.json").exists()
    assert os.listdir(store.root / "scratch") == []


def test_a_uv_that_reads_another_cache_than_it_is_given_is_refused(
    store: Store, odd_uv: OddUv
) -> None:
    """It unpacks the wheel again, so what another node sends would be of no use."""
    odd_uv(
        before="if command == 'sync' and 'other' in cache:\n"
        "    for path in glob.glob(cache + '/wheels-v*'): shutil.rmtree(path)\n"
        "    for path in glob.glob(cache + '/archive-v*'): shutil.rmtree(path)"
    )
    with pytest.raises(UvFailed, match="does not use a wheel that comes from the cache of another"):
        asyncio.run(UvTrial(store).check())


def test_a_uv_that_hangs_is_refused(
    store: Store, odd_uv: OddUv, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uv_trial, "_TIMEOUT_S", 0.3)
    odd_uv(before="import time; time.sleep(60)")
    with pytest.raises(UvFailed, match=r"`uv lock` does not end within 0\.3 s"):
        asyncio.run(UvTrial(store).check())


def test_a_node_with_such_a_uv_says_so_and_builds_nothing(
    settings: Settings, odd_uv: OddUv
) -> None:
    odd_uv(LOCK + "lock.write_text(text.replace('version = 1', 'version = 2', 1))")

    async def told() -> tuple[object, list[dict[str, object]]]:
        agent = new_agent(settings)
        described = await agent.describe()
        with pytest.raises(UvFailed, match="version 2"):
            await agent.lock(pyproject="", uv_lock=None, exclude_newer=None)
        target = described["target"]
        probes = await agent.probe(expected=target, index_project="")
        await agent.stop()
        return described["error"], probes

    error, probes = asyncio.run(told())
    assert isinstance(error, dict)
    assert (error["type"], error["node_id"]) == ("UvFailed", "local")
    (found,) = (each for each in probes if each["name"] == "uv")
    assert found["ok"] is False
    assert "version 2" in str(found["value"])
    assert "uv>=0.9,<1" in str(found["hint"])


def test_a_process_that_knows_no_root_tries_it_in_a_folder_of_its_own(
    tmp_path: Path, fake_uv: FakeUv
) -> None:
    assert layout_here() == layout_here()
    assert len(fake_uv.calls()) == 3
    (tmp_path / "trial").mkdir()
    assert tried(tmp_path / "trial") == layout_here()
