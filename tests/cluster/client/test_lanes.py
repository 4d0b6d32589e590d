"""Short items of a variant share Ray tasks: each still ends once, for itself, and rightly so."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envs import ItemResult, RayBatchRunner, RayEnvironmentProvider
from ray_envs.client.dispatch import Dispatcher
from ray_envs.client.items import Item

OLD, NEW = "kept/old-six", "kept/new-six"
MANY = 200


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[list[Item]]:
    """The items of each lane that was started."""
    started: list[list[Item]] = []
    launch = Dispatcher.launch

    def noted(dispatcher: Dispatcher, items: list[Item]) -> bool:
        started.append(list(items))
        return launch(dispatcher, items)

    monkeypatch.setattr(Dispatcher, "launch", noted)
    return started


def run(
    cluster: RayEnvironmentProvider, function: Any, cases: Any, **more: Any
) -> list[ItemResult]:
    given = {"variants": [OLD], "cases": cases, **more}
    return list(RayBatchRunner(cluster).run(function, **given))


def six(number: int) -> tuple[int, str]:
    import six  # type: ignore[import-untyped, unused-ignore]

    return number, six.__version__


@pytest.mark.timeout(120)
def test_short_items_share_tasks_and_run_once_in_their_own_environment(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]]
) -> None:
    results = run(cluster, six, ([n] for n in range(MANY)), variants=[OLD, NEW])
    assert Counter((r.variant_id, r.case_id) for r in results) == Counter(
        itertools.product((OLD, NEW), (f"case-{n}" for n in range(MANY)))
    )
    for result in results:
        version = {OLD: "1.16.0", NEW: "1.17.0"}[result.variant_id]
        assert (result.ok, result.value, result.attempts) == (
            True, (int(result.case_id.split("-")[1]), version), 1,
        )  # fmt: skip
        assert result.node_id
        assert result.started_at
    assert len(lanes) < MANY  # of 2 × MANY items
    assert {len({item.variant_id for item in lane}) for lane in lanes} == {1}


@pytest.mark.timeout(120)
def test_an_item_that_ends_its_worker_costs_the_others_of_its_lane_no_attempt(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]], tmp_path: Path
) -> None:
    def die(number: int, folder: str) -> int:
        import os
        import pathlib

        if number == 60:
            with (pathlib.Path(folder) / "died").open("a") as file:
                file.write("x")
            os._exit(1)
        return number

    results = run(cluster, die, [[n, str(tmp_path)] for n in range(MANY)], retries=1)
    assert Counter(r.case_id for r in results) == Counter(f"case-{n}" for n in range(MANY))
    (dead,) = (r for r in results if not r.ok)
    assert (dead.case_id, dead.attempts) == ("case-60", 2)
    # Once more if the worker's last words were lost, and nobody knew which item it was.
    assert (tmp_path / "died").read_text() in ("xx", "xxx")
    assert {r.attempts for r in results if r.ok} == {1}
    assert max(map(len, lanes)) > 1


@pytest.mark.timeout(120)
def test_a_time_out_ends_one_item_and_the_others_of_its_lane_run(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]]
) -> None:
    def linger(number: int) -> int:
        import time

        if number == 60:
            time.sleep(600)
        return number

    results = run(cluster, linger, [[n] for n in range(MANY)], timeout_s=4)
    assert Counter(r.case_id for r in results) == Counter(f"case-{n}" for n in range(MANY))
    (late,) = (r for r in results if not r.ok)
    assert late.error is not None
    assert (late.case_id, late.error.type, late.attempts) == ("case-60", "ItemTimeout", 1)
    assert max(map(len, lanes)) > 1


@pytest.mark.timeout(120)
def test_values_of_every_kind_come_back_from_a_lane(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]]
) -> None:
    def kind(number: int) -> Any:
        if number % 5 == 1:
            return {"list": [number, (1, 2)]}
        if number % 5 == 2:
            return b"x" * 300_000  # Ray sends it through its store
        if number % 5 == 3:
            raise ValueError(f"no {number}")
        return None if number % 5 == 4 else number

    results = {r.case_id: r for r in run(cluster, kind, [[n] for n in range(100)])}
    assert len(results) == 100
    for number in range(100):
        result = results[f"case-{number}"]
        if number % 5 == 3:
            assert result.error is not None
            assert (result.error.type, result.error.message) == ("ValueError", f"no {number}")
        else:
            assert (result.ok, result.value) == (True, kind(number))
    assert max(map(len, lanes)) > 1


@pytest.mark.timeout(120)
def test_a_generator_is_read_only_as_far_as_items_start(cluster: RayEnvironmentProvider) -> None:
    read = itertools.count()

    def endless() -> Iterator[list[int]]:
        for _ in itertools.count():
            yield [next(read)]

    runner = RayBatchRunner(cluster, max_pending=20)
    results = runner.run(abs, variants=[OLD], cases=endless())
    ended = list(itertools.islice(results, 150))
    assert all(r.ok for r in ended)
    assert runner.progress().in_progress <= 20
    assert 150 <= next(read) <= 180
    runner.cancel()
    assert len(list(results)) <= 20  # those that had ended


@pytest.mark.timeout(120)
def test_items_that_take_long_have_a_task_each(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]]
) -> None:
    run(cluster, time.sleep, [[0.3]] * 8)
    assert [len(lane) for lane in lanes] == [1] * 8


@pytest.mark.timeout(120)
def test_items_that_turn_out_to_be_long_do_not_wait_behind_each_other(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]]
) -> None:
    """Ten of one lane at 1 s each would wait for 10 s in all, beside workers that are idle."""

    def at_first_short(number: int) -> float:
        import time

        began = time.time()
        time.sleep(0 if number < 100 else 1)
        return began

    results = run(cluster, at_first_short, [[n] for n in range(108)])
    assert all((r.ok, r.attempts) == (True, 1) for r in results)
    assert len({r.case_id for r in results}) == 108
    assert max(map(len, lanes)) > 1
    long = sorted(r.value for r in results if r.duration_s > 0.9)
    assert len(long) == 8
    assert long[-1] - long[0] < 6.5


@pytest.mark.timeout(120)
def test_without_retries_no_item_runs_twice(
    cluster: RayEnvironmentProvider, lanes: list[list[Item]], tmp_path: Path
) -> None:
    def once(number: int, folder: str) -> int:
        import os
        import pathlib

        with (pathlib.Path(folder) / str(number)).open("x"):
            pass
        if number % 20 == 19:
            os._exit(1)
        return number

    results = run(cluster, once, [[n, str(tmp_path)] for n in range(60)], retries=0)
    failed = {r.case_id: r.error.type for r in results if r.error is not None}
    assert set(failed) == {"case-19", "case-39", "case-59"}
    assert set(failed.values()) <= {"WorkerCrashedError", "WorkerLost"}
    assert {len(lane) for lane in lanes} == {1}
