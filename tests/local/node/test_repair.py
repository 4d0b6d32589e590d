"""Damage to environments that stood ready: found, told, mended, and never at the cost of a user."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs.errors import EnvironmentInUse
from ray_envs.manager.manager import EnvManager
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.testing import FakeUv
from tests.local.conftest import Child
from tests.local.life_tools import created, events_of, managed, rows_of, until, warm_root

#: Two environments that share the file of six.
ONE, TWO = ("six==1.16.0",), ("six==1.16.0", "iniconfig==2.0.0")

Damage = Callable[[Store, str, str], None]


#: Of what has no record that counts, `inspector._tell` says nothing.
@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Settings]:
    with warm_root(tmp_path_factory.mktemp("repair") / "root", warm_cache) as settings:
        yield settings


@pytest.fixture
def shared(house: Settings) -> Settings:
    """A root with the variants `one` and `two`, whole."""

    async def make(manager: EnvManager) -> None:
        for name, packages in (("one", ONE), ("two", TWO)):
            await manager.prepare(variant_ids=[])
            await created(manager, name, *packages)

    managed(house, make)
    return house


def key_of(settings: Settings, name: str) -> str:
    async def act(manager: EnvManager) -> Any:
        return (await manager.get_env_status(variant_id=name))["key"]

    return str(managed(settings, act))


def minor(settings: Settings, key: str) -> str:
    record = Store(settings).record(key)
    assert record is not None
    return ".".join(record.python.split(".")[:2])


def site(settings: Settings, key: str) -> Path:
    return Store(settings).site_packages(key, minor(settings, key))


def works(settings: Settings, key: str) -> bool:
    """Whether a process of the environment has six, unharmed."""
    code = "import six, inspect; print(six.__version__, 'harm' in inspect.getsource(six))"
    python = Store(settings).python(key)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout == "1.16.0 False\n"


def doctored(settings: Settings, **options: Any) -> dict[str, Any]:
    told: dict[str, Any] = managed(settings, lambda manager: manager.doctor(**options))
    return told


def row_of(told: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = [row for row in told["environments"] if row["variant_id"] == name]
    return dict(row)


def by_variant(events: list[dict[str, Any]], what: str) -> dict[str, dict[str, Any]]:
    return {e["variant_id"]: e for e in events if e["kind"] == f"Environment{what}"}


def file_missing(store: Store, key: str, minor: str) -> None:
    (store.site_packages(key, minor) / "six.py").unlink()


def edited_through_a_link(store: Store, key: str, minor: str) -> None:
    with (store.site_packages(key, minor) / "six.py").open("a") as file:
        file.write("\n# harm\n")


def interpreter_gone(store: Store, key: str, minor: str) -> None:
    store.python(key).unlink()


def interpreter_link_leads_nowhere(store: Store, key: str, minor: str) -> None:
    store.python(key).unlink()
    store.python(key).symlink_to(store.root / "no-such-python")


def packages_wiped(store: Store, key: str, minor: str) -> None:
    shutil.rmtree(store.venv(key) / "lib")


def venv_wiped(store: Store, key: str, minor: str) -> None:
    shutil.rmtree(store.venv(key))


def store_wiped(store: Store, key: str, minor: str) -> None:
    shutil.rmtree(store.folder)


async def synced(manager: EnvManager) -> Any:
    """What a sync of `one` answers, and the events that it told, by their kind."""
    position = (await manager.events(since=-1))["next"]
    told = await manager.sync_env(variant_id="one")
    events = await events_of(manager, "one", position)
    return told, {event["kind"]: event for event in events}, (await rows_of(manager, "one"))[-1]


@pytest.mark.parametrize(
    "damage",
    [
        file_missing,
        edited_through_a_link,
        packages_wiped,
        interpreter_gone,
        interpreter_link_leads_nowhere,
        venv_wiped,
        store_wiped,
    ],
    ids=lambda value: value.__name__,
)
def test_damage_is_found_and_mended(shared: Settings, damage: Damage) -> None:
    key = key_of(shared, "one")
    damage(Store(shared), key, minor(shared, key))
    found = doctored(shared, variant_id="one")
    told, _, row = managed(shared, synced)
    after = managed(shared, lambda manager: manager.sync_env(variant_id="one", dry_run=True))
    assert found["is_healthy"] is False
    (bad,) = found["environments"]
    assert (bad["variant_id"], bad["key"], bad["node_id"]) == ("one", key, "local")
    assert bad["damaged_files"] or not bad["is_ready"]
    assert (told["status"], told["exit_code"], told["error"]) == ("ACTIVE", 0, None)
    assert (row["operation"], row["status"]) == ("sync", "succeeded")
    assert works(shared, key)
    (good,) = after["checks"]
    assert (good["is_ready"], good["damage"], good["left"]) == (True, [], [])
    managed(shared, lambda manager: manager.sync_env(variant_id="two"))  # it may share the damage


@pytest.mark.parametrize(
    ("damage", "is_rebuilt"),
    [
        (file_missing, False),
        (packages_wiped, True),
        (interpreter_gone, True),
        (venv_wiped, True),
        (store_wiped, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damage_is_told_before_its_repair(
    shared: Settings, damage: Damage, is_rebuilt: bool
) -> None:
    key = key_of(shared, "one")
    damage(Store(shared), key, minor(shared, key))
    _, told, _ = managed(shared, synced)
    beside = ("EnvironmentLockAcquired", "EnvironmentPrepared", "EnvironmentLockReleased")
    kinds = [kind for kind in told if kind not in beside]
    assert kinds == ["EnvironmentDamaged", "EnvironmentRepaired", "EnvironmentSynced"]
    damaged, repaired = told["EnvironmentDamaged"], told["EnvironmentRepaired"]
    for event in (damaged, repaired):
        assert (event["variant_id"], event["key"], event["node_id"]) == ("one", key, "local")
    assert damaged["data"]["sharers"] == []
    assert (repaired["data"]["left"], repaired["data"]["is_rebuilt"]) == ([], is_rebuilt)


def test_an_edit_reaches_all_who_share_the_file_and_all_of_them_are_named_and_mended(
    shared: Settings, fake_uv: FakeUv
) -> None:
    """uv's cache shares it too: that entry is dropped, and fetched again."""
    one, two = key_of(shared, "one"), key_of(shared, "two")
    store = Store(shared)
    wheels = {path for path in store.cache.glob("archive-v*/*") if (path / "six.py").exists()}
    edited_through_a_link(store, one, minor(shared, one))
    assert not works(shared, two)
    found = doctored(shared)

    async def repair(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        told = await manager.doctor(repair=True)
        return told, await events_of(manager, since=position)

    told, events = managed(shared, repair)
    again = doctored(shared)
    assert (found["is_healthy"], told["is_healthy"], again["is_healthy"]) == (False, True, True)
    damaged, repaired = (by_variant(events, kind) for kind in ("Damaged", "Repaired"))
    for name, other in (("one", two), ("two", one)):
        assert damaged[name]["data"]["sharers"] == ([other] if name == "one" else [])
        assert repaired[name]["data"]["left"] == []
        row = row_of(found, name)
        assert row["sharers"] == [other]
        assert row["damage"] == [{"package": "six", "path": "six.py", "kind": "changed"}]
        assert row["left"] == row["damage"]
    assert row_of(told, "one")["left"] == []
    assert (works(shared, one), works(shared, two)) == (True, True)
    fetched = [call for call in fake_uv.calls("sync") if not call.is_offline]
    assert len(fetched) == 1
    now = {path for path in store.cache.glob("archive-v*/*") if (path / "six.py").exists()}
    assert all("harm" not in (path / "six.py").read_text() for path in now)
    assert now != wheels
    place = site(shared, one) / "six.py"
    assert os.path.samefile(place, site(shared, two) / "six.py")  # it is shared again


def test_what_is_only_asked_is_reported_and_not_mended(shared: Settings) -> None:
    key = key_of(shared, "one")
    file_missing(Store(shared), key, minor(shared, key))
    told = managed(shared, lambda manager: manager.sync_env(variant_id="one", dry_run=True))
    (row,) = told["checks"]
    assert row["left"] == row["damage"] == [{"package": "six", "path": "six.py", "kind": "missing"}]
    assert not (site(shared, key) / "six.py").exists()
    managed(shared, lambda manager: manager.sync_env(variant_id="one"))
    assert works(shared, key)


def test_a_file_of_a_payload_is_reported_and_never_removed(shared: Settings) -> None:
    key = key_of(shared, "one")
    extra = site(shared, key) / "payload.db"
    extra.write_text("rows")
    try:
        found = doctored(shared, variant_id="one")
        synced = managed(shared, lambda manager: manager.sync_env(variant_id="one"))
        mended = doctored(shared, variant_id="one", repair=True)
        expected = [{"package": "", "path": "payload.db", "kind": "extra"}]
        for row in (row_of(found, "one"), row_of(mended, "one"), synced["checks"][0]):
            assert (row["damage"], row["left"], row["is_discarded"]) == (expected, expected, False)
        assert synced["status"] == "ACTIVE"
        assert extra.read_text() == "rows"
    finally:
        extra.unlink()


def test_what_is_held_is_mended_in_place_while_its_process_goes_on(
    shared: Settings, child: Any
) -> None:
    key = key_of(shared, "one")
    worker: Child = child(Store(shared).python(key))
    edited_through_a_link(Store(shared), key, minor(shared, key))
    file = site(shared, key) / "six.py"
    inode = file.stat().st_ino
    told = managed(shared, lambda manager: manager.sync_env(variant_id="one"))
    assert (told["status"], told["checks"][0]["is_discarded"]) == ("ACTIVE", False)
    assert works(shared, key)
    assert file.stat().st_ino != inode  # replaced, never written into
    assert worker.process.poll() is None
    worker.end()
    managed(shared, lambda manager: manager.doctor(repair=True))


@pytest.mark.parametrize(
    "damage", [packages_wiped, interpreter_gone], ids=lambda value: value.__name__
)
def test_what_is_held_and_can_only_be_built_again_stays_until_its_process_has_ended(
    shared: Settings, child: Any, damage: Damage
) -> None:
    key = key_of(shared, "one")
    worker: Child = child(Store(shared).python(key))
    damage(Store(shared), key, minor(shared, key))
    place = Store(shared).venv(key)
    inode = place.stat().st_ino

    async def sync(manager: EnvManager) -> Any:
        with pytest.raises(EnvironmentInUse) as caught:
            await manager.sync_env(variant_id="one")
        return caught.value, (await rows_of(manager, "one"))[-1]

    error, row = managed(shared, sync)
    assert (error.key, error.retryable) == (key, True)
    assert (row["operation"], row["status"], row["error"]["type"]) == (
        "sync", "failed", "EnvironmentInUse",
    )  # fmt: skip
    assert place.stat().st_ino == inode
    assert worker.process.poll() is None
    worker.end()
    told = managed(shared, lambda manager: manager.sync_env(variant_id="one"))
    assert (told["status"], works(shared, key)) == ("ACTIVE", True)


@pytest.mark.parametrize(
    ("damage", "is_told"),
    [(packages_wiped, False), (interpreter_gone, False), (packages_wiped, True)],
    ids=["given up", "lost", "told"],
)
def test_who_keeps_an_environment_from_being_built_again_is_named(
    shared: Settings, child: Any, damage: Damage, is_told: bool
) -> None:
    key = key_of(shared, "one")
    worker: Child = child(Store(shared).python(key))
    damage(Store(shared), key, minor(shared, key))

    async def sync(manager: EnvManager) -> Any:
        position = (await manager.events(since=-1))["next"]
        with pytest.raises(EnvironmentInUse) as caught:
            await manager.sync_env(variant_id="one")
        return caught.value, await events_of(manager, "one", position)

    try:
        error, events = managed(shared, sync)
    finally:
        worker.end()
        managed(shared, lambda manager: manager.sync_env(variant_id="one"))
    if is_told:
        assert "EnvironmentDamaged" in [event["kind"] for event in events]
    else:
        assert str(worker.process.pid) in str(error)


def test_a_lost_environment_that_is_wanted_is_built_again_without_being_asked(
    shared: Settings,
) -> None:
    async def act(manager: EnvManager) -> Any:
        told = await manager.prepare(variant_ids=["one"])
        key = told["variants"]["one"]["key"]
        await asyncio.to_thread(shutil.rmtree, Store(shared).folder / key)
        await until(manager, "one", "CREATING")
        return key, await until(manager, "one", "ACTIVE")

    key, told = managed(shared, act)
    assert (told["status"], works(shared, key)) == ("ACTIVE", True)


def test_a_kept_generation_is_examined_and_mended_before_anybody_rolls_back_to_it(
    shared: Settings,
) -> None:
    key = key_of(shared, "one")

    async def change(manager: EnvManager) -> Any:
        await manager.add_deps(variant_id="one", packages="idna")
        edited_through_a_link(Store(shared), key, minor(shared, key))
        found = await manager.doctor()
        mended = await manager.doctor(repair=True)
        return found, mended, await manager.rollback_env(variant_id="one")

    found, mended, rolled_back = managed(shared, change)
    assert (found["is_healthy"], mended["is_healthy"]) == (False, True)
    assert [row["damaged_files"] for row in found["environments"] if row["key"] == key] == [1]
    assert (rolled_back["key"], works(shared, key)) == (key, True)


def test_a_package_that_somebody_installed_is_found_and_gone_after_a_sync(shared: Settings) -> None:
    key = key_of(shared, "one")
    info = site(shared, key) / "foreign-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("foreign-1.0.dist-info/RECORD,,\n")
    found = doctored(shared, variant_id="one")
    assert row_of(found, "one")["damage"] == [
        {"package": "foreign", "path": "foreign-1.0.dist-info/RECORD", "kind": "extra"}
    ]
    told = managed(shared, lambda manager: manager.sync_env(variant_id="one"))
    assert (told["status"], info.exists(), works(shared, key)) == ("ACTIVE", False, True)
