"""Checks that a Ray worker can start in an environment, before any task is sent there.

Ray starts a worker that dies at its start again for ever, without an error. The check imports what
Ray's worker imports, which takes half a second. It is left out where a worker has started before
from the same files: most environments of a node share Ray and all that Ray needs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from ray_envs.cluster.ray_versions import WORKER_MODULE
from ray_envs.disk.files import write_atomically
from ray_envs.errors import WorkerCannotStart
from ray_envs.node.interpreter import base_python
from ray_envs.node.startup import run_clean
from ray_envs.settings import Settings
from ray_envs.validation import Model
from ray_envs.worker import starting
from ray_envs.worker.hold import INSTALLED_AS

#: How long the imports may take, in seconds: a busy machine with a cold disk needs some.
_TIMEOUT_S = 180.0
#: How many different starts a node remembers.
_KEPT = 16
#: How many lines of a failure are told.
_TOLD = 12
#: Python imports them by itself at each start, before anything could note it.
_AT_EVERY_START = ("sitecustomize", "usercustomize")


class _Start(Model):
    """What the imports of a worker that started have read."""

    python: str
    #: Relative to site-packages.
    files: tuple[str, ...]
    #: Modules that were looked for and are not there.
    nowhere: tuple[str, ...]
    #: Of the identity of each file, and of all `.pth` files.
    digest: str


class _Starts(Model):
    starts: tuple[_Start, ...] = ()


class WorkerStart:
    """The starts of workers on one node that went well, kept below its root."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._file = settings.root / "worker-starts.json"

    async def check(
        self,
        python: Path,
        site_packages: Path,
        *,
        env_vars: dict[str, str] | None = None,
        is_forced: bool = False,
    ) -> None:
        """Check that a worker can start with the interpreter `python`.

        Args:
            python: the interpreter of the environment.
            site_packages: its packages.
            env_vars: the variables that the worker gets. With any, nothing is left out.
            is_forced: leave nothing out.

        Raises:
            WorkerCannotStart: an import fails; `detail` has the end of its traceback.
            UvFailed: the imports take longer than three minutes.
        """
        known = self._known()
        if not env_vars and not is_forced and any(_fits(each, site_packages) for each in known):
            return
        ended = await run_clean(
            self._settings,
            [str(python), "-c", inspect.getsource(starting), str(site_packages), WORKER_MODULE],
            site_packages,
            timeout_s=_TIMEOUT_S,
            hint="is this machine overloaded? The imports of Ray's worker take a second as a rule",
            environ=env_vars,
        )
        if ended.code:
            raise WorkerCannotStart(
                "Ray's worker cannot start in the environment",
                detail=_end_of(ended.output),
                hint=_hint(ended.output, env_vars),
            )
        if not env_vars:
            self._remember(json.loads(ended.output.splitlines()[-1]), site_packages, known)

    def _known(self) -> tuple[_Start, ...]:
        try:
            return _Starts.model_validate_json(self._file.read_bytes()).starts
        except (OSError, ValidationError):  # none yet; or of another version
            return ()

    def _remember(
        self, told: dict[str, list[str]], site_packages: Path, known: tuple[_Start, ...]
    ) -> None:
        files = [name for name in told["files"] if not name.startswith(INSTALLED_AS)]
        digest = _digest(site_packages, files)
        if digest is None:
            return
        start = _Start(
            python=base_python(), files=tuple(files), nowhere=tuple(told["nowhere"]), digest=digest
        )
        starts = _Starts(starts=(start, *(each for each in known if each != start))[:_KEPT])
        with suppress(OSError):  # a full disk: the next environment is checked, too
            write_atomically(self._file, starts.model_dump_json(), is_durable=False)


def _fits(start: _Start, site_packages: Path) -> bool:
    """Whether a worker that starts in `site_packages` reads the same files as `start`."""
    if start.python != base_python():
        return False
    names = {name.partition(".")[0] for name in os.listdir(site_packages)}
    if names & {*start.nowhere, *_AT_EVERY_START}:  # what was not there is there
        return False
    return _digest(site_packages, start.files) == start.digest


def _digest(site_packages: Path, files: list[str] | tuple[str, ...]) -> str | None:
    """Return a hash of the identities of `files` and of the `.pth` files; None if one is missing.

    Environments link to uv's cache: the same file has the same inode in each of them.
    """
    hashed = hashlib.sha256()
    try:
        for name in files:
            found = os.stat(site_packages / name)
            identity = (name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            hashed.update(repr(identity).encode())
        for path in sorted(site_packages.glob("*.pth")):
            hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError:
        return None
    return hashed.hexdigest()


def _end_of(output: str) -> str:
    """The last lines of a traceback, without those of Python's own import system."""
    told = [line for line in output.splitlines() if '"<frozen ' not in line and line.strip()]
    return "\n".join(told[-_TOLD:])


def _hint(output: str, env_vars: dict[str, str] | None) -> str:
    if env_vars:
        return f"do env_vars {', '.join(sorted(env_vars))} break it? change or remove them"
    missing = re.findall(r"No module named '([\w.]+)'", output)
    if missing:
        return (
            f"Ray needs {missing[-1].partition('.')[0]}: do not exclude it "
            "(exclude-dependencies, overrides), or add it to the packages"
        )
    if "cannot open shared object file" in output:
        return "install the system library that the error names on this node"
    return "change the package that the error names; Ray's worker imports it when it starts"
