"""What goes and what stays on a real disk: nothing wanted, used, promised or being made goes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs.cluster.calls import Call
from ray_envs.cluster.nodes import LocalNodes
from ray_envs.manager.manager import EnvManager
from ray_envs.node.agent import NodeAgent
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.testing import FakeUv
from tests.local.conftest import Child
from tests.local.life_tools import (
    INI,
    PLUGGY,
    SIX,
    TABULATE,
    TOML,
    ZIPP,
    created,
    events_of,
    locked_by_another,
    managed,
    prepared,
    rows_of,
    spec,
    stocked,
    until,
    warm_root,
)


class WithJobs(LocalNodes):
    """This machine, with jobs that go on."""

    def __init__(self, *jobs: str) -> None:
        super().__init__(NodeAgent)
        self.jobs = set(jobs)

    async def living_jobs(self) -> set[str]:
        return {f"{self.session()}/{job}" for job in self.jobs}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Settings]:
    folder = tmp_path_factory.mktemp("collection") / "root"
    with warm_root(folder, warm_cache, keep_generations=2) as settings:
        managed(settings, stocked)
        yield settings


@pytest.fixture
def shared(house: Settings) -> Settings:
    """A root where only the pantry is there."""

    async def clear(manager: EnvManager) -> None:
        for row in await manager.list_envs():
            if row["variant_id"] != "pantry":
                await manager.delete_env(variant_id=row["variant_id"], force=True)
        await manager.cleanup(idle_hours=0)

    managed(house, clear)
    return house


def by_key(told: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Whether each key goes, and why, as a collection or its dry run told."""
    rows = [*told["deleted"], *told["kept"]]
    assert len({row["key"] for row in rows}) == len(rows)
    assert [row["collect"] for row in rows] == [True] * len(told["deleted"]) + [False] * len(
        told["kept"]
    )
    return {row["key"]: (row["collect"], row["because"]) for row in rows}


def in_cache(settings: Settings, name: str) -> set[str]:
    """The versions of a package that uv's cache has an entry for."""
    entries = Store(settings).cache.glob(f"wheels-v*/pypi/{name}/*.http")
    return {entry.name.partition("-")[0] for entry in entries}


def test_what_stays_says_why_what_goes_too_and_a_dry_run_says_the_same(
    shared: Settings, child: Any
) -> None:
    async def act(manager: EnvManager) -> Any:
        keys = {"pantry": (await manager.get_env_status(variant_id="pantry"))["key"]}
        keys["first"] = (await created(manager, "steps", SIX))["key"]
        for name, package in (("second", INI), ("third", ZIPP)):
            told = await manager.add_deps(variant_id="steps", packages=[package])
            keys[name] = told["key"]
        keys["pinned"] = (await created(manager, "pinned", SIX, INI, TABULATE))["key"]
        moved = await manager.create_env(
            variant_id="pinned", spec=spec(SIX, INI, ZIPP), replace=True
        )
        assert moved["key"] == keys["third"]
        await manager.pin_env(variant_id="pinned")
        keys["held"] = (await created(manager, "held", TOML))["key"]
        worker: Child = await asyncio.to_thread(child, Store(shared).python(keys["held"]))
        keys["leased"] = (await created(manager, "leased", PLUGGY))["key"]
        await manager.get_environment(variant_id="leased", job_id="job1")
        for name in ("held", "leased"):
            await manager.delete_env(variant_id=name, force=True)

        soon = await manager.cleanup(idle_hours=1, dry_run=True)
        plan = await manager.cleanup(idle_hours=0, dry_run=True)
        position = (await manager.events(since=-1))["next"]
        done = await manager.cleanup(idle_hours=0)
        there = set(Store(shared).records())
        events = await events_of(manager, since=position)
        rows = [row for row in await rows_of(manager) if row["operation"] == "gc"]
        worker.end()
        after = await manager.cleanup(idle_hours=0)
        return keys, soon, plan, done, there, events, rows[-1], after

    keys, soon, plan, done, there, events, row, after = managed(shared, act, nodes=WithJobs("job1"))
    expected = {
        keys["pantry"]: "pinned generation 1 of pantry",
        keys["second"]: "kept generation 2 of steps",
        keys["third"]: "current generation 3 of steps",
        keys["pinned"]: "kept generation 1 of pinned",
        keys["held"]: "a process runs in it",
        keys["leased"]: "leased to job job1",
    }
    because = {key: why for key, (goes, why) in by_key(plan).items() if not goes}
    assert because == expected
    assert [row["key"] for row in plan["deleted"]] == [keys["first"]]
    assert "and the limit is 0 s" in plan["deleted"][0]["because"]
    assert by_key(soon).keys() == by_key(plan).keys()
    assert by_key(soon)[keys["first"]][0] is False
    assert by_key(soon)[keys["first"]][1].endswith("ago, within the limits")
    told = {key: goes for key, (goes, _) in by_key(done).items()}
    assert told == {key: goes for key, (goes, _) in by_key(plan).items()}
    assert there == set(expected)
    assert (plan["dry_run"], done["dry_run"], "operation_id" in plan) == (True, False, False)
    assert plan["freed_bytes"] > 0
    assert done["deleted"][0]["freed_bytes"] > 0
    assert done["freed_bytes"] >= done["deleted"][0]["freed_bytes"]

    kinds = [event["kind"] for event in events]
    assert kinds == [
        "EnvironmentLockAcquired", "EnvironmentCleanupStarted", "EnvironmentCollected",
        "EnvironmentCleanupCompleted", "EnvironmentLockReleased",
    ]  # fmt: skip
    assert {event["operation_id"] for event in events} == {done["operation_id"]}
    assert {event["variant_id"] for event in events} == {None}
    assert events[1]["data"]["environments"] == 1
    gone = events[2]
    assert (gone["key"], gone["node_id"]) == (keys["first"], "local")
    assert gone["data"]["freed_bytes"] == done["deleted"][0]["freed_bytes"]
    assert "and the limit is 0 s" in gone["data"]["because"]
    completed = events[3]["data"]
    assert (completed["deleted"], completed["freed_bytes"]) == (1, done["freed_bytes"])
    assert (row["operation_id"], row["status"]) == (done["operation_id"], "succeeded")
    assert row["metadata"] == {
        "keys": [keys["first"]], "deleted": 1, "freed_bytes": done["freed_bytes"],
    }  # fmt: skip
    # The process has ended; the job goes on.
    assert [row["key"] for row in after["deleted"]] == [keys["held"]]
    assert Store(shared).record(keys["leased"]) is not None


def test_over_the_budget_the_least_recently_used_goes_first_and_only_what_nobody_wants(
    shared: Settings,
) -> None:
    store = Store(shared)

    async def make(manager: EnvManager) -> Any:
        keys = [
            (await created(manager, f"b{n}", package))["key"]
            for n, package in enumerate([SIX, INI, ZIPP])
        ]
        for n in range(2):
            await manager.delete_env(variant_id=f"b{n}")
        return keys

    old, older, wanted = managed(shared, make)
    now = store.folder.stat().st_mtime
    for key, age_s in ((old, 3600), (older, 7200), (wanted, 9000)):
        for path in (store.folder / f"{key}.hold", store.folder / key):
            os.utime(path, (now - age_s, now - age_s))
    sizes = {use.key: use.bytes for use in store.inventory()}
    total = sum(sizes.values())

    def plan(limit: int) -> dict[str, tuple[bool, str]]:
        poor = shared.model_copy(update={"max_bytes": limit})
        return by_key(managed(poor, lambda manager: manager.cleanup(dry_run=True)))

    def gone(told: dict[str, tuple[bool, str]]) -> set[str]:
        return {key for key, (goes, _) in told.items() if goes}

    assert gone(plan(total)) == set()
    assert gone(plan(total - 1)) == {older}
    assert gone(plan(total - sizes[older] - 1)) == {older, old}
    told = plan(1)
    assert gone(told) == {older, old}  # the current one stays, whatever that costs
    assert told[older][1].startswith("least recently used, and ")
    assert "are over the limit of" in told[older][1]
    poor = shared.model_copy(update={"max_inodes": 1})
    assert gone(by_key(managed(poor, lambda manager: manager.cleanup()))) == {older, old}
    assert wanted in store.records()


def test_current_generations_go_on_request_and_are_built_again_on_demand(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        made = await created(manager, "idle", SIX)
        before = await manager.cleanup(idle_hours=0)
        told = await manager.cleanup(idle_hours=0, include_current=True)
        during = await manager.get_env_status(variant_id="idle")
        usable = await manager.get_environment(variant_id="idle")
        calls = len(fake_uv.calls())
        again = await prepared(manager, "idle")
        return made, before, told, during, usable, again, fake_uv.calls()[calls:]

    made, before, told, during, usable, again, calls = managed(shared, act)
    assert before["deleted"] == []
    assert [row["key"] for row in told["deleted"]] == [made["key"]]
    assert [row["because"] for row in told["kept"]] == ["pinned generation 1 of pantry"]
    assert during["status"] != "ACTIVE"
    assert (during["has_venv"], during["generation"], usable["ready_nodes"]) == (False, 1, [])
    assert (again["status"], again["key"]) == ("ACTIVE", made["key"])
    assert [(call.command, call.is_offline) for call in calls] == [("sync", True)]
    assert made["key"] in Store(shared).records()


def test_a_collection_that_was_interrupted_is_finished_by_the_next_process(
    shared: Settings,
) -> None:
    """A process was killed after it had renamed, before it had deleted."""
    store = Store(shared)

    async def make(manager: EnvManager) -> Any:
        key = (await created(manager, "torn", SIX))["key"]
        await manager.delete_env(variant_id="torn")
        return key

    key = managed(shared, make)
    doomed = shared.root / "trash" / f"{key}-0123456789abcdef"
    os.rename(store.folder / key, doomed)
    told = managed(shared, lambda manager: manager.cleanup(idle_hours=0))
    assert key not in by_key(told)
    assert list((shared.root / "trash").iterdir()) == []
    assert not (store.folder / key).exists()


def test_a_directory_without_a_record_is_rubbish_and_goes(shared: Settings) -> None:
    store = Store(shared)

    async def make(manager: EnvManager) -> Any:
        key = (await created(manager, "half", SIX))["key"]
        await manager.delete_env(variant_id="half")
        return key

    key = managed(shared, make)
    (store.folder / key / "record.json").unlink()
    told = managed(shared, lambda manager: manager.cleanup(idle_hours=72))
    assert by_key(told)[key] == (True, "it has no record: nobody finished its build")
    assert not (store.folder / key).exists()


def test_uv_s_cache_loses_what_no_lock_needs_and_a_kept_generation_needs_no_network(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        first = await created(manager, "cached", "six==1.10.0")
        second = await manager.update_deps(variant_id="cached", packages=["six==1.11.0"])
        await created(manager, "unneeded", "six==1.14.0", "zipp==3.13.0")
        await manager.delete_env(variant_id="unneeded")
        before = in_cache(shared, "six"), in_cache(shared, "zipp")
        told = await manager.cleanup(idle_hours=0)
        await manager.cleanup(idle_hours=0, include_current=True)
        after = in_cache(shared, "six"), in_cache(shared, "zipp")
        there = set(Store(shared).records())
        fake_uv.fail("sync", is_offline=False, times=None, stderr="error: no network\n")
        back = await manager.rollback_env(variant_id="cached")
        return first, second, before, told, after, there, back

    first, second, before, told, after, there, back = managed(shared, act)
    assert before[0] >= {"1.10.0", "1.11.0", "1.14.0"}
    assert before[1] == {"3.7.0", "3.13.0"}
    assert told["freed_bytes"] > sum(row["freed_bytes"] for row in told["deleted"])
    assert after == ({"1.10.0", "1.11.0", "1.16.0"}, {"3.7.0"})  # and the pantry's
    assert there.isdisjoint({first["key"], second["key"]})
    assert (back["status"], back["key"], back["generation"]) == ("ACTIVE", first["key"], 1)
    assert first["key"] in Store(shared).records()


def test_what_is_being_built_is_never_collected(shared: Settings, fake_uv: FakeUv) -> None:
    async def act(manager: EnvManager) -> Any:
        stop = fake_uv.hang("sync")
        creating = asyncio.create_task(
            manager.create_env(variant_id="made", spec=spec(SIX), wait_s=120)
        )
        await asyncio.to_thread(stop.wait)
        key = (await manager.get_env_status(variant_id="made"))["key"]
        plan = await manager.cleanup(idle_hours=0, include_current=True, dry_run=True)
        told = await manager.cleanup(idle_hours=0, include_current=True)
        stop.open()
        return key, plan, told, await creating

    key, plan, told, made = managed(shared, act)
    assert by_key(plan)[key] == by_key(told)[key] == (False, "it is being built or changed")
    assert (made["status"], made["key"]) == ("ACTIVE", key)
    assert key in Store(shared).records()


def test_a_collection_takes_nothing_from_the_cache_that_a_change_has_just_downloaded(
    shared: Settings, fake_uv: FakeUv
) -> None:
    """The build links once more after byte-code was compiled; it does that without the network."""

    async def act(manager: EnvManager) -> Any:
        await created(manager, "grows", SIX)
        stop = fake_uv.hang("sync", is_offline=False, is_done=True)
        adding = asyncio.create_task(manager.add_deps(variant_id="grows", packages=["zipp==3.8.0"]))
        await asyncio.to_thread(stop.wait)
        await manager.cleanup(idle_hours=0)
        stop.open()
        return await adding

    told = managed(shared, act)
    assert (told["status"], told["generation"]) == ("ACTIVE", 2)


@pytest.mark.parametrize("verb", ["create_env", "rollback_env"])
def test_what_is_asked_for_between_plan_and_act_stays(shared: Settings, verb: str) -> None:
    store = Store(shared)

    async def act(manager: EnvManager) -> Any:
        slow = (await created(manager, "slow", SIX))["key"]
        await manager.delete_env(variant_id="slow")
        asked = (await created(manager, "asked", INI))["key"]
        if verb == "create_env":
            await manager.delete_env(variant_id="asked")
        else:  # beyond the generations that are kept
            await manager.remove_deps(variant_id="asked", packages=["iniconfig"])
        for path in (store.folder / f"{slow}.hold", store.folder / slow):
            os.utime(path, (1, 1))  # it is the first to go
        position = (await manager.events(since=-1))["next"]
        with locked_by_another(store.folder / f"{slow}.lock"):
            collecting = asyncio.create_task(manager.cleanup(idle_hours=0))
            await manager.events(since=position, kinds=["EnvironmentCleanupStarted"], timeout_s=60)
            if verb == "create_env":
                told = await manager.create_env(variant_id="asked", spec=spec(INI))
            else:
                told = await manager.rollback_env(variant_id="asked", to=1)
            assert not collecting.done()
        collected = by_key(await collecting)
        return slow, asked, told, collected, await until(manager, "asked", "ACTIVE", "CREATING")

    alone = shared.model_copy(update={"keep_generations": 1})
    slow, asked, told, collected, status = managed(alone, act)
    assert (told["status"], told["key"]) == ("ACTIVE", asked)
    assert collected[slow][0] is True
    assert collected[asked] == (False, "it was asked for in the meantime")
    assert status["status"] == "ACTIVE"
    assert asked in store.records()


def test_a_second_collection_waits_for_the_first_and_finds_nothing_left(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        key = (await created(manager, "once", SIX))["key"]
        await manager.delete_env(variant_id="once")
        told = await asyncio.gather(
            manager.cleanup(idle_hours=0), manager.cleanup(idle_hours=0, include_current=True)
        )
        return key, [[row["key"] for row in each["deleted"]] for each in told]

    key, deleted = managed(shared, act)
    assert deleted == [[key], []]


class Silent(LocalNodes):
    """This machine, whose agent does not answer when it is asked what it has."""

    def __init__(self) -> None:
        super().__init__(NodeAgent)

    def agent(self, node_id: str, *, settings: dict[str, str]) -> Call:
        call = super().agent(node_id, settings=settings)

        async def slow(verb: str, **arguments: Any) -> Any:
            if verb == "inventory":
                await asyncio.sleep(60)
            return await call(verb, **arguments)

        return slow


def test_a_node_that_does_not_answer_holds_no_collection_up(
    shared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_envs.manager.collector._INVENTORY_S", 0.3)
    began = time.monotonic()
    told = managed(shared, lambda manager: manager.cleanup(idle_hours=0), nodes=Silent())
    assert time.monotonic() - began < 30
    assert (told["deleted"], told["kept"]) == ([], [])
