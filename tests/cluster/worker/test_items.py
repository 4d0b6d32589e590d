"""Items that share a worker: what one of them changes does not reach the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ray_envs import EnvSpec, ItemResult, RayBatchRunner, RayEnvironmentProvider

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def variant(cluster: RayEnvironmentProvider) -> Iterator[str]:
    """A variant whose workers no other test has."""
    cluster.create("spoilt", EnvSpec(packages=("six==1.13.0",)))
    cluster.prepare("spoilt")
    yield "spoilt"
    cluster.delete("spoilt", force=True)


def results_of(
    cluster: RayEnvironmentProvider, variant: str, function: Any, cases: list[Any]
) -> list[ItemResult]:
    runner = RayBatchRunner(cluster, max_pending=1)
    return list(runner.run(function, variants=[variant], cases=cases, retries=0))


def chroot(folder: str) -> None:
    import os

    os.chroot(folder)


def other_prefix(_folder: str) -> None:
    import sys

    sys.prefix = "/nowhere"


def no_modules(_folder: str) -> None:
    import sys

    sys.modules.pop("ray")


def no_getcwd(_folder: str) -> None:
    import os

    del os.getcwd


def no_sleep(_folder: str) -> None:
    import time

    time.monotonic = None  # type: ignore[assignment]


def other_user(_folder: str) -> None:
    import os

    os.seteuid(65534)


def closed_streams(_folder: str) -> None:
    import sys

    sys.stdout.close()


def spoil_later(_folder: str) -> None:
    import sys
    import threading

    threading.Timer(0.1, lambda: setattr(sys, "prefix", "/nowhere")).start()


@pytest.mark.parametrize(
    "spoil",
    [
        chroot, other_prefix, no_modules, no_getcwd, no_sleep, other_user, closed_streams,
        spoil_later,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_a_worker_that_an_item_has_spoilt_ends_and_costs_the_others_no_retry(
    cluster: RayEnvironmentProvider, variant: str, tmp_path: Any, spoil: Callable[[str], None]
) -> None:
    def work(number: int, folder: str) -> int:
        import os
        import time

        time.sleep(0.2)
        pid = os.getpid()
        if number in (1, 3):
            spoil(folder)
        return pid

    cases = [[number, str(tmp_path)] for number in range(6)]
    results = results_of(cluster, variant, work, cases)
    errors = {int(result.case_id.removeprefix("case-")): result.error for result in results}
    assert {n: errors[n] for n in (0, 2, 4, 5)} == dict.fromkeys((0, 2, 4, 5))
    pids = {result.value for result in results if result.ok}
    assert len(pids) >= 3 - 2 * (errors[1] is not None)  # a new worker after each spoilt one


def test_what_an_item_changes_in_its_process_is_restored_for_the_next(
    cluster: RayEnvironmentProvider, variant: str
) -> None:
    def change_and_tell() -> tuple[int, str]:
        import builtins
        import json
        import os
        import signal
        import sys

        umask = os.umask(0o22)
        os.umask(umask)
        found = {
            "cwd": os.getcwd(),
            "umask": umask,
            "variables": sorted(name for name in os.environ if name.startswith(("LEFT", "HOME"))),
            "home": os.environ["HOME"],
            "path": sys.path,
            "limit": sys.getrecursionlimit(),
            "handler": str(signal.getsignal(signal.SIGUSR1)),
            "len": len.__module__,
            "stdout": type(sys.stdout).__name__,
            "timer": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        }
        os.chdir("/")
        os.umask(0o777)
        os.environ["LEFT_BEHIND"] = "1"
        os.environ["HOME"] = "/nowhere"
        sys.path.insert(0, "/nowhere")
        sys.setrecursionlimit(77_777)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 3600)
        text = json.dumps(found)
        builtins.len = lambda _thing: 7
        sys.stdout = None
        return os.getpid(), text

    results = results_of(cluster, variant, change_and_tell, [[]] * 6)
    assert [result.error for result in results] == [None] * 6
    told = [json.loads(text) for _, text in (result.value for result in results)]
    assert len({pid for pid, _ in (result.value for result in results)}) < 6  # some met another
    assert [each for each in told if each != told[0]] == []
    assert told[0]["variables"] == ["HOME"]


def test_what_a_module_sets_when_it_is_imported_stays_as_the_module_does(
    cluster: RayEnvironmentProvider, variant: str, tmp_path: Any
) -> None:
    (tmp_path / "sets.py").write_text(
        "import os\nos.environ['SET_BY_IMPORT'] = '1'\n"
        "def told():\n    return [os.getpid(), os.environ.get('SET_BY_IMPORT')]\n"
    )
    runner = RayBatchRunner(cluster, max_pending=1)
    results = list(runner.run("sets:told", variants=[variant], cases=[[]] * 4, code=tmp_path))
    assert [result.value[1] for result in results] == ["1"] * 4
    assert len({result.value[0] for result in results}) < 4


def test_an_interrupt_that_an_item_raises_is_its_own_error(
    cluster: RayEnvironmentProvider, variant: str
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt("stop here")

    (result,) = results_of(cluster, variant, stop, [[]])
    assert result.error is not None
    assert (result.error.type, result.error.message) == ("KeyboardInterrupt", "stop here")


def test_a_value_whose_class_the_driver_lacks_is_named_and_told_as_text(
    cluster: RayEnvironmentProvider, variant: str, tmp_path: Any
) -> None:
    (tmp_path / "zz_only_there.py").write_text(
        "class Box:\n    def __repr__(self): return 'Box of 7'\n"
    )

    def give(folder: str) -> Any:
        import sys

        sys.path.insert(0, folder)
        import zz_only_there  # type: ignore[import-not-found]

        return zz_only_there.Box()

    (result,) = results_of(cluster, variant, give, [[str(tmp_path)]])
    assert result.error is not None
    assert result.error.type == "UnreadableValue"
    assert "No module named 'zz_only_there'" in result.error.message
    assert "Box of 7" in result.error.message
    assert result.duration_s > 0
