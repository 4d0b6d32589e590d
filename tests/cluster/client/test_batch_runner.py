"""Many items over many variants on a real Ray: each runs where it was promised to, or says why not.

Payloads are defined inside the tests or in modules made by them: what they need has to come by
value or from the environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import ray

from ray_envs import (
    BatchSpec,
    BatchState,
    CaseSpec,
    EnvSpec,
    InMemoryEnvironmentProvider,
    ItemResult,
    RayBatchRunner,
    RayEnvironmentProvider,
    Settings,
    worker,
)
from ray_envs.client import item_queue, scheduling
from ray_envs.client import runner as runner_module
from ray_envs.client.items import Item
from ray_envs.cluster.actors import create_manager, end_manager
from ray_envs.errors import InvalidInput, ManagerUnavailable, NotFound, ResolutionFailed
from ray_envs.manager.manager import EnvManager
from ray_envs.worker import item as worker_item

pytestmark = pytest.mark.timeout(90)

OLD, NEW, TABLES = "kept/old-six", "kept/new-six", "kept/tables"


@pytest.fixture
def runner(cluster: RayEnvironmentProvider) -> RayBatchRunner:
    return RayBatchRunner(cluster)


def one(results: Iterator[ItemResult]) -> ItemResult:
    found = list(results)
    assert len(found) == 1
    return found[0]


def wait_until(holds: Callable[[], bool], what: str, *, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:g} s: {what}")
        time.sleep(0.02)


def pids_in(folder: Path) -> list[int]:
    """The processes that payloads reported by a file each, in the order of their start."""
    return [int(path.name) for path in sorted(folder.iterdir(), key=os.path.getmtime)]


def sleep_and_tell(folder: str, seconds: float) -> int:
    import os
    import pathlib
    import time

    pathlib.Path(folder, str(os.getpid())).touch()
    time.sleep(seconds)
    return os.getpid()


@pytest.fixture
def pids(tmp_path: Path, processes: Any) -> Iterator[Path]:
    """A folder where payloads report their pid: those processes must have ended with the test."""
    folder = tmp_path / "pids"
    folder.mkdir()
    yield folder
    for pid in pids_in(folder):
        processes.must_end(pid)


# -- the right place -------------------------------------------------------------------------------


def test_every_item_runs_in_its_own_environment_and_says_so(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner
) -> None:
    def look(word: str) -> tuple[str, str, str, bool]:
        import importlib.util
        import sys

        import six  # type: ignore[import-untyped]

        return word, sys.prefix, six.__version__, importlib.util.find_spec("pydantic") is not None

    results = {
        (r.variant_id, r.case_id): r
        for r in runner.run(look, variants=[OLD, NEW], cases=[["a"], {"word": "b"}])
    }
    assert set(results) == {(v, c) for v in (OLD, NEW) for c in ("case-0", "case-1")}
    for (variant_id, case_id), result in results.items():
        environment = cluster.environment(variant_id)
        assert result.ok, result.error
        assert result.value == (
            {"case-0": "a", "case-1": "b"}[case_id],
            environment["venv_path"],
            {OLD: "1.16.0", NEW: "1.17.0"}[variant_id],
            False,
        )
        assert (result.key, result.lock_sha256) == (environment["key"], environment["lock_sha256"])
        assert (result.python, result.ray) == (environment["python_version"], ray.__version__)
        assert result.node_id == ray.get_runtime_context().get_node_id()
        assert result.attempts == 1
        assert result.started_at is not None
        assert abs(time.time() - result.started_at.timestamp()) < 60
        assert 0 <= result.duration_s < 60
    assert runner.status() is BatchState.COMPLETED
    progress = runner.progress()
    assert (progress.total, progress.completed, progress.failed, progress.in_progress) == (
        4,
        4,
        0,
        0,
    )


def test_variants_with_equal_requirements_share_environment_and_warm_worker(
    cluster: RayEnvironmentProvider,
) -> None:
    def who() -> int:
        import os

        return os.getpid()

    for name in ("twins/one", "twins/two"):  # no other test has workers with this one
        cluster.create(name, EnvSpec(packages=("six==1.14.0",)))
    try:
        # A busy machine may take Ray so long that it starts another worker: not each time.
        for _ in range(10):
            runner = RayBatchRunner(cluster, max_pending=1)
            results = list(runner.run(who, variants=["twins/one", "twins/two"], cases=[[]]))
            assert [r.variant_id for r in results] == ["twins/one", "twins/two"]
            assert results[0].key == results[1].key
            if results[0].value == results[1].value:
                return
        pytest.fail("no worker has run an item of the other variant")
    finally:
        for name in ("twins/one", "twins/two"):
            cluster.delete(name, force=True)


def test_a_ray_remote_function_and_an_entrypoint_run_too(runner: RayBatchRunner) -> None:
    @ray.remote
    def double(x: int) -> int:
        return 2 * x

    assert one(runner.run(double, variants=[OLD], cases=[[21]])).value == 42
    joined = one(runner.run("os.path:join", variants=[OLD], cases=[["a", "b"]]))
    assert joined.value == "a/b"


def test_an_actor_with_options_lives_in_the_environment(cluster: RayEnvironmentProvider) -> None:
    @ray.remote
    class Where:
        def look(self) -> tuple[str, str, str]:
            import os
            import shutil
            import sys

            return sys.prefix, os.environ["VIRTUAL_ENV"], str(shutil.which("python"))

    actor = Where.options(**cluster.options(OLD, num_cpus=0)).remote()  # type: ignore[attr-defined]
    venv = cluster.environment(OLD)["venv_path"]
    assert ray.get(actor.look.remote(), timeout=60) == (venv, venv, f"{venv}/bin/python")
    ray.kill(actor)


# -- what a payload does wrong ---------------------------------------------------------------------


def test_a_payload_that_raises_is_a_result_with_its_own_frames_only(runner: RayBatchRunner) -> None:
    def fail(x: int) -> None:
        def deeper() -> None:
            raise KeyError("nothing here")

        if x:
            deeper()

    results = {r.case_id: r for r in runner.run(fail, variants=[OLD], cases=[[0], [1]])}
    assert results["case-0"].ok
    failed = results["case-1"]
    assert failed.error is not None
    assert (failed.error.type, failed.error.message) == ("KeyError", "'nothing here'")
    assert failed.error.traceback.startswith("Traceback (most recent call last):\n")
    assert "in deeper" in failed.error.traceback
    assert "/ray_envs/worker/" not in failed.error.traceback
    assert failed.error.traceback.rstrip().endswith("KeyError: 'nothing here'")
    assert (failed.ok, failed.value, failed.attempts) == (False, None, 1)
    assert runner.status() is BatchState.COMPLETED


def test_a_batch_of_which_everything_failed_has_failed(runner: RayBatchRunner) -> None:
    def fail() -> None:
        raise ValueError("always")

    assert not one(runner.run(fail, variants=[OLD], cases=[[]])).ok
    assert runner.status() is BatchState.FAILED


def test_what_only_the_environment_can_unpickle_stays_there(runner: RayBatchRunner) -> None:
    """An exception class that the driver lacks is a result like any other."""

    def fail() -> None:
        class OnlyHere(Exception):
            def __reduce__(self) -> Any:
                raise RuntimeError("cannot be pickled")

        raise OnlyHere("said so")

    result = one(runner.run(fail, variants=[OLD], cases=[[]]))
    assert result.error is not None
    assert result.error.type.endswith("OnlyHere")
    assert result.error.message == "said so"


@pytest.mark.parametrize("how", ["exit", "interrupt", "unprintable"])
def test_a_payload_cannot_end_the_batch(runner: RayBatchRunner, how: str) -> None:
    def leave(how: str) -> None:
        import sys

        if how == "exit":
            sys.exit(3)
        if how == "interrupt":
            raise KeyboardInterrupt

        class Unprintable(Exception):
            def __str__(self) -> str:
                raise ValueError("no words")

        raise Unprintable

    result = one(runner.run(leave, variants=[OLD], cases=[[how]], retries=0))
    assert not result.ok
    assert result.error is not None
    words = {
        "exit": ("SystemExit",),
        "interrupt": ("KeyboardInterrupt", "TaskCancelledError"),  # Ray takes it for a cancel
        "unprintable": ("Unprintable",),
    }
    assert result.error.type.endswith(words[how]), result.error
    if how == "exit":
        assert result.error.message == "3"


def test_a_value_that_cannot_be_pickled_is_a_clear_failure(runner: RayBatchRunner) -> None:
    def unpicklable() -> Any:
        import threading

        return threading.Lock()

    result = one(runner.run(unpicklable, variants=[OLD], cases=[[]]))
    assert not result.ok
    assert result.error is not None
    assert "pickle" in result.error.message
    assert result.attempts == 1


def test_a_wrong_number_of_arguments_names_the_signature(runner: RayBatchRunner) -> None:
    def takes_two(left: int, right: int) -> int:
        return left + right

    result = one(runner.run(takes_two, variants=[OLD], cases=[{"left": 1, "rigth": 2}]))
    assert result.error is not None
    assert result.error.type == "TypeError"
    assert "takes_two(left" in result.error.message


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A code folder with an entrypoint that returns what it is told to."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "neighbour.py").write_text("WORD = 'from next door'\n")
    (folder / "work.py").write_text(
        textwrap.dedent(
            """
            import neighbour

            VALUES = {
                "neighbour": neighbour.WORD,
                "set": {1, 2},
                "bytes": b"x",
                "nan": float("nan"),
                "tuple": (1, 2),
                "none": None,
                "keys": {1: "one"},
            }
            NOT_A_FUNCTION = 3

            def give(name):
                return VALUES[name]

            def circle():
                values = []
                values.append(values)
                return values
            """
        )
    )
    (folder / "broken.py").write_text("def f(): pass\nraise RuntimeError('broken at import')\n")
    return folder


def test_an_entrypoint_imports_its_neighbours_and_returns_json(
    runner: RayBatchRunner, code: Path
) -> None:
    names = ["neighbour", "tuple", "none", "keys", "set", "bytes", "nan"]
    results = runner.run("work:give", variants=[TABLES], cases=[[n] for n in names], code=code)
    by_name = dict(zip(names, sorted(results, key=lambda r: r.case_id), strict=True))
    assert {n: r.value for n, r in by_name.items() if r.ok} == {
        "neighbour": "from next door",
        "tuple": [1, 2],
        "none": None,
        "keys": {"1": "one"},
    }
    for name in ("set", "bytes", "nan"):
        error = by_name[name].error
        assert error is not None
        assert error.type == "TypeError"
        assert error.message.startswith("the value is not JSON")
    circle = one(runner.run("work:circle", variants=[TABLES], cases=[[]], code=code))
    assert circle.error is not None
    assert "not JSON" in circle.error.message


@pytest.mark.parametrize(
    ("entrypoint", "kind", "words"),
    [
        ("nowhere:f", "ModuleNotFoundError", "nowhere"),
        ("work:nothing", "AttributeError", "no function 'nothing'"),
        ("work:NOT_A_FUNCTION", "TypeError", "is not a function"),
        ("broken:f", "RuntimeError", "broken at import"),
    ],
)
def test_an_entrypoint_that_cannot_be_called_fails_its_items(
    runner: RayBatchRunner, code: Path, entrypoint: str, kind: str, words: str
) -> None:
    result = one(runner.run(entrypoint, variants=[TABLES], cases=[[]], code=code))
    assert result.error is not None
    assert (result.error.type, result.attempts) == (kind, 1)
    assert words in result.error.message
    assert "/ray_envs/worker/" not in result.error.traceback


def test_a_code_module_that_the_environment_has_too_is_refused(
    runner: RayBatchRunner, code: Path
) -> None:
    (code / "six.py").write_text("def f(): return 'mine'\n")
    result = one(runner.run("six:f", variants=[OLD], cases=[[]], code=code))
    assert result.error is not None
    assert result.error.type == "ImportError"
    assert "both have a module 'six'" in result.error.message
    assert result.shadowed == ("six",)
    fine = one(runner.run("work:give", variants=[OLD], cases=[["none"]], code=code))
    assert fine.ok
    assert "six" in fine.shadowed


def test_changed_code_is_run_and_old_code_is_forgotten(
    cluster: RayEnvironmentProvider, code: Path
) -> None:
    """The worker stays warm from one batch to the next; what it imported must not."""
    seen = []
    for word in ("one", "two"):
        (code / "neighbour.py").write_text(f"WORD = {word!r}\n")
        result = one(
            RayBatchRunner(cluster).run(
                "work:give", variants=[TABLES], cases=[["neighbour"]], code=code
            )
        )
        seen.append(result.value)
    assert seen == ["one", "two"]
    without = one(
        RayBatchRunner(cluster).run("work:give", variants=[TABLES], cases=[["neighbour"]])
    )
    assert without.error is not None
    assert without.error.type == "ModuleNotFoundError"


def test_a_function_of_a_local_module_goes_by_value(
    runner: RayBatchRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "only_here"
    package.mkdir()
    (package / "__init__.py").write_text("FACTOR = 3\n")
    (package / "maths.py").write_text("def triple(x):\n    return x * 3\n")
    (package / "work.py").write_text(
        "from only_here.maths import triple\n\ndef run(x):\n    return triple(x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from only_here.work import run  # type: ignore[import-not-found]

    try:
        result = one(runner.run(run, variants=[OLD], cases=[[2]]))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "only_here"]:
            del sys.modules[name]
    assert result.ok, result.error
    assert result.value == 6
    assert "only_here" not in ray.cloudpickle.list_registry_pickle_by_value()


def test_a_module_in_the_drivers_folder_does_not_win_and_is_named(runner: RayBatchRunner) -> None:
    """The driver stood in a folder with a `tabulate.py` when Ray began (see `conftest`)."""

    def version() -> str:
        import tabulate  # type: ignore[import-untyped]

        return str(tabulate.__version__)

    result = one(runner.run(version, variants=[TABLES], cases=[[]]))
    assert result.ok, result.error
    assert result.value == "0.9.0"
    assert result.shadowed == ("tabulate",)
    assert one(runner.run("os:getpid", variants=[OLD], cases=[[]])).shadowed == ()


# -- variants that cannot run ----------------------------------------------------------------------


def test_a_variant_that_cannot_be_resolved_fails_its_items_while_others_run(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner
) -> None:
    spec = BatchSpec.model_validate(
        {
            "name": "mixed",
            "entrypoint": "os.path:basename",
            "variants": [
                {"id": "good", "packages": ["six==1.16.0"]},
                {"id": "bad", "packages": ["six==99"]},
            ],
            "cases": [{"id": "one", "args": ["a/b"]}, {"id": "two", "args": ["c/d"]}],
        }
    )
    failed = {}
    for variant in spec.variants:
        try:
            cluster.create(f"mixed/{variant.id}", variant.env_spec())
        except ResolutionFailed as exc:
            failed[variant.id] = exc
    assert set(failed) == {"bad"}
    results = {(r.variant_id, r.case_id): r for r in runner.run_batch(spec, failed=failed)}
    assert results["good", "one"].value == "b"
    assert results["good", "two"].value == "d"
    for case_id in ("one", "two"):
        error = results["bad", case_id].error
        assert error is not None
        assert error.type == "ResolutionFailed"
        assert "six==99" in error.message
        assert results["bad", case_id].attempts == 0
    assert runner.status() is BatchState.COMPLETED
    cluster.delete("mixed/good", force=True)


def test_what_was_done_under_the_same_key_is_not_repeated(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner, tmp_path: Path, code: Path
) -> None:
    count = tmp_path / "count"
    (code / "counting.py").write_text(
        f"def f(x):\n    open({str(count)!r}, 'a').write('x')\n    return x\n"
    )
    spec = BatchSpec.model_validate(
        {
            "name": "again",
            "entrypoint": "counting:f",
            "variants": [{"id": "v"}],
            "cases": [{"id": "one", "args": [1]}, {"id": "two", "args": [2]}],
        }
    )
    cluster.create("again/v", EnvSpec(packages=("six==1.16.0",)))
    first = list(runner.run_batch(spec, code=code))
    assert all(r.ok for r in first)
    done = [ItemResult.model_validate_json(r.model_dump_json()) for r in first if r.value == 1]
    second = {r.case_id: r for r in runner.run_batch(spec, code=code, done=done)}
    assert second["one"] == done[0]
    assert second["two"].ok
    assert count.read_text() == "xxx"
    cluster.delete("again/v", force=True)


def test_a_variant_that_nobody_defined_fails_its_items(runner: RayBatchRunner) -> None:
    results = {
        r.variant_id: r for r in runner.run("os:getpid", variants=["nobody", OLD], cases=[[]])
    }
    assert results[OLD].ok
    error = results["nobody"].error
    assert error is not None
    assert error.type == NotFound.__name__
    assert "nobody" in error.message


def test_resources_that_no_node_has_are_a_result_and_no_wait(runner: RayBatchRunner) -> None:
    started = time.monotonic()
    results = list(runner.run("os:getpid", variants=[OLD], cases=[[], []], num_gpus=1000))
    assert [r.error.type if r.error else None for r in results] == ["NoEligibleNode"] * 2
    assert results[0].error is not None
    assert "1000 GPU" in results[0].error.message
    assert [r.attempts for r in results] == [0, 0]
    assert runner.status() is BatchState.FAILED
    assert time.monotonic() - started < 30


def test_items_that_no_node_can_run_do_not_hold_the_others_up(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner, code: Path, tmp_path: Path
) -> None:
    """Two small items wait for each other: they must be let in together."""
    (code / "meeting.py").write_text(
        "import os, time\n"
        "def f(folder, mine, others):\n"
        "    open(os.path.join(folder, mine), 'w').close()\n"
        "    end = time.monotonic() + 15\n"
        "    while not os.path.exists(os.path.join(folder, others)):\n"
        "        if time.monotonic() > end: raise TimeoutError('alone')\n"
        "        time.sleep(0.02)\n"
    )
    spec = BatchSpec.model_validate(
        {
            "name": "uneven",
            "entrypoint": "meeting:f",
            "variants": [{"id": "huge", "num_gpus": 1000}, {"id": "small"}],
            "cases": [
                {"id": "a", "args": [str(tmp_path), "a", "b"]},
                {"id": "b", "args": [str(tmp_path), "b", "a"]},
            ],
        }
    )
    for name in ("uneven/huge", "uneven/small"):
        cluster.create(name, EnvSpec(packages=("six==1.16.0",)))
    results = {(r.variant_id, r.case_id): r for r in runner.run_batch(spec, code=code)}
    for case_id in ("a", "b"):
        error = results["huge", case_id].error
        assert error is not None
        assert error.type == "NoEligibleNode"
        assert results["small", case_id].ok, results["small", case_id].error
    for name in ("uneven/huge", "uneven/small"):
        cluster.delete(name, force=True)


def test_an_environment_that_is_not_what_its_name_says_is_built_again(
    cluster: RayEnvironmentProvider, root: Path
) -> None:
    """Somebody put another environment where the promised one stood."""
    cluster.create("throw-away", EnvSpec(packages=("six==1.15.0",)))
    cluster.prepare("throw-away")
    key = cluster.environment("throw-away")["key"]
    record = root / "store" / key / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "key": "f" * 32}))

    def version() -> str:
        from importlib.metadata import version

        return version("six")

    try:
        result = one(RayBatchRunner(cluster).run(version, variants=["throw-away"], cases=[[]]))
    finally:
        cluster.delete("throw-away", force=True)
    assert (result.ok, result.value) == (True, "1.15.0"), result.error
    assert json.loads(record.read_text())["key"] == key


def test_an_item_that_finds_its_environment_lost_waits_for_another(
    cluster: RayEnvironmentProvider, root: Path, tmp_path: Path
) -> None:
    """It comes to the worker that is there, long before anybody else sees what is missing.

    One retry is for that worker itself, which may miss a module and die.
    """
    cluster.create("lost", EnvSpec(packages=("six==1.14.0",)))
    cluster.prepare("lost")
    folder = root / "store" / cluster.environment("lost")["key"]

    def lose(folder: str, place: str, word: str) -> str:
        import os

        if word == "first":
            os.rename(folder, place)
        return word

    places = [str(folder), str(tmp_path / "elsewhere")]
    words = [[*places, word] for word in ("first", "second", "third")]
    try:
        ended = list(RayBatchRunner(cluster).run(lose, variants=["lost"], cases=words, retries=1))
    finally:
        cluster.delete("lost", force=True)
    assert sorted(str(result.value) for result in ended) == ["first", "second", "third"], [
        (result.error, result.attempts) for result in ended
    ]
    assert (folder / "record.json").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("key", "0" * 32), ("venv", "/somewhere/else/.venv"), ("python", "3.9.1"), ("ray", "1.0")],
)
def test_each_part_of_the_promise_is_checked_before_the_payload(
    cluster: RayEnvironmentProvider, tmp_path: Path, field: str, value: str
) -> None:
    environment = cluster.environment(OLD)
    ran = tmp_path / "ran"
    request = {
        "key": environment["key"],
        "venv": environment["venv_path"],
        "python": environment["python_version"],
        "ray": environment["ray_version"],
        "entrypoint": "os:mkdir",
        "as_json": True,
        "code_sha256": None,
        "budget_s": 1.0,
        "isolation": "worker",
        "timeout_s": 60.0,
    }
    calls = [{"args": [str(ran)], "kwargs": {}}]
    ray.cloudpickle.register_pickle_by_value(worker)
    try:
        task = ray.remote(worker_item.run_items)
        options = cluster.options(OLD, num_returns="streaming", max_retries=0)
        stream = task.options(**options).remote({**request, field: value}, calls, None, None)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(worker)
    began = ray.get(next(stream), timeout=60)["began"]
    outcome = ray.get(next(stream), timeout=60)["ended"]
    ray.cancel(stream, force=True)  # as the runner does: the worker waits for it
    assert outcome["is_unfit"]
    assert set(began) == {"started_at", "node_id", "pid"}
    assert outcome["kind"] == "environment"
    assert outcome["error"]["type"] == "WrongEnvironment"
    assert value in outcome["error"]["message"]
    assert not ran.exists()


# -- workers that end, and items that do not -------------------------------------------------------


@pytest.mark.parametrize("how", ["os._exit", "kill -9", "after the outcome"])
def test_a_lost_worker_is_started_again_a_bounded_number_of_times(
    runner: RayBatchRunner, pids: Path, how: str
) -> None:
    def die(folder: str, how: str) -> Any:
        import os
        import pathlib
        import signal

        pathlib.Path(folder, str(os.getpid())).touch()
        if how == "os._exit":
            os._exit(1)
        if how == "kill -9":
            os.kill(os.getpid(), signal.SIGKILL)

        class Deadly:
            def __reduce__(self) -> Any:
                os.kill(os.getpid(), signal.SIGKILL)
                return (int, ())

        return Deadly()

    result = one(runner.run(die, variants=[OLD], cases=[[str(pids), how]], retries=1))
    assert not result.ok
    assert result.attempts == 2
    assert len(pids_in(pids)) == 2
    assert result.error is not None
    assert result.error.type == "WorkerCrashedError"
    assert runner.status() is BatchState.FAILED


def test_an_item_that_works_at_its_second_attempt_succeeds(
    runner: RayBatchRunner, pids: Path
) -> None:
    def die_once(folder: str) -> str:
        import os
        import pathlib

        is_first = not list(pathlib.Path(folder).iterdir())
        pathlib.Path(folder, str(os.getpid())).touch()
        if is_first:
            os._exit(1)
        return "lived"

    result = one(runner.run(die_once, variants=[OLD], cases=[[str(pids)]]))
    assert (result.ok, result.value, result.attempts) == (True, "lived", 2)
    for path in pids.iterdir():  # the second worker stays warm
        path.unlink()


def test_an_item_whose_nodes_died_before_it_began_is_placed_again(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray fails such a task at once: TaskUnschedulableError (measured, 2.60)."""
    gone, real_totals, real = "ab" * 28, scheduling.node_totals, cluster.environment
    asked: list[str] = []

    def environment(variant_id: str, *, prepare: bool = True) -> dict[str, Any]:
        asked.append(variant_id)
        found = real(variant_id, prepare=prepare)
        return {**found, "ready_nodes": [gone]} if len(asked) == 1 else found

    def totals() -> dict[str, dict[str, float]]:
        found = real_totals()
        return {**found, gone: next(iter(found.values()))}

    monkeypatch.setattr(cluster, "environment", environment)
    monkeypatch.setattr(scheduling, "node_totals", totals)
    result = one(runner.run("os:getpid", variants=[OLD], cases=[[]], retries=1))
    assert result.ok, result.error
    assert result.attempts == 2


def test_an_item_that_raises_is_not_started_again(runner: RayBatchRunner, tmp_path: Path) -> None:
    def fail(path: str) -> None:
        with open(path, "a") as file:
            file.write("x")
        raise ConnectionError("once is enough")

    result = one(runner.run(fail, variants=[OLD], cases=[[str(tmp_path / "n")]], retries=3))
    assert result.attempts == 1
    assert (tmp_path / "n").read_text() == "x"


def test_a_time_out_ends_the_worker(runner: RayBatchRunner, pids: Path) -> None:
    started = time.monotonic()
    results = runner.run(sleep_and_tell, variants=[OLD], cases=[[str(pids), 600]], timeout_s=1)
    result = one(results)
    assert result.error is not None
    assert (result.error.type, result.error.message) == ("ItemTimeout", "did not end within 1 s")
    assert 1 <= result.duration_s < 10
    assert time.monotonic() - started < 30
    assert len(pids_in(pids)) == 1  # and gone at the end: see the fixture


def test_a_time_out_counts_from_the_start_and_not_while_an_item_waits(
    runner: RayBatchRunner, tmp_path: Path
) -> None:
    """Each takes the whole node, so that the last waits longer than its time-out."""
    cpus = ray.cluster_resources()["CPU"]
    results = list(
        runner.run(
            sleep_and_tell,
            variants=[OLD],
            cases=[[str(tmp_path), 2]] * 4,
            timeout_s=5.5,
            num_cpus=cpus,
        )
    )
    assert [r.ok for r in results] == [True] * 4


def test_cancelling_stops_what_runs_and_starts_nothing_more(
    cluster: RayEnvironmentProvider, pids: Path
) -> None:
    runner = RayBatchRunner(cluster, max_pending=1)
    cases = [[str(pids.parent), 0], [str(pids), 600], [str(pids), 600]]
    results = runner.run(sleep_and_tell, variants=[OLD], cases=cases)
    assert next(results).ok
    assert runner.status() is BatchState.RUNNING

    def cancel_when_it_runs() -> None:
        wait_until(lambda: bool(pids_in(pids)), "the second item to start")
        runner.cancel()

    thread = threading.Thread(target=cancel_when_it_runs)
    thread.start()
    assert list(results) == []
    thread.join()
    assert runner.status() is BatchState.CANCELLED
    progress = runner.progress()
    assert (progress.total, progress.completed, progress.in_progress) == (3, 1, 0)
    assert len(pids_in(pids)) == 1
    runner.shutdown()
    assert runner.status() is BatchState.CANCELLED


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_who_stops_reading_leaves_nothing_running(
    runner: RayBatchRunner, pids: Path, how: str
) -> None:
    cases = [[str(pids.parent), 0], [str(pids), 600]]
    results = runner.run(sleep_and_tell, variants=[OLD], cases=cases)
    assert next(results).ok
    wait_until(lambda: len(pids_in(pids)) == 1, "the other item to start")
    if how == "close":
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            results.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert runner.status() is BatchState.CANCELLED
    assert runner.progress().in_progress == 0
    wait_until(
        lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"],
        "every CPU to be free again",
    )


def test_a_batch_that_is_never_read_can_be_dropped(runner: RayBatchRunner) -> None:
    """A generator that was not begun runs no `finally`: the runner must not stay busy for ever."""
    results = runner.run("os:getpid", variants=[OLD], cases=[[]])
    results.close()  # type: ignore[attr-defined]
    assert one(runner.run("os:getpid", variants=[OLD], cases=[[]])).ok


def test_more_items_than_may_be_pending_all_run(cluster: RayEnvironmentProvider) -> None:
    runner = RayBatchRunner(cluster, max_pending=3)
    results = list(runner.run("builtins:abs", variants=[OLD, NEW], cases=[[-n] for n in range(8)]))
    assert sorted(r.value for r in results) == sorted([*range(8)] * 2)
    assert runner.progress().completed == 16


# -- what is refused at once -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.run("os:getpid", variants=[], cases=[[]]),
        lambda r: r.run("os:getpid", variants=[OLD], cases=[]),
        lambda r: r.run("os:getpid", variants=[OLD], cases=["text"]),
        lambda r: r.run(3, variants=[OLD], cases=[[]]),
        lambda r: r.run("os:getpid", variants=[OLD], cases=[[]], num_cpu=1),
        lambda r: r.run("os:getpid", variants=[OLD], cases=[[]], timeout_s=0),
        lambda r: r.run("getpid", variants=[OLD], cases=[[]]),
        lambda r: r.run("os:getpid", variants=[OLD, OLD], cases=[[]]),
        lambda r: r.run("os:getpid", variants=[OLD], cases=[CaseSpec(id="x")] * 2),
        lambda r: RayBatchRunner(r._provider, max_pending=0),
    ],
    ids=[
        "no-variants", "no-cases", "text-case", "no-function", "unknown-limit", "zero-time-out",
        "no-module", "a-variant-twice", "a-case-twice", "nothing-pending",
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_meant_is_refused_before_anything_runs(
    runner: RayBatchRunner, call: Callable[[RayBatchRunner], Any]
) -> None:
    with pytest.raises(InvalidInput):
        call(runner)
    assert runner.status() is BatchState.PENDING


# -- the manager, met from inside an environment ---------------------------------------------------


def test_a_task_without_ray_envs_can_ask_the_manager(cluster: RayEnvironmentProvider) -> None:
    @ray.remote
    def ask(variant_id: str) -> tuple[bool, dict[str, Any], str, str]:
        import importlib.util

        import ray as theirs

        manager = theirs.get_actor("EnvManager", namespace="ray_envs")
        status = theirs.get(manager.get_env_status.remote(variant_id=variant_id), timeout=30)
        try:
            spec = {"packages": ["-e ."]}
            theirs.get(manager.create_env.remote(variant_id="v", spec=spec), timeout=30)
            kind = words = ""
        except RuntimeError as exc:
            kind, words = type(exc.cause).__name__, str(exc.cause)  # type: ignore[attr-defined]
        return importlib.util.find_spec("ray_envs") is not None, status, kind, words

    has_ray_envs, status, kind, words = ray.get(
        ask.options(**cluster.options(OLD)).remote(OLD), timeout=60
    )
    assert has_ray_envs is False
    assert status == cluster.status(OLD)
    assert json.loads(json.dumps(status)) == status
    assert datetime.fromisoformat(status["created_at"]).tzinfo is not None
    assert kind == "RuntimeError"
    assert "InvalidPackages" in words
    assert "-e ." in words


def test_a_manager_that_was_killed_comes_back_with_what_it_knew(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner
) -> None:

    def title(process: psutil.Process) -> str:
        try:
            return str((process.cmdline() or [""])[0])
        except psutil.Error:  # it has ended meanwhile
            return ""

    children = psutil.Process().children(recursive=True)
    found = [process for process in children if title(process).startswith("ray::EnvManager")]
    assert len(found) == 1
    os.kill(found[0].pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            return bool(cluster.status(OLD)["status"] == "ACTIVE")
        except Exception:
            return False

    wait_until(answers, "the manager to come back", within_s=60)
    assert one(runner.run("os:getpid", variants=[OLD], cases=[[]])).ok


def test_a_program_speaks_to_the_manager_that_comes_after_an_ended_one(
    cluster: RayEnvironmentProvider, runner: RayBatchRunner, root: Path
) -> None:
    before = [row["variant_id"] for row in cluster.list_variants()]
    end_manager()
    create_manager(EnvManager, Settings(root=root).to_environment())
    assert [row["variant_id"] for row in cluster.list_variants()] == before
    assert one(runner.run("os:getpid", variants=[OLD], cases=[[]])).ok


class ShortDispatcher:
    """Items end at once; the manager is away for some launches after the first one."""

    away = range(0)

    def __init__(self, *_: object) -> None:
        self.lanes: dict[int, Item] = {}
        self.freed: list[str] = []
        self._launches = 0

    def pending(self) -> int:
        return len(self.lanes)

    def next_item(self, firsts: list[Item], _left: Any, _warm: list[str]) -> Item:
        return firsts[0]

    def chunk(self, _item: Item, _left: int) -> int:
        return 1

    def launch(self, items: list[Item]) -> bool:
        [item] = items
        self._launches += 1
        if self._launches in self.away:
            raise ManagerUnavailable("away")
        self.lanes[self._launches] = item
        return True

    def ended(self) -> Iterator[tuple[Item, ItemResult]]:
        for number, item in list(self.lanes.items()):
            del self.lanes[number]
            told = {"variant_id": item.variant_id, "case_id": item.case.id}
            yield item, ItemResult(**told, ok=True, attempts=self._launches)

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("restart_s", [60.0, -1.0], ids=["comes back", "is lost"])
def test_items_wait_for_a_manager_that_is_away_and_results_do_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, restart_s: float
) -> None:
    monkeypatch.setattr(runner_module, "Dispatcher", ShortDispatcher)
    monkeypatch.setattr(item_queue, "RESTART_S", restart_s)
    monkeypatch.setattr(item_queue, "_PAUSE_S", 0.01)
    monkeypatch.setattr(ShortDispatcher, "away", range(2, 5))
    provider = InMemoryEnvironmentProvider()
    provider.create("v", EnvSpec())
    results = list(RayBatchRunner(provider).run("os:getpid", variants=["v"], cases=[[]] * 4))
    told = [result.error.type if result.error else result.attempts for result in results]
    if restart_s > 0:
        assert told == [2, 7, 7, 7]  # the first result came while the manager was away
    else:
        assert sorted(map(str, told)) == ["2", *["ManagerUnavailable"] * 3]
