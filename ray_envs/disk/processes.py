"""Runs one child process to its end.

A child has a time limit, a process group and a low priority, and dies with this process. Its output
comes line by line, without credentials. `uv` and `bytecode` know the commands and their exit codes.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envs.decisions.credentials import redacted
from ray_envs.errors import StorageFailed, UvFailed

_DETAIL_LINES = 40
#: How much of a child's output is read at once, in bytes.
_CHUNK = 65536
_PR_SET_PDEATHSIG = 1

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended."""

    code: int
    #: What it wrote to stdout and stderr, without credentials.
    output: str


async def run(
    command: list[str],
    cwd: Path,
    *,
    timeout_s: float,
    niceness: int,
    environ: Mapping[str, str] | None = None,
    stdin: str = "",
    on_line: Progress | None = None,
    hint: str = "",
    secrets: Collection[str] = (),
) -> Ended:
    """Run `command` to its end, whatever its exit code.

    Args:
        command: the executable and its arguments.
        cwd: the folder it works in.
        timeout_s: after so many seconds the whole process group is killed.
        niceness: added to its niceness.
        environ: all its environment variables; by default those of this process.
        stdin: its standard input.
        on_line: called with each line as it comes.
        hint: what to change if it did not end in time.
        secrets: what its output must not show, besides what looks like a credential.

    Raises:
        StorageFailed: it cannot be started.
        UvFailed: it did not end in time; `detail` has its last lines.
    """
    process = await _started(command, cwd, environ, niceness, has_input=bool(stdin))
    lines: list[str] = []
    tell = _teller(lines, on_line, secrets)
    try:
        await asyncio.wait_for(_talk(process, stdin, tell), timeout_s)
    except (TimeoutError, asyncio.TimeoutError):
        raise UvFailed(
            f"{os.path.basename(command[0])} did not end within {timeout_s:g} s",
            detail=last_words("\n".join(lines)),
            hint=hint,
        ) from None
    finally:
        await _end_group(process)
    assert process.returncode is not None
    return Ended(process.returncode, "\n".join(lines))


async def _started(
    command: list[str],
    cwd: Path,
    environ: Mapping[str, str] | None,
    niceness: int,
    *,
    has_input: bool,
) -> asyncio.subprocess.Process:
    """Start a child in a group of its own. Raises `StorageFailed`: it cannot be started."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            cwd=cwd,
            env=environ,
            stdin=asyncio.subprocess.PIPE if has_input else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dying_with_parent(niceness),
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:  # asyncio would kill the child, but not its own children
        await _end_group(await starting)
        raise
    except OSError as exc:
        raise StorageFailed(f"cannot start {command[0]}: {exc.strerror}") from exc


def _teller(
    lines: list[str], on_line: Progress | None, secrets: Collection[str]
) -> Callable[[bytes], None]:
    """Return what takes each line of a child: it is kept and told without secrets."""

    def tell(raw: bytes) -> None:
        line = redacted(raw.decode("utf-8", "replace").rstrip(), secrets)
        lines.append(line)
        if on_line is not None:
            on_line(line)

    return tell


async def _talk(
    process: asyncio.subprocess.Process, stdin: str, tell: Callable[[bytes], None]
) -> None:
    """Write to the child, tell each of its lines, and return when it has ended."""
    if process.stdin is not None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it ended before it read all
            process.stdin.write(stdin.encode())
            await process.stdin.drain()
        process.stdin.close()
    assert process.stdout is not None
    rest = b""
    while chunk := await process.stdout.read(_CHUNK):
        *whole, rest = (rest + chunk).split(b"\n")
        for raw in whole:
            tell(raw)
    if rest:
        tell(rest)
    await process.wait()


async def _end_group(process: asyncio.subprocess.Process) -> None:
    """Kill a child that still runs, with its group: uv's build backends too."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def last_words(output: str) -> str:
    """Return the last lines of a child, without those in which uv names its interpreter."""
    lines = [line for line in output.splitlines() if line and not line.startswith("Using CPython")]
    return "\n".join(lines[-_DETAIL_LINES:])


def dying_with_parent(niceness: int) -> Callable[[], None]:
    """Return what the child does first: it lowers its priority, and asks to die with its parent."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died between fork and prctl
                os._exit(1)
        os.nice(niceness)

    return prepare
