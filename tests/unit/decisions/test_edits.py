"""From one definition to the next: packages come and go in any spelling, and text stays."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from ray_envs.decisions import edits, resolving
from ray_envs.decisions.requirements import requirement_lines
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.models import Target
from ray_envs.specs import Definition

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

PROJECT = """\
# of the team
[project]
name = "x"  # any
version = "1"
dependencies = [
    # what everybody needs
    "Six>=1.16",  # old
    "idna",       # names of hosts
    # the end
]

[tool.uv]  # ours
package = false
"""

#: Canonical names that the project above does not declare.
NAMES = ("alpha", "beta-gamma", "delta-epsilon-zeta", "eta2")
FIXED = ("theta>=1", "iota[fast]<3", "kappa; python_version < '4'")


@st.composite
def spelled(draw: st.DrawFn, name: str) -> str:
    """`name` as people write it: any case, any run of `-`, `_` and `.`."""
    text = ""
    for character in name:
        if character == "-":
            text += draw(st.sampled_from(["-", "_", ".", "--", "_.", "-_-"]))
        else:
            text += draw(st.sampled_from([character, character.upper()]))
    return text


@st.composite
def requirements(draw: st.DrawFn) -> list[str]:
    """Requirements of some of NAMES, in any spelling; with a version or without."""
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
    versions = st.sampled_from(["", "==1.0", ">=2,<3", "[more]", "; sys_platform == 'linux'"])
    return [draw(spelled(name)) + draw(versions) for name in names]


definitions = st.builds(
    lambda lines, pyproject: Definition(packages=requirement_lines(lines), pyproject=pyproject),
    st.lists(st.sampled_from(FIXED), unique=True),
    st.sampled_from([None, PROJECT]),
)
locks = st.dictionaries(st.sampled_from([*NAMES, "six"]), st.sampled_from(["1", "2", "3"]))


def defined(*packages: str, **options: Any) -> Definition:
    return Definition(packages=packages, **options)


def added(definition: Definition, *packages: str) -> Definition:
    return edits.added(definition, packages, where="add")


def removed(definition: Definition, *packages: str) -> Definition:
    return edits.removed(definition, packages, where="remove")


# -- adding and removing


@given(definitions, requirements(), st.data())
def test_what_was_added_and_is_removed_in_any_spelling_leaves_no_trace(
    definition: Definition, lines: list[str], data: st.DataObject
) -> None:
    more = edits.added(definition, lines, where="add")
    names = sorted({Requirement(line).name for line in lines})
    assert more != definition
    assert set(more.packages) == {*definition.packages, *requirement_lines(lines)}
    assert more.packages == requirement_lines(more.packages)
    again = [data.draw(spelled(name.lower().replace("_", "-"))) for name in names]
    assert edits.removed(more, again, where="remove") == definition


@given(definitions, requirements())
def test_adding_twice_is_adding_once(definition: Definition, lines: list[str]) -> None:
    once = edits.added(definition, lines, where="add")
    assert edits.added(once, lines, where="add") == once


@given(definitions, requirements(), requirements())
def test_the_last_requirement_of_a_name_is_the_only_one(
    definition: Definition, first: list[str], second: list[str]
) -> None:
    """Except that a bare name asks for nothing that is not there."""
    both = edits.added(edits.added(definition, first, where="add"), second, where="add").packages
    told = {Requirement(line).name: line for line in requirement_lines(first)}
    for line in requirement_lines(second):
        name = Requirement(line).name
        if line != name or name not in told:
            told[name] = line
    assert set(both) == {*definition.packages, *told.values()}


def test_a_bare_name_leaves_the_requirement_that_is_there() -> None:
    definition = defined("six>=1.16", pyproject=PROJECT)
    assert added(definition, "SIX", "iDNA") == definition


def test_a_requirements_text_is_taken_like_a_list() -> None:
    text = "# all we need\nSix==1.17.0\n\niniconfig,attrs # two at once\n"
    assert edits.added(Definition(), text, where="add").packages == (
        "attrs",
        "iniconfig",
        "six==1.17.0",
    )
    whole = defined("attrs", "iniconfig", "six==1.17.0")
    assert edits.removed(whole, text, where="remove") == Definition()


def test_a_requirement_takes_the_place_of_the_project_s_own_and_the_comments_of_others_stay() -> (
    None
):
    changed = added(defined(pyproject=PROJECT), "sIX==1.17.0")
    assert changed == Definition(
        packages=("six==1.17.0",), pyproject=PROJECT.replace('    "Six>=1.16",  # old\n', "")
    )


def test_removing_edits_the_text_of_a_project_and_nothing_else_of_it() -> None:
    definition = defined("attrs", pyproject=PROJECT, extras=("fast",), env_vars={"A": "b"})
    one = removed(definition, "IDNA")
    assert one == definition.model_copy(
        update={"pyproject": PROJECT.replace('    "idna",       # names of hosts\n', "")}
    )
    assert one.pyproject is not None
    none = removed(one, "attrs", "six")
    assert none.packages == ()
    assert none.pyproject is not None
    expected = tomllib.loads(PROJECT)
    expected["project"]["dependencies"] = []
    assert tomllib.loads(none.pyproject) == expected
    for comment in ("# of the team", "# any", "# what everybody needs", "# the end", "# ours"):
        assert comment in none.pyproject


LAYOUTS = ("", " ", "\n", "\n    ", "  # why\n", "\n# why\n  ", "\t")


@given(st.data())
def test_whatever_the_layout_of_a_list_only_what_is_named_goes_from_it(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1))
    space = st.sampled_from(LAYOUTS)
    entries = [data.draw(space) + f'"{name}"' + data.draw(space) for name in names]
    array = ",".join(entries) + data.draw(st.sampled_from(["", ","])) + data.draw(space)
    text = f'[project]\nname = "x"\ndependencies = [{array}]\n\n[tool.other]\na = 1  # keep\n'
    doomed = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    left = removed(defined(pyproject=text), *doomed).pyproject
    assert left is not None
    expected = tomllib.loads(text)
    expected["project"]["dependencies"] = [name for name in names if name not in doomed]
    assert tomllib.loads(left) == expected
    assert left.endswith("[tool.other]\na = 1  # keep\n")


def test_the_comments_of_a_list_that_was_emptied_stay_when_something_is_added() -> None:
    emptied = added(removed(defined(pyproject=PROJECT), "six", "idna"), "attrs")
    text = resolving.project_text(emptied, Target(python="3.11.7", ray="2.60.0"))
    assert resolving.declared(text) == ("attrs",)
    assert "# what everybody needs" in text


def test_every_requirement_of_a_name_goes_where_markers_part_them() -> None:
    definition = defined("six<2; python_version < '3'", "six>=1; python_version >= '3'", "attrs")
    assert removed(definition, "six") == defined("attrs")


def test_a_text_that_cannot_be_edited_is_refused_and_not_half_edited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tomlkit.items.Array.pop", lambda self, index: None)
    with pytest.raises(InvalidInput, match="too unusual to be edited") as caught:
        removed(defined(pyproject=PROJECT), "six")
    assert (caught.value.where, "replace" in caught.value.hint) == ("pyproject.toml", True)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("numpi", "did you mean 'numpy'?"),
        ("sixx", "did you mean 'six'?"),
        ("zope", "a dependency is removed together with the package that needs it"),
    ],
)
def test_what_is_not_declared_cannot_be_removed_and_the_nearest_is_named(
    name: str, hint: str
) -> None:
    with pytest.raises(InvalidPackages, match=f"'{name}' is not declared here") as caught:
        removed(defined("numpy>=2", pyproject=PROJECT), "six", name)
    assert hint in caught.value.hint
    assert caught.value.where == "remove"


@pytest.mark.parametrize("nothing", [(), "", "# only words\n\n"], ids=["list", "text", "comments"])
def test_no_packages_are_no_request(nothing: Any) -> None:
    for verb in (edits.added, edits.removed):
        with pytest.raises(InvalidPackages, match="no packages are given") as caught:
            verb(Definition(), nothing, where="here")
        assert (caught.value.where, caught.value.hint) == ("here", "name at least one")


@pytest.mark.parametrize(
    "bad", ["-e .", "./six", "six ==", "https://host/six.whl", "git+ssh://h/x"]
)
def test_what_no_variant_may_have_cannot_be_added(bad: str) -> None:
    with pytest.raises(InvalidPackages) as caught:
        added(Definition(), "six", bad)
    assert caught.value.where == "add"


# -- upgrading


def test_an_upgrade_of_nothing_named_is_one_of_everything() -> None:
    definition = defined("six")
    nothing: Any
    for nothing in ((), [], ""):
        assert edits.upgraded(definition, nothing, {"six": "1"}, where="update") == (definition, ())


def test_an_upgrade_names_what_may_move_and_keeps_what_is_declared() -> None:
    definition = defined("six<2", pyproject=PROJECT)
    locked = {"six": "1", "idna": "3", "ray": "2"}
    told = edits.upgraded(definition, ["IDNA", "six"], locked, where="update")
    assert told == (definition, ("idna", "six"))


def test_an_upgrade_with_a_version_takes_the_place_of_what_is_declared() -> None:
    definition, names = edits.upgraded(
        defined("attrs", pyproject=PROJECT),
        "Six>=1.17  # the new one\nattrs",
        {"six": "1.16", "attrs": "1"},
        where="update",
    )
    assert definition == Definition(
        packages=("attrs", "six>=1.17"), pyproject=PROJECT.replace('    "Six>=1.16",  # old\n', "")
    )
    assert names == ("attrs", "six")


@pytest.mark.parametrize(
    ("name", "hint"), [("atrs", "did you mean 'attrs'?"), ("numpy", "add it with `ray-envs add`")]
)
def test_what_is_not_locked_cannot_be_upgraded(name: str, hint: str) -> None:
    with pytest.raises(InvalidPackages, match=f"'{name}' is not in this environment") as caught:
        edits.upgraded(defined("attrs"), [name], {"attrs": "1"}, where="update")
    assert (caught.value.where, caught.value.hint) == ("update", hint)


# -- inheriting


def test_only_a_package_without_a_version_takes_that_of_the_cluster() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    given = (
        "Six",
        "iniconfig>=1",
        f"attrs @ git+https://host/attrs@{commit}",
        "httpx[http2]; python_version >= '3'",
        "nowhere",
    )
    here = {"six": "1.16.0", "iniconfig": "2", "attrs": "3", "httpx": "0.28"}
    assert edits.inherited(given, here) == requirement_lines(
        [
            "six==1.16.0",
            "iniconfig>=1",
            f"attrs @ git+https://host/attrs@{commit}",
            "httpx[http2]==0.28; python_version >= '3'",
            "nowhere",
        ]
    )


# -- what differs


@given(locks, locks)
def test_a_diff_applied_to_what_was_gives_what_is(
    before: dict[str, str], after: dict[str, str]
) -> None:
    told = edits.diff(before, after)
    assert told.keys() == {"added", "removed", "changed"}
    result = dict(before)
    for name, version in told["removed"].items():
        assert result.pop(name) == version
    for name, (old, new) in told["changed"].items():
        assert old != new
        assert result[name] == old
        result[name] = new
    for name, version in told["added"].items():
        assert name not in result
        result[name] = version
    assert result == after
    assert all(list(part) == sorted(part) for part in told.values())
    back = edits.diff(after, before)
    assert (back["added"], back["removed"]) == (told["removed"], told["added"])
    assert back["changed"] == {name: [new, old] for name, (old, new) in told["changed"].items()}
