"""The files in which plugin and agent of a node meet, and what a runtime_env says to the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from ray_envs.decisions import placement
from ray_envs.errors import InvalidId, InvalidInput
from ray_envs.models import Key
from ray_envs.node.store import Store
from ray_envs.plugin import gate as gates
from ray_envs.plugin.gate import Gate, Wish, has_plugin, reason_in, wish_of, with_plugin
from ray_envs.settings import Settings

KEY = "abc-123_X"
NO_KEYS = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a.refused", "a\n", "a\0b", "ä", "x" * 65]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def wanted(root: Path) -> set[str]:
    """The names of all files of the gate, but the one that tells of its agent."""
    folder = root / "wanted"
    return {path.name for path in folder.iterdir()} - {".served"} if folder.is_dir() else set()


def age(path: Path, by_s: float) -> None:
    at = time.time() - by_s
    os.utime(path, (at, at))


def make_environment(settings: Settings, key: str, **record: Any) -> None:
    """What a build leaves, as far as a gate looks at it."""
    store = Store(settings)
    store.python(key).parent.mkdir(parents=True)
    store.python(key).symlink_to(sys.executable)
    (store.folder / key / "record.json").write_text(json.dumps({"key": key, **record}))


# -- asking


def test_what_is_asked_for_is_seen_until_it_is_withdrawn(gate: Gate, tmp_path: Path) -> None:
    gate.ask(KEY, 3)
    assert gate.asked() == {KEY: 3}
    assert json.loads((tmp_path / "wanted" / KEY).read_text()) == {"attempt": 3}
    gate.withdraw(KEY)
    gate.withdraw(KEY)
    assert gate.asked() == {}


def test_who_asks_no_more_is_forgotten_and_its_file_removed(gate: Gate, tmp_path: Path) -> None:
    gate.ask("dead", 1)
    gate.ask("alive", 1)
    for name in ("dead", "alive"):
        age(tmp_path / "wanted" / name, 61)
    gate.ask("alive", 1)
    assert gate.asked() == {"alive": 1}
    assert wanted(tmp_path) == {"alive"}


def test_a_clock_that_was_set_back_makes_nobody_ask_for_ever(gate: Gate, tmp_path: Path) -> None:
    gate.ask(KEY, 1)
    age(tmp_path / "wanted" / KEY, -3600)
    assert gate.asked() == {}


def test_of_two_askers_the_later_attempt_counts_and_one_may_leave(gate: Gate) -> None:
    other = Gate(gate._store.parent)
    gate.ask(KEY, 1)
    other.ask(KEY, 2)
    gate.ask(KEY, 1)
    assert gate.asked() == {KEY: 2}
    gate.withdraw(KEY)
    assert gate.asked() == {}
    other.ask(KEY, 2)
    assert gate.asked() == {KEY: 2}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"attempt": "1"}', b'{"attempt": true}', b"{}"),
        *(b"[" * 60_000, b'{"attempt": 1' + b" " * 2**16 + b"}"),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_cannot_be_read_asks_for_nothing_and_is_written_again(
    gate: Gate, tmp_path: Path, content: bytes
) -> None:
    gate.ask(KEY, 1)
    (tmp_path / "wanted" / KEY).write_bytes(content)
    assert gate.asked() == {}
    gate.ask(KEY, 1)
    assert gate.asked() == {KEY: 1}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_asks_for_nothing_and_keeps_nobody_waiting(
    gate: Gate, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    gate.ask(KEY, 1)
    make(tmp_path / "wanted" / "other")
    make(tmp_path / "wanted" / f"{KEY}.refused")
    assert gate.asked() == {KEY: 1}
    assert gate.refusal(KEY, 1) is None


def test_what_a_killed_writer_left_is_removed_and_never_taken_for_a_key(
    gate: Gate, tmp_path: Path
) -> None:
    gate.ask(KEY, 1)
    old, new = (tmp_path / "wanted" / f".{KEY}.{name}" for name in ("1-old", "2-new"))
    for path in (old, new):
        path.write_text('{"attempt": 9}')
    age(old, 61)
    assert gate.asked() == {KEY: 1}
    assert wanted(tmp_path) == {KEY, new.name}


def test_a_node_is_asked_before_its_agent_has_made_the_root(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "new" / "root")
    gate.ask(KEY, 0)
    assert gate.asked() == {KEY: 0}


def test_a_root_that_cannot_be_made_is_told_to_the_asker_and_asks_the_agent_for_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    gate = Gate(tmp_path / "file" / "root")
    with pytest.raises(NotADirectoryError):
        gate.ask(KEY, 1)
    assert gate.asked() == {}
    assert not gate.is_ready(KEY)
    assert gate.refusal(KEY, 1) is None
    assert gate.served_s() is None


def test_an_agent_that_looks_leaves_word_of_it(gate: Gate, tmp_path: Path) -> None:
    gate.ask(KEY, 1)
    assert gate.served_s() is None
    gate.asked()
    age(tmp_path / "wanted" / ".served", 100)
    assert 100 <= (gate.served_s() or 0) < 160
    gate.asked()
    assert (gate.served_s() or 0) < 60


# -- answers


def test_a_refusal_is_of_its_attempt_and_those_before(gate: Gate) -> None:
    gate.ask(KEY, 2)
    gate.refuse(KEY, 2, "no space")
    assert [gate.refusal(KEY, n) for n in (1, 2, 3)] == ["no space", "no space", None]
    assert gate.refusal("other", 1) is None
    assert gate.asked() == {KEY: 2}  # who asked withdraws


def test_a_reason_of_any_length_can_be_read(gate: Gate) -> None:
    gate.refuse(KEY, 1, "\0" * 100_000)
    assert (gate.refusal(KEY, 1) or "").startswith("\0\0")


def test_a_late_refusal_of_an_earlier_attempt_takes_nothing_back(gate: Gate) -> None:
    gate.refuse(KEY, 5, "newer")
    gate.refuse(KEY, 2, "older")
    assert gate.refusal(KEY, 5) == "older"
    assert gate.refusal(KEY, 6) is None


def test_what_is_cleared_is_neither_asked_for_nor_refused(gate: Gate, tmp_path: Path) -> None:
    gate.ask(KEY, 1)
    gate.refuse(KEY, 1, "no space")
    gate.clear(KEY)
    gate.clear(KEY)
    assert gate.refusal(KEY, 1) is None
    assert wanted(tmp_path) == set()


def test_a_refusal_is_forgotten_as_ray_forgets_its_own(gate: Gate, tmp_path: Path) -> None:
    gate.refuse(KEY, 9, "no space")
    path = tmp_path / "wanted" / f"{KEY}.refused"
    path.write_text(json.dumps({**json.loads(path.read_text()), "at": time.time() - 601}))
    assert gate.refusal(KEY, 1) is None
    age(path, 61)
    gate.asked()
    assert path.exists()
    age(path, 601)
    gate.asked()
    assert not path.exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"attempt": 1}', '{"attempt": "1", "at": 1, "reason": "x"}']
)
def test_a_refusal_that_cannot_be_read_is_none(gate: Gate, tmp_path: Path, content: str) -> None:
    gate.refuse(KEY, 1, "no space")
    (tmp_path / "wanted" / f"{KEY}.refused").write_text(content)
    assert gate.refusal(KEY, 1) is None


def test_the_gate_finds_what_the_store_keeps(tmp_path: Path) -> None:
    settings, gate = Settings(root=tmp_path), Gate(tmp_path)
    assert not gate.is_ready(KEY)
    make_environment(settings, KEY)
    assert gate.is_ready(KEY)
    store = Store(settings)
    (store.folder / KEY / "record.json").write_text('{"key": "another"}')
    assert not gate.is_ready(KEY)
    (store.folder / KEY / "record.json").write_text(json.dumps({"key": KEY}))
    store.python(KEY).unlink()
    store.python(KEY).symlink_to(tmp_path / "gone")
    assert not gate.is_ready(KEY)


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_becomes_no_path(gate: Gate, tmp_path: Path, key: str) -> None:
    for use in (
        lambda: gate.ask(key, 1),
        lambda: gate.withdraw(key),
        lambda: gate.is_ready(key),
        lambda: gate.refusal(key, 1),
        lambda: gate.refuse(key, 1, "x"),
        lambda: gate.clear(key),
        lambda: gates.field(key, 1),
    ):
        with pytest.raises(InvalidId):
            use()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValidationError):
        TypeAdapter(Key).validate_python(key)


# -- runtime_envs


def options_of(root: Path, *, key: str = KEY, attempt: object = 1) -> dict[str, Any]:
    environment = placement.runtime_env(str(Store(Settings(root=root)).venv(key)), {})
    return {**environment, "ray_envs": {"key": key, "attempt": attempt}}


def test_a_runtime_env_of_ours_names_root_key_and_attempt(tmp_path: Path) -> None:
    made = options_of(tmp_path)
    assert made["ray_envs"] == gates.field(KEY, 1)
    assert wish_of(made) == Wish(tmp_path, KEY, 1)


@pytest.mark.parametrize("theirs", [{}, {"pip": ["six"]}, {"ray_envs": None}])
def test_a_runtime_env_without_our_field_is_none_of_our_business(theirs: dict[str, Any]) -> None:
    assert wish_of({"py_executable": "/usr/bin/python3", **theirs}) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"ray_envs": "text"},
        {"ray_envs": {}},
        {"ray_envs": {"key": KEY}},
        {"ray_envs": {"key": KEY, "attempt": 1, "kee": 1}},
        {"ray_envs": {"key": KEY, "attempt": "1"}},
        {"ray_envs": {"key": KEY, "attempt": True}},
        {"ray_envs": {"key": KEY, "attempt": -1}},
        {"ray_envs": {"key": "other", "attempt": 1}},
        {"ray_envs": {"key": 7, "attempt": 1}},
        *({"ray_envs": {"key": key, "attempt": 1}} for key in NO_KEYS),
        {"py_executable": None},
        {"py_executable": sys.executable},
        {"py_executable": f"relative/store/{KEY}/.venv/bin/python"},
        {"py_executable": f"/a/../b/store/{KEY}/.venv/bin/python"},
        {"py_executable": f"/a/store/{KEY}/.venv/bin/python -c 1"},
    ],
    ids=repr,
)
def test_a_runtime_env_that_was_changed_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        wish_of({**options_of(tmp_path), **changed})


def test_our_reason_is_found_in_what_ray_says_of_it() -> None:
    said = (
        "Failed to set up runtime environment.\n[Node 1.2.3.4] Traceback (most recent call last):\n"
        f"  File …\nRuntimeError: {gates.marked('no space')}\nhint: make some\n"
    )
    assert reason_in(said) == "no space\nhint: make some"
    assert reason_in("Failed to set up runtime environment.\nRuntimeError: of others") is None


# -- the variable of Ray


def test_our_plugin_is_added_once_and_others_stay() -> None:
    alone = with_plugin(None)
    assert json.loads(alone) == [{"class": "ray_envs.plugin.EnvironmentPlugin"}]
    assert with_plugin("") == with_plugin(alone) == alone
    theirs = '[{"class": "theirs.Plugin", "priority": 3}]'
    both = with_plugin(theirs)
    assert json.loads(both) == [*json.loads(theirs), *json.loads(alone)]
    assert [has_plugin(value) for value in (None, "", theirs, both)] == [False, False, False, True]


@pytest.mark.parametrize("value", ["{", "{}", "[1]", '[{"klass": "x"}]'])
def test_a_variable_that_ray_could_not_read_is_refused(value: str) -> None:
    for use in (has_plugin, with_plugin):
        with pytest.raises(InvalidInput, match="RAY_RUNTIME_ENV_PLUGINS"):
            use(value)


def test_what_rays_own_process_imports_of_us_is_the_standard_library() -> None:
    script = """
import sys
before = set(sys.modules)
import ray_envs.plugin.gate
new = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}
assert not [name for name, file in new.items() if "site-packages" in str(file)], new
import ray_envs.plugin.environment_plugin
print(sorted(name for name in sys.modules if name.startswith("ray_envs")))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() == str(
        [
            "ray_envs",
            "ray_envs.errors",
            "ray_envs.plugin",
            "ray_envs.plugin.environment_plugin",
            "ray_envs.plugin.gate",
            "ray_envs.worker",
            "ray_envs.worker.hold",
        ]
    )
