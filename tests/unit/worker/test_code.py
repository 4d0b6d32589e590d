"""Code folders: unpacked once, replaced as a whole, behind everything else on sys.path."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from ray_envs import worker
from ray_envs.worker import code as code_module
from ray_envs.worker import item


def archive_of(files: dict[str, str]) -> tuple[str, bytes]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return hashlib.sha256(packed.getvalue()).hexdigest(), packed.getvalue()


def test_code_is_unpacked_once_below_the_root_and_only_for_its_user(tmp_path: Path) -> None:
    sha256, code = archive_of({"a.py": "X = 1\n", "p/b.py": ""})
    folder = Path(code_module.unpacked(str(tmp_path), sha256, code))
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py")) == [
        "a.py",
        "p/b.py",
    ]
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert folder.parent == tmp_path / f"code-{os.getuid()}"
    assert code_module.unpacked(str(tmp_path), sha256, b"not looked at again") == str(folder)


def test_many_workers_unpack_the_same_code_at_once(tmp_path: Path) -> None:
    files = {f"m{n}.py": f"X = {n}\n" for n in range(50)}
    sha256, code = archive_of(files)
    start = threading.Barrier(8)
    folders: list[str] = []

    def unpack() -> None:
        start.wait(20)
        folders.append(code_module.unpacked(str(tmp_path), sha256, code))

    threads = [threading.Thread(target=unpack) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(folders) == 8
    (folder,) = {Path(folder) for folder in folders}
    assert {p.name: p.read_text() for p in folder.iterdir()} == files
    assert [p.name for p in folder.parent.iterdir()] == [sha256]


def test_an_archive_that_is_damaged_leaves_nothing_behind(tmp_path: Path) -> None:
    sha256, code = archive_of({"a.py": "X = 1\n"})
    with pytest.raises(zipfile.BadZipFile):
        code_module.unpacked(str(tmp_path), sha256, code[:-30])
    assert list((tmp_path / f"code-{os.getuid()}").iterdir()) == []


def _a_link(place: Path, victim: Path) -> None:
    place.symlink_to(victim)


def _open_to_others(place: Path, _victim: Path) -> None:
    place.mkdir()
    place.chmod(0o777)


def _a_file(place: Path, _victim: Path) -> None:
    place.write_text("")


@pytest.mark.parametrize("prepared", [_a_link, _open_to_others, _a_file])
def test_a_folder_that_others_can_prepare_is_not_used(
    tmp_path: Path, prepared: Callable[[Path, Path], None]
) -> None:
    """A link to somebody's home would have its old folders deleted; an open one, code planted."""
    victim = tmp_path / "home"
    (victim / "thesis").mkdir(parents=True)
    os.utime(victim / "thesis", (0, 0))
    place = tmp_path / "root" / f"code-{os.getuid()}"
    place.parent.mkdir()
    prepared(place, victim)
    folder = Path(code_module.unpacked(str(place.parent), *archive_of({"a.py": ""})))
    assert (folder / "a.py").exists()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert not folder.resolve().is_relative_to(place.resolve())
    assert [path.name for path in victim.iterdir()] == ["thesis"]


def test_a_link_with_the_name_of_the_code_is_replaced_and_not_followed(tmp_path: Path) -> None:
    sha256, code = archive_of({"a.py": ""})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.py").write_text("")
    (tmp_path / f"code-{os.getuid()}").mkdir(mode=0o700)
    (tmp_path / f"code-{os.getuid()}" / sha256).symlink_to(tmp_path / "elsewhere")
    folder = Path(code_module.unpacked(str(tmp_path), sha256, code))
    assert not folder.is_symlink()
    assert (tmp_path / "elsewhere" / "a.py").exists()


def load(entrypoint: str, files: dict[str, str] | None) -> Any:
    sha256, code = archive_of(files) if files is not None else (None, None)
    outcome: dict[str, Any] = {"shadowed": []}
    venv = os.path.join(tempfile.gettempdir(), "root", "store", "key", ".venv")
    request = {"entrypoint": entrypoint, "code_sha256": sha256, "venv": venv}
    return item._load(request, None, code, outcome)


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
    cloudpickle.register_pickle_by_value(worker)
    try:
        copy = cloudpickle.loads(cloudpickle.dumps(item._load))
    finally:
        cloudpickle.unregister_pickle_by_value(worker)
    assert copy.__globals__["use_code"] is not item._load.__globals__["use_code"]
    venv = os.path.join(tempfile.gettempdir(), "root", "store", "key", ".venv")
    request = {"entrypoint": "zz_work:f", "code_sha256": sha256, "venv": venv}
    assert copy(request, None, code, {"shadowed": []})() == 1
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
