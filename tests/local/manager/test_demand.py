"""What is wanted outlives the manager that was told; a bad disk or file stops nobody."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.manager.demand import Wishes

KEYS = ["a", "b", "c"]


def again(path: Path | None) -> Wishes:
    """What the next manager knows."""
    wishes = Wishes(path)
    wishes.load()
    return wishes


def seen(wishes: Wishes) -> list[tuple[bool, int, int]]:
    return [(key in wishes, wishes.attempt(key), wishes.epoch(key)) for key in KEYS]


steps = st.lists(
    st.tuples(st.sampled_from(["want", "again", "drop", "outdate"]), st.sampled_from(KEYS)),
    max_size=12,
)


@given(steps)
def test_the_next_manager_knows_all_that_the_last_one_did(
    tmp_path_factory: pytest.TempPathFactory, taken: list[tuple[str, str]]
) -> None:
    path = tmp_path_factory.mktemp("wishes") / "wishes.json"
    wishes = again(path)
    wanted, attempts, epochs = set(), dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, 0)
    for what, key in taken:
        before = wishes.version, seen(wishes)
        if what == "drop":
            assert wishes.drop(key) is (key in wanted)
            wanted.discard(key)
        elif what == "outdate":
            wishes.outdate(key)
            epochs[key] += 1
        else:
            wishes.want(key, failed=attempts[key] if what == "again" else None)
            wanted.add(key)
            attempts[key] += what == "again"
        assert (wishes.version > before[0]) is (seen(wishes) != before[1])
        assert seen(wishes) == [(k in wanted, attempts[k], epochs[k]) for k in KEYS]
        assert seen(again(path)) == seen(wishes)
    assert len(wishes) == len(wanted)


def test_what_is_wished_at_once_is_written_once(tmp_path: Path) -> None:
    wishes = again(tmp_path / "wishes.json")
    with wishes.at_once():
        for key in KEYS:
            wishes.want(key)
        assert not os.listdir(tmp_path)
    assert all(key in again(tmp_path / "wishes.json") for key in KEYS)


def test_without_a_file_they_hold_for_this_process_only() -> None:
    wishes = again(None)
    wishes.want("a")
    assert "a" in wishes
    assert "a" not in again(None)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"wanted": ["../x"]}', '{"newer": 1}', "\0", b"\xff".decode("latin-1")]
)
def test_a_file_that_cannot_be_read_is_as_none_and_is_written_anew(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "wishes.json"
    path.write_text(text, encoding="latin-1")
    wishes = again(path)
    assert len(wishes) == 0
    wishes.want("a")
    assert "a" in again(path)


def test_what_was_wished_before_the_file_was_read_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "wishes.json"
    again(path).want("a")
    wishes = Wishes(path)
    wishes._wanted.add("b")
    wishes.load()
    assert "a" in wishes
    assert "b" in wishes


def test_a_disk_that_takes_nothing_stops_no_wish(tmp_path: Path) -> None:
    wishes = again(tmp_path / "missing" / "wishes.json")
    wishes.want("a", failed=0)
    wishes.outdate("a")
    assert seen(wishes)[0] == (True, 1, 1)
    assert not os.listdir(tmp_path)


def test_an_attempt_that_failed_before_the_file_was_lost_is_not_repeated(tmp_path: Path) -> None:
    wishes = again(tmp_path / "wishes.json")
    wishes.want("a", failed=7)
    assert wishes.attempt("a") == 8
    wishes.want("a", failed=3)
    assert wishes.attempt("a") == 9


def test_the_file_is_plain_and_the_same_for_the_same_wishes(tmp_path: Path) -> None:
    path = tmp_path / "wishes.json"
    wishes = again(path)
    for key in ("b", "a"):
        wishes.want(key)
    assert json.loads(path.read_text()) == {"wanted": ["a", "b"], "attempts": {}, "epochs": {}}
    assert [entry.name for entry in tmp_path.iterdir()] == ["wishes.json"]
