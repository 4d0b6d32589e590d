"""pylock.toml (PEP 751): what its packages become."""

from __future__ import annotations

from typing import Any

import pytest

from ray_envs.decisions.entries import Local
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.decisions.pylocks import from_pylock
from ray_envs.decisions.sources import Asked
from ray_envs.errors import InvalidInput, InvalidPackages, RayEnvsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE, TWO, LONG = "1" * 64, "2" * 64, "3" * 128
S1, S2 = f"sha256:{ONE}", f"sha256:{TWO}"
USUAL = "https://pypi.test/simple"
WHEEL = f'wheels = [{{ url = "https://h/x.whl", hashes = {{ sha256 = "{ONE}" }} }}]'
SDIST = f'sdist = {{ url = "https://h/x.zip", hashes = {{ sha256 = "{TWO}", sha512 = "{LONG}" }} }}'
HEAD = 'lock-version = "1.0"\ncreated-by = "test"\n'


def package(name: str, *rows: str) -> str:
    return "\n".join(["", "[[packages]]", f'name = "{name}"', *rows, ""])


def asked(*parts: str, head: str = HEAD) -> Asked:
    return from_pylock(head + "".join(parts), file="pylock.toml")


def uv_of(found: Asked) -> dict[str, Any]:
    uv: dict[str, Any] = parsed_toml(found.pyproject or "", where="x")["tool"]["uv"]
    assert uv.pop("package") is False
    return uv


def test_packages_have_exact_versions_markers_and_the_hashes_of_all_their_files() -> None:
    found = asked(
        package("Six", 'version = "1.16.0"', f'index = "{USUAL}"', WHEEL, SDIST),
        package("a", 'version = "1"', "marker = \"sys_platform == 'linux'\"", WHEEL),
        package("a", 'version = "2+cpu"', "marker = \"sys_platform != 'linux'\"", SDIST),
    )
    assert found == Asked(
        packages=(
            'a==1; sys_platform == "linux"', 'a==2+cpu; sys_platform != "linux"', "six==1.16.0"
        ),
        hashes={"a": (S1, S2), "six": (S1, S2)},
    )  # fmt: skip


def test_python_and_environments_are_kept() -> None:
    found = asked(head=HEAD + 'requires-python = ">=3.10"\nenvironments = ["os_name == \'a\'"]\n')
    assert found.python == ">=3.10"
    assert uv_of(found) == {"environments": ["os_name == 'a'"]}


def test_another_index_is_explicit_for_its_own_packages() -> None:
    marker = "sys_platform == 'linux'"
    found = asked(
        package("a", 'version = "1"', f'index = "{USUAL}/"', WHEEL),
        package("t", 'version = "1"', 'index = "https://t.h/cpu"', f'marker = "{marker}"', WHEEL),
        package("t", 'version = "2"', 'index = "https://t.h/gpu"', "marker = \"os_name == 'b'\"",
                WHEEL),
        package("u", 'version = "1"', 'index = "https://t.h/cpu"', SDIST),
        package("u", 'version = "1"', 'index = "https://t.h/cpu/"', WHEEL),
    )  # fmt: skip
    assert uv_of(found) == {
        "index": [
            {"name": "t-h", "url": "https://t.h/cpu", "explicit": True},
            {"name": "t-h-2", "url": "https://t.h/gpu", "explicit": True},
        ],
        "sources": {
            "t": [
                {"index": "t-h", "marker": marker},
                {"index": "t-h-2", "marker": "os_name == 'b'"},
            ],
            "u": {"index": "t-h"},
        },
    }


@pytest.mark.parametrize(
    ("rows", "line", "pin"),
    [
        ([f'[packages.vcs]\ntype = "git"\nurl = "https://h/x"\ncommit-id = "{COMMIT}"'],
         f"x @ git+https://h/x@{COMMIT}", f"git:{COMMIT}"),
        ([f'vcs = {{ type = "git", url = "git+ssh://git@h/x", commit-id = "{COMMIT}", '
          'subdirectory = "d" }'],
         f"x @ git+ssh://git@h/x@{COMMIT}#subdirectory=d", f"git:{COMMIT}:subdirectory=d"),
        ([f'archive = {{ url = "https://h/x.zip", hashes = {{ sha256 = "{ONE}" }} }}'],
         "x @ https://h/x.zip", S1),
        ([f'archive = {{ url = "https://h/x.zip", subdirectory = "d", hashes = {{ sha256 = "{ONE}"'
          " } }", "marker = \"os_name == 'a'\""],
         'x @ https://h/x.zip#subdirectory=d ; os_name == "a"', S1),
    ],
)  # fmt: skip
def test_repositories_and_archives_become_addresses(rows: list[str], line: str, pin: str) -> None:
    tables = sorted(rows, key=lambda row: row.startswith("["))
    found = asked(package("x", *tables))
    assert found == Asked(packages=(line,), hashes={"x": (pin,)})


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ('directory = { path = "lib" }', "lib"),
        ('directory = { path = ".", editable = true }', "."),
        ('archive = { url = "file:///srv/x.zip", hashes = {} }', "/srv/x.zip"),
        ('directory = { path = "../a b#c", subdirectory = "d" }', "../a b#c/d"),
        ('archive = { path = "x.zip", hashes = {} }', "x.zip"),
        ('wheels = [{ path = "w/x.whl", hashes = {} }]', "w/x.whl"),
    ],
)
def test_what_is_a_path_is_a_local_entry(row: str, path: str) -> None:
    found = asked(package("x", 'version = "1"', row))
    assert found.locals == (Local(path, (), "", "x", "pylock.toml: line 4"),)
    assert (found.packages, found.hashes) == ((), {})


@pytest.mark.parametrize(
    ("marker", "expected"),
    [
        ("'main' in dependency_groups", "python_version >= \"0\""),
        ('"dev" in dependency_groups', 'python_version < "0"'),
        ("'dev' not in dependency_groups", 'python_version >= "0"'),
        ("'x' in extras", 'python_version < "0"'),
        ("'x' not in extras and os_name == 'a'", 'python_version >= "0" and os_name == "a"'),
    ],
)  # fmt: skip
def test_default_groups_are_chosen_and_extras_are_not(marker: str, expected: str) -> None:
    quoted = f"marker = '''{marker}'''"
    found = asked(
        package("x", 'version = "1"', quoted, WHEEL), head=HEAD + 'default-groups = ["main"]\n'
    )
    assert found.packages == (f"x==1; {expected}",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no lock-version"),
        ('lock-version = "2.0"\n', "lock-version is '2.0'"),
        ('lock-version = "1.1"\n', "lock-version is '1.1'"),
        ("lock-version = 1.0\n", "lock-version is 1.0"),
        ("lock-version = [\n", "not valid TOML"),
        (HEAD + "packages = 1\n", "packages is not a list of tables"),
        (HEAD + "packages = [1]\n", "packages is not a list of tables"),
        (HEAD + "requires-python = 3\n", "requires-python is not a string"),
        (HEAD + "environments = 'x'\n", "environments is not a list of strings"),
        (HEAD + package("x", "index = 'https://me:s3cret@h/s'"), "credentials"),
    ],
)
def test_a_file_of_another_format_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_pylock(text, file="pylock.toml")
    assert says in caught.value.message
    assert caught.value.where == "pylock.toml"
    assert caught.value.hint
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        (['version = "1"'], InvalidPackages, "x has no files"),
        ([WHEEL], InvalidPackages, "x has no version"),
        (['version = "one"', WHEEL], InvalidPackages, "is not a requirement"),
        (["version = 1", WHEEL], InvalidInput, "version is not a string"),
        (["marker = 'x'", 'directory = { path = "a" }'], InvalidPackages, "is not a requirement"),
        (["archive = { size = 1 }"], InvalidPackages, "archive has no url"),
        (["wheels = 1"], InvalidInput, "wheels is not a list of tables"),
        (["sdist = 1"], InvalidInput, "sdist is not a table"),
        (['version = "1"', "marker = 'python'", WHEEL], InvalidPackages, "is not a requirement"),
        (['version = "1"', f'sdist = {{ url = "https://h/x", hashes = {{ sha512 = "{LONG}" }} }}'],
         InvalidPackages, "x has no sha256"),
        (['version = "1"', 'sdist = { url = "https://h/x" }'], InvalidPackages, "x has no sha256"),
        (['version = "1"', "index = 'https://[h/s'", WHEEL], InvalidPackages, "not an address"),
        (['version = "1"', "index = './simple'", WHEEL], InvalidPackages, "other nodes do not"),
        (['vcs = { type = "hg", url = "https://h/x", commit-id = "1" }'], InvalidPackages,
         "comes from a repository"),
        (['vcs = { type = "git", url = "https://h/x", commit-id = "main" }'], InvalidPackages,
         "comes from a repository"),
        (['vcs = { type = "git", path = "x" }'], InvalidPackages, "comes from a repository"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_accepted_is_refused_with_its_line(
    rows: list[str], error: type[RayEnvsError], says: str
) -> None:
    with pytest.raises(error) as caught:
        asked(package("six", 'version = "1"', WHEEL), package("x", *rows))
    assert says in caught.value.message
    assert caught.value.where == "pylock.toml: line 9"
    assert caught.value.hint


def test_a_package_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a package has no name"):
        asked('[[packages]]\nversion = "1"\n')
