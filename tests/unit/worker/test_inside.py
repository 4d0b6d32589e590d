"""The parts of `inside` that need no Ray: in this process, or in an interpreter of their own."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.worker import inside

SOURCE = Path(inside.__file__).read_text(encoding="utf-8")


def archive_of(files: dict[str, str]) -> tuple[str, bytes]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return hashlib.sha256(packed.getvalue()).hexdigest(), packed.getvalue()


@pytest.fixture(autouse=True)
def untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `inside` keeps in its process is as it was, and its folder is a temporary one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(inside, "_shadowed_by_folder", {})
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


# -- the file itself -------------------------------------------------------------------------------


def test_it_imports_nothing_but_the_standard_library() -> None:
    """It runs where nothing else is sure to be installed."""
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported <= set(sys.stdlib_module_names)


def test_it_is_python_of_the_oldest_version_that_ray_runs_on() -> None:
    ast.parse(SOURCE, feature_version=(3, 10))


def test_its_import_at_every_interpreter_start_loads_almost_nothing() -> None:
    """It is imported by a .pth line: each module more would slow every start down."""
    code = (
        f"import os, site, sys; sys.path.insert(0, {os.path.dirname(inside.__file__)!r}); "
        "before = set(sys.modules); import inside; print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert set(done.stdout.split()) <= {"inside", "__future__"}


# -- values ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(JSON)
def test_a_json_value_stays_what_it_is(value: Any) -> None:
    assert inside._as_json(value) == value


@pytest.mark.parametrize(
    ("value", "plain"),
    [((1, (2,)), [1, [2]]), ({1: 2}, {"1": 2}), ({None: True}, {"null": True})],
)
def test_a_value_becomes_what_a_file_will_hold(value: Any, plain: Any) -> None:
    assert inside._as_json(value) == plain


class _NumpyScalar:
    """Stands for numpy.float64: a test of ours does not install numpy."""

    ndim = 0

    def item(self) -> float:
        return 0.5


_NumpyScalar.__module__ = "numpy"


def test_a_numpy_number_is_a_number() -> None:
    assert inside._as_json({"accuracy": [_NumpyScalar()]}) == {"accuracy": [0.5]}


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"x", object(), float("nan"), [float("inf")], {(1, 2): 3}, 1j, lambda: None],
    ids=["set", "bytes", "object", "nan", "inf", "tuple key", "complex", "function"],
)
def test_a_value_that_is_not_json_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="not JSON"):
        inside._as_json(value)


def test_a_circle_and_a_very_deep_value_are_not_json() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(TypeError, match="not JSON"):
        inside._as_json(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TypeError, match="not JSON"):
        inside._as_json(deep)


def test_the_message_of_a_huge_value_is_short() -> None:
    with pytest.raises(TypeError) as caught:
        inside._as_json({str(n) for n in range(100_000)})
    assert len(str(caught.value)) < 300


# -- errors ----------------------------------------------------------------------------------------


def described(function: Any) -> dict[str, str]:
    try:
        function()
    except BaseException as exc:
        result: dict[str, str] = inside._described(exc)
        return result
    raise AssertionError("it did not raise")


def test_an_error_is_its_type_message_and_the_frames_of_the_payload() -> None:
    def fail() -> None:
        raise ValueError("because")

    told = described(fail)
    assert (told["type"], told["message"]) == ("ValueError", "because")
    assert "in fail" in told["traceback"]
    assert told["traceback"].endswith("ValueError: because\n")


def test_the_type_of_an_error_has_its_module() -> None:
    def fail() -> None:
        json.loads("{")

    assert described(fail)["type"] == "json.decoder.JSONDecodeError"


def test_an_error_without_words_can_be_described() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def fail() -> None:
        raise Mute

    assert described(fail)["type"].endswith("Mute")


def test_a_huge_error_is_cut_and_keeps_its_end() -> None:
    def fail() -> None:
        raise ValueError("x" * 1_000_000 + "the end")

    told = described(fail)
    assert told["traceback"].endswith("the end\n")
    assert len(told["traceback"]) <= 20_000
    assert len(told["message"]) <= 20_000


def test_a_cause_is_told_too() -> None:
    def fail() -> None:
        raise ValueError("second") from KeyError("first")

    told = described(fail)
    assert "KeyError: 'first'" in told["traceback"]
    assert "direct cause" in told["traceback"]


# -- calls -----------------------------------------------------------------------------------------


def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"args": args, "kwargs": kwargs}


def test_a_call_that_fits_is_accepted() -> None:
    inside._check_call(lambda a, b=1, *c, **d: None, call(1, 2, 3, e=4))
    inside._check_call(print, call("anything", end=""))
    inside._check_call(dict, call(a=1))


@pytest.mark.parametrize("request_", [call(), call(1, 2), call(1, b=2), call(a=1, c=2)])
def test_a_call_that_does_not_fit_names_the_function_and_its_signature(request_: Any) -> None:
    def evaluate(a: int) -> None: ...

    with pytest.raises(TypeError, match=r"evaluate\(a"):
        inside._check_call(evaluate, request_)


def test_a_type_error_of_the_payload_itself_is_not_taken_for_a_wrong_call() -> None:
    def evaluate(a: int) -> None:
        raise TypeError("mine")

    inside._check_call(evaluate, call(1))


# -- paths -----------------------------------------------------------------------------------------


def test_foreign_folders_go_behind_the_environment_and_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "driver"
    foreign.mkdir()
    own = list(sys.path)
    ours = [path for path in own if path.startswith(sys.prefix + os.sep)]
    monkeypatch.setattr(sys, "path", [str(foreign), "", *own])
    monkeypatch.chdir(foreign)
    inside._put_foreign_paths_last()
    assert set(sys.path[-2:]) == {str(foreign), ""} or {str(foreign), ""} <= set(sys.path[-4:])
    assert sorted(sys.path) == sorted([str(foreign), "", *own])
    stdlib = os.path.dirname(os.__file__)
    for path in [*ours, stdlib]:
        assert sys.path.index(path) < sys.path.index(str(foreign))
    again = list(sys.path)
    inside._put_foreign_paths_last()
    assert sys.path == again


def test_the_base_pythons_own_packages_are_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray adds them where the cluster's Python is not the environment's."""
    minor = ".".join(map(str, sys.version_info[:2]))
    base = os.path.join(sys.base_prefix, "lib", f"python{minor}", "site-packages")
    monkeypatch.setattr(sys, "path", [base, *(p for p in sys.path if p != base)])
    inside._put_foreign_paths_last()
    own = [n for n, path in enumerate(sys.path) if path.startswith(sys.prefix + os.sep)]
    assert sys.path.index(base) > max(own)


def test_rays_own_bundled_folders_stay_usable() -> None:
    """Inside the environment, wherever they stand: they are what the environment holds."""
    bundled = os.path.join(sys.prefix, "lib", "x", "site-packages", "ray", "thirdparty_files")
    sys.path.insert(0, bundled)
    inside._put_foreign_paths_last()
    assert sys.path[0] == bundled


def test_modules_that_stand_in_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "lib" / "site-packages"
    folder = tmp_path / "driver"
    for place in (site, folder):
        place.mkdir(parents=True)
    for name in ("alone.py", "both.py", "speedups.cpython-311-x86_64-linux-gnu.so", "data.txt"):
        (site / name).touch()
    for name in ("both.py", "mine.py", "speedups.py", "data.txt", "README"):
        (folder / name).touch()
    for name in ("package", "namespace"):
        (site / name).mkdir()
        (folder / name).mkdir()
    (site / "package" / "__init__.py").touch()
    (folder / "package" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(folder), str(site)])
    assert inside._shadowed([str(folder)]) == ["both", "package", "speedups"]
    assert inside._shadowed([str(tmp_path / "missing")]) == []
    assert inside._shadowed([]) == []


# -- code ------------------------------------------------------------------------------------------


def test_code_is_unpacked_once_and_only_for_its_user(tmp_path: Path) -> None:
    sha256, code = archive_of({"a.py": "X = 1\n", "p/b.py": ""})
    folder = Path(inside._unpacked(sha256, code))
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py")) == [
        "a.py",
        "p/b.py",
    ]
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert folder.is_relative_to(tmp_path)
    assert inside._unpacked(sha256, b"not looked at again") == str(folder)


def test_many_workers_unpack_the_same_code_at_once() -> None:
    files = {f"m{n}.py": f"X = {n}\n" for n in range(50)}
    sha256, code = archive_of(files)
    start = threading.Barrier(8)
    folders: list[str] = []

    def unpack() -> None:
        start.wait(20)
        folders.append(inside._unpacked(sha256, code))

    threads = [threading.Thread(target=unpack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(folders) == 8
    (folder,) = {Path(folder) for folder in folders}
    assert {p.name: p.read_text() for p in folder.iterdir()} == files
    assert [p.name for p in folder.parent.iterdir()] == [sha256]


def test_an_archive_that_is_damaged_leaves_nothing_behind() -> None:
    sha256, code = archive_of({"a.py": "X = 1\n"})
    with pytest.raises(zipfile.BadZipFile):
        inside._unpacked(sha256, code[:-30])
    parent = Path(tempfile.gettempdir()) / f"ray_envs-code-{os.getuid()}"
    assert list(parent.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp is everybody's: whoever makes the folder first could put code into it."""
    (tmp_path / f"ray_envs-code-{os.getuid()}").mkdir()
    uid = os.getuid()
    real = os.stat

    def somebody_elses(path: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(st_uid=uid + 1, st_mode=real(path, **kwargs).st_mode)

    monkeypatch.setattr(os, "stat", somebody_elses)
    with pytest.raises(PermissionError):
        inside._unpacked(*archive_of({"a.py": ""}))


def load(entrypoint: str, files: dict[str, str] | None) -> Any:
    sha256, code = archive_of(files) if files is not None else (None, None)
    outcome: dict[str, Any] = {"shadowed": []}
    request = {"entrypoint": entrypoint, "code_sha256": sha256}
    return inside._load(request, None, code, outcome)


def test_other_code_replaces_the_modules_of_the_code_before_it() -> None:
    assert load("zz_work:f", {"zz_work.py": "def f(): return 1\n"})() == 1
    before = list(sys.path)
    assert load("zz_work:f", {"zz_work.py": "def f(): return 2\n"})() == 2
    assert len(sys.path) == len(before)
    with pytest.raises(ModuleNotFoundError):
        load("zz_work:f", {"zz_other.py": ""})


def test_packages_and_their_submodules_are_replaced_too() -> None:
    def files(word: str) -> dict[str, str]:
        return {
            "zz_pkg/__init__.py": "",
            "zz_pkg/deep.py": f"W = {word!r}\n",
            "zz_space/inner.py": f"W = {word!r}\n",  # no __init__.py: a namespace package
            "zz_main.py": "import zz_pkg.deep, zz_space.inner\n"
            "def f(): return zz_pkg.deep.W, zz_space.inner.W\n",
        }

    assert load("zz_main:f", files("one"))() == ("one", "one")
    assert load("zz_main:f", files("two"))() == ("two", "two")


def test_the_same_code_keeps_its_modules() -> None:
    """A warm worker imports once: what a module loaded stays loaded."""
    files = {"zz_state.py": "CALLS = []\ndef f():\n    CALLS.append(1)\n    return len(CALLS)\n"}
    assert load("zz_state:f", files)() == 1
    assert load("zz_state:f", files)() == 2


def test_code_is_replaced_whichever_copy_of_this_file_put_it_there() -> None:
    """Each batch pickles `run_item` anew: a warm worker meets a copy with globals of its own."""
    files = {"zz_work.py": "def f(): return 1\n"}
    sha256, code = archive_of(files)
    copy: dict[str, Any] = {"__file__": inside.__file__, "__name__": "another_copy"}
    exec(compile(SOURCE, inside.__file__, "exec"), copy)
    request = {"entrypoint": "zz_work:f", "code_sha256": sha256}
    assert copy["_load"](request, None, code, {"shadowed": []})() == 1
    assert load("zz_work:f", {"zz_work.py": "def f(): return 2\n"})() == 2


def test_an_item_without_code_sees_nothing_of_the_code_before_it() -> None:
    load("zz_work:f", {"zz_work.py": "def f(): return 1\n"})
    with pytest.raises(ModuleNotFoundError):
        load("zz_work:f", None)


def test_code_goes_behind_everything_else() -> None:
    """A `json.py` in a code folder must not become everybody's json."""
    files = {"json.py": "loads = 'mine'\n", "zz_work.py": "from json import loads\n"}
    assert load("zz_work:loads", files) is json.loads


def test_an_entrypoint_named_like_a_module_of_python_is_refused() -> None:
    """Silently calling the standard library instead of the user's file would be worse."""
    with pytest.raises(ImportError, match="rename"):
        load("statistics:mean", {"statistics.py": "def mean(x): return 'mine'\n"})


@pytest.mark.parametrize(
    ("entrypoint", "error", "words"),
    [
        ("zz_work:nothing", AttributeError, "no function 'nothing'"),
        ("zz_work:VALUE", TypeError, "not a function"),
        ("zz_nowhere:f", ModuleNotFoundError, "zz_nowhere"),
    ],
)
def test_an_entrypoint_that_is_not_there_is_named(
    entrypoint: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(entrypoint, {"zz_work.py": "VALUE = 1\n"})


# -- the hold --------------------------------------------------------------------------------------


def in_environment(tmp_path: Path, code: str) -> list[str]:
    """A command that runs `code` where `inside` is installed as an environment has it."""
    site = tmp_path / "key" / ".venv" / "lib" / "python3" / "site-packages"
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{inside.INSTALLED_AS}.py").write_text(SOURCE)
    start = f"import sys; sys.path.insert(0, {str(site)!r}); import {inside.INSTALLED_AS} as i; "
    return [sys.executable, "-I", "-S", "-c", start + code]


def test_a_process_holds_its_environment_until_it_ends(tmp_path: Path) -> None:
    import fcntl

    command = in_environment(tmp_path, "i.take_hold(); print('held', flush=True); input()")
    hold = tmp_path / "key.hold"
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        fd = os.open(hold, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.kill()
        process.wait(20)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)


def test_a_process_does_not_start_in_an_environment_that_is_being_removed(tmp_path: Path) -> None:
    import fcntl

    fd = os.open(tmp_path / "key.hold", os.O_RDONLY | os.O_CREAT, 0o666)
    fcntl.flock(fd, fcntl.LOCK_EX)
    done = subprocess.run(
        in_environment(tmp_path, "i.take_hold(); print('went on')"),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    os.close(fd)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is being removed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hold_can_be_taken_where_the_file_belongs_to_another_user(tmp_path: Path) -> None:
    """Readers need no right to write: the hold is a lock, not a content."""
    (tmp_path / "key.hold").touch(mode=0o444)
    done = subprocess.run(
        in_environment(tmp_path, "i.take_hold(); print(i.hold_fd is not None)"),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr
