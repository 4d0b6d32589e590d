"""Every verb of the command line, as whole processes on a root without Ray.

`test_cli`, of the cluster's floor, has `run`, `exec` and what goes through a manager actor.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ray_envs.cli.main import cli
from ray_envs.client.provider import RayEnvironmentProvider
from ray_envs.events import EnvEvent, EventKind, Operation, OperationStatus
from ray_envs.manager.history import History
from ray_envs.manager.registry import Registry
from ray_envs.models import RAY_GROUP, EnvId, Generation, Target
from ray_envs.node.store import Store
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from tests import definitions
from tests.cluster.cli_tools import BIN, Ended, Shell, WatchedUv, ended, wait_until

PROFILED = {"PYTHONPROFILEIMPORTTIME": "1"}
NOW = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)

NewShell = Callable[..., Shell]


@pytest.fixture
def new_shell(tmp_path: Path) -> Iterator[NewShell]:
    """Makes shells in a folder of their own; nothing that was started in one outlives the test."""
    cwd, ray_tmp = tmp_path / "cwd", Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    cwd.mkdir()
    shells: list[Shell] = []

    def make(root: Path, **options: Any) -> Shell:
        shells.append(Shell(root, ray_tmp, cwd, **options))
        return shells[-1]

    yield make
    try:
        for each in shells:
            each.check_idle()
            assert not each.started_ray()
    finally:
        for each in shells:
            for process in each.processes():
                process.kill()
        shutil.rmtree(ray_tmp)


@pytest.fixture
def shell(new_shell: NewShell, root: Path) -> Shell:
    """A shell on an empty root."""
    return new_shell(root)


@pytest.fixture
def warm_shell(new_shell: NewShell, warm: Settings) -> Shell:
    """A shell on a root whose uv cache has what ray needs."""
    return new_shell(warm.root)


@pytest.fixture(scope="module")
def watched_uv(tmp_path_factory: pytest.TempPathFactory) -> WatchedUv:
    return WatchedUv(tmp_path_factory.mktemp("venv") / "venv")


@pytest.fixture
def gated(new_shell: NewShell, warm: Settings, watched_uv: WatchedUv) -> Iterator[Shell]:
    """A warm shell whose `uv sync` can be made to wait."""
    yield new_shell(warm.root, bin_folder=watched_uv.bin)
    watched_uv.open_gate()


def generation(number: int = 1, *, key: str = "a" * 32, **packages: str) -> Generation:
    return Generation(
        number=number,
        definition=Definition(packages=tuple(packages)),
        key=key,
        lock_sha256="b" * 64,
        fingerprint="c" * 64,
        target=Target(python="3.11.7", ray="2.60.0"),
        platform="linux-x86_64-glibc2.36",
        created_at=NOW,
        packages=packages,
    )


def define(root: Path, name: str, *generations: Generation) -> None:
    """Write a definition by hand, where nobody will build or lock it."""
    registry = Registry(Settings(root=root))
    for each in generations or (generation(),):
        definitions.commit(
            registry, EnvId.parse(name), each, pyproject="[project]\n", uv_lock="version = 1\n"
        )


def ok(told: Ended) -> Ended:
    assert told.code == 0, (told.code, told.err)
    told.check_plain()
    return told


def lines(told: Ended) -> list[str]:
    return ok(told).out.splitlines()


def imports_of(told: Ended) -> set[str]:
    """The top-level modules that a command imported; it ran with `PROFILED`."""
    found = re.findall(r"^import time:.*\|\s+(\S+)$", told.err, re.MULTILINE)
    return {name.split(".")[0] for name in found}


# -- the way round ---------------------------------------------------------------------------------


def test_a_variant_goes_all_the_way_round_and_comes_back_as_the_same_environment(
    warm_shell: Shell, warm: Settings, tmp_path: Path
) -> None:
    shell = warm_shell
    ok(shell("create", "v", "six==1.16.0", "--env-var", "COLOUR=red=blue"))

    tried = ok(shell("add", "v", "iniconfig==2.0.0", "--dry-run"))
    assert tried.out.splitlines()[0] == "+ iniconfig 2.0.0"
    assert "dry run" in tried.err
    assert shell("status", "v", "--json").data()["generation"] == 1

    given = shell.cwd / "more.txt"
    given.write_text("iniconfig==2.0.0  # a comment\n\n")
    added = ok(shell("add", "v", "-r", str(given)))
    assert added.out.splitlines()[0] == "+ iniconfig 2.0.0"
    assert re.search(r"^generation 2, environment \w{32}$", added.out, re.MULTILINE)
    assert "v: ready" in added.err

    updated = lines(shell("update", "v", "six==1.17.0"))
    assert updated[0] == "~ six 1.16.0 -> 1.17.0"
    removed = shell("remove", "v", "iniconfig", "--json").data()
    assert removed["diff"] == {"added": {}, "removed": {"iniconfig": "2.0.0"}, "changed": {}}
    assert (removed["generation"], removed["is_changed"]) == (4, True)

    assert lines(shell("diff", "v", "1", "3")) == ["+ iniconfig 2.0.0", "~ six 1.16.0 -> 1.17.0"]
    assert lines(shell("diff", "v", "3")) == ["- iniconfig 2.0.0"]
    assert "same packages" in ok(shell("diff", "v", "4")).err
    rolled = lines(shell("rollback", "v", "--to", "2"))
    assert rolled[:2] == ["+ iniconfig 2.0.0", "~ six 1.17.0 -> 1.16.0"]
    assert rolled[2].startswith("generation 2, environment ")
    assert "nothing was changed" in ok(shell("rollback", "v", "--to", "2")).err

    shown = lines(shell("deps", "v"))
    assert any(line.split() == ["iniconfig", "2.0.0", "iniconfig==2.0.0"] for line in shown)
    assert any(line.split() == ["idna", *line.split()[1:2], "-"] for line in shown)
    table = lines(shell("generations", "v"))
    assert [row.split()[:2] for row in table[1:]] == [
        ["1", "create"], ["*2", "add"], ["3", "update"], ["4", "remove"],
    ]  # fmt: skip
    row = shell("status", "v", "--json").data()
    assert (row["generations"], row["env_vars"]) == ([1, 2, 3, 4], {"COLOUR": "red=blue"})
    assert row["packages"]["iniconfig"] == "2.0.0"

    # What the disk says is what the manager says.
    with RayEnvironmentProvider.without_cluster(warm) as provider:
        assert shell("deps", "v", "--json").data() == provider.deps("v")
        assert shell("diff", "v", "1", "3", "--json").data() == provider.diff("v", 1, 3)
        ours, theirs = shell("generations", "v", "--json").data(), provider.generations("v")
        assert ours == [{k: v for k, v in r.items() if k != "fits_cluster"} for r in theirs]
        project = provider.export("v")["files"]

    paths = lines(shell("export", "v"))
    assert paths == ["v/pyproject.toml", "v/uv.lock", "v/options.json"]
    assert {Path(p).name: (shell.cwd / p).read_text() for p in paths} == project
    ok(shell("export", "v"))  # the same again is no conflict
    (shell.cwd / "v" / "uv.lock").write_text("mine\n")
    shell("export", "v").check_refusal(3, "v/uv.lock", "--to", "--force")
    assert (shell.cwd / "v" / "uv.lock").read_text() == "mine\n"
    ok(shell("export", "v", "--force"))
    assert (shell.cwd / "v" / "uv.lock").read_text() == project["uv.lock"]
    text = ok(shell("export", "v", "--format", "requirements")).out
    assert "iniconfig==2.0.0" in text
    assert "--hash=sha256:" in text
    ok(shell("export", "v", "--format", "pylock", "--to", "locks", "--generation", "3"))
    assert 'name = "iniconfig"' in (shell.cwd / "locks" / "pylock.toml").read_text()

    would = ok(shell("import", "copy", "v", "--dry-run"))
    assert would.out == f"{row['key']}\n"
    assert shell.variants() == ["v"]
    assert ok(shell("import", "copy", "v")).out == f"{row['key']}\n"
    copy = shell("status", "copy", "--json").data()
    assert (copy["key"], copy["env_vars"]) == (row["key"], row["env_vars"])
    assert copy["lock_sha256"] == row["lock_sha256"]

    assert "pinned" in ok(shell("pin", "copy")).err
    assert shell("status", "copy", "--json").data()["is_pinned"]
    ok(shell("pin", "--off", "copy"))
    kept = {r.split()[0] for r in lines(shell("gc", "--dry-run"))[1:]}
    assert kept == {r["key"] for r in ours}
    assert "could be" in ok(shell("delete", "v", "--dry-run")).err
    assert shell.variants() == ["copy", "v"]
    ok(shell("delete", "v"))
    collected = lines(shell("gc", "--idle-hours", "0"))[1:]
    verdicts = {r.split()[0]: "deleted" in r for r in collected}
    assert verdicts == {key: key != row["key"] for key in kept}
    assert [p.name for p in Store(warm).folder.iterdir() if p.is_dir()] == [row["key"]]

    told = shell("operations", "v", "--json").data()
    assert [r["operation"] for r in reversed(told["rows"])] == [
        "create", "add", "update", "remove", "rollback", "delete",
    ]  # fmt: skip
    assert {r["status"] for r in told["rows"]} == {"succeeded"}
    kinds = [line.split()[2] for line in lines(shell("events", "v", "--kind", "DependenciesAdded"))]
    assert kinds == ["DependenciesAdded"]


def test_a_dry_run_of_create_says_what_would_be_installed_and_leaves_nothing(
    warm_shell: Shell, warm: Settings
) -> None:
    words = ("create", "v", "six==1.17.0", "--only-binary", "--exclude-newer", "2027-01-01")
    told = ok(warm_shell(*words, "--dry-run"))
    assert "+ six 1.17.0" in told.out.splitlines()
    assert told.out.splitlines()[-1].startswith("generation 1, environment ")
    assert "dry run" in told.err
    assert warm_shell.variants() == []
    assert not Store(warm).records()
    assert warm_shell("operations", "--json").data() == {"rows": [], "total": 0}


# -- what is wrong ---------------------------------------------------------------------------------

#: Words of a command on a root that has "known" (two generations), its exit code, and what it says.
REFUSED: dict[str, tuple[tuple[str, ...], int, list[str]]] = {
    **{
        f"unknown variant of {words[0]}": (words, 6, ["'knwon'", "'known'"])
        for words in (
            ("status", "knwon"),
            ("deps", "knwon"),
            ("generations", "knwon"),
            ("diff", "knwon", "1"),
            ("export", "knwon"),
            ("sync", "known", "knwon"),
            ("add", "knwon", "six"),
            ("update", "knwon"),
            ("remove", "knwon", "six"),
            ("rollback", "knwon"),
            ("pin", "knwon"),
            ("delete", "knwon"),
            ("operations", "knwon"),
            ("events", "knwon"),
            ("explain", "knwon"),
            ("doctor", "knwon"),
        )
    },
    "id that is a path": (("deps", "../x"), 4, ["'..'"]),
    "id of operations": (("operations", "a/b/c/d"), 4, ["'a/b/c/d'"]),
    "generation of diff": (("diff", "known", "1", "9"), 3, ["generation 9", "1, 2"]),
    "generation of export": (("export", "known", "--generation", "9"), 3, ["9", "1, 2"]),
    "generation of rollback": (("rollback", "known", "--to", "9"), 3, ["9", "1, 2"]),
    "no generation number": (("diff", "known", "first"), 2, ["'first'"]),
    "moment": (("operations", "--delete", "--before", "May"), 3, ["'May'", "2026-01-31"]),
    "delete without a filter": (("operations", "--delete"), 3, ["every operation"]),
    "before without delete": (("operations", "--before", "2026-01-01"), 2, ["--delete"]),
    "operation": (("operations", "--operation", "dd"), 2, ["'dd'", "'add'"]),
    "status": (("operations", "--status", "ok"), 2, ["'ok'", "'succeeded'"]),
    "limit": (("operations", "--limit", "0"), 2, ["--limit"]),
    "kind": (("events", "--kind", "Nothing"), 2, ["'Nothing'"]),
    "negative number": (("events", "--since", "-2"), 2, ["--since"]),
    "negative hours": (("gc", "--idle-hours", "-1"), 2, ["'-1'"]),
    "hours that are no number": (("gc", "--idle-hours", "nan"), 2, ["'nan'"]),
    "nothing to add": (("add", "known"), 5, ["no packages", "-r"]),
    "option as package": (("add", "known", "--", "--index-url"), 5, ["--index-url"]),
    "local path": (("add", "known", "./here"), 5, ["./here"]),
    "missing requirements file": (("add", "known", "-r", "no.txt"), 3, ["no.txt"]),
    "what is not declared": (("remove", "known", "sixx"), 5, ["'sixx'", "'six'"]),
    "nothing to sync": (("sync",), 2, ["--all"]),
    "both to sync": (("sync", "known", "--all"), 2, ["--all"]),
    "variable without value": (("create", "x", "--env-var", "A"), 3, ["'A'", "NAME=VALUE"]),
    "reserved variable": (("create", "x", "--env-var", "PATH=/x"), 3, ["PATH"]),
    "date": (("create", "x", "six", "--exclude-newer", "May"), 3, ["'May'", "2026-01-31"]),
    "extra without project": (("create", "x", "--extra", "a"), 3, ["project"]),
    "missing folder to import": (("import", "x", "nowhere"), 3, ["nowhere"]),
    "file to import": (("import", "x", "file"), 3, ["file", "folder"]),
    "import without lock": (("import", "x", "nolock"), 3, ["nolock", "uv.lock", "export"]),
    "import without project": (("import", "x", "empty"), 3, ["pyproject.toml"]),
    "options that are no JSON": (("import", "x", "badjson"), 3, ["options.json", "JSON"]),
    "options with an unknown key": (("import", "x", "unknown"), 3, ["'extra'", "'extras'"]),
    "export into a file": (("export", "known", "--to", "file/x"), 3, ["file/x", "--to"]),
    "export where nobody may write": (("export", "known", "--to", "/proc/x"), 3, ["/proc/x"]),
    "format": (("export", "known", "--format", "toml"), 2, ["'toml'", "'pylock'"]),
    "shell": (("completion", "tcsh"), 2, ["'tcsh'", "'zsh'"]),
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the variant "known" and, beside it, folders that nobody can import."""
    folder = tmp_path_factory.mktemp("known")
    define(folder / "root", "known", generation(1, six="1.16.0"), generation(2, six="1.17.0"))
    cwd = folder / "cwd"
    cwd.mkdir()
    (cwd / "file").touch()
    (cwd / "empty").mkdir()
    for name, options in (("nolock", None), ("badjson", "{"), ("unknown", '{"extra": []}')):
        (cwd / name).mkdir()
        (cwd / name / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "0"\n')
        if options is not None:
            (cwd / name / "uv.lock").write_text("version = 1\n")
            (cwd / name / "options.json").write_text(options)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_accepted_is_refused_in_plain_words(
    case: str, new_shell: NewShell, known: Path
) -> None:
    words, code, expected = REFUSED[case]
    told = new_shell(known / "root")(*words, cwd=known / "cwd")
    told.check_refusal(code, *expected)
    assert Registry(Settings(root=known / "root")).all()[0].current.number == 2


def test_a_damaged_definition_hides_no_other_and_can_be_forgotten(shell: Shell) -> None:
    define(shell.root, "bad")
    define(shell.root, "good")
    (shell.root / "envs" / "default_bad" / "metadata.json").write_text("{")
    told = shell("list")
    assert (told.code, "good" in told.out, "default_bad" in told.err) == (11, True, True)
    shell("deps", "bad").check_refusal(11, "default_bad")
    ok(shell("delete", "bad"))
    assert shell.variants() == ["good"]


def test_sync_goes_on_after_a_variant_that_it_cannot_help(
    warm_shell: Shell, warm: Settings
) -> None:
    for name in ("a", "z"):
        ok(warm_shell("create", name, "six==1.17.0"))
    python = Path(warm_shell("status", "a", "--json").data()["python_path"])
    shutil.rmtree(python.parents[2])
    define(warm.root, "bad")
    (warm.root / "envs" / "default_bad" / "metadata.json").write_text("{")
    told = warm_shell("sync", "--all")
    assert told.code == 11, told.err
    assert "ray-envs: bad: " in told.err
    assert [line.split(":")[0] for line in told.out.splitlines()] == ["a", "z"]
    assert python.exists()  # what was lost is there again


# -- Ctrl-C ----------------------------------------------------------------------------------------


def on_disk(root: Path) -> dict[str, bytes]:
    """The definitions, and which environments are ready."""
    files = [p for p in (root / "envs").rglob("*") if p.is_file() and ".venv" not in p.parts]
    files += list((root / "store").glob("*/record.json"))
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in files
        if p.suffix not in (".holder",) and (p.suffix != ".lock" or p.name == "uv.lock")
    }


@pytest.mark.parametrize(
    "words",
    [
        ("create", "new", "six==1.17.0"),
        ("create", "v", "six==1.17.0", "--replace"),
        ("add", "v", "iniconfig==2.0.0"),
        ("import", "new", "exported"),
        ("rollback", "v"),
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_an_interrupted_change_is_undone_and_can_be_made_again(
    words: tuple[str, ...], gated: Shell, watched_uv: WatchedUv
) -> None:
    ok(gated("create", "v", "six==1.16.0"))
    if words[0] == "import":
        ok(gated("export", "v", "--to", "exported"))
    if words[0] == "rollback":
        ok(gated("create", "v", "six==1.15.0", "--replace"))
    if words[0] in ("import", "rollback"):  # or there would be nothing to build
        first = gated("generations", "v", "--json").data()[0]["key"]
        shutil.rmtree(gated.root / "store" / first)
    before = on_disk(gated.root)
    watched_uv.shut_gate()
    process = gated.start(*words)
    wait_until(watched_uv.is_waiting, "uv sync", within_s=60)
    os.killpg(process.pid, signal.SIGINT)
    told = ended(process, within_s=60)
    watched_uv.open_gate()
    assert (told.code, told.out) == (130, "")
    assert told.err.splitlines()[-1] == "ray-envs: interrupted"
    assert all(": " in line for line in told.err.splitlines())  # phases, and that line
    gated.check_idle()
    assert on_disk(gated.root) == before
    (last,) = gated("operations", "--limit", "1", "--json").data()["rows"]
    assert (last["operation"], last["status"]) == (words[0], "interrupted")
    ok(gated(*words))


# -- history ---------------------------------------------------------------------------------------


def history(root: Path) -> History:
    root.mkdir(exist_ok=True)
    return History(root / "history.db", keep_s=1e9)


def operation(name: str, **fields: Any) -> Operation:
    fields = {"operation_id": name * 8, "variant_id": name, "started_at": NOW, **fields}
    return Operation(operation="add", **fields)


def test_an_operation_whose_process_died_is_not_shown_as_running(shell: Shell) -> None:
    log = history(shell.root)
    log.begin(operation("dead"))
    log.begin(operation("alive"))
    log.close()

    async def look_while_one_is_alive() -> Ended:
        registry = Registry(Settings(root=shell.root))
        async with registry.lock(EnvId.parse("alive")):
            return await asyncio.to_thread(shell, "operations", "--json")

    rows = asyncio.run(look_while_one_is_alive()).data()["rows"]
    assert {r["variant_id"]: r["status"] for r in rows} == {
        "dead": "interrupted",
        "alive": "running",
    }
    settled = shell("events", "--json").data()["events"][0]
    assert (settled["kind"], settled["variant_id"]) == ("OperationInterrupted", "dead")


def test_operations_are_filtered_paged_and_deleted(shell: Shell) -> None:
    log = history(shell.root)
    for month in range(1, 7):
        log.finish(
            operation(
                "even" if month % 2 == 0 else "odd",
                operation_id=str(month),
                started_at=NOW.replace(month=month, day=1),
                status=OperationStatus.FAILED if month == 3 else OperationStatus.SUCCEEDED,
                error={"type": "UvFailed", "message": "no network"} if month == 3 else None,
            )
        )
    log.close()

    def ids(*words: str) -> list[str]:
        return [r["operation_id"] for r in ok(shell("operations", *words, "--json")).data()["rows"]]

    assert ids() == ["6", "5", "4", "3", "2", "1"]
    assert ids("odd") == ["5", "3", "1"]
    assert ids("--status", "failed") == ["3"]
    assert ids("--operation", "remove") == []
    assert ids("--limit", "2", "--offset", "1") == ["5", "4"]
    table = ok(shell("operations", "--limit", "4"))
    assert "no network" in table.out
    assert "4 of 6" in table.err
    told = ok(shell("operations", "odd", "--delete", "--before", "2026-05-01", "--json"))
    assert told.data() == {"deleted": 2}
    assert ids() == ["6", "5", "4", "2"]
    assert "1 operations" in ok(shell("operations", "--delete", "--before", "2026-02-02")).err
    assert ids() == ["6", "5", "4"]


def tell(log: History, number: int, variant: str = "v") -> None:
    kind = EventKind.SYNCED if number % 2 else EventKind.DAMAGED
    event = EnvEvent(at=NOW, kind=kind, variant_id=variant, data={"duration_s": number / 3})
    assert log.record(event) is not None


def test_events_are_read_in_order_from_any_number_on(shell: Shell) -> None:
    log = history(shell.root)
    for number in range(1, 5):
        tell(log, number, "v" if number < 4 else "other")
    log.close()
    told = shell("events", "--since", "1", "--json").data()
    assert ([e["number"] for e in told["events"]], told["next"]) == ([2, 3, 4], 4)
    assert [line.split()[0] for line in lines(shell("events", "v"))] == ["1", "2", "3"]
    assert "duration_s=0.333" in lines(shell("events"))[0]
    only = lines(shell("events", "v", "--kind", "EnvironmentDamaged"))
    assert [line.split()[2] for line in only] == ["EnvironmentDamaged"]


def test_follow_goes_on_until_it_is_interrupted_and_then_says_nothing(shell: Shell) -> None:
    log = history(shell.root)
    tell(log, 1)
    process = shell.start("events", "--follow", "--since", "0", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["number"] == 1
    tell(log, 2)
    assert json.loads(process.stdout.readline())["number"] == 2
    os.killpg(process.pid, signal.SIGINT)
    told = ended(process, within_s=60)
    assert (told.code, told.out, told.err) == (130, "", "")
    log.close()


def test_follow_ends_when_its_reader_goes(shell: Shell) -> None:
    log = history(shell.root)
    tell(log, 1)
    process = shell.start("events", "--follow", "--since", "0")
    assert process.stdout is not None
    assert process.stdout.readline()
    process.stdout.close()

    def has_ended() -> bool:
        tell(log, 2)
        return process.poll() is not None

    wait_until(has_ended, "the end of the follower", within_s=60)
    assert process.stderr is not None
    assert (process.returncode, process.stderr.read()) == (0, "")
    log.close()


# -- what is the matter ----------------------------------------------------------------------------


def test_doctor_finds_damage_and_mends_it_and_explain_says_why_it_is_there(
    warm_shell: Shell, warm: Settings
) -> None:
    ok(warm_shell("create", "v", "six==1.17.0"))
    assert "all is well" in ok(warm_shell("doctor")).err
    explained = lines(warm_shell("explain", "v"))
    assert any(re.match(r"gc +node local keeps it: current gen", x) for x in explained)
    assert explained[-1].split()[:2] == ["local", "ready"]

    key = warm_shell("status", "v", "--json").data()["key"]
    six = Store(warm).site_packages(key, f"3.{sys.version_info.minor}") / "six.py"
    six.unlink()
    told = warm_shell("doctor", "v")
    assert told.code == 1
    assert "six.py" in told.out
    assert "--repair" in told.err
    told.check_plain()
    assert not six.exists()
    assert ok(warm_shell("doctor", "v", "--repair", "--json")).data()["is_healthy"]
    assert six.exists()
    damaged = warm_shell("events", "v", "--kind", "EnvironmentDamaged", "--json").data()
    assert damaged["events"]


# -- reading ---------------------------------------------------------------------------------------


def test_what_reads_the_disk_neither_imports_ray_nor_asks_a_manager(shell: Shell) -> None:
    define(shell.root, "v", generation(1, six="1.16.0"), generation(2, six="1.17.0"))
    project = shell.root / "envs" / "default_v" / "generations" / "2" / "pyproject.toml"
    project.write_text(f'[dependency-groups]\n{RAY_GROUP} = []\n[project]\nname = "v"\n')
    for words in (
        ("list",), ("status", "v"), ("deps", "v"), ("generations", "v"), ("diff", "v", "1"),
        ("export", "v"), ("operations",), ("events",), ("completion", "fish"),
    ):  # fmt: skip
        told = shell(*words, variables=PROFILED)
        assert told.code == 0, (words, told.err[-500:])
        assert "click" in imports_of(told)  # the look sees what it must see
        assert "ray" not in imports_of(told), words
    assert not (shell.root / "store").exists()
    assert not (shell.root / "manager.lock").exists()


def test_list_looks_at_each_environment_once_whatever_the_number_of_variants(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        define(root, f"v{number:02}", generation(key=f"{number % 3:032}", six="1.17.0"))
    looked: list[str] = []
    monkeypatch.setattr(Store, "record", lambda self, key: looked.append(key))
    told = CliRunner().invoke(cli, ["list", "--json"], env={"RAY_ENVS_ROOT": str(root)})
    rows = json.loads(told.stdout)
    assert [row["variant_id"] for row in rows] == [f"v{number:02}" for number in range(30)]
    assert {row["status"] for row in rows} == {"NOT_BUILT"}
    assert sorted(looked) == [f"{number:032}" for number in range(3)]


# -- help and completion ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_every_command_has_an_example_and_an_answer_for_programs(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    told = CliRunner().invoke(cli, [name, "--help"])
    assert told.exit_code == 0
    assert re.search(rf"Example: ray-envs {name}\b", told.output)
    options = {option for param in command.params for option in param.opts}
    assert "--json" in options or name in ("exec", "completion", "runtime-env")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("status al", ["alpha"]),
        ("status flow/", ["flow/node_1", "flow/node_1/v2"]),
        ("sync alpha be", ["beta"]),
        ("events alpha --kind NodeJ", ["NodeJoined"]),
        ("export alpha --format py", ["pylock"]),
        ("operations --status f", ["failed"]),
        ("comple", ["completion"]),
    ],
)
def test_the_shell_completes_commands_variants_and_choices(
    words: str, expected: list[str], root: Path
) -> None:
    for name in ("alpha", "beta", "flow/node_1", "flow/node_1/v2"):
        define(root, name)
    (root / "envs" / "default_alpha" / "metadata.json").write_text("{")  # names need no reading
    told = CliRunner().invoke(
        cli,
        prog_name="ray-envs",
        env={
            "RAY_ENVS_ROOT": str(root),
            "_RAY_ENVS_COMPLETE": "bash_complete",
            "COMP_WORDS": f"ray-envs {words}",
            "COMP_CWORD": str(len(words.split())),
        },
    )
    assert [line.partition(",")[2] for line in told.stdout.splitlines()] == expected


def test_bash_reads_the_completion_script_and_completes_with_it(shell: Shell) -> None:
    define(shell.root, "alpha")
    script = shell.cwd / "completion.bash"
    script.write_text(ok(shell("completion", "bash")).out)
    code = f"""
        . {script}
        COMP_WORDS=(ray-envs status al) COMP_CWORD=2
        $(complete -p ray-envs | sed 's/.*-F \\([^ ]*\\).*/\\1/') ray-envs
        echo "${{COMPREPLY[@]}}"
    """
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    told = ended(shell.command(["bash", "-c", code], variables={"PATH": path}))
    assert (told.out, told.err) == ("alpha\n", "")


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=lambda variables: next(iter(variables.values())),
)
def test_no_output_ends_a_command_where_the_terminal_knows_few_characters(
    variables: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "b.toml").write_text('name = "ünïcode ✓"\n')
    for words, code in ((["create", "--help"], 0), (["run", str(tmp_path / "b.toml")], 3)):
        done = subprocess.run(
            [Path(sys.executable).parent / "ray-envs", *words],
            env={**os.environ, **variables, "RAY_ENVS_ROOT": str(tmp_path / "root")},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
