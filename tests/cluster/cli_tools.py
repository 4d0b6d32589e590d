"""`ray-envs` as a shell starts it: whole processes, found again by a mark in their environment.

A mark is inherited by everything that a process starts, also by what survives it and has another
parent. So a test can say of a command that nothing of it is left, and end only what is its own.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest
import tomlkit

from ray_envs.manager.registry import Registry
from ray_envs.node.store import Store
from ray_envs.settings import Settings

#: Where this Python's own commands are: `ray-envs`, `ray`, `uv`.
BIN = Path(sys.executable).parent

_MARK = "CLI_TEST_MARK"
#: What a user's shell would not have set; each is given by the test that means it.
_NOT_INHERITED = ("RAY_", "UV_", "PYTHON", "VIRTUAL_ENV", "COLUMNS", "NO_COLOR", "FORCE_COLOR")

#: The module of `write_batch`: says what it sees, and does as its case says.
PAYLOAD = '''
import os, pathlib, time

def look(word, folder=None, **rest):
    """Prints to both streams, counts its calls in `folder`, fails or waits as files there say."""
    import sys
    print("printed by", word)
    print("warned by", word, file=sys.stderr)
    if folder is not None:
        place = pathlib.Path(folder)
        place.joinpath(f"call-{word}-{time.time_ns()}-{os.getpid()}").touch()
        if place.joinpath(f"break-{word}").exists():
            raise ValueError(f"{word} is broken")
        while place.joinpath(f"hold-{word}").exists():
            time.sleep(0.02)
    try:
        import six
    except ImportError:
        import tabulate as six
    return {"score": 1, "saw": six.__version__, "word": word}
'''


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float

    def data(self) -> Any:
        """All of stdout as the one JSON document that it must be."""
        return json.loads(self.out)

    def check_refusal(self, code: int, *words: str) -> None:
        """It ended as a command does that was refused for a reason: in plain words, on stderr."""
        assert self.code == code, (self.code, self.err)
        assert self.out == ""
        missing = [word for word in words if word not in self.err]
        assert not missing, f"no {missing} in:\n{self.err}"
        self.check_plain()

    def check_plain(self) -> None:
        """Nothing in its output is Python's own."""
        for text in ("Traceback", 'File "/', "pydantic", "RayTaskError"):
            assert text not in self.err + self.out, self.err + self.out


def wait_until(
    holds: Callable[[], Any], what: str | Callable[[], str], *, within_s: float = 30
) -> None:
    """Return as soon as `holds()`; fail with `what` after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            said = what if isinstance(what, str) else what()
            pytest.fail(f"not within {within_s:g} s: {said}")
        time.sleep(0.02)


def processes_with(*marks: str) -> list[psutil.Process]:
    """Every living process that was started, however indirectly, with one of `marks`."""
    found = []
    wanted = {mark.encode() for mark in marks}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError, psutil.Error):
                # a zombie has no environment any more
                if wanted & set(Path(entry.path, "environ").read_bytes().split(b"\0")):
                    found.append(psutil.Process(int(entry.name)))
    return found


def described(processes: Iterable[psutil.Process]) -> list[str]:
    texts = []
    for process in processes:
        with suppress(psutil.Error):
            texts.append(f"{process.pid} {' '.join(' '.join(process.cmdline()).split())[:120]}")
    return texts


def at_most(size_bytes: int) -> Sequence[str]:
    """Words to put before a command that a defect could make read without an end."""
    return ["prlimit", f"--as={size_bytes}", "--"]


class Shell:
    """Starts `ray-envs` and other commands the way a user does, each group with a mark of its own.

    Args:
        root: RAY_ENVS_ROOT.
        ray_tmp: RAY_TMPDIR: no Ray of another user of this machine is found.
        cwd: where commands are started.
        bin_folder: where `ray-envs` is.
        owns_ray_tmp: whether all that uses `ray_tmp` belongs to this shell.
        variables: set for every command.
    """

    def __init__(
        self,
        root: Path,
        ray_tmp: Path,
        cwd: Path,
        *,
        bin_folder: Path = BIN,
        variables: Mapping[str, str] | None = None,
        owns_ray_tmp: bool = True,
    ) -> None:
        self.owns_ray_tmp = owns_ray_tmp
        self.root, self.ray_tmp, self.cwd = root, ray_tmp, cwd
        self._mark = uuid.uuid4().hex
        self._bin = bin_folder
        self._variables = dict(variables or {})

    def environ(self, **more: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
        return {
            **inherited,
            "RAY_ENVS_ROOT": str(self.root),
            "RAY_TMPDIR": str(self.ray_tmp),
            _MARK: self._mark,
            **self._variables,
            **more,
        }

    def start(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """`ray-envs WORDS…` in a process group of its own, as in a terminal."""
        return self.command(
            [self._bin / "ray-envs", *words], cwd=cwd, variables=variables, **options
        )

    def command(
        self,
        words: Sequence[object],
        *,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        process: subprocess.Popen[str] = subprocess.Popen(
            [str(word) for word in words],
            cwd=cwd or self.cwd,
            env=self.environ(**(variables or {})),
            text=True,
            start_new_session=True,
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                **options,
            },
        )
        with suppress(OSError):
            # Where a defect takes all memory, the kernel ends this and not somebody else's process.
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        return process

    def __call__(self, *words: str | Path, within_s: float = 90, **options: Any) -> Ended:
        """`ray-envs WORDS…`, once it has ended; it is killed after `within_s` seconds."""
        began = time.monotonic()
        return ended(self.start(*words, **options), within_s=within_s, began=began)

    # -- what must be true of a root ---------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """What lives of all its commands, whoever its parent is now."""
        # Two marks: a process that gives itself a title overwrites part of its environment.
        return processes_with(f"{_MARK}={self._mark}", *self._ray_marks())

    def _ray_marks(self) -> list[str]:
        return [f"RAY_TMPDIR={self.ray_tmp}"] if self.owns_ray_tmp else []

    def check_idle(self, *, within_s: float = 30, but: Sequence[str] = ()) -> None:
        """Nothing is left of its commands, but processes with a title in `but`."""

        def left() -> list[str]:
            return [
                text
                for text in described(self.processes())
                if text.split()[1:2] not in [[name] for name in but]
            ]

        wait_until(lambda: not left(), lambda: f"the end of {left()}", within_s=within_s)

    def started_ray(self) -> bool:
        """Whether any of its commands has begun to start a Ray."""
        return self.ray_tmp.is_dir() and any(self.ray_tmp.iterdir())

    def variants(self) -> list[str]:
        return [str(record.env_id) for record in Registry(self._settings).all()]

    def held(self, key: str) -> bool:
        return Store(self._settings).is_held(key)

    @property
    def _settings(self) -> Settings:
        return Settings(root=self.root)


def ended(
    process: subprocess.Popen[str],
    *,
    within_s: float = 90,
    began: float | None = None,
    stdin: str | None = None,
) -> Ended:
    """How `process` ended; it and its group are killed after `within_s` seconds."""
    start = time.monotonic() if began is None else began
    try:
        out, err = process.communicate(stdin, timeout=within_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {within_s:g} s; it said\n{out}\n{err}")
    return Ended(process.returncode, out, err, time.monotonic() - start)


def write_batch(
    folder: Path,
    variants: Sequence[Mapping[str, Any]],
    cases: Sequence[str],
    *,
    calls: Path | None = None,
    name: str = "tiny",
    **more: Any,
) -> Path:
    """A batch file with its payload in `folder`; see `PAYLOAD` for what its cases do."""
    folder.mkdir(exist_ok=True)
    (folder / "payload.py").write_text(PAYLOAD)
    given = {} if calls is None else {"folder": str(calls)}
    batch = {
        "name": name,
        "entrypoint": "payload:look",
        "code": ".",
        **more,
        "variants": [dict(variant) for variant in variants],
        "cases": [{"id": word, "kwargs": {"word": word, **given}} for word in cases],
    }
    path = folder / "batch.toml"
    path.write_text(tomlkit.dumps(batch))
    return path


def calls_in(folder: Path, word: str) -> int:
    """How often the payload was called with `word`."""
    return len(list(folder.glob(f"call-{word}-*")))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The items of a results file, each line of which must be whole."""
    text = path.read_text()
    assert text.endswith("\n"), text[-200:]
    return [json.loads(line) for line in text.splitlines()]


class WatchedUv:
    """A virtual environment whose `uv` tells of each start, and can be made to wait.

    `uv.find_uv_bin` looks first beside the running interpreter: a `uv` there is the one that the
    product starts, in every process that has this interpreter, workers and actors too. All else
    is that of the tests' own environment.
    """

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self._starts = folder / "uv-starts"
        self._gate = folder / "gate"
        self._waiting = folder / "waiting"
        self.bin.mkdir(parents=True)
        home = Path(os.path.realpath(sys.executable))
        (self.bin / "python").symlink_to(home)
        (folder / "pyvenv.cfg").write_text(f"home = {home.parent}\n")
        site = folder / f"lib/python3.{sys.version_info.minor}/site-packages"
        site.mkdir(parents=True)
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "tests.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        self._script("ray-envs", (BIN / "ray-envs").read_text().split("\n", 1)[1])
        starts, gate, waiting, uv = map(
            shlex.quote, map(str, (self._starts, self._gate, self._waiting, BIN / "uv"))
        )
        path = self.bin / "uv"
        path.write_text(
            f'#!/bin/sh\necho "$*" >> {starts}\n'
            f'if [ "$1" = sync ] && [ -e {gate} ]; then echo $$ > {waiting}; fi\n'
            f'while [ "$1" = sync ] && [ -e {gate} ]; do sleep 0.05; done\n'
            f'exec {uv} "$@"\n'
        )
        path.chmod(0o755)

    def _script(self, name: str, rest: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{self.bin / 'python'}\n{rest}")
        path.chmod(0o755)

    def starts(self) -> list[str]:
        """The arguments of every uv since the last `forget`."""
        return self._starts.read_text().splitlines() if self._starts.exists() else []

    def forget(self) -> None:
        self._starts.unlink(missing_ok=True)

    def shut_gate(self) -> None:
        """From now on every `uv sync` waits, before it does anything."""
        self._waiting.unlink(missing_ok=True)
        self._gate.touch()

    def open_gate(self) -> None:
        self._gate.unlink(missing_ok=True)

    def is_waiting(self) -> bool:
        return self._waiting.exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
