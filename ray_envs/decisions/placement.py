"""Makes the Ray options of a task: its runtime_env, and the nodes that may run it.

Ray waits for ever, without an error, for a worker whose interpreter does not exist. So the options
name only nodes where the environment is ready now. If every node has our plugin (`plugin`), which
makes such a worker wait or fail, ready nodes are only preferred.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from ray_envs.errors import InvalidInput, NoEligibleNode
from ray_envs.specs import NODE_ID_LABEL, RESERVED_VARIABLES

#: Each name in a selector costs every task time (measured: 1,000 names 12 ms, 32 names 0.6 ms).
MAX_NAMED_NODES = 32

#: The key of a runtime_env that our plugin reads.
GATE_FIELD = "ray_envs"

#: Fields of a runtime_env that the variant decides; the caller must not give them.
_OURS = ("py_executable", "pip", "uv", "conda", "container", "image_uri", GATE_FIELD)

#: The options of the caller that are merged with ours.
_MERGED = ("runtime_env", "label_selector", "fallback_strategy")

#: The placement of an environment that every node has.
EVERYWHERE: dict[str, Any] = {
    "is_gated": False,
    "preparing_nodes": [],
    "unfit_nodes": [],
    "other_nodes": [],
    "label_selector": {},
    "num_gpus": None,
    "may_spread": True,
}


def runtime_env(
    venv_path: str, env_vars: Mapping[str, str], gate: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the runtime_env of an environment.

    It is always the same dict, because Ray starts a worker of its own for any difference. Ray
    expands `PATH` on the node where the worker starts.

    Args:
        venv_path: the path of the environment, the same on every node.
        env_vars: the variables of the variant.
        gate: the argument of our plugin, if every node has it.
    """
    return {
        "py_executable": f"{venv_path}/bin/python",
        "env_vars": {
            **dict(sorted(env_vars.items())),
            "VIRTUAL_ENV": venv_path,
            "PATH": f"{venv_path}/bin:${{PATH}}",
        },
        **({GATE_FIELD: dict(gate)} if gate else {}),
    }


def options(
    environment: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    variant_id: str,
    nodes: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Return the full `.options()` dict: the environment, its nodes, and the caller's options.

    Args:
        environment: the answer of `EnvManager.get_environment`.
        given: the caller's own options. `runtime_env` is merged with the variant's; each selector
            in `label_selector` and `fallback_strategy` with the nodes of the environment.
        variant_id: for error messages.
        nodes: the ready nodes to use; by default all of them.

    Raises:
        NoEligibleNode: no node is ready, and the task may not wait for one.
        InvalidInput: the caller's options contradict the environment or its placement.
    """
    _check_strategy(environment, given.get("scheduling_strategy"), variant_id=variant_id)
    selectors = _placed(environment, given, variant_id=variant_id, nodes=nodes)
    rest = {name: value for name, value in given.items() if name not in _MERGED}
    if environment["num_gpus"] is not None:
        rest.setdefault("num_gpus", environment["num_gpus"])
    placed: dict[str, Any] = {"label_selector": selectors[0]} if selectors[0] else {}
    if len(selectors) > 1:
        placed["fallback_strategy"] = [{"label_selector": each} for each in selectors[1:]]
    return {
        **rest,
        "runtime_env": _merged_env(environment["runtime_env"], given, variant_id=variant_id),
        **placed,
    }


def _merged_env(
    decided: Mapping[str, Any], given: Mapping[str, Any], *, variant_id: str
) -> dict[str, Any]:
    """Return the environment's runtime_env, together with the caller's other fields."""
    theirs = dict(given.get("runtime_env") or {})
    for name in _OURS:
        if name in theirs:
            raise InvalidInput(
                f"runtime_env[{name!r}] is decided by the variant {variant_id!r}",
                hint="leave it out, or put the packages into the variant",
                variant_id=variant_id,
            )
    given_vars = dict(theirs.pop("env_vars", None) or {})
    variables = decided["env_vars"]
    for name, value in given_vars.items():
        if name in RESERVED_VARIABLES or variables.get(name, value) != value:
            raise InvalidInput(
                f"runtime_env['env_vars'][{name!r}] is decided by the variant {variant_id!r}",
                hint="leave it out, or change the variant's env_vars",
                variant_id=variant_id,
            )
    return {**theirs, **decided, "env_vars": {**given_vars, **variables}}


def _placed(
    environment: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    variant_id: str,
    nodes: Iterable[str] | None,
) -> list[dict[str, str]]:
    """Return the label selectors for Ray to try, in this order; an empty one means any node."""
    bases = _bases(environment, given, variant_id=variant_id)
    ready = sorted(set(environment["ready_nodes"] if nodes is None else nodes))
    preparing, unfit = environment["preparing_nodes"], sorted(set(environment["unfit_nodes"]))
    may_spread = environment["is_gated"] and environment["may_spread"]
    if may_spread and nodes is None and ready and not preparing and not unfit:
        return bases  # any node; the plugin makes tasks wait on nodes that join later
    found = [_select(base, "in", _few(ready, variant_id)) for base in bases if ready]
    if environment["is_gated"]:  # if the ready nodes are busy: nodes that prepare it
        found += [_select(base, "in", _few(preparing, variant_id)) for base in bases if preparing]
    if may_spread and len(unfit) <= MAX_NAMED_NODES:  # then any node that can have it
        found += [_select(base, "!in", unfit) for base in bases]
    if not found:
        wanted = ", ".join(f"{k}={v}" for k, v in environment["label_selector"].items())
        raise NoEligibleNode(
            f"no live node has the environment of {variant_id!r} ready",
            variant_id=variant_id,
            detail=f"it is only for nodes with {wanted}" if wanted else "",
            hint="call prepare() first, or see `ray-envs explain`",
        )
    return found


def _check_strategy(environment: Mapping[str, Any], strategy: Any, *, variant_id: str) -> None:
    """Refuse a strategy that pins the task to a node that is not ready.

    A caller's selector needs no check: it is combined with the ready nodes.
    """
    node_id = getattr(strategy, "node_id", None)
    if node_id is None or getattr(strategy, "soft", True):
        return
    allowed = {*environment["ready_nodes"]}
    if environment["is_gated"]:
        allowed |= {*environment["preparing_nodes"]}
    if node_id not in allowed:
        raise InvalidInput(
            f"node {node_id[:12]} does not have the environment of {variant_id!r} ready",
            hint="give soft=True, or name a node where `ray-envs explain` shows it ready",
            variant_id=variant_id,
        )


def _bases(
    environment: Mapping[str, Any], given: Mapping[str, Any], *, variant_id: str
) -> list[dict[str, str]]:
    """Return the caller's label selectors, each combined with the variant's."""
    fallbacks = given.get("fallback_strategy") or []
    for each in fallbacks:
        if set(each) != {"label_selector"}:
            raise InvalidInput(
                f"fallback_strategy has {', '.join(sorted(each)) or 'an empty choice'}",
                hint='Ray takes a list of {"label_selector": {…}} there',
                variant_id=variant_id,
            )
    theirs = [given.get("label_selector"), *(each["label_selector"] for each in fallbacks)]
    return [
        _both(environment["label_selector"], dict(selector or {}), variant_id=variant_id)
        for selector in theirs
    ]


def _both(ours: Mapping[str, str], theirs: Mapping[str, str], *, variant_id: str) -> dict[str, str]:
    """Return one selector with the labels of both.

    Raises `InvalidInput`: they want different values of one label, or the caller's names nodes.
    """
    if NODE_ID_LABEL in theirs:
        raise InvalidInput(
            f"label_selector[{NODE_ID_LABEL!r}] is used by ray_envs to name the ready nodes",
            hint="use another label: `ray start --labels` gives one to a node",
            variant_id=variant_id,
        )
    for name, wanted in ours.items():
        if theirs.get(name, wanted) != wanted:
            raise InvalidInput(
                f"label_selector[{name!r}] is {theirs[name]!r}, and the variant {variant_id!r} is "
                f"only for nodes with {wanted!r}",
                hint="leave it out, or change the variant's label_selector",
                variant_id=variant_id,
            )
    return {**theirs, **ours}


def _select(base: Mapping[str, str], word: str, nodes: Iterable[str]) -> dict[str, str]:
    """Return the selector `base`, limited to `nodes` (word "in") or to all others ("!in")."""
    names = ",".join(nodes)
    return {**base, **({NODE_ID_LABEL: f"{word}({names})"} if names else {})}


def _few(nodes: Iterable[str], variant_id: str) -> list[str]:
    """Return at most `MAX_NAMED_NODES`; a variant gets the same ones each time."""
    found = sorted(set(nodes))
    if len(found) > MAX_NAMED_NODES:
        found = sorted(random.Random(variant_id).sample(found, MAX_NAMED_NODES))  # noqa: S311
    return found
