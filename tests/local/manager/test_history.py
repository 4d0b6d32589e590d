"""The history: every number once, no credentials, and no trouble for what is being logged."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.events import EnvEvent, EventKind, Operation, OperationStatus
from ray_envs.manager import database as database_module
from ray_envs.manager import history as history_module
from ray_envs.manager.history import History
from ray_envs.validation import Model

Open = Callable[..., History]

NOW = datetime(2026, 1, 1, 12, 0, 0, 5, tzinfo=timezone.utc)
DAY_S = 86400.0
SECRET = "s3cr3t"
URL = f"https://user:{SECRET}@host/simple"

#: What every child begins with: a history of argv[1], and an event that says which one it is.
CHILD = """\
import os, signal, sys
from datetime import datetime, timezone
from pathlib import Path
from ray_envs.events import EnvEvent, EventKind, Operation, OperationStatus
from ray_envs.manager.history import History

NOW = datetime(2026, 1, 1, 12, 0, 0, 5, tzinfo=timezone.utc)
history = History(Path(sys.argv[1]), keep_s=1e9)

def event(n):
    return EnvEvent(at=NOW, kind=EventKind.CREATED, data={"by": sys.argv[2], "n": n})
"""


def event(n: int = 0, **fields: Any) -> EnvEvent:
    return EnvEvent(**{"at": NOW, "kind": EventKind.CREATED, "data": {"n": n}, **fields})


def operation(operation_id: str = "o", **fields: Any) -> Operation:
    values = {"operation_id": operation_id, "operation": "sync", "started_at": NOW, **fields}
    return Operation(**values)


def ended(operation_id: str = "o", **fields: Any) -> Operation:
    return operation(operation_id, **{"status": OperationStatus.SUCCEEDED, **fields})


def number_of(stored: EnvEvent | None) -> int:
    assert stored is not None
    return stored.number


def later(**span: float) -> datetime:
    return NOW + timedelta(**span)


@pytest.fixture
def path(root: Path) -> Path:
    return root / "history.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """A function that opens a history, by default the one of this test; closed afterwards."""
    with ExitStack() as stack:

        def open_one(at: Path = path, *, keep_s: float = DAY_S) -> History:
            history = History(at, keep_s=keep_s)
            stack.callback(history.close)
            return history

        yield open_one


@contextmanager
def child(path: Path, name: str, code: str) -> Iterator[subprocess.Popen[str]]:
    """A real process that runs `code` after `CHILD`; killed after the block."""
    with subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(path), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


def scribble(path: Path, *, start: int, length: int | None = None) -> None:
    """Overwrite `length` bytes of a database, in another process: closing it drops locks here."""
    code = (
        "import sys; path, start, length = sys.argv[1:]; file = open(path, 'r+b');"
        "file.seek(int(start)); file.write(b'\\xa5' * int(length))"
    )
    length = path.stat().st_size - start if length is None else length
    words = [sys.executable, "-S", "-c", code, str(path), str(start), str(length)]
    subprocess.run(words, check=True)


def put_aside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.glob("*.damaged-*") if p.suffix != ".db-shm")


def is_sound(path: Path) -> bool:
    connection = sqlite3.connect(path)
    try:
        return bool(connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok")
    finally:
        connection.close()


# -- events


def test_what_was_recorded_is_what_any_process_reads_with_its_number(
    opened: Open, path: Path
) -> None:
    there = timezone(timedelta(hours=5, minutes=30))
    given_event = EnvEvent(
        at=NOW.astimezone(there),
        kind=EventKind.DEPENDENCIES_ADDED,
        variant_id="v",
        key="k",
        node_id="n",
        operation_id="o",
        data={"packages": ["a==1", "ü"], "deep": {"er": [1, 2.5, None, True]}},
    )
    history = opened()
    stored = history.record(given_event)
    assert stored == given_event.model_copy(update={"number": 1, "at": NOW})
    assert number_of(history.record(event())) == 2
    assert opened().events(limit=1) == ([stored], 1)
    assert (history.last_number(), opened().last_number(), history.problem) == (2, 2, "")


@pytest.mark.parametrize(("table", "model"), [("events", EnvEvent), ("operations", Operation)])
def test_every_field_has_its_column(
    opened: Open, path: Path, table: str, model: type[Model]
) -> None:
    opened().record(event())
    connection = sqlite3.connect(path)
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    connection.close()
    assert columns == list(model.model_fields)


def test_moments_are_kept_in_utc_and_sort_as_text(opened: Open, path: Path) -> None:
    history = opened()
    zones = [timezone(timedelta(hours=hours)) for hours in (-11, 0, 13)]
    moments = [later(minutes=minutes) for minutes in range(3)]
    for at, zone in zip(moments, zones, strict=True):
        history.record(event(at=at.astimezone(zone)))
    history.record(event(at=later(minutes=3).replace(tzinfo=None, microsecond=0)))
    connection = sqlite3.connect(path)
    texts = [row[0] for row in connection.execute("SELECT at FROM events ORDER BY number")]
    connection.close()
    assert texts == sorted(texts)
    assert texts[0] == "2026-01-01T12:00:00.000005+00:00"
    assert texts[3] == "2026-01-01T12:03:00.000000+00:00"


@hypothesis_settings(max_examples=40)
@given(
    written=st.lists(
        st.tuples(st.sampled_from(list(EventKind)[:3]), st.sampled_from(["v", "w", None])),
        max_size=12,
    ),
    kinds=st.sets(st.sampled_from(list(EventKind)[:4])),
    variant_id=st.sampled_from(["v", "w", None]),
    limit=st.integers(1, 5),
    since=st.integers(0, 15),
)
def test_pages_show_every_matching_event_once_in_order_and_come_to_an_end(
    written: list[tuple[EventKind, str | None]],
    kinds: set[EventKind],
    variant_id: str | None,
    limit: int,
    since: int,
) -> None:
    with TemporaryDirectory() as folder:
        history = History(Path(folder, "history.db"), keep_s=DAY_S)
        stored = [history.record(event(kind=kind, variant_id=v)) for kind, v in written]
        wanted = [
            each
            for each in stored
            if each is not None
            and each.number > since
            and (not kinds or each.kind in kinds)
            and (variant_id is None or each.variant_id == variant_id)
        ]
        seen: list[EnvEvent] = []
        while True:
            page, after = history.events(
                since=since, kinds=iter(kinds), variant_id=variant_id, limit=limit
            )
            assert page == wanted[len(seen) : len(seen) + limit]
            seen += page
            if after == since:
                break
            assert after > since
            since = after
        assert seen == wanted
        assert since >= len(written)
        newer = history.record(event(kind=EventKind.CREATED, variant_id="v"))
        more, after = history.events(since=len(written))
        assert (more, after) == ([newer], len(written) + 1)
        history.close()


def test_a_page_of_nothing_is_refused(opened: Open) -> None:
    with pytest.raises(InvalidInput, match="limit: 0"):
        opened().events(limit=0)
    with pytest.raises(InvalidInput, match="offset: -1"):
        opened().operations(offset=-1)


def test_a_kind_that_a_later_release_wrote_hides_no_other(opened: Open, path: Path) -> None:
    history = opened()
    first, strange, last = (history.record(event(n)) for n in range(3))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE events SET kind = 'Later' WHERE number = 2")
    connection.close()
    assert history.events() == ([first, last], 3)
    assert history.events(since=1, limit=1) == ([], number_of(strange))


@hypothesis_settings(max_examples=40)
@given(
    st.lists(st.sampled_from(["record", "other", "prune", "reopen", "damage", "lose"]), max_size=12)
)
def test_a_number_is_never_given_twice(steps: list[str]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "history.db")
        history, other = (History(path, keep_s=0) for _ in range(2))
        numbers = [number_of(history.record(event()))]
        for step in steps:
            if step == "prune":
                history.prune(later(days=1))
            elif step == "reopen":
                history.close()
                other.close()
            elif step == "damage":
                history.close()
                other.close()
                path.write_bytes(b"no database, though long enough to be one" * 100)
            elif step == "lose":
                history.close()
                other.close()
                path.unlink(missing_ok=True)
            else:
                writer = other if step == "other" else history
                numbers.append(number_of(writer.record(event())))
        numbers.append(number_of(history.record(event())))
        assert numbers == sorted(set(numbers))
        assert history.last_number() == numbers[-1]
        history.close()
        other.close()


# -- operations


def test_an_operation_is_one_row_from_its_beginning_to_its_end(opened: Open) -> None:
    history = opened()
    history.begin(operation(variant_id="v", workflow_id="w", node_id="n", version_id="x"))
    assert history.running() == [history.operation("o")]
    whole = operation(
        status=OperationStatus.FAILED,
        variant_id="v",
        finished_at=later(seconds=1),
        duration_ms=1000,
        stdout="out\n",
        stderr="err ü\n",
        exit_code=1,
        error={"type": "UvFailed", "message": "no"},
        metadata={"packages": ["a"], "nested": {"a": [1]}},
    )
    history.finish(whole)
    assert opened().operation("o") == whole
    assert (history.operations(), history.running()) == (([whole], 1), [])
    assert history.operation("other") is None


def test_an_operation_whose_beginning_was_lost_appears_with_its_end(opened: Open) -> None:
    history = opened()
    history.finish(ended())
    assert history.operations() == ([ended()], 1)


@hypothesis_settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["v", "w", None]),
            st.sampled_from(["sync", "gc"]),
            st.sampled_from(OperationStatus),
            st.integers(0, 3),
        ),
        max_size=8,
    ),
    variant_id=st.sampled_from(["v", None]),
    verb=st.sampled_from(["gc", None]),
    status=st.sampled_from([*OperationStatus, None]),
    minute=st.sampled_from([1, 2, None]),
    limit=st.integers(0, 4),
    offset=st.integers(0, 4),
)
def test_operations_are_those_of_a_plain_list_and_those_that_run_outlive_every_deletion(
    rows: list[tuple[str | None, str, OperationStatus, int]],
    variant_id: str | None,
    verb: str | None,
    status: OperationStatus | None,
    minute: int | None,
    limit: int,
    offset: int,
) -> None:
    moment = None if minute is None else later(minutes=minute)
    with TemporaryDirectory() as folder:
        history = History(Path(folder, "history.db"), keep_s=DAY_S)
        known = [
            operation(f"{n}", variant_id=v, operation=o, status=s, started_at=later(minutes=m))
            for n, (v, o, s, m) in enumerate(rows)
        ]
        for each in known:
            history.begin(each)
        for each in known[:2]:  # written again, and yet in its old place
            history.finish(each)

        def matches(each: Operation) -> bool:
            return (
                variant_id in (None, each.variant_id)
                and verb in (None, each.operation)
                and status in (None, each.status)
            )

        newest_first = sorted(
            known, key=lambda each: (each.started_at, known.index(each)), reverse=True
        )
        found = [
            each
            for each in newest_first
            if matches(each) and (moment is None or each.started_at >= moment)
        ]
        page = history.operations(
            variant_id=variant_id,
            operation=verb,
            status=status,
            since=moment,
            limit=limit,
            offset=offset,
        )
        assert page == (found[offset : offset + limit], len(found))

        if any((variant_id, verb, status, moment)):
            deleted = history.delete_operations(
                variant_id=variant_id, operation=verb, status=status, before=moment
            )
            rest = [
                each
                for each in newest_first
                if each.status is OperationStatus.RUNNING
                or not matches(each)
                or (moment is not None and each.started_at >= moment)
            ]
            assert history.operations() == (rest, len(known) - deleted)
        history.close()


def test_a_deletion_without_a_filter_is_refused(opened: Open) -> None:
    history = opened()
    history.finish(ended())
    with pytest.raises(InvalidInput, match="every operation") as caught:
        history.delete_operations()
    assert caught.value.hint
    assert history.operations() == ([ended()], 1)


def test_pruning_takes_what_is_older_than_the_limit_and_nothing_that_runs(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_PRUNED_AT_ONCE", 2)
    history = opened(keep_s=60)
    for _ in range(5):
        history.record(event(at=later(seconds=-61)))
    kept = history.record(event(at=later(seconds=-60)))
    long_ago = later(days=-9)
    history.begin(operation("runs", started_at=long_ago))
    history.finish(ended("old", started_at=long_ago, finished_at=later(seconds=-61)))
    history.finish(ended("long", started_at=long_ago, finished_at=later(seconds=-60)))
    history.finish(ended("no end", started_at=long_ago))
    assert (history.prune(NOW), history.prune(NOW)) == (7, 0)
    assert history.events() == ([kept], 6)
    assert {each.operation_id for each in history.operations()[0]} == {"runs", "long"}


@pytest.mark.parametrize("keep_s", [1e15, float("inf")])
def test_what_is_kept_for_ever_is_never_pruned(opened: Open, keep_s: float) -> None:
    history = opened(keep_s=keep_s)
    history.record(event())
    assert (history.prune(later(days=999)), history.last_number()) == (0, 1)


# -- what is kept of a text


def test_no_credential_reaches_the_disk(opened: Open, path: Path) -> None:
    history = opened()
    nested = {"index": URL, URL: 1, "deep": [{"er": (URL, {"s": {URL}})}]}
    stored = history.record(event(data=nested))
    assert stored is not None
    assert stored.data["index"] == "https://***@host/simple"
    whole = ended(stdout=URL, stderr=f"at {URL}", error={"detail": URL}, metadata=nested)
    history.begin(whole)
    history.finish(whole)
    read = history.operation("o")
    assert read is not None
    assert (read.stdout, read.error) == (
        "https://***@host/simple",
        {"detail": "https://***@host/simple"},
    )
    for file in path.parent.iterdir():
        assert SECRET.encode() not in file.read_bytes(), file
    history.close()
    assert SECRET.encode() not in path.read_bytes()


def test_the_last_64_kib_of_an_output_are_kept_and_no_half_of_a_credential(opened: Open) -> None:
    history = opened()
    shown = "https://***@host/simple"
    filler = "ü" * ((64 * 1024 - len(shown)) // 2)
    for shift in range(len(URL)):  # the cut falls on every character of the URL
        text = f"x{URL}{filler}{'y' * shift}"
        history.finish(ended(f"{shift}", stdout=text, stderr="short"))
        read = history.operation(f"{shift}")
        assert read is not None
        assert f"x{shown}{filler}{'y' * shift}".endswith(read.stdout)
        assert 64 * 1024 - 2 < len(read.stdout.encode()) <= 64 * 1024
        assert read.stderr == "short"


def test_what_json_and_utf8_do_not_know_is_kept_as_text(opened: Open) -> None:
    class Strange:
        def __str__(self) -> str:
            return "strange"

    data = {
        "path": Path("a/b"),
        "kind": EventKind.CREATED,
        "at": NOW,
        "nan": float("nan"),
        "object": Strange(),
        "byte": b"\xff".decode("utf-8", "surrogateescape"),
        "zero": "a\0b",
        "model": operation(),
    }
    history = opened()
    stored = history.record(event(data=data))
    assert stored is not None
    assert stored.data["model"]["operation_id"] == "o"
    assert {**stored.data, "model": None} == {
        "path": "a/b",
        "kind": "EnvironmentCreated",
        "at": "2026-01-01T12:00:00.000005+00:00",
        "nan": "nan",
        "object": "strange",
        "byte": "?",
        "zero": "a\0b",
        "model": None,
    }
    assert history.events() == ([stored], 1)


# -- a root that is not there, is not ours, or cannot be written


def read_all(history: History) -> list[Any]:
    return [
        history.events(since=7),
        history.last_number(),
        history.operation("o"),
        history.running(),
        history.operations(),
    ]


READ_NOTHING: list[Any] = [([], 7), 0, None, [], ([], 0)]

READS: list[Callable[[History], Any]] = [
    lambda history: history.events(),
    lambda history: history.last_number(),
    lambda history: history.operation("o"),
    lambda history: history.running(),
    lambda history: history.operations(),
]


def write_all(history: History) -> list[Any]:
    """What every method that writes returns; none may raise, whatever the storage does."""
    return [
        history.record(event()),
        history.begin(operation()),  # type: ignore[func-returns-value]
        history.finish(ended()),  # type: ignore[func-returns-value]
        history.delete_operations(variant_id="v"),
        history.prune(NOW),
    ]


WROTE_NOTHING = [None, None, None, 0, 0]


def test_reading_where_nothing_is_gives_nothing_and_creates_nothing(
    opened: Open, path: Path
) -> None:
    history = opened()
    assert read_all(history) == READ_NOTHING
    assert (history.prune(NOW), history.delete_operations(variant_id="v")) == (0, 0)
    assert not path.parent.exists()
    path.parent.mkdir()
    assert read_all(history) == READ_NOTHING
    path.touch()  # of a process that died before it had made the tables
    assert read_all(history) == READ_NOTHING
    assert path.stat().st_size == 0
    assert number_of(history.record(event())) == 1


def test_a_root_that_was_removed_is_made_again(opened: Open, path: Path) -> None:
    history = opened()
    history.record(event())
    shutil.rmtree(path.parent)
    assert read_all(history) == READ_NOTHING
    assert not path.parent.exists()
    assert history.record(event()) == opened().events()[0][0]
    assert history.problem == ""


@pytest.mark.parametrize("version", [0, 2, 99])
def test_the_database_of_another_program_or_release_is_left_alone(
    opened: Open, path: Path, version: int
) -> None:
    path.parent.mkdir()
    connection = sqlite3.connect(path)
    connection.executescript(f"CREATE TABLE theirs (a); PRAGMA user_version = {version};")
    connection.close()
    before = path.read_bytes()
    history = opened()
    assert write_all(history) == WROTE_NOTHING
    assert f"{path} has format {version}" in history.problem
    for read in READS:
        with pytest.raises(StorageFailed, match=f"has format {version}") as caught:
            read(history)
        assert caught.value.hint
    history.close()
    assert (path.read_bytes(), put_aside(path)) == (before, [])
    path.rename(path.with_name("theirs.db"))
    assert history.record(event()) is not None
    assert history.problem == ""


def test_a_root_that_cannot_be_written_hurts_nobody(opened: Open, unprivileged: Path) -> None:
    root = unprivileged / "root"
    path = root / "history.db"
    history = opened(path)
    assert write_all(history) == WROTE_NOTHING
    assert (str(root) in history.problem, "writable" in history.problem) == (True, True)
    assert read_all(history) == READ_NOTHING


@contextmanager
def as_root() -> Iterator[None]:
    user = os.geteuid()
    try:
        os.seteuid(0)
    except PermissionError:
        pytest.skip("only root can be two users")
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_history_of_somebody_else_can_be_read_and_is_not_written(
    opened: Open, unprivileged: Path
) -> None:
    path = unprivileged / "history.db"
    code = "print(history.record(event(0)).number, flush=True); sys.stdin.read()"
    with ExitStack() as stack:
        with as_root():
            process = stack.enter_context(child(path, "root", code))
        assert next(lines_of(process)) == "1"
        stack.callback(os.seteuid, os.geteuid())
        history = opened(path)
        for _ in range(2):
            events, after = history.events()
            assert ([each.data["by"] for each in events], after) == (["root"], 1)
            assert write_all(history) == WROTE_NOTHING
            assert str(path) in history.problem
        os.seteuid(0)  # whoever started the child ends it


def test_what_cannot_be_read_is_an_error_with_path_and_hint(
    opened: Open, unprivileged: Path
) -> None:
    path = unprivileged / "history.db"
    with as_root():
        unprivileged.chmod(0o777)
        opened(path).record(event())
        path.chmod(0)
    history = opened(path)
    for read in READS:
        with pytest.raises(StorageFailed, match=str(path)) as caught:
            read(history)
        assert caught.value.hint
    assert write_all(history) == WROTE_NOTHING
    assert put_aside(path) == []


@pytest.mark.parametrize("what", ["a file as root", "a folder as database"])
def test_what_stands_in_the_way_hurts_nobody(opened: Open, path: Path, what: str) -> None:
    if what == "a file as root":
        path.parent.write_text("")
    else:
        path.mkdir(parents=True)
    history = opened()
    assert write_all(history)[:3] == WROTE_NOTHING[:3]
    assert str(path) in history.problem
    (path.parent.unlink if path.parent.is_file() else path.rmdir)()
    assert number_of(history.record(event())) == 1
    assert history.problem == ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """One MiB at `folder`, as its own file system."""
    folder.mkdir(parents=True)
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"]
    try:
        done = subprocess.run(
            ["mount", *options, str(folder)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """The file that takes all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return ballast


def test_a_full_disk_hurts_nobody_and_the_next_write_tries_again(path: Path, opened: Open) -> None:
    with small_disk(path.parent):
        history = opened()
        first = history.record(event())
        ballast = fill(path.parent)
        stored = []
        for n in range(500):  # what the -wal had room for, then nothing more
            stored.append(history.record(event(n, data={"text": "y" * 4000})))
        assert stored[-1] is None
        assert str(path) in history.problem
        assert "free space" in history.problem
        written = [first, *(each for each in stored if each)]
        assert history.events() == (written, number_of(written[-1]))
        assert write_all(history)[0] is None

        ballast.unlink()
        last = history.record(event())
        assert history.problem == ""
        assert history.events()[0] == [*written, last]
        history.close()
        assert is_sound(path)


def test_a_history_can_begin_once_a_full_disk_has_room(path: Path, opened: Open) -> None:
    with small_disk(path.parent):
        ballast = fill(path.parent)
        history = opened()
        assert write_all(history)[:3] == WROTE_NOTHING[:3]
        assert "free space" in history.problem
        ballast.unlink()
        assert number_of(history.record(event())) == 1
        assert history.problem == ""
        history.close()


@contextmanager
def database_locked(path: Path) -> Iterator[None]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
    finally:
        connection.close()


@contextmanager
def folder_locked(path: Path) -> Iterator[None]:
    with History(path, keep_s=DAY_S)._database._alone(is_needed=True):
        yield


@pytest.mark.parametrize("locked", [database_locked, folder_locked])
def test_a_lock_that_another_process_keeps_is_waited_for_once(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch, locked: Callable[[Path], Any]
) -> None:
    first = opened().record(event())
    monkeypatch.setattr(database_module, "_PATIENCE_S", 0.2)
    history = opened()
    began = time.monotonic()
    with locked(path):
        for _ in range(100):
            assert write_all(history)[0] is None
        assert time.monotonic() - began < 0.2 * 100  # as a rule 0.3 s, and 100 s if each waited
        assert "lock" in history.problem
    last = history.record(event())
    assert (history.events()[0], history.problem) == ([first, last], "")


def test_readers_do_not_wait_for_a_writer(opened: Open, path: Path) -> None:
    history = opened()
    stored = history.record(event())
    with database_locked(path):
        assert history.events() == ([stored], 1)


# -- damage


@pytest.mark.parametrize("start", [0, 100, 4096])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_damaged_database_is_put_aside_and_a_new_one_is_begun(
    opened: Open, path: Path, start: int, is_open: bool
) -> None:
    before = opened()
    for n in range(300):
        before.record(event(n))
    before.close()
    history = opened()
    if is_open:
        assert history.last_number() == 300
        opened().record(event())  # SQLite would believe what it has in memory
    scribble(path, start=start)
    damaged = path.read_bytes()

    stored = history.record(event(1))
    assert number_of(stored) > 300
    assert f"{path}.damaged-1" in history.problem
    assert put_aside(path)[0] == "history.db.damaged-1"
    assert Path(f"{path}.damaged-1").read_bytes()[4096:] == damaged[4096:]
    assert (history.events()[0], opened().events()[0]) == ([stored], [stored])
    assert number_of(history.record(event(2))) == number_of(stored) + 1
    assert f"{path}.damaged-1" in history.problem  # until the next start
    restarted = opened()
    assert number_of(restarted.record(event(3))) == number_of(stored) + 2
    assert restarted.problem == ""
    assert is_sound(path)


def test_the_log_beside_a_damaged_database_goes_with_it(opened: Open, path: Path) -> None:
    path.parent.mkdir()
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").write_bytes(b"no database" * 1000)
    history = opened()
    assert number_of(history.record(event())) > 0
    for end in ("", "-wal", "-shm"):
        kept = Path(f"{path}.damaged-1{end}").read_bytes()
        assert end == "-shm" or kept == b"no database" * 1000  # SQLite writes an index of its own


def test_who_reads_a_damaged_database_is_told_once(opened: Open, path: Path) -> None:
    history = opened()
    history.record(event())
    history.close()
    scribble(path, start=0)
    with pytest.raises(StorageFailed, match=str(path)) as caught:
        history.last_number()
    assert "damaged" in caught.value.hint
    assert history.last_number() == 0
    assert f"{path}.damaged-1" in history.problem


@pytest.mark.parametrize("is_open", [False, True])
def test_damage_far_from_the_next_write_is_found_at_the_start_or_by_who_reads_there(
    opened: Open, path: Path, is_open: bool
) -> None:
    history = opened()
    stored = [history.record(event(n, data={"text": "x" * 1000})) for n in range(100)]
    history.close()
    pages, history = path.stat().st_size // 4096, opened()
    if is_open:
        assert history.last_number() == 100
        opened().record(event())  # SQLite would believe what it has in memory
    scribble(path, start=pages // 2 * 4096, length=4096)
    if is_open:
        assert number_of(history.record(event())) == 102
        assert history.events(limit=10)[0] == stored[:10]
        with pytest.raises(StorageFailed, match="malformed"):
            history.events()
    assert number_of(history.record(event())) > 102
    assert put_aside(path)[0] == "history.db.damaged-1"


def test_of_two_that_find_the_same_damage_one_puts_it_aside(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    slow, fast = opened(), opened()
    put_damage_aside = slow._database._put_aside
    overtaken: list[EnvEvent | None] = []

    def after_the_other() -> bool:
        overtaken.append(fast.record(event(1)))
        return put_damage_aside()

    monkeypatch.setattr(slow._database, "_put_aside", after_the_other)
    stored = slow.record(event(2))
    assert slow.events()[0] == fast.events()[0] == [*overtaken, stored]
    assert put_aside(path) == ["history.db.damaged-1"]
    assert all(f"{path}.damaged-1" in history.problem for history in (slow, fast))


@pytest.mark.parametrize("how", ["record", "read", "close"])
def test_whoever_has_a_damaged_database_open_does_no_harm_to_the_new_one(
    opened: Open, path: Path, how: str
) -> None:
    unaware = opened()
    for n in range(300):
        unaware.record(event(n))  # they are in the -wal of the old one
    scribble(path, start=0)
    subprocess.run(["rm", "-f", f"{path}-shm"], check=True)
    finder = opened()
    finder._database._identity = (path.stat().st_dev, path.stat().st_ino)
    assert finder._database._put_aside()
    stored = [finder.record(event(1))]

    if how == "record":
        stored.append(unaware.record(event(2)))
    elif how == "read":
        assert unaware.events()[0] == stored
    else:
        unaware.close()
    stored.append(finder.record(event(3)))
    assert opened().events()[0] == stored
    assert ("damaged-1" in unaware.problem) == (how != "close")


def test_an_event_that_is_written_while_the_file_is_put_aside_is_in_the_new_one(
    opened: Open, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, other = opened(), opened()
    history.record(event())
    connected = history._database._connected
    calls: list[bool] = []

    def then_it_is_moved(*, creates: bool) -> sqlite3.Connection | None:
        connection = connected(creates=creates)
        if not calls:
            calls.append(True)
            other._database._identity = (path.stat().st_dev, path.stat().st_ino)
            assert other._database._put_aside()
        return connection

    monkeypatch.setattr(history._database, "_connected", then_it_is_moved)
    stored = history.record(event(7))
    assert opened().events()[0] == [stored]


def test_a_process_that_dies_while_it_puts_a_database_aside_loses_nothing_new(
    path: Path, opened: Open
) -> None:
    code = """\
rename, dies_at = os.rename, int(sys.argv[2])
def dies(*args):
    global dies_at
    if not dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    dies_at -= 1
    rename(*args)
os.rename = dies
history.record(event(0))
"""
    roots = [path.with_name(f"{n}") / "history.db" for n in range(3)]
    with ExitStack() as stack:
        processes = []
        for n, place in enumerate(roots):
            place.parent.mkdir(parents=True)
            for end in ("", "-wal", "-shm"):
                Path(f"{place}{end}").write_bytes(b"no database" * 1000)
            processes.append(stack.enter_context(child(place, f"{n}", code)))
        assert [process.wait() for process in processes] == [-signal.SIGKILL] * 3
    for place in roots:
        history = opened(place)
        stored = [history.record(event(n)) for n in range(2)]
        assert opened(place).events()[0] == stored
        kept = [p for p in put_aside(place) if p.endswith(tuple("123456789"))]
        assert len(kept) == 1
        assert is_sound(place)


# -- several at once, and sudden deaths


def test_threads_share_one_history(opened: Open) -> None:
    history = opened()

    def write(n: int) -> int:
        history.finish(ended(f"{n}"))
        return number_of(history.record(event(n)))

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(write, range(200)))
    assert sorted(numbers) == list(range(1, 201))
    assert {each.number: each.data["n"] for each in history.events()[0]} == dict(
        zip(numbers, range(200), strict=True)
    )
    assert history.operations(limit=0) == ([], 200)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_processes_that_write_at_once_lose_nothing_and_get_numbers_of_their_own(
    opened: Open, path: Path, is_damaged: bool
) -> None:
    code = """\
print("up", flush=True)
sys.stdin.readline()
for n in range(300):
    while (stored := history.record(event(n))) is None:
        pass
    history.finish(Operation(operation_id=f"{sys.argv[2]}-{n}", operation="sync", started_at=NOW))
    print(stored.number)
"""
    if is_damaged:
        path.parent.mkdir()
        path.write_bytes(b"no database" * 1000)
    with child(path, "a", code) as one, child(path, "b", code) as two:
        outputs = {"a": lines_of(one), "b": lines_of(two)}
        assert [next(lines) for lines in outputs.values()] == ["up", "up"]
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        told = {
            int(number): {"by": name, "n": n}
            for name, lines in outputs.items()
            for n, number in enumerate(lines)
        }
    history = opened()
    assert len(told) == 600
    assert {each.number: each.data for each in history.events()[0]} == told
    assert history.operations(limit=0)[1] == 600
    assert put_aside(path) == (["history.db.damaged-1"] if is_damaged else [])


def test_a_process_killed_while_it_writes_leaves_what_it_was_told_is_stored(
    opened: Open, path: Path
) -> None:
    code = """\
n = 0
while True:
    history.begin(Operation(operation_id=f"{n}", operation="sync", started_at=NOW))
    print(history.record(event(n)).number, flush=True)
    history.finish(Operation(operation_id=f"{n}", operation="sync", started_at=NOW, stdout="x" * 9))
    n += 1
"""
    told: dict[int, int] = {}
    for kill_after in (1, 40, 250):
        with child(path, "it", code) as process:
            lines = lines_of(process)
            for n in range(kill_after):
                told[int(next(lines))] = n
            process.send_signal(signal.SIGKILL)
            told.update({int(line): n for n, line in enumerate(lines, kill_after) if line})
        history = opened()
        kept = {each.number: each.data["n"] for each in history.events(limit=10**6)[0]}
        assert told.items() <= kept.items()
        assert len(kept) <= len(told) + kill_after  # no more than one that was not told, a life
        assert number_of(history.record(event(-1))) == max(kept) + 1
        told[max(kept) + 1] = -1
        assert history.problem == ""
        history.close()
        assert is_sound(path)
    assert put_aside(path) == []
