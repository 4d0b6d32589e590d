"""Installed wheels: damage is seen whole and mended from good wheels, never by writing into one."""

from __future__ import annotations

import compileall
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from py_compile import PycInvalidationMode
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_envs.errors import LockTimeout, StorageFailed
from ray_envs.node.mending import mend, sharers
from ray_envs.node.store import Store
from ray_envs.node.uv_cache import UvCache
from ray_envs.node.wheels import Damage, inspect
from ray_envs.settings import Settings
from tests.local.conftest import build
from tests.local.node.test_uv_cache import install, make_wheel

if TYPE_CHECKING:
    from tests.local.conftest import Locked

Installer = Callable[..., Path]

#: Wheels with everything that a wheel can have: modules, data for each place, scripts.
ONE = {
    "one/__init__.py": "value = 1\n",
    "one/deep/__init__.py": "",
    "one/deep/table.txt": "1 2 3\n",
    "one_flat.py": "value = 2\n",
    "{data}/purelib/one_pure.py": "value = 3\n",
    "{data}/data/share/one/notes.txt": "notes\n",
    "{data}/scripts/one-run": "#!python\nprint(1)\n",
    "{data}/scripts/one-plain": "linked into bin as it is, but made executable\n",
    "one-1.0.dist-info/entry_points.txt": "[console_scripts]\none = one:main\n",
}
TWO = {"two.py": "import one\n", "shared/__init__.py": "from_two = 1\n"}
THREE = {"three.py": "", "shared/__init__.py": "from_three = 1\n"}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels."""
    folder = tmp_path_factory.mktemp("index")
    for name, files in (("one", ONE), ("two", TWO), ("three", THREE)):
        make_wheel(folder, name, "1.0", files)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> UvCache:
    return UvCache(tmp_path / "cache", lock_timeout_s=30)


@pytest.fixture
def installed(cache: UvCache, index: Path, tmp_path: Path) -> Installer:
    """A function that makes an environment with the real uv; returns its site-packages."""

    def make(name: str, *words: str) -> Path:
        words = ("one", "two", *words)
        return install(
            cache.folder, tmp_path / name, *words, "--no-index", "--find-links", index, "--offline"
        )

    return make


def compile_cache(cache: UvCache) -> None:
    """Byte-code for every wheel in the cache; not in `*.data`, or uv refuses the wheel."""
    for archives in cache.archives().values():
        for archive in archives:
            assert compileall.compile_dir(
                archive,
                quiet=2,
                rx=re.compile(r"\.data/"),
                invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
            )


def edit(file: Path, text: str = "value = 'edited'\n") -> None:
    """Write into the file that is there, as an editor or a careless script would."""
    file.chmod(0o644)
    with file.open("r+") as stream:
        stream.truncate()
        stream.write(text)


def value_of(site: Path, module: str) -> str:
    """What `module` says its value is, in a new process of the environment."""
    python = site.parents[2] / "bin" / "python"
    code = f"import {module}; print({module}.value)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def told(damage: list[Damage]) -> list[tuple[str, str, str]]:
    return [(each.package, each.path, each.kind) for each in damage]


# -- a real environment


@pytest.fixture(scope="module")
def real(
    warm_cache: Path, locked: Locked, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, UvCache, dict[str, str]]]:
    """An environment with ray and six as an agent builds it, its cache, and what it must hold."""
    settings = Settings(root=tmp_path_factory.mktemp("real") / "root", build_niceness=0)
    store = Store(settings)
    store.root.mkdir()
    subprocess.run(["cp", "-al", warm_cache, store.cache], check=True)
    request = locked("six")
    state = build(settings, request)
    assert state.phase.value == "ready", state
    site = store.site_packages(request.key, request.target.python_minor)
    yield site, UvCache(store.cache, lock_timeout_s=30), dict(request.packages)
    shutil.rmtree(store.root)


Real = tuple[Path, UvCache, dict[str, str]]


def test_an_environment_as_the_agent_made_it_has_no_damage(real: Real) -> None:
    site, _, packages = real
    assert "ray" in packages
    assert inspect(site, packages=packages) == []


def test_ray_itself_is_mended(real: Real) -> None:
    site, cache, packages = real
    module, library = site / "ray" / "__init__.py", site / "ray" / "_raylet.so"
    inodes = [file.stat().st_ino for file in (module, library)]
    module.unlink()  # not edited in place: the cache is linked to that of other tests
    module.write_text("")
    library.unlink()
    damage = inspect(site, packages=packages)
    assert told(damage) == [
        ("ray", "ray/__init__.py", "changed"),
        ("ray", "ray/_raylet.so", "missing"),
    ]
    assert mend(site, damage, cache) == ([], [])
    assert inspect(site, packages=packages) == []
    assert [file.stat().st_ino for file in (module, library)] == inodes


def test_a_shared_file_that_was_edited_is_mended_after_uv_has_fetched_its_wheel_again(
    real: Real, tmp_path: Path
) -> None:
    site, cache, packages = real
    edit(site / "six.py")
    damage = inspect(site, packages=packages)
    assert told(damage) == [("six", "six.py", "changed")]

    assert mend(site, damage, cache) == (damage, ["six"])
    assert "six-1.17.0.dist-info" not in cache.archives()
    install(cache.folder, tmp_path / "scratch", f"six=={packages['six']}")
    assert mend(site, damage, cache) == ([], [])

    assert inspect(site, packages=packages) == []
    python = site.parents[2] / "bin" / "python"
    subprocess.run([python, "-c", "import six; six.moves"], check=True)


# -- what is damage


def test_an_environment_as_uv_made_it_has_no_damage(installed: Installer, cache: UvCache) -> None:
    assert inspect(installed("a")) == []
    compile_cache(cache)
    assert inspect(installed("b")) == []


def test_each_file_that_is_missing_or_changed_is_told(installed: Installer) -> None:
    site = installed("a")
    (site / "one_flat.py").unlink()
    edit(site / "one" / "deep" / "table.txt", "")
    shutil.rmtree(site.parents[2] / "share")
    edit(site.parents[2] / "bin" / "one-run")
    assert told(inspect(site)) == [
        ("one", "../../../bin/one-run", "changed"),
        ("one", "../../../share/one/notes.txt", "missing"),
        ("one", "one/deep/table.txt", "changed"),
        ("one", "one_flat.py", "missing"),
    ]


def test_what_is_no_file_is_damage_and_keeps_nobody_waiting(installed: Installer) -> None:
    site = installed("a")
    files = [site / name for name in ("one_flat.py", "one_pure.py", "two.py")]
    for file in files:
        file.unlink()
    os.mkfifo(files[0])
    files[1].mkdir()
    files[2].symlink_to("two.py")
    assert [each[1:] for each in told(inspect(site))] == [
        ("one_flat.py", "changed"),
        ("one_pure.py", "changed"),
        ("two.py", "changed"),
    ]


def test_a_file_of_two_wheels_is_good_as_either_has_it(installed: Installer) -> None:
    site = installed("a", "three")
    file = site / "shared" / "__init__.py"
    assert file.read_text() in (TWO["shared/__init__.py"], THREE["shared/__init__.py"])
    assert inspect(site) == []
    for text in (TWO["shared/__init__.py"], THREE["shared/__init__.py"]):
        file.unlink()
        file.write_text(text)
        assert inspect(site) == []
    file.write_text("")
    assert [each.path for each in inspect(site)] == ["shared/__init__.py"]


@pytest.mark.parametrize("text", ["", "\xff", "one.py,sha256", "one.py,,\n", '"', "a\0,,\n"])
def test_a_damaged_record_is_one_damage_and_calls_nothing_extra(
    installed: Installer, cache: UvCache, text: str
) -> None:
    site = installed("a")
    record = site / "one-1.0.dist-info" / "RECORD"
    record.write_bytes(text.encode("latin-1"))
    damage = inspect(site)
    assert told(damage) == [("one", "one-1.0.dist-info/RECORD", "changed")]
    assert mend(site, damage, cache) == (damage, [])
    record.unlink()
    assert [each.kind for each in inspect(site)] == ["missing"]


def test_a_package_that_is_gone_with_its_record_is_missed_where_its_name_is_given(
    installed: Installer, cache: UvCache
) -> None:
    site = installed("a")
    python = site.parents[2] / "bin" / "python"
    install_again = {"one": "1.0", "two": "1.0", "Not.Here": "3"}
    for path in (*site.glob("two*"), *site.glob("shared")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert python.exists()
    assert inspect(site) == []
    damage = inspect(site, packages=install_again)
    assert told(damage) == [
        ("not-here", "not_here-3.dist-info/RECORD", "missing"),
        ("two", "two-1.0.dist-info/RECORD", "missing"),
    ]
    assert mend(site, damage, cache) == (damage, [])


def test_extra_files_are_told_and_stay(installed: Installer, cache: UvCache) -> None:
    site = installed("a")
    for name in ("written.txt", "one/extra.py", "sitecustomize.py", "evil.pth"):
        (site / name).write_text("")
    (site / "folder").symlink_to(site / "one")
    ours = ["_ray_envs_inside.py", "_ray_envs_inside.pth", "_virtualenv.pth"]
    ours += ["one-1.0.dist-info/ray_envs-bytecode.cpython-311", "__pycache__/gone.cpython-311.pyc"]
    for name in ours:
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text("")
    damage = inspect(site)
    assert told(damage) == [
        ("", path, "extra")
        for path in ("evil.pth", "folder", "one/extra.py", "sitecustomize.py", "written.txt")
    ]
    assert mend(site, damage, cache) == ([], [])
    assert inspect(site) == damage


def test_a_folder_that_is_not_there_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="check the packages"):
        inspect(tmp_path / "gone")


def test_a_hash_that_nobody_knows_tells_nothing(installed: Installer) -> None:
    site = installed("a")
    record = site / "two-1.0.dist-info" / "RECORD"
    lines = record.read_text().replace("two.py,sha256=", "two.py,sha9=")
    record.write_text(lines)
    assert inspect(site) == []


# -- byte-code


def test_byte_code_of_another_source_is_damage(installed: Installer, cache: UvCache) -> None:
    installed("first")
    compile_cache(cache)
    site = installed("a")
    module = site / "one_flat.py"
    bytecode = Path(importlib.util.cache_from_source(str(module)))
    other = site.parent / "other.py"
    other.write_text("value = 'stale'\n")
    bytecode.unlink()
    py_compile.compile(
        str(other), str(bytecode), invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
    )
    assert value_of(site, "one_flat") == "stale"
    damage = inspect(site)
    assert told(damage) == [("one", str(bytecode.relative_to(site)), "changed")]
    assert mend(site, damage, cache) == ([], [])
    assert (inspect(site), value_of(site, "one_flat")) == ([], "2")


def test_byte_code_that_python_checks_itself_is_no_damage(installed: Installer) -> None:
    site = installed("a")
    module = site / "one_flat.py"
    bytecode = Path(py_compile.compile(str(module), doraise=True) or "")
    content = bytecode.read_bytes()
    for text in (b"", content[:15], b"\0" * 4 + content[4:], content[:8] + b"\0" * 8):
        bytecode.write_bytes(text)
        assert inspect(site) == []
    bytecode.unlink()


def test_a_mended_module_gets_the_byte_code_of_its_wheel(
    installed: Installer, cache: UvCache
) -> None:
    installed("first")
    compile_cache(cache)
    site = installed("a")
    module = site / "one_flat.py"
    module.unlink()
    module.write_text("value = 'edited'\n")
    bytecode = Path(importlib.util.cache_from_source(str(module)))
    original = bytecode.read_bytes()
    bytecode.unlink()
    py_compile.compile(str(module), invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    assert value_of(site, "one_flat") == "edited"
    assert mend(site, inspect(site), cache) == ([], [])
    assert (bytecode.read_bytes(), value_of(site, "one_flat")) == (original, "2")
    assert (inspect(site), list(site.rglob(".ray_envs*"))) == ([], [])


def test_a_mended_module_has_no_byte_code_where_its_wheel_has_none(
    installed: Installer, cache: UvCache
) -> None:
    site = installed("a")
    module = site / "one_flat.py"
    module.unlink()
    module.write_text("value = 'edited'\n")
    py_compile.compile(str(module), invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    assert mend(site, inspect(site), cache) == ([], [])
    assert not Path(importlib.util.cache_from_source(str(module))).exists()
    assert value_of(site, "one_flat") == "2"


# -- mending


def test_an_edit_through_a_link_damages_all_and_each_is_mended_apart(
    installed: Installer, cache: UvCache
) -> None:
    site, other, third = installed("a"), installed("b"), installed("c")
    (third / "one_flat.py").unlink()
    shutil.copyfile(site / "one_flat.py", third / "one_flat.py")
    edit(site / "one_flat.py")
    damage = inspect(site)
    assert inspect(other) == damage
    assert sharers(site, damage, [site, other, third, third / "gone"]) == [other]
    python = Damage(package="", path="../../../bin/python", kind="changed")
    assert sharers(site, [python], [other]) == []  # a link to one base Python for all

    assert mend(site, damage, cache) == (damage, ["one"])
    assert list(cache.archives()) == ["two-1.0.dist-info"]
    assert mend(site, damage, cache) == (damage, ["one"])  # until somebody fetches it
    installed("scratch")
    assert mend(site, damage, cache) == ([], [])

    assert (inspect(site), inspect(third)) == ([], [])
    assert inspect(other) == damage  # nobody wrote into its file
    assert (other / "one_flat.py").read_text() == "value = 'edited'\n"
    assert mend(other, damage, cache) == ([], [])
    assert (site / "one_flat.py").samefile(other / "one_flat.py")


def test_a_damaged_wheel_in_the_cache_gives_nothing(installed: Installer, cache: UvCache) -> None:
    site = installed("a")
    (site / "one_flat.py").unlink()
    (archive,) = cache.archives()["one-1.0.dist-info"]
    record = "one-1.0.dist-info/RECORD"
    other = (archive / record).read_text().replace("one/deep/table.txt,sha256=", "x,sha256=")
    for name, text in (("one/deep/table.txt", ""), (record, ""), (record, other)):
        (archive / name).unlink()
        (archive / name).write_text(text)
        damage = [each for each in inspect(site) if each.path == "one_flat.py"]
        assert mend(site, damage, cache) == (damage, ["one"])
        assert not archive.exists()
        site = installed("a")
        (site / "one_flat.py").unlink()
        (archive,) = cache.archives()["one-1.0.dist-info"]
    assert mend(site, damage, cache) == ([], [])


def test_another_build_of_the_same_version_is_neither_used_nor_forgotten(
    installed: Installer, cache: UvCache, index: Path, tmp_path: Path
) -> None:
    site = installed("a")
    (archive,) = cache.archives()["one-1.0.dist-info"]
    cache.forget(archive)
    make_wheel(tmp_path / "other", "one", "1.0", {"one_flat.py": "value = 'other build'\n"})
    install(cache.folder, tmp_path / "b", "one", "--no-index", "--find-links", tmp_path / "other")
    (build,) = cache.archives()["one-1.0.dist-info"]
    (build / "one_flat.py").write_text("damaged, and none of our business")
    (site / "one_flat.py").unlink()
    damage = inspect(site)
    assert mend(site, damage, cache) == (damage, ["one"])
    assert cache.archives()["one-1.0.dist-info"] == [build]


def test_what_uv_made_at_install_time_is_left_for_a_new_build(
    installed: Installer, cache: UvCache
) -> None:
    site = installed("a")
    (site / "two.py").unlink()
    (site / "one-1.0.dist-info" / "INSTALLER").unlink()
    (site.parents[2] / "bin" / "one").unlink()
    edit(site.parents[2] / "bin" / "one-run")
    (site.parents[2] / "bin" / "one-plain").unlink()
    left, to_fetch = mend(site, inspect(site), cache)
    assert to_fetch == []
    assert left == inspect(site)
    assert [each.path for each in left] == [
        "../../../bin/one",
        "../../../bin/one-plain",
        "../../../bin/one-run",
        "one-1.0.dist-info/INSTALLER",
    ]


def test_an_environment_of_copies_is_mended_too(installed: Installer, cache: UvCache) -> None:
    site = installed("a", "--link-mode", "copy")
    edit(site / "one_flat.py")
    assert mend(site, inspect(site), cache) == ([], [])
    assert inspect(site) == []


def test_a_file_that_cannot_be_linked_is_copied(
    installed: Installer, cache: UvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = installed("a")
    (site / "one_flat.py").unlink()

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("ray_envs.node.mending.os.link", refuse)
    assert mend(site, inspect(site), cache) == ([], [])
    assert (inspect(site), (site / "one_flat.py").stat().st_nlink) == ([], 1)


def test_nothing_outside_the_environment_is_written(
    installed: Installer, cache: UvCache, tmp_path: Path
) -> None:
    site = installed("a")
    work = tmp_path / "work"
    shutil.copytree(site / "one", work)
    shutil.rmtree(site / "one")
    (site / "one").symlink_to(work)
    (work / "__init__.py").write_text("my work\n")
    damage = [each for each in inspect(site) if each.kind != "extra"]
    assert mend(site, damage, cache) == (damage, [])
    assert (work / "__init__.py").read_text() == "my work\n"


def test_a_folder_in_the_way_is_left(installed: Installer, cache: UvCache) -> None:
    site = installed("a")
    shutil.rmtree(site / "one")
    (site / "one").write_text("a file where a folder was")
    (site / "two.py").unlink()
    (site / "two.py").mkdir()
    left, to_fetch = mend(site, inspect(site), cache)
    assert {each.path for each in left} == {
        "one/__init__.py", "one/deep/__init__.py", "one/deep/table.txt", "two.py",
    }  # fmt: skip
    assert (to_fetch, list(site.rglob(".ray_envs*"))) == ([], [])


def test_nothing_is_mended_while_somebody_prunes_the_cache(
    installed: Installer, cache: UvCache
) -> None:
    site = installed("a")
    (site / "two.py").unlink()
    damage = inspect(site)
    impatient = UvCache(cache.folder, lock_timeout_s=0)
    with cache._lock(2), pytest.raises(LockTimeout):
        mend(site, damage, impatient)
    assert mend(site, damage, impatient) == ([], [])


@pytest.fixture(scope="module")
def pristine(
    index: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, UvCache, list[str]]:
    """An environment that nobody changes, its site-packages, its cache, and the files in it."""
    folder = tmp_path_factory.mktemp("pristine")
    cache = UvCache(folder / "cache", lock_timeout_s=30)
    words = ("one", "two", "--no-index", "--find-links", index)
    site = install(cache.folder, folder / "venv", *words)
    records = (path.read_text().splitlines() for path in site.glob("*.dist-info/RECORD"))
    files = [line.split(",")[0] for lines in records for line in lines]
    return folder / "venv", site, cache, sorted(p for p in files if not p.endswith("/RECORD"))


@hypothesis_settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_all_and_only_what_was_damaged_is_told_and_what_the_cache_has_is_mended(
    pristine: tuple[Path, Path, UvCache, list[str]], data: st.DataObject
) -> None:
    venv, whole, cache, files = pristine
    done = data.draw(
        st.dictionaries(st.sampled_from(files), st.sampled_from(["delete", "append", "replace"]))
    )
    copy = Path(mkdtemp()) / "venv"
    try:
        shutil.copytree(venv, copy, symlinks=True)
        site = copy / whole.relative_to(venv)
        for path, how in done.items():
            file = site / path
            if how == "append":
                with file.open("a") as stream:
                    stream.write("#")
            else:
                file.unlink()
                if how == "replace":
                    file.write_text("something else")
        damage = inspect(site)
        assert {each.path: each.kind for each in damage} == {
            path: "missing" if how == "delete" else "changed" for path, how in done.items()
        }
        left, to_fetch = mend(site, damage, cache)
        made_by_uv = ("/bin/", "INSTALLER", "REQUESTED", ".json")
        assert [each.path for each in left] == [
            each.path for each in damage if any(word in each.path for word in made_by_uv)
        ]
        assert (to_fetch, inspect(site)) == ([], left)
        assert inspect(whole) == []
    finally:
        shutil.rmtree(copy.parent)
