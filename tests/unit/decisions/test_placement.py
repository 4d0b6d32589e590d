"""Placement: never a way to a node that is not ready, never two dicts for one environment."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ray_envs.decisions.placement import EVERYWHERE, MAX_NAMED_NODES, options, runtime_env
from ray_envs.decisions.targets import Need, fits
from ray_envs.errors import InvalidInput, NoEligibleNode

NODE_ID = "ray.io/node-id"
VENV = "/root/store/key/.venv"
GATE = {"key": "k", "attempt": 0}

variables = st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,8}", fullmatch=True), st.text())
spec_variables = variables.map(
    lambda found: {k: v for k, v in found.items() if k not in ("PATH", "VIRTUAL_ENV")}
)
values = st.sampled_from(["a", "b", "!a", "in(a,b)"])
theirs_alone = st.dictionaries(st.sampled_from(["market-type", "zone"]), values)

#: What a caller may give besides: none of it contradicts the variant.
harmless = st.fixed_dictionaries(
    {},
    optional={
        "num_cpus": st.integers(0, 8),
        "num_gpus": st.integers(0, 2),
        "memory": st.integers(0, 2**30),
        "resources": st.dictionaries(st.sampled_from(["disk", "net"]), st.integers(1, 4)),
        "max_retries": st.integers(0, 3),
        "label_selector": st.none() | theirs_alone,
        "fallback_strategy": st.none()
        | st.lists(st.fixed_dictionaries({"label_selector": st.none() | theirs_alone}), max_size=3),
        "runtime_env": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "working_dir": st.sampled_from(["/code", "s3://bucket/code.zip"]),
                "env_vars": st.dictionaries(st.sampled_from(["MINE", "ALSO_MINE"]), st.text()),
            },
        ),
    },
)


def environment(*ready: str, env_vars: dict[str, str] | None = None, **fields: Any) -> Any:
    """What `EnvManager.get_environment` answers, as far as it matters here."""
    is_gated = fields.get("is_gated", False)
    return {
        **EVERYWHERE,
        "ready_nodes": list(ready),
        "runtime_env": runtime_env(VENV, env_vars or {}, GATE if is_gated else None),
        **fields,
    }


@st.composite
def environments(draw: st.DrawFn, *, is_gated: bool | None = None) -> Any:
    """Each node is in one place; sometimes there are more than a selector may name."""
    size = draw(st.sampled_from([0, 4, 4, 100]))
    numbers = st.lists(st.integers(0, 999), unique=True, min_size=size // 2, max_size=size)
    places: dict[str, list[str]] = {"ready": [], "preparing": [], "unfit": [], "other": []}
    likely = draw(st.sampled_from(list(places)))
    for number in draw(numbers):
        place = draw(st.sampled_from([*places, likely, likely]))
        places[place].append(f"{number:08x}")
    return environment(
        *places["ready"],
        env_vars=draw(spec_variables),
        preparing_nodes=places["preparing"],
        unfit_nodes=places["unfit"],
        other_nodes=places["other"],
        is_gated=draw(st.booleans()) if is_gated is None else is_gated,
        may_spread=draw(st.booleans()),
        label_selector=draw(st.dictionaries(st.sampled_from(["disk", "arch"]), values)),
        num_gpus=draw(st.sampled_from([None, 0.0, 1.0])),
    )


def selectors(found: dict[str, Any]) -> list[dict[str, str]]:
    """All the ways that Ray may take, the first one first."""
    fallbacks = found.get("fallback_strategy", [])
    return [found.get("label_selector", {}), *(each["label_selector"] for each in fallbacks)]


def reachable(selector: dict[str, str], told: Any) -> set[str]:
    """The nodes to which a selector may lead, were they right in all their other labels."""
    names = ("ready_nodes", "preparing_nodes", "unfit_nodes", "other_nodes")
    wanted = ((NODE_ID, selector[NODE_ID]),) if NODE_ID in selector else ()
    return {
        node_id
        for name in names
        for node_id in told[name]
        if fits(Need(labels=wanted), {NODE_ID: node_id}, 0)
    }


def asked_of(told: Any, theirs: dict[str, Any]) -> list[dict[str, str]]:
    """What the caller's choices and the variant ask of a node together."""
    fallbacks = theirs.get("fallback_strategy") or []
    choices = [theirs.get("label_selector"), *(each["label_selector"] for each in fallbacks)]
    return [{**(choice or {}), **told["label_selector"]} for choice in choices]


# -- where it may run


@given(environments(is_gated=False), harmless, st.data())
def test_without_the_gate_every_way_leads_to_ready_nodes_only(
    told: Any, theirs: dict[str, Any], data: st.DataObject
) -> None:
    ready = told["ready_nodes"]
    meant = data.draw(st.none() | st.lists(st.sampled_from(ready), unique=True)) if ready else None
    if not (ready if meant is None else meant):
        with pytest.raises(NoEligibleNode) as caught:
            options(told, theirs, variant_id="v", nodes=meant)
        assert (caught.value.variant_id, caught.value.retryable) == ("v", True)
        assert caught.value.hint
        return
    found = options(told, theirs, variant_id="v", nodes=meant)
    for selector in selectors(found):
        assert selector[NODE_ID].startswith("in(")
        named = selector[NODE_ID][3:-1].split(",")
        assert set(named) <= set(ready if meant is None else meant)
        assert 1 <= len(named) == len(set(named)) <= MAX_NAMED_NODES
    assert len(selectors(found)) == len(asked_of(told, theirs))


@given(environments(is_gated=True), harmless)
def test_with_the_gate_no_way_leads_to_a_node_where_it_cannot_be(
    told: Any, theirs: dict[str, Any]
) -> None:
    unfit = set(told["unfit_nodes"])
    try:
        ways = selectors(options(told, theirs, variant_id="v"))
    except NoEligibleNode:
        assert not told["ready_nodes"]
        assert not told["preparing_nodes"]
        assert not told["may_spread"] or len(unfit) > MAX_NAMED_NODES
        return
    there = set(told["ready_nodes"]) | set(told["preparing_nodes"])
    for selector in ways:
        assert not reachable(selector, told) & unfit
        if not told["may_spread"]:
            assert reachable(selector, told) <= there
        if selector.get(NODE_ID, "").startswith("in("):
            assert selector[NODE_ID].count(",") < MAX_NAMED_NODES


@given(environments(is_gated=True), harmless)
def test_with_the_gate_ready_nodes_come_first_and_those_that_prepare_it_next(
    told: Any, theirs: dict[str, Any]
) -> None:
    try:
        ways = selectors(options(told, theirs, variant_id="v"))
    except NoEligibleNode:
        return
    names = [way.get(NODE_ID, "") for way in ways]
    rank = {
        node_id: place
        for place, name in enumerate(("ready_nodes", "preparing_nodes"))
        for node_id in told[name]
    }
    ranks = [rank[n[3:-1].split(",")[0]] if n.startswith("in(") else 2 for n in names]
    assert ranks == sorted(ranks)
    if told["may_spread"] and len(told["unfit_nodes"]) <= MAX_NAMED_NODES:
        assert ranks[-1] == 2, "the autoscaler sees that more nodes would help"


def test_where_it_is_ready_on_all_nodes_and_gated_no_node_is_named() -> None:
    """A name costs every task time, and a node that joins meanwhile makes it wait."""
    told = environment("n1", "n2", is_gated=True)
    assert options(told, {"num_cpus": 2}, variant_id="v") == {
        "num_cpus": 2,
        "runtime_env": told["runtime_env"],
    }
    (first, *_) = selectors(options(told, {}, variant_id="v", nodes=["n2"]))
    assert first == {NODE_ID: "in(n2)"}


@given(environments(), harmless)
def test_every_way_asks_for_what_the_variant_and_the_caller_ask_for(
    told: Any, theirs: dict[str, Any]
) -> None:
    try:
        found = options(told, theirs, variant_id="v")
    except NoEligibleNode:
        return
    asked = asked_of(told, theirs)
    ways = [{k: v for k, v in way.items() if k != NODE_ID} for way in selectors(found)]
    assert len(ways) % len(asked) == 0
    assert ways == asked * (len(ways) // len(asked))


@given(environments(is_gated=False), st.data())
def test_no_ready_node_is_left_out_without_need_and_none_is_named_twice(
    told: Any, data: st.DataObject
) -> None:
    ready = told["ready_nodes"]
    assume(ready)
    told["ready_nodes"] = data.draw(st.permutations(ready + ready[:3]))
    (selector,) = selectors(options(told, {}, variant_id="v"))
    assert len(reachable(selector, told)) == min(len(ready), MAX_NAMED_NODES)


def test_an_error_without_a_node_says_what_kind_of_node_is_missing() -> None:
    told = environment(label_selector={"zone": "b"})
    with pytest.raises(NoEligibleNode, match="'v'") as caught:
        options(told, {}, variant_id="v")
    assert "zone=b" in caught.value.detail


# -- one dict for one environment


@given(environments(), harmless, st.data())
def test_equal_inputs_in_any_order_give_one_and_the_same_dict(
    told: Any, theirs: dict[str, Any], data: st.DataObject
) -> None:
    """Down to the order of its keys: Ray hashes the text, and each text has workers of its own."""
    shuffled = {
        name: data.draw(st.permutations(value)) if isinstance(value, list) else value
        for name, value in told.items()
    }
    try:
        text = json.dumps(options(told, theirs, variant_id="v"))
    except NoEligibleNode:
        return
    assert json.dumps(options(shuffled, theirs, variant_id="v")) == text
    other = json.loads(json.dumps(options(told, theirs, variant_id="w")))
    assert other["runtime_env"] == json.loads(text)["runtime_env"]


@given(spec_variables, st.data())
def test_the_order_of_variables_changes_no_environment(
    env_vars: dict[str, str], data: st.DataObject
) -> None:
    items = data.draw(st.permutations(list(env_vars.items())))
    assert json.dumps(runtime_env(VENV, env_vars)) == json.dumps(runtime_env(VENV, dict(items)))


@given(spec_variables)
def test_an_environment_is_its_interpreter_and_first_on_the_path(env_vars: dict[str, str]) -> None:
    plain = {
        "py_executable": f"{VENV}/bin/python",
        "env_vars": {**env_vars, "VIRTUAL_ENV": VENV, "PATH": f"{VENV}/bin:${{PATH}}"},
    }
    assert runtime_env(VENV, env_vars) == plain
    assert runtime_env(VENV, env_vars, GATE) == {**plain, "ray_envs": GATE}


# -- what the caller gives


@given(environments(), harmless)
def test_what_the_caller_gives_is_kept_the_environment_wins_and_no_input_is_changed(
    told: Any, theirs: dict[str, Any]
) -> None:
    before = copy.deepcopy((told, theirs))
    try:
        found = options(told, theirs, variant_id="v")
    except NoEligibleNode:
        return
    merged = ("runtime_env", "label_selector", "fallback_strategy")
    kept = {k: v for k, v in theirs.items() if k not in merged}
    if told["num_gpus"] is not None:
        kept = {"num_gpus": told["num_gpus"], **kept}
    assert {k: v for k, v in found.items() if k not in merged} == kept
    given_env = theirs.get("runtime_env") or {}
    ours = told["runtime_env"]
    assert found["runtime_env"] == {
        **given_env,
        **ours,
        "env_vars": {**given_env.get("env_vars", {}), **ours["env_vars"]},
    }
    found["runtime_env"]["env_vars"]["NEW"] = "x"
    for selector in selectors(found):
        selector["new"] = "x"
    assert (told, theirs) == before, "the inputs were changed, or shared with the result"


@pytest.mark.parametrize(
    "field", ["py_executable", "pip", "uv", "conda", "container", "image_uri", "ray_envs"]
)
def test_another_environment_beside_the_variant_is_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidInput, match=field) as caught:
        options(environment("n"), {"runtime_env": {field: "x"}}, variant_id="v")
    assert (caught.value.variant_id, bool(caught.value.hint)) == ("v", True)


def in_fallback(selector: dict[str, str]) -> dict[str, Any]:
    return {"fallback_strategy": [{"label_selector": {}}, {"label_selector": selector}]}


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("placed", [lambda each: {"label_selector": each}, in_fallback])
def test_nodes_and_labels_that_contradict_the_variant_are_refused_naming_both(
    placed: Any, is_gated: bool
) -> None:
    told = environment("n", is_gated=is_gated, label_selector={"zone": "!b"})
    with pytest.raises(InvalidInput, match=NODE_ID):
        options(told, placed({NODE_ID: "in(x)"}), variant_id="v")
    with pytest.raises(InvalidInput, match=r"'zone'.*'a'.*'v'.*'!b'") as caught:
        options(told, placed({"zone": "a"}), variant_id="v")
    assert caught.value.hint
    for selector in selectors(options(told, placed({"zone": "!b"}), variant_id="v")):
        assert selector["zone"] == "!b"


@pytest.mark.parametrize("choice", [{}, {"resources": {}}, {"label_selector": {}, "x": 1}])
def test_a_fallback_that_ray_would_refuse_is_refused_here(choice: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="fallback_strategy"):
        options(environment("n"), {"fallback_strategy": [choice]}, variant_id="v")


@pytest.mark.parametrize("name", ["PATH", "VIRTUAL_ENV", "OMP_NUM_THREADS"])
def test_a_variable_that_the_variant_sets_is_not_overruled_without_a_word(name: str) -> None:
    told = environment("n", env_vars={"OMP_NUM_THREADS": "1"})
    given_options = {"runtime_env": {"env_vars": {name: "of the caller"}}}
    with pytest.raises(InvalidInput, match=name):
        options(told, given_options, variant_id="v")


def test_a_variable_that_the_caller_sets_to_the_same_is_no_conflict() -> None:
    told = environment("n", env_vars={"OMP_NUM_THREADS": "1"})
    given_options = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    assert options(told, given_options, variant_id="v")["runtime_env"] == told["runtime_env"]


@pytest.mark.parametrize("empty", [{"runtime_env": {"env_vars": None}}, {"runtime_env": None}])
def test_nothing_given_as_none_is_nothing(empty: dict[str, Any]) -> None:
    told = environment("n")
    assert options(told, empty, variant_id="v") == options(told, {}, variant_id="v")
