"""The manager without Ray: one resolution and one build for equal wishes, and all or nothing."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_envs.cluster.nodes import LocalNodes
from ray_envs.errors import (
    AlreadyExists,
    EnvironmentNotReady,
    NoEligibleNode,
    NotFound,
    ResolutionFailed,
    StorageFailed,
    UvFailed,
)
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId
from ray_envs.node.agent import NodeAgent
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.testing import FakeUv
from tests.local.conftest import processes_of, wait_until

Act = Callable[[EnvManager], Any]

#: How long a manager may take to stop: it has nothing to wait for.
STOP_S = 5

BARE = Definition().model_dump()


def spec(*packages: str, **options: Any) -> dict[str, Any]:
    return Definition(packages=packages, **options).model_dump()


def in_manager(settings: Settings, act: Act) -> Any:
    """What the coroutine `act(manager)` returns; the manager is stopped afterwards."""

    async def main() -> Any:
        manager = EnvManager(settings=settings.to_environment(), nodes=LocalNodes(NodeAgent))
        try:
            return await asyncio.wait_for(act(manager), 120)
        finally:
            await asyncio.wait_for(manager.stop(), STOP_S)

    return asyncio.run(main())


def create(settings: Settings, variant_id: str, given: dict[str, Any], **options: Any) -> Any:
    options = {"wait_s": 60, **options}
    return in_manager(
        settings, lambda m: m.create_env(variant_id=variant_id, spec=given, **options)
    )


async def until_final(manager: EnvManager, *ids: str) -> dict[str, Any]:
    told = await manager.prepare(variant_ids=ids)
    while any(status["status"] == "CREATING" for status in told["variants"].values()):
        told = await manager.watch(variant_ids=ids, seen=told["version"], timeout_s=1)
    return dict(told["variants"])


def on_disk(settings: Settings) -> dict[str, str]:
    """Every file below the root that says something: no caches, no locks, no one's address."""
    return {
        str(path.relative_to(settings.root)): path.read_text()
        for folder in ("envs", "store", "scratch", "trash")
        for path in sorted((settings.root / folder).rglob("*"))
        if path.is_file()
        and path.suffix not in (".holder", ".hold", ".pyc")
        and (path.suffix != ".lock" or path.name == "uv.lock")
        and ".venv" not in path.parts
    }


# -- where


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"label_selector": {"zone": "nowhere"}}, "no live node is what v asks for: zone=nowhere"),
        ({"num_gpus": 999}, "no live node is what v asks for: 999 GPUs"),
        ({"nodes": 5}, "only 1 of 5 live nodes are what v asks for"),
    ],
)
def test_what_too_few_nodes_can_have_is_refused_and_takes_nothing_away(
    warm: Settings, where: dict[str, Any], words: str
) -> None:
    with pytest.raises(NoEligibleNode, match=words):
        create(warm, "v", spec("six", **where))
    assert in_manager(warm, lambda m: m.list_envs()) == []
    before = create(warm, "v", spec("six"))
    with pytest.raises(NoEligibleNode, match=words):
        create(warm, "v", spec("iniconfig", **where), replace=True)
    now = in_manager(warm, lambda m: m.get_env_status(variant_id="v"))
    assert (now["status"], now["generation"], now["key"]) == ("ACTIVE", 1, before["key"])


# -- sharing


def test_twenty_equal_wishes_at_once_are_one_resolution_and_one_build(
    warm: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(
                manager.create_env(variant_id=f"v{number}", spec=BARE, wait_s=60)
                for number in range(20)
            )
        )

    told = in_manager(warm, act)
    assert {status["status"] for status in told} == {"ACTIVE"}
    assert len({status["key"] for status in told}) == 1
    assert [call.command for call in fake_uv.calls()] == ["lock", "sync"]


def test_a_second_variant_of_the_same_requirements_starts_no_uv(
    warm: Settings, fake_uv: FakeUv
) -> None:
    first = create(warm, "first", spec("six", "iniconfig"))
    calls = len(fake_uv.calls())
    second = create(warm, "w/second/1", spec("iniconfig", "six"))
    assert len(fake_uv.calls()) == calls
    assert (first["status"], second["status"]) == ("ACTIVE", "ACTIVE")
    assert (first["key"], first["lock_sha256"]) == (second["key"], second["lock_sha256"])
    assert first["python_path"] == second["python_path"]


def test_other_requirements_that_install_the_same_share_the_environment(
    warm: Settings, fake_uv: FakeUv
) -> None:
    first = create(warm, "first", spec("six"))
    version = first["packages"]["six"]
    second = create(warm, "second", spec(f"six=={version}"))
    assert first["key"] == second["key"]
    assert len(fake_uv.calls("lock")) == 2
    assert second["status"] == "ACTIVE"


def test_variants_that_share_an_environment_share_their_runtime_env(warm: Settings) -> None:
    async def act(manager: EnvManager) -> list[Any]:
        for name in ("a", "b"):
            await manager.create_env(variant_id=name, spec=BARE, wait_s=60)
        return [await manager.get_environment(variant_id=name) for name in ("a", "b")]

    first, second = in_manager(warm, act)
    assert json.dumps(first["runtime_env"]) == json.dumps(second["runtime_env"])
    assert first["ready_nodes"] == ["local"]
    assert first["runtime_env"]["py_executable"] == str(Store(warm).python(first["key"]))


def test_a_repeated_create_does_nothing(warm: Settings, fake_uv: FakeUv) -> None:
    first = create(warm, "v", BARE)
    calls, there = len(fake_uv.calls()), on_disk(warm)
    again = create(warm, "v", BARE)
    assert (first["is_changed"], again["is_changed"]) == (True, False)
    assert again["diff"] == {"added": {}, "removed": {}, "changed": {}}
    same = again.keys() - {"nodes", "diff", "is_changed"}
    assert {name: again[name] for name in same} == {name: first[name] for name in same}
    assert (len(fake_uv.calls()), on_disk(warm)) == (calls, there)


def test_a_new_manager_knows_what_the_old_one_made(warm: Settings, fake_uv: FakeUv) -> None:
    create(warm, "v", BARE)
    calls = len(fake_uv.calls())
    told = in_manager(warm, lambda manager: until_final(manager, "v"))
    assert told["v"]["status"] == "ACTIVE"
    assert len(fake_uv.calls()) == calls


def test_one_caller_who_gives_up_does_not_end_the_resolution_of_the_others(
    warm: Settings, fake_uv: FakeUv
) -> None:
    stop = fake_uv.hang("lock")

    async def act(manager: EnvManager) -> Any:
        first, second = (
            asyncio.create_task(manager.create_env(variant_id=name, spec=BARE, wait_s=60))
            for name in ("first", "second")
        )
        await asyncio.to_thread(stop.wait)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        stop.open()
        return [await second, await manager.get_env_status(variant_id="first")]

    second, first = in_manager(warm, act)
    assert (second["status"], first["status"]) == ("ACTIVE", "NOT_EXISTS")
    assert len(fake_uv.calls("lock")) == 1


def test_a_manager_stops_at_once_whatever_it_was_just_asked(warm: Settings) -> None:
    """A cancellation that meets an event in the same turn of the loop must not be lost."""
    create(warm, "v", BARE)

    async def main() -> None:
        manager = EnvManager(settings=warm.to_environment(), nodes=LocalNodes(NodeAgent))
        await manager.prepare(variant_ids=["v"])
        await asyncio.sleep(0)  # the loop waits for its next wish
        await manager.prepare(variant_ids=["v"])
        stopping = asyncio.create_task(manager.stop())
        _, late = await asyncio.wait([stopping], timeout=STOP_S)
        assert not late

    asyncio.run(main())


# -- all or nothing


@pytest.mark.parametrize("is_there", [False, True], ids=["a new variant", "a known variant"])
def test_a_resolution_that_fails_changes_nothing_and_carries_the_words_of_uv(
    warm: Settings, is_there: bool
) -> None:
    if is_there:
        create(warm, "v", BARE)
    before = on_disk(warm)
    with pytest.raises(ResolutionFailed) as caught:
        create(warm, "v", spec("six<1", "six>1"), replace=True)
    assert "six" in caught.value.detail
    assert on_disk(warm) == before
    told = in_manager(warm, lambda manager: manager.get_env_status(variant_id="v"))
    assert told["status"] == ("ACTIVE" if is_there else "NOT_EXISTS")


def test_every_one_who_shared_a_failed_resolution_is_told(warm: Settings, fake_uv: FakeUv) -> None:
    fake_uv.fail("lock", exit_code=1, stderr="  × No solution found: because\n")

    async def act(manager: EnvManager) -> list[Any]:
        ids = [f"v{number}" for number in range(5)]
        asked = (manager.create_env(variant_id=name, spec=BARE, wait_s=60) for name in ids)
        return list(await asyncio.gather(*asked, return_exceptions=True))

    told = in_manager(warm, act)
    assert {type(error) for error in told} == {ResolutionFailed}
    assert {"No solution found" in error.detail for error in told} == {True}
    assert len(fake_uv.calls()) == 1


def test_a_failed_resolution_is_asked_again_the_next_time(warm: Settings, fake_uv: FakeUv) -> None:
    fake_uv.fail("lock", exit_code=2)
    with pytest.raises(UvFailed):
        create(warm, "v", BARE)
    assert create(warm, "v", BARE)["status"] == "ACTIVE"


def test_a_build_that_fails_while_waiting_gives_the_old_definition_back(
    warm: Settings, fake_uv: FakeUv
) -> None:
    before = create(warm, "v", BARE)
    fake_uv.fail("sync", times=None, stderr="error: it is broken\n")
    with pytest.raises(UvFailed, match="uv sync ended") as caught:
        create(warm, "v", spec("iniconfig"), replace=True)
    assert "it is broken" in caught.value.detail
    assert caught.value.variant_id == "v"
    told = in_manager(warm, lambda manager: manager.get_env_status(variant_id="v"))
    assert (told["status"], told["key"]) == ("ACTIVE", before["key"])
    assert (told["packages"], told["generation"]) == (before["packages"], before["generation"])


def test_a_build_that_fails_while_waiting_leaves_no_new_definition(
    warm: Settings, fake_uv: FakeUv
) -> None:
    fake_uv.fail("sync", times=None)
    with pytest.raises(UvFailed):
        create(warm, "v", BARE)
    assert Registry(warm).all() == []


def test_who_waits_too_short_is_told_so_and_nothing_hangs(warm: Settings, fake_uv: FakeUv) -> None:
    fake_uv.hang("sync", times=None)
    with pytest.raises(EnvironmentNotReady) as caught:
        create(warm, "v", BARE, wait_s=0.2)
    assert caught.value.retryable


def test_a_download_that_failed_is_tried_again_by_prepare(warm: Settings, fake_uv: FakeUv) -> None:
    tries = warm.uv_retries + 1
    fake_uv.fail("sync", is_offline=False, times=tries, stderr="error: connection reset\n")

    async def act(manager: EnvManager) -> Any:
        await manager.create_env(variant_id="v", spec=spec("iniconfig"))
        told = await manager.watch(variant_ids=["v"], seen=-1)
        while told["variants"]["v"]["status"] == "CREATING":
            told = await manager.watch(variant_ids=["v"], seen=told["version"], timeout_s=1)
        calls = len(fake_uv.calls("sync"))
        return told["variants"]["v"], calls, (await until_final(manager, "v"))["v"]

    failed, calls, ready = in_manager(warm, act)
    assert (failed["status"], failed["error"]["type"]) == ("ERROR", "UvFailed")
    assert "connection reset" in failed["error"]["detail"]
    assert failed["error"]["hint"]
    assert calls == 1 + tries
    assert (ready["status"], ready["error"]) == ("ACTIVE", None)


def test_another_spec_needs_to_be_wanted_and_makes_a_new_generation(warm: Settings) -> None:
    first = create(warm, "v", BARE)
    before = on_disk(warm)
    with pytest.raises(AlreadyExists) as caught:
        create(warm, "v", spec("six"))
    assert "--replace" in caught.value.hint
    assert on_disk(warm) == before
    second = create(warm, "v", spec("six"), replace=True)
    assert (first["generation"], second["generation"]) == (1, 2)
    assert first["key"] != second["key"]
    assert set(Store(warm).records()) == {first["key"], second["key"]}


def test_a_deleted_variant_leaves_its_environment_to_those_who_run_in_it(warm: Settings) -> None:
    told = create(warm, "v", BARE)

    async def act(manager: EnvManager) -> Any:
        deleted = [await manager.delete_env(variant_id="v") for _ in range(2)]
        with pytest.raises(NotFound):
            await manager.get_environment(variant_id="v")
        return deleted, await manager.list_envs()

    deleted, left = in_manager(warm, act)
    assert [each["deleted"] for each in deleted] == [True, False]
    assert left == []
    assert told["key"] in Store(warm).records()


def test_an_unknown_variant_is_named_with_what_to_do(warm: Settings) -> None:
    with pytest.raises(NotFound, match="no variant 'nobody'") as caught:
        in_manager(warm, lambda manager: manager.prepare(variant_ids=["nobody"]))
    assert caught.value.hint


# -- the disk


def test_what_another_process_changes_is_seen(warm: Settings) -> None:
    create(warm, "v", BARE)
    registry = Registry(warm)

    async def act(manager: EnvManager) -> list[Any]:
        seen = [await manager.list_envs()]
        registry.delete(EnvId.parse("v"))
        seen.append(await manager.list_envs())
        seen.append([await manager.get_env_status(variant_id="v")])
        return [[status["status"] for status in each] for each in seen]

    assert in_manager(warm, act) == [["ACTIVE"], [], ["NOT_EXISTS"]]


def test_an_environment_that_vanished_from_the_disk_is_made_again(
    warm: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        told = await manager.create_env(variant_id="v", spec=BARE, wait_s=60)
        Store(warm).discard(told["key"])
        return told["key"], await until_final(manager, "v")

    key, told = in_manager(warm, act)
    assert told["v"]["status"] == "ACTIVE"
    assert key in Store(warm).records()


def test_one_damaged_definition_does_not_take_the_others_away(warm: Settings) -> None:
    create(warm, "v", BARE)
    damaged = warm.root / "envs" / EnvId.parse("bad").folder
    damaged.mkdir()
    (damaged / "metadata.json").write_text("{")

    async def act(manager: EnvManager) -> Any:
        with pytest.raises(StorageFailed, match="damaged"):
            await manager.get_env_status(variant_id="bad")
        return (await manager.get_env_status(variant_id="v"))["status"]

    assert in_manager(warm, act) == "ACTIVE"


def test_a_root_that_cannot_be_made_is_an_error_of_every_verb(
    settings: Settings, tmp_path: Path, fake_uv: FakeUv
) -> None:
    (tmp_path / "file").touch()
    wrong = settings.model_copy(update={"root": tmp_path / "file" / "root"})
    for act in (
        lambda manager: manager.create_env(variant_id="v", spec=BARE),
        lambda manager: manager.list_envs(),
        lambda manager: manager.prepare(variant_ids=["v"]),
    ):
        with pytest.raises(StorageFailed) as caught:
            in_manager(wrong, act)
        assert "RAY_ENVS_ROOT" in caught.value.hint
    assert fake_uv.calls() == []


def test_a_root_without_space_refuses_a_new_variant_and_keeps_nothing_of_it(
    warm: Settings, fake_uv: FakeUv
) -> None:
    full = warm.model_copy(update={"min_free_bytes": 2**62})
    with pytest.raises(StorageFailed) as caught:
        create(full, "v", BARE)
    assert "RAY_ENVS_ROOT" in caught.value.hint
    assert fake_uv.calls() == []
    assert Registry(warm).all() == []


# -- kill -9

#: Creates the variant `v` and prints its status.
MANAGER = """\
import asyncio, json, sys
from ray_envs.node import uv as builder
from ray_envs.node.agent import NodeAgent
from ray_envs.cluster.nodes import LocalNodes
from ray_envs.manager.manager import EnvManager
settings, uv, spec = json.loads(sys.argv[1])
builder.uv.find_uv_bin = lambda: uv

async def main():
    manager = EnvManager(settings=settings, nodes=LocalNodes(NodeAgent))
    print(json.dumps(await manager.create_env(variant_id="v", spec=spec, wait_s=60)))
    await manager.stop()

asyncio.run(main())
"""


def manager_process(settings: Settings, uv: FakeUv) -> subprocess.Popen[str]:
    given = json.dumps([settings.to_environment(), str(uv.executable), BARE])
    return subprocess.Popen(
        [sys.executable, "-c", MANAGER, given], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("command", ["lock", "sync"])
@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
def test_kill_9_of_the_manager_loses_no_definition_and_leaves_none_half_made(
    warm: Settings, fake_uv: FakeUv, command: str, is_done: bool
) -> None:
    stop = fake_uv.hang(command, is_done=is_done)
    with manager_process(warm, fake_uv) as process:
        stop.wait()
        process.kill()
        process.wait()
        wait_until(lambda: processes_of(warm.root) == [], "uv ends with the manager")
    # Before uv has answered there is nothing to keep; afterwards the definition is whole.
    there = Registry(warm).all()
    assert [str(record.env_id) for record in there] == ([] if command == "lock" else ["v"])
    assert Store(warm).records() == {}
    assert create(warm, "v", BARE)["status"] == "ACTIVE"
    assert len(fake_uv.calls("lock")) == (2 if command == "lock" else 1)


def test_two_processes_that_create_one_variant_at_once_make_one_generation(
    warm: Settings, fake_uv: FakeUv
) -> None:
    stop = fake_uv.hang("lock")
    with manager_process(warm, fake_uv) as first, manager_process(warm, fake_uv) as second:
        stop.wait()
        stop.open()
        told = [json.loads(process.communicate(timeout=60)[0]) for process in (first, second)]
    assert [(each["status"], each["generation"]) for each in told] == [("ACTIVE", 1)] * 2
    assert [call.command for call in fake_uv.calls()] == ["lock", "sync"]


def test_what_was_done_is_not_done_again_where_only_the_answer_was_lost(warm: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await manager.create_env(variant_id="v", spec=spec("six==1.16.0"), wait_s=60)
        for packages in ("six==1.17.0", "iniconfig"):
            await manager.add_deps(variant_id="v", packages=packages)
        told = []
        for verb, arguments in (("remove_deps", {"packages": "iniconfig"}), ("rollback_env", {})):
            for _ in range(2):  # as a door does when the manager died before it could answer
                answer = await getattr(manager, verb)(
                    variant_id="v", operation_id=f"my {verb}", **arguments
                )
                told.append((verb, answer["generation"], answer["operation_id"]))
        rows = (await manager.get_operations(variant_id="v"))["rows"]
        return told, [(row["operation"], row["status"]) for row in reversed(rows)]

    told, rows = in_manager(warm, act)
    assert told == [
        ("remove_deps", 4, "my remove_deps"),
        ("remove_deps", 4, "my remove_deps"),
        ("rollback_env", 3, "my rollback_env"),
        ("rollback_env", 3, "my rollback_env"),
    ]
    verbs = ["create", "add", "add", "remove", "rollback"]
    assert rows == [(verb, "succeeded") for verb in verbs]
