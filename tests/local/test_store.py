"""The store: what has no record is rubbish, what is held stays, and the record comes last."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_envs.errors import EnvironmentInUse, LockTimeout, StorageFailed
from ray_envs.models import EnvRecord
from ray_envs.settings import Settings
from ray_envs.store import Store

if TYPE_CHECKING:
    from tests.local.conftest import Child

Environment = Callable[[str], Store]
StartChild = Callable[..., "Child"]

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
    assert (store.discard("k"), store.discard("k")) == (1, 0)
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

    monkeypatch.setattr("ray_envs.store.os.rename", rename_and_be_swept)
    assert store.discard("k") == 1


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
    assert store.discard("k") == 1


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
    assert store.discard("k") == 1


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
    assert store.discard("k") == 1


# -- scratch, trash, space


def test_scratch_is_gone_after_the_block_whatever_happens(settings: Settings) -> None:
    store = Store(settings)
    store.set_up()
    with suppress(ZeroDivisionError), store.scratch({"a": "text"}) as folder:
        assert (folder / "a").read_text() == "text"
        raise ZeroDivisionError
    assert os.listdir(store.root / "scratch") == []


def test_what_dead_processes_left_is_swept_and_what_living_ones_use_stays(
    settings: Settings,
) -> None:
    store = Store(settings)
    store.set_up()
    dead = subprocess.run([sys.executable, "-ISc", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    for name in (f"{dead}-x", f"{os.getppid()}-x", "no-number"):
        (store.root / "scratch" / name).mkdir()
    (store.root / "trash" / "k-x").mkdir()
    with store.scratch({}) as mine:
        store.sweep()
        kept = set(os.listdir(store.root / "scratch"))
    assert kept == {mine.name, f"{os.getppid()}-x", "no-number"}
    assert trash_of(store) == []


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


# -- every order of a few verbs, against a plain dict

KEYS = st.sampled_from(["a", "b", "c"])


class StoreMachine(RuleBasedStateMachine):
    """Three keys; `there` maps each directory that exists to whether it has a record."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(mkdtemp(prefix="ray_envs-store-"))
        self.store = Store(Settings(root=self.folder / "root"))
        self.store.set_up()
        self.there: dict[str, bool] = {}
        self.holds: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def teardown(self) -> None:
        for fds in self.holds.values():
            for fd in fds:
                os.close(fd)
        shutil.rmtree(self.folder)

    @rule(key=KEYS)
    def begin(self, key: str) -> None:
        if key in self.there and self.holds[key]:
            with pytest.raises(EnvironmentInUse):
                self.store.begin(key)
        else:
            self.store.begin(key)
            self.there[key] = False
            self.store.python(key).parent.mkdir(parents=True)
            self.store.python(key).symlink_to(sys.executable)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.there)))
        self.store.commit(record_of(key))
        self.there[key] = True

    @rule(key=KEYS)
    def discard(self, key: str) -> None:
        if key in self.there and self.holds[key]:
            with pytest.raises(EnvironmentInUse):
                self.store.discard(key)
        else:
            assert self.store.discard(key) == int(key in self.there)
            self.there.pop(key, None)

    @rule(key=KEYS)
    def hold(self, key: str) -> None:
        self.holds[key].append(self.store.open_hold(key))

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, fds in self.holds.items() if fds)))
        os.close(self.holds[key].pop())

    @rule()
    def start_again(self) -> None:
        """As a new process would: nothing is known but what is on disk."""
        self.store = Store(Settings(root=self.folder / "root"))
        self.store.set_up()
        self.store.sweep()

    @invariant()
    def the_disk_is_the_dict(self) -> None:
        assert set(self.store.records()) == {key for key, ready in self.there.items() if ready}
        for key, fds in self.holds.items():
            assert self.store.venv(key).parent.is_dir() == (key in self.there)
            assert self.store.is_held(key) == bool(fds)
        assert trash_of(self.store) == []


StoreMachine.TestCase.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
TestEveryOrderOfVerbs = StoreMachine.TestCase
