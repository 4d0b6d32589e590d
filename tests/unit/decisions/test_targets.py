"""Where environments shall be: what labels may be asked to be, and the same nodes each time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.decisions.targets import Need, NodeView, chosen, fits
from ray_envs.models import NodeEnvState, Phase
from ray_envs.specs import Definition

KEY = "k"
NODES = [f"n{number}" for number in range(6)]
VALUES = ["a", "b", "c-1"]

#: What a node may be about `KEY`.
stages = st.sampled_from([None, *Phase])


def view(node_id: str, phase: Phase | None = None, *, is_head: bool = False) -> NodeView:
    others = {} if phase in (None, Phase.READY) else {KEY: NodeEnvState(key=KEY, phase=phase)}
    ready = frozenset({KEY} if phase is Phase.READY else ())
    return NodeView(node_id, "linux", is_head=is_head, ready=ready, others=others)


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeView]:
    head = draw(st.sampled_from([None, *NODES]))
    ids = draw(st.lists(st.sampled_from(NODES), unique=True))
    return [view(node_id, draw(stages), is_head=node_id == head) for node_id in ids]


def ids(nodes: list[NodeView]) -> set[str]:
    return {node.node_id for node in nodes}


# -- what a node must be


@pytest.mark.parametrize(
    ("wanted", "value", "matches"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "a", False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a,b)", "b", True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c-1", False),
        ("in(a,b)", None, False),
        ("!in(a,b)", "b", False),
        ("!in(a,b)", "c-1", True),
        ("!in(a,b)", None, True),
    ],
)
def test_a_selector_means_what_it_means_to_ray(
    wanted: str, value: str | None, matches: bool
) -> None:
    """As measured with Ray 2.60; a label that a node lacks matches only what is negated."""
    Definition(label_selector={"zone": wanted})  # one that can be written
    need = Need(labels=(("zone", wanted),))
    assert fits(need, {} if value is None else {"zone": value}, 0) is matches


@given(st.lists(st.sampled_from(VALUES), min_size=1, unique=True), st.sampled_from([None, *VALUES]))
def test_a_negated_selector_matches_exactly_where_the_plain_one_does_not(
    values: list[str], value: str | None
) -> None:
    labels = {} if value is None else {"zone": value}
    for plain in (values[0], f"in({','.join(values)})"):
        one, other = (Need(labels=(("zone", text),)) for text in (plain, f"!{plain}"))
        assert fits(one, labels, 0) is not fits(other, labels, 0)
        assert fits(one, labels, 0) is (value in re.findall(r"[abc][-1]*", plain.strip("in()")))


@given(
    st.dictionaries(st.sampled_from(["x", "y"]), st.sampled_from(VALUES)),
    st.dictionaries(st.sampled_from(["x", "y", "z"]), st.sampled_from(VALUES)),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_a_node_fits_that_has_every_label_and_enough_gpus(
    wanted: dict[str, str], labels: dict[str, str], gpus: int, there: int
) -> None:
    need = Need.of(Definition(label_selector=wanted, num_gpus=gpus or None))
    assert fits(need, labels, there) is (wanted.items() <= labels.items() and there >= gpus)


def test_a_need_says_in_words_what_it_asks_for() -> None:
    definition = Definition(label_selector={"zone": "b", "disk": "!slow"}, num_gpus=0.5, nodes=2)
    need = Need.of(definition)
    assert need == Need((("disk", "!slow"), ("zone", "b")), 0.5, 2)
    assert str(need) == "disk=!slow, zone=b, 0.5 GPUs"
    assert str(Need.of(Definition())) == "no particular node"


# -- which of those that fit


@given(clusters())
def test_whoever_asks_for_no_number_gets_all(nodes: list[NodeView]) -> None:
    assert chosen(Need(), KEY, iter(nodes)) == nodes


@given(clusters(), st.integers(1, 7), st.data())
def test_as_many_are_chosen_as_were_asked_for_in_whatever_order_they_come(
    nodes: list[NodeView], count: int, data: st.DataObject
) -> None:
    found = chosen(Need(count=count), KEY, nodes)
    assert len(ids(found)) == len(found) == min(count, len(nodes))
    assert chosen(Need(count=count), KEY, data.draw(st.permutations(nodes))) == found


@given(clusters(), st.integers(1, 7))
def test_nobody_is_chosen_before_those_that_have_it(nodes: list[NodeView], count: int) -> None:
    found = ids(chosen(Need(count=count), KEY, nodes))
    having = ids([node for node in nodes if KEY in node.ready])
    assert len(found & having) == min(count, len(having))


@given(clusters(), st.integers(1, 7), st.data())
def test_those_that_have_it_stay_chosen_whoever_joins_or_begins(
    nodes: list[NodeView], count: int, data: st.DataObject
) -> None:
    kept = [node for node in chosen(Need(count=count), KEY, nodes) if KEY in node.ready]
    phase = data.draw(st.sampled_from([phase for phase in (None, *Phase) if phase != Phase.READY]))
    joined = [*nodes, view("another", phase, is_head=data.draw(st.booleans()))]
    assert ids(kept) <= ids(chosen(Need(count=count), KEY, joined))


@given(clusters(), st.integers(1, 7), st.data())
def test_those_that_are_at_it_stay_chosen_whoever_joins(
    nodes: list[NodeView], count: int, data: st.DataObject
) -> None:
    """But the head: nobody can tell whether it is at it only for others."""
    kept = [
        node
        for node in chosen(Need(count=count), KEY, nodes)
        if not node.is_head and KEY in node.others and node.others[KEY].phase is not Phase.FAILED
    ]
    joined = [*nodes, view("another", is_head=data.draw(st.booleans()))]
    assert ids(kept) <= ids(chosen(Need(count=count), KEY, joined))


@given(clusters(), st.integers(1, 7), st.data())
def test_when_one_dies_the_others_stay_and_one_more_is_chosen_if_there_is_one(
    nodes: list[NodeView], count: int, data: st.DataObject
) -> None:
    before = chosen(Need(count=count), KEY, nodes)
    if before:
        dead = data.draw(st.sampled_from(before))
        alive = [node for node in nodes if node is not dead]
        after = chosen(Need(count=count), KEY, alive)
        has_failed = any(s.phase is Phase.FAILED for node in nodes for s in node.others.values())
        if not has_failed:
            assert ids(before) - {dead.node_id} <= ids(after)
        assert len(after) == min(count, len(alive))


def test_a_node_that_failed_gives_its_place_to_another_one() -> None:
    nodes = [view(node_id) for node_id in NODES]
    (first,) = chosen(Need(count=1), KEY, nodes)
    failed = [view(n.node_id, Phase.FAILED) if n is first else n for n in nodes]
    (second,) = chosen(Need(count=1), KEY, failed)
    assert second.node_id != first.node_id


def test_what_fails_everywhere_is_not_tried_on_all_nodes_in_turn() -> None:
    nodes = {node_id: view(node_id) for node_id in NODES}
    for _ in range(2 * len(NODES)):
        (node,) = chosen(Need(count=1), KEY, nodes.values())
        nodes[node.node_id] = view(node.node_id, Phase.FAILED)
    assert sum(KEY in node.others for node in nodes.values()) == 3


def test_the_head_that_gets_it_for_others_is_not_chosen_for_that() -> None:
    """A count would otherwise always end on the head, which often takes no tasks."""
    nodes = [view(node_id, is_head=node_id == "n0") for node_id in NODES]
    for count in range(1, len(NODES)):
        before = chosen(Need(count=count), KEY, nodes)
        assert "n0" not in ids(before)
        for phase in (Phase.WAITING, Phase.DOWNLOADING, Phase.CACHED):
            busy = [replace(nodes[0], others={KEY: NodeEnvState(key=KEY, phase=phase)}), *nodes[1:]]
            assert ids(chosen(Need(count=count), KEY, busy)) == ids(before)
    assert chosen(Need(count=1), KEY, nodes[:1]) == nodes[:1]


def test_different_keys_are_on_different_nodes() -> None:
    nodes = [view(node_id) for node_id in NODES]
    places = Counter(chosen(Need(count=1), f"{n:032x}", nodes)[0].node_id for n in range(600))
    assert len(places) == len(NODES)
    assert max(places.values()) < 200
