"""What one item leaves behind, with each isolation of items."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ray_envs import ItemResult, RayBatchRunner, RayEnvironmentProvider
from tests.cluster.conftest import wait_until

OLD = "kept/old-six"
pytestmark = pytest.mark.timeout(120)


def run(
    cluster: RayEnvironmentProvider, function: Any, numbers: range, isolation: str, **more: Any
) -> dict[int, ItemResult]:
    given = {"variants": [OLD], "cases": [[n] for n in numbers], "isolation": isolation, **more}
    results = list(RayBatchRunner(cluster).run(function, **given))
    assert Counter(r.case_id for r in results) == Counter(f"case-{n}" for n in numbers)
    return {int(r.case_id.split("-")[1]): r for r in results}


def spoil(number: int) -> tuple[int, str, bool]:
    import os
    import sys

    import six  # type: ignore[import-untyped, unused-ignore]

    seen = hasattr(six, "spoilt")
    six.spoilt = True
    sys.modules["zz_left"] = six
    return os.getpid(), six.__version__, seen


@pytest.mark.parametrize("isolation", ["process", "fresh"])
def test_an_item_meets_nothing_of_those_before_it(
    cluster: RayEnvironmentProvider, isolation: str
) -> None:
    results = run(cluster, spoil, range(6), isolation)
    assert all(r.ok for r in results.values()), results
    values = [r.value for r in results.values()]
    assert {(version, seen) for _, version, seen in values} == {("1.16.0", False)}
    assert len({pid for pid, _, _ in values}) == 6


def test_a_child_process_that_crashes_or_is_late_hits_one_item(
    cluster: RayEnvironmentProvider,
) -> None:
    def vandal(number: int) -> tuple[int, int]:
        import ctypes
        import os
        import sys
        import time

        if number == 50:
            os._exit(7)
        if number == 60:
            ctypes.string_at(0)
        if number == 70:
            time.sleep(600)
        if number == 80:
            sys.exit("enough")
        return os.getppid(), number

    results = run(cluster, vandal, range(100), "process", timeout_s=3, retries=1)
    failed = {n: (r.error.type, r.attempts) for n, r in results.items() if r.error is not None}
    assert failed == {
        50: ("ProcessCrashed", 2),
        60: ("ProcessCrashed", 2),
        70: ("ItemTimeout", 1),
        80: ("SystemExit", 1),
    }
    assert "exit code 7" in str(results[50].error)
    assert "SIGSEGV" in str(results[60].error)
    assert {r.attempts for r in results.values() if r.ok} == {1}
    workers = {r.value[0] for r in results.values() if r.ok}
    assert len(workers) <= ray_cpus()


def ray_cpus() -> int:
    import ray

    return int(ray.cluster_resources()["CPU"])


def test_values_come_out_of_a_child_process_and_errors_too(cluster: RayEnvironmentProvider) -> None:
    def kind(number: int) -> Any:
        import fractions

        if number == 1:
            return fractions.Fraction(1, 3)
        if number == 2:
            return b"x" * 3_000_000
        if number == 3:
            raise KeyError("three")
        if number == 4:
            import six

            return six.Iterator()
        if number == 5:
            return lambda: 5
        return number

    results = run(cluster, kind, range(6), "process")
    import fractions

    assert results[0].value == 0
    assert results[1].value == fractions.Fraction(1, 3)
    assert results[2].value == b"x" * 3_000_000
    assert results[3].error is not None
    assert results[3].error.type == "KeyError"
    assert results[5].value() == 5


def test_ray_fails_at_once_in_a_child_process(cluster: RayEnvironmentProvider) -> None:
    def use_ray(number: int) -> Any:
        import ray

        return ray.get(ray.put(number))

    (result,) = run(cluster, use_ray, range(1), "process", timeout_s=30).values()
    assert result.error is not None
    assert "started" in result.error.message
    assert result.duration_s < 10


def test_cancelling_ends_a_child_process_and_what_it_has_started(
    cluster: RayEnvironmentProvider, tmp_path: Path, processes: Any
) -> None:
    def start(_: int, folder: str) -> None:
        import os
        import pathlib
        import subprocess
        import sys
        import time

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (pathlib.Path(folder) / f"{os.getpid()}-{child.pid}").touch()
        time.sleep(600)

    runner = RayBatchRunner(cluster)
    cases = [[0, str(tmp_path)]]
    results = runner.run(start, variants=[OLD], cases=cases, isolation="process")
    thread = threading.Thread(target=lambda: list(results))
    thread.start()
    wait_until(lambda: any(tmp_path.iterdir()), "the start of the item")
    (told,) = tmp_path.iterdir()
    for pid in told.name.split("-"):
        processes.must_end(int(pid))
    runner.cancel()
    thread.join(30)
    assert not thread.is_alive()
