"""A call in a child process: what it returns, and what is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ray_envs.worker.forked import in_child

LIMIT_S = 30.0

pytestmark = pytest.mark.timeout(60)


def test_its_value_comes_back_whatever_its_size() -> None:
    for value in (None, {"a": [1, "é"]}, b"x" * 5_000_000):
        assert in_child(lambda value=value: value, LIMIT_S) == ("ended", value)  # type: ignore[misc]


def test_nothing_that_it_changes_is_changed_here() -> None:
    known: list[int] = []

    def change() -> tuple[int, list[int]]:
        known.append(1)
        os.environ["ZZ_LEFT"] = "x"
        os.chdir("/")
        return os.getpid(), known

    folder = os.getcwd()
    how, (pid, changed) = in_child(change, LIMIT_S)
    assert (how, changed) == ("ended", [1])
    assert pid != os.getpid()
    assert (known, os.environ.get("ZZ_LEFT"), os.getcwd()) == ([], None, folder)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda: os._exit(3), "its process ended with exit code 3 before it had a result"),
        (lambda: os._exit(0), "its process ended with exit code 0 before it had a result"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was ended by signal 11 (SIGSEGV)"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by signal 9 (SIGKILL)"),
        (lambda: os.closerange(3, 10_000), "ended with exit code 1 before it had a result"),
    ],
)
def test_an_end_without_a_value_is_told_in_words(end: Any, why: str) -> None:
    how, told = in_child(end, LIMIT_S)
    assert how == "crashed"
    assert why in told


def test_one_that_takes_too_long_is_ended() -> None:
    began = time.monotonic()
    assert in_child(lambda: time.sleep(600), 0.5) == ("late", "")
    assert time.monotonic() - began < 10


def test_one_that_has_closed_its_pipe_is_late_too() -> None:
    def close_and_wait() -> None:
        os.closerange(3, 10_000)
        time.sleep(600)

    assert in_child(close_and_wait, 0.5) == ("late", "")


@pytest.mark.parametrize("is_detached", [False, True])
def test_processes_that_it_leaves_end_with_it(tmp_path: Path, is_detached: bool) -> None:
    """Also one that holds the pipe, is in a session of its own, and has lost its parent."""

    def leave() -> int:
        if is_detached:
            child = os.fork()
            if child == 0:
                os.setsid()
                if os.fork():
                    os._exit(0)
                (tmp_path / "pid").write_text(str(os.getpid()))
                time.sleep(600)
            os.waitpid(child, 0)
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.01)
            return int((tmp_path / "pid").read_text())
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    began = time.monotonic()
    how, left = in_child(leave, LIMIT_S)
    assert how == "ended"
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(left, 0)


def test_a_child_of_this_process_that_was_there_before_is_not_ended() -> None:
    mine = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert in_child(lambda: 1, LIMIT_S) == ("ended", 1)
        assert mine.poll() is None
    finally:
        mine.communicate(b"\n")
    assert mine.returncode == 0
