"""The registry: a definition is there or not, whole, whatever dies on whatever line."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest

from ray_envs.disk.files import write_atomically
from ray_envs.errors import LockTimeout, StorageFailed
from ray_envs.manager import registry as registry_module
from ray_envs.manager import venv_view
from ray_envs.manager.reconciler import build_request
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId, Generation, Target, VariantRecord
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from tests import definitions

V = EnvId.parse("v")


class Crash(BaseException):
    """Stands for `kill -9`: nothing in the code may catch it and clean up."""


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return Registry(settings)


def generation(number: int) -> Generation:
    return Generation(
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


def commit(registry: Registry, env_id: EnvId = V, number: int = 1) -> VariantRecord:
    return definitions.commit(
        registry,
        env_id,
        generation(number),
        pyproject=f"project {number}",
        uv_lock=f"lock {number}",
    )


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -- definitions


def test_what_was_committed_is_what_any_process_reads(
    registry: Registry, settings: Settings
) -> None:
    assert (registry.get(V), registry.all(), registry.stamp(V)) == (None, [], 0)
    first = commit(registry)
    second = commit(registry, number=registry.next_number(V))
    assert (first.current.number, second.current.number) == (1, 2)
    assert second.created_at == first.created_at < second.updated_at
    other = Registry(settings)
    assert (other.get(V), other.all()) == (second, [second])
    assert other.lock_text(V, 2) == ("project 2", "lock 2")
    assert other.lock_text(V, 1) == ("project 1", "lock 1")
    folder = registry.folder(V)
    assert (folder / "pyproject.toml").read_text() == "project 2"
    assert (folder / "uv.lock").read_text() == "lock 2"
    request = build_request(second.current, *other.lock_text(V, 2))
    assert (request.key, request.uv_lock) == ("key-2", "lock 2")


def test_the_stamp_changes_with_every_commit(registry: Registry) -> None:
    stamps = []
    for number in range(1, 6):
        commit(registry, number=number)
        stamps.append(registry.stamp(V))
    registry.delete(V)
    stamps.append(registry.stamp(V))
    assert len(set(stamps)) == len(stamps)
    assert stamps[-1] == 0


def test_a_deleted_definition_leaves_nothing_and_is_deleted_once(registry: Registry) -> None:
    commit(registry)
    assert (registry.delete(V), registry.delete(V)) == (True, False)
    assert (registry.get(V), registry.all()) == (None, [])
    assert not registry.folder(V).exists()
    assert commit(registry).current.number == 1


def test_definitions_are_listed_by_their_id(registry: Registry) -> None:
    names = ["w/a/2", "w/a/1", "b", "a", "w/b", "a/z"]
    for name in names:
        commit(registry, EnvId.parse(name))
    assert [str(record.env_id) for record in registry.all()] == sorted(names)


def test_ids_that_join_to_the_same_text_never_share_a_folder(registry: Registry) -> None:
    parts = ["a", "b", "a_b", "a_", "b_a", "a__b", "a5F"]
    ids = [
        EnvId(workflow_id=workflow, node_id=node, version_id=version)
        for workflow, node, version in itertools.product(parts, parts, [None, *parts])
    ]
    assert len({registry.folder(env_id) for env_id in ids}) == len(ids)
    for env_id in ids[:40]:
        commit(registry, env_id)
    assert {record.env_id for record in registry.all()} == set(ids[:40])


def test_a_folder_that_holds_another_id_is_refused(registry: Registry) -> None:
    """As on a file system where `V` and `v` are one folder."""
    other = EnvId.parse("V")
    commit(registry)
    registry.folder(V).rename(registry.folder(other))
    before = files(registry.folder(other))
    with pytest.raises(StorageFailed, match="the folder of V holds the variant v") as caught:
        registry.get(other)
    assert "choose another id" in caught.value.hint
    with pytest.raises(StorageFailed):
        commit(registry, other)
    assert files(registry.folder(other)) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"env_id": {"node_id": "../x"}}'])
def test_a_damaged_definition_is_named_and_hides_no_other(registry: Registry, text: str) -> None:
    commit(registry)
    other = commit(registry, EnvId.parse("other"))
    metadata = registry.folder(V) / "metadata.json"
    metadata.write_text(text)
    damaged: list[StorageFailed] = []
    assert registry.all(damaged=damaged) == registry.all() == [other]
    with pytest.raises(StorageFailed) as caught:
        registry.get(V)
    for error in (caught.value, *damaged):
        assert f"{metadata} is damaged" in error.message
        assert str(registry.folder(V)) in error.hint
    assert len(damaged) == 1


def test_a_definition_that_cannot_be_read_is_named(registry: Registry) -> None:
    commit(registry)
    metadata = registry.folder(V) / "metadata.json"
    metadata.unlink()
    metadata.mkdir()
    with pytest.raises(StorageFailed, match="cannot read"):
        registry.get(V)


def test_a_generation_whose_lock_is_gone_is_named(registry: Registry) -> None:
    commit(registry)
    shutil.rmtree(registry.folder(V) / "generations")
    with pytest.raises(StorageFailed, match="cannot read generation 1 of v"):
        registry.lock_text(V, 1)


# -- every line may be the last

#: The files that a commit writes, in their order; all but the copies for people are before it.
WRITES = ["1/pyproject.toml", "1/uv.lock", "1/generation.json", "metadata.json"]
COPIES = ["v/pyproject.toml", "v/uv.lock"]


def fail_at(monkeypatch: pytest.MonkeyPatch, end: str, error: BaseException) -> None:
    real = write_atomically

    def write(path: Path, text: str, **options: bool) -> None:
        if str(path).replace("default_v", "v").replace("/2/", "/1/").endswith(end):
            raise error
        real(path, text, **options)

    monkeypatch.setattr(registry_module, "write_atomically", write)


@pytest.mark.parametrize("end", WRITES)
def test_a_crash_before_the_metadata_leaves_the_previous_generation(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    before = commit(registry)
    with monkeypatch.context() as patch:
        fail_at(patch, end, Crash())
        with pytest.raises(Crash):
            commit(registry, number=2)
    assert (registry.get(V), registry.all()) == (before, [before])
    assert registry.lock_text(V, 1) == ("project 1", "lock 1")
    assert registry.next_number(V) == 2
    after = commit(registry, number=2)
    assert registry.get(V) == after
    assert registry.lock_text(V, 2) == ("project 2", "lock 2")


@pytest.mark.parametrize("end", WRITES)
def test_a_crash_in_the_first_commit_leaves_no_definition(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, end, Crash())
        with pytest.raises(Crash):
            commit(registry)
    assert (registry.get(V), registry.all(), registry.next_number(V)) == (None, [], 1)
    assert registry.get(V) is None
    after = commit(registry)
    assert registry.get(V) == after


@pytest.mark.parametrize("end", COPIES)
def test_a_crash_after_the_metadata_leaves_the_new_generation(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    commit(registry)
    with monkeypatch.context() as patch:
        fail_at(patch, end, Crash())
        with pytest.raises(Crash):
            commit(registry, number=2)
    record = registry.get(V)
    assert record is not None
    assert record.current == generation(2)
    assert registry.lock_text(V, 2) == ("project 2", "lock 2")


@pytest.mark.parametrize("end", [*WRITES, *COPIES])
@pytest.mark.parametrize("is_first", [True, False], ids=["the first", "a later"])
def test_a_commit_that_reports_a_full_disk_has_changed_nothing(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, end: str, is_first: bool
) -> None:
    before = None if is_first else commit(registry)
    there = files(registry.folder(V))
    with monkeypatch.context() as patch:
        fail_at(patch, end, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), end))
        error = None
        try:
            commit(registry, number=1 if is_first else 2)
        except StorageFailed as exc:
            error = exc
    record = registry.get(V)
    if error is None:
        assert record is not None
        assert record.current.number == (1 if is_first else 2)
    else:
        assert "free space" in error.hint
        assert (record, files(registry.folder(V))) == (before, there)


def test_a_crash_in_the_middle_of_a_deletion_leaves_no_definition(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(registry)

    def crash(_: Path) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr("ray_envs.manager.registry.shutil.rmtree", crash)
        with pytest.raises(Crash):
            registry.delete(V)
    assert (registry.get(V), registry.all()) == (None, [])
    assert not registry.delete(V)
    assert not registry.folder(V).exists()


# -- locks and the manager


def test_who_changes_a_definition_keeps_others_out_and_is_named(settings: Settings) -> None:
    registry = Registry(settings.model_copy(update={"lock_timeout_s": 0.1}))

    async def main() -> None:
        async with registry.lock(V):
            async with registry.lock(EnvId.parse("w")):
                pass
            async with registry.lock(V):
                pytest.fail("two writers at once")

    with pytest.raises(LockTimeout, match=f"variant v is being changed by process {os.getpid()}"):
        asyncio.run(main())


# -- the view for people


def test_the_view_shows_the_packages_of_the_store_and_holds_them(
    registry: Registry, settings: Settings, tmp_path: Path
) -> None:
    commit(registry)
    site = tmp_path / "site"
    site.mkdir()
    (site / "in_the_store.py").write_text("")
    minor = f"{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable))
    for _ in range(2):  # a second generation writes over the first
        venv_view.write(registry.folder(V), base, f"{minor}.0", site)
    python = registry.folder(V) / ".venv" / "bin" / "python"
    code = "import sys, in_the_store; print(sys.prefix, in_the_store.__file__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(python.parent.parent), str(site / "in_the_store.py")]
