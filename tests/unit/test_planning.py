"""The planner, over arbitrary snapshots: any snapshot is legal, and each action has its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_envs.models import NodeEnvState, Phase, Status
from ray_envs.planning import (
    Build,
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
NODES = ["n1", "n2", "n3", "n4"]
PLATFORMS = ["linux", "darwin"]

States = dict[str, NodeEnvState]
Snapshot = tuple[list[Wish], list[NodeView], dict[str, str]]


@st.composite
def states(draw: st.DrawFn) -> States:
    found = {}
    for key in draw(st.lists(st.sampled_from(KEYS), unique=True)):
        phase = draw(st.sampled_from(list(Phase)))
        found[key] = NodeEnvState(key=key, phase=phase, attempt=draw(st.integers(0, 4)))
    return found


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    names = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6).map(tuple)
    wishes = [
        Wish(key, draw(st.integers(0, 4)), draw(names))
        for key in draw(st.lists(st.sampled_from(KEYS), unique=True))
    ]
    nodes = [
        NodeView(node_id, draw(st.sampled_from(PLATFORMS)), draw(states()))
        for node_id in draw(st.lists(st.sampled_from(NODES), unique=True))
    ]
    platforms = draw(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(PLATFORMS)))
    return wishes, nodes, platforms


def should_build(wish: Wish, node: NodeView, platforms: Mapping[str, str]) -> bool:
    """The whole rule, said another way."""
    state = node.states.get(wish.key)
    is_missing = state is None
    is_old_failure = state is not None and state.phase is Phase.FAILED
    is_old_failure = is_old_failure and state is not None and wish.attempt > state.attempt
    return platforms.get(wish.key) == node.platform and (is_missing or is_old_failure)


@given(snapshots())
def test_what_is_built_is_exactly_what_is_wanted_and_missing_or_failed_before_it_was_asked_again(
    snapshot: Snapshot,
) -> None:
    wishes, nodes, platforms = snapshot
    assert {(build.node_id, build.key, build.attempt) for build in plan(*snapshot)} == {
        (node.node_id, wish.key, wish.attempt)
        for node in nodes
        for wish in wishes
        if should_build(wish, node, platforms)
    }


@given(snapshots())
def test_nothing_ready_or_in_progress_is_ever_built_and_no_node_of_another_platform_builds(
    snapshot: Snapshot,
) -> None:
    _, nodes, platforms = snapshot
    views = {node.node_id: node for node in nodes}
    for build in plan(*snapshot):
        node = views[build.node_id]
        state = node.states.get(build.key)
        assert state is None or state.phase is Phase.FAILED
        assert platforms[build.key] == node.platform


@given(snapshots())
def test_no_build_is_planned_twice(snapshot: Snapshot) -> None:
    places = [(build.node_id, build.key) for build in plan(*snapshot)]
    assert len(set(places)) == len(places)


@given(snapshots(), st.data())
def test_the_order_of_a_snapshot_decides_nothing(snapshot: Snapshot, data: st.DataObject) -> None:
    wishes, nodes, platforms = snapshot
    shuffled = data.draw(st.permutations(wishes)), data.draw(st.permutations(nodes)), platforms
    assert plan(*shuffled) == plan(*snapshot)


@given(snapshots())
def test_the_planner_changes_no_snapshot_and_keeps_nothing_between_two_calls(
    snapshot: Snapshot,
) -> None:
    wishes, nodes, platforms = snapshot
    before = (list(wishes), [replace(n, states=dict(n.states)) for n in nodes], dict(platforms))
    first = plan(*snapshot)
    assert snapshot == before
    assert plan(*snapshot) == first


@given(snapshots())
def test_every_build_says_who_wants_it(snapshot: Snapshot) -> None:
    wishes, _, _ = snapshot
    variants = {wish.key: wish.variants for wish in wishes}
    for build in plan(*snapshot):
        assert all(name in build.because for name in variants[build.key][:3])
        assert ("…" in build.because) == (len(variants[build.key]) > 3)


@given(snapshots(), st.sampled_from([Phase.READY, Phase.FAILED]))
def test_what_was_planned_and_has_ended_is_not_planned_again(
    snapshot: Snapshot, end: Phase
) -> None:
    """One attempt is one try, whether it succeeds or not: nothing is tried for ever."""
    wishes, nodes, platforms = snapshot
    done = acted(nodes, plan(*snapshot), end)
    assert plan(wishes, done, platforms) == []


@given(snapshots())
def test_a_failure_is_tried_once_for_each_time_somebody_asks_again(snapshot: Snapshot) -> None:
    wishes, nodes, platforms = snapshot
    failed = acted(nodes, plan(*snapshot), Phase.FAILED)
    again = [replace(wish, attempt=max(5, wish.attempt + 1)) for wish in wishes]
    tried = plan(again, failed, platforms)
    assert {(build.node_id, build.key) for build in tried} == {
        (node.node_id, wish.key)
        for node in failed
        for wish in wishes
        if platforms.get(wish.key) == node.platform and node.states[wish.key].phase is Phase.FAILED
    }
    assert plan(again, acted(failed, tried, Phase.FAILED), platforms) == []


@given(snapshots())
def test_a_node_that_lost_everything_is_given_everything_again(snapshot: Snapshot) -> None:
    wishes, nodes, platforms = snapshot
    empty = [replace(node, states={}) for node in nodes]
    assert len(plan(wishes, empty, platforms)) == sum(
        platforms.get(wish.key) == node.platform for wish in wishes for node in nodes
    )


def acted(nodes: list[NodeView], builds: list[Build], end: Phase) -> list[NodeView]:
    """The nodes after these builds have ended."""
    return [
        replace(
            node,
            states={
                **node.states,
                **{
                    build.key: NodeEnvState(key=build.key, phase=end, attempt=build.attempt)
                    for build in builds
                    if build.node_id == node.node_id
                },
            },
        )
        for node in nodes
    ]


# -- the status over all nodes

by_node = st.dictionaries(st.sampled_from(NODES), states())


@given(st.lists(st.sampled_from(NODES), unique=True), by_node)
def test_a_status_is_active_only_where_every_node_is_ready_and_final_only_where_all_are(
    node_ids: list[str], told: dict[str, States]
) -> None:
    found = [told.get(node_id, {}).get("k1") for node_id in node_ids]
    phases = [state.phase if state else None for state in found]
    status = status_of("k1", node_ids, told)
    assert (status is Status.ACTIVE) == (bool(phases) and set(phases) == {Phase.READY})
    is_final = bool(phases) and set(phases) <= {Phase.READY, Phase.FAILED}
    assert (status is Status.ERROR) == (is_final and Phase.FAILED in phases)
    assert status in (Status.ACTIVE, Status.ERROR, Status.CREATING)


@pytest.mark.parametrize(
    ("phases", "status"),
    [
        ([Phase.READY, Phase.READY], Status.ACTIVE),
        ([Phase.READY, Phase.FAILED], Status.ERROR),
        ([Phase.FAILED, Phase.LINKING], Status.CREATING),
    ],
)
def test_a_status_is_that_of_all_nodes_together(phases: list[Phase], status: Status) -> None:
    told = {
        node_id: {"k1": NodeEnvState(key="k1", phase=phase)}
        for node_id, phase in zip(NODES, phases, strict=False)
    }
    assert status_of("k1", list(told), told) is status


@given(by_node)
def test_a_variant_that_no_node_shall_have_is_neither_active_nor_failed(
    told: dict[str, States],
) -> None:
    assert status_of("k1", [], told) is Status.CREATING


@given(st.lists(st.sampled_from(NODES), unique=True), by_node, by_node)
def test_other_keys_and_other_nodes_decide_nothing(
    node_ids: list[str], told: dict[str, States], more: dict[str, States]
) -> None:
    noise = {
        node_id: {
            **{key: state for key, state in more.get(node_id, {}).items() if key != "k1"},
            **{key: state for key, state in told.get(node_id, {}).items() if key == "k1"},
        }
        for node_id in node_ids
    }
    others = {node_id: each for node_id, each in more.items() if node_id not in node_ids}
    assert status_of("k1", node_ids, noise | others) is status_of("k1", node_ids, told)


# -- what is collected, and what people are told about it; `test_properties` has the promises

HOUR, DAY, MIB = 3600.0, 86400.0, 2**20
NOW = 1000 * DAY


def use(key: str, *, idle_s: float = 0, **fields: Any) -> EnvUse:
    given = {"node_id": "n", "bytes": MIB, "inodes": 10, "is_held": False, "is_ready": True}
    return EnvUse(key=key, last_used_at=NOW - idle_s, **(given | fields))


def collection(*uses: EnvUse, **options: Any) -> list[Verdict]:
    given: dict[str, Any] = {"wanted": {}, "leases": {}, "busy": (), "limits": Limits(), "now": NOW}
    return plan_collection(uses, **(given | options))


OLD = use("k", idle_s=100 * DAY)


@pytest.mark.parametrize(
    ("there", "options", "collect", "because"),
    [
        (use("k", idle_s=90), {}, False, "last used 90 s ago, within the limits"),
        (use("k", idle_s=72 * HOUR), {}, False, "last used 3 days ago, within the limits"),
        (OLD, {}, True, "not used for 100 days, and the limit is 3 days"),
        (
            use("k", idle_s=150),
            {"limits": Limits(idle_s=119)},
            True,
            "not used for 2 min, and the limit is 119 s",
        ),
        (use("k", is_ready=False), {}, True, "it has no record: nobody finished its build"),
        (OLD.model_copy(update={"is_held": True}), {}, False, "a process runs in it"),
        (OLD, {"busy": {"k"}}, False, "it is being built or changed"),
        (
            OLD,
            {"wanted": {"k": "current generation 3 of x"}},
            False,
            "current generation 3 of x",
        ),
        (OLD, {"wanted": {"k": ""}}, False, "wanted"),
        (OLD, {"leases": {"k": "job 01000000"}}, False, "leased to job 01000000"),
        (OLD, {"leases": {"k": ""}}, False, "leased to somebody"),
        (
            use("k", idle_s=-5 * HOUR, is_ready=False),
            {"limits": Limits(max_bytes=0)},
            False,
            "its last use lies 5 h in the future: a clock was changed",
        ),
        (
            use("k"),
            {"limits": Limits(max_bytes=MIB // 2)},
            True,
            "least recently used, and 1.0 MiB are over the limit of 0.5 MiB",
        ),
        (
            use("k"),
            {"limits": Limits(max_inodes=9)},
            True,
            "least recently used, and 10 files are over the limit of 9",
        ),
        (
            use("k"),
            {"limits": Limits(max_bytes=MIB, max_inodes=10)},
            False,
            "last used 0 s ago, within the limits",
        ),
    ],
)
def test_every_verdict_has_its_reason(
    there: EnvUse, options: dict[str, Any], collect: bool, because: str
) -> None:
    (verdict,) = collection(there, **options)
    assert (verdict.collect, verdict.because) == (collect, because)


def test_what_is_wanted_counts_for_a_limit_and_what_is_not_wanted_goes_for_it() -> None:
    uses = [use(key, idle_s=idle_s) for key, idle_s in (("a", 30), ("b", 20), ("c", 10))]
    limits = Limits(max_bytes=2 * MIB)
    told = collection(*uses, limits=limits, wanted={"a": "pinned"})
    assert [(v.key, v.collect) for v in told] == [("a", False), ("b", True), ("c", False)]


def test_what_goes_anyway_makes_room_before_anything_else_has_to_go() -> None:
    uses = use("a", idle_s=30), use("b", idle_s=20, is_ready=False), use("c", idle_s=10 * DAY)
    told = collection(*uses, limits=Limits(max_bytes=MIB))
    assert [(v.key, v.collect) for v in told] == [("c", True), ("a", False), ("b", True)]


def test_a_key_that_is_busy_or_wanted_stays_on_every_node() -> None:
    told = collection(OLD, OLD.model_copy(update={"node_id": "m"}), busy=["k"])
    assert [(v.node_id, v.collect) for v in told] == [("m", False), ("n", False)]


@pytest.mark.parametrize("limits", [{"idle_s": -1}, {"idle_s": float("nan")}, {"max_bytes": -1}])
def test_limits_that_mean_nothing_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(limits)


def test_the_limits_of_whoever_says_nothing_are_72_hours_and_no_size() -> None:
    assert Limits() == Limits(idle_s=72 * HOUR, max_bytes=None, max_inodes=None)
