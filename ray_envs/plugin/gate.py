"""The files through which the plugin and our agent on the same node communicate.

The plugin is no Ray client: it asks for an environment with a file. The answer is the environment's
record, or a refusal. Standard library only: a failing import in Ray's process would stop the node.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray_envs.errors import InvalidId, InvalidInput

#: The field of a runtime_env that is ours, and the name of the plugin.
FIELD = "ray_envs"
PLUGIN = "ray_envs.plugin.EnvironmentPlugin"
#: Ray reads it when a node starts.
PLUGINS_VARIABLE = "RAY_RUNTIME_ENV_PLUGINS"

#: The same pattern as `models.Key`, which needs pydantic.
_KEY = re.compile(r"[0-9A-Za-z_-]{1,64}")
#: A request that was not renewed for so long is dropped: its process is dead.
_ASKED_S = 60
#: A refusal is dropped after so long, as Ray drops its own: attempts may start again from 0.
_REFUSED_S = 600
_REFUSED = ".refused"
#: The most that is read of a file: ours are short, but other users may write here too. And the
#: longest reason that is written, so that it can be read.
_MOST_BYTES = 2**16
_MOST_OF_REASON = 10_000
#: The same for a record, which names every package.
_MOST_OF_RECORD = 2**24
#: Its time stamp is the last look of an agent. Keys have no dots.
_SERVED = ".served"
#: Begins each reason of the plugin, so that `reason_in` finds it in Ray's message.
_MARK = "ray_envs: "


@dataclass(frozen=True, slots=True)
class Wish:
    """What one runtime_env needs on the node where it lands."""

    root: Path
    key: str
    #: Rises after each failure, repair or collection: Ray keeps the result of an equal dict.
    attempt: int


class Gate:
    """The files of one node: `wanted/<key>` is a request, `wanted/<key>.refused` a refusal.

    Many processes may request a key at once: the latest attempt counts. If one withdraws the
    request, another that still waits writes it again.
    """

    def __init__(self, root: Path) -> None:
        self._wanted = root / "wanted"
        self._store = root / "store"

    def ask(self, key: str, attempt: int) -> None:
        """Request `key`, or renew the request.

        Raises:
            InvalidId: `key` is not a key.
            OSError: the root cannot be made or written.
        """
        path = self._asking_file(key)
        if _attempt_in(_read(path)) >= attempt:
            with suppress(FileNotFoundError):  # another process has withdrawn it
                os.utime(path)  # needs no space: the build may have filled the disk
                return
        self._wanted.mkdir(parents=True, exist_ok=True)  # a node may be younger than its agent
        _put(path, {"attempt": attempt})

    def withdraw(self, key: str) -> None:
        """Delete the request for `key`, if there is one."""
        with suppress(OSError):
            self._asking_file(key).unlink()

    def is_ready(self, key: str) -> bool:
        """Whether the environment has its record and its interpreter."""
        place = self._store / _checked(key)
        record = _read(place / "record.json", _MOST_OF_RECORD)
        return record.get("key") == key and (place / ".venv/bin/python").exists()

    def refusal(self, key: str, attempt: int) -> str | None:
        """Return why this attempt, or a later one, was refused; None if it was not."""
        said = _read(self._refusal_file(key))
        at, reason = said.get("at"), said.get("reason")
        if _attempt_in(said) < attempt or not isinstance(at, (int, float)):
            return None
        return str(reason) if _is_recent(at, _REFUSED_S) else None

    def served_s(self) -> float | None:
        """Return how many seconds ago an agent last read the requests; None if never."""
        try:
            return max(0.0, time.time() - (self._wanted / _SERVED).stat().st_mtime)
        except OSError:
            return None

    def asked(self) -> dict[str, int]:
        """Return the latest attempt of every requested key; empty if the root cannot be read.

        Deletes the requests of dead processes and old refusals.
        """
        found: dict[str, int] = {}
        with suppress(OSError):
            self._wanted.mkdir(parents=True, exist_ok=True)
            (self._wanted / _SERVED).touch()
            with os.scandir(self._wanted) as entries:
                for entry in entries:
                    attempt = self._attempt_of(entry)
                    if attempt is not None:
                        found[entry.name] = attempt
        return found

    def _attempt_of(self, entry: os.DirEntry[str]) -> int | None:
        """Return the attempt of a request; delete a file that is too old."""
        with suppress(OSError):  # withdrawn meanwhile
            lasts_s = _REFUSED_S if entry.name.endswith(_REFUSED) else _ASKED_S
            if not _is_recent(entry.stat().st_mtime, lasts_s):
                os.unlink(entry.path)  # a process that still waits writes it again
            elif _KEY.fullmatch(entry.name):
                attempt = _attempt_in(_read(Path(entry.path)))
                return attempt if attempt >= 0 else None
        return None

    def refuse(self, key: str, attempt: int, reason: str) -> None:
        """Fail all tasks that wait for this attempt or an earlier one, with `reason`.

        Raises:
            InvalidId: `key` is not a key.
            OSError: the root cannot be written.
        """
        path = self._refusal_file(key)
        later = max(attempt, _attempt_in(_read(path)))
        self._wanted.mkdir(parents=True, exist_ok=True)
        _put(path, {"attempt": later, "reason": reason[:_MOST_OF_REASON], "at": time.time()})

    def clear(self, key: str) -> None:
        """Delete the request for `key` and its refusal."""
        for path in (self._asking_file(key), self._refusal_file(key)):
            with suppress(OSError):
                path.unlink()

    def _asking_file(self, key: str) -> Path:
        return self._wanted / _checked(key)

    def _refusal_file(self, key: str) -> Path:
        return self._wanted / f"{_checked(key)}{_REFUSED}"


def field(key: str, attempt: int) -> dict[str, Any]:
    """Return the value of `FIELD` for a runtime_env."""
    return {"key": _checked(key), "attempt": attempt}


def start_id(key: str, runtime_env: Mapping[str, Any]) -> str:
    """Return what stands for all workers of a runtime_env: a refusal of it refuses them alone."""
    text = json.dumps(dict(runtime_env), sort_keys=True, default=str)
    return f"{_checked(key)[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def wish_of(runtime_env: Mapping[str, Any]) -> Wish | None:
    """Return what a runtime_env needs on its node; None if it has no field of ours.

    Raises `InvalidInput`: the field or the interpreter beside it was changed.
    """
    said = runtime_env.get(FIELD)
    if said is None:
        return None
    where, hint = f"runtime_env[{FIELD!r}]", "take it from options(), unchanged"
    if not isinstance(said, Mapping) or set(said) != {"key", "attempt"}:
        raise InvalidInput("must have the form {'key': …, 'attempt': …}", where=where, hint=hint)
    key, attempt = said["key"], said["attempt"]
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidInput("the key is not a key of an environment", where=where, hint=hint)
    if type(attempt) is not int or attempt < 0:
        raise InvalidInput("the attempt must be 0, 1, 2, …", where=where, hint=hint)
    python = runtime_env.get("py_executable")
    root, found, rest = str(python).rpartition(f"/store/{key}/.venv/bin/python")
    if not found or rest or not root.startswith("/") or ".." in PurePosixPath(root).parts:
        raise InvalidInput(
            f"{python!r} is not the interpreter of the environment {key}",
            where="runtime_env['py_executable']",
            hint=hint,
        )
    return Wish(Path(root), key, attempt)


def marked(reason: str) -> str:
    """Return `reason` with the mark that `reason_in` looks for."""
    return f"{_MARK}{reason}"


def reason_in(text: str) -> str | None:
    """Return our reason from the text of a `RuntimeEnvSetupError`; None if it has none."""
    _, found, reason = text.rpartition(f"RuntimeError: {_MARK}")
    return reason.strip() if found else None


def with_plugin(value: str | None) -> str:
    """Return the value of RAY_RUNTIME_ENV_PLUGINS with our plugin added.

    Raises `InvalidInput`: `value` is not what Ray could read.
    """
    if has_plugin(value):
        return str(value)
    return json.dumps([*_plugins(value), {"class": PLUGIN}])


def has_plugin(value: str | None) -> bool:
    """Whether a value of RAY_RUNTIME_ENV_PLUGINS names our plugin.

    Raises `InvalidInput`: `value` is not what Ray could read.
    """
    return any(plugin["class"] == PLUGIN for plugin in _plugins(value))


def _plugins(value: str | None) -> list[dict[str, Any]]:
    try:
        plugins = json.loads(value) if value else []
    except ValueError:
        plugins = None
    if isinstance(plugins, list) and all(isinstance(p, dict) and "class" in p for p in plugins):
        return plugins
    raise InvalidInput(
        "is not a JSON list of plugins; Ray would not start",
        where=PLUGINS_VARIABLE,
        hint=f"""unset it, or write '[{{"class": "{PLUGIN}"}}]'""",
    )


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InvalidId(
            f"{key[:80]!r} is not a key of an environment", hint="take it from options(), unchanged"
        )
    return key


def _is_recent(moment: float, lasts_s: float) -> bool:
    """Whether `moment` is at most `lasts_s` away, before or after: clocks can be set back."""
    return abs(time.time() - moment) <= lasts_s


def _attempt_in(data: dict[str, Any]) -> int:
    """Return the attempt in a file of ours; -1 if it has none."""
    attempt = data.get("attempt")
    return attempt if type(attempt) is int else -1


def _read(path: Path, most_bytes: int = _MOST_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file; empty if it has none or cannot be read."""
    try:
        data = json.loads(_content(path, most_bytes))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _content(path: Path, most_bytes: int) -> bytes:
    """Return the first bytes of a regular file; empty for a pipe or device, which could block."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(fd, most_bytes) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def _put(path: Path, data: dict[str, Any]) -> None:
    """Write `data` to `path`, whole or not at all. A crash of the machine may undo it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}")
    try:
        scratch.write_text(json.dumps(data), encoding="utf-8")
        os.replace(scratch, path)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
        raise
