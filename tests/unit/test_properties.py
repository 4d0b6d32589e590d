"""Words and decisions over arbitrary input: nothing in use goes, and no two things collide."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_envs import locks, resolving
from ray_envs.errors import InvalidId
from ray_envs.models import (
    MAX_ID_LENGTH,
    Definition,
    EnvId,
    Installed,
    NodeEnvState,
    Phase,
    Platform,
    Status,
    Target,
)
from ray_envs.planning import (
    EnvUse,
    Limits,
    NodeView,
    Verdict,
    Wish,
    plan,
    plan_collection,
    status_of,
)

KEYS = ["k1", "k2", "k3", "k4"]
NODES = ["n1", "n2", "n3"]
keys, nodes = st.sampled_from(KEYS), st.sampled_from(NODES)

# -- building: whatever happens, acting on the plan comes to an end


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Wish], list[NodeView], dict[str, str]]:
    platforms = st.sampled_from(["linux", "darwin"])
    wishes = [
        Wish(key, draw(st.integers(0, 2)), ("v",)) for key in draw(st.lists(keys, unique=True))
    ]
    views = []
    for node_id in draw(st.lists(nodes, unique=True)):
        states = {
            key: NodeEnvState(key=key, phase=draw(phases), attempt=draw(st.integers(0, 3)))
            for key in draw(st.lists(keys, unique=True))
        }
        views.append(NodeView(node_id, draw(platforms), states))
    return wishes, views, draw(st.dictionaries(keys, platforms))


phases = st.sampled_from([Phase.READY, Phase.FAILED]) | st.sampled_from(list(Phase))


def with_state(view: NodeView, state: NodeEnvState) -> NodeView:
    return replace(view, states={**view.states, state.key: state})


@given(clusters(), st.data())
def test_acting_on_the_plan_in_any_order_and_with_any_luck_ends_where_nothing_is_left_to_do(
    cluster: tuple[list[Wish], list[NodeView], dict[str, str]], data: st.DataObject
) -> None:
    """One action at a time, planned anew after each, as after a restart of the manager."""
    wishes, views, platforms = cluster
    fitting = {
        (view.node_id, wish.key)
        for view in views
        for wish in wishes
        if platforms.get(wish.key) == view.platform
    }
    by_id = {view.node_id: view for view in views}
    begun: set[tuple[str, str]] = set()
    while builds := plan(wishes, by_id.values(), platforms):
        build = data.draw(st.sampled_from(builds))
        place = build.node_id, build.key
        assert place in fitting
        assert place not in begun  # so that this loop ends
        before = by_id[build.node_id].states.get(build.key)
        assert before is None or before.phase is Phase.FAILED
        begun.add(place)
        end = data.draw(st.sampled_from([Phase.READY, Phase.FAILED]))
        state = NodeEnvState(key=build.key, phase=end, attempt=build.attempt)
        by_id[build.node_id] = with_state(by_id[build.node_id], state)
    assert all(key in by_id[node_id].states for node_id, key in fitting)
    for wish in wishes:
        ids = sorted(node_id for node_id, key in fitting if key == wish.key)
        ends = {by_id[node_id].states[wish.key].phase for node_id in ids}
        status = status_of(wish.key, ids, {id: view.states for id, view in by_id.items()})
        if ends <= {Phase.READY, Phase.FAILED} and ends:
            assert status is (Status.ACTIVE if ends == {Phase.READY} else Status.ERROR)
        else:
            assert status is Status.CREATING


@given(clusters(), st.data())
def test_one_more_ready_node_never_makes_a_status_worse(
    cluster: tuple[list[Wish], list[NodeView], dict[str, str]], data: st.DataObject
) -> None:
    _, views, _ = cluster
    key, order = data.draw(keys), [Status.ERROR, Status.CREATING, Status.ACTIVE]
    told = {view.node_id: view.states for view in views}
    ids = sorted(told)
    before = status_of(key, ids, told)
    ready = {key: NodeEnvState(key=key, phase=Phase.READY)}
    assert status_of(key, data.draw(st.permutations(ids)), told) is before
    for node_id in ids:
        after = status_of(key, ids, {**told, node_id: ready})
        if before is not Status.CREATING:  # the last one that was awaited may show a failure
            assert order.index(after) >= order.index(before)
    if ids:
        assert status_of(key, ids, dict.fromkeys(ids, ready)) is Status.ACTIVE


# -- collecting: what is in use stays, and the limits are kept where that allows it

NOW = 1000.0
#: They cost little, and what they look for needs several things to meet.
thorough = settings(max_examples=200)


@dataclass(frozen=True)
class Situation:
    """Small numbers: so that ties, exact limits and empty sums occur."""

    uses: list[EnvUse]
    wanted: dict[str, str]
    leases: dict[str, str]
    busy: set[str]
    limits: Limits

    def plan(self, uses: list[EnvUse] | None = None) -> list[Verdict]:
        return plan_collection(
            self.uses if uses is None else uses,
            wanted=self.wanted,
            leases=self.leases,
            busy=self.busy,
            limits=self.limits,
            now=NOW,
        )

    def must_stay(self, use: EnvUse) -> bool:
        """The promise, said another way."""
        protected = {*self.wanted, *self.leases, *self.busy}
        return use.is_held or use.key in protected or use.last_used_at > NOW

    def must_go(self, use: EnvUse) -> bool:
        is_idle = use.last_used_at + self.limits.idle_s < NOW
        return not self.must_stay(use) and (is_idle or not use.is_ready)

    def is_over(self, uses: list[EnvUse]) -> bool:
        return any(
            limit is not None and sum(sizes) > limit
            for limit, sizes in (
                (self.limits.max_bytes, [use.bytes for use in uses]),
                (self.limits.max_inodes, [use.inodes for use in uses]),
            )
        )

    def split(self, node_id: str) -> tuple[list[EnvUse], list[EnvUse]]:
        """What of a node is kept and what is collected."""
        collected = {(v.node_id, v.key) for v in self.plan() if v.collect}
        here = [use for use in self.uses if use.node_id == node_id]
        return (
            [use for use in here if (use.node_id, use.key) not in collected],
            [use for use in here if (use.node_id, use.key) in collected],
        )


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    place = st.tuples(nodes, st.sampled_from([*KEYS, "k5", "k6"]))
    places = st.lists(place, unique=True, min_size=draw(st.sampled_from([0, 8])))
    few = st.integers(0, 4)
    is_rare = st.sampled_from([False, False, False, True])
    uses = [
        EnvUse(
            key=key,
            node_id=node_id,
            bytes=draw(few),
            inodes=draw(few),
            last_used_at=NOW - draw(st.integers(-2, 12)),
            is_held=draw(is_rare),
            is_ready=not draw(is_rare),
        )
        for node_id, key in draw(places)
    ]
    reasons = st.dictionaries(keys, st.sampled_from(["", "pinned", "job 1"]), max_size=2)
    some = st.none() | st.just(0) | st.integers(0, 12)
    return Situation(
        uses,
        wanted=draw(reasons),
        leases=draw(reasons),
        busy=draw(st.sets(keys, max_size=1)),
        limits=Limits(idle_s=draw(few) * 3, max_bytes=draw(some), max_inodes=draw(some)),
    )


@thorough
@given(situations())
def test_what_is_held_wanted_leased_busy_or_of_the_future_is_never_collected(
    situation: Situation,
) -> None:
    for node_id in NODES:
        _, collected = situation.split(node_id)
        assert not [use for use in collected if situation.must_stay(use)]


@thorough
@given(situations())
def test_what_has_no_record_or_was_idle_too_long_goes_and_the_limits_are_kept_if_they_can_be(
    situation: Situation,
) -> None:
    for node_id in NODES:
        kept, _ = situation.split(node_id)
        assert not [use for use in kept if situation.must_go(use)]
        if situation.is_over(kept):
            assert all(map(situation.must_stay, kept))


@thorough
@given(situations())
def test_for_a_limit_the_least_recently_used_go_first_and_no_more_than_needed(
    situation: Situation,
) -> None:
    for node_id in NODES:
        kept, collected = situation.split(node_id)
        for_limit = [use for use in collected if not situation.must_go(use)]
        free = [use for use in kept if not situation.must_stay(use)]
        for gone in for_limit:
            assert all(use.last_used_at >= gone.last_used_at for use in free)
        if for_limit:
            latest = max(for_limit, key=lambda use: (use.last_used_at, use.key))
            assert situation.is_over([*kept, latest])


@thorough
@given(situations())
def test_once_carried_out_a_plan_has_nothing_more_to_collect(situation: Situation) -> None:
    left = [use for node_id in NODES for use in situation.split(node_id)[0]]
    assert not [verdict for verdict in situation.plan(left) if verdict.collect]


@thorough
@given(situations())
def test_every_use_gets_one_verdict_that_says_why(situation: Situation) -> None:
    verdicts = situation.plan()
    assert sorted((v.node_id, v.key) for v in verdicts) == sorted(
        (use.node_id, use.key) for use in situation.uses
    )
    of = {(use.node_id, use.key): use for use in situation.uses}
    for verdict in verdicts:
        use = of[verdict.node_id, verdict.key]
        assert (verdict.bytes, verdict.idle_s) == (use.bytes, max(0, NOW - use.last_used_at))
        assert verdict.because
        assert "\n" not in verdict.because


@given(situations(), st.data())
def test_neither_the_order_of_a_snapshot_nor_another_node_decides_anything(
    situation: Situation, data: st.DataObject
) -> None:
    verdicts = situation.plan()
    assert situation.plan(data.draw(st.permutations(situation.uses))) == verdicts
    alone = [
        situation.plan([use for use in situation.uses if use.node_id == node_id])
        for node_id in NODES
    ]
    assert [verdict for each in alone for verdict in each] == verdicts


@given(situations(), st.data())
def test_one_more_reason_to_stay_never_makes_the_same_environment_go(
    situation: Situation, data: st.DataObject
) -> None:
    for use in situation.uses:
        held = [u.model_copy(update={"is_held": True}) if u == use else u for u in situation.uses]
        place = use.node_id, use.key
        assert place not in {(v.node_id, v.key) for v in situation.plan(held) if v.collect}


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
