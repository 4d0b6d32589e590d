"""The hold: cheap at each interpreter start, and a lock as long as the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envs.worker import hold

SOURCE = Path(hold.__file__).read_text(encoding="utf-8")


def test_its_import_at_every_interpreter_start_loads_almost_nothing() -> None:
    """It is imported by a .pth line: each module more would slow every start down."""
    code = (
        f"import os, site, sys; sys.path.insert(0, {os.path.dirname(hold.__file__)!r}); "
        "before = set(sys.modules); import hold; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert set(done.stdout.split()) <= {"hold", "__future__"}


def in_environment(tmp_path: Path, code: str) -> list[str]:
    """A command that runs `code` where `hold` is installed as an environment has it."""
    site = tmp_path / "key" / ".venv" / "lib" / "python3" / "site-packages"
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{hold.INSTALLED_AS}.py").write_text(SOURCE)
    start = f"import sys; sys.path.insert(0, {str(site)!r}); import {hold.INSTALLED_AS} as i; "
    return [sys.executable, "-I", "-S", "-c", start + code]


def test_a_process_holds_its_environment_until_it_ends(tmp_path: Path) -> None:
    import fcntl

    command = in_environment(tmp_path, "i.take_hold(); print('held', flush=True); input()")
    file = tmp_path / "key.hold"
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        fd = os.open(file, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        process.wait(20)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_a_process_does_not_start_in_an_environment_that_is_being_removed(tmp_path: Path) -> None:
    import fcntl

    fd = os.open(tmp_path / "key.hold", os.O_RDONLY | os.O_CREAT, 0o666)
    fcntl.flock(fd, fcntl.LOCK_EX)
    done = subprocess.run(
        in_environment(tmp_path, "i.take_hold(); print('went on')"),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    os.close(fd)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is being removed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hold_can_be_taken_where_the_file_belongs_to_another_user(tmp_path: Path) -> None:
    """Readers need no right to write: the hold is a lock, not a content."""
    (tmp_path / "key.hold").touch(mode=0o444)
    done = subprocess.run(
        in_environment(tmp_path, "i.take_hold(); print(i.hold_fd is not None)"),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr
