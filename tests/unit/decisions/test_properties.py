"""Words over arbitrary input: no two different things collide."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.decisions import locks, resolving
from ray_envs.errors import InvalidId
from ray_envs.models import MAX_ID_LENGTH, EnvId, Installed, Platform, Target
from ray_envs.specs import Definition

# -- names: different things never share one

#: Few letters, and those that texts are joined, quoted and escaped with: so that joins would meet.
words = st.text('ab",[]:\\ \n', max_size=3)
installed = st.builds(Installed, name=words, version=words, pin=words, is_built=st.booleans())
targets = st.builds(Target, python=words, ray=words)


def platform(name: str) -> Platform:
    return Platform(markers={}, tags=(), name=name)


key_inputs = st.tuples(
    st.lists(installed, max_size=3), targets, words.map(platform), st.sampled_from(["", "a", '""'])
)


def key_of(given_input: tuple[list[Installed], Target, Platform, str]) -> str:
    packages, target, where, options = given_input
    return locks.key_of(packages, target, where, build_options=options)


def what_decides_a_key(given_input: tuple[list[Installed], Target, Platform, str]) -> Any:
    packages, target, where, options = given_input
    return sorted((p.name, p.version, p.pin) for p in packages), target, where.name, options


@given(key_inputs, st.data())
def test_two_keys_are_equal_exactly_where_the_same_is_installed_on_the_same(
    one: tuple[list[Installed], Target, Platform, str], data: st.DataObject
) -> None:
    packages, target, where, options = one
    other = data.draw(key_inputs)
    near = (
        data.draw(st.permutations(packages)),
        data.draw(st.sampled_from([target, other[1]])),
        data.draw(st.sampled_from([where, other[2]])),
        data.draw(st.sampled_from([options, other[3]])),
    )
    for two in (other, near):
        assert (key_of(one) == key_of(two)) == (what_decides_a_key(one) == what_decides_a_key(two))


@given(key_inputs.filter(lambda each: each[0]), st.data(), words.filter(bool))
def test_each_field_alone_changes_a_key(
    one: tuple[list[Installed], Target, Platform, str], data: st.DataObject, more: str
) -> None:
    packages, target, where, options = one
    index = data.draw(st.integers(0, len(packages) - 1))
    changed = [(packages, target, where, options + more)]
    changed += [
        (packages, target.model_copy(update={name: getattr(target, name) + more}), where, options)
        for name in ("python", "ray")
    ]
    changed.append((packages, target, platform(where.name + more), options))
    for name in ("name", "version", "pin"):
        item = packages[index]
        longer = item.model_copy(update={name: getattr(item, name) + more})
        changed.append(
            ([*packages[:index], longer, *packages[index + 1 :]], target, where, options)
        )
    for each in changed:
        assert key_of(each) != key_of(one)


@given(st.text("ab", max_size=4), st.data())
def test_a_text_that_is_cut_into_fields_in_two_ways_gives_two_keys(
    text: str, data: st.DataObject
) -> None:
    cuts = st.lists(st.integers(0, len(text)), min_size=6, max_size=6).map(sorted)
    seen = set()
    of_cuts = {tuple(data.draw(cuts)) for _ in range(4)}
    for ends in of_cuts:
        bounds = [0, *ends, len(text)]
        fields = (text[start:end] for start, end in pairwise(bounds))
        name, version, pin, python, ray, where, options = fields
        item = Installed(name=name, version=version, pin=pin)
        seen.add(key_of(([item], Target(python=python, ray=ray), platform(where), options)))
    assert len(seen) == len(of_cuts)


asked = st.tuples(
    words,
    st.none() | words | st.just("null"),
    st.none() | words,
    targets,
    st.dictionaries(words, words, max_size=2),
)


def fingerprint_of(
    given_input: tuple[str, str | None, str | None, Target, Mapping[str, str]], **options: Any
) -> str:
    project, user_lock, exclude_newer, target, index_settings = given_input
    definition = Definition(exclude_newer=exclude_newer, **options)
    return resolving.fingerprint(
        project, user_lock, definition, target, index_settings=index_settings
    )


@given(asked, asked, st.data())
def test_two_fingerprints_are_equal_exactly_where_the_same_is_resolved(
    one: Any, other: Any, data: st.DataObject
) -> None:
    near = tuple(data.draw(st.sampled_from(pair)) for pair in zip(one, other, strict=True))
    for two in (other, near):
        assert (fingerprint_of(one) == fingerprint_of(two)) == (one == two)


@given(asked, st.integers(0, 4), words.filter(bool))
def test_each_part_alone_changes_a_fingerprint_and_the_order_of_settings_does_not(
    one: Any, index: int, more: str
) -> None:
    part = one[index]
    if isinstance(part, Target):
        changed: Any = part.model_copy(update={"python": part.python + more})
    elif isinstance(part, dict):
        changed = {**part, "another setting": more}
    else:
        changed = (part or "") + more
    assert fingerprint_of((*one[:index], changed, *one[index + 1 :])) != fingerprint_of(one)
    turned = dict(reversed(one[4].items()))
    assert fingerprint_of((*one[:4], turned)) == fingerprint_of(one)
    assert fingerprint_of(one, extras=("x",), env_vars={"A": more}) == fingerprint_of(one)


ids = st.from_regex(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_ID_LENGTH - 1}}}", fullmatch=True)
#: As long as folders can become, and nearly: each `_` takes three characters there.
counts = st.integers(25, 28) | st.integers(0, MAX_ID_LENGTH - 1)
long_ids = counts.map(lambda count: "a" + "_" * count)
workflows = ids | long_ids | st.sampled_from(["default", "d", "default_"])
#: What separates, escapes and leads out of a folder, beside a few plain letters.
nearly_ids = st.tuples(st.sampled_from([".", "..", "-", "%", "~", "/"]), ids).map("".join)
odd_texts = (
    nearly_ids | st.text(st.sampled_from("aA5F_%./\\-~ \n\0ä"), max_size=12) | st.text(max_size=80)
)


def read_back(folder: str) -> EnvId:
    """The id of a folder, by the rule that its docstring tells."""
    parts = [part.replace("%5F", "_") for part in folder.split("_")]
    names = ("workflow_id", "node_id", "version_id")
    return EnvId.model_validate(dict(zip(names, parts, strict=False)))


@given(workflows, ids | long_ids, st.none() | ids | long_ids)
def test_every_id_can_be_read_back_from_its_folder_and_from_its_text(
    workflow: str, node: str, version: str | None
) -> None:
    """So no two ids share a folder, whatever they are."""
    parts = {"workflow_id": workflow, "node_id": node, "version_id": version}
    if len("_".join(part.replace("_", "%5F") for part in parts.values() if part)) > 240:
        with pytest.raises(InvalidId, match="too long"):
            EnvId.model_validate(parts)
        return
    env_id = EnvId.model_validate(parts)
    assert read_back(env_id.folder) == env_id
    assert EnvId.parse(str(env_id)) == env_id


@given(st.lists(odd_texts | ids, min_size=1, max_size=4).map("/".join))
def test_any_text_is_refused_or_names_one_folder_inside_the_root(text: str) -> None:
    try:
        folder = EnvId.parse(text).folder
    except InvalidId:
        return
    place = os.path.normpath(os.path.join("/root", folder))
    assert os.path.dirname(place) == "/root"
    assert os.path.basename(place) == folder
    assert folder[0].isalnum()
    assert folder.isascii()
    assert folder.isprintable()
    assert 0 < len(folder) <= 240


@given(ids, odd_texts)
def test_a_part_that_is_refused_in_one_place_is_refused_in_all(good: str, text: str) -> None:
    def is_refused(**parts: str) -> bool:
        try:
            EnvId.model_validate(parts)
        except InvalidId as exc:
            return "together too long" not in exc.message
        return False

    assert (
        is_refused(node_id=text)
        == is_refused(node_id=good, workflow_id=text)
        == is_refused(node_id=good, version_id=text)
    )
