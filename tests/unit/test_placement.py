"""Placement: never an option without nodes, never two dicts for one environment."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.errors import InvalidInput, NoEligibleNode
from ray_envs.placement import MAX_NAMED_NODES, options, runtime_env

NODE_ID = "ray.io/node-id"
VENV = "/root/store/key/.venv"

variables = st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,8}", fullmatch=True), st.text())
spec_variables = variables.map(
    lambda found: {k: v for k, v in found.items() if k not in ("PATH", "VIRTUAL_ENV")}
)
node_ids = st.lists(st.from_regex(r"[0-9a-f]{8}", fullmatch=True), max_size=100)
some_nodes = st.lists(st.from_regex(r"[0-9a-f]{8}", fullmatch=True), min_size=1, max_size=100)

#: What a caller may give besides: none of it says where or in what the task runs.
harmless = st.fixed_dictionaries(
    {},
    optional={
        "num_cpus": st.integers(0, 8),
        "memory": st.integers(0, 2**30),
        "resources": st.dictionaries(st.sampled_from(["disk", "net"]), st.integers(1, 4)),
        "max_retries": st.integers(0, 3),
        "label_selector": st.none()
        | st.dictionaries(st.sampled_from(["market-type", "zone"]), st.text("abc", min_size=1)),
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


def named(found: dict[str, Any]) -> list[str]:
    match = re.fullmatch(r"in\(([^()]+)\)", found["label_selector"][NODE_ID])
    assert match is not None
    return match[1].split(",")


@given(spec_variables, node_ids, harmless)
def test_an_option_names_ready_nodes_and_at_most_as_many_as_are_cheap(
    env_vars: dict[str, str], ready: list[str], theirs: dict[str, Any]
) -> None:
    environment = runtime_env(VENV, env_vars)
    if not ready:
        with pytest.raises(NoEligibleNode) as caught:
            options(environment, ready, theirs, variant_id="v")
        assert (caught.value.variant_id, caught.value.retryable) == ("v", True)
        assert caught.value.hint
        return
    nodes = named(options(environment, ready, theirs, variant_id="v"))
    assert set(nodes) <= set(ready)
    assert 1 <= len(nodes) <= MAX_NAMED_NODES


@given(st.sets(st.from_regex(r"[0-9a-f]{8}", fullmatch=True), min_size=1, max_size=100))
def test_no_ready_node_is_left_out_without_need(ready: set[str]) -> None:
    found = named(options(runtime_env(VENV, {}), ready, {}, variant_id="v"))
    assert len(set(found)) == len(found) == min(len(ready), MAX_NAMED_NODES)


@given(st.from_regex(r"[0-9a-f]{8}", fullmatch=True), st.integers(1, 80))
def test_a_node_that_is_told_twice_takes_no_place_from_another(node: str, times: int) -> None:
    others = [f"z{number}" for number in range(5)]
    found = named(options(runtime_env(VENV, {}), [node] * times + others, {}, variant_id="v"))
    assert sorted(found) == sorted([node, *others])


@given(spec_variables, st.data())
def test_equal_inputs_in_any_order_give_one_and_the_same_dict(
    env_vars: dict[str, str], data: st.DataObject
) -> None:
    """Down to the order of its keys: Ray hashes the text, and each text has workers of its own."""
    items = data.draw(st.permutations(list(env_vars.items())))
    first, second = runtime_env(VENV, env_vars), runtime_env(VENV, dict(items))
    assert json.dumps(first) == json.dumps(second)
    ready = data.draw(some_nodes)
    shuffled = data.draw(st.permutations(ready))
    texts = {
        json.dumps(options(environment, nodes, {}, variant_id=name))
        for environment in (first, second)
        for nodes in (ready, shuffled)
        for name in ("v", "w")
    }
    assert len(texts) == 1


@given(spec_variables)
def test_an_environment_is_its_interpreter_and_first_on_the_path(env_vars: dict[str, str]) -> None:
    environment = runtime_env(VENV, env_vars)
    assert environment == {
        "py_executable": f"{VENV}/bin/python",
        "env_vars": {**env_vars, "VIRTUAL_ENV": VENV, "PATH": f"{VENV}/bin:${{PATH}}"},
    }


@given(spec_variables, some_nodes, harmless)
def test_what_the_caller_gives_is_kept_and_the_environment_wins(
    env_vars: dict[str, str], ready: list[str], theirs: dict[str, Any]
) -> None:
    environment = runtime_env(VENV, env_vars)
    before = copy.deepcopy((environment, theirs))
    found = options(environment, ready, theirs, variant_id="v")
    assert (environment, theirs) == before, "the inputs were changed"
    given_env = theirs.get("runtime_env") or {}
    kept = {k: v for k, v in theirs.items() if k not in ("runtime_env", "label_selector")}
    assert {k: found[k] for k in kept} == kept
    assert found["runtime_env"] == {
        **given_env,
        **environment,
        "env_vars": {**given_env.get("env_vars", {}), **environment["env_vars"]},
    }
    selector = {k: v for k, v in found["label_selector"].items() if k != NODE_ID}
    assert selector == (theirs.get("label_selector") or {})


@given(spec_variables, some_nodes, harmless)
def test_a_result_is_nobody_elses_to_change(
    env_vars: dict[str, str], ready: list[str], theirs: dict[str, Any]
) -> None:
    environment = runtime_env(VENV, env_vars)
    before = copy.deepcopy((environment, theirs))
    found = options(environment, ready, theirs, variant_id="v")
    found["runtime_env"]["env_vars"]["NEW"] = "x"
    found["label_selector"]["new"] = "x"
    assert (environment, theirs) == before


@pytest.mark.parametrize("field", ["py_executable", "pip", "uv", "conda", "container", "image_uri"])
def test_another_environment_beside_the_variant_is_refused_by_name(field: str) -> None:
    given_options = {"runtime_env": {field: "x"}}
    with pytest.raises(InvalidInput, match=field) as caught:
        options(runtime_env(VENV, {}), ["n"], given_options, variant_id="v")
    assert (caught.value.variant_id, bool(caught.value.hint)) == ("v", True)


def test_nodes_that_the_caller_names_are_refused() -> None:
    given_options = {"label_selector": {NODE_ID: "in(x)"}}
    with pytest.raises(InvalidInput, match=NODE_ID):
        options(runtime_env(VENV, {}), ["n"], given_options, variant_id="v")


def test_a_way_around_the_ready_nodes_is_refused() -> None:
    """Ray 2.60 takes a fallback where the ready nodes are busy or gone (measured)."""
    way_out = {"fallback_strategy": [{"label_selector": {"zone": "b"}}]}
    with pytest.raises(InvalidInput, match="fallback_strategy"):
        options(runtime_env(VENV, {}), ["n"], way_out, variant_id="v")


@pytest.mark.parametrize("name", ["PATH", "VIRTUAL_ENV", "OMP_NUM_THREADS"])
def test_a_variable_that_the_variant_sets_is_not_overruled_without_a_word(name: str) -> None:
    environment = runtime_env(VENV, {"OMP_NUM_THREADS": "1"})
    given_options = {"runtime_env": {"env_vars": {name: "of the caller"}}}
    with pytest.raises(InvalidInput, match=name):
        options(environment, ["n"], given_options, variant_id="v")


def test_a_variable_that_the_caller_sets_to_the_same_is_no_conflict() -> None:
    environment = runtime_env(VENV, {"OMP_NUM_THREADS": "1"})
    given_options = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    found = options(environment, ["n"], given_options, variant_id="v")
    assert found["runtime_env"] == environment


@pytest.mark.parametrize("empty", [{"runtime_env": {"env_vars": None}}, {"runtime_env": None}])
def test_nothing_given_as_none_is_nothing(empty: dict[str, Any]) -> None:
    environment = runtime_env(VENV, {})
    assert options(environment, ["n"], empty, variant_id="v")["runtime_env"] == environment
