"""What is collected: nothing in use goes, limits are kept where they can be, all with a reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_envs.decisions.collecting import EnvUse, Limits, Verdict, plan_collection

KEYS = ["k1", "k2", "k3", "k4"]
NODES = ["n1", "n2", "n3"]
keys, nodes = st.sampled_from(KEYS), st.sampled_from(NODES)

# -- over arbitrary situations

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


# -- what people are told about it

HOUR, DAY, MIB = 3600.0, 86400.0, 2**20
TODAY = 1000 * DAY


def use(key: str, *, idle_s: float = 0, **fields: Any) -> EnvUse:
    given = {"node_id": "n", "bytes": MIB, "inodes": 10, "is_held": False, "is_ready": True}
    return EnvUse(key=key, last_used_at=TODAY - idle_s, **(given | fields))


def collection(*uses: EnvUse, **options: Any) -> list[Verdict]:
    given: dict[str, Any] = {
        "wanted": {},
        "leases": {},
        "busy": (),
        "limits": Limits(),
        "now": TODAY,
    }
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
        (OLD, {"wanted": {"k": "current generation 3 of x"}}, False, "current generation 3 of x"),
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
