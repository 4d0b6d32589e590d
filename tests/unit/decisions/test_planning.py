"""The planner, over arbitrary snapshots: any snapshot is legal, and each action has its reason."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_envs.decisions.planning import MAX_TOLD, Build, Wish, pause_s, plan, status_of
from ray_envs.decisions.targets import Need, NodeView, chosen, fits
from ray_envs.models import NodeEnvState, Phase, Status

KEYS = ["k1", "k2", "k3", "k4"]
NODES = ["n1", "n2", "n3", "n4", "n5", "n6"]
SITES = ["linux", "darwin"]

States = dict[str, NodeEnvState]
Snapshot = tuple[list[Wish], list[NodeView]]

IN_PROGRESS = [phase for phase in Phase if not phase.is_final]
phases = st.sampled_from([phase for phase in Phase if phase is not Phase.READY])
sites = st.sampled_from(["linux", "linux", "linux", "darwin"])
needs = st.builds(
    Need,
    labels=st.sampled_from([(), (), (("zone", "a"),), (("zone", "!a"),)]),
    num_gpus=st.sampled_from([0, 0, 1]),
    count=st.sampled_from([None, None, 1, 2]),
)


@st.composite
def wishes_of(draw: st.DrawFn, keys: list[str]) -> list[Wish]:
    names = st.lists(st.text("abc", min_size=1, max_size=3), max_size=6).map(tuple)
    some = st.lists(needs, min_size=1, max_size=2, unique=True).map(tuple)
    return [
        Wish(key, draw(st.integers(0, 3)), draw(names), draw(sites), draw(some))
        for key in draw(st.lists(st.sampled_from(keys), unique=True))
    ]


@st.composite
def views_of(draw: st.DrawFn, keys: list[str]) -> list[NodeView]:
    head = draw(st.sampled_from([None, *NODES]))
    some = st.sets(st.sampled_from(keys))
    found = []
    for node_id in draw(st.lists(st.sampled_from(NODES), unique=True)):
        ready = draw(some)
        others = {
            key: NodeEnvState(key=key, phase=draw(phases), attempt=draw(st.integers(0, 3)))
            for key in sorted(draw(some) - ready)
        }
        failed = {key for key, state in others.items() if state.phase is Phase.FAILED}
        found.append(
            NodeView(
                node_id,
                draw(sites),
                is_head=node_id == head,
                labels=draw(st.sampled_from([{}, {"zone": "a"}, {"zone": "b"}])),
                num_gpus=draw(st.integers(0, 1)),
                ready=frozenset(ready),
                others=others,
                asked=dict.fromkeys(draw(some), 0) if draw(st.booleans()) else {},
                due=frozenset(failed & draw(some)),
            )
        )
    return found


snapshots = st.tuples(wishes_of(KEYS), views_of(KEYS))


def shall_have(wish: Wish, nodes: list[NodeView]) -> set[str]:
    """The nodes that shall have it: the rule, said another way."""
    found = {
        node.node_id for node in nodes if wish.key in node.asked and node.site == wish.site
    }  # fmt: skip
    for need in wish.needs:
        fitting = [
            node
            for node in nodes
            if node.site == wish.site and fits(need, node.labels, node.num_gpus)
        ]
        found |= {node.node_id for node in chosen(need, wish.key, fitting)}
    return found


def may_begin(wish: Wish, node: NodeView) -> bool:
    state = node.others.get(wish.key)
    if wish.key in node.ready:
        return False
    if state is None or state.phase is Phase.CACHED:
        return True
    is_failed = state.phase is Phase.FAILED
    return is_failed and (state.attempt < wish.attempt or wish.key in node.due)


def has(node: NodeView, key: str) -> bool:
    """Whether it can give the wheels of `key` to others."""
    return key in node.ready or (key in node.others and node.others[key].phase is Phase.CACHED)


# -- one plan


@given(snapshots)
def test_only_what_is_wanted_and_missing_or_to_be_tried_again_is_begun(snapshot: Snapshot) -> None:
    wishes, nodes = {wish.key: wish for wish in snapshot[0]}, snapshot[1]
    views = {node.node_id: node for node in nodes}
    for build in plan(*snapshot):
        wish, node = wishes[build.key], views[build.node_id]
        assert may_begin(wish, node)
        assert build.attempt == wish.attempt
        assert node.site == wish.site, "nothing is planned for nodes of another site"
        targets = shall_have(wish, nodes)
        assert (node.node_id in targets) is not build.is_cache_only
        assert targets, "nothing is downloaded for nobody"


@given(snapshots)
def test_peers_are_other_nodes_that_have_it_and_who_is_told_of_none_finds_none(
    snapshot: Snapshot,
) -> None:
    _, nodes = snapshot
    for build in plan(*snapshot):
        having = {node.node_id for node in nodes if has(node, build.key)}
        assert set(build.peers) <= having - {build.node_id}
        assert len(set(build.peers)) == len(build.peers) <= 4
        assert build.peers or having <= {build.node_id}
        assert not (build.is_cache_only and having)


@given(snapshots)
def test_one_node_asks_the_index_for_a_key_until_three_have_failed(snapshot: Snapshot) -> None:
    wishes, nodes = {wish.key: wish for wish in snapshot[0]}, snapshot[1]
    told = [build for build in plan(*snapshot) if not build.peers]
    asking = Counter(
        build.key for build in told if not any(has(node, build.key) for node in nodes)
    )  # fmt: skip
    for key, number in asking.items():
        states = [(node, node.others[key]) for node in nodes if key in node.others]
        failed = [
            node
            for node, state in states
            if state.phase is Phase.FAILED and not may_begin(wishes[key], node)
        ]
        if len(failed) < 3:
            assert number == 1
            assert not [state for _, state in states if state.phase in IN_PROGRESS]


@given(snapshots)
def test_whoever_only_downloads_for_others_is_the_head(snapshot: Snapshot) -> None:
    heads = {node.node_id for node in snapshot[1] if node.is_head}
    assert {build.node_id for build in plan(*snapshot) if build.is_cache_only} <= heads


many = [f"k{number:02}" for number in range(3 * MAX_TOLD)]


@given(st.tuples(wishes_of(many), views_of(many)))
def test_a_node_is_told_of_a_few_at_a_time_and_of_each_once(snapshot: Snapshot) -> None:
    wishes, nodes = snapshot
    builds = plan(wishes, nodes)
    told = Counter(build.node_id for build in builds)
    for node in nodes:
        busy = sum(state.phase in IN_PROGRESS for state in node.others.values())
        assert told[node.node_id] <= max(0, MAX_TOLD - busy)
    places = [(build.node_id, build.key) for build in builds]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.DOWNLOADING])
def test_a_head_that_downloads_for_others_is_told_of_a_few_at_a_time_too(phase: Phase) -> None:
    wishes = [Wish(key, 0, ("v",), "linux", (Need((("zone", "a"),)),)) for key in many]
    head, other = NodeView("n1", "linux", is_head=True), NodeView("n2", "linux", labels=ZONE_A)
    builds = plan(wishes, [head, other])
    assert {(build.node_id, build.is_cache_only) for build in builds} == {("n1", True)}
    assert len(builds) == MAX_TOLD
    others = {build.key: NodeEnvState(key=build.key, phase=phase) for build in builds}
    assert plan(wishes, [replace(head, others=others), other]) == []


ZONE_A = {"zone": "a"}


@given(snapshots, st.data())
def test_the_order_of_a_snapshot_decides_nothing(snapshot: Snapshot, data: st.DataObject) -> None:
    wishes, nodes = snapshot
    shuffled = data.draw(st.permutations(wishes)), data.draw(st.permutations(nodes))
    assert plan(*shuffled) == plan(*snapshot)


@given(snapshots)
def test_the_planner_changes_no_snapshot_and_keeps_nothing_between_two_calls(
    snapshot: Snapshot,
) -> None:
    before = copy.deepcopy(snapshot)
    first = plan(*snapshot)
    assert snapshot == before
    assert plan(*snapshot) == first


@given(snapshots)
def test_every_build_says_who_wants_it(snapshot: Snapshot) -> None:
    wishes, nodes = {wish.key: wish for wish in snapshot[0]}, snapshot[1]
    asked = {node.node_id: node.asked for node in nodes}
    for build in plan(*snapshot):
        names = wishes[build.key].variants
        if build.because == "a worker waits for it here":
            assert build.key in asked[build.node_id]
            continue
        assert all(name in build.because for name in names[:3] or ["a worker"])
        assert ("…" in build.because) == (len(names) > 3)


def test_what_a_worker_waits_for_is_begun_first() -> None:
    """So it is for the head, who gets everything for everybody."""
    wishes = [Wish(key, 0, ("v",), "linux") for key in many]
    asking = NodeView("n2", "linux", asked={many[-1]: 1})
    builds = plan(wishes, [NodeView("n1", "linux", is_head=True), asking])
    assert (builds[0].node_id, builds[0].key) == ("n1", many[-1])
    giving = NodeView("n1", "linux", is_head=True, ready=frozenset(many))
    builds = plan(wishes, [giving, asking])
    assert (builds[0].node_id, builds[0].key, builds[0].peers) == ("n2", many[-1], ("n1",))


def test_a_workers_asking_makes_its_node_a_target_beyond_the_number() -> None:
    wish = Wish("k1", 0, (), "linux", (Need((("zone", "a"),), count=1),))
    source = NodeView("n1", "linux", labels=ZONE_A, ready=frozenset({"k1"}))
    quiet = NodeView("n2", "linux")
    (build,) = plan([wish], [source, quiet, NodeView("n3", "linux", asked={"k1": 1})])
    assert build == Build("n3", "k1", 0, "a worker waits for it here", ("n1",))


def test_one_that_has_it_gives_it_to_a_few_at_once_and_all_that_have_it_share_the_sending() -> None:
    wish = Wish("k1", 0, ("v",), "linux")
    views = {f"n{n:03}": NodeView(f"n{n:03}", "linux", is_head=n == 0) for n in range(250)}
    views["n000"] = replace(views["n000"], ready=frozenset({"k1"}))
    having, rounds = 1, 0
    while builds := plan([wish], views.values()):
        first = Counter(build.peers[0] for build in builds)
        assert max(first.values()) <= 4
        for build in builds:
            at_it = {"k1": NodeEnvState(key="k1", phase=Phase.FETCHING)}
            views[build.node_id] = replace(views[build.node_id], others=at_it)
        assert plan([wish], views.values()) == []
        for build in builds:
            views[build.node_id] = replace(views[build.node_id], ready=frozenset({"k1"}), others={})
        senders = max(1, having - 1)  # the head only to the first ones
        assert len(builds) == min(4 * senders, len(views) - having)
        having, rounds = having + len(builds), rounds + 1
    assert (having, rounds) == (250, 4)


@pytest.mark.parametrize("head_site", [None, "darwin"])
@given(st.integers(0, 5), st.integers(0, 5))
def test_without_a_head_that_fits_one_of_the_others_downloads(
    head_site: str | None, nodes: int, failed: int
) -> None:
    wish = Wish("k1", 1, ("v",), "linux")
    bad = {"k1": NodeEnvState(key="k1", phase=Phase.FAILED, attempt=1)}
    views = [
        NodeView(f"n{n}", "linux", others=bad if n < failed else {}) for n in range(nodes)
    ]  # fmt: skip
    if head_site:
        views.append(NodeView("head", head_site, is_head=True))
    left = max(0, nodes - failed)
    builds = plan([wish], views)
    assert len(builds) == (left if failed >= 3 else min(1, left))
    assert all(build.peers == () and not build.is_cache_only for build in builds)


def test_a_node_that_has_the_wheels_itself_needs_no_other() -> None:
    cached = {"k1": NodeEnvState(key="k1", phase=Phase.CACHED)}
    (build,) = plan([Wish("k1", 0, ("v",), "linux")], [NodeView("n1", "linux", others=cached)])
    assert (build.node_id, build.peers, build.is_cache_only) == ("n1", (), False)


# -- acting on plans, in a world


@dataclass
class World:
    """Nodes on which builds go on and end; what is not drawn by hypothesis goes well."""

    wishes: list[Wish]
    views: dict[str, NodeView]
    #: The nodes for which the package index can be reached.
    online: set[str]
    #: What goes on: how each node is to get what.
    running: dict[tuple[str, str], Build] = field(default_factory=dict)
    told: Counter[str] = field(default_factory=Counter)

    def tick(self) -> bool:
        """Plan and tell the nodes; returns whether there was anything to tell."""
        builds = plan(self.wishes, self.views.values())
        for build in builds:
            assert (build.node_id, build.key) not in self.running
            self.running[build.node_id, build.key] = build
            self.say(build, Phase.WAITING)
            self.told[build.key] += 1
        return bool(builds)

    def say(self, build: Build, phase: Phase) -> None:
        node = self.views[build.node_id]
        others = {key: state for key, state in node.others.items() if key != build.key}
        if phase is not Phase.READY:
            state = NodeEnvState(key=build.key, phase=phase, attempt=build.attempt)
            others[build.key] = state
        ready = node.ready | {build.key} if phase is Phase.READY else node.ready - {build.key}
        self.views[build.node_id] = replace(
            node, ready=ready, others=others, due=node.due - {build.key}
        )

    def end(self, place: tuple[str, str], *, fails: bool = False) -> None:
        build = self.running.pop(place)
        peers = (self.views.get(peer) for peer in build.peers)
        node = self.views[build.node_id]
        can_be = build.node_id in self.online or has(node, build.key)
        can_be = can_be or any(peer is not None and has(peer, build.key) for peer in peers)
        done = Phase.CACHED if build.is_cache_only else Phase.READY
        self.say(build, Phase.FAILED if fails or not can_be else done)

    def die(self, node_id: str) -> None:
        del self.views[node_id]
        self.running = {place: b for place, b in self.running.items() if place[0] != node_id}

    def lose_disk(self, node_id: str) -> None:
        self.die_quietly(node_id)
        self.views[node_id] = replace(self.views[node_id], ready=frozenset(), others={})

    def die_quietly(self, node_id: str) -> None:
        self.running = {place: b for place, b in self.running.items() if place[0] != node_id}

    def let_time_pass(self) -> bool:
        """Every failure may be tried again; returns whether there was any."""
        is_any = False
        for node_id, node in self.views.items():
            failed = {k for k, state in node.others.items() if state.phase is Phase.FAILED}
            is_any = is_any or bool(failed)
            self.views[node_id] = replace(node, due=frozenset(failed))
        return is_any

    def missing(self) -> set[tuple[str, str]]:
        nodes = list(self.views.values())
        return {
            (node_id, wish.key)
            for wish in self.wishes
            for node_id in shall_have(wish, nodes)
            if wish.key not in self.views[node_id].ready
        }

    def settle(self, order: Iterable[int]) -> None:
        """All that goes on ends, in this order, until nothing is left to do."""
        turns = iter(order)
        for _ in range(2000):
            if not self.tick() and not self.running:
                if not self.missing():
                    return
                assert self.let_time_pass(), f"nobody is told of {self.missing()}"
            elif self.running:
                places = sorted(self.running)
                self.end(places[next(turns, 0) % len(places)])
        raise AssertionError(f"there is no end: {self.missing()}")


def world_of(snapshot: Snapshot, online: set[str]) -> World:
    """A world that is as in the snapshot, where what goes on is nobody's any more: agents began
    anew, as after a restart of the manager."""
    wishes, nodes = snapshot
    views = {}
    for node in nodes:
        others = {key: state for key, state in node.others.items() if state.phase.is_final}
        views[node.node_id] = replace(node, others=others)
    return World(wishes, views, online)


@settings(max_examples=150)
@given(snapshots, st.sampled_from(["all", "head", "one"]), st.data())
def test_acting_on_plans_ends_with_everything_where_it_shall_be_whatever_happens(
    snapshot: Snapshot, reach: str, data: st.DataObject
) -> None:
    """Builds end in any order and fail, nodes die, join and lose their disks; then luck returns."""
    online = {
        "all": {*NODES, "joined"},
        "head": {node.node_id for node in snapshot[1] if node.is_head},
        "one": {node.node_id for node in snapshot[1][:1]},
    }[reach]
    world = world_of(snapshot, online)
    for _ in range(data.draw(st.integers(0, 8))):
        world.tick()
        event = data.draw(st.sampled_from(["end", "end", "fail", "die", "join", "lose"]))
        living = sorted(world.views)
        if event in ("end", "fail") and world.running:
            place = data.draw(st.sampled_from(sorted(world.running)))
            world.end(place, fails=event == "fail")
        elif event == "join" and "joined" not in world.views:
            world.views["joined"] = NodeView("joined", "linux", labels=ZONE_A)
        elif event == "die" and living:
            world.die(data.draw(st.sampled_from(living)))
        elif event == "lose" and living:
            world.lose_disk(data.draw(st.sampled_from(living)))
    alive = {node_id for node_id in world.online if node_id in world.views}
    if reach == "head" and not any(world.views[node_id].is_head for node_id in alive):
        world.online = {*NODES, "joined"}  # the only one that could is dead
    elif reach == "one":
        world.online = {*NODES, "joined"}
    if reach == "head":  # of another site, it cannot get what is for others
        head_sites = {world.views[node_id].site for node_id in alive}
        if head_sites:
            world.wishes = [wish for wish in world.wishes if wish.site in head_sites]
    world.settle(data.draw(st.lists(st.integers(0, 20), max_size=30)))
    assert not world.missing()
    assert plan(world.wishes, world.views.values()) == []


@given(st.integers(2, 6), st.data())
def test_where_only_the_head_reaches_the_index_it_alone_asks_and_all_others_ask_it(
    nodes: int, data: st.DataObject
) -> None:
    views = {f"n{n}": NodeView(f"n{n}", "linux", is_head=n == 0) for n in range(nodes)}
    fits_head = data.draw(st.booleans())
    need = Need() if fits_head else Need((("zone", "a"),))
    views = {n: replace(v, labels={} if v.is_head else ZONE_A) for n, v in views.items()}
    world = World([Wish(key, 0, ("v",), "linux", (need,)) for key in KEYS], views, {"n0"})
    world.settle(data.draw(st.lists(st.integers(0, 20), max_size=30)))
    assert not any(
        state.phase is Phase.FAILED for v in views.values() for state in v.others.values()
    )
    assert world.told == dict.fromkeys(KEYS, nodes), "each node was told once of each"


def test_after_a_failure_of_the_head_others_try_and_when_three_failed_it_is_tried_again() -> None:
    views = {f"n{n}": NodeView(f"n{n}", "linux", is_head=n == 0) for n in range(6)}
    world = World([Wish("k1", 0, ("v",), "linux")], views, set())
    at_once = []
    while world.tick():
        at_once.append(sorted(node_id for node_id, _ in world.running))
        for place in sorted(world.running):
            world.end(place)
    assert at_once[0] == ["n0"]
    assert [len(each) for each in at_once] == [1, 1, 1, 3]
    world.online = {"n0"}
    world.let_time_pass()
    world.tick()
    assert list(world.running) == [("n0", "k1")]
    world.settle([])


@given(st.integers(1, 3), st.lists(st.integers(0, 20), max_size=20), st.data())
def test_as_many_nodes_as_were_asked_for_get_it_and_a_dead_one_is_replaced(
    number: int, order: list[int], data: st.DataObject
) -> None:
    views = {f"n{n}": NodeView(f"n{n}", "linux", is_head=n == 0) for n in range(6)}
    wish = Wish("k1", 0, ("v",), "linux", (Need(count=number),))
    world = World([wish], views, set(NODES) | {"n0"})
    world.settle(order)
    having = {n for n, view in world.views.items() if "k1" in view.ready}
    assert len(having) == number
    assert world.told["k1"] == number + 1  # and the head, for them
    assert "n0" not in having
    dead = data.draw(st.sampled_from(sorted(having)))
    world.die(dead)
    world.views["joined"] = NodeView("joined", "linux")
    world.settle(order)
    after = {n for n, view in world.views.items() if "k1" in view.ready}
    assert having - {dead} < after
    assert len(after) == number
    assert world.told["k1"] == number + 2


def test_a_permanent_failure_is_tried_once_on_each_node_for_each_time_somebody_asks() -> None:
    views = {f"n{n}": NodeView(f"n{n}", "linux", is_head=n == 0) for n in range(5)}
    world = World([Wish("k1", 0, ("v",), "linux")], views, set())
    for attempt in range(3):
        world.wishes = [replace(world.wishes[0], attempt=attempt)]
        while world.tick():
            for place in sorted(world.running):
                world.end(place)
        assert world.told["k1"] == 5 * (attempt + 1)


def test_pauses_double_up_to_a_quarter_of_an_hour() -> None:
    assert [pause_s(failures) for failures in (1, 2, 3, 5, 6, 7, 10**6)] == [
        30, 60, 120, 480, 900, 900, 900,
    ]  # fmt: skip


# -- the status over all nodes

all_phases = st.sampled_from(list(Phase))
STATUS_NODES = NODES[:4]


@st.composite
def states(draw: st.DrawFn) -> States:
    some = draw(st.lists(st.sampled_from(KEYS), unique=True))
    return {key: NodeEnvState(key=key, phase=draw(all_phases)) for key in some}


by_node = st.dictionaries(st.sampled_from(STATUS_NODES), states())


@given(st.lists(st.sampled_from(STATUS_NODES), unique=True), by_node)
def test_a_status_is_active_only_where_every_node_is_ready_and_final_only_where_all_are(
    node_ids: list[str], told: dict[str, States]
) -> None:
    found = [told.get(node_id, {}).get("k1") for node_id in node_ids]
    ends = [state.phase if state else None for state in found]
    status = status_of("k1", node_ids, told)
    assert (status is Status.ACTIVE) == (bool(ends) and set(ends) == {Phase.READY})
    is_final = bool(ends) and set(ends) <= {Phase.READY, Phase.FAILED}
    if is_final and Phase.FAILED in ends:
        assert status is Status.ERROR
    if status is Status.ERROR:
        assert None not in ends
        assert not set(ends) & set(IN_PROGRESS)


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ([Phase.READY, Phase.READY], Status.ACTIVE),
        ([Phase.READY, Phase.FAILED], Status.ERROR),
        ([Phase.FAILED, Phase.LINKING], Status.CREATING),
        ([Phase.READY, Phase.CACHED], Status.CREATING),
    ],
)
def test_a_status_is_that_of_all_nodes_together(ends: list[Phase], status: Status) -> None:
    told = {
        node_id: {"k1": NodeEnvState(key="k1", phase=phase)}
        for node_id, phase in zip(NODES, ends, strict=False)
    }
    assert status_of("k1", list(told), told) is status


@given(by_node)
def test_a_variant_that_no_node_shall_have_is_neither_active_nor_failed(
    told: dict[str, States],
) -> None:
    assert status_of("k1", [], told) is Status.CREATING


@given(st.lists(st.sampled_from(STATUS_NODES), unique=True), by_node, by_node)
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


@given(by_node, st.data())
def test_one_more_ready_node_never_makes_a_status_worse(
    told: dict[str, States], data: st.DataObject
) -> None:
    order = [Status.ERROR, Status.CREATING, Status.ACTIVE]
    ids = sorted(told)
    before = status_of("k1", ids, told)
    ready = {"k1": NodeEnvState(key="k1", phase=Phase.READY)}
    assert status_of("k1", data.draw(st.permutations(ids)), told) is before
    for node_id in ids:
        after = status_of("k1", ids, {**told, node_id: ready})
        if before is not Status.CREATING:  # the last one that was awaited may show a failure
            assert order.index(after) >= order.index(before)
    if ids:
        assert status_of("k1", ids, dict.fromkeys(ids, ready)) is Status.ACTIVE
