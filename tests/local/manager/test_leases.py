"""Promises to jobs: kept over restarts, ended with the job, and a reason to refuse a deletion."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_envs.cluster.nodes import LocalNodes
from ray_envs.errors import EnvironmentInUse, StorageFailed
from ray_envs.manager.leases import Leases
from ray_envs.manager.manager import EnvManager
from ray_envs.node.agent import NodeAgent
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from tests.local.conftest import Child
from tests.local.life_tools import created, managed, rows_of, warm_root


class Jobs(LocalNodes):
    """This machine, with jobs that go on, and the runtime_envs of detached actors."""

    def __init__(self, *jobs: str, given: tuple[str, ...] = (), session: str = "s1") -> None:
        super().__init__(NodeAgent)
        self.jobs, self.given, self.name = set(jobs), list(given), session

    async def living_jobs(self) -> set[str]:
        return {f"{self.name}/{job}" for job in self.jobs}

    async def given_to_detached(self) -> list[str]:
        return self.given

    def session(self) -> str:
        return self.name


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Iterator[Settings]:
    with warm_root(tmp_path_factory.mktemp("leases") / "root", warm_cache) as settings:
        managed(settings, lambda manager: created(manager, "keeps-ray-in-the-cache"))
        yield settings


def took(path: Path, *promises: tuple[str, str]) -> Leases:
    leases = Leases(path)
    for key, job in promises:
        leases.take(key, job_id=job, session="s1", variant_id="v")
    return leases


# -- what is kept


def test_a_promise_survives_the_process_that_made_it(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    first = took(path, ("k1", "01"), ("k1", "02"), ("k2", "02"), ("k1", "01"))
    for leases in (first, Leases(path)):
        assert leases.all() == {"k1": "job 01, 02", "k2": "job 02"}
        assert leases.jobs() == {"s1/01", "s1/02"}
        assert (leases.of("k1"), leases.of("k2"), leases.of("k3")) == (["01", "02"], ["02"], [])
        assert (leases.of("k1", but_job="01"), leases.of("k2", but_job="02")) == (["02"], [])


def test_a_promise_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    leases = took(path, ("k1", "01"))
    written = path.stat().st_ino
    leases.take("k1", job_id="01", session="s1", variant_id="other")
    assert path.stat().st_ino == written


KEYS, JOBS = ["k1", "k2", "k3"], ["s1/01", "s1/02", "s2/01"]
promises = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(JOBS)))


@example(given_away=[("k1", "s1/01"), ("k2", "s1/02")], alive={"s1/02"}, kept=set())
@given(promises, st.sets(st.sampled_from(JOBS)), st.sets(st.sampled_from(KEYS)))
def test_all_and_only_the_promises_to_ended_jobs_end_unless_an_actor_has_the_environment(
    tmp_path_factory: pytest.TempPathFactory,
    given_away: list[tuple[str, str]],
    alive: set[str],
    kept: set[str],
) -> None:
    path = tmp_path_factory.mktemp("leases") / "leases.json"
    leases = Leases(path)
    for key, holder in given_away:
        session, _, job = holder.partition("/")
        leases.take(key, job_id=job, session=session, variant_id="v")
    freed = leases.end(set(JOBS) - alive, kept)
    left = {(key, holder) for key, holder in given_away if holder in alive or key in kept}
    for told in (leases, Leases(path)):
        assert told.jobs() == {holder for _, holder in left}
        assert set(told.all()) == {key for key, _ in left}
        for key in KEYS:
            assert told.of(key) == sorted({h.partition("/")[2] for k, h in left if k == key})
    assert set(freed) == {key for key, _ in given_away} - {key for key, _ in left}
    assert leases.end(set(JOBS) - alive, kept) == []


def test_a_damaged_file_of_promises_is_an_error_and_no_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    path.write_text("{")
    for ask in (Leases(path).all, Leases(path).jobs, lambda: took(path, ("k", "01"))):
        with pytest.raises(StorageFailed, match=r"leases.json is damaged"):
            ask()
    assert path.read_text() == "{"


def test_managers_of_one_root_see_each_others_promises_and_overwrite_none(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    one, two = Leases(path), Leases(path)
    one.take("k1", job_id="01", session="s1", variant_id="v")
    two.take("k2", job_id="01", session="s2", variant_id="v")
    one.take("k3", job_id="02", session="s1", variant_id="v")
    for leases in (one, two, Leases(path)):
        assert set(leases.all()) == {"k1", "k2", "k3"}
        assert leases.jobs() == {"s1/01", "s1/02", "s2/01"}
    assert two.end({"s1/02"}) == ["k3"]
    assert set(one.all()) == {"k1", "k2"}


def test_many_managers_promise_at_once_and_each_promise_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    start = threading.Barrier(6)

    def promise(number: int) -> None:
        leases = Leases(path)
        start.wait(20)
        for job in range(5):
            leases.take(f"k{number}", job_id=str(job), session=f"s{number}", variant_id="v")

    threads = [threading.Thread(target=promise, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(Leases(path).jobs()) == 30


@pytest.mark.parametrize("is_written", [True, False])
def test_a_promise_holds_where_the_disk_takes_no_lock_and_perhaps_no_file(
    tmp_path: Path, is_written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "leases.json"
    path.with_suffix(".lock").mkdir()  # it cannot be opened as a file
    if not is_written:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("ray_envs.manager.leases.write_atomically", full)
    leases = Leases(path)
    with contextlib.suppress(StorageFailed):
        leases.take("k1", job_id="01", session="s1", variant_id="v")
    assert leases.of("k1") == ["01"]
    assert path.exists() is is_written


class Cluster(Jobs):
    """A cluster of its own, with a manager of its own on the shared root."""

    def address(self) -> str:
        return f"{self.name}:6379"


def test_what_another_cluster_on_the_root_was_promised_is_not_collected(shared: Settings) -> None:
    """An embedded Ray beside a running cluster is the usual case on a laptop."""

    async def both(manager: EnvManager) -> None:
        key = (await created(manager, "theirs", "six==1.14.0"))["key"]
        await manager.get_options(variant_id="theirs", job_id="01")
        other = EnvManager(settings=shared.to_environment(), nodes=Cluster(session="s2"))
        try:
            await other.delete_env(variant_id="theirs", force=True)
            told = await other.cleanup(idle_hours=0)
            (row,) = [each for each in told["kept"] if each["key"] == key]
            assert "job 01" in row["because"]
            assert key not in [each["key"] for each in told["deleted"]]
        finally:
            await other.stop()

    managed(shared, both, nodes=Cluster("01", session="s1"))
    for path in (shared.root / "sessions").iterdir():
        os.utime(path, (0, 0))  # long after its end, a session is over, and so are its promises
    told = managed(shared, lambda manager: manager.cleanup(idle_hours=0))
    assert len(told["deleted"]) == 1


# -- what it means


def test_a_promise_keeps_an_environment_until_its_job_has_ended_over_restarts_too(
    shared: Settings,
) -> None:
    async def promise(manager: EnvManager) -> Any:
        key = (await created(manager, "promised", "six==1.10.0"))["key"]
        await manager.get_environment(variant_id="promised", job_id="01")
        await manager.delete_env(variant_id="promised", job_id="01")
        return key

    key = managed(shared, promise, nodes=Jobs("01"))

    def collected(*jobs: str) -> dict[str, str]:
        told = managed(shared, lambda manager: manager.cleanup(idle_hours=0), nodes=Jobs(*jobs))
        assert {row["key"] for row in told["deleted"]} <= {key}
        return {row["key"]: row["because"] for row in [*told["kept"], *told["deleted"]]}

    assert collected("01")[key] == "leased to job 01"
    assert key in Store(shared).records()
    assert collected("02")[key].endswith("and the limit is 0 s")
    assert key not in Store(shared).records()
    assert json.loads((shared.root / "leases.json").read_text()) == {}


def test_a_job_of_an_earlier_session_is_no_job_of_the_same_number_now(shared: Settings) -> None:
    async def promise(manager: EnvManager) -> Any:
        key = (await created(manager, "earlier", "six==1.10.0"))["key"]
        await manager.get_environment(variant_id="earlier", job_id="01")
        await manager.delete_env(variant_id="earlier", force=True)
        return key

    key = managed(shared, promise, nodes=Jobs("01", session="s1"))
    told = managed(
        shared,
        lambda manager: manager.cleanup(idle_hours=0, dry_run=True),
        nodes=Jobs("01", session="s2"),
    )
    assert key in {row["key"] for row in told["deleted"]}


def test_a_detached_actor_is_promised_environments_after_its_job(shared: Settings) -> None:
    jobs = Jobs("01")
    kept: list[list[str]] = []

    async def act(manager: EnvManager) -> None:
        await created(manager, "late", "six==1.11.0")

        async def leases() -> list[str]:
            await manager.cleanup(dry_run=True)  # looks at the jobs first
            told = await manager.explain(variant_id="late")
            return list(told["leases"])

        await manager.get_environment(variant_id="late", job_id="01")
        kept.append(await leases())
        jobs.jobs = {"01+"}  # it has ended, and its detached actor lives
        kept.append(await leases())
        await manager.get_environment(variant_id="late", job_id="01")
        kept.append(await leases())
        jobs.jobs = set()
        kept.append(await leases())

    managed(shared, act, nodes=jobs)
    assert kept == [["01"], [], ["01"], []]


def test_what_a_detached_actor_was_given_outlives_the_job_that_made_it(shared: Settings) -> None:
    nodes = Jobs("01")

    async def act(manager: EnvManager) -> Any:
        made = await created(manager, "detached", "six==1.10.0")
        told = await manager.get_environment(variant_id="detached", job_id="01")
        await manager.delete_env(variant_id="detached", force=True)
        nodes.given = [json.dumps(told["runtime_env"])]
        nodes.jobs.clear()
        during = await manager.cleanup(idle_hours=0, dry_run=True)
        nodes.given = []
        after = await manager.cleanup(idle_hours=0, dry_run=True)
        return made["key"], during, after

    key, during, after = managed(shared, act, nodes=nodes)
    assert {row["key"]: row["because"] for row in during["kept"]}[key] == "leased to job 01"
    assert key in {row["key"] for row in after["deleted"]}


def test_a_variant_that_somebody_else_was_promised_is_not_deleted_without_force(
    shared: Settings, child: Any
) -> None:
    nodes = Jobs("01", "02")

    async def act(manager: EnvManager) -> Any:
        key = (await created(manager, "used", "six==1.10.0"))["key"]
        await manager.get_environment(variant_id="used", job_id="01")
        own = await manager.delete_env(variant_id="used", job_id="01", dry_run=True)
        await manager.get_environment(variant_id="used", job_id="02")
        worker: Child = await asyncio.to_thread(child, Store(shared).python(key))
        rows = await rows_of(manager, "used")
        with pytest.raises(EnvironmentInUse, match="variant used is in use") as caught:
            await manager.delete_env(variant_id="used", job_id="01")
        with pytest.raises(EnvironmentInUse):
            await manager.delete_env(variant_id="used", job_id="01", dry_run=True)
        assert await rows_of(manager, "used") == rows
        explained = await manager.explain(variant_id="used")
        status = await manager.get_env_status(variant_id="used")
        forced = await manager.delete_env(variant_id="used", force=True)
        return key, own, worker, caught.value, explained, status, forced

    key, own, worker, error, explained, status, forced = managed(shared, act, nodes=nodes)
    assert own["would_delete"] is True
    process, promise = error.detail.splitlines()
    assert process.startswith(f"process {worker.process.pid} on node local (")
    assert process.endswith(f"runs in {key[:12]}")
    assert promise == f"job 02 was promised {key[:12]}"
    assert (error.variant_id, "--force" in error.hint) == ("used", True)
    assert explained["leases"] == ["01", "02"]
    assert [user.split()[:2] for user in explained["users"]] == [
        ["process", str(worker.process.pid)], ["job", "01"], ["job", "02"],
    ]  # fmt: skip
    assert (status["status"], forced["deleted"]) == ("ACTIVE", True)
    assert worker.process.poll() is None
    assert key in Store(shared).records()  # what he runs in stays
    worker.end()


def test_a_variant_whose_environment_another_one_shares_can_be_deleted_while_it_is_used(
    shared: Settings,
) -> None:
    async def act(manager: EnvManager) -> Any:
        for name in ("twin", "other-twin"):
            await created(manager, name, "six==1.10.0")
        await manager.get_environment(variant_id="twin", job_id="01")
        return await manager.delete_env(variant_id="other-twin")

    assert managed(shared, act, nodes=Jobs("01"))["deleted"] is True


def test_a_status_is_no_use_and_promises_nothing(shared: Settings) -> None:
    async def act(manager: EnvManager) -> Any:
        key = (await created(manager, "looked-at", "six==1.10.0"))["key"]
        hold = Store(shared).folder / f"{key}.hold"
        before = hold.stat().st_mtime_ns
        await manager.get_env_status(variant_id="looked-at")
        await manager.list_envs()
        await manager.explain(variant_id="looked-at")
        await manager.get_environment(variant_id="looked-at")
        return before == hold.stat().st_mtime_ns, (await manager.explain(variant_id="looked-at"))

    is_untouched, explained = managed(shared, act, nodes=Jobs())
    assert is_untouched
    assert explained["leases"] == []


def test_promises_that_cannot_be_read_keep_everything(shared: Settings) -> None:
    """Doubt keeps: nobody knows what was promised."""

    async def act(manager: EnvManager) -> Any:
        key = (await created(manager, "doubt", "six==1.10.0"))["key"]
        await manager.delete_env(variant_id="doubt")
        return key

    key = managed(shared, act, nodes=Jobs())
    path = shared.root / "leases.json"
    path.write_text("{")
    try:
        with pytest.raises(StorageFailed, match="damaged"):
            managed(shared, lambda manager: manager.cleanup(idle_hours=0), nodes=Jobs())
    finally:
        path.unlink()
    assert key in Store(shared).records()
