"""Finds Ray's workers that end before they have registered: Ray starts them again for ever.

A worker tells its start with a file (`worker.hold`): in its name stand the Ray node, the start id
of its runtime_env, and its process. A worker that has registered has a log of its own in Ray's
folder of logs.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_envs.worker.hold import STARTS

#: How many starts in a row may fail where no check finds a reason: a job may have ended meanwhile.
MANY = 3
#: A file that nobody has read for so long is of a node that is gone.
_FORGOTTEN_S = 3600.0
#: How many lines of a log are quoted.
_TOLD = 12
_MOST_BYTES = 64 * 1024


@dataclass(slots=True)
class Failures:
    """The failed starts of one runtime_env, in a row."""

    key: str
    pids: list[int] = field(default_factory=list)


class FailedStarts:
    """The starts of workers on one Ray node. `logs` is Ray's folder of logs there."""

    def __init__(self, root: Path, node_id: str, logs: Path, *, patience_s: float) -> None:
        self._folder = root / STARTS
        self._node_id = node_id
        self._logs = logs
        #: After so long, a process that lives and has not registered counts as failed.
        self._patience_s = patience_s
        self._failures: dict[str, Failures] = {}

    def set_up(self) -> bool:
        """Make the folder for the files. False: this Ray's workers have no logs of their own."""
        if not self._has_log(os.getpid(), 0.0, self._names()):
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        return True

    def look(self) -> dict[str, Failures]:
        """Return, by start id, all failed starts in a row where one was added since the last look.

        Deletes the files of the starts that are decided, and those of nodes that are gone.
        """
        # First the processes, then the logs: a worker that registers has its log before it ends.
        ended = [each for path in self._files() if (each := self._waited(path)) is not None]
        names = self._names() if ended else []
        found = {}
        for path, began_at, is_over in ended:
            _, start, pid = path.name.split(".")
            if self._has_log(int(pid), began_at, names):
                self._failures.pop(start, None)
            elif is_over:
                failures = self._failures.setdefault(start, Failures(start.partition("-")[0]))
                failures.pids.append(int(pid))
                found[start] = failures
            else:
                continue
            with suppress(OSError):
                path.unlink()
        return found

    def said(self, pids: list[int]) -> str:
        """Return the end of what Ray has logged of the youngest of these workers, or ""."""
        for pid in reversed(pids):
            for name in self._names():
                if name.startswith("python-core-worker-") and name.endswith(f"_{pid}.log"):
                    return f"{name}:\n{_end_of(self._logs / name)}"
        return ""

    def _files(self) -> list[Path]:
        """Return the files of this node's starts; delete the old ones of other nodes."""
        mine = []
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                node_id, *rest = entry.name.split(".")
                if node_id == self._node_id and len(rest) == 2 and rest[1].isdigit():
                    mine.append(Path(entry.path))
                else:
                    with suppress(OSError):
                        if time.time() - entry.stat().st_mtime > _FORGOTTEN_S:
                            os.unlink(entry.path)
        return mine

    def _waited(self, path: Path) -> tuple[Path, float, bool] | None:
        """Return a start, when it began, and whether it has failed unless there is a log."""
        try:
            began_at = path.stat().st_mtime
        except OSError:
            return None
        is_late = abs(time.time() - began_at) > self._patience_s
        return path, began_at, is_late or not _lives(int(path.name.rpartition(".")[2]))

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._logs)
        except OSError:
            return []

    def _has_log(self, pid: int, began_at: float, names: list[str]) -> bool:
        """Whether Ray has a log of that worker. Process ids come back, with an older log."""
        for name in names:
            if name.startswith("worker-") and name.endswith(f"-{pid}.out"):
                with suppress(OSError):
                    # File systems round time stamps.
                    if (self._logs / name).stat().st_mtime >= began_at - 2:
                        return True
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _end_of(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _MOST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TOLD:])
