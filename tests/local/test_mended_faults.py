"""Faults that an attack found, as far as they need no Ray, one test each."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest

from ray_envs.batch_models import BatchSpec, ItemResult
from ray_envs.cli import main
from ray_envs.cli.display import rendered, results_table
from ray_envs.client.code_folder import source_sha256
from ray_envs.cluster.nodes import LocalNodes
from ray_envs.decisions import locks
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.manager import registry as registry_module
from ray_envs.manager.manager import EnvManager
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId, Generation, Target, VariantRecord
from ray_envs.node.agent import NodeAgent
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from tests import definitions

V = EnvId.parse("v")


# -- the registry ----------------------------------------------------------------------------------


def commit(registry: Registry, number: int) -> VariantRecord:
    generation = Generation(
        number=number,
        definition=Definition(packages=(f"p=={number}",)),
        key=f"key-{number}",
        lock_sha256="0" * 64,
        fingerprint=f"fingerprint-{number}",
        target=Target(python="3.11.7", ray="2.60.0"),
        platform="here",
        created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        packages={"ray": "2.60.0"},
    )
    return definitions.commit(
        registry, V, generation, pyproject=f"project {number}", uv_lock=f"lock {number}"
    )


def generations(registry: Registry) -> dict[str, tuple[int, int, str]]:
    """Every file of every generation: which one it is, when it was written, what it says."""
    folder = registry.folder(V) / "generations"
    return {
        str(path.relative_to(folder)): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            path.read_text(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("later", [2, 3])
def test_an_older_generation_is_restored_without_touching_any_folder(
    settings: Settings, later: int
) -> None:
    registry = Registry(settings)
    first = commit(registry, 1)
    for number in range(2, later + 1):
        commit(registry, number)
    before, stamp = generations(registry), registry.stamp(V)
    registry.point_to(first)
    assert registry.get(V) == first
    assert registry.stamp(V) != stamp
    assert generations(registry) == before
    assert (registry.folder(V) / "pyproject.toml").read_text() == "project 1"
    assert (registry.folder(V) / "uv.lock").read_text() == "lock 1"


def test_a_restoration_without_space_leaves_the_generations_as_they_were(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    registry = Registry(settings)
    first, second = commit(registry, 1), commit(registry, 2)
    before = generations(registry)
    monkeypatch.setattr(registry_module, "write_atomically", full)
    with pytest.raises(StorageFailed, match="write the definition"):
        registry.point_to(first)
    assert generations(registry) == before
    assert registry.get(V) == second


# -- locks and code --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<<< garbage", "", '[[package]]\nname = "six"\n'])
def test_a_text_that_is_no_lock_file_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        locks.check_lock(text)
    assert caught.value.where == "uv.lock"


def test_a_lock_file_is_accepted() -> None:
    locks.check_lock("version = 1\nrevision = 3\n")


def test_only_python_files_count_as_the_source_of_a_result(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("one = 1\n")
    (tmp_path / "batch.toml").write_text("one = 1\n")
    before = source_sha256(tmp_path)
    (tmp_path / "batch.toml").write_text("two = 2\n")
    assert source_sha256(tmp_path) == before
    (tmp_path / "work.py").write_text("two = 2\n")
    assert source_sha256(tmp_path) != before


# -- holds -----------------------------------------------------------------------------------------


def test_an_interpreter_takes_its_hold_once(environment: Any, child: Any) -> None:
    """Python runs the .pth files of a venv twice; a hold that nobody knows cannot be let go."""
    store = environment("some-key")
    process = child(store.python("some-key")).process
    files = [Path(file.path).name for file in psutil.Process(process.pid).open_files()]
    assert files == ["some-key.hold"]


# -- uv's cache ------------------------------------------------------------------------------------


def test_compiled_files_of_the_cache_cannot_be_written_and_their_folders_can(
    warm_cache: Path,
) -> None:
    """Environments link to these very files."""
    files = folders = 0
    for marker in warm_cache.glob("archive-v*/*/*.dist-info/ray_envs-bytecode.*"):
        for place, _, names in os.walk(marker.parent.parent):
            folders += 1
            assert os.stat(place).st_mode & stat.S_IWUSR, place
            for name in names:
                files += 1
                path = os.path.join(place, name)
                assert os.stat(path).st_mode & 0o222 == 0, path
    assert files > 100
    assert folders > 10


# -- the table -------------------------------------------------------------------------------------


def rows_of(values: list[Any], metric: str | None = None) -> list[str]:
    """The rows of a table of one case, with a variant for each value."""
    batch = BatchSpec.model_validate(
        {
            "name": "b",
            "entrypoint": "m:f",
            "metric": metric,
            "variants": [{"id": f"v{number}"} for number in range(len(values))],
            "cases": [{"id": "case"}],
        }
    )
    results = [
        ItemResult(variant_id=f"v{number}", case_id="case", ok=True, value=value)
        for number, value in enumerate(values)
    ]
    text = rendered(results_table(batch, results))
    return [row for row in text.splitlines() if any(f" v{n} " in row for n in range(len(values)))]


@pytest.mark.parametrize(
    ("values", "marked"),
    [([1.0, 2.0, 2.0], [False, True, True]), ([2.0, 2.0], [False, False]), ([1.0], [False])],
)
def test_the_best_is_marked_only_where_something_differs(
    values: list[float], marked: list[bool]
) -> None:
    assert ["*" in row for row in rows_of(values)] == marked


def test_a_text_is_shown_and_a_missing_metric_is_named() -> None:
    text, number, missing = rows_of([{"m": "linear"}, {"m": 3}, {"other": 4}], metric="m")
    assert " linear " in text
    assert " 3 " in number
    assert " no m " in missing
    assert "*" not in text + number + missing


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler")
def test_a_second_interrupt_does_not_end_the_end() -> None:
    signal.signal(signal.SIGINT, main._interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.raise_signal(signal.SIGINT)


# -- the handle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "arguments", "named"),
    [
        ("pin_env", {"variant_id": "v", "is_pinned": "x"}, "is_pinned"),
        ("pin_env", {"variant_id": "v", "is_pinned": None}, "is_pinned"),
        ("get_env_status", {"variant_id": None}, "variant_id"),
        ("add_deps", {"variant_id": "v", "packages": 5}, "packages"),
        ("add_deps", {"variant_id": "v", "packages": [b"six"]}, "packages"),
        ("create_env", {"variant_id": "v", "spec": 5}, "spec"),
        ("create_env", {"variant_id": "v", "spec": {}, "wait_s": float("nan")}, "wait_s"),
        ("events", {"timeout_s": float("nan")}, "timeout_s"),
        ("events", {"since": float("inf")}, "since"),
        ("events", {"kinds": 5}, "kinds"),
        ("get_operations", {"limit": -1}, "limit"),
        ("get_operations", {"offset": 2**70}, "offset"),
        ("delete_operations", {"operation": float("nan")}, "operation"),
        ("delete_operations", {"operation": ""}, "operation"),
        ("cleanup", {"idle_hours": -1}, "idle_hours"),
        ("prepare", {"variant_ids": [5]}, "variant_ids"),
        ("get_environment", {"variant_id": "v", "job_id": 5}, "job_id"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named_before_anything_is_done(
    settings: Settings, verb: str, arguments: dict[str, object], named: str
) -> None:
    async def ask() -> None:
        manager = EnvManager(settings=settings.to_environment(), nodes=LocalNodes(NodeAgent))
        try:
            await getattr(manager, verb)(**arguments)
        finally:
            await manager.stop()

    with pytest.raises(InvalidInput, match=f"^{verb}: {named}"):
        asyncio.run(ask())
    assert not settings.root.exists()


@pytest.mark.parametrize("text", ['{"key": "../victim"}', '{"numbers": []}', '{"numbers": [2]}'])
def test_a_definition_that_was_edited_into_nonsense_is_damaged(
    settings: Settings, text: str
) -> None:
    registry = Registry(settings)
    commit(registry, 1)
    path = registry.folder(V) / "metadata.json"
    data, change = json.loads(path.read_text()), json.loads(text)
    data["current"].update({k: v for k, v in change.items() if k == "key"})
    data.update({k: v for k, v in change.items() if k == "numbers"})
    path.write_text(json.dumps(data))
    with pytest.raises(StorageFailed, match="is damaged"):
        registry.get(V)


def test_a_pipe_in_the_place_of_a_definition_is_damaged_and_not_waited_for(
    settings: Settings,
) -> None:
    registry = Registry(settings)
    commit(registry, 1)
    path = registry.folder(V) / "metadata.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageFailed, match="is damaged"):
        registry.get(V)


def test_a_collection_keeps_the_environments_of_a_definition_that_cannot_be_read(
    warm: Settings,
) -> None:
    async def act() -> list[str]:
        manager = EnvManager(settings=warm.to_environment(), nodes=LocalNodes(NodeAgent))
        try:
            await manager.create_env(variant_id="v", spec={}, wait_s=120)
            (Registry(warm).folder(V) / "metadata.json").write_text("{")
        finally:
            await manager.stop()
        manager = EnvManager(settings=warm.to_environment(), nodes=LocalNodes(NodeAgent))
        try:
            told = await manager.cleanup(idle_hours=0)
        finally:
            await manager.stop()
        assert told["deleted"] == []
        return [row["because"] for row in told["kept"]]

    assert asyncio.run(act()) == [
        "a generation of the definition in default_v, which cannot be read"
    ]


def test_an_operation_id_stands_for_one_request_only(warm: Settings) -> None:
    async def act() -> None:
        manager = EnvManager(settings=warm.to_environment(), nodes=LocalNodes(NodeAgent))
        try:
            for name in ("a", "b"):
                await manager.create_env(variant_id=name, spec={}, wait_s=120)
            asked: Any = {"packages": ["six==1.17.0"], "operation_id": "deploy-42"}
            await manager.add_deps(variant_id="a", **asked)
            with pytest.raises(InvalidInput, match="was used for another request"):
                await manager.add_deps(variant_id="b", **asked)
            with pytest.raises(InvalidInput, match="was used for another request"):
                await manager.remove_deps(
                    variant_id="a", packages=["six"], operation_id="deploy-42"
                )
        finally:
            await manager.stop()

    asyncio.run(act())
