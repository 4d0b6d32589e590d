"""The agent: one build of a key at a time, and no record without its promise, whatever dies."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest

from ray_envs.cluster import calls
from ray_envs.cluster.calls import answered
from ray_envs.cluster.nodes import LocalNodes, NodeInfo
from ray_envs.cluster.peers import RayPeers
from ray_envs.errors import ManagerUnavailable
from ray_envs.manager import fleet
from ray_envs.manager.fleet import Fleet
from ray_envs.models import BuildRequest, NodeEnvState, Phase
from ray_envs.node import attendant, bytecode, startup
from ray_envs.node.agent import NodeAgent
from ray_envs.node.store import Store
from ray_envs.plugin.gate import PLUGINS_VARIABLE, Gate, with_plugin
from ray_envs.settings import Settings
from ray_envs.testing import FakeUv
from tests.local.conftest import (
    RAY,
    Child,
    Locked,
    build,
    built,
    new_agent,
    processes_of,
    wait_until,
)

if TYPE_CHECKING:
    StartChild = Callable[..., Child]

#: Builds one environment as the only job of a process, and stops for ever at a stage on request.
AGENT = """\
import asyncio, json, sys, time
from pathlib import Path
from ray_envs.node import bytecode, agent as agents, startup, uv as builder, store
given = json.loads(sys.argv[1])
agents._RETRY_PAUSE_S = 0.01
if given["uv"]:
    builder.uv.find_uv_bin = lambda: given["uv"]

def stop(*_, **__):
    Path(given["reached"]).touch()
    while True:
        time.sleep(60)

owners = {"begin": store.Store, "install_hold": store.Store, "commit": store.Store,
          "compile": builder.Builder, "verify": startup}
if given["stage"] in owners:
    setattr(owners[given["stage"]], given["stage"], stop)

async def main():
    agent = agents.NodeAgent(settings=given["settings"], node_id="other", ray_version=given["ray"])
    await agent.ensure(request=given["request"], attempt=0)
    print("asked", flush=True)
    seen = -1
    while True:
        told = await agent.watch(seen=seen, timeout_s=5)
        seen = told["version"]
        if told["states"][0]["phase"] in ("ready", "failed"):
            print(json.dumps(told["states"][0]))
            return

asyncio.run(main())
"""


@contextmanager
def agent_process(
    settings: Settings, request: BuildRequest, *, uv: FakeUv | None = None, stage: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A process that builds `request`; killed after the block if it still lives."""
    given = {
        "settings": settings.to_environment(),
        "request": request.model_dump(mode="json"),
        "ray": RAY,
        "uv": str(uv.executable) if uv else "",
        "stage": stage,
        "reached": str(settings.root.parent / "reached"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, json.dumps(given)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def in_agent(settings: Settings, act: Callable[[NodeAgent], Any]) -> Any:
    """What the coroutine `act(agent)` returns, with an agent that is stopped afterwards."""

    async def main() -> Any:
        agent = new_agent(settings)
        try:
            return await act(agent)
        finally:
            await agent.stop()

    return asyncio.run(main())


def is_right(settings: Settings, request: BuildRequest, state: NodeEnvState) -> bool:
    """Whether the environment is ready and has exactly the packages of the request."""
    store = Store(settings)
    record = store.record(request.key)
    site = store.site_packages(request.key, request.target.python_minor)
    there = {path.name.split("-")[0].lower() for path in site.glob("*.dist-info")}
    wanted = {name.replace("-", "_").replace(".", "_") for name in request.packages}
    return state.phase is Phase.READY and record is not None and there == wanted


# -- ordinary life


def test_an_environment_is_built_once_and_found_by_every_later_agent(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    request = locked("iniconfig")
    state = build(warm, request)
    assert is_right(warm, request, state)
    assert (state.how, state.error) == ("built", None)
    calls = len(fake_uv.calls())
    again = build(warm, request)
    assert (again.phase, again.how) == (Phase.READY, "built")
    told = in_agent(warm, NodeAgent.describe)
    assert [(each["key"], each["phase"]) for each in told["states"]] == [(request.key, "ready")]
    assert told["error"] is None
    assert len(fake_uv.calls()) == calls
    record = Store(warm).record(request.key)
    assert record is not None
    assert (record.packages, record.ray, record.is_compiled) == (request.packages, RAY, True)


def test_wheels_of_the_cache_make_an_environment_with_one_offline_uv(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    state = build(warm, locked())
    assert (state.phase, state.how) == (Phase.READY, "linked")
    assert [call.is_offline for call in fake_uv.calls()] == [True]


def test_every_module_has_byte_code_that_is_the_one_of_the_cache(
    warm: Settings, locked: Locked
) -> None:
    request = locked("iniconfig", "six")
    assert build(warm, request).phase is Phase.READY
    store = Store(warm)
    site = store.site_packages(request.key, request.target.python_minor)
    in_cache = {path.stat().st_ino for path in store.cache.glob("archive-v*/**/*.pyc")}
    wrong = []
    for source in site.rglob("*.py"):
        if source.name == "_ray_envs_inside.py":
            continue
        pyc = Path(importlib.util.cache_from_source(str(source)))
        if not pyc.exists():
            with suppress(SyntaxError, ValueError):
                compile(source.read_bytes(), source.name, "exec")
                wrong.append(f"{source}: none")
        elif pyc.read_bytes()[4:8] != b"\1\0\0\0":
            wrong.append(f"{source}: not an unchecked hash")
        elif pyc.stat().st_ino not in in_cache:
            wrong.append(f"{source}: not linked from the cache")
    assert wrong == []


def test_a_second_environment_of_the_same_wheels_compiles_nothing(
    warm: Settings, locked: Locked, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build(warm, locked("iniconfig")).phase is Phase.READY
    markers = {path: path.read_text() for path in Store(warm).cache.rglob("ray_envs-bytecode.*")}
    assert len(markers) == len(locked("iniconfig").packages)
    compiled: list[Path] = []
    real = bytecode._compile_folders

    async def counted(folders: list[Path], *args: Any, **kwargs: Any) -> None:
        compiled.extend(folders)
        await real(folders, *args, **kwargs)

    monkeypatch.setattr(bytecode, "_compile_folders", counted)
    assert build(warm, locked("iniconfig", "six")).phase is Phase.READY
    assert [path for folder in compiled for path in folder.glob("*.py")] == [
        folder / "six.py" for folder in compiled
    ]
    assert len(compiled) == 1
    for path, text in markers.items():
        assert path.read_text() == text


# -- at once


def test_one_agent_builds_what_it_is_asked_for_many_times_once(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    async def act(agent: NodeAgent) -> list[NodeEnvState]:
        return await asyncio.gather(*(built(agent, locked()) for _ in range(20)))

    states = in_agent(warm, act)
    assert {state.phase for state in states} == {Phase.READY}
    assert len(fake_uv.calls("sync")) == 1


def test_two_processes_that_build_one_key_at_once_build_it_once(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    request = locked()
    stop = fake_uv.hang("sync")
    with (
        agent_process(warm, request, uv=fake_uv) as first,
        agent_process(warm, request, uv=fake_uv) as second,
    ):
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == "asked\n"
        stop.wait()
        stop.open()
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [json.loads(output)["phase"] for output in outputs] == ["ready", "ready"]
    assert len(fake_uv.calls("sync")) == 1


def test_different_keys_are_built_at_once_but_not_more_than_allowed(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    requests = [locked(), locked("iniconfig"), locked("six")]
    stop = fake_uv.hang("sync", times=None)

    async def act(agent: NodeAgent) -> list[NodeEnvState]:
        building = [asyncio.create_task(built(agent, request)) for request in requests]
        await asyncio.to_thread(
            wait_until, lambda: len(fake_uv.calls()) >= warm.max_parallel_builds, "two uv"
        )
        phases = {s["phase"] for s in (await agent.describe())["states"]}
        assert phases == {"linking", "waiting"}
        assert len(fake_uv.calls()) == warm.max_parallel_builds == 2
        stop.open()
        return await asyncio.gather(*building)

    assert {state.phase for state in in_agent(warm, act)} == {Phase.READY}


# -- failures


def test_a_download_that_fails_is_tried_again_and_then_given_up_until_asked_again(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    request = locked("iniconfig")
    tries = warm.uv_retries + 1
    fake_uv.fail(
        "sync",
        is_offline=False,
        times=tries,
        stderr="error: Failed to fetch https://me:pa55w0rd@index.example/x\nconnection reset\n",
    )

    async def act(agent: NodeAgent) -> tuple[NodeEnvState, int, NodeEnvState]:
        first = await built(agent, request)
        calls = len(fake_uv.calls("sync"))
        return first, calls, await built(agent, request, attempt=1)

    first, calls, second = in_agent(warm, act)
    assert (first.phase, first.attempt) == (Phase.FAILED, 0)
    assert first.error is not None
    assert first.error["type"] == "UvFailed"
    assert "connection reset" in first.error["detail"]
    assert "pa55w0rd" not in json.dumps(first.error)
    assert (first.error["key"], first.error["node_id"]) == (request.key, "local")
    assert calls == 1 + tries
    assert second.attempt == 1
    assert is_right(warm, request, second)


def test_a_download_that_fails_once_is_no_failure(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    fake_uv.fail("sync", is_offline=False)
    state = build(warm, locked("iniconfig"))
    assert is_right(warm, locked("iniconfig"), state)


def test_a_failed_build_leaves_no_record_and_no_scratch(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    fake_uv.fail("sync", times=None)
    assert build(warm, locked()).phase is Phase.FAILED
    assert Store(warm).records() == {}
    assert os.listdir(warm.root / "scratch") == []


def test_a_uv_that_does_not_end_is_killed_and_the_build_fails(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    fake_uv.hang("sync", times=None)
    hasty = warm.model_copy(update={"uv_sync_timeout_s": 0.5, "uv_retries": 0})
    state = build(hasty, locked())
    assert state.phase is Phase.FAILED
    assert state.error is not None
    assert "did not end within 0.5 s" in state.error["message"]
    assert processes_of(warm.root) == []


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd"), KeyError("odd")])
def test_an_error_that_nobody_foresaw_is_a_failure_and_not_a_build_without_an_end(
    warm: Settings, locked: Locked, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def odd(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(startup, "verify", odd)
    state = build(warm, locked())
    assert state.phase is Phase.FAILED
    assert state.error is not None
    assert "odd" in state.error["message"]


@pytest.mark.parametrize("is_offline", [True, False], ids=["linking", "downloading"])
def test_every_try_begins_with_an_empty_place(
    warm: Settings, locked: Locked, fake_uv: FakeUv, is_offline: bool
) -> None:
    """uv takes a package whose files are half there for installed: what failed must go first."""
    request = locked("iniconfig")
    if not is_offline:
        fake_uv.fail("sync", is_offline=True)
    fake_uv.fail("sync", is_offline=is_offline, is_done=True)
    stop = fake_uv.hang("sync", is_offline=False)

    async def act(agent: NodeAgent) -> NodeEnvState:
        building = asyncio.create_task(built(agent, request))
        await asyncio.to_thread(stop.wait)
        there = os.listdir(Store(warm).venv(request.key).parent)
        stop.open()
        assert there == []
        return await building

    assert is_right(warm, request, in_agent(warm, act))


def test_an_environment_that_reports_another_version_never_becomes_ready(
    warm: Settings, locked: Locked
) -> None:
    request = locked()
    wrong = request.target.model_copy(update={"python": request.target.python_minor + ".999"})
    state = build(warm, request.model_copy(update={"target": wrong}))
    assert state.phase is Phase.FAILED
    assert state.error is not None
    assert ".999" not in state.error["message"].split("not")[0]
    assert Store(warm).records() == {}


def test_a_held_directory_without_a_record_makes_the_build_fail_with_the_reason(
    warm: Settings, locked: Locked, child: StartChild
) -> None:
    request = locked()
    assert build(warm, request).phase is Phase.READY
    store = Store(warm)
    running = child(store.python(request.key))
    (store.venv(request.key).parent / "record.json").unlink()
    state = build(warm, request)
    assert state.phase is Phase.FAILED
    assert state.error is not None
    assert state.error["type"] == "EnvironmentInUse"
    assert running.process.poll() is None
    assert store.python(request.key).exists()
    running.end()
    assert is_right(warm, request, build(warm, request, attempt=1))


def test_a_build_that_is_stopped_kills_uv_and_leaves_no_record(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    stop = fake_uv.hang("sync", is_done=True)

    async def act(agent: NodeAgent) -> list[Any]:
        await agent.ensure(request=locked().model_dump(mode="json"), attempt=0)
        await asyncio.to_thread(stop.wait)
        await agent.stop()
        return list((await agent.watch(seen=-1, timeout_s=0))["states"])

    (state,) = in_agent(warm, act)
    assert (state["phase"], state["error"]["message"]) == ("failed", "the build was stopped")
    assert processes_of(warm.root) == []
    assert Store(warm).records() == {}
    assert is_right(warm, locked(), build(warm, locked()))


def test_an_environment_that_vanished_is_made_again_when_it_is_wanted(
    warm: Settings, locked: Locked
) -> None:
    request = locked()

    async def act(agent: NodeAgent) -> NodeEnvState:
        await built(agent, request)
        Store(warm).discard(request.key)
        await agent.ensure(request=request.model_dump(mode="json"), attempt=0)
        return await built(agent, request)

    assert is_right(warm, request, in_agent(warm, act))


def test_an_agent_does_not_call_ready_what_is_gone_from_its_disk(
    warm: Settings, locked: Locked
) -> None:
    request = locked()

    async def act(agent: NodeAgent) -> list[Any]:
        await built(agent, request)
        Store(warm).discard(request.key)
        return list((await agent.describe())["states"])

    assert [state for state in in_agent(warm, act) if state["phase"] == "ready"] == []


# -- kill -9


@pytest.mark.parametrize(
    "stage",
    [
        "before begin",
        "after begin",
        "during the offline sync",
        "before the download",
        "during the download",
        "before compile",
        "before the second link",
        "before the hold is installed",
        "before verify",
        "before commit",
    ],
)
def test_kill_9_at_any_stage_leaves_nothing_ready_and_nothing_running(
    warm: Settings, locked: Locked, tmp_path: Path, stage: str
) -> None:
    request, fake = locked("iniconfig"), FakeUv(tmp_path / "fake-uv")
    method, reached = "", warm.root.parent / "reached"
    match stage:
        case "before begin":
            method = "begin"
        case "after begin":
            reached = fake.hang("sync", is_offline=True).reached
        case "during the offline sync":
            # Everything is in the cache, so the offline sync makes a whole environment.
            request = locked()
            reached = fake.hang("sync", is_offline=True, is_done=True).reached
        case "before the download":
            reached = fake.hang("sync", is_offline=False).reached
        case "during the download":
            reached = fake.hang("sync", is_offline=False, is_done=True).reached
        case "before compile":
            method = "compile"
        case "before the second link":
            fake.fail("sync", is_offline=True)
            reached = fake.hang("sync", is_offline=True).reached
        case "before the hold is installed":
            method = "install_hold"
        case "before verify":
            method = "verify"
        case "before commit":
            method = "commit"
    with agent_process(warm, request, uv=fake, stage=method) as process:
        wait_until(reached.exists, f"the agent comes to the stage {stage!r}", 60)
        assert process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda: processes_of(warm.root) == [], "uv ends with the agent")
    assert Store(warm).records() == {}
    assert is_right(warm, request, build(warm, request))
    assert os.listdir(warm.root / "scratch") == []
    assert os.listdir(warm.root / "trash") == []


def test_kill_9_while_byte_code_is_compiled_leaves_no_compiler_behind(
    warm: Settings, locked: Locked
) -> None:
    request = locked("iniconfig")
    assert build(warm, request).phase is Phase.READY  # brings the wheel into the cache
    store = Store(warm)
    store.discard(request.key)
    (archive,) = [path.parent for path in store.cache.glob("archive-v*/*/iniconfig")]
    for marker in archive.rglob("ray_envs-bytecode.*"):
        marker.unlink()
    slow = [archive / "iniconfig" / f"slow{number}.py" for number in range(4)]
    for file in slow:
        file.write_text("x = [1, (2, 3), {4: 5}]\n" * 300_000)

    def compilers() -> list[Any]:
        found = []
        for process in processes_of(warm.root):
            with suppress(psutil.Error):  # it has just ended
                if "compileall" in process.cmdline():
                    found.append(process)
        return found

    with agent_process(warm, request) as process:
        wait_until(lambda: len(compilers()) > 1, "the compiler has workers", 60)
        process.kill()
        process.wait()
        try:
            wait_until(lambda: compilers() == [], "the compiler ends with the agent")
        finally:
            for left in compilers():
                left.send_signal(signal.SIGKILL)
    for file in slow:
        file.unlink()
    assert store.records() == {}
    assert is_right(warm, request, build(warm, request))


# -- no space, no right


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"this machine does not let root mount a small disk: {exc}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("min_free_mb", [1, 64])
def test_a_disk_that_fills_up_during_a_build_is_named_with_what_helps(
    settings: Settings, warm_cache: Path, locked: Locked, tmp_path: Path, min_free_mb: int
) -> None:
    with tmpfs(tmp_path / "disk", "size=100m") as disk:
        small = settings.model_copy(
            update={"root": disk / "root", "min_free_bytes": min_free_mb * 2**20}
        )
        store = Store(small)
        store.set_up()
        store.cache.rmdir()
        store.cache.symlink_to(warm_cache)  # on another disk: uv has to copy, and has no room
        state = build(small, locked())
        assert state.phase is Phase.FAILED
        assert state.error is not None
        assert state.error["type"] == "StorageFailed"
        assert "RAY_ENVS_ROOT" in state.error["hint"]
        assert "No space left" in state.error["detail"]
        assert store.records() == {}
        assert os.listdir(small.root / "scratch") == []


def test_a_disk_that_is_full_from_the_start_is_named_before_uv_is_asked(
    settings: Settings, locked: Locked, tmp_path: Path, fake_uv: FakeUv
) -> None:
    with tmpfs(tmp_path / "disk", "size=8m") as disk:
        small = settings.model_copy(update={"root": disk / "root"})
        told = in_agent(small, NodeAgent.describe)
        assert told["error"]["type"] == "StorageFailed"
        assert "RAY_ENVS_ROOT" in told["error"]["hint"]
        state = build(small, locked())
        assert state.phase is Phase.FAILED
        assert state.error is not None
        assert state.error["type"] == "StorageFailed"
    assert fake_uv.calls() == []


def test_a_root_that_cannot_be_written_is_named(
    settings: Settings, locked: Locked, tmp_path: Path, fake_uv: FakeUv
) -> None:
    with tmpfs(tmp_path / "disk", "ro,size=100m") as disk:
        small = settings.model_copy(update={"root": disk / "root"})
        told = in_agent(small, NodeAgent.describe)
        assert told["error"]["type"] == "StorageFailed"
        assert "read-only" in told["error"]["hint"]
        assert told["error"]["node_id"] == "local"
        state = build(small, locked())
        assert state.phase is Phase.FAILED
        assert state.error is not None
        assert state.error["type"] == "StorageFailed"
    assert fake_uv.calls() == []


def test_uv_without_space_is_a_storage_failure_whatever_is_free_afterwards(
    warm: Settings, locked: Locked, fake_uv: FakeUv
) -> None:
    """uv removes its half of a download before it ends: the disk looks empty again."""
    fake_uv.fail(
        "sync",
        times=None,
        stderr="error: Failed to install: x\n  Caused by: No space left on device (os error 28)\n",
    )
    state = build(warm, locked())
    assert state.error is not None
    assert state.error["type"] == "StorageFailed"


# -- the gate


def test_an_agent_attends_its_gate_whatever_goes_wrong_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PLUGINS_VARIABLE, with_plugin(None))
    monkeypatch.setattr(attendant, "_ATTEND_S", 0.01)
    looks = []
    asked = Gate.asked

    def odd(gate: Gate) -> dict[str, int]:
        looks.append(gate)
        if 1 < len(looks) < 5:
            raise RuntimeError("odd")
        return asked(gate)

    monkeypatch.setattr(Gate, "asked", odd)

    async def act(agent: NodeAgent) -> dict[str, int]:
        told = await agent.describe()
        Gate(settings.root).ask("abc", 3)
        return dict((await agent.watch(seen=told["version"], timeout_s=20))["asked"])

    assert in_agent(settings, act) == {"abc": 3}
    assert capsys.readouterr().err == "ray_envs: NodeAgent: RuntimeError: odd\n"


# -- agents that stop answering


def test_an_answer_that_does_not_come_is_given_up_in_words() -> None:
    async def main() -> None:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with pytest.raises(ManagerUnavailable, match=r"^node b did not answer within 0\.01 s"):
            await answered(never, "node b", 0.01)
        assert never.cancelled()

    asyncio.run(main())


def test_an_answer_that_takes_long_is_waited_for_while_its_agent_says_something() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        slow: asyncio.Future[str] = loop.create_future()
        never: asyncio.Future[str] = loop.create_future()
        asked: list[None] = []

        async def is_alive() -> None:
            asked.append(None)
            if len(asked) == 3:
                slow.set_result("done")
            if len(asked) > 3:
                await asyncio.Event().wait()

        assert await answered(slow, "node b", 0.01, is_alive=is_alive) == "done"
        with pytest.raises(ManagerUnavailable, match="node b did not answer"):
            await answered(never, "node b", 0.01, is_alive=is_alive)

    asyncio.run(main())


def test_verbs_with_a_limit_are_verbs_of_an_agent() -> None:
    assert [verb for verb in calls._LIMITS_S if not hasattr(NodeAgent, verb)] == []


class TwoNodes(LocalNodes):
    """This machine and another node, whose agent can be stopped."""

    def __init__(self) -> None:
        super().__init__(NodeAgent)
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def alive(self) -> list[NodeInfo]:
        return [*await super().alive(), NodeInfo("other", False, "127.0.0.2")]

    def agent(self, node_id: str, *, settings: dict[str, str]) -> calls.Call:
        call = super().agent(node_id, settings=settings)

        async def may_stop(verb: str, **arguments: Any) -> Any:
            if node_id == "other":
                await answered(asyncio.ensure_future(self.goes_on.wait()), "other", 0.5)
            return await call(verb, **arguments)

        return may_stop


def test_an_agent_that_stops_is_lost_and_met_again_and_nobody_waits_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_MEET_S", 0.01)
    monkeypatch.setattr(fleet, "_WATCH_S", 0.1)
    monkeypatch.setattr(fleet, "_MAX_MISSES", 2)
    joined = []

    async def main() -> None:
        nodes = TwoNodes()
        followed = Fleet(
            nodes,
            settings.to_environment(),
            lambda info, _: joined.append(info.node_id),
            lambda *_: None,
            lambda _: None,
        )
        try:
            await followed.look_at_nodes()
            assert all(node.site and node.watcher for node in followed.nodes.values())
            nodes.goes_on.clear()
            while followed.nodes["other"].watcher:
                await followed.news(followed.version, 1)
            looks = 0
            while followed.nodes["other"].error is None:
                await followed.look_at_nodes()
                await followed.look_at_disks()
                looks += 1
            assert looks > 4  # two misses last a second
            assert followed.nodes["other"].error["type"] == "ManagerUnavailable"
            assert followed.nodes["local"].watcher is not None
            nodes.goes_on.set()
            while followed.nodes["other"].error is not None:
                await followed.look_at_nodes()
            assert followed.nodes["other"].site == followed.nodes["local"].site
            assert joined == []
        finally:
            await followed.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("name", ["OutOfDiskError", "ObjectStoreFullError", "RaySystemError"])
def test_what_ray_cannot_bring_from_a_node_may_come_from_another(name: str) -> None:
    from ray import exceptions

    async def main() -> None:
        broken: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        broken.set_exception(getattr(exceptions, name)("no space"))
        with pytest.raises(ManagerUnavailable, match="no space"):
            await RayPeers().take(broken)

    asyncio.run(main())
