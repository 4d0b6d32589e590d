"""Requirement strings and Python versions: accepted in one form, or refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from ray_envs.decisions.requirements import check_python, requirement_lines
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import Target

TARGET = Target(python="3.11.7", ray="2.60.0")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- requirements


def test_comments_blank_lines_continuations_and_order_do_not_matter() -> None:
    text = "\ufeff# a comment \\\nPandas\n\n  six # trailing\nscikit_learn>=1,\\\n<2\nsix\n"
    expected = ("pandas", "scikit-learn<2,>=1", "six")
    assert requirement_lines(text) == expected
    assert requirement_lines(reversed(["Pandas", "six", "scikit_learn>=1,<2"])) == expected
    assert requirement_lines(text.replace("\n", "\r\n")) == expected
    assert requirement_lines("numpy\\") == ("numpy",)
    assert requirement_lines("") == ()


def test_a_comma_separates_requirements_only_where_it_is_not_part_of_one() -> None:
    assert requirement_lines("numpy,pandas") == ("numpy", "pandas")
    assert requirement_lines("numpy>=1,<2") == ("numpy<2,>=1",)
    assert requirement_lines("x[a,b],y") == ("x[a,b]", "y")


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("--index-url=https://h/simple", "UV_DEFAULT_INDEX"),
        ("--extra-index-url https://h/simple", "tool.uv.index"),
        ("-e .", "path alone"),
        ("-e.", "path alone"),
        ("-r more.txt", 'requirements = "more.txt"'),
        ("-rmore.txt", 'requirements = "more.txt"'),
        ("-c c.txt", "constraint-dependencies"),
        ("--pre", "leave it out"),
        ("-", "leave it out"),
        ("six==1.16.0 --hash=sha256:00", "uv.lock pins"),
        ('six --config-settings="a=b"', "leave them out"),
        ("./x", "wheel"),
        ("/x", "wheel"),
        (".", "wheel"),
        ("C:\\x", "wheel"),
        ("libs/x", "wheel"),
        ("x-1-py3-none-any.whl", "wheel"),
        ("x @ file:///srv/x.whl", "wheel"),
        ("x @ ./x", "wheel"),
        ("x @ x.whl", "wheel"),
        ("x @ git+file:///srv/x", "wheel"),
        ("x @ git+https://h/x", "<commit>"),
        ("x @ git+https://h/x@main", "<commit>"),
        ("x @ git+https://h/x@0123456", "<commit>"),
        (f"x @ hg+https://h/x@{COMMIT}", "git+https"),
        ("https://h/x.whl", "name @ URL"),
        (f"git+https://h/x@{COMMIT}", "name @ URL"),
        ("numpy=>1", "numpy>=1.26"),
        ("numpy, pandas", "numpy>=1.26"),
        (",", "numpy>=1.26"),
    ],
)
def test_what_other_nodes_could_not_install_is_refused_with_a_way_out(
    entry: str, hint: str
) -> None:
    with pytest.raises(InvalidPackages) as caught:
        requirement_lines(f"six\n{entry}\n", where="requirements.txt")
    assert hint in caught.value.hint
    assert caught.value.where == "requirements.txt"
    assert repr(entry)[1:3] in caught.value.message


@pytest.mark.parametrize(
    "entry",
    [
        "x @ https://me:s3cret@h/x.whl",
        "x @ https://s3cret@h/x.whl",
        "x @ https://me:s3c/s3cret@h/x.whl",
        f"x @ git+https://s3cret@h/x@{COMMIT}",
        f"x @ git+ssh://git:s3cret@h/x@{COMMIT}",
        "https://me:s3cret@h/x.whl",
        "https://me:a,s3cret@h/x.whl",
        "--index-url=https://me:s3cret@h/simple",
        "-ihttps://me:s3cret@h/simple",
        "x @ file://me:s3cret@h/x.whl",
    ],
)
def test_credentials_are_refused_and_never_repeated(entry: str) -> None:
    with pytest.raises(InvalidPackages, match="credentials") as caught:
        requirement_lines([entry])
    assert "s3cret" not in f"{caught.value} {caught.value.to_dict()}"
    assert "UV_INDEX_<NAME>_PASSWORD" in caught.value.hint


def test_of_several_requirements_in_one_entry_the_wrong_one_is_named() -> None:
    with pytest.raises(InvalidPackages, match="'<2' is not a requirement"):
        requirement_lines("numpy,<2")


def test_pinned_urls_are_accepted() -> None:
    lines = (
        f"a @ git+https://h/a.git@{COMMIT}#subdirectory=b",
        f"b @ git+ssh://git@h/b@{COMMIT}",
        "c @ https://h:8443/c-1-py3-none-any.whl",
        "d @ https://[::1]:80/d-1-py3-none-any.whl",
    )
    assert requirement_lines(lines) == lines


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,6}[A-Za-z0-9])?", fullmatch=True)
versions = st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){0,2}", fullmatch=True)
specifiers = st.lists(st.builds("{}{}".format, st.sampled_from([">=", "<", "!=", "=="]), versions))
markers = st.sampled_from(["", "; python_version < '3.12'", " ; sys_platform=='linux'"])
extras = st.lists(names, max_size=2).map(lambda e: f"[{','.join(e)}]" if e else "")
requirements = st.builds("{}{}{}{}".format, names, extras, specifiers.map(",".join), markers)


@given(st.lists(requirements, max_size=12), st.randoms())
def test_canonical_requirements_are_a_fixed_point_whatever_the_order(
    lines: list[str], random: Any
) -> None:
    canonical = requirement_lines(lines)
    shuffled = [*lines, *lines]
    random.shuffle(shuffled)
    assert requirement_lines("\n".join(shuffled)) == canonical
    assert requirement_lines("\n".join(canonical)) == canonical
    assert {Requirement(line).specifier for line in canonical} == {
        Requirement(line).specifier for line in lines
    }


@given(st.text(max_size=40))
def test_any_text_is_requirements_or_one_clear_error(text: str) -> None:
    with contextlib.suppress(InvalidPackages):
        lines = requirement_lines(text)
        assert requirement_lines(lines) == lines


# -- Python


@pytest.mark.parametrize(
    "wanted", [None, "3", "3.11", "3.11.7", ">=3.10,<3.12", "==3.11.*", " 3.11"]
)
def test_a_python_that_admits_the_clusters_interpreter_is_accepted(wanted: str | None) -> None:
    check_python(wanted, TARGET, where="python")


@pytest.mark.parametrize("wanted", ["3.12", "3.1", "3.11.8", ">=3.12", "<3.11", "2"])
def test_another_python_is_refused_and_both_are_named(wanted: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check_python(wanted, TARGET, where="python_version")
    assert caught.value.where == "python_version"
    assert wanted in caught.value.message
    assert "3.11.7" in caught.value.message
    assert "3.11" in caught.value.hint


@pytest.mark.parametrize("wanted", ["", "  ", "python3.11", "three", "3.11.7.1", "3.x"])
def test_a_python_that_is_no_version_is_refused(wanted: str) -> None:
    with pytest.raises(InvalidInput, match="neither") as caught:
        check_python(wanted, TARGET, where="python")
    assert "3.11.7" in caught.value.hint
