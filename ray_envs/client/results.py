"""The results file of a batch: a JSON line for each item that has ended.

Only a file that is recognised as results is continued or replaced. Anything else stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ray_envs.batch_models import ItemResult
from ray_envs.decisions.parsing import parsed_json
from ray_envs.disk.files import storage_errors
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.validation import validated

#: Each line begins with it, whichever JSON library wrote it.
_BEGIN = b'{"variant_id":'
_OTHER_HINT = "give another file with --results"


@contextlib.contextmanager
def results_file(path: Path, *, resume: bool) -> Iterator[tuple[IO[bytes], list[ItemResult]]]:
    """Open the results file for appending. Gives it and, with `resume`, its earlier results.

    Without `resume`, earlier results are first copied to `<path>.1`, or to the next free number. A
    new file that gets no result is deleted.

    Raises:
        InvalidInput: `path` is a link or no regular file, holds something other than results, or
            another run writes to it. With `resume`, also: a line of it is damaged.
        StorageFailed: the earlier results cannot be copied.
    """
    with _opened(path) as log:
        held = log.read()
        done: list[ItemResult] = []
        try:
            if held:
                _check_ours(held, path)
            if resume:
                done = results_in(held, path)
            with storage_errors("keep the earlier results"):
                if resume:
                    _cut_torn_line(log, held)
                elif held:
                    _copy_to_next_number(path, held)
                    log.truncate(0)
            yield log, done
        finally:
            opened = os.fstat(log.fileno())
            with contextlib.suppress(OSError):  # it was moved or replaced meanwhile
                if opened.st_size == 0 and os.path.samestat(opened, path.lstat()):
                    path.unlink()


def append_result(log: IO[bytes], result: ItemResult) -> None:
    """Add a line to the results file. It is ASCII: no text of a payload can break it.

    Raises `StorageFailed`: it cannot be written.
    """
    line = json.dumps(result.model_dump(mode="json")).encode()
    try:
        log.write(line + b"\n")
        log.flush()
    except OSError as exc:
        raise StorageFailed(
            f"cannot write results to {log.name}: {exc.strerror}",
            hint="free space there, then run again with --resume",
        ) from exc


def results_in(content: bytes, path: Path) -> list[ItemResult]:
    """Return the results in the content of the results file `path`, in order.

    A damaged last line without a newline is ignored: a kill interrupted its writing.

    Raises `InvalidInput`: another line is damaged.
    """
    *lines, last = content.split(b"\n")
    found = [
        _result(line, where=f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if last.strip():
        with contextlib.suppress(InvalidInput):
            found.append(_result(last, where=str(path)))
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open and lock the results file. Follows no link: its target belongs to somebody else."""
    try:
        with contextlib.suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise _is_a_link(path)
            if not stat.S_ISREG(mode):
                raise InvalidInput(
                    f"{path} is not a file", hint="give a regular file with --results"
                )
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        log = open(  # noqa: SIM115 - closed below
            path, "r+b", opener=lambda name, _: os.open(name, flags, 0o666)
        )
    except (OSError, ValueError) as exc:
        if getattr(exc, "errno", None) == errno.ELOOP:
            raise _is_a_link(path) from None
        raise InvalidInput(
            f"cannot write results to {path}: {getattr(exc, 'strerror', None) or exc}",
            hint=_OTHER_HINT,
        ) from exc
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"another run is writing to {path}", hint=_OTHER_HINT) from None
        yield log


def _is_a_link(path: Path) -> InvalidInput:
    return InvalidInput(
        f"{path} is a link, and results are not written through links",
        hint="name the file itself with --results",
    )


def _check_ours(content: bytes, path: Path) -> None:
    """Raise `InvalidInput` if the first line is neither a result nor the beginning of one."""
    first, newline, _ = content.partition(b"\n")
    if newline:
        is_ours = first.startswith(_BEGIN) and _is_result(first)
    else:
        is_ours = first.startswith(_BEGIN)
    if not is_ours:
        raise InvalidInput(
            f"{path} holds something other than results of a batch; it stays as it is",
            hint=_OTHER_HINT,
        )


def _cut_torn_line(log: IO[bytes], content: bytes) -> None:
    """Complete or cut the last line: a killed run can leave it without its end."""
    whole = content.rfind(b"\n") + 1
    if _is_result(content[whole:]):
        log.write(b"\n")
    else:
        log.truncate(whole)


def _copy_to_next_number(path: Path, content: bytes) -> None:
    """Write `content` to the first `<path>.<number>` that does not exist."""
    number = 1
    while os.path.lexists(f"{path}.{number}"):
        number += 1
    with open(f"{path}.{number}", "xb") as file:  # fails if somebody was faster; follows no link
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _is_result(line: bytes) -> bool:
    with contextlib.suppress(InvalidInput):
        _result(line, where="")
        return True
    return False


def _result(line: bytes, *, where: str) -> ItemResult:
    hint = "remove the line, or run without resuming"
    try:
        data = parsed_json(line, where=where)
        json.dumps(data, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, InvalidInput):
        raise InvalidInput("the line is not JSON", where=where, hint=hint) from None
    try:
        return validated(ItemResult, data, where=where)
    except InvalidInput as err:
        raise InvalidInput(
            f"the line is not an item result: {err.message}", where=where, hint=hint
        ) from None
