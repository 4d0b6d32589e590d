"""What the options, constraints and hashes of requirements files become for uv."""

from __future__ import annotations

from typing import Any

import pytest

from ray_envs.decisions import resolving
from ray_envs.decisions.entries import Local, Setting, Wanted
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.decisions.requirements_file import entries_of
from ray_envs.decisions.sources import Asked, both_pythons, from_requirements, index_name
from ray_envs.errors import InvalidPackages
from ray_envs.models import Target
from ray_envs.specs import Definition

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE, TWO, LONG = "1" * 64, "2" * 64, "3" * 128
H1, H2, H512 = f"--hash=sha256:{ONE}", f"--hash=sha256:{TWO}", f"--hash=sha512:{LONG}"


def asked(text: str, constraints: str = "") -> Asked:
    found, limits = entries_of(text, file="r.txt"), entries_of(constraints, file="c.txt")
    return from_requirements(
        [e for e in found if isinstance(e, Wanted)],
        [e for e in limits if isinstance(e, Wanted)],
        [e for e in found if isinstance(e, Setting)],
        [e for e in found if isinstance(e, Local)],
    )


def uv_of(text: str, constraints: str = "") -> dict[str, Any]:
    pyproject = asked(text, constraints).pyproject
    assert pyproject is not None
    data = parsed_toml(pyproject, where="pyproject.toml")
    assert data["project"] == {"name": "ray-envs-environment", "version": "0"}
    uv: dict[str, Any] = data["tool"]["uv"]
    assert uv.pop("package") is False
    return uv


def test_a_plain_list_has_no_project() -> None:
    assert asked("six\nzipp>=3\nsix\n--prefer-binary") == Asked(packages=("six", "zipp>=3"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--pre", {"prerelease": "allow"}),
        ("--no-index\n-f https://h/l", {"no-index": True, "find-links": ["https://h/l"]}),
        ("-f https://h/b\n-f https://h/a\n-f https://h/b",
         {"find-links": ["https://h/b", "https://h/a"]}),
        ("--no-binary :all:", {"no-binary": True}),
        ("--only-binary :all:", {"no-build": True}),
        ("--no-binary Six,zipp", {"no-binary-package": ["six", "zipp"]}),
        ("--only-binary a --only-binary=b", {"no-build-package": ["a", "b"]}),
        ("--no-binary a,b\n--only-binary a",
         {"no-binary-package": ["b"], "no-build-package": ["a"]}),
        ("--no-binary a,:none:,b", {"no-binary-package": ["b"]}),
        ("--only-binary a\n--no-binary :all:", {"no-binary": True}),
        ("--only-binary :all:\n--only-binary :none:\n--pre", {"prerelease": "allow"}),
    ],
)  # fmt: skip
def test_a_setting_of_pip_is_one_of_uv(text: str, expected: dict[str, Any]) -> None:
    assert uv_of(text) == expected


def test_indexes_keep_their_order_and_have_the_names_of_their_hosts() -> None:
    text = (
        "--extra-index-url https://b.h:8080/x\n-i https://a.h/old\n--extra-index-url=https://a.h/y"
        "\n-i https://a.h/new\n--extra-index-url https://b.h:8080/x"
    )
    assert uv_of(text) == {
        "index": [
            {"name": "b-h", "url": "https://b.h:8080/x"},
            {"name": "a-h", "url": "https://a.h/y"},
            {"name": "a-h-2", "url": "https://a.h/new", "default": True},
        ]
    }
    assert index_name("https://[::1]/x", ()) == "1"
    assert index_name("https://-/x", ["index"]) == "index-2"


def test_constraints_limit_and_do_not_install() -> None:
    found = asked("six", "zipp<4\nZipp<4\na>=1")
    assert found.packages == ("six",)
    assert uv_of("six", "zipp<4\na>=1") == {"constraint-dependencies": ["a>=1", "zipp<4"]}
    with pytest.raises(InvalidPackages, match="has extras") as caught:
        asked("six", "a\nb[c]==1")
    assert caught.value.where == "c.txt: line 2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--pre\n--only-binary :all:\n--no-binary a", "no exceptions"),
        ("--pre\n--no-binary=:all:\n--only-binary=a", "no exceptions"),
        ("\n\n--no-binary a,,b", "'' is not the name of a package"),
        ("\n\n--only-binary a/b", "'a/b' is not the name of a package"),
    ],
)
def test_what_uv_cannot_say_is_refused_with_its_line(text: str, says: str) -> None:
    with pytest.raises(InvalidPackages, match=says) as caught:
        asked(text)
    assert caught.value.where == "r.txt: line 3"
    assert caught.value.hint


def test_the_project_becomes_one_that_uv_can_lock() -> None:
    found = asked("six\n--pre\n-i https://a.h/s\n--extra-index-url https://b.h/s", "zipp<4")
    definition = Definition(packages=found.packages, pyproject=found.pyproject)
    target = Target(python="3.11.7", ray="2.60.0")
    data = parsed_toml(resolving.project_text(definition, target), where="pyproject.toml")
    assert data["project"]["dependencies"] == ["six"]
    assert data["project"]["requires-python"] == "==3.11.*"
    assert data["dependency-groups"] == {"ray-envs": ["ray==2.60.0"]}
    assert [index["name"] for index in data["tool"]["uv"]["index"]] == ["a-h", "b-h"]
    assert data["tool"]["uv"]["package"] is False


# -- hashes


@pytest.mark.parametrize(
    ("text", "constraints", "expected"),
    [
        ("six==1", "", {}),
        (f"six==1 {H1} {H2}", "", {"six": (ONE, TWO)}),
        (f"six==1 {H2} {H512}\nZ_z===2 {H1}", "", {"six": (TWO,), "z-z": (ONE,)}),
        (
            f"six==1 {H1} ; os_name=='a'\nsix==2 {H2}".replace(
                f"{H1} ; os_name=='a'", f"; os_name=='a' {H1}"
            ),
            "",
            {"six": (ONE, TWO)},
        ),
        (f"x @ https://h/x-1.zip {H1}", "", {"x": (ONE,)}),
        (f"--require-hashes\nhttps://h/x-1.zip#sha256={ONE}", "", {"x": (ONE,)}),
        ("six", f"six==1 {H1}", {"six": (ONE,)}),
        ("six", f"six==1 ; os_name=='a' {H1}\nsix==2 ; os_name!='a' {H2}", {"six": (ONE, TWO)}),
        (f"six==1 {H1} {H2}", f"six==1 {H2}\nother==3", {"six": (TWO,)}),
    ],
)
def test_the_hashes_of_a_package_are_those_of_its_lines(
    text: str, constraints: str, expected: dict[str, tuple[str, ...]]
) -> None:
    found = asked(text, constraints).hashes
    assert found == {name: tuple(f"sha256:{h}" for h in each) for name, each in expected.items()}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("zipp==3", "'zipp==3' has no hash"),
        (f"zipp>=3 {H1}", "no version with =="),
        (f"zipp==3.* {H1}", "no version with =="),
        (f"zipp {H1}", "no version with =="),
        (f"zipp==3 {H512}", "no sha256 among its hashes"),
        (f"x @ git+https://h/x@{COMMIT}", "has no hash"),
        ("./lib", "is a local path, which has no hash"),
        ("-e .", "is a local path, which has no hash"),
    ],
)
def test_if_one_line_has_a_hash_each_needs_one(line: str, says: str) -> None:
    with pytest.raises(InvalidPackages, match=says) as caught:
        asked(f"six==1 {H1}\n{line}\n")
    assert caught.value.where == "r.txt: line 2"
    assert "--generate-hashes" in caught.value.hint
    with pytest.raises(InvalidPackages):
        asked(f"--require-hashes\n{line}\n")


def test_hashes_that_contradict_each_other_or_are_for_nothing_are_refused() -> None:
    with pytest.raises(InvalidPackages, match="other hashes as constraint"):
        asked(f"six==1 {H1}", f"six==1 {H2}")
    with pytest.raises(InvalidPackages, match="no requirement that could have a hash"):
        asked("--require-hashes")


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        (None, None, None),
        ("3.11", None, "3.11"),
        (None, ">=3.10", ">=3.10"),
        (" 3.11", ">=3.10", "==3.11.*,>=3.10"),
        (">=3.10", "<3.13", ">=3.10,<3.13"),
    ],
)
def test_a_python_must_suit_the_spec_and_its_file(
    given: str | None, wanted: str | None, expected: str | None
) -> None:
    assert both_pythons(given, wanted) == expected
