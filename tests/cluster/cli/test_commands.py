"""The command line as whole processes: exit codes, both streams, and what is left behind.

A refusal is one thing everywhere: its own exit code, on stderr what is wrong and what mends it,
nothing on stdout, no Ray, no variant, no results file.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]  # it has no stubs of its own
import pytest

from ray_envs import ItemResult
from tests.cluster.cli_tools import (
    BIN,
    PAYLOAD,
    Ended,
    Shell,
    WatchedUv,
    at_most,
    calls_in,
    ended,
    free_port,
    lines_of,
    wait_until,
    write_batch,
)

#: A run of a small batch takes seven seconds on an idle machine of two cores, and some tests five.
pytestmark = pytest.mark.timeout(300)

SHIPPED = Path(__file__).parents[3] / "envs" / "sklearn-upgrade" / "batch.toml"

OLD = {"id": "old", "packages": ["six==1.16.0"]}
NEW = {"id": "new", "packages": ["six==1.17.0"]}
TABLES = {"id": "tables", "packages": ["tabulate==0.9.0"]}

#: The fields of a line of the results file that the README promises, and the two that it may have.
FIELDS = {
    "variant_id", "case_id", "ok", "value", "error", "key", "lock_sha256", "python", "ray",
    "node_id", "attempts", "started_at", "duration_s", "call_sha256", "shadowed",
}  # fmt: skip

#: A refused command must not have started anything heavy: it takes half a second when all is idle.
AT_ONCE_S = 5.0

NewShell = Callable[..., Shell]


@pytest.fixture(scope="session")
def warm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root that downloads and compiles each wheel once; the others link to its uv cache."""
    root = tmp_path_factory.mktemp("cli") / "root"
    (root / "uv-cache").mkdir(parents=True)
    return root


@pytest.fixture
def ray_tmp() -> Iterator[Path]:
    """Ray's folder: short, because a socket's path may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def new_shell(ray_tmp: Path, tmp_path: Path) -> Iterator[NewShell]:
    """Makes shells; nothing that was started in one outlives the test."""
    shells: list[Shell] = []

    def make(root: Path, **options: Any) -> Shell:
        shells.append(Shell(root, ray_tmp, tmp_path, **options))
        return shells[-1]

    yield make
    try:
        for each in shells:
            each.check_idle()
    finally:
        for each in shells:
            for process in each.processes():
                process.kill()


@pytest.fixture
def shell(new_shell: NewShell, warm_root: Path) -> Shell:
    """A shell on the root that all tests share."""
    return new_shell(warm_root)


@pytest.fixture
def fresh_root(warm_root: Path, tmp_path: Path) -> Path:
    """A root without variants that has the downloaded wheels."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "uv-cache").symlink_to(warm_root / "uv-cache")
    return root


@pytest.fixture
def fresh(new_shell: NewShell, fresh_root: Path) -> Shell:
    """A shell on a root of its own."""
    return new_shell(fresh_root)


@pytest.fixture(scope="session")
def watched_uv(tmp_path_factory: pytest.TempPathFactory) -> WatchedUv:
    return WatchedUv(tmp_path_factory.mktemp("venv") / "venv")


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """The folder where payloads count their calls; see `PAYLOAD`."""
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


# -- run -------------------------------------------------------------------------------------------


def test_the_shipped_batch_runs_cold_and_then_starts_no_uv_at_all(
    new_shell: NewShell, warm_root: Path, watched_uv: WatchedUv, tmp_path: Path
) -> None:
    shell = new_shell(warm_root, bin_folder=watched_uv.bin)
    watched_uv.forget()
    first = shell("run", SHIPPED, within_s=240)
    assert first.code == 0, first.err
    # The watch sees what it must see: otherwise the second half would prove nothing.
    assert {line.split()[0] for line in watched_uv.starts()} == {"lock", "sync"}

    watched_uv.forget()
    second = shell("run", SHIPPED, "--json")
    assert second.code == 0, second.err
    assert watched_uv.starts() == []
    results = second.data()["results"]
    assert len(results) == 9
    assert all(item["value"]["accuracy"] > 0.9 for item in results)
    seen = {(item["variant_id"], item["key"], item["value"]["scikit_learn"]) for item in results}
    assert len(seen) == 3
    assert {version[:3] for _, _, version in seen} >= {"1.5", "1.6"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "sklearn-upgrade.results.jsonl",
        "sklearn-upgrade.results.jsonl.1",
    }


def test_a_batch_ends_in_a_table_and_a_line_for_each_item(shell: Shell, tmp_path: Path) -> None:
    batch = write_batch(tmp_path / "batch", [OLD, NEW], ["a", "b"])
    results = tmp_path / "tiny.results.jsonl"
    earlier = ItemResult(variant_id="gone", case_id="a", ok=True).model_dump_json() + "\n"
    results.write_text(earlier)
    told = shell("run", batch)
    assert told.code == 0, told.err
    told.check_plain()

    items = lines_of(results)
    assert [set(item) for item in items] == [FIELDS] * 4
    saw = {"old": "1.16.0", "new": "1.17.0"}
    for item in items:
        assert item["ok"]
        assert item["error"] is None
        assert item["value"] == {
            "score": 1,
            "saw": saw[item["variant_id"]],
            "word": item["case_id"],
        }
        assert (item["attempts"], item["shadowed"]) == (1, [])
        assert re.fullmatch("[0-9a-f]{64}", item["lock_sha256"])
        assert re.fullmatch("[0-9a-f]{64}", item["call_sha256"])
        assert re.fullmatch("[0-9a-f]{56}", item["node_id"])
        assert item["started_at"].endswith("Z")
        assert 0 <= item["duration_s"] < 60
    assert len({(item["variant_id"], item["key"]) for item in items}) == 2

    # stdout: the table and nothing else, whole although nobody's terminal is that wide
    for word in ("tiny", "variant", "environment", "node", "old", "new", " a ", " b "):
        assert word in told.out
    assert items[0]["key"][:10] in told.out
    assert items[0]["node_id"][:8] in told.out
    assert "printed by" not in told.out
    assert "printed by a" in told.err
    # stderr: plain lines, not a display that paints over itself
    assert "\r" not in told.err
    assert "\x1b[2K" not in told.err
    assert f"results in {results.name}" in told.err
    kept = results.with_name(results.name + ".1")
    assert kept.read_text() == earlier


def test_a_batch_runs_from_its_own_folder_too(shell: Shell, tmp_path: Path) -> None:
    """Ray gives workers the driver's folder: the payload is there, and in the code folder."""
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    told = shell("run", batch.name, "--json", cwd=batch.parent)
    assert told.code == 0, told.err
    assert told.data()["results"][0]["shadowed"] == []


def test_a_variant_that_cannot_be_resolved_fails_its_items_while_the_others_run(
    fresh: Shell, calls: Path, tmp_path: Path
) -> None:
    (calls / "break-bad").touch()
    batch = write_batch(
        tmp_path / "batch",
        [
            OLD,
            {"id": "nowhere", "packages": ["this-package-is-nowhere-0"]},
            {"id": "conflict", "packages": ["ray==2.59.0"]},
            {"id": "python", "packages": ["six"], "python": "3.9"},
        ],
        ["good", "bad"],
        calls=calls,
    )
    told = fresh("run", batch, "--json", "--results", "here.jsonl")
    assert told.code == 1, told.err
    told_items = told.data()["results"]
    assert {k: told.data()[k] for k in ("name", "total", "ok", "failed", "results_file")} == {
        "name": "tiny", "total": 8, "ok": 1, "failed": 7, "results_file": "here.jsonl",
    }  # fmt: skip
    items = lines_of(tmp_path / "here.jsonl")
    assert items == told_items
    by_id = {(item["variant_id"], item["case_id"]): item for item in items}
    assert by_id["old", "good"]["ok"]
    bad = by_id["old", "bad"]["error"]
    assert (bad["type"], bad["message"]) == ("ValueError", "bad is broken")
    assert "payload.py" in bad["traceback"]
    words = {
        "nowhere": ("ResolutionFailed", ["this-package-is-nowhere-0", "not found"]),
        "conflict": ("ResolutionFailed", ["ray==2.59.0", "ray==2.60.0", "cluster's Ray"]),
        "python": ("InvalidInput", ["3.9", "3.1", "hint:"]),
    }
    for variant, (kind, expected) in words.items():
        for case in ("good", "bad"):
            item = by_id[variant, case]
            assert (item["ok"], item["attempts"], item["error"]["type"]) == (False, 0, kind)
            for word in expected:
                assert word in item["error"]["message"]
    assert fresh.variants() == ["tiny/old"]
    assert (calls_in(calls, "good"), calls_in(calls, "bad")) == (1, 1)


def test_where_nothing_can_run_the_exit_code_is_that_of_the_reason(
    fresh: Shell, tmp_path: Path
) -> None:
    batch = write_batch(
        tmp_path / "batch", [{"id": "nowhere", "packages": ["this-package-is-nowhere-0"]}], ["good"]
    )
    told = fresh("run", batch)
    assert told.code == 8
    assert "this-package-is-nowhere-0" in told.err
    told.check_plain()
    assert fresh.variants() == []


def test_resume_repeats_only_what_failed_or_would_run_in_another_environment(
    shell: Shell, calls: Path, tmp_path: Path
) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["good", "bad"], calls=calls)
    results = tmp_path / "tiny.results.jsonl"
    (calls / "break-bad").touch()
    assert shell("run", batch).code == 1

    (calls / "break-bad").unlink()
    whole = results.read_text()
    results.write_text(whole + '{"variant_id": "old", "case_id": "bad", "ok": tr')
    again = shell("run", batch, "--resume", "--json")
    assert again.code == 0, again.err
    assert (calls_in(calls, "good"), calls_in(calls, "bad")) == (1, 2)
    assert [(i["case_id"], i["ok"]) for i in again.data()["results"]] == [
        ("good", True),
        ("bad", True),
    ]
    assert results.read_text().startswith(whole)
    assert [(i["case_id"], i["ok"]) for i in lines_of(results)][-1] == ("bad", True)
    assert len(lines_of(results)) == 3

    write_batch(tmp_path / "batch", [{**NEW, "id": "old"}], ["good", "bad"], calls=calls)
    changed = shell("run", batch, "--resume", "--json")
    assert changed.code == 0, changed.err
    assert (calls_in(calls, "good"), calls_in(calls, "bad")) == (2, 3)
    assert {i["value"]["saw"] for i in changed.data()["results"]} == {"1.17.0"}


def test_a_results_file_that_another_run_writes_to_is_refused(fresh: Shell, tmp_path: Path) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    results = tmp_path / "tiny.results.jsonl"
    with results.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("its lines\n")
        other.flush()
        told = fresh("run", batch)
        told.check_refusal(3, "another run", results.name, "--results")
    check_nothing_happened(fresh, told)
    assert results.read_text() == "its lines\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("batch", ["batch", "--results"]),
        ("nowhere/results.jsonl", ["nowhere/results.jsonl", "--results"]),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_anything_runs(
    fresh: Shell, tmp_path: Path, given: str, words: list[str]
) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    told = fresh("run", batch, "--results", given)
    told.check_refusal(3, *words)
    check_nothing_happened(fresh, told)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_results_go_to_regular_files_only(fresh: Shell, tmp_path: Path, kind: str) -> None:
    """Reading a device may never end, opening a pipe may wait for ever: neither is tried."""
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    os.mkfifo(tmp_path / "pipe")
    given = {"device": "/dev/full", "pipe": "pipe"}[kind]
    command = [*at_most(2 * 2**30), BIN / "ray-envs", "run", batch, "--results", given]
    told = ended(fresh.command(command), within_s=20)
    told.check_refusal(3, given, "--results")
    check_nothing_happened(fresh, told)


@pytest.mark.parametrize("line", ["not json", '{"variant_id": 1}', "[]"])
def test_resume_refuses_a_damaged_results_file_and_leaves_it_alone(
    fresh: Shell, tmp_path: Path, line: str
) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    results = tmp_path / "tiny.results.jsonl"
    content = ItemResult(variant_id="old", case_id="a", ok=True).model_dump_json() + f"\n{line}\n"
    results.write_text(content)
    told = fresh("run", batch, "--resume")
    told.check_refusal(3, results.name, "line 2", "hint:")
    check_nothing_happened(fresh, told)
    assert results.read_text() == content


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_the_batch_file_itself_and_other_files_are_never_taken_for_results(
    fresh: Shell, tmp_path: Path, options: list[str]
) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    before = batch.read_bytes()
    told = fresh("run", batch, "--results", batch, *options)
    told.check_refusal(3, batch.name, "something other than results", "hint:")
    check_nothing_happened(fresh, told)
    assert batch.read_bytes() == before


def check_nothing_happened(shell: Shell, told: Ended) -> None:
    assert told.seconds < AT_ONCE_S
    assert not shell.started_ray()
    assert shell.variants() == []


# -- bad batch files -------------------------------------------------------------------------------

GOOD = """
name = "tiny"
entrypoint = "payload:look"
code = "."

[[variants]]
id = "old"
packages = ["six==1.16.0"]

[[cases]]
id = "a"
kwargs = { word = "a" }
"""
VARIANT = '[[variants]]\nid = "old"\npackages = ["six==1.16.0"]\n'
CASE = '[[cases]]\nid = "a"\nkwargs = { word = "a" }\n'
SIX = '"six==1.16.0"'
LONG = "x" * 300

#: A change of GOOD (what, by what), the exit code, and words of the message.
BAD: dict[str, tuple[str, str, int, list[str]]] = {
    "unknown key": ('name = "tiny"', 'name = "tiny"\nmetrik = "x"', 3, ["metrik", "'metric'"]),
    "misspelt required key": ("entrypoint", "entripoint", 3, ["entripoint", "'entrypoint'"]),
    "unknown key of a variant": ("packages", "pakages", 3, ["variants[0].pakages", "'packages'"]),
    "unknown key of a case": ("kwargs", "kwarg", 3, ["cases[0].kwarg", "'kwargs'"]),
    "misspelt table": ("[[cases]]", "[[case]]", 3, ["'case'", "'cases'"]),
    "unknown default": (
        "[[cases]]", "[defaults]\nnum_cpu = 1\n[[cases]]", 3, ["defaults.num_cpu", "'num_cpus'"],
    ),
    "number for a name": ('name = "tiny"', "name = 3", 3, ["name", "string"]),
    "string for a list": ('["six==1.16.0"]', SIX, 3, ["variants[0].packages"]),
    "string for a number": (
        "[[cases]]", '[defaults]\nretries = "many"\n[[cases]]', 3, ["defaults.retries", "integer"],
    ),
    "negative number": (
        "[[cases]]", "[defaults]\nnum_cpus = -1\n[[cases]]", 3, ["defaults.num_cpus", "0"],
    ),
    "no time": ("[[cases]]", "[defaults]\ntimeout_s = 0\n[[cases]]", 3, ["defaults.timeout_s"]),
    "infinite number": (
        "[[cases]]", "[defaults]\nnum_cpus = inf\n[[cases]]", 3, ["defaults.num_cpus", "finite"],
    ),
    "no variants": (VARIANT, "", 3, ["empty matrix", "variants", "[[variants]]"]),
    "no cases": (CASE, "", 3, ["empty matrix", "cases", "[[cases]]"]),
    "empty list": (VARIANT, "variants = []\n", 3, ["variants"]),
    "one table for a list": ("[[variants]]", "[variants]", 3, ["[[variants]]", "two brackets"]),
    "the same variant twice": (VARIANT, VARIANT * 2, 3, ["'old'", "variants[1]", "variants[0]"]),
    "the same case twice": (CASE, CASE * 2, 3, ["'a'", "cases[1]", "cases[0]"]),
    "variant without an id": ('id = "old"\n', "", 3, ["variants[0].id", "missing"]),
    "no name": ('name = "tiny"', "", 3, ["name", "missing"]),
    "no TOML": ('name = "tiny"', "name = tiny", 3, ["not valid TOML", "line 2"]),
    "no code folder": ('code = "."', 'code = "cod"', 3, ["'cod'", "does not exist"]),
    "file for the code folder": (
        'code = "."', 'code = "payload.py"', 3, ["payload.py", "not a folder"],
    ),
    "no requirements file": (
        'packages = ["six==1.16.0"]', 'requirements = "requirement.txt"', 3,
        ["requirement.txt", "does not exist", "'requirements.txt'"],
    ),
    "no project": (
        'packages = ["six==1.16.0"]', 'project = "proj"', 3, ["proj", "does not exist"],
    ),
    "two sources": (
        'packages = ["six==1.16.0"]', 'project = "."\nrequirements = "requirements.txt"', 3,
        ["variants[0]", "only one"],
    ),
    "entrypoint without a function": (
        "payload:look", "payload", 3, ["'payload'", "module:function"],
    ),
    "entrypoint as a file": ("payload:look", "payload.py:look", 3, ["write payload:"]),
    "entrypoint with a dot": ("payload:look", "payload.look", 3, ["write payload:look"]),
    "no such module": ("payload:look", "paylaod:look", 3, ["paylaod", "'payload'"]),
    "no such function": ("payload:look", "payload:lok", 3, ["'lok'", "'look'"]),
    "unknown argument": ("{ word =", "{ wird =", 3, ["cases[0]", "look(word, folder=None"]),
    "missing argument": ('{ word = "a" }', "{}", 3, ["cases[0]", "'word'"]),
    "not a number": ('word = "a"', "word = nan", 3, ["cases[0].kwargs.word", "nan"]),
    "infinity": ('word = "a"', "word = [1, -inf]", 3, ["cases[0].kwargs.word[1]", "inf"]),
    "a date": ('word = "a"', "word = 2024-02-03", 3, ["cases[0].kwargs.word", "2024-02-03"]),
    "a time in a table": (
        'word = "a"', "word = { at = 07:32:00 }", 3, ["cases[0].kwargs.word.at", "07:32:00"],
    ),
    "variant id with a slash": ('id = "old"', 'id = "a/b"', 4, ["variants[0].id", "'a/b'"]),
    "variant id that climbs": ('id = "old"', 'id = ".."', 4, ["variants[0].id", "'..'"]),
    "variant id with a space": ('id = "old"', 'id = "a b"', 4, ["variants[0].id", "'a b'"]),
    "variant id too long": ('id = "old"', f'id = "{LONG}"', 4, ["variants[0].id", "300", "64"]),
    "variant id like an option": ('id = "old"', 'id = "-x"', 4, ["variants[0].id", "'-x'"]),
    "variant id with a new line": ('id = "old"', 'id = "a\\nb"', 4, ["variants[0].id"]),
    "variant id empty": ('id = "old"', 'id = ""', 4, ["variants[0].id", "empty"]),
    "case id with a slash": ('id = "a"', 'id = "../a"', 4, ["cases[0].id", "'../a'"]),
    "case id too long": ('id = "a"', f'id = "{LONG}"', 4, ["cases[0].id", "300"]),
    "name that climbs": ('name = "tiny"', 'name = "../tiny"', 4, ["name", "'../tiny'"]),
    "name too long": ('name = "tiny"', f'name = "{LONG}"', 4, ["name", "300"]),
    "index option": (SIX, '"--index-url=https://x.invalid"', 5, ["variants[0]", "--index-url"]),
    "editable": (SIX, '"-e ."', 5, ["variants[0]", "'-e .'", "write the path alone"]),
    "requirements option": (SIX, '"-r r.txt"', 5, ["'-r r.txt'", 'requirements = "r.txt"']),
    "local path": (SIX, '"./six"', 3, ["variants[0]", "six does not exist"]),
    "moving repository": (SIX, '"six @ git+https://h.invalid/s"', 5, ["h.invalid", "commit"]),
    "malformed requirement": (SIX, '"six=1"', 5, ["variants[0]", "'six=1'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_file_is_refused_at_once(fresh: Shell, tmp_path: Path, case: str) -> None:
    what, by_what, code, words = BAD[case]
    assert what in GOOD
    folder = tmp_path / "batch"
    folder.mkdir()
    (folder / "payload.py").write_text(PAYLOAD)
    (folder / "requirements.txt").write_text("six\n")
    (folder / "batch.toml").write_text(GOOD.replace(what, by_what, 1))
    told = fresh("run", folder / "batch.toml")
    told.check_refusal(code, *words)
    check_nothing_happened(fresh, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch", "root"]


def test_a_password_in_a_requirement_is_refused_and_not_repeated(
    fresh: Shell, tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    folder.mkdir()
    (folder / "payload.py").write_text(PAYLOAD)
    (folder / "batch.toml").write_text(
        GOOD.replace(SIX, '"six @ https://me:hunter2@h.invalid/six-1-py3-none-any.whl"')
    )
    told = fresh("run", folder / "batch.toml")
    told.check_refusal(5, "variants[0]")
    assert "hunter2" not in told.err
    check_nothing_happened(fresh, told)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bach.toml", ["bach.toml", "does not exist", "'batch.toml'"]),
        (".", ["folder"]),
        ("pipe", ["pipe"]),
        ("latin", ["UTF-8"]),
    ],
)
def test_a_batch_file_that_is_none_is_refused(
    fresh: Shell, tmp_path: Path, name: str, words: list[str]
) -> None:
    folder = write_batch(tmp_path / "batch", [OLD], ["a"]).parent
    os.mkfifo(folder / "pipe")
    (folder / "latin").write_bytes(b'name = "\xe4"\n')
    told = fresh("run", name, cwd=folder)
    told.check_refusal(3, *words)
    check_nothing_happened(fresh, told)


# -- bad words for create --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["new", "--", "--index-url=https://x.invalid"], 5, ["--index-url", "UV_DEFAULT_INDEX"]),
        (["new", "--index-url=https://x.invalid"], 2, ["--index-url"]),
        (["new", "--", "-e ."], 5, ["'-e .'", "write the path alone"]),
        (["new", "-e", "."], 2, ["-e"]),
        (["new", "--", "-r x"], 5, ["'-r x'", "requirements"]),
        (["new", "-r", "nowhere.txt"], 3, ["nowhere.txt", "does not exist"]),
        (["new", "--project", "nowhere"], 3, ["nowhere", "does not exist"]),
        (["new", "--project", ".", "-r", "nowhere.txt"], 3, ["only one"]),
        (["new", "six", "--python", "3.9"], 3, ["3.9", "hint:"]),
        (["new", "six", "--python", "new"], 3, ["'new'", "3.11"]),
        (["--", "-x", "six"], 4, ["'-x'"]),
        (["a b", "six"], 4, ["'a b'"]),
        (["../a", "six"], 4, ["'..'"]),
        (["a/b/c/d", "six"], 4, ["a/b/c/d", "workflow/node/version"]),
        (["", "six"], 4, ["empty"]),
        ([LONG, "six"], 4, ["300", "64"]),
        (["new", "six=1"], 5, ["'six=1'"]),
        ([], 2, ["VARIANT"]),
    ],
    ids=lambda value: "_".join(value)[:40] if isinstance(value, list) else None,
)
def test_create_refuses_bad_words_at_once(
    fresh: Shell, words: list[str], code: int, said: list[str]
) -> None:
    told = fresh("create", *words)
    told.check_refusal(code, *said)
    check_nothing_happened(fresh, told)


def test_create_of_what_cannot_be_resolved_defines_nothing(fresh: Shell) -> None:
    told = fresh("create", "new", "this-package-is-nowhere-0")
    told.check_refusal(8, "this-package-is-nowhere-0", "not found")
    assert fresh.variants() == []


# -- roots -----------------------------------------------------------------------------------------


@contextmanager
def mounted(place: Path, options: str) -> Iterator[None]:
    """A small file system in memory at `place`; skips where this user may not mount."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("words", [("create", "new", "six"), ("list",), ("status", "new")])
@pytest.mark.parametrize("below", ["", "sub/root"])
def test_a_file_in_the_place_of_the_root_is_told_by_name(
    new_shell: NewShell, tmp_path: Path, words: tuple[str, ...], below: str
) -> None:
    (tmp_path / "file").touch()
    told = new_shell(tmp_path / "file" / below)(*words)
    told.check_refusal(11, str(tmp_path / "file"), "RAY_ENVS_ROOT")
    assert told.seconds < AT_ONCE_S


def test_run_on_a_root_that_cannot_be_used_says_so_and_leaves_no_results(
    new_shell: NewShell, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    told = new_shell(tmp_path / "file")("run", batch)
    told.check_refusal(11, str(tmp_path / "file"), "RAY_ENVS_ROOT")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch", "file"]


def test_a_root_that_is_read_only_is_told_by_name(new_shell: NewShell, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro,size=1m"):
        told = new_shell(tmp_path / "disk" / "root")("create", "new", "six")
    told.check_refusal(11, "read-only", str(tmp_path / "disk"), "RAY_ENVS_ROOT")
    assert told.seconds < AT_ONCE_S


def test_a_root_without_space_is_refused_before_anything_is_downloaded(
    new_shell: NewShell, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=8m"):
        shell = new_shell(tmp_path / "disk" / "root")
        told = shell("create", "new", "six")
        assert shell.variants() == []
    told.check_refusal(11, "MiB are free", str(tmp_path / "disk"), "RAY_ENVS_ROOT")
    assert told.seconds < AT_ONCE_S


def test_a_disk_that_fills_up_during_a_download_is_the_named_reason(
    new_shell: NewShell, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=100m"):
        shell = new_shell(tmp_path / "disk" / "root")
        told = shell("create", "new", "six")
        left = shell.variants()
    told.check_plain()
    assert (told.code, told.out) == (11, ""), told.err
    assert "RAY_ENVS_ROOT" in told.err
    assert left == []


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RAY_ENVS_ROOT": "/tmp/a b"}, ["/tmp/a b", "RAY_ENVS"]),
        ({"RAY_ENVS_ROOT": "relative"}, ["relative", "absolute"]),
        ({"RAY_ENVS_ROOT": "/tmp/$(id)"}, ["shell"]),
        ({"RAY_ENVS_ROT": "/tmp/a"}, ["RAY_ENVS_ROT", "'RAY_ENVS_ROOT'"]),
        ({"RAY_ENVS_UV_RETRIES": "many"}, ["uv_retries", "integer"]),
    ],
)
@pytest.mark.parametrize("command", ["list", "create", "run"])
def test_a_bad_setting_is_refused_at_once(
    fresh: Shell, tmp_path: Path, variables: dict[str, str], words: list[str], command: str
) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    rest = {"list": [], "create": ["new", "six"], "run": [str(batch)]}[command]
    told = fresh(command, *rest, variables=variables)
    told.check_refusal(3, *words)
    check_nothing_happened(fresh, told)


# -- management without a cluster ------------------------------------------------------------------


def imports_of(told: Ended) -> set[str]:
    """The top-level modules that a command imported; it ran with `PROFILED`."""
    lines = re.findall(r"^import time:.*\|\s+(\S+)$", told.err, re.MULTILINE)
    return {name.split(".")[0] for name in lines}


PROFILED = {"PYTHONPROFILEIMPORTTIME": "1"}


def test_no_command_but_run_needs_ray(shell: Shell) -> None:
    """`create`, `list`, `status`, `exec`, `delete`: without the module, without a process."""
    steps: list[tuple[str, ...]] = [
        ("create", "without-ray", "six==1.17.0"),
        ("list",),
        ("status", "without-ray"),
        ("exec", "without-ray", "true"),
        ("delete", "without-ray"),
    ]
    for words in steps:
        told = shell(*words, variables=PROFILED)
        assert told.code == 0, (words, told.err[-500:])
        assert "click" in imports_of(told)  # the look sees what it must see
        assert "ray" not in imports_of(told), words
        shell.check_idle(within_s=5)
        assert not shell.started_ray(), words


def test_list_answers_within_half_a_second(shell: Shell) -> None:
    for number in range(3):
        assert shell("create", f"listed-{number}", "six==1.17.0").code == 0
    told = [shell("list") for _ in range(5)]
    assert all("listed-2" in each.out for each in told)
    # The promise is 0.5 s; other tests and other people share these two cores. Importing ray, which
    # is the accident that this is about, costs a second and more (and see the test above).
    assert statistics.median(each.seconds for each in told) < 1.5


def test_create_shows_each_step_and_creating_again_changes_nothing(fresh: Shell) -> None:
    first = fresh("create", "flow/node", "six==1.16.0")
    assert first.code == 0, first.err
    python = Path(first.out.strip())
    assert first.out == f"{python}\n"
    assert python.is_file()
    assert "flow/node: ready" in first.err

    again = fresh("create", "flow/node", "six==1.16.0", "--json")
    assert (again.code, again.data()["generation"]) == (0, 1)
    refused = fresh("create", "flow/node", "six==1.17.0")
    refused.check_refusal(7, "flow/node", "--replace")
    assert status_of(fresh, "flow/node")["packages"]["six"] == "1.16.0"

    replaced = fresh("create", "flow/node", "six==1.17.0", "--replace", "--json")
    assert replaced.code == 0, replaced.err
    data = replaced.data()
    assert (data["generation"], data["packages"]["six"]) == (2, "1.17.0")
    assert python.is_file()  # whoever runs in the first generation keeps it
    assert data["python_path"] != str(python)

    listed = fresh("list", "--json").data()
    assert [(row["variant_id"], row["status"], row["generation"]) for row in listed] == [
        ("flow/node", "ACTIVE", 2)
    ]
    status = fresh("status", "flow/node")
    assert re.search(r"^status +ACTIVE$", status.out, re.MULTILINE)
    assert re.search(r"^packages .*six==1\.17\.0", status.out, re.MULTILINE)

    assert fresh("delete", "flow/node", "--json").data() == {
        "variant_id": "flow/node",
        "deleted": True,
    }
    assert fresh("list", "--json").data() == []
    assert Path(data["python_path"]).is_file()
    fresh("delete", "flow/node").check_refusal(6, "flow/node")


def status_of(shell: Shell, variant: str) -> Any:
    return shell("status", variant, "--json").data()


@pytest.mark.parametrize("words", [("status",), ("delete",), ("exec", "{}", "true")])
def test_an_unknown_variant_is_told_with_the_nearest_one(
    shell: Shell, words: tuple[str, ...]
) -> None:
    assert shell("create", "known-name", "six==1.17.0").code == 0
    command, *rest = words
    told = shell(command, "known-nmae", *rest[1:])
    told.check_refusal(6, "'known-nmae'", "'known-name'")


@pytest.fixture
def old(shell: Shell) -> Path:
    """The interpreter of the variant "exec-old" of the shared root."""
    told = shell("create", "exec-old", "six==1.16.0")
    assert told.code == 0, told.err
    return Path(told.out.strip())


def test_exec_runs_a_command_in_the_environment(shell: Shell, old: Path) -> None:
    code = """
        import json, os, shutil, sys, six
        print(json.dumps([sys.executable, sys.prefix, six.__version__, os.environ["VIRTUAL_ENV"],
              shutil.which("python"), os.environ.get("PYTHONPATH"), sys.stdin.read()]))
        sys.exit(23)
    """
    process = shell.start(
        "exec", "exec-old", "--", "python", "-c", textwrap.dedent(code),
        stdin=subprocess.PIPE, variables={"PYTHONPATH": "/nowhere"},
    )  # fmt: skip
    told = ended(process, stdin="what it was given")
    assert told.code == 23, told.err
    venv = str(old.parent.parent)
    assert told.data() == [
        str(old), venv, "1.16.0", venv, str(old), None, "what it was given",
    ]  # fmt: skip
    assert told.err == ""


def test_exec_hands_options_over_without_a_separator(shell: Shell, old: Path) -> None:
    told = shell("exec", "exec-old", "python", "-c", "print('it ran')", "--json", "-h")
    assert (told.code, told.out) == (0, "it ran\n"), told.err


def test_exec_holds_the_environment_for_as_long_as_any_command_runs(
    shell: Shell, old: Path
) -> None:
    """`cat` is no Python: the hold is that of `exec` itself."""
    key = old.parents[2].name
    assert not shell.held(key)
    process = shell.start("exec", "exec-old", "cat", stdin=subprocess.PIPE)
    wait_until(lambda: shell.held(key), "the hold of the command")
    assert status_of(shell, "exec-old")["is_held"]
    assert ended(process, stdin="all of it").out == "all of it"
    assert not shell.held(key)


def test_exec_of_a_missing_command_is_a_clear_error(shell: Shell, old: Path) -> None:
    told = shell("exec", "exec-old", "no-such-command")
    told.check_refusal(3, "'no-such-command'", "exec-old", "PATH")


def test_exec_builds_what_this_machine_has_lost(fresh: Shell) -> None:
    python = Path(fresh("create", "lost", "six==1.16.0").out.strip())
    shutil.rmtree(python.parents[2])
    assert status_of(fresh, "lost")["status"] == "NOT_BUILT"
    told = fresh("exec", "lost", "python", "-c", "import six; print(six.__version__)")
    assert (told.code, told.out) == (0, "1.16.0\n"), told.err


def test_a_reader_that_has_seen_enough_is_no_error(shell: Shell, old: Path) -> None:
    process = shell.start("list", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    error = process.stderr.read()
    assert (process.wait(30), error) == (0, "")


# -- Ctrl-C and kill -9 ----------------------------------------------------------------------------


@pytest.fixture
def gated(watched_uv: WatchedUv, fresh_root: Path, new_shell: NewShell) -> Iterator[Shell]:
    """A shell whose `uv sync` waits until the gate is opened."""
    watched_uv.shut_gate()
    yield new_shell(fresh_root, bin_folder=watched_uv.bin)
    watched_uv.open_gate()


def interrupt(process: subprocess.Popen[str], *, times: int = 1) -> Ended:
    """Ctrl-C: SIGINT to everything in the foreground."""
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)  # a quick second one, not the same one: signals that wait are merged
    return ended(process, within_s=30)


def check_interrupted(told: Ended, shell: Shell) -> None:
    assert told.code == 130, told.err
    assert "interrupted" in told.err
    told.check_plain()
    shell.check_idle()


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_an_interrupted_create_leaves_nothing_running_and_the_next_one_succeeds(
    gated: Shell, watched_uv: WatchedUv, times: int
) -> None:
    process = gated.start("create", "new", "six==1.17.0")
    wait_until(watched_uv.is_waiting, "uv sync")
    check_interrupted(interrupt(process, times=times), gated)
    watched_uv.open_gate()
    told = gated("create", "new", "six==1.17.0")
    assert told.code == 0, told.err


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_a_run_that_is_interrupted_while_building_can_be_run_again(
    gated: Shell, watched_uv: WatchedUv, tmp_path: Path, times: int
) -> None:
    batch = write_batch(tmp_path / "batch", [OLD, NEW], ["a"])
    process = gated.start("run", batch)
    wait_until(watched_uv.is_waiting, "uv sync")
    check_interrupted(interrupt(process, times=times), gated)
    assert not (tmp_path / "tiny.results.jsonl").exists()
    if times == 1:
        watched_uv.open_gate()
        told = gated("run", batch, "--resume")
        assert told.code == 0, told.err


def test_a_run_that_is_interrupted_while_running_is_continued_by_the_next(
    shell: Shell, calls: Path, tmp_path: Path
) -> None:
    batch = write_batch(tmp_path / "batch", [TABLES], ["quick", "slow"], calls=calls)
    results = tmp_path / "tiny.results.jsonl"
    (calls / "hold-slow").touch()
    process = shell.start("run", batch)
    wait_until(lambda: calls_in(calls, "slow") and results.read_text(), "the second item")

    meanwhile = shell("run", batch, "--resume")
    meanwhile.check_refusal(3, "another run", results.name)

    told = interrupt(process)
    check_interrupted(told, shell)
    assert "1 of 2 items" in told.err
    assert "--resume" in told.err
    assert [item["case_id"] for item in lines_of(results)] == ["quick"]

    (calls / "hold-slow").unlink()
    again = shell("run", batch, "--resume", "--json")
    assert again.code == 0, again.err
    assert again.data()["ok"] == 2
    assert (calls_in(calls, "quick"), calls_in(calls, "slow")) == (1, 2)


#: Ray's own: they notice the end of their raylet at once, and then try for a minute to tell it to
#: a cluster that is gone.
AGENTS_OF_RAY = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def kill_9(process: subprocess.Popen[str], shell: Shell) -> None:
    """Kill a command; all that it had started must end by itself."""
    process.kill()
    ended(process)
    shell.check_idle(within_s=90, but=AGENTS_OF_RAY)
    for agent in shell.processes():
        agent.kill()


def test_a_run_that_is_killed_takes_its_ray_and_its_uv_with_it(
    gated: Shell, watched_uv: WatchedUv, calls: Path, tmp_path: Path
) -> None:
    batch = write_batch(tmp_path / "batch", [TABLES], ["quick", "slow"], calls=calls)
    process = gated.start("run", batch)
    wait_until(watched_uv.is_waiting, "uv sync")
    kill_9(process, gated)
    watched_uv.open_gate()

    (calls / "hold-slow").touch()
    process = gated.start("run", batch)
    results = tmp_path / "tiny.results.jsonl"
    wait_until(
        lambda: calls_in(calls, "slow") and results.exists() and results.read_text(),
        "the second item",
        within_s=60,
    )
    kill_9(process, gated)

    (calls / "hold-slow").unlink()
    told = gated("run", batch, "--resume")
    assert told.code == 0, told.err
    assert (calls_in(calls, "quick"), calls_in(calls, "slow")) == (1, 2)


# -- with a cluster --------------------------------------------------------------------------------


#: The cluster's own token. Where `~/.ray/auth_token` exists, `ray start` wants one of every driver;
#: that of the machine's user is none of ours.
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


class Cluster:
    """`ray start --head` on ports and in a folder of its own; its processes carry its mark."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.address = f"127.0.0.1:{free_port()}"
        self.process = shell.command(
            [
                BIN / "python", "-u", BIN / "ray", "start", "--head", "--block",
                "--num-cpus", "2", "--port", self.address.split(":")[1],
                "--include-dashboard", "false", "--temp-dir", shell.ray_tmp,
                "--object-store-memory", "100000000", "--disable-usage-stats",
                "--min-worker-port", "0", "--max-worker-port", "0",
            ],
            stdout=(shell.ray_tmp / "start.log").open("w"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    def actors(self, name: str) -> list[psutil.Process]:
        """The processes of the actors of a class."""
        found = []
        for process in self.shell.processes():
            try:
                if process.cmdline()[0].split(".")[0] == f"ray::{name}":
                    found.append(process)
            except (psutil.Error, IndexError):
                continue
        return found

    def manager(self) -> psutil.Process:
        """The process of the one EnvManager."""
        (process,) = self.actors("EnvManager")
        return process

    def stop(self) -> None:
        """End what this fixture has started, and nothing else: `ray stop` would end all Rays."""
        for process in self.shell.processes():
            with suppress(psutil.NoSuchProcess):  # they end one another
                process.kill()
        self.process.wait(30)
        self.shell.check_idle()


SECRET = {"ONLY_IN_THE_JOB": "from the user's job"}

#: A user's program whose own `ray.init` comes first, with a job-level runtime_env.
OWN_INIT = """
import os, sys, ray
from ray_envs import RayEnvironmentProvider

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR",
         runtime_env={"env_vars": {"ONLY_IN_THE_JOB": "x"}, "working_dir": sys.argv[1]})

@ray.remote
def look():
    import os, six
    return os.environ.get("ONLY_IN_THE_JOB"), os.path.exists("job-file"), six.__version__

with RayEnvironmentProvider.connect() as envs:
    envs.create("own-init", {"packages": ["six==1.16.0"]})
    envs.prepare("own-init")
    print(ray.get(look.options(**envs.options("own-init")).remote(), timeout=60))
assert ray.is_initialized(), "close() ended a Ray that was the user's"
"""

#: Asks the manager without having ray_envs imported: its boundary is plain data.
ASK = """
import json, os, sys, ray
ray.init(address=os.environ["RAY_ADDRESS"], namespace="ray_envs", log_to_driver=False,
         logging_level="ERROR")
manager = ray.get_actor("EnvManager", "ray_envs")
told = ray.get(manager.describe.remote(), timeout=60)
paths = ray.get(manager.__ray_call__.remote(lambda self: __import__("sys").path), timeout=60)
assert "ray_envs" not in sys.modules
print(json.dumps({"describe": told, "path": paths}))
"""


@pytest.fixture(scope="module")
def cluster(
    warm_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Cluster, Path, str]]:
    """A cluster whose manager was started for a user's program with a job-level runtime_env.

    Also that job's folder, and what the program printed: first come, and so the worst case of what
    the manager could have inherited.
    """
    folder = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    work = tmp_path_factory.mktemp("job")
    (work / "job-file").touch()
    running = Cluster(
        Shell(warm_root, folder, Path("/"), variables={"OF_THE_CLUSTER": "1", **AUTH})
    )
    user = Shell(warm_root, folder, work, variables=AUTH, owns_ray_tmp=False)
    try:
        log = folder / "start.log"
        wait_until(
            lambda: "Ray runtime started" in log.read_text() or running.process.poll(),
            log.read_text,
        )
        told = ended(
            user.command(
                [str(BIN / "python"), "-c", OWN_INIT, str(work)],
                variables={"RAY_ADDRESS": running.address, **SECRET},
            )
        )
        assert told.code == 0, told.err
        yield running, work, told.out
        user.check_idle()
    finally:
        running.stop()
        shutil.rmtree(folder)


@pytest.fixture
def member(new_shell: NewShell, warm_root: Path) -> Shell:
    """A shell of somebody who may use the cluster, on its root."""
    return new_shell(warm_root, variables=AUTH)


def python_in(shell: Shell, cluster: Cluster, code: str, *words: str) -> Ended:
    """How a program ended that a user started on a node of the cluster."""
    command = [BIN / "python", "-c", code, *words]
    return ended(shell.command(command, variables={"RAY_ADDRESS": cluster.address}))


def test_the_manager_takes_nothing_over_from_the_job_that_needed_it_first(
    cluster: tuple[Cluster, Path, str], member: Shell, warm_root: Path
) -> None:
    running, work, _ = cluster
    told = python_in(member, running, ASK)
    assert told.code == 0, told.err
    assert told.data()["describe"]["root"] == str(warm_root)
    assert str(work) not in told.data()["path"]
    assert not [p for p in told.data()["path"] if "working_dir_files" in p or p == ""]

    process = running.manager()
    environ = process.environ()
    assert environ["OF_THE_CLUSTER"] == "1"  # the look sees what it must see
    assert "ONLY_IN_THE_JOB" not in environ
    assert str(work) not in json.dumps(environ)
    assert process.cwd() == "/"
    (agent,) = running.actors("NodeAgent")
    assert "ONLY_IN_THE_JOB" not in agent.environ()
    assert agent.cwd() == "/"


def test_a_program_with_its_own_init_and_runtime_env_gets_its_variants_too(
    cluster: tuple[Cluster, Path, str],
) -> None:
    _, _, printed = cluster
    assert printed == "('x', True, '1.16.0')\n"


def test_runs_share_the_manager_of_a_cluster_and_leave_it_there(
    cluster: tuple[Cluster, Path, str], member: Shell, tmp_path: Path
) -> None:
    """The second under `uv run`, in a folder that Ray could not upload if it tried."""
    running, _, _ = cluster
    before = running.manager().pid
    batch = write_batch(tmp_path / "batch", [OLD, NEW], ["a"])
    first = member("run", batch, "--json", variables={"RAY_ADDRESS": running.address})
    assert first.code == 0, first.err
    assert running.manager().pid == before

    junk = tmp_path / "junk"
    junk.mkdir()
    with (junk / "large").open("wb") as file:
        file.truncate(2**30)
    (junk / "six.py").write_text("raise ImportError('the junk won')\n")
    (junk / ".env").write_text("JUNK=1\n")
    told = ended(
        member.command(
            [
                BIN / "uv", "run", "--no-project", "--python", BIN / "python", "--",
                BIN / "ray-envs", "run", batch, "--json", "--address", running.address,
            ],
            cwd=junk,
            variables=SECRET,
        )
    )  # fmt: skip
    assert told.code == 0, told.err
    assert {item["value"]["saw"] for item in told.data()["results"]} == {"1.16.0", "1.17.0"}
    assert running.manager().pid == before
    assert "ONLY_IN_THE_JOB" not in running.manager().environ()
    assert {item["node_id"] for item in told.data()["results"]} == {
        item["node_id"] for item in first.data()["results"]
    }


def test_commands_on_a_root_with_a_manager_go_through_it(
    cluster: tuple[Cluster, Path, str], member: Shell
) -> None:
    running, _, _ = cluster
    told = member("create", "through", "tabulate==0.9.0", "--json")
    assert told.code == 0, told.err
    (node_id,) = told.data()["nodes"]
    assert re.fullmatch("[0-9a-f]{56}", node_id)  # a Ray node, where no cluster would say "local"
    ask = ASK.replace("told = ray.get(manager.describe.remote(), timeout=60)",
                      "told = ray.get(manager.list_envs.remote(), timeout=60)")  # fmt: skip
    known = python_in(member, running, ask).data()["describe"]
    assert "through" in {row["variant_id"] for row in known}

    listed = member("list", "--json", variables=PROFILED)
    assert "through" in {row["variant_id"] for row in listed.data()}
    assert "ray" not in imports_of(listed)  # reads use the disk, cluster or not

    assert member("delete", "through").code == 0
    known = python_in(member, running, ask).data()["describe"]
    assert "through" not in {row["variant_id"] for row in known}


def test_an_address_where_nothing_answers_is_a_clear_error(fresh: Shell, tmp_path: Path) -> None:
    batch = write_batch(tmp_path / "batch", [OLD], ["a"])
    address = f"127.0.0.1:{free_port()}"
    told = fresh("run", batch, "--address", address, within_s=30)
    told.check_refusal(14, address, "--address")
    assert not (tmp_path / "tiny.results.jsonl").exists()


#: `ray job submit`: Ray's own job manager and supervisor, without the HTTP of the dashboard, which
#: is not installed here.
SUBMIT = """
import asyncio, json, os, sys, tempfile, ray
from ray.dashboard.modules.job.job_manager import JobManager
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
from ray._private.worker import global_worker

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR",
         namespace="SUPERVISOR_ACTOR_RAY_NAMESPACE")

async def main():
    scratch = tempfile.mkdtemp()
    runtime_env = upload_working_dir_if_needed(json.loads(sys.argv[2]), True, scratch)
    jobs = JobManager(global_worker.gcs_client, scratch)
    job = await jobs.submit_job(entrypoint=sys.argv[1], runtime_env=runtime_env)
    while True:
        status = await jobs.get_job_status(job)
        if status is not None and status.is_terminal():
            break
        await asyncio.sleep(0.1)
    info = await jobs.get_job_info(job)
    print(json.dumps({"status": str(status.value), "message": info.message,
                      "logs": jobs.get_job_logs(job)}))

asyncio.run(main())
"""


def test_it_runs_inside_a_submitted_job(
    cluster: tuple[Cluster, Path, str], member: Shell, tmp_path: Path
) -> None:
    running, _, _ = cluster
    before = running.manager().pid
    folder = write_batch(tmp_path / "batch", [OLD], ["a"]).parent
    results = tmp_path / "job.jsonl"
    entrypoint = f"{BIN / 'ray-envs'} run batch.toml --results {results}"
    runtime_env = {"working_dir": str(folder), "env_vars": SECRET}
    told = python_in(member, running, SUBMIT, entrypoint, json.dumps(runtime_env))
    assert told.code == 0, told.err
    # Ray may print a line of its own before ours, in spite of log_to_driver=False
    job = json.loads(told.out.splitlines()[-1])
    assert job["status"] == "SUCCEEDED", job
    assert [item["value"]["saw"] for item in lines_of(results)] == ["1.16.0"]
    assert running.manager().pid == before
