"""Durable files: the old content or the new, and locks that end with their process."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ray_envs.disk.files import locked, storage_errors, write_atomically
from ray_envs.errors import LockTimeout, StorageFailed

#: Takes the lock argv[1], says so, and keeps it until it is killed.
HOLDER = """\
import asyncio, sys, time
from pathlib import Path
from ray_envs.disk.files import locked

async def main():
    async with locked(Path(sys.argv[1]), what="it", timeout_s=10):
        print("locked", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


@contextmanager
def another_process_that_locks(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_file_is_written_whole_for_everybody_and_leaves_no_scratch(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for text in ("old", "new ü"):
        write_atomically(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace"])
def test_a_failure_on_any_line_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "record.json"
    write_atomically(file, "old")

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"ray_envs.disk.files.os.{step}", fails)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "f"
    texts = ["a" * 100_000, "b" * 100_000]
    write_atomically(file, texts[0])
    writer = """\
import sys
from pathlib import Path
from ray_envs.disk.files import write_atomically
for i in range(100):
    write_atomically(Path(sys.argv[1]), "ba"[i % 2] * 100_000)
"""
    with subprocess.Popen([sys.executable, "-c", writer, str(file)]) as process:
        while process.poll() is None:
            assert file.read_text() in texts
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "writable"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "a file stands"),
        (errno.ENOSYS, "local disk"),
        (errno.EIO, "ray-envs status"),
    ],
)
def test_an_error_of_the_system_says_what_was_done_to_what_and_what_helps(
    code: int, hint: str
) -> None:
    with pytest.raises(StorageFailed) as caught, storage_errors("write the record"):
        raise OSError(code, os.strerror(code), "/some/file")
    assert caught.value.message == f"cannot write the record: /some/file {os.strerror(code)}"
    assert hint in caught.value.hint


def test_an_error_of_the_system_without_a_file_reads_well_too() -> None:
    with pytest.raises(StorageFailed) as caught, storage_errors("write the record"):
        raise OSError("odd")
    assert caught.value.message == "cannot write the record: odd"


def test_one_process_at_a_time_and_one_task_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    inside: list[int] = []
    most = 0

    async def use(number: int) -> None:
        nonlocal most
        async with locked(path, what="it", timeout_s=30):
            inside.append(number)
            most = max(most, len(inside))
            await asyncio.sleep(0)
            inside.remove(number)

    async def all_of_them() -> None:
        await asyncio.gather(*(use(number) for number in range(5)))

    asyncio.run(all_of_them())
    assert most == 1
    assert path.exists()  # it stays: a waiter may have it open already


def test_whoever_waits_in_vain_is_told_the_pid_of_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"

    async def wait() -> None:
        async with locked(path, what="variant v", timeout_s=0.2):
            pytest.fail("two processes held one lock")

    with another_process_that_locks(path) as holder:
        with pytest.raises(LockTimeout) as caught:
            asyncio.run(wait())
        assert f"variant v is being changed by process {holder.pid} on " in caught.value.message
        assert "0.2 s" in caught.value.message
        assert "RAY_ENVS_LOCK_TIMEOUT_S" in caught.value.hint
        assert caught.value.retryable


def test_a_lock_ends_with_kill_9_of_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"

    async def take() -> str:
        async with locked(path, what="it", timeout_s=5):
            return path.with_name("x.lock.holder").read_text()

    with another_process_that_locks(path) as holder:
        holder.kill()
        holder.wait()
        assert json.loads(asyncio.run(take()))["pid"] == os.getpid()


def test_a_waiter_gets_the_lock_as_soon_as_the_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"

    async def main(holder: subprocess.Popen[str]) -> None:
        async def take() -> None:
            async with locked(path, what="it", timeout_s=30):
                pass

        waiting = asyncio.create_task(take())
        await asyncio.sleep(0)
        assert not waiting.done()
        holder.kill()
        await waiting

    with another_process_that_locks(path) as holder:
        asyncio.run(main(holder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "7"])
def test_a_damaged_holder_file_never_hides_the_time_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.lock"

    async def wait() -> None:
        async with locked(path, what="it", timeout_s=0):
            pytest.fail("two processes held one lock")

    with another_process_that_locks(path):
        path.with_name("x.lock.holder").write_text(text)
        with pytest.raises(LockTimeout, match=re.escape("by another process")):
            asyncio.run(wait())


def test_a_lock_is_free_again_after_an_error_inside(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"

    async def use(*, fails: bool) -> None:
        async with locked(path, what="it", timeout_s=0):
            if fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(use(fails=True))
    asyncio.run(use(fails=False))


def test_a_waiter_that_is_cancelled_leaves_the_lock_free(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"

    async def use(timeout_s: float) -> None:
        async with locked(path, what="it", timeout_s=timeout_s):
            pass

    async def main() -> None:
        async with locked(path, what="it", timeout_s=0):
            waiting = asyncio.create_task(use(30))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        await use(0)

    asyncio.run(main())


def test_a_lock_in_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def use() -> None:
        async with locked(tmp_path / "file" / "x.lock", what="variant v", timeout_s=0):
            pytest.fail("locked")

    with pytest.raises(StorageFailed, match="cannot lock variant v"):
        asyncio.run(use())
