"""Faults that an attack found on a real Ray, one test each: by payloads, people and kills."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from ray_envs import (
    BatchSpec,
    EnvSpec,
    ItemResult,
    RayBatchRunner,
    RayEnvironmentProvider,
    Settings,
)
from ray_envs.client.code_folder import pack_code
from ray_envs.errors import WorkerCannotStart
from ray_envs.node.store import Store
from tests.cluster.conftest import left_after

pytestmark = pytest.mark.timeout(90)

OLD = "kept/old-six"


def one(results: Iterator[ItemResult]) -> ItemResult:
    found = list(results)
    assert len(found) == 1
    return found[0]


def error_of(result: ItemResult) -> tuple[str, str]:
    assert not result.ok
    assert result.error is not None
    return result.error.type, result.error.message


@pytest.fixture
def make(cluster: RayEnvironmentProvider) -> Iterator[Any]:
    """Creates variants of one `six` each, whose workers no other test has; forgets them after."""
    made = []

    def create(variant_id: str, six: str, **options: Any) -> str:
        cluster.create(variant_id, EnvSpec(packages=(f"six=={six}",), **options))
        made.append(variant_id)
        return str(cluster.status(variant_id)["key"])

    yield create
    for variant_id in made:
        cluster.delete(variant_id, force=True)


# -- variants --------------------------------------------------------------------------------------


def test_a_variant_that_was_replaced_since_its_creation_runs_nothing(
    cluster: RayEnvironmentProvider, make: Any, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    batch = BatchSpec.model_validate(
        {
            "name": "swapped",
            "entrypoint": "os:mkdir",
            "variants": [{"id": "v"}],
            "cases": [{"id": "one", "args": [str(ran)]}, {"id": "two", "args": [str(ran)]}],
        }
    )
    key = make("swapped/v", "1.16.0")
    cluster.create("swapped/v", EnvSpec(packages=("six==1.17.0",)), replace=True)
    results = list(RayBatchRunner(cluster).run_batch(batch, keys={"v": key}))
    assert [result.case_id for result in results] == ["one", "two"]
    for result in results:
        kind, message = error_of(result)
        assert kind == "WrongEnvironment"
        assert "replaced" in message
        assert result.attempts == 0
    assert not ran.exists()


def test_variables_that_keep_the_interpreter_from_starting_are_named_soon(
    cluster: RayEnvironmentProvider, make: Any
) -> None:
    make("unstartable", "1.16.0", env_vars={"PYTHONHASHSEED": "notanumber"})
    started = time.monotonic()
    result = one(RayBatchRunner(cluster).run("os:getpid", variants=["unstartable"], cases=[[]]))
    kind, message = error_of(result)
    assert kind == "WorkerCannotStart"
    assert "PYTHONHASHSEED" in message
    with pytest.raises(WorkerCannotStart, match="PYTHONHASHSEED"):
        cluster.environment("unstartable")
    assert time.monotonic() - started < 60


# -- what a payload leaves behind ------------------------------------------------------------------


#: More items than there are workers, so that one worker has several.
MANY = 6


def test_a_payload_that_removes_its_folder_does_not_spoil_the_next_item(
    cluster: RayEnvironmentProvider, make: Any, tmp_path: Path
) -> None:
    def leave(folder: str) -> tuple[int, str]:
        import os

        before = os.getcwd()
        os.mkdir(folder)
        os.chdir(folder)
        os.rmdir(folder)
        return os.getpid(), before

    make("lost-folder", "1.12.0")
    runner = RayBatchRunner(cluster, max_pending=1)
    cases = [[str(tmp_path / str(number))] for number in range(MANY)]
    results = list(runner.run(leave, variants=["lost-folder"], cases=cases))
    assert [result.error for result in results] == [None] * MANY
    assert len({pid for pid, _ in (result.value for result in results)}) < MANY
    assert len({folder for _, folder in (result.value for result in results)}) == 1


def test_a_hold_that_a_payload_closed_is_taken_again_before_the_next_item(
    cluster: RayEnvironmentProvider, make: Any, root: Path
) -> None:
    def count(hold: str, is_to_close: bool) -> tuple[int, int]:
        """The pid, and the number of holds; like whoever closes all that is not its own."""
        import os

        found = 0
        for fd in range(3, 1024):
            try:
                if os.path.samestat(os.fstat(fd), os.stat(hold)):
                    found += 1
                    if is_to_close:
                        os.close(fd)
            except OSError:
                continue
        return os.getpid(), found

    key = make("lost-hold", "1.13.0")
    hold = str(root / "store" / f"{key}.hold")
    runner = RayBatchRunner(cluster, max_pending=1)
    cases = [[hold, True]] * (MANY - 1) + [[hold, False]]
    results = list(runner.run(count, variants=["lost-hold"], cases=cases))
    assert [result.error for result in results] == [None] * MANY
    assert len({pid for pid, _ in (result.value for result in results)}) < MANY
    assert all(found for _, found in (result.value for result in results))
    assert Store(Settings(root=root)).is_held(key)


def test_half_a_surrogate_pair_makes_an_ordinary_result(
    cluster: RayEnvironmentProvider, tmp_path: Path
) -> None:
    def fail() -> None:
        raise ValueError("half of \ud83d")

    (tmp_path / "halves.py").write_text("def give():\n    return {'text': 'half of \\ud83d'}\n")
    value = one(
        RayBatchRunner(cluster).run("halves:give", variants=[OLD], cases=[[]], code=tmp_path)
    )
    kind, message = error_of(value)
    assert kind == "TypeError"
    assert message.startswith("the value is not JSON")
    text = one(RayBatchRunner(cluster).run(fail, variants=[OLD], cases=[[]]))
    assert error_of(text) == ("ValueError", "half of \\ud83d")
    for result in (value, text):
        assert ItemResult.model_validate_json(result.model_dump_json()) == result


def test_code_that_was_changed_where_it_is_unpacked_is_unpacked_again_for_a_new_worker(
    cluster: RayEnvironmentProvider, make: Any, tmp_path: Path
) -> None:
    source = f"WHERE = {str(tmp_path)!r}\n\ndef give():\n    return 'as it was sent'\n"
    (tmp_path / "spoilt.py").write_text(source)

    def given(variant_id: str, six: str) -> Any:
        make(variant_id, six)
        runner = RayBatchRunner(cluster)
        return one(runner.run("spoilt:give", variants=[variant_id], cases=[[]], code=tmp_path))

    assert given("first-worker", "1.11.0").value == "as it was sent"
    root = Path(cluster.status("first-worker")["venv_path"]).parents[2]
    unpacked = root / f"code-{os.getuid()}" / pack_code(tmp_path)[0] / "spoilt.py"
    unpacked.write_text("def give():\n    return 'changed by hand'\n")
    assert given("second-worker", "1.10.0").value == "as it was sent"
    assert unpacked.read_text() == source


# -- kill -9 ---------------------------------------------------------------------------------------


def kill_agent() -> None:
    """`kill -9` of the only NodeAgent below this process, and wait until it is gone."""
    agents = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "".join(process.cmdline()).startswith("ray::NodeAgent"):
                agents.append(process)
        except psutil.Error:
            continue
    assert len(agents) == 1
    agents[0].kill()
    assert left_after(agents, 10) == []


@pytest.mark.parametrize("when", ["before create", "before prepare"])
def test_kill_9_of_the_agent_does_not_fail_the_next_prepare(
    cluster: RayEnvironmentProvider, make: Any, when: str
) -> None:
    name, six = {"before create": ("killed-1", "1.9.0"), "before prepare": ("killed-2", "1.8.0")}[
        when
    ]
    if when == "before create":
        kill_agent()
        make(name, six)
    else:
        make(name, six)
        kill_agent()
    told = cluster.prepare(name, timeout_s=60)
    assert told[name]["status"] == "ACTIVE"
    assert one(RayBatchRunner(cluster).run("os:getpid", variants=[name], cases=[[]])).ok
