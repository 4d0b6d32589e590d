"""The life of a variant without Ray: every verb, all or nothing, and what is told of it."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs.client.provider import RayEnvironmentProvider
from ray_envs.cluster.nodes import LocalNodes, NodeInfo
from ray_envs.decisions import resolving
from ray_envs.errors import (
    AlreadyExists,
    InvalidInput,
    InvalidPackages,
    LockTimeout,
    NotFound,
    RayEnvsError,
    ResolutionFailed,
    UvFailed,
)
from ray_envs.manager import operations
from ray_envs.manager.manager import EnvManager
from ray_envs.models import EnvId
from ray_envs.node.agent import NodeAgent
from ray_envs.node.interpreter import this_target
from ray_envs.node.store import Store
from ray_envs.node.uv import Builder
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.testing import FakeUv
from tests.local.conftest import RAY, Child, processes_of, tried, wait_until
from tests.local.life_tools import (
    INI,
    NOTHING,
    PLUGGY,
    SIX,
    SORTED,
    TABULATE,
    TOML,
    ZIPP,
    answer_of,
    created,
    definition_files,
    events_of,
    kinds_of,
    locked_by_another,
    managed,
    manager_process,
    mentions,
    prepared,
    rows_of,
    spec,
    stocked,
    tree,
    until,
    warm_root,
)

#: Two environments that many tests share.
ONE, TWO = (SIX,), (SIX, INI)
#: A release of Ray that this cluster is not.
OTHER_RAY = "2.59.0"

ADDED = {"added": {"iniconfig": "2.0.0"}, "removed": {}, "changed": {}}
REMOVED = {"added": {}, "removed": {"iniconfig": "2.0.0"}, "changed": {}}

PROJECT = """\
# of the team
[project]
name = "pipeline"
version = "1"
dependencies = [
    # what everybody needs
    "six==1.16.0",  # old
    "zipp==3.7.0",  # paths in archives
    "attrs",
]

[project.optional-dependencies]
fast = ["iniconfig==2.0.0"]

[tool.uv]  # ours
package = false
"""

OPERATION_FIELDS = {
    "operation_id", "operation", "status", "variant_id", "workflow_id", "node_id", "version_id",
    "started_at", "finished_at", "duration_ms", "stdout", "stderr", "exit_code", "error",
    "metadata",
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Settings]:
    with warm_root(tmp_path_factory.mktemp("lifecycle") / "root", warm_cache) as settings:
        managed(settings, stocked)
        yield settings


# -- every verb


def test_a_variant_lives_through_every_verb_and_no_number_comes_twice(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        async def generation() -> int:
            return int((await manager.get_env_status(variant_id="life"))["generation"])

        told, numbers = {}, []
        told["create"] = await created(manager, "life", "six==1.16.0", "zipp==3.7.0")
        numbers.append(await generation())
        for verb, packages in (
            ("add", ["six>=1.16", "zipp>=3.7"]),
            ("add", ["iniconfig==2.0.0"]),
            ("update", ["SIX"]),
            ("update", []),
            ("remove", ["iniconfig"]),
        ):
            call = getattr(manager, f"{verb}_deps")
            told[f"{verb} {packages}"] = await call(variant_id="life", packages=packages)
            numbers.append(await generation())
        told["rollback"] = await manager.rollback_env(variant_id="life")
        numbers.append(await generation())
        told["rollback to 1"] = await manager.rollback_env(variant_id="life", to=1)
        numbers.append(await generation())
        told["replace"] = await manager.create_env(variant_id="life", spec=spec(*ONE), replace=True)
        numbers.append(await generation())
        return told, numbers, await manager.list_generations(variant_id="life")

    told, numbers, rows = managed(shared, act)
    assert numbers == [1, 2, 3, 4, 5, 6, 5, 1, 7]
    assert [row["generation"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["made_by"] for row in rows] == [
        "create", "add", "add", "update", "update", "remove", "create",
    ]  # fmt: skip
    assert [row["is_current"] for row in rows] == [False] * 6 + [True]
    assert {(row["fits_cluster"], row["is_ready"], row["error"]) for row in rows} == {
        (True, True, None)
    }
    assert {(row["ray_version"], row["python_version"]) for row in rows} == {
        (RAY, this_target(RAY).python)
    }
    new_six, new_zipp = (
        told[f"update {packages}"]["packages"][name]
        for packages, name in ((["SIX"], "six"), ([], "zipp"))
    )
    assert new_six != "1.16.0"
    assert new_zipp != "3.7.0"
    changes = [row["diff"] for row in rows]
    assert set(changes[0]["added"].items()) > {("six", "1.16.0"), ("zipp", "3.7.0"), ("ray", RAY)}
    assert changes[1:] == [
        NOTHING,  # wider, and every pin stays
        ADDED,
        {**NOTHING, "changed": {"six": ["1.16.0", new_six]}},
        {**NOTHING, "changed": {"zipp": ["3.7.0", new_zipp]}},
        REMOVED,
        {**NOTHING, "removed": {"zipp": new_zipp}, "changed": {"six": [new_six, "1.16.0"]}},
    ]
    assert rows[0]["key"] == rows[1]["key"]
    assert len({row["key"] for row in rows}) == 6
    assert told["rollback"]["diff"] == ADDED  # from 6 back to 5
    assert told["rollback to 1"]["diff"] == {
        "added": {},
        "removed": {"iniconfig": "2.0.0"},
        "changed": {"zipp": [new_zipp, "3.7.0"], "six": [new_six, "1.16.0"]},
    }
    assert told["replace"]["diff"] == {**NOTHING, "removed": {"zipp": "3.7.0"}}
    assert {status["status"] for status in told.values()} == {"ACTIVE"}


def test_a_status_has_every_field_of_the_contract(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        made = await created(manager, "w/status/1", *ONE, env_vars={"A": "b"})
        return made, await manager.get_env_status(variant_id="w/status/1")

    made, status = managed(shared, act)
    folder = shared.root / "envs" / "w_status_1"
    key, store = status["key"], Store(shared)
    assert {name: made[name] for name in status} == status
    created_at, updated_at = status.pop("created_at"), status.pop("updated_at")
    assert created_at == updated_at
    state = status["nodes"].pop("local")
    assert (state["phase"], state["key"], state["error"]) == ("ready", key, None)
    assert status == {
        "variant_id": "w/status/1",
        "workflow_id": "w",
        "node_id": "status",
        "version_id": "1",
        "status": "ACTIVE",
        "key": key,
        "generation": 1,
        "lock_sha256": made["lock_sha256"],
        "env_path": str(folder),
        "venv_path": str(store.venv(key)),
        "python_path": str(store.python(key)),
        "python_version": this_target(RAY).python,
        "ray_version": RAY,
        "is_pinned": False,
        "has_pyproject": True,
        "has_uv_lock": True,
        "has_venv": True,
        "nodes": {},
        "packages": store.records()[key].packages,
        "metadata": {"made_by": "create", "generations": [1], "env_vars": {"A": "b"}},
        "error": None,
        "change": None,
    }


def test_create_tells_the_text_that_was_locked(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        return await created(manager, "told", *ONE)

    told = managed(shared, act)
    assert told["pyproject_toml"] == definition_files(shared, "told")["pyproject.toml"]


def test_every_change_says_what_uv_said_how_it_ended_and_how_long_it_took(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "facts", *ONE)
        added = await manager.add_deps(variant_id="facts", packages=["iniconfig==2.0.0"])
        removed = await manager.remove_deps(variant_id="facts", packages=["iniconfig"])
        rolled = await manager.rollback_env(variant_id="facts")
        synced = await manager.sync_env(variant_id="facts")
        return [added, removed, rolled, synced], await rows_of(manager, "facts")

    answers, rows = managed(shared, act)
    assert [row["operation"] for row in rows] == ["create", "add", "remove", "rollback", "sync"]
    for answer, row in zip(answers, rows[1:], strict=True):
        assert (answer["status"], answer["stdout"], answer["exit_code"]) == ("ACTIVE", "", 0)
        assert answer["stderr"] == row["stderr"]
        assert 0 < answer["duration_s"] < 240
        assert answer.get("operation_id", row["operation_id"]) == row["operation_id"]
    assert "Resolved" in answers[0]["stderr"]
    assert "Added iniconfig v2.0.0" in answers[0]["stderr"]


def test_declared_and_locked_packages_are_listed(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "deps", *TWO)
        return await manager.list_deps(variant_id="deps")

    told = managed(shared, act)
    locked = told.pop("locked_versions")
    assert told == {
        "variant_id": "deps",
        "generation": 1,
        "dependencies": ["iniconfig==2.0.0", "six==1.16.0"],
    }
    assert locked.items() > {("six", "1.16.0"), ("iniconfig", "2.0.0"), ("ray", RAY)}


def test_two_generations_are_compared_in_both_directions(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "compared", *ONE)
        await manager.add_deps(variant_id="compared", packages=["iniconfig==2.0.0"])
        told = [
            await manager.diff_env(variant_id="compared", from_=1),
            await manager.diff_env(variant_id="compared", from_=2, to=1),
        ]
        with pytest.raises(InvalidInput, match="no generation 3") as caught:
            await manager.diff_env(variant_id="compared", from_=3)
        return told, caught.value.hint

    told, hint = managed(shared, act)
    same = {"variant_id": "compared"}
    assert told == [
        {**same, "from": 1, "to": 2, "diff": ADDED},
        {**same, "from": 2, "to": 1, "diff": REMOVED},
    ]
    assert hint == "its generations: 1, 2"


def test_a_requirements_text_has_comments_and_several_packages_on_a_line(shared: Settings) -> None:
    text = "# what we need\nsix==1.16.0,iniconfig==2.0.0   # both\n\n"

    async def act(manager: EnvManager) -> Any:
        await created(manager, "text")
        added = await manager.add_deps(variant_id="text", packages=text)
        removed = await manager.remove_deps(variant_id="text", packages="# one\niniconfig,Six\n")
        return added, removed

    added, removed = managed(shared, act)
    assert added["diff"] == {**NOTHING, "added": {"iniconfig": "2.0.0", "six": "1.16.0"}}
    assert removed["diff"] == {**NOTHING, "removed": {"iniconfig": "2.0.0", "six": "1.16.0"}}


def test_the_text_of_a_project_keeps_its_comments_through_every_change(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "project", pyproject=PROJECT, extras=("fast",))
        told = [await manager.remove_deps(variant_id="project", packages=["Zipp"])]
        told.append(await manager.add_deps(variant_id="project", packages=["six==1.17.0"]))
        exported = [
            (await manager.export_env(variant_id="project", generation=number))["files"]
            for number in (1, 2, 3)
        ]
        return told, [files["pyproject.toml"] for files in exported]

    (removed, added), (first, second, third) = managed(shared, act)
    assert removed["diff"] == {**NOTHING, "removed": {"zipp": "3.7.0"}}
    assert added["diff"] == {**NOTHING, "changed": {"six": ["1.16.0", "1.17.0"]}}
    assert second == first.replace('    "zipp==3.7.0",  # paths in archives\n', "")
    assert resolving.declared(third) == ("attrs", "six==1.17.0")
    for text in (first, second, third):
        for comment in ("# of the team", "# what everybody needs", "# ours"):
            assert comment in text
    assert definition_files(shared, "project")["pyproject.toml"] == third


def test_asking_for_what_is_there_changes_nothing_and_leaves_no_row(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "still", *ONE)
        before = definition_files(shared, "still"), await rows_of(manager, "still")
        position, calls = (await manager.events(since=-1))["next"], len(fake_uv.calls())
        told = [
            await manager.add_deps(variant_id="still", packages=["SIX"]),
            await manager.add_deps(variant_id="still", packages=["six==1.16.0"]),
            await manager.rollback_env(variant_id="still", to=1),
            await manager.create_env(variant_id="still", spec=spec("Six == 1.16.0")),
        ]
        assert (definition_files(shared, "still"), await rows_of(manager, "still")) == before
        assert await kinds_of(manager, "still", position) == []
        assert len(fake_uv.calls()) == calls
        return told

    for answer in managed(shared, act):
        assert (answer["is_changed"], answer["diff"], answer["generation"]) == (False, NOTHING, 1)


def test_what_cannot_be_asked_for_is_refused_and_leaves_no_row(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "refusing", *ONE)
        before, position = tree(shared), (await manager.events(since=-1))["next"]
        rows = await rows_of(manager, "refusing")
        errors = []
        for verb, arguments in (
            ("remove_deps", {"packages": ["sixx"]}),
            ("remove_deps", {"packages": []}),
            ("add_deps", {"packages": "# nothing\n"}),
            ("add_deps", {"packages": ["-e ."]}),
            ("update_deps", {"packages": ["zope"]}),
            ("rollback_env", {}),
            ("rollback_env", {"to": 7}),
            ("create_env", {"spec": spec(*TWO)}),
            ("create_env", {"spec": {"package": []}}),
        ):
            with pytest.raises(RayEnvsError) as caught:
                await getattr(manager, verb)(variant_id="refusing", **arguments)
            errors.append(caught.value)
        assert tree(shared) == before
        assert await rows_of(manager, "refusing") == rows
        assert await kinds_of(manager, "refusing", position) == []
        return errors

    errors = managed(shared, act)
    assert [type(error) for error in errors] == [
        *[InvalidPackages] * 5, InvalidInput, InvalidInput, AlreadyExists, InvalidInput,
    ]  # fmt: skip
    assert errors[0].hint == "did you mean 'six'?"
    assert errors[1].message == errors[2].message == "no packages are given"
    assert "add" in errors[4].hint
    assert errors[5].message == "variant refusing has no earlier generation than 1"
    assert (errors[6].message, errors[6].hint) == (
        "variant refusing has no generation 7",
        "its generations: 1",
    )
    assert "--replace" in errors[7].hint
    assert errors[8].hint == "did you mean 'packages'?"


def test_no_verb_but_create_and_delete_makes_or_accepts_a_variant_that_is_not_there(
    shared: Settings,
) -> None:
    async def act(manager: EnvManager) -> Any:
        before = tree(shared)
        for verb, arguments in (
            ("add_deps", {"packages": ["six"]}),
            ("update_deps", {}),
            ("remove_deps", {"packages": ["six"]}),
            ("rollback_env", {}),
            ("sync_env", {}),
            ("pin_env", {}),
            ("export_env", {}),
            ("list_deps", {}),
            ("list_generations", {}),
            ("diff_env", {"from_": 1}),
            ("explain", {}),
        ):
            with pytest.raises(NotFound, match="nobody") as caught:
                await getattr(manager, verb)(variant_id="nobody", **arguments)
            assert "ray-envs create" in caught.value.hint, verb
        assert tree(shared) == before
        return await rows_of(manager, "nobody"), await manager.delete_env(variant_id="nobody")

    rows, deleted = managed(shared, act)
    assert rows == []
    assert (deleted["deleted"], deleted["status"]) == (False, "NOT_EXISTS")


# -- all or nothing


@pytest.mark.parametrize(
    ("verb", "packages", "words"),
    [
        ("add_deps", ["ray-envs-has-no-such-package"], "ray-envs-has-no-such-package"),
        ("add_deps", ["ray<2"], "ray<2"),
        ("update_deps", ["six==99"], "six==99"),
        ("create_env", ["six<1", "six>1"], "six"),
    ],
    ids=["no such package", "not the cluster's ray", "no such version", "conflict"],
)
def test_a_change_that_finds_no_packages_leaves_everything_as_it_was(
    shared: Settings, verb: str, packages: list[str], words: str
) -> None:
    arguments: dict[str, Any] = {"packages": packages}
    if verb == "create_env":
        arguments = {"spec": spec(*packages), "replace": True}

    async def act(manager: EnvManager) -> Any:
        key = (await created(manager, "fails", *ONE))["key"]
        before, status = tree(shared, key), await manager.get_env_status(variant_id="fails")
        generations = await manager.list_generations(variant_id="fails")
        position = (await manager.events(since=-1))["next"]
        with pytest.raises(ResolutionFailed) as caught:
            await getattr(manager, verb)(variant_id="fails", **arguments)
        assert tree(shared, key) == before
        assert await manager.get_env_status(variant_id="fails") == status
        assert await manager.list_generations(variant_id="fails") == generations
        rows = await rows_of(manager, "fails")
        return caught.value, rows[-1], await events_of(manager, "fails", position)

    error, row, events = managed(shared, act)
    assert words in error.detail
    assert (error.variant_id, error.retryable) == ("fails", False)
    assert row.keys() == OPERATION_FIELDS
    assert (row["operation"], row["status"]) == (verb.partition("_")[0], "failed")
    assert (row["exit_code"], row["error"]) == (error.exit_code, error.to_dict())
    failed = "EnvironmentCreationFailed" if verb == "create_env" else "DependencyOperationFailed"
    kinds = [event["kind"] for event in events if event["kind"] != "EnvironmentCreationStarted"]
    assert kinds == ["EnvironmentLockAcquired", failed, "EnvironmentLockReleased"]
    told = next(event for event in events if event["kind"] == failed)
    assert told["operation_id"] == row["operation_id"]
    assert told["data"]["error"] == error.to_dict()
    assert told["data"]["exit_code"] == error.exit_code
    assert told["data"]["rollback_performed"] is True


@pytest.mark.parametrize("verb", ["add_deps", "create_env", "rollback_env"])
def test_a_change_whose_build_fails_leaves_the_current_generation_and_no_folder(
    shared: Settings, fake_uv: FakeUv, verb: str
) -> None:
    name = f"unbuilt-{verb.partition('_')[0]}"
    verbs: dict[str, dict[str, Any]] = {
        "add_deps": {"packages": [TABULATE]},
        "create_env": {"spec": spec(TABULATE), "replace": True},
        "rollback_env": {"to": 2},
    }
    arguments = verbs[verb]

    async def act(manager: EnvManager) -> Any:
        await created(manager, name, *ONE)
        if verb == "rollback_env":
            added = await manager.add_deps(variant_id=name, packages=[TABULATE, TOML])
            await manager.rollback_env(variant_id=name)
            await asyncio.to_thread(Store(shared).discard, added["key"])
            await manager.prepare(variant_ids=[name])  # looks at the disks
        before = definition_files(shared, name)
        status = await manager.get_env_status(variant_id=name)
        position = (await manager.events(since=-1))["next"]
        fake_uv.fail("sync", times=None, stderr="error: the wheel is broken\n")
        with pytest.raises(UvFailed, match="uv sync ended") as caught:
            await getattr(manager, verb)(variant_id=name, **arguments)
        assert await manager.get_env_status(variant_id=name) == status
        assert definition_files(shared, name) == before
        kinds = await kinds_of(manager, name, position)
        return caught.value, (await rows_of(manager, name))[-1], kinds

    error, row, kinds = managed(shared, act)
    assert "the wheel is broken" in error.detail
    assert (error.variant_id, error.node_id) == (name, "local")
    assert (row["operation"], row["status"]) == (verb.partition("_")[0], "failed")
    assert row["error"]["detail"] == error.detail
    failed = "EnvironmentCreationFailed" if verb == "create_env" else "DependencyOperationFailed"
    assert kinds[-2:] == [failed, "EnvironmentLockReleased"]
    numbers = {path.name for path in (shared.root / "envs").glob(f"*{name}/generations/*")}
    assert numbers == ({"1", "2"} if verb == "rollback_env" else {"1"})


def test_after_a_build_that_failed_the_same_change_can_be_asked_for_again(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "again", *ONE)
        fake_uv.fail("sync", times=2)
        with pytest.raises(UvFailed):
            await manager.add_deps(variant_id="again", packages=[TABULATE])
        return await manager.add_deps(variant_id="again", packages=[TABULATE])

    told = managed(shared, act)
    assert (told["status"], told["generation"]) == ("ACTIVE", 2)
    assert told["diff"] == {**NOTHING, "added": {"tabulate": "0.9.0"}}


def test_the_current_generation_runs_while_the_next_one_is_prepared(
    shared: Settings, fake_uv: FakeUv, child: Any
) -> None:
    async def act(manager: EnvManager) -> Any:
        made = await created(manager, "busy", *ONE)
        stop = fake_uv.hang("sync")
        adding = asyncio.create_task(manager.add_deps(variant_id="busy", packages=[TOML]))
        await asyncio.to_thread(stop.wait)
        during = await manager.get_env_status(variant_id="busy")
        rows = [row for row in await manager.list_envs() if row["variant_id"] == "busy"]
        usable = await manager.get_environment(variant_id="busy")
        worker: Child = await asyncio.to_thread(
            child, Path(usable["python_path"]), "import six; print(six.__version__)"
        )
        stop.open()
        return made, during, rows, usable, worker, await adding

    made, during, (row,), usable, worker, after = managed(shared, act)
    assert (during["status"], row["status"], usable["status"]) == ("UPDATING",) * 3
    change = during["change"]
    state = change["nodes"].pop("local")
    assert (state["key"], state["phase"]) == (after["key"], "linking")
    assert change == {"operation": "add", "generation": 2, "key": after["key"], "nodes": {}}
    assert (during["key"], during["generation"], usable["key"]) == (made["key"], 1, made["key"])
    assert (usable["ready_nodes"], worker.first_line) == (["local"], "1.16.0")
    assert (after["status"], after["generation"], after["change"]) == ("ACTIVE", 2, None)
    assert after["diff"] == {**NOTHING, "added": {"toml": "0.10.2"}}
    worker.end()


def test_whoever_gives_up_during_a_change_leaves_nothing_half_made(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "left", *ONE)
        before = definition_files(shared, "left")
        stop = fake_uv.hang("sync")
        adding = asyncio.create_task(manager.add_deps(variant_id="left", packages=[TOML, ZIPP]))
        await asyncio.to_thread(stop.wait)
        adding.cancel()
        await asyncio.gather(adding, return_exceptions=True)
        assert definition_files(shared, "left") == before
        status = await manager.get_env_status(variant_id="left")
        stop.open()
        row = (await rows_of(manager, "left"))[-1]
        again = await manager.add_deps(variant_id="left", packages=["iniconfig==2.0.0"])
        return status, row, again

    status, row, again = managed(shared, act)
    assert (status["status"], status["change"], status["generation"]) == ("ACTIVE", None, 1)
    assert (row["operation"], row["status"]) == ("add", "interrupted")
    assert again["generation"] == 2


def test_a_rollback_starts_no_uv_where_the_environment_is_still_there(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        first = await created(manager, "back", *ONE)
        second = await manager.add_deps(variant_id="back", packages=["iniconfig==2.0.0"])
        calls, lasted = len(fake_uv.calls()), []
        for number in [1, 2] * 10:
            began = time.perf_counter()
            told = await manager.rollback_env(variant_id="back", to=number)
            lasted.append(1000 * (time.perf_counter() - began))
            expected = first if number == 1 else second
            assert (told["generation"], told["key"]) == (number, expected["key"])
            assert (told["status"], told["diff"]) == ("ACTIVE", REMOVED if number == 1 else ADDED)
        assert len(fake_uv.calls()) == calls
        return lasted, await manager.list_generations(variant_id="back")

    lasted, rows = managed(shared, act)
    assert [row["generation"] for row in rows] == [1, 2]
    print(f"rollback: {statistics.median(lasted):.1f} ms, the median of {len(lasted)}")


def test_a_rollback_builds_an_environment_that_is_not_there_any_more(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def prepare(manager: EnvManager) -> Any:
        first = await created(manager, "rebuilt", PLUGGY)
        await manager.add_deps(variant_id="rebuilt", packages=["six==1.16.0"])
        return first

    first = managed(shared, prepare)
    Store(shared).discard(first["key"])
    calls = len(fake_uv.calls("sync"))

    async def act(manager: EnvManager) -> Any:
        there = [row["is_ready"] for row in await manager.list_generations(variant_id="rebuilt")]
        return there, await manager.rollback_env(variant_id="rebuilt")

    there, told = managed(shared, act)
    assert there == [False, True]
    assert (told["key"], told["status"], told["generation"]) == (first["key"], "ACTIVE", 1)
    assert told["key"] in Store(shared).records()
    assert len(fake_uv.calls("sync")) == calls + 1


def test_a_rollback_looks_at_the_disk_before_it_switches(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "looks", *ONE)
        await manager.add_deps(variant_id="looks", packages=["zipp==3.7.0"])
        await manager.rollback_env(variant_id="looks")
        rows = await manager.list_generations(variant_id="looks")
        await asyncio.to_thread(Store(shared).discard, rows[1]["key"])
        told = await manager.rollback_env(variant_id="looks", to=2)
        return told, set(Store(shared).records())

    told, there = managed(shared, act)
    assert told["status"] == "ACTIVE"
    assert told["key"] in there


# -- only asked


DRY: dict[str, dict[str, Any]] = {
    "create_env": {"variant_id": "dry-new", "spec": spec(*TWO)},
    "replace": {"variant_id": "dry", "spec": spec("iniconfig==2.0.0"), "replace": True},
    "import_env": {"variant_id": "dry-new"},
    "add_deps": {"variant_id": "dry", "packages": ["zipp==3.7.0"]},
    "update_deps": {"variant_id": "dry", "packages": ["six==1.17.0"]},
    "remove_deps": {"variant_id": "dry", "packages": ["iniconfig"]},
    "rollback_env": {"variant_id": "dry"},
    "sync_env": {"variant_id": "dry"},
    "delete_env": {"variant_id": "dry"},
    "cleanup": {"idle_hours": 0, "include_current": True},
}


def test_what_is_only_asked_changes_nothing_and_says_what_would_be(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "dry", *ONE)
        await manager.add_deps(variant_id="dry", packages=["iniconfig==2.0.0"])
        files = (await manager.export_env(variant_id="dry"))["files"]
        DRY["import_env"] |= {"pyproject": files["pyproject.toml"], "uv_lock": files["uv.lock"]}
        status = await manager.get_env_status(variant_id="dry")
        there, history = tree(shared, status["key"]), await rows_of(manager)
        position = (await manager.events(since=-1))["next"]
        told = {}
        for verb, arguments in DRY.items():
            call = getattr(manager, "create_env" if verb == "replace" else verb)
            told[verb] = await call(dry_run=True, **arguments)
            assert tree(shared, status["key"]) == there, verb
            assert await rows_of(manager) == history, verb
            assert await events_of(manager, since=position) == [], verb
            assert await manager.get_env_status(variant_id="dry") == status, verb
            other = await manager.get_env_status(variant_id="dry-new")
            assert other["status"] == "NOT_EXISTS", verb
        return told, status

    told, status = managed(shared, act)
    assert {answer["dry_run"] for answer in told.values()} == {True}
    for verb, generation, diff in (
        ("replace", 3, {**NOTHING, "removed": {"six": "1.16.0"}}),
        ("add_deps", 3, {**NOTHING, "added": {"zipp": "3.7.0"}}),
        ("update_deps", 3, {**NOTHING, "changed": {"six": ["1.16.0", "1.17.0"]}}),
        ("remove_deps", 3, REMOVED),
        ("rollback_env", 1, REMOVED),
    ):
        answer = told[verb]
        assert (answer["generation"], answer["diff"]) == (generation, diff), verb
        assert answer["is_changed"], verb
    for verb in ("create_env", "import_env"):
        answer = told[verb]
        assert (answer["generation"], answer["key"], answer["is_ready"]) == (1, status["key"], True)
        assert answer["diff"]["added"] == answer["packages"] == status["packages"]
    assert (told["remove_deps"]["is_ready"], told["rollback_env"]["is_ready"]) == (True, True)
    assert told["delete_env"]["would_delete"] is True
    assert told["delete_env"]["deleted"] is False
    assert status["key"] in {row["key"] for row in told["cleanup"]["deleted"]}
    assert [row["damage"] for row in told["sync_env"]["checks"]] == [[]]


# -- leaving and coming back


@pytest.mark.parametrize("generation", [1, 2])
def test_an_export_comes_back_byte_for_byte_with_the_same_key_anywhere(
    shared: Settings, fake_uv: FakeUv, tmp_path: Path, generation: int
) -> None:
    async def leave(manager: EnvManager) -> Any:
        await manager.create_env(
            variant_id="leaving",
            spec=spec(pyproject=PROJECT, extras=("fast",), env_vars={"A": "b"}),
        )
        if generation == 2:
            await manager.create_env(variant_id="leaving", spec=spec(*TWO), replace=True)
        return await manager.export_env(variant_id="leaving", generation=generation)

    exported = managed(shared, leave)
    files = exported["files"]
    assert set(files) == {"pyproject.toml", "uv.lock", "options.json"}
    assert (
        files["uv.lock"]
        == (shared.root / f"envs/default_leaving/generations/{generation}/uv.lock").read_text()
    )

    async def come_back(manager: EnvManager) -> Any:
        told = await manager.import_env(
            variant_id="elsewhere",
            pyproject=files["pyproject.toml"],
            uv_lock=files["uv.lock"],
            options=json.loads(files["options.json"]),
            replace=True,
        )
        return told, await manager.export_env(variant_id="elsewhere")

    fresh = tried(shared.model_copy(update={"root": tmp_path / "fresh"}))
    for settings in (shared, fresh):
        if settings is fresh:
            fake_uv.fail("sync", times=None)  # what it would download is not the question
        told, again = managed(settings, come_back)
        assert again["files"] == files
        assert (told["key"], again["key"]) == (exported["key"],) * 2
        assert again["lock_sha256"] == exported["lock_sha256"]
        assert told["metadata"]["made_by"] == "import"
        written = definition_files(settings, "elsewhere")
        assert written["uv.lock"] == files["uv.lock"]
        assert written["pyproject.toml"] == files["pyproject.toml"]


def test_a_lock_of_another_ray_is_refused_with_the_pins_that_would_move(
    shared: Settings, tmp_path: Path
) -> None:
    """As it comes from the export of another cluster."""
    other = this_target(RAY).model_copy(update={"ray": OTHER_RAY})
    text = resolving.project_text(Definition(packages=ONE), other)
    (tmp_path / "pyproject.toml").write_text(text)
    uv_lock = asyncio.run(Builder(shared, Store(shared).cache).resolve(tmp_path)).text

    async def act(manager: EnvManager) -> Any:
        before = tree(shared)
        with pytest.raises(ResolutionFailed) as caught:
            await manager.import_env(variant_id="foreign", pyproject=text, uv_lock=uv_lock)
        assert tree(shared) == before
        status = await manager.get_env_status(variant_id="foreign")
        rows = await rows_of(manager, "foreign")
        allowed = await manager.import_env(
            variant_id="foreign",
            pyproject=text,
            uv_lock=uv_lock,
            options={"allow_moved_pins": True},
            dry_run=True,
        )
        return caught.value, status, rows, allowed

    error, status, rows, allowed = managed(shared, act)
    assert f"ray {OTHER_RAY} -> {RAY}" in error.detail.splitlines()
    assert "allow_moved_pins" in error.hint
    assert status["status"] == "NOT_EXISTS"
    assert [(row["operation"], row["status"]) for row in rows] == [("import", "failed")]
    assert allowed["packages"].items() > {("ray", RAY), ("six", "1.16.0")}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"uv_lock": "{"}, "not valid TOML"),
        ({"uv_lock": "x = 1\n"}, "no lock file of uv"),
        ({"pyproject": "x = 1\n"}, "no \\[project\\] table"),
    ],
)
def test_what_is_no_export_is_not_imported(
    shared: Settings, texts: dict[str, Any], words: str
) -> None:
    async def act(manager: EnvManager) -> Any:
        before = tree(shared)
        with pytest.raises(InvalidInput, match=words):
            await manager.import_env(
                variant_id="broken", **{"pyproject": PROJECT, "uv_lock": "version = 1\n", **texts}
            )
        assert tree(shared) == before

    managed(shared, act)


@pytest.mark.parametrize(
    ("format", "file", "pin"),
    [
        ("requirements", "requirements.txt", "six==1.16.0 \\\n    --hash=sha256:"),
        ("pylock", "pylock.toml", 'name = "six"\nversion = "1.16.0"\n'),
    ],
)
def test_other_formats_are_the_same_text_each_time_and_name_no_machine(
    shared: Settings, format: str, file: str, pin: str
) -> None:
    async def act(manager: EnvManager) -> Any:
        told = []
        for name in ("formats", "formats", "formats-too"):
            await created(manager, name, *ONE)
            told.append(await manager.export_env(variant_id=name, format=format))
        return told

    first, second, other = managed(shared, act)
    assert set(first["files"]) == {file}
    text = first["files"][file]
    assert pin in text
    assert str(shared.root) not in text
    assert first == second
    assert other["files"] == first["files"]


def test_an_unknown_format_is_refused_with_the_nearest(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "formats", *ONE)
        with pytest.raises(InvalidInput, match="'pylok'") as caught:
            await manager.export_env(variant_id="formats", format="pylok")
        return caught.value.hint

    assert managed(shared, act) == "did you mean 'pylock'?"


# -- another cluster


class OtherRay(LocalNodes):
    """This machine in a cluster of another release of Ray."""

    def ray_version(self) -> str:
        return OTHER_RAY


def test_on_another_ray_nothing_runs_until_it_is_locked_again_and_the_old_stays_listed(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def here(manager: EnvManager) -> Any:
        made = await created(manager, "moves", *ONE)
        return made, await manager.export_env(variant_id="moves")

    made, exported = managed(shared, here)

    async def elsewhere(manager: EnvManager) -> Any:
        before = await manager.get_env_status(variant_id="moves")
        row = next(r for r in await manager.list_envs() if r["variant_id"] == "moves")
        usable = await manager.get_environment(variant_id="moves", job_id="01")
        fake_uv.fail("sync", times=None)  # only the lock is the question here
        await manager.prepare(variant_ids=["moves"])
        told = await manager.events(variant_id="moves", kinds=["DependenciesUpdated"], timeout_s=60)
        rows = await manager.list_generations(variant_id="moves")
        with pytest.raises(InvalidInput) as caught:
            await manager.rollback_env(variant_id="moves", to=1)
        again = await manager.export_env(variant_id="moves", generation=1)
        status = await manager.get_env_status(variant_id="moves")
        return before, row, usable, told["events"], rows, caught.value, again, status

    before, row, usable, told, rows, error, again, status = managed(
        shared, elsewhere, nodes=OtherRay(NodeAgent)
    )
    assert (before["status"], row["status"], usable["status"]) == ("ERROR",) * 3
    assert (before["nodes"], usable["ready_nodes"]) == ({}, [])
    assert (before["key"], before["ray_version"]) == (made["key"], RAY)
    assert made["key"] in Store(shared).records()  # it is there, and still nothing runs in it
    for words in (f"locked for ray {RAY}", f"ray {OTHER_RAY}"):
        assert words in before["error"]["message"]
    assert "prepare()" in before["error"]["hint"]
    assert len(told) == 1
    assert told[0]["data"]["diff"]["changed"]["ray"] == [RAY, OTHER_RAY]
    assert [(r["generation"], r["made_by"], r["ray_version"], r["fits_cluster"]) for r in rows] == [
        (1, "create", RAY, False),
        (2, "relock", OTHER_RAY, True),
    ]
    assert (rows[0]["is_ready"], rows[1]["is_current"]) == (False, True)
    assert (status["generation"], status["ray_version"]) == (2, OTHER_RAY)
    assert status["packages"].items() > {("ray", OTHER_RAY), ("six", "1.16.0")}
    assert again == exported
    assert f"generation 1 of moves was locked for ray {RAY}" in error.message
    assert "import its export" in error.hint

    calls = len(fake_uv.calls("sync"))

    async def back(manager: EnvManager) -> Any:
        with pytest.raises(InvalidInput, match=f"locked for ray {OTHER_RAY}"):
            await manager.rollback_env(variant_id="moves", to=2)
        return await manager.sync_env(variant_id="moves")

    home = managed(shared, back)
    assert (home["status"], home["generation"], home["key"]) == ("ACTIVE", 3, made["key"])
    assert home["ray_version"] == RAY
    assert len(fake_uv.calls("sync")) == calls  # its environment has waited for it


def test_what_cannot_be_locked_for_another_ray_says_so_and_stays_as_it_is(
    shared: Settings, fake_uv: FakeUv
) -> None:
    managed(shared, lambda manager: created(manager, "stays", *ONE))
    before = definition_files(shared, "stays")

    async def elsewhere(manager: EnvManager) -> Any:
        fake_uv.fail("lock", exit_code=1, times=None, stderr="  × No solution for this ray\n")
        await manager.prepare(variant_ids=["stays"])
        await manager.events(variant_id="stays", kinds=["DependencyOperationFailed"], timeout_s=60)
        return await until(manager, "stays", "ERROR"), (await rows_of(manager, "stays"))[-1]

    status, row = managed(shared, elsewhere, nodes=OtherRay(NodeAgent))
    assert status["error"]["type"] == "ResolutionFailed"
    assert "No solution for this ray" in status["error"]["detail"]
    assert (row["operation"], row["status"]) == ("relock", "failed")
    assert definition_files(shared, "stays") == before


# -- at the same time


def test_fifty_identical_creates_are_one_resolution_one_build_and_one_answer(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        asked = (
            manager.create_env(variant_id="fifty", spec=spec(SORTED), wait_s=120) for _ in range(50)
        )
        return await asyncio.gather(*asked), await rows_of(manager, "fifty")

    told, rows = managed(shared, act)
    assert {json.dumps(answer) for answer in told} == {json.dumps(told[0])}
    assert (told[0]["status"], told[0]["generation"]) == ("ACTIVE", 1)
    assert [(call.command, call.is_offline) for call in fake_uv.calls()] == [
        ("lock", False),
        ("sync", True),
    ]
    assert [row["operation"] for row in rows] == ["create"]


def test_identical_additions_at_once_share_one_generation(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "shared-add", *ONE)
        calls = len(fake_uv.calls("lock"))
        asked = (manager.add_deps(variant_id="shared-add", packages=[SORTED]) for _ in range(20))
        told = await asyncio.gather(*asked)
        return told, len(fake_uv.calls("lock")) - calls, await rows_of(manager, "shared-add")

    told, calls, rows = managed(shared, act)
    assert {json.dumps(answer) for answer in told} == {json.dumps(told[0])}
    assert (told[0]["generation"], calls) == (2, 1)
    assert told[0]["diff"] == {**NOTHING, "added": {"sortedcontainers": "2.4.0"}}
    assert [row["operation"] for row in rows] == ["create", "add"]


def test_different_changes_at_once_take_turns_and_none_is_lost(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "turns", *ONE)
        await asyncio.gather(
            manager.add_deps(variant_id="turns", packages=["iniconfig==2.0.0"]),
            manager.add_deps(variant_id="turns", packages=["zipp==3.7.0"]),
            manager.update_deps(variant_id="turns", packages=["six==1.17.0"]),
        )
        events = await events_of(manager, "turns")
        return await manager.get_env_status(variant_id="turns"), events

    status, events = managed(shared, act)
    assert status["generation"] == 4
    expected = {("six", "1.17.0"), ("iniconfig", "2.0.0"), ("zipp", "3.7.0")}
    assert status["packages"].items() > expected
    taken = [
        e for e in events if e["kind"] in ("EnvironmentLockAcquired", "EnvironmentLockReleased")
    ]
    kinds = [event["kind"] for event in taken]
    assert kinds == ["EnvironmentLockAcquired", "EnvironmentLockReleased"] * 4
    owners = [event["operation_id"] for event in taken]
    assert owners[::2] == owners[1::2]
    assert len(set(owners)) == 4


def test_two_processes_with_the_same_change_make_one_generation(
    shared: Settings, fake_uv: FakeUv
) -> None:
    managed(shared, lambda manager: created(manager, "two", *ONE))
    calls = len(fake_uv.calls("lock"))
    stop = fake_uv.hang("lock")
    add: dict[str, Any] = {"variant_id": "two", "packages": [PLUGGY]}
    with (
        manager_process(shared, fake_uv, "add_deps", **add) as first,
        manager_process(shared, fake_uv, "add_deps", **add) as second,
    ):
        stop.wait()
        stop.open()
        told = [answer_of(first), answer_of(second)]
    assert [each["generation"] for each in told] == [2, 2]
    assert told[0]["key"] == told[1]["key"]
    assert sorted(each["is_changed"] for each in told) == [False, True]
    assert len(fake_uv.calls("lock")) == calls + 1


def test_who_asks_for_what_another_process_has_just_added_is_told_that_it_is_ready(
    shared: Settings, fake_uv: FakeUv
) -> None:
    add: dict[str, Any] = {"variant_id": "late", "packages": [TOML, PLUGGY]}

    async def act(manager: EnvManager) -> Any:
        await created(manager, "late", *ONE)
        with manager_process(shared, fake_uv, "add_deps", **add) as other:
            first = await asyncio.to_thread(answer_of, other)
        return first, await manager.add_deps(**add)

    first, second = managed(shared, act)
    assert (first["status"], first["generation"], second["generation"]) == ("ACTIVE", 2, 2)
    assert second["status"] == "ACTIVE"


@pytest.mark.parametrize(
    "verb", ["add_deps", "create_env", "rollback_env", "delete_env", "sync_env"]
)
def test_who_waits_too_long_for_another_process_is_told_which_one_it_is(
    shared: Settings, verb: str
) -> None:
    name = f"locked-{verb.partition('_')[0]}"
    impatient = shared.model_copy(update={"lock_timeout_s": 0.2})
    verbs: dict[str, dict[str, Any]] = {
        "add_deps": {"packages": ["iniconfig==2.0.0"]},
        "create_env": {"spec": spec(*TWO), "replace": True},
    }
    arguments = verbs.get(verb, {})

    async def act(manager: EnvManager) -> Any:
        await created(manager, name, *ONE)
        before, position = definition_files(shared, name), (await manager.events(since=-1))["next"]
        lock = shared.root / "envs" / f"{EnvId.parse(name).folder}.lock"
        with locked_by_another(lock) as pid:
            with pytest.raises(LockTimeout) as caught:
                await getattr(manager, verb)(variant_id=name, **arguments)
            status = await manager.get_env_status(variant_id=name)
        assert definition_files(shared, name) == before
        rows, events = await rows_of(manager, name), await events_of(manager, name, position)
        again = await getattr(manager, verb)(
            variant_id=name, **{**arguments, **({"to": 1} if verb == "rollback_env" else {})}
        )
        return caught.value, pid, status, rows[-1], events, again

    error, pid, status, row, events, again = managed(impatient, act)
    assert f"variant {name} is being changed by process {pid} on " in error.message
    assert (error.retryable, "RAY_ENVS_LOCK_TIMEOUT_S" in error.hint) == (True, True)
    assert status["status"] == "ACTIVE"
    assert (row["operation"], row["status"]) == (verb.partition("_")[0], "failed")
    assert row["error"] == error.to_dict()
    assert row["finished_at"] >= row["started_at"]
    last = events[-1]
    assert last["kind"] == "EnvironmentLockTimeout"
    assert last["operation_id"] == row["operation_id"]
    assert last["data"]["error"] == error.to_dict()
    assert again["status"] in ("ACTIVE", "NOT_EXISTS")


# -- what is told


def test_every_change_is_told_in_order_with_its_operation_and_its_particulars(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        await created(manager, "story", *ONE)
        await manager.add_deps(variant_id="story", packages=["iniconfig==2.0.0"])
        await manager.update_deps(variant_id="story", packages=["six==1.17.0"])
        await manager.remove_deps(variant_id="story", packages=["iniconfig"])
        await manager.rollback_env(variant_id="story")
        await manager.sync_env(variant_id="story")
        fake_uv.fail("lock", exit_code=1, stderr="no\n")
        with pytest.raises(ResolutionFailed):
            await manager.add_deps(variant_id="story", packages=["zipp==3.7.0"])
        await manager.pin_env(variant_id="story", is_pinned=True)
        await manager.delete_env(variant_id="story")
        events = await events_of(manager, "story", position)
        whole = await events_of(manager, since=position)
        return events, whole, await rows_of(manager, "story")

    story, whole, rows = managed(shared, act)
    # Nodes tell the end of a build: they are in no operation.
    events = [event for event in story if event["kind"] != "EnvironmentPrepared"]
    names = ["create", "add", "update", "remove", "rollback", "sync", "add", "pin", "delete"]
    assert [row["operation"] for row in rows] == names
    acquired, released = "EnvironmentLockAcquired", "EnvironmentLockReleased"
    assert [event["kind"] for event in events] == [
        acquired, "EnvironmentCreationStarted", "EnvironmentCreated", released,
        acquired, "DependenciesAdded", released,
        acquired, "DependenciesUpdated", released,
        acquired, "DependenciesRemoved", released,
        acquired, "EnvironmentRolledBack", released,
        acquired, "EnvironmentSynced", released,
        acquired, "DependencyOperationFailed", released,
        acquired, released,
        acquired, "EnvironmentDeleted", released,
    ]  # fmt: skip
    numbers = [event["number"] for event in whole]
    assert numbers == sorted(set(numbers))
    assert [event for event in whole if event["variant_id"] == "story"] == story
    moments = [event["at"] for event in events]
    assert moments == sorted(moments)
    by_operation = {row["operation_id"]: row for row in rows}
    for event in events:
        row = by_operation[event["operation_id"]]
        assert event.keys() == {
            "number", "at", "kind", "variant_id", "key", "node_id", "operation_id", "data",
        }  # fmt: skip
        assert event["data"]["operation"] == row["operation"]
        assert row["started_at"] <= event["at"]
    told = {event["kind"]: event for event in events}
    assert told["EnvironmentCreationStarted"]["data"]["packages"] == ["six==1.16.0"]
    assert told["DependenciesAdded"]["data"]["diff"] == ADDED
    updated = {**NOTHING, "changed": {"six": ["1.16.0", "1.17.0"]}}
    assert told["DependenciesUpdated"]["data"]["diff"] == updated
    assert told["DependenciesRemoved"]["data"]["diff"] == REMOVED
    assert told["EnvironmentRolledBack"]["data"]["diff"] == ADDED
    assert told["DependencyOperationFailed"]["data"]["error"]["type"] == "ResolutionFailed"
    for kind in ("EnvironmentCreated", "DependenciesAdded", "EnvironmentSynced"):
        assert told[kind]["key"]
        assert told[kind]["data"]["duration_s"] > 0
    assert told["EnvironmentRolledBack"]["key"] == told["DependenciesUpdated"]["key"]


def test_a_node_tells_the_end_of_each_build_once_and_how_it_ended(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        fake_uv.fail("sync", times=2, stderr="error: the wheel is broken\n")
        await manager.create_env(variant_id="ends", spec=spec(TABULATE))
        failed = await until(manager, "ends", "ERROR")
        ready = await prepared(manager, "ends")
        kinds = ["EnvironmentPreparationFailed", "EnvironmentPrepared"]
        return failed, ready, (await manager.events(since=position, kinds=kinds))["events"]

    failed, ready, (first, second) = managed(shared, act)
    for event, kind in ((first, "EnvironmentPreparationFailed"), (second, "EnvironmentPrepared")):
        assert (event["kind"], event["key"], event["node_id"]) == (kind, ready["key"], "local")
        assert event["variant_id"] == "ends"
        assert event["data"]["duration_s"] > 0
    assert first["data"]["error"] == failed["error"]
    assert "the wheel is broken" in failed["error"]["detail"]
    assert (second["data"]["how"], second["data"]["error"]) == ("linked", None)


def test_a_row_says_who_did_what_when_and_how_it_ended(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "w/row/1", *ONE)
        return await rows_of(manager, "w/row/1")

    (row,) = managed(shared, act)
    assert row.keys() == OPERATION_FIELDS
    assert (row["variant_id"], row["workflow_id"], row["node_id"], row["version_id"]) == (
        "w/row/1", "w", "row", "1",
    )  # fmt: skip
    assert (row["operation"], row["status"], row["exit_code"]) == ("create", "succeeded", 0)
    assert (row["stdout"], row["error"]) == ("", None)
    assert row["started_at"] < row["finished_at"]
    assert 0 < row["duration_ms"] < 240_000
    assert row["metadata"] == {"packages": ["six==1.16.0"], "generation": 1}


def test_rows_are_filtered_paged_and_deleted(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        for name in ("page", "page-too"):
            await created(manager, name, *ONE)
        await manager.add_deps(variant_id="page", packages=["iniconfig==2.0.0"])
        await manager.rollback_env(variant_id="page")
        with pytest.raises(ResolutionFailed):
            await manager.add_deps(variant_id="page", packages=["six==99"])

        async def found(**filters: Any) -> tuple[list[tuple[str, str]], int]:
            told = await manager.get_operations(**{"variant_id": "page", **filters})
            return [(row["operation"], row["status"]) for row in told["rows"]], told["total"]

        whole = [("add", "failed"), ("rollback", "succeeded"), ("add", "succeeded")]
        whole.append(("create", "succeeded"))
        assert await found() == (whole, 4)
        assert await found(operation="add") == ([whole[0], whole[2]], 2)
        assert await found(status="failed") == (whole[:1], 1)
        assert await found(limit=2, offset=1) == (whole[1:3], 4)
        assert await found(offset=9) == ([], 4)
        with pytest.raises(InvalidInput, match="'succeded'") as caught:
            await found(status="succeded")
        assert caught.value.hint == "did you mean 'succeeded'?"
        with pytest.raises(InvalidInput):
            await manager.delete_operations()
        assert await manager.delete_operations(variant_id="page", operation="add") == {"deleted": 2}
        assert await found() == ([whole[1], whole[3]], 2)
        past = await manager.delete_operations(variant_id="page", before="2001-01-01T00:00:00Z")
        assert past == {"deleted": 0}
        with pytest.raises(InvalidInput, match="is not a time"):
            await manager.delete_operations(variant_id="page", before="yesterday")
        assert await manager.delete_operations(variant_id="page") == {"deleted": 2}
        assert await found() == ([], 0)
        assert len(await rows_of(manager, "page-too")) == 1
        # The definition and its events do not depend on them.
        status = await manager.get_env_status(variant_id="page")
        assert (status["status"], status["generation"]) == ("ACTIVE", 1)
        assert len(await events_of(manager, "page")) > 4

    managed(shared, act)


def test_events_are_asked_for_by_number_kind_variant_and_count(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "asked", *ONE)
        await manager.add_deps(variant_id="asked", packages=["iniconfig==2.0.0"])
        whole = await events_of(manager, "asked")
        second = whole[1]["number"]
        assert await events_of(manager, "asked", second) == whole[2:]
        kinds = ["EnvironmentCreated", "DependenciesAdded"]
        some = await manager.events(variant_id="asked", kinds=kinds)
        assert [event["kind"] for event in some["events"]] == kinds
        read, since = [], 0
        while page := await manager.events(variant_id="asked", limit=2, since=since):
            if not page["events"]:
                break
            assert len(page["events"]) <= 2
            read += page["events"]
            since = page["next"]
        assert read == whole
        at_end = await manager.events(since=-1)
        assert at_end["events"] == []
        assert await manager.events(since=at_end["next"]) == at_end
        with pytest.raises(InvalidInput, match="'DependencyAdded'") as caught:
            await manager.events(kinds=["DependencyAdded"])
        assert caught.value.hint == "did you mean 'DependenciesAdded'?"

    managed(shared, act)


def test_who_waits_for_events_is_woken_by_the_event_and_not_by_a_clock(
    shared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_LOOK_S", 3600.0)

    async def act(manager: EnvManager) -> Any:
        await created(manager, "poll", *ONE)
        position = (await manager.events(since=-1))["next"]
        kinds = ["EnvironmentDeleted"]
        waiting = asyncio.create_task(manager.events(since=position, kinds=kinds, timeout_s=60))
        await manager.add_deps(variant_id="poll", packages=["iniconfig==2.0.0"])
        assert not waiting.done()  # it waits, and other kinds are no reason to answer
        await manager.delete_env(variant_id="poll")
        return await asyncio.wait_for(waiting, 30)

    (event,) = managed(shared, act)["events"]
    assert (event["kind"], event["variant_id"]) == ("EnvironmentDeleted", "poll")


def test_events_of_two_processes_have_one_order_for_everybody(
    shared: Settings, fake_uv: FakeUv
) -> None:
    async def act(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        other = manager_process(
            shared, fake_uv, "create_env", variant_id="there", spec=spec(*ONE), wait_s=120
        )
        with other:
            for packages in (["iniconfig==2.0.0"], ["zipp==3.7.0"]):
                await created(manager, f"here-{len(packages[0])}", *ONE)
            told = await asyncio.to_thread(answer_of, other)
        heard, since = [], position
        while page := (await manager.events(since=since, timeout_s=0)):
            if not page["events"]:
                break
            heard += page["events"]
            since = page["next"]
        return told, position, heard

    told, position, heard = managed(shared, act)
    assert told["status"] == "ACTIVE"
    kinds = {(event["variant_id"], event["kind"]) for event in heard}
    assert {("there", "EnvironmentCreated"), ("here-16", "EnvironmentCreated")} <= kinds
    numbers = [event["number"] for event in heard]
    assert numbers == list(range(position + 1, position + 1 + len(heard)))
    again = managed(shared, lambda manager: events_of(manager, since=position))
    assert again[: len(heard)] == heard


def test_a_long_poll_hears_of_another_process(shared: Settings, fake_uv: FakeUv) -> None:
    async def act(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        waiting = asyncio.create_task(
            manager.events(
                since=position, kinds=["EnvironmentCreated"], variant_id="far", timeout_s=60
            )
        )
        with manager_process(
            shared, fake_uv, "create_env", variant_id="far", spec=spec(*ONE), wait_s=120
        ) as other:
            told = await waiting
            await asyncio.to_thread(answer_of, other)
        return told

    (event,) = managed(shared, act)["events"]
    assert (event["kind"], event["variant_id"]) == ("EnvironmentCreated", "far")


def test_a_subscriber_that_raises_hears_the_next_event_and_hurts_nobody(
    shared: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[dict[str, Any]] = []
    quiet: list[str] = []
    is_over = threading.Event()

    def broken(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["kind"] == "EnvironmentDeleted":
            is_over.set()
        raise ValueError("a broken subscriber")

    with RayEnvironmentProvider.without_cluster(shared) as envs:
        envs.create("heard", {"packages": list(ONE)}, wait_s=120)
        end = envs.subscribe(broken)
        end_quiet = envs.subscribe(
            lambda event: quiet.append(event["kind"]), kinds=["DependenciesAdded"]
        )
        added = envs.add("heard", ["iniconfig==2.0.0"])
        envs.delete("heard")
        assert is_over.wait(60)
        wait_until(lambda: quiet, "the other subscriber hears it too", 60)
        end()
        end_quiet()
        envs.create("heard", {"packages": list(ONE)})
    assert added["status"] == "ACTIVE"
    told = [event["kind"] for event in heard if event["variant_id"] == "heard"]
    assert told[:4] == [
        "EnvironmentLockAcquired", "DependenciesAdded", "EnvironmentLockReleased",
        "EnvironmentLockAcquired",
    ]  # fmt: skip
    numbers = [event["number"] for event in heard]
    assert numbers == sorted(set(numbers))
    assert "EnvironmentCreated" not in told  # nothing after the end
    assert quiet == ["DependenciesAdded"]
    assert capsys.readouterr().err.count("ValueError: a broken subscriber") == len(heard)


class Flickering(LocalNodes):
    """This machine, as a node that can be away."""

    def __init__(self) -> None:
        super().__init__(NodeAgent)
        self.is_there = True

    async def alive(self) -> list[NodeInfo]:
        return await super().alive() if self.is_there else []


def test_a_node_that_goes_and_comes_is_told_and_known_again(shared: Settings) -> None:
    nodes = Flickering()

    async def act(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        await created(manager, "node", *ONE)
        nodes.is_there = False
        lost = await manager.events(since=position, kinds=["NodeLost"], timeout_s=60)
        without = await manager.get_env_status(variant_id="node")
        nodes.is_there = True
        joined = await manager.events(since=position, kinds=["NodeJoined"], timeout_s=60)
        return lost["events"], without, joined["events"], await until(manager, "node", "ACTIVE")

    (lost,), without, (joined,), after = managed(shared, act, nodes=nodes)
    for event in (lost, joined):
        assert (event["node_id"], event["data"]) == ("local", {"address": "127.0.0.1"})
    assert lost["number"] < joined["number"]
    assert (without["nodes"], without["has_venv"]) == ({}, False)
    assert list(after["nodes"]) == ["local"]


def test_a_change_whose_process_was_killed_is_undone_and_told(
    shared: Settings, fake_uv: FakeUv
) -> None:
    managed(shared, lambda manager: created(manager, "killed", *ONE))
    before = definition_files(shared, "killed")
    stop = fake_uv.hang("sync")
    with manager_process(
        shared, fake_uv, "add_deps", variant_id="killed", packages=[ZIPP, PLUGGY]
    ) as process:
        stop.wait()
        process.kill()
        process.wait()
        wait_until(lambda: processes_of(shared.root) == [], "uv ends with the manager", 60)
    assert "generations/2/uv.lock" in definition_files(shared, "killed")

    async def act(manager: EnvManager) -> Any:
        told = await manager.events(
            variant_id="killed", kinds=["OperationInterrupted"], timeout_s=60
        )
        return told["events"], await rows_of(manager, "killed")

    (event,), (_, row) = managed(shared, act)
    assert (row["operation"], row["status"], row["metadata"]["outcome"]) == (
        "add", "interrupted", "undone",
    )  # fmt: skip
    assert "died" in row["error"]["message"]
    assert (event["operation_id"], event["data"]["outcome"]) == (row["operation_id"], "undone")
    assert definition_files(shared, "killed") == before


# -- secrets

SECRET = "hunter2-is-secret"


SECRETIVE: tuple[dict[str, Any], ...] = (
    {"packages": [f"six @ https://user:{SECRET}@host.invalid/six.whl"]},
    {"packages": [f"six @ https://host.invalid/six.whl?token={SECRET}"]},
    {
        "pyproject": f'{PROJECT}[[tool.uv.index]]\nname = "x"\n'
        f'url = "https://me:{SECRET}@host.invalid/simple"\n'
    },
    {"env_vars": {"API_TOKEN": SECRET}},
    {"env_vars": {"DATABASE": f"postgresql://me:{SECRET}@host.invalid/db"}},
)


def test_credentials_in_a_definition_are_refused_and_are_nowhere_afterwards(
    shared: Settings,
) -> None:
    async def act(manager: EnvManager) -> Any:
        await created(manager, "plain", *ONE)
        errors = []
        for given in SECRETIVE:
            with pytest.raises((InvalidInput, InvalidPackages)) as caught:
                await manager.create_env(variant_id="secret", spec=given)
            errors.append(caught.value)
        for given in SECRETIVE[:2]:
            for verb in ("add_deps", "update_deps", "remove_deps"):
                with pytest.raises(InvalidPackages) as refused:
                    await getattr(manager, verb)(variant_id="plain", packages=given["packages"])
                errors.append(refused.value)
        told = [await events_of(manager), await rows_of(manager), await manager.list_envs()]
        return errors, told, await manager.get_env_status(variant_id="secret")

    errors, told, status = managed(shared, act)
    assert len(errors) == len(SECRETIVE) + 6
    for error in errors:
        assert SECRET not in str(error)
        assert error.hint
    assert status["status"] == "NOT_EXISTS"
    assert SECRET not in json.dumps(told)
    assert mentions(shared, SECRET) == []


@pytest.mark.parametrize("command", ["lock", "sync"])
def test_credentials_that_uv_prints_are_nowhere(
    shared: Settings, fake_uv: FakeUv, command: str
) -> None:
    said = f"error: failed to fetch https://user:{SECRET}@host.invalid/simple?token={SECRET}\n"

    async def act(manager: EnvManager) -> Any:
        await created(manager, "printed", *ONE)
        fake_uv.fail(command, times=None, exit_code=2, stderr=said)
        with pytest.raises(UvFailed) as caught:
            await manager.add_deps(variant_id="printed", packages=[ZIPP, SORTED])
        seen: list[Any] = []
        if command == "sync":  # a variant that stays, with its error
            await manager.create_env(variant_id="half", spec=spec(ZIPP, SORTED))
            seen.append(await until(manager, "half", "ERROR"))
            with pytest.raises(UvFailed):
                await manager.sync_env(variant_id="half")
            seen.append(await manager.explain(variant_id="half"))
            await manager.delete_env(variant_id="half")
        seen += [await events_of(manager), await rows_of(manager), await manager.list_envs()]
        return caught.value, seen

    error, seen = managed(shared, act)
    assert "https://***@host.invalid/simple" in error.detail
    assert SECRET not in str(error)
    assert "https://***@host.invalid/simple" in json.dumps(seen)
    assert SECRET not in json.dumps(seen)
    assert mentions(shared, SECRET) == []
