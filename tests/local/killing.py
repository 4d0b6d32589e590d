"""A process that carries out one verb of an EnvManager and kills itself at a named step.

Run as a program, this is a server that has everything imported: for each line of JSON it forks a
child that performs a verb. A step is one change of the disk below the root by our own code, seen
through Python's audit events and SQLite's statements, before it happens: the disk is then as the
step before left it. `Killer`, below, is what tests use; uv's own steps are `FakeUv`'s business.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

#: The step after the verb has answered.
END = "the answer"

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
#: What differs each time, and what stands for it in the name of a step.
_NAMES = tuple(
    (re.compile(pattern), shown)
    for pattern, shown in (
        (r"^(scratch|trash)/[^/]+", r"\1/*"),
        (r"(\.ray_envs-(?:forgotten|mend)-)[0-9a-f]{32}", r"\1*"),
        (r"\b[0-9a-f]{32}\b", "KEY"),
        (r"^envs/default_", "envs/"),
        (r"/lib/python[^/]+/site-packages/", "/lib/"),
        (r"\.cpython-\d+\.pyc", ".pyc"),
        (r"\.pyc\.\d+$", ".pyc.*"),
        # Many changes that are one step, of which the first counts.
        (r"^(trash/\*|uv-cache/(?:wheels|sdists)-v\d+|envs/[^/]+/\.venv)/.*", r"\1/…"),
    )
)
#: Not the state of anything: locks, who has them, and what SQLite does below its statements; and
#: the new files of write_atomically, which are seen when they are renamed.
_NO_STATE = re.compile(r"(^|/)(?!uv\.lock$)([^/]*\.(lock|holder)|history\.db[^/]*|\..+\.\w{8})$")


class Steps:
    """Names every step below `root`; kills this process before the one that is to be the last."""

    def __init__(self, root: str, last: str, log: int) -> None:
        self._root, self._last, self._log = root + "/", last, log
        self._count: Counter[str] = Counter()
        self.has_begun = False

    def at(self, name: str) -> None:
        if not self.has_begun:
            return
        self._count[name] += 1
        count = self._count[name]
        numbered = name if count == 1 else f"{name} #{count}"
        if count == 1 or "…" not in name:
            os.write(self._log, f"{numbered}\n".encode())
        if numbered == self._last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Hear of the changes that this process makes; there is no way back."""
        sys.addaudithook(self._hear)
        steps, connect = self, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, values: Any = (), /) -> sqlite3.Cursor:
                name = _statement(" ".join(sql.split()), values)
                if name:
                    steps.at(name)
                return super().execute(sql, values)

        def traced(*args: Any, **given: Any) -> sqlite3.Connection:
            return connect(*args, **given, factory=Connection)

        setattr(sqlite3, "connect", traced)  # noqa: B010  # it is no plain assignment for mypy

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes) and args[2] & _WRITES:
            self._step("make", args[0], -1, is_new=True)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._step(event[3:], args[1], args[-1])
        elif event == "os.mkdir":
            self._step("mkdir", args[0], args[-1], is_new=True)
        elif event in ("os.rmdir", "os.remove"):
            self._step(event[3:], args[0], args[-1], is_new=False)

    def _step(self, what: str, path: Any, folder: Any, *, is_new: bool | None = None) -> None:
        """A step, unless it will fail: what `is_new` is not there yet, what is not is."""
        text = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        if not text.startswith(self._root) or is_new == os.path.lexists(text):
            return
        name = text.removeprefix(self._root)
        if os.path.isdir(os.path.dirname(text)) and not _NO_STATE.search(name):
            for pattern, shown in _NAMES:
                name = pattern.sub(shown, name)
            self.at(f"{what} {name}")


def _statement(sql: str, values: Any) -> str:
    if sql.startswith("INSERT INTO events"):
        return f"event {values['kind']}"
    if sql.startswith("INSERT INTO operations"):
        return f"row {values['status']}"
    return f"history {sql}" if sql in ("BEGIN IMMEDIATE", "COMMIT") else ""


def perform(job: dict[str, Any]) -> None:
    """Perform the verb of `job`, in this very process; its answer is written to a file."""
    import uv

    from ray_envs.cluster.nodes import LocalNodes
    from ray_envs.manager.manager import EnvManager
    from ray_envs.node.agent import NodeAgent

    os.environ.update(job["environ"])
    if job["uv"]:
        uv.find_uv_bin = lambda: job["uv"]
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    steps = Steps(job["settings"]["RAY_ENVS_ROOT"], job["last"], log)
    steps.watch()

    async def main() -> None:
        manager = EnvManager(settings=job["settings"], nodes=LocalNodes(NodeAgent))
        await manager.describe()
        steps.has_begun = True  # from here on there are only the steps of the verb
        await getattr(manager, job["verb"])(**job["arguments"])
        steps.at(END)
        await manager.stop()

    asyncio.run(main())


def serve() -> None:
    """Perform the jobs that stdin names, a child each: tells its pid, and how it ended."""
    import ray_envs.manager.manager  # noqa: F401  # a child has it already

    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            os.dup2(2, 1)
            perform(json.loads(line))
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Killer:
    """Performs verbs in processes that do not live long.

    Args:
        log: a file that this may use.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        settings: dict[str, str],
        verb: str,
        arguments: dict[str, Any],
        *,
        last: str = "",
        uv: str = "",
        environ: dict[str, str] | None = None,
        meanwhile: Callable[[int], None] = lambda pid: None,
    ) -> tuple[int, list[str]]:
        """Perform a verb in a process of its own; returns its exit code, and its steps.

        Args:
            settings: of the manager.
            verb: a method of EnvManager.
            arguments: what it is called with.
            last: the step before which the process kills itself; none by default.
            uv: the uv to use.
            environ: variables of the process.
            meanwhile: called with the pid while the process works.
        """
        job = {
            "settings": settings,
            "verb": verb,
            "arguments": arguments,
            "last": last,
            "uv": uv,
            "environ": environ or {},
            "log": str(self._log),
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._log.unlink(missing_ok=True)
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        try:
            meanwhile(pid)
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            code = int(self._server.stdout.readline())
        return code, self._log.read_text().splitlines()

    def close(self) -> None:
        self._server.communicate()


if __name__ == "__main__":
    serve()
