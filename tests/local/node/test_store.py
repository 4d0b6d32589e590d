"""The store: what has no record is rubbish, what is held stays, and the record comes last."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import pytest

from ray_envs.errors import EnvironmentInUse, LockTimeout, StorageFailed
from ray_envs.models import EnvRecord
from ray_envs.node import store as store_module
from ray_envs.node import unpacked_code
from ray_envs.node.store import FORMAT, Store
from ray_envs.settings import Settings
from ray_envs.worker.hold import INSTALLED_AS
from ray_envs.worker.hold import __file__ as hold_file

if TYPE_CHECKING:
    from tests.local.conftest import Child

Environment = Callable[[str], Store]
StartChild = Callable[..., "Child"]

#: A moment long before any test.
OLD = 1000.0
#: The kernel's time stamps are those of its last tick.
CLOCK_GRAIN_S = 0.1

#: Forks; the parent ends at once and the child lives on until stdin ends.
FORK = "import os, sys\nif os.fork():\n    os._exit(0)\n"


def record_of(key: str) -> EnvRecord:
    return EnvRecord(
        key=key,
        python="3.11.7",
        ray="2.60.0",
        platform="here",
        packages={"ray": "2.60.0"},
        lock_sha256="0" * 64,
        uv="0.13.0",
        how="linked",
        is_compiled=True,
        created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        duration_s=1.0,
    )


def trash_of(store: Store) -> list[str]:
    return os.listdir(store.root / "trash")


# -- the record


def test_an_environment_is_there_when_its_record_is_there(environment: Environment) -> None:
    store = environment("k")
    assert (store.record("k"), store.records()) == (None, {})
    store.commit(record_of("k"))
    assert store.record("k") == record_of("k")
    assert store.records() == {"k": record_of("k")}


@pytest.mark.parametrize("text", ["", "{", "{}", '{"key": "k"}'])
def test_a_damaged_record_is_no_record(environment: Environment, text: str) -> None:
    store = environment("k")
    store.commit(record_of("k"))
    record = store.venv("k").parent / "record.json"
    record.write_text(text)
    assert (store.record("k"), store.records()) == (None, {})
    record.unlink()


def test_a_record_of_another_key_is_no_record(environment: Environment) -> None:
    store = environment("k")
    (store.venv("k").parent / "record.json").write_text(record_of("other").model_dump_json())
    assert store.record("k") is None
    store.discard("k")


def test_a_record_without_its_interpreter_is_no_record(environment: Environment) -> None:
    store = environment("k")
    store.commit(record_of("k"))
    store.python("k").unlink()
    assert (store.record("k"), store.records()) == (None, {})
    store.discard("k")


def test_a_store_that_was_never_set_up_has_no_records(settings: Settings) -> None:
    assert Store(settings).records() == {}


def test_a_directory_without_a_record_is_wiped_before_a_build(environment: Environment) -> None:
    store = environment("k")
    (store.venv("k") / "half-built").touch()
    store.begin("k")
    assert os.listdir(store.venv("k").parent) == []
    assert trash_of(store) == []


def test_a_discarded_environment_leaves_nothing(environment: Environment) -> None:
    store = environment("k")
    store.commit(record_of("k"))
    assert store.discard("k")
    assert store.discard("k") is None
    assert not store.venv("k").parent.exists()
    assert (store.record("k"), trash_of(store)) == (None, [])


def test_a_dangling_link_in_the_place_of_an_environment_is_cleared(settings: Settings) -> None:
    store = Store(settings)
    store.set_up()
    store.venv("k").parent.symlink_to("/nowhere")
    store.begin("k")
    assert store.venv("k").parent.is_dir()
    assert not store.venv("k").parent.is_symlink()


def test_a_removal_survives_that_another_process_sweeps_the_trash_meanwhile(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = environment("k")
    rename = os.rename

    def rename_and_be_swept(source: Path, target: Path) -> None:
        rename(source, target)
        shutil.rmtree(target)  # an agent that starts on the same root calls `sweep` right now

    monkeypatch.setattr("ray_envs.node.store.os.rename", rename_and_be_swept)
    assert store.discard("k") == 0  # the bytes are the other's
    assert not store.venv("k").parent.exists()


# -- holds


def test_a_held_environment_is_never_removed(environment: Environment, child: StartChild) -> None:
    store = environment("k")
    store.commit(record_of("k"))
    running = child(store.python("k"))
    for remove in (store.discard, store.begin):
        with pytest.raises(EnvironmentInUse) as caught:
            remove("k")
        assert caught.value.key == "k"
    assert store.is_held("k")
    assert store.record("k") == record_of("k")
    assert running.process.poll() is None


def test_a_held_directory_without_a_record_is_never_wiped(
    environment: Environment, child: StartChild
) -> None:
    store = environment("k")
    child(store.python("k"))
    with pytest.raises(EnvironmentInUse):
        store.begin("k")
    assert store.python("k").exists()


def test_every_interpreter_that_starts_takes_the_hold(
    environment: Environment, child: StartChild
) -> None:
    store = environment("k")
    assert not store.is_held("k")
    first, second = child(store.python("k")), child(store.python("k"))
    first.end()
    assert store.is_held("k")
    second.end()
    assert not store.is_held("k")


@pytest.mark.parametrize("options", [["-I"], ["-s", "-E"], ["-B"]])
def test_no_usual_option_of_the_interpreter_keeps_it_from_the_hold(
    environment: Environment, options: list[str]
) -> None:
    store = environment("k")
    code = "import _ray_envs_inside as i; print(i.hold_fd is not None)"
    done = subprocess.run(
        [store.python("k"), *options, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_a_hold_ends_with_kill_9(environment: Environment, child: StartChild) -> None:
    store = environment("k")
    running = child(store.python("k"))
    assert store.is_held("k")
    running.kill()
    assert not store.is_held("k")
    assert store.discard("k")


def test_a_forked_child_keeps_the_hold_of_its_parent(
    environment: Environment, child: StartChild
) -> None:
    store = environment("k")
    parent = child(store.python("k"), FORK)
    assert parent.first_line == "up"  # said by the forked child
    parent.process.wait()
    assert store.is_held("k")
    with pytest.raises(EnvironmentInUse):
        store.discard("k")
    parent.end()  # ends the child's stdin; communicate waits until it has closed its stdout
    assert store.discard("k")


def test_an_interpreter_refuses_to_start_while_its_environment_is_being_removed(
    environment: Environment,
) -> None:
    store = environment("k")
    with store._exclusive_hold("k"):
        done = subprocess.run(
            [store.python("k"), "-c", "print('ran')"], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert done.stdout == ""
        assert f"this environment is being removed: {store.venv('k')}" in done.stderr
        with pytest.raises(EnvironmentInUse, match="is being removed"):
            store.open_hold("k")


def test_a_descriptor_of_the_hold_counts_as_long_as_any_process_has_it(
    environment: Environment,
) -> None:
    store = environment("k")
    fd = store.open_hold("k")
    sleeper = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[fd])
    os.close(fd)
    assert store.is_held("k")
    sleeper.communicate()
    assert not store.is_held("k")


def test_an_environment_cannot_be_removed_between_two_holds(
    environment: Environment, child: StartChild
) -> None:
    store = environment("k")
    others = [child(store.python("k")) for _ in range(3)]
    for each in others[:-1]:
        each.kill()
        with pytest.raises(EnvironmentInUse):
            store.discard("k")
    others[-1].kill()
    assert store.discard("k")


# -- the last use


def last_use(store: Store, key: str = "k") -> float:
    (found,) = [use.last_used_at for use in store.inventory() if use.key == key]
    return found


def make_old(store: Store, key: str = "k") -> None:
    """Say that nobody has used an environment since 1970."""
    for path in (store.folder / key, store.folder / f"{key}.hold"):
        os.utime(path, (OLD, OLD))
    assert last_use(store, key) == OLD


def test_an_environment_was_used_when_it_was_made(environment: Environment) -> None:
    before = time.time() - CLOCK_GRAIN_S
    store = environment("k")
    assert before <= last_use(store) <= time.time()
    make_old(store)
    store.commit(record_of("k"))
    assert before <= last_use(store) <= time.time()


def test_a_process_renews_the_last_use_at_its_start_and_at_its_end(
    environment: Environment, child: StartChild
) -> None:
    store = environment("k")
    make_old(store)
    running = child(store.python("k"))
    assert last_use(store) > OLD
    make_old(store)
    running.end()
    assert last_use(store) > OLD


def test_neither_kill_9_nor_the_end_of_a_forked_child_is_a_use(
    environment: Environment, child: StartChild
) -> None:
    store = environment("k")
    for code in ("", FORK):
        running = child(store.python("k"), code)
        make_old(store)
        if code:
            running.end()
        else:
            running.kill()
        assert last_use(store) == OLD


def test_who_ends_with_its_hold_closed_renews_no_other_file(
    environment: Environment, tmp_path: Path
) -> None:
    """A payload may close every descriptor, and the number of the hold be given again."""
    store, innocent = environment("k"), tmp_path / "innocent"
    innocent.touch()
    os.utime(innocent, (OLD, OLD))
    code = (
        "import os, _ray_envs_inside as i;"
        f"os.dup2(os.open({str(innocent)!r}, os.O_RDONLY), i.hold_fd)"
    )
    subprocess.run([store.python("k"), "-c", code], check=True)
    assert innocent.stat().st_mtime == OLD


def test_what_is_held_is_renewed_and_the_rest_is_not(
    environment: Environment, child: StartChild
) -> None:
    store = environment("held")
    environment("idle")
    child(store.python("held"))
    for key in ("held", "idle"):
        make_old(store, key)
    assert store.renew_held() == 1
    assert (last_use(store, "held") > OLD, last_use(store, "idle")) == (True, OLD)


def test_a_hold_that_a_command_inherits_is_a_use(environment: Environment) -> None:
    store = environment("k")
    make_old(store)
    os.close(store.open_hold("k"))
    assert last_use(store) > OLD


def test_to_look_at_an_environment_is_no_use(environment: Environment) -> None:
    store = environment("k")
    store.commit(record_of("k"))
    make_old(store)
    for look in (store.is_held, store.record, store.users):
        look("k")
    store.renew_held()
    store.records()
    assert (last_use(store), last_use(store)) == (OLD, OLD)
    assert not store.is_held("unknown")
    assert not (store.folder / "unknown.hold").exists()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of ours that other users may enter; pytest's own are closed to them."""
    folder = Path(mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_that_may_not_write_the_hold_starts_and_ends_all_the_same(
    open_folder: Path,
) -> None:
    site, hold = open_folder / "k" / ".venv" / "lib" / "python3", open_folder / "k.hold"
    module = site / "site-packages" / f"{INSTALLED_AS}.py"
    module.parent.mkdir(parents=True)
    shutil.copy(hold_file, module)
    hold.touch(mode=0o644)
    os.utime(hold, (OLD, OLD))
    code = (
        f"import sys, os, fcntl; sys.path.insert(0, {str(module.parent)!r});"
        f"import {INSTALLED_AS} as i; os.seteuid(65534); i.take_hold(); print(i.hold_fd > 0)"
    )
    done = subprocess.run(
        [sys.executable, "-ISc", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    assert hold.stat().st_mtime == OLD


# -- the inventory


def test_the_inventory_tells_of_every_directory_with_a_record_or_without(
    environment: Environment, child: StartChild
) -> None:
    store = environment("ready")
    store.commit(record_of("ready"))
    environment("rubbish")
    environment("torn")
    (store.folder / "torn" / "record.json").write_text("{")
    child(store.python("rubbish"))
    uses = store.inventory()
    made_at = record_of("ready").created_at.timestamp()
    assert [(use.key, use.is_ready, use.is_held, use.created_at) for use in uses] == [
        ("ready", True, False, made_at),
        ("rubbish", False, True, None),
        ("torn", False, False, None),
    ]
    assert all(use.bytes >= 0 and use.inodes > 3 and use.node_id == "" for use in uses)
    (store.folder / "torn" / "record.json").unlink()


def test_an_inventory_of_a_store_that_was_never_set_up_or_changes_meanwhile_is_no_error(
    environment: Environment, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Store(settings.model_copy(update={"root": settings.root / "none"})).inventory() == []
    store = environment("k")
    monkeypatch.setattr(store, "_keys", lambda: ["gone", "k"])
    assert [use.key for use in store.inventory()] == ["k"]


def test_where_nobody_can_tell_whether_it_is_held_it_is(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = environment("k")

    def unreadable(_: Store, key: str) -> bool:
        raise PermissionError(key)

    monkeypatch.setattr(Store, "is_held", unreadable)
    assert [use.is_held for use in store.inventory()] == [True]
    assert store.renew_held() == 0


def linked(store: Store, keys: list[str]) -> dict[str, Path]:
    """Environments that share a file of 1 MiB with uv's cache, and have one of their own each."""
    shared = store.cache / "wheel"
    shared.write_bytes(os.urandom(2**20))
    for key in keys:
        own = store.folder / key / "own"
        own.write_bytes(os.urandom(2**18))
        os.link(own, own.with_name("own-again"))
        os.link(shared, store.folder / key / "shared")
        (store.folder / key / "link").symlink_to(shared)
    return {key: store.folder / key for key in keys}


def blocks(path: Path) -> int:
    return path.lstat().st_blocks * 512


def test_the_sizes_of_environments_and_of_uvs_cache_add_up_to_what_the_disk_has(
    environment: Environment,
) -> None:
    store = environment("a")
    environment("b")
    places = linked(store, ["a", "b"])
    every = [p for place in places.values() for p in (place, *place.rglob("*"))]
    files = {path.lstat().st_ino: path for path in every}
    uses = store.inventory()
    in_cache = blocks(store.cache / "wheel") / 3
    assert abs(sum(use.bytes for use in uses) + in_cache - sum(map(blocks, files.values()))) < 3
    # A whole number each, rounded up: together at most one too many for each.
    assert 0 <= sum(use.inodes for use in uses) - (len(files) - 1 / 3) < 2


def test_what_is_freed_is_what_no_other_link_keeps(environment: Environment) -> None:
    store = environment("a")
    environment("b")
    places = linked(store, ["a", "b"])
    everything = {path.lstat().st_ino: path for path in (places["a"], *places["a"].rglob("*"))}
    expected = sum(map(blocks, everything.values())) - blocks(store.cache / "wheel")
    assert store.discard("a") == expected
    (store.cache / "wheel").unlink()
    shared = blocks(places["b"] / "shared")
    assert store.discard("b") == expected + shared


def test_what_could_not_be_deleted_is_not_reported_as_freed(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = environment("k")
    with monkeypatch.context() as patch:
        patch.setattr("ray_envs.node.store.shutil.rmtree", lambda *_, **__: None)
        assert store.discard("k") == 0
    assert store.inventory() == []
    assert len(trash_of(store)) == 1
    store.sweep()
    assert trash_of(store) == []


def test_the_sweep_of_code_deletes_only_what_workers_have_unpacked_and_follows_no_link(
    settings: Settings, tmp_path: Path
) -> None:
    store = Store(settings)
    store.set_up()
    code, victim = store.root / f"code-{os.getuid()}", tmp_path / "victim"
    old, fresh, half = "a" * 64, "b" * 64, "unpacking-x1_2"
    for folder in (code / old, code / fresh, code / half, code / "notes", victim / ("c" * 64)):
        folder.mkdir(parents=True)
        (folder / "kept.py").touch()
    (code / ("d" * 64)).symlink_to(victim)
    for folder in (code / old, code / half, code / "notes", victim, victim / ("c" * 64)):
        os.utime(folder, (0, 0))
    os.utime(code / ("d" * 64), (0, 0), follow_symlinks=False)
    unpacked_code.sweep(store.root)
    assert sorted(os.listdir(code)) == sorted([fresh, "d" * 64, "notes"])
    code.rename(tmp_path / "moved")
    code.symlink_to(victim)  # by somebody who may write the root
    unpacked_code.sweep(store.root)
    assert os.listdir(victim) == ["c" * 64]


# -- who holds it


def test_users_are_the_processes_that_hold_a_key_with_their_command_and_job(
    environment: Environment, child: StartChild, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = environment("k")
    environment("other")
    child(store.python("other"))
    with (tmp_path / "k.hold").open("w"):
        assert store.users("k") == []
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    of_job = child(store.python("k"), "# long " + "x" * 300)
    monkeypatch.setenv("RAY_JOB_ID", "ffffffff")  # a worker that waits for its first job
    early = child(store.python("k"))
    monkeypatch.delenv("RAY_JOB_ID")
    fd = store.open_hold("k")
    users = {user.pop("pid"): user for user in store.users("k")}
    os.close(fd)
    assert set(users) == {of_job.process.pid, early.process.pid, os.getpid()}
    assert users[of_job.process.pid]["job_id"] == "01000000"
    assert users[early.process.pid]["job_id"] is users[os.getpid()]["job_id"] is None
    command = users[of_job.process.pid]["command"]
    assert command[:2] == [str(store.python("k")), "-c"]
    assert command[2].startswith("# long xxx")
    assert len("".join(command)) == 200


def test_a_forked_child_of_a_dead_parent_is_the_user(
    environment: Environment, child: StartChild
) -> None:
    """The kernel's list of locks knows the dead parent alone."""
    store = environment("k")
    parent = child(store.python("k"), "import os\n" + FORK + "print(os.getpid(), flush=True)")
    parent.process.wait()
    assert [user["pid"] for user in store.users("k")] == [int(parent.first_line)]
    parent.end()
    assert store.users("k") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_process_of_another_user_is_named_although_its_files_are_hidden(
    open_folder: Path, child: StartChild
) -> None:
    store = Store(Settings(root=open_folder))
    store.set_up()
    opened = f"import fcntl, os; fd = os.open({str(store.folder / 'k.hold')!r}, os.O_CREAT)"
    running = child(Path(sys.executable), f"{opened}; fcntl.flock(fd, fcntl.LOCK_SH)")
    child(Path(sys.executable), opened)
    os.seteuid(65534)
    try:
        users = store.users("k")
    finally:
        os.seteuid(0)
    assert [user["pid"] for user in users] == [running.process.pid]


def test_nobody_is_named_where_the_system_does_not_tell(
    environment: Environment, child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = environment("k")
    child(store.python("k"))
    monkeypatch.setattr("ray_envs.node.usage._PROC", store.root / "no-proc")
    assert (store.users("k"), store.users("unknown")) == ([], [])


# -- format


def test_a_root_gets_a_format_number_and_one_of_another_format_is_left_alone(
    settings: Settings,
) -> None:
    store = Store(settings)
    assert not store.check_format()
    store.set_up()
    assert store.check_format()
    number = settings.root / "format"
    assert number.read_text() == f"{FORMAT}\n"
    for other in (f"{FORMAT + 1}\n", "", "\0" * 100, "9" * 10_000):
        number.write_text(other)
        for use in (store.set_up, store.check_format):
            with pytest.raises(StorageFailed, match="this ray_envs reads 1") as caught:
                use()
            assert "update ray_envs" in caught.value.hint
            assert len(str(caught.value)) < 500
        assert number.read_text() == other


# -- scratch, trash, space


def test_scratch_is_gone_after_the_block_whatever_happens(settings: Settings) -> None:
    store = Store(settings)
    store.set_up()
    with suppress(ZeroDivisionError), store.scratch({"a": "text"}) as folder:
        assert (folder / "a").read_text() == "text"
        raise ZeroDivisionError
    assert os.listdir(store.root / "scratch") == []


def test_what_dead_processes_left_is_swept_and_what_living_ones_use_stays(
    settings: Settings, child: StartChild
) -> None:
    store = Store(settings)
    store.set_up()
    other = child(Path(sys.executable), holding_scratch(settings))
    for name in (f"{os.getpid()}-x", "no-number"):
        (store.root / "scratch" / name).mkdir()
    (store.root / "scratch" / f"{os.getpid()}-probe").touch()
    with store.scratch({}) as mine:
        store.sweep()
        kept = {mine.name, Path(other.first_line).name, "no-number"}
        assert set(os.listdir(store.root / "scratch")) == kept
    other.kill()
    store.sweep()
    assert os.listdir(store.root / "scratch") == ["no-number"]


def holding_scratch(settings: Settings) -> str:
    """Code that opens a scratch folder, says its name, and keeps it until the process ends."""
    return (
        "from pathlib import Path; from ray_envs.settings import Settings;"
        "from ray_envs.node.store import Store;"
        f"settings = Settings(root=Path({str(settings.root)!r}));"
        "block = Store(settings).scratch({'a': 'text'}); print(block.__enter__(), flush=True)"
    )


def test_a_pid_of_another_container_says_nothing_about_who_is_alive(
    settings: Settings, child: StartChild
) -> None:
    """There the folder of a living process may bear a number that nobody has here."""
    store = Store(settings)
    store.set_up()
    folder = Path(child(Path(sys.executable), holding_scratch(settings)).first_line)
    dead = subprocess.run([sys.executable, "-ISc", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    renamed = folder.rename(folder.with_name(f"{dead}-x"))
    store.sweep()
    assert (renamed / "a").read_text() == "text"


def test_a_scratch_folder_that_is_swept_before_it_is_locked_is_made_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(settings)
    store.set_up()
    other, sweeps, stages = Store(settings), [], [True, False]
    lock = store_module._locked_alone

    def sweep_first(path: Path, flags: int = 0) -> int:
        """Another process sweeps before the folder is opened, then between that and the lock."""
        monkeypatch.setattr("ray_envs.node.store._locked_alone", lock)
        sweeps.append(path)
        if stages.pop():
            fd = lock(path, flags)
            shutil.rmtree(path)
        else:
            other.sweep()
            monkeypatch.setattr("ray_envs.node.store._locked_alone", sweep_first)
            fd = lock(path, flags)
        return fd

    monkeypatch.setattr("ray_envs.node.store._locked_alone", sweep_first)
    with store.scratch({"a": "text"}) as folder:
        assert len({*sweeps, folder}) == 3
        other.sweep()
        assert (folder / "a").read_text() == "text"
    assert os.listdir(store.root / "scratch") == []


def test_a_store_can_be_set_up_while_another_process_sweeps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, lock = Store(settings), fcntl.flock

    def sweep_first(file: Any, operation: int) -> None:
        monkeypatch.setattr("ray_envs.node.store.fcntl.flock", lock)
        Store(settings).sweep()
        lock(file, operation)

    monkeypatch.setattr("ray_envs.node.store.fcntl.flock", sweep_first)
    store.set_up()
    assert os.listdir(store.root / "scratch") == []


def test_a_sweep_removes_whatever_lies_in_the_trash_and_many_may_sweep_at_once(
    settings: Settings,
) -> None:
    store = Store(settings)
    store.set_up()
    trash, kept = store.root / "trash", store.root / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (trash / "link").symlink_to(kept)
    (trash / "dangling").symlink_to("nowhere")
    (trash / "file").touch()
    for number in range(30):
        (trash / f"k-{number}" / "a" / "b").mkdir(parents=True)
        (trash / f"k-{number}" / "a" / "b" / "c").touch()
    with ThreadPoolExecutor(4) as pool:
        for sweep in [pool.submit(Store(settings).sweep) for _ in range(4)]:
            sweep.result()
    assert trash_of(store) == []
    assert os.listdir(kept) == ["file"]


def test_a_root_with_too_little_space_is_refused_before_anything_is_built(
    settings: Settings,
) -> None:
    store = Store(settings.model_copy(update={"min_free_bytes": 2**62}))
    with pytest.raises(StorageFailed, match="are free below") as caught:
        store.set_up()
    assert "RAY_ENVS_ROOT" in caught.value.hint
    with pytest.raises(StorageFailed):
        store.begin("k")
    assert store.is_full()
    assert not store.venv("k").parent.exists()


def test_a_root_below_a_file_is_refused_with_a_hint(root: Path) -> None:
    root.parent.mkdir(exist_ok=True)
    (root.parent / "file").touch()
    with pytest.raises(StorageFailed, match="cannot use the root") as caught:
        Store(Settings(root=root.parent / "file" / "root")).set_up()
    assert "RAY_ENVS_ROOT" in caught.value.hint


def test_the_lock_of_a_key_does_not_keep_others_from_another_key(settings: Settings) -> None:
    store = Store(settings.model_copy(update={"lock_timeout_s": 0.1}))
    store.set_up()

    async def both() -> None:
        async with store.lock("a"), store.lock("b"):
            with pytest.raises(LockTimeout, match="the environment a is being changed by process"):
                async with store.lock("a"):
                    pytest.fail("two processes held one lock")

    asyncio.run(both())
