"""The block of metadata in a script (PEP 723)."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.decisions.entries import Local
from ray_envs.decisions.parsing import parsed_toml
from ray_envs.decisions.scripts import from_script
from ray_envs.decisions.sources import Asked
from ray_envs.errors import InvalidInput, InvalidPackages, RayEnvsError

HEAD = "#!/usr/bin/env python\n"


def script(*rows: str, end: str = "# ///\nprint(1)\n") -> str:
    return HEAD + "# /// script\n" + "".join(f"# {row}".rstrip() + "\n" for row in rows) + end


def asked(text: str) -> Asked:
    return from_script(text, file="x.py")


def test_dependencies_become_packages() -> None:
    found = asked(script('dependencies = ["Six==1", "zipp>=3", "six==1"]', "", "# a comment"))
    assert found == Asked(packages=("six==1", "zipp>=3"))
    assert asked(script()) == Asked(packages=())
    assert asked(
        script("dependencies = [", '  "six",', "]", 'requires-python = ">=3.10"')
    ) == Asked(packages=("six",), python=">=3.10")


def test_the_entries_of_tool_uv_become_those_of_a_project() -> None:
    text = script(
        'dependencies = ["six"]',
        "[tool.uv]",
        'prerelease = "allow"',
        "exclude-newer = 2026-01-31T00:00:00Z",
        'constraint-dependencies = ["zipp<4"]',
        "[[tool.uv.index]]",
        'url = "https://a.h/s"',
        "[tool.other]",
        "x = 1",
    )
    found = asked(text)
    data = parsed_toml(found.pyproject or "", where="pyproject.toml")
    uv: dict[str, Any] = data["tool"].pop("uv")
    assert data["tool"] == {}
    assert uv.pop("exclude-newer").isoformat() == "2026-01-31T00:00:00+00:00"
    assert uv == {
        "prerelease": "allow",
        "constraint-dependencies": ["zipp<4"],
        "index": [{"url": "https://a.h/s"}],
        "package": False,
    }


def test_other_blocks_and_later_comments_are_not_the_script_s() -> None:
    other = "# /// other\n# a = \n# ///\n"
    inner = script('dependencies = ["six"]', end="# ///\n\n# ///\n# a comment\n")
    assert asked(other + inner).packages == ("six",)
    # the last line that can be the end is the end: here a string has the first one
    text = script('dependencies = ["zipp"]', "[tool.x]", "y = '''", "///", "'''")
    assert asked(text).packages == ("zipp",)


def test_a_local_dependency_is_kept_as_one() -> None:
    found = asked(script('dependencies = ["x @ file:///srv/x", "six"]'))
    assert found.packages == ("six",)
    assert found.locals == (Local("/srv/x", (), "", "x", "x.py: line 3"),)


@pytest.mark.parametrize(
    ("text", "where", "says", "hint"),
    [
        ("print(1)\n", "x.py", "there is no block `# /// script`", "# dependencies"),
        ("", "x.py", "there is no block", "# /// script"),
        (script(end="print(1)"), "x.py: line 2", "has no end", "`# ///`"),
        (script("a = 1", end=""), "x.py: line 2", "has no end", "`# ///`"),
        (script() + script(), "x.py: line 6", "the first one is in line 2", "one block"),
        (script(end="# ///\n") + "# /// script\n# ///\n", "x.py: line 4", "a second block", "one"),
        (script("", "dependencies = [,]"), "x.py", "at line 4, column", "correct that line"),
        (script("dependencies = 'six'"), "x.py: line 3", "not a list of strings", "numpy"),
        (script("dependencies = [1]"), "x.py: line 3", "not a list of strings", "numpy"),
        (script("dependancies = []"), "x.py: line 3", "unknown key", "'dependencies'?"),
        (script("requires-python = 'new'"), "x.py: line 3", "'new' is not a spec", ">=3.11"),
        (script("requires-python = 3.11"), "x.py: line 3", "3.11 is not a spec", ">=3.11"),
        (script("tool = 1"), "x.py: line 3", "tool.uv is not a table", "[tool.uv]"),
        (script("[tool]", "uv = 1"), "x.py: line 3", "tool.uv is not a table", "[tool.uv]"),
    ],
)
def test_a_block_that_cannot_be_read_is_refused_with_its_line(
    text: str, where: str, says: str, hint: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        asked(text)
    assert caught.value.where == where
    assert says in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("six=>1", "is not a requirement"),
        ("-r x.txt", "is an option"),
        ("x @ git+https://h/x@main", "names no commit"),
        ("x @ https://me:s3cret@h/x.zip", "credentials"),
    ],
)
def test_a_dependency_that_cannot_be_accepted_is_refused_with_its_line(
    entry: str, says: str
) -> None:
    with pytest.raises(InvalidPackages, match=says) as caught:
        asked(script("dependencies = [", '  "six",', f'  "{entry}",', "]"))
    assert caught.value.where == "x.py: line 5"
    assert "s3cret" not in str(caught.value)


@given(st.lists(st.sampled_from(["# /// script", "# ///", "#", "# a = 1", "", "x", "# ["])))
def test_any_file_is_asked_or_one_clear_error(rows: list[str]) -> None:
    with contextlib.suppress(RayEnvsError):
        assert asked("\n".join(rows)).packages == ()
