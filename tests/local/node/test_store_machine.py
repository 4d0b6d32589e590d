"""The store under every order of its verbs and deaths, against a plain dict of three keys."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ray_envs.errors import EnvironmentInUse
from ray_envs.models import EnvRecord
from ray_envs.node.store import Store
from ray_envs.settings import Settings

KEYS = st.sampled_from(["a", "b", "c"])


class Killed(BaseException):
    """The process dies on this line: nothing after it runs, and the kernel drops its locks."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


def record_of(key: str) -> EnvRecord:
    return EnvRecord(
        key=key,
        python="3.11.7",
        ray="2.60.0",
        platform="here",
        packages={},
        lock_sha256="0" * 64,
        uv="0.13.0",
        how="linked",
        is_compiled=True,
        created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        duration_s=1.0,
    )


class StoreMachine(RuleBasedStateMachine):
    """`there` maps each directory that exists to whether it has a record."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(mkdtemp(prefix="ray_envs-store-"))
        self.store = Store(Settings(root=self.folder / "root"))
        self.store.set_up()
        self.there: dict[str, bool] = {}
        self.holds: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        self.scratches: dict[str, ExitStack] = {}
        self.dead_scratches: set[str] = set()
        self.rubbish = 0

    def teardown(self) -> None:
        for stack in self.scratches.values():
            stack.close()
        for fds in self.holds.values():
            for fd in fds:
                os.close(fd)
        shutil.rmtree(self.folder)

    def is_in_use(self, key: str) -> bool:
        return key in self.there and bool(self.holds[key])

    @rule(key=KEYS)
    def begin(self, key: str) -> None:
        if self.is_in_use(key):
            with pytest.raises(EnvironmentInUse):
                self.store.begin(key)
        else:
            self.store.begin(key)
            assert os.listdir(self.store.venv(key).parent) == []
            self.there[key] = False
            self.store.python(key).parent.mkdir(parents=True)
            self.store.python(key).symlink_to(sys.executable)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.there)))
        self.store.commit(record_of(key))
        self.there[key] = True

    @precondition(lambda self: not all(self.there.values()))
    @rule(data=st.data())
    def die_before_the_record_has_its_name(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, ready in self.there.items() if not ready)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray_envs.disk.files.os.replace", die)
            patch.setattr("ray_envs.disk.files.os.unlink", die)  # the dead tidy nothing up
            with pytest.raises(Killed):
                self.store.commit(record_of(key))
        self.start_again()

    @rule(key=KEYS)
    def discard(self, key: str) -> None:
        if self.is_in_use(key):
            with pytest.raises(EnvironmentInUse):
                self.store.discard(key)
        else:
            assert (self.store.discard(key) is not None) == (key in self.there)
            self.there.pop(key, None)

    @rule(key=KEYS)
    def die_while_deleting(self, key: str) -> None:
        if key in self.there and not self.holds[key]:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("ray_envs.node.store.shutil.rmtree", die)
                with pytest.raises(Killed):
                    self.store.discard(key)
            del self.there[key]
            self.rubbish += 1
            self.start_again()

    @rule(key=KEYS)
    def hold(self, key: str) -> None:
        self.holds[key].append(self.store.open_hold(key))

    @precondition(lambda self: any(self.holds.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, fds in self.holds.items() if fds)))
        os.close(self.holds[key].pop())

    @rule()
    def take_scratch(self) -> None:
        stack = ExitStack()
        folder = stack.enter_context(self.store.scratch({"file": "text"}))
        self.scratches[folder.name] = stack

    @precondition(lambda self: self.scratches)
    @rule(data=st.data(), is_killed=st.booleans())
    def end_scratch(self, data: st.DataObject, is_killed: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.scratches)))
        with pytest.MonkeyPatch.context() as patch:
            if is_killed:
                patch.setattr("ray_envs.node.store.shutil.rmtree", lambda *_, **__: None)
                self.dead_scratches.add(name)
            self.scratches.pop(name).close()

    @rule()
    def renew(self) -> None:
        assert self.store.renew_held() == sum(map(self.is_in_use, self.there))

    @rule()
    def sweep(self) -> None:
        self.store.sweep()
        self.rubbish = 0
        self.dead_scratches.clear()

    @rule()
    def start_again(self) -> None:
        """As a new process would: nothing is known but what is on disk."""
        self.store = Store(Settings(root=self.folder / "root"))
        self.store.set_up()

    @invariant()
    def the_disk_is_the_dict(self) -> None:
        store = self.store
        assert set(store.records()) == {key for key, is_ready in self.there.items() if is_ready}
        for key, fds in self.holds.items():
            assert store.venv(key).parent.is_dir() == (key in self.there)
            assert (store.record(key) is not None) == self.there.get(key, False)
            assert store.is_held(key) == bool(fds)
        assert {use.key: (use.is_ready, use.is_held) for use in store.inventory()} == {
            key: (is_ready, self.is_in_use(key)) for key, is_ready in self.there.items()
        }

    @invariant()
    def what_nobody_misses_goes_with_the_next_sweep_and_the_rest_stays(self) -> None:
        assert len(os.listdir(self.store.root / "trash")) == self.rubbish
        scratches = {*self.scratches, *self.dead_scratches}
        assert set(os.listdir(self.store.root / "scratch")) == scratches


StoreMachine.TestCase.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=30, deadline=None
)
TestEveryOrderOfVerbs = StoreMachine.TestCase
