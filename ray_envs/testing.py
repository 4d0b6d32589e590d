"""Public test doubles: real things with stop points, never imitations of Ray.

`FakeUv` is an executable that runs the real uv, unless a test told it to fail or to stop. It logs
to files, so that any process may use it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import uv

#: How often a waiter looks again. Short against uv's own start.
_POLL_S = 0.01

#: The executable. `-IS`: isolated and without site, it starts in a few milliseconds.
_SCRIPT = """\
#!{python} -IS
import json, os, sys, time

FOLDER, REAL = {folder!r}, {real!r}


def take(rule, path):
    if rule["times"] is None:
        return True
    for number in range(rule["times"]):
        try:
            os.close(os.open("%s.%d" % (path, number), os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            pass
    return False


def stop(path):
    open(path + ".reached", "w").close()
    while not os.path.exists(path + ".go"):
        time.sleep({poll})


argv = sys.argv[1:]
line = json.dumps({{"pid": os.getpid(), "argv": argv}}) + "\\n"
log = os.open(FOLDER + "/calls.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
os.write(log, line.encode())
os.close(log)
for name in sorted(os.listdir(FOLDER + "/rules")):
    path = FOLDER + "/rules/" + name
    if not name.endswith(".json"):
        continue
    with open(path) as file:
        rule = json.load(file)
    if rule["command"] not in argv[:1] or rule["is_offline"] not in (None, "--offline" in argv):
        continue
    if not take(rule, path):
        continue
    code = os.spawnv(os.P_WAIT, REAL, [REAL, *argv]) if rule["is_done"] else None
    if rule["kind"] == "fail":
        sys.stderr.write(rule["stderr"])
        sys.exit(rule["exit_code"])
    if rule["is_done"]:
        stop(path)
        sys.exit(code)
    stop(path)
    break
os.execv(REAL, [REAL, *argv])
"""


@dataclass(frozen=True, slots=True)
class UvCall:
    """One start of the fake uv."""

    pid: int
    argv: tuple[str, ...]

    @property
    def command(self) -> str:
        return self.argv[0] if self.argv else ""

    @property
    def is_offline(self) -> bool:
        return "--offline" in self.argv


@dataclass(frozen=True, slots=True)
class StopPoint:
    """A place where the fake uv waits until it is told to go on, or killed."""

    reached: Path
    go: Path

    def wait(self, timeout_s: float = 60) -> None:
        """Return as soon as the fake uv has come here.

        Raises `TimeoutError`: it has not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not self.reached.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"uv did not come to {self.reached} within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def open(self) -> None:
        """Let everybody who waits here go on, now and later."""
        self.go.touch()


class FakeUv:
    """An executable that behaves like uv for `lock`, `sync` and the rest, except where told.

    Rules apply in the order in which they were given; each answers a limited number of calls.

    Args:
        folder: where the executable, its rules and its log live; made if missing.
        real: the uv to hand over to; by default the one of the `uv` package.

    Example:
        >>> fake = FakeUv(tmp_path)                            # doctest: +SKIP
        >>> fake.fail("sync", is_offline=False, stderr="error: connection reset")
        >>> Builder(settings, cache, uv_command=(str(fake.executable),))
    """

    def __init__(self, folder: Path, *, real: str | None = None) -> None:
        self._folder = folder
        self._numbers = count()
        (folder / "rules").mkdir(parents=True, exist_ok=True)
        self.executable = folder / "uv"
        self.executable.write_text(
            _SCRIPT.format(
                python=sys.executable,
                folder=str(folder),
                real=real or uv.find_uv_bin(),
                poll=_POLL_S,
            ),
            encoding="utf-8",
        )
        self.executable.chmod(0o755)

    def fail(
        self,
        command: str,
        *,
        is_offline: bool | None = None,
        times: int | None = 1,
        exit_code: int = 2,
        stderr: str = "error: the fake uv was told to fail\n",
        is_done: bool = False,
    ) -> None:
        """Answer `command` ("lock", "sync") with an error instead of doing it.

        Args:
            command: the first argument of the calls that are meant.
            is_offline: only calls with (true) or without (false) `--offline`.
            times: how many calls fail; None for all.
            exit_code: what uv ends with: 1 is an answer, 2 a failure.
            stderr: what uv says.
            is_done: do the work all the same, and fail after it.
        """
        self._rule(
            "fail",
            command,
            is_offline=is_offline,
            times=times,
            exit_code=exit_code,
            stderr=stderr,
            is_done=is_done,
        )

    def hang(
        self,
        command: str,
        *,
        is_offline: bool | None = None,
        times: int | None = 1,
        is_done: bool = False,
    ) -> StopPoint:
        """Stop in `command` until the returned point is opened.

        Args:
            command: the first argument of the calls that are meant.
            is_offline: only calls with (true) or without (false) `--offline`.
            times: how many calls stop; None for all.
            is_done: stop after the work, before uv ends, instead of before it.
        """
        path = self._rule("hang", command, is_offline=is_offline, times=times, is_done=is_done)
        return StopPoint(Path(f"{path}.reached"), Path(f"{path}.go"))

    def calls(self, command: str | None = None) -> list[UvCall]:
        """Every call so far, or those of one command, in the order in which they began."""
        try:
            text = (self._folder / "calls.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        told = (json.loads(line) for line in text.splitlines())
        calls = [UvCall(call["pid"], tuple(call["argv"])) for call in told]
        return [call for call in calls if command in (None, call.command)]

    def _rule(self, kind: str, command: str, **fields: object) -> Path:
        path = self._folder / "rules" / f"{next(self._numbers):04}.json"
        path.write_text(json.dumps({"kind": kind, "command": command, **fields}), encoding="utf-8")
        return path


__all__ = ["FakeUv", "StopPoint", "UvCall"]
