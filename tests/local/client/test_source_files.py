"""The files that a spec names: encodings, files that name others, and files of another kind."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

import pytest

from ray_envs.cli.arguments import requirements
from ray_envs.client.inputs import read_definition
from ray_envs.client.source_files import gathered
from ray_envs.client.texts import read_text
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.specs import Definition, EnvSpec

ONE = "1" * 64
HASH = f"--hash=sha256:{ONE}"
SCRIPT = '# /// script\n# requires-python = ">=3.10"\n# dependencies = ["six", "zipp"]\n# ///\n'
PYLOCK = f"""lock-version = "1.0"
created-by = "test"
[[packages]]
name = "six"
version = "1.16.0"
wheels = [{{ url = "https://h/x.whl", hashes = {{ sha256 = "{ONE}" }} }}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **texts: str | bytes) -> None:
    """Write files; `a__b_txt` is a/b.txt."""
    for name, text in texts.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())


def defined(folder: Path, **spec: Any) -> Definition:
    return read_definition(EnvSpec(**spec), folder)


# -- encodings


@pytest.mark.parametrize(
    "content",
    [
        "# é\nsix\n".encode(),
        "# é\r\nsix\r\n".encode(),
        "# é\rsix\r".encode(),
        codecs.BOM_UTF8 + "# é\nsix\n".encode(),
        codecs.BOM_UTF16_LE + "# é\r\nsix\r\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "# é\nsix\n".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "# é\nsix\n".encode("utf-32-le"),
        b"# -*- coding: latin-1 -*-\n# \xe9\nsix\n",
        b"#!/x\n# vim: set fileencoding=cp1252 :\n# \x80\nsix\n",
    ],
    ids=lambda content: content[:12].hex(),
)
def test_a_requirements_file_may_have_any_usual_encoding(folder: Path, content: bytes) -> None:
    write(folder, r_txt=content)
    assert defined(folder, requirements="r.txt") == Definition(packages=("six",))
    assert "\r" not in read_text(folder / "r.txt")


@pytest.mark.parametrize(
    ("content", "says", "hint"),
    [
        (b"six\n# \xe9\n", "line 2 is not UTF-8", "save the file as UTF-8"),
        (b"# coding: ascii\n# \xe9\n", "line 2 is not ascii", "save the file as UTF-8"),
        (b"\n\n# coding: latin-1\n# \xe9\n", "line 4 is not UTF-8", "save the file"),
        (b"# coding: klingon\n", "line 1 names the encoding 'klingon'", "remove that comment"),
        (b"\n# coding: rot13\n", "line 2 names the encoding 'rot13'", "remove that comment"),
        (codecs.BOM_UTF16_LE + b"s", "is not utf-16", "save the file as UTF-8"),
        (b"PK\x03\x04\x00\x00", "is a binary file", "name a text file"),
        ("six\n".encode("utf-16-le"), "is a binary file", "name a text file"),
    ],
)
def test_what_cannot_be_decoded_is_refused(
    folder: Path, content: bytes, says: str, hint: str
) -> None:
    write(folder, r_txt=content)
    with pytest.raises(InvalidInput) as caught:
        defined(folder, requirements="r.txt")
    assert caught.value.where == str(folder / "r.txt")
    assert says in caught.value.message
    assert hint in caught.value.hint


# -- files of another kind


@pytest.mark.parametrize(
    ("option", "name", "hint"),
    [
        ("requirements", "environment.yml", "ray_envs installs from package indexes only"),
        ("requirements", "env.YAML", "with `pip freeze` inside the environment"),
        ("requirements", "Pipfile", "pipenv requirements"),
        ("requirements", "Pipfile.lock", "pipenv requirements --hash"),
        ("requirements", "poetry.lock", "poetry export"),
        ("requirements", "uv.lock", "--project"),
        ("requirements", "pyproject.toml", "--project"),
        ("requirements", "setup.py", "publish a wheel"),
        ("requirements", "x.py", "--script"),
        ("requirements", "pylock.toml", "--pylock"),
        ("requirements", "pylock.dev.toml", "--pylock"),
        ("requirements", "x-1-py3-none-any.whl", "publish it"),
        ("pylock", "uv.lock", "--project"),
        ("pylock", "requirements.txt", "--requirements"),
        ("pylock", "pylock.a.b.toml", "rename it"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_the_option_that_takes_it(
    folder: Path, option: str, name: str, hint: str
) -> None:
    (folder / name).write_text("six")
    with pytest.raises(InvalidInput) as caught:
        defined(folder, **{option: name})
    assert caught.value.where == str(folder / name)
    assert hint in caught.value.hint


@pytest.mark.parametrize("option", ["requirements", "script", "pylock"])
def test_a_missing_file_or_a_folder_is_refused_by_its_name(folder: Path, option: str) -> None:
    (folder / "pylock.x.toml").mkdir()
    for name, says in (("pylock.toml", "does not exist"), ("pylock.x.toml", "is a folder")):
        with pytest.raises(InvalidInput, match=says) as caught:
            defined(folder, **{option: name})
        assert caught.value.where == str(folder / name)


# -- files that name others


def test_files_are_found_beside_the_file_that_names_them(folder: Path) -> None:
    write(
        folder,
        a_txt="six\n-r in/b.txt\n--requirement=in/b.txt\n",
        in__b_txt="-c ../c.txt\n-rin/d.txt\n",
        in__in__d_txt="zipp\n--pre\n-e ./lib\n",
        c_txt="zipp<4\n-r e.txt\n-c e.txt\n",
        e_txt="toml",
    )
    found = gathered(folder / "a.txt")
    assert [each.line for each in found.wanted] == ["six", "toml", "zipp"]
    assert [each.line for each in found.constraints] == ["zipp<4", "toml"]
    assert [each.where for each in found.settings] == [f"{folder}/in/in/d.txt: line 2"]
    assert [(local.path, base) for local, base in found.locals] == [("./lib", folder / "in/in")]


@pytest.mark.parametrize(
    ("texts", "where", "says"),
    [
        ({"a_txt": "six\n-r a.txt"}, "a.txt: line 2", "a.txt -> a.txt"),
        ({"a_txt": "-cb.txt", "b_txt": "\n-r ./a.txt"}, "b.txt: line 2", "a.txt -> b.txt -> a"),
        ({"a_txt": "-r b.txt", "b_txt": "-r b.txt"}, "b.txt: line 1", "circle: b.txt -> b.txt"),
        ({"a_txt": "\n-r gone.txt"}, "a.txt: line 2", "gone.txt, which does not exist"),
        ({"a_txt": "-r https://h/x.txt"}, "a.txt: line 1", "is an address"),
    ],
)  # fmt: skip
def test_a_line_that_names_no_usable_file_is_refused(
    folder: Path, texts: dict[str, str], where: str, says: str
) -> None:
    write(folder, **texts)
    with pytest.raises((InvalidInput, InvalidPackages)) as caught:
        defined(folder, requirements="a.txt")
    assert caught.value.where == f"{folder}/{where}"
    assert says in caught.value.message
    assert caught.value.hint


def test_many_files_end_early(folder: Path) -> None:
    for number in range(150):
        (folder / f"{number}.txt").write_text(f"-r {number + 1}.txt\n" * 3)
    (folder / "150.txt").write_text("six")
    with pytest.raises(InvalidInput, match="more than 100 files name each other"):
        defined(folder, requirements="0.txt")
    assert defined(folder, requirements="60.txt").packages == ("six",)
    os.mkfifo(folder / "pipe")
    (folder / "0.txt").write_text("-r pipe")
    with pytest.raises(InvalidInput, match="is a pipe or a device"):
        defined(folder, requirements="0.txt")


# -- definitions


def test_the_settings_of_a_requirements_file_become_a_project(folder: Path) -> None:
    write(folder, r_txt="six==1.16.0 " + HASH + "\n--pre\n")
    found = defined(folder, requirements="r.txt", packages=["zipp"], python="3.11")
    assert found.packages == ("zipp", "six==1.16.0")
    assert 'prerelease = "allow"' in (found.pyproject or "")
    assert found.hashes == {"six": (f"sha256:{ONE}",)}
    assert found.python == "3.11"


def test_a_script_and_its_lock_become_a_definition(folder: Path) -> None:
    write(folder, x_py=SCRIPT)
    expected = Definition(packages=("six", "zipp"), python=">=3.10")
    assert defined(folder, script="x.py") == expected
    write(folder, x_py_lock="version = 1\n")
    found = defined(folder, script="x.py", packages=["toml"], python="3.11")
    assert found == Definition(
        packages=("toml", "six", "zipp"), python="==3.11.*,>=3.10", uv_lock="version = 1\n"
    )


def test_a_pylock_becomes_a_definition(folder: Path) -> None:
    write(folder, pylock_dev_toml=PYLOCK)
    assert defined(folder, pylock="pylock.dev.toml") == Definition(
        packages=("six==1.16.0",), hashes={"six": (f"sha256:{ONE}",)}
    )


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        ({"requirements": "r.txt"}, "r.txt: line 2"),
        ({"script": "x.py"}, "x.py: line 2"),
        ({"pylock": "pylock.toml"}, "pylock.toml: line 3"),
    ],
)
def test_a_local_path_that_is_missing_is_refused_where_it_is_named(
    folder: Path, spec: dict[str, str], where: str
) -> None:
    pylock = PYLOCK.partition("wheels")[0] + 'directory = { path = "lib" }\n'
    script = '# /// script\n# dependencies = ["x @ file:///none/lib"]\n# ///\n'
    write(folder, r_txt="six\n-e ./lib\n", x_py=script, pylock_toml=pylock)
    with pytest.raises(InvalidInput, match="lib does not exist") as caught:
        defined(folder, **spec)
    assert caught.value.where == f"{folder}/{where}"
    assert "correct its path" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "path", "expected"),
    [
        ("app/requirements/dev.txt", ".", "app"),
        ("app/requirements/py3/dev.txt", ".[web]", "app"),
        ("app/requirements/dev.txt", "..", "app/requirements"),
        ("app/requirements/dev.txt", "./lib", "app"),
        ("app/requirements/dev.txt", "./old", "app"),
        ("app/requirements/dev.txt", "./wheels/x-1-py3-none-any.whl", "app"),
        ("app/lib/requirements.txt", ".", "app/lib"),
        ("app/lib/requirements.txt", "./lib", "app"),
        ("app/requirements/dev.txt", "./app", "."),
        ("app/requirements/dev.txt", "./none", "app/requirements"),
        ("app/requirements/dev.txt", "./requirements", "app/requirements"),
        ("app/requirements/dev.txt", "{here}/app", "app/requirements"),
    ],
)
def test_a_local_path_is_that_of_its_file_or_of_the_nearest_folder_above(
    folder: Path, file: str, path: str, expected: str
) -> None:
    for name in ("app/pyproject.toml", "app/lib/setup.py", "app/old/setup.cfg",
                 "app/wheels/x-1-py3-none-any.whl", "app/lib/src/lib.py", file):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / file).write_text(f"-e {path.format(here=folder)}\n")
    ((_, base),) = gathered(folder / file).locals
    assert base == folder / expected


# -- add, remove, update


def test_a_file_of_requirements_is_added_to_the_packages(folder: Path) -> None:
    write(folder, r_txt="zipp\n-r more.txt\n", more_txt="toml")
    assert requirements("v", ["six"], "r.txt") == ["six", "toml", "zipp"]
    write(folder, r_txt="# nothing")
    with pytest.raises(InvalidPackages, match="no packages are given"):
        requirements("v", [], "r.txt")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("six\n--pre", "the option --pre"),
        ("six\n-i https://h/s", "the option --index-url"),
        ("six\n-e .", "the local path '.'"),
        (f"six\nzipp==3 {HASH}", "the hash of 'zipp==3'"),
    ],
)
def test_what_concerns_a_whole_environment_is_not_added_to_one(
    folder: Path, text: str, says: str
) -> None:
    write(folder, r_txt=text)
    with pytest.raises(InvalidPackages, match=says) as caught:
        requirements("a/v", [], "r.txt")
    assert caught.value.where == f"{folder}/r.txt: line 2"
    assert caught.value.hint.endswith(f"ray-envs create a/v -r {folder}/r.txt --replace")


def test_a_constraint_is_refused_and_hashes_do_not_hinder_a_removal(folder: Path) -> None:
    write(folder, r_txt=f"six==1 {HASH}\nzipp", c_txt="-c r.txt")
    assert requirements("v", [], "r.txt", may_have_hashes=True) == ["six==1", "zipp"]
    with pytest.raises(InvalidPackages, match="the constraint 'six==1'"):
        requirements("v", [], "c.txt", may_have_hashes=True)
