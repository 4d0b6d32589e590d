"""Child processes: their words come back whole and clean, and none outlives its time or parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_envs.disk import processes
from ray_envs.disk.processes import Ended
from ray_envs.errors import StorageFailed, UvFailed
from tests.local.conftest import wait_until

#: How long a child may take where a test does not wait for it to be killed.
LONG_S = 60.0


def run(script: str, cwd: Path, **options: Any) -> Ended:
    """What becomes of a shell script."""
    given = {"timeout_s": LONG_S, "niceness": 0, **options}
    return asyncio.run(processes.run(["/bin/sh", "-c", script], cwd, **given))


def is_gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


def pid_in(file: Path) -> int:
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), f"{file} is written")
    return int(file.read_text())


def timed_out(script: str, cwd: Path, **options: Any) -> UvFailed:
    """The error of a script that runs for ever, with enough time to write the file `pid`."""
    for timeout_s in (0.5, 2, 8, 32):
        with pytest.raises(UvFailed, match=f"sh did not end within {timeout_s:g} s") as caught:
            run(script, cwd, timeout_s=timeout_s, **options)
        if (cwd / "pid").exists():
            return caught.value
    raise TimeoutError(f"the shell does not even begin: {script}")


def test_a_child_tells_its_exit_code_and_all_its_words(tmp_path: Path) -> None:
    lines: list[str] = []
    ended = run("echo out; echo err >&2; cat; pwd; exit 3", tmp_path, stdin="in\n",
                on_line=lines.append)  # fmt: skip
    assert ended == Ended(3, f"out\nerr\nin\n{tmp_path.resolve()}")
    assert lines == ended.output.splitlines()


def test_a_child_has_the_variables_that_it_is_given_and_no_others(tmp_path: Path) -> None:
    assert run('echo "$A-$HOME"', tmp_path, environ={"A": "1"}).output == "1-"


def test_a_child_is_nicer_than_its_parent(tmp_path: Path) -> None:
    own = os.nice(0)
    assert run("nice", tmp_path, niceness=3).output == str(min(own + 3, 19))


def test_lines_come_while_the_child_still_works(tmp_path: Path) -> None:
    def answer(line: str) -> None:
        (tmp_path / "go").touch()

    script = "echo first; while ! [ -e go ]; do sleep 0.02; done; echo last"
    assert run(script, tmp_path, on_line=answer).output == "first\nlast"


@pytest.mark.parametrize("size", [2**16 - 1, 2**16 + 1, 2**20])
def test_a_line_may_have_any_length(tmp_path: Path, size: int) -> None:
    ended = run(f"head -c {size} /dev/zero | tr '\\0' x; echo; printf end", tmp_path)
    assert [len(line) for line in ended.output.splitlines()] == [size, 3]


def test_a_child_that_reads_nothing_or_ends_early_is_no_failure(tmp_path: Path) -> None:
    assert run("exit 0", tmp_path, stdin="x\n" * 2**20) == Ended(0, "")


def test_credentials_are_gone_from_lines_words_and_errors(tmp_path: Path) -> None:
    lines: list[str] = []
    speaks = "echo 'at http://user:pa55w0rd@h/x'"
    error = timed_out(f"{speaks}; echo $$ >pid; exec sleep 600", tmp_path, hint="wait")
    assert (error.detail, error.hint) == ("at http://***@h/x", "wait")
    assert run(speaks, tmp_path, on_line=lines.append).output == "at http://***@h/x"
    assert lines == ["at http://***@h/x"]


def test_a_whole_group_is_killed_when_its_time_is_over(tmp_path: Path) -> None:
    timed_out("sleep 600 & echo $! >pid; wait", tmp_path)
    child = pid_in(tmp_path / "pid")
    # The signal was sent to it with the others; when the kernel delivers it is not ours to say.
    wait_until(lambda: is_gone(child), f"the end of {child}")


def test_a_whole_group_is_killed_when_its_caller_is_cancelled(tmp_path: Path) -> None:
    async def main() -> None:
        script = "sleep 600 & echo $! >pid; wait"
        task = asyncio.create_task(
            processes.run(["/bin/sh", "-c", script], tmp_path, timeout_s=LONG_S, niceness=0)
        )
        await asyncio.to_thread(pid_in, tmp_path / "pid")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    child = pid_in(tmp_path / "pid")
    wait_until(lambda: is_gone(child), f"the end of {child}")


def test_a_whole_group_is_killed_when_its_caller_is_cancelled_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child runs, and its caller has not heard of it yet."""
    create, tasks = asyncio.create_subprocess_exec, list[asyncio.Task[Any]]()

    async def create_slowly(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await create(*command, **options)
        await asyncio.to_thread(pid_in, tmp_path / "pid")
        tasks[0].cancel()
        await asyncio.sleep(0)
        return process

    async def main() -> None:
        script = "sleep 600 & echo $! >pid; wait"
        running = processes.run(["/bin/sh", "-c", script], tmp_path, timeout_s=LONG_S, niceness=0)
        tasks.append(asyncio.create_task(running))
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create_slowly)
    asyncio.run(main())
    child = pid_in(tmp_path / "pid")
    wait_until(lambda: is_gone(child), f"the end of {child}")


PARENT = """\
import asyncio, sys
from pathlib import Path
from ray_envs.disk import processes
command = ["/bin/sh", "-c", "echo $$ >pid; exec sleep 600"]
asyncio.run(processes.run(command, Path(sys.argv[1]), timeout_s=600, niceness=0))
"""


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)]) as parent:
        child = pid_in(tmp_path / "pid")
        parent.send_signal(signal.SIGKILL)
    try:
        wait_until(lambda: is_gone(child), f"the end of {child}")
    finally:
        if not is_gone(child):
            os.kill(child, signal.SIGKILL)


def test_a_command_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"cannot start /no/such: No such file"):
        asyncio.run(processes.run(["/no/such"], tmp_path, timeout_s=LONG_S, niceness=0))


def test_last_words_are_the_last_lines_without_the_interpreter() -> None:
    text = "Using CPython 3.11.7 interpreter at: x\n\n" + "\n".join(map(str, range(99)))
    assert processes.last_words(text).splitlines() == [str(n) for n in range(59, 99)]
    assert processes.last_words("Using CPython 3.11.7\nno\n") == "no"
