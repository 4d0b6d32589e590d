"""Which nodes may run a variant, as Ray options. Pure: neighbours gather, this decides.

Ray waits for ever for a worker whose interpreter does not exist, without an error. So an option
never leaves here without naming the nodes where the environment is ready now.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

from ray_envs.errors import InvalidInput, NoEligibleNode
from ray_envs.models import RESERVED_VARIABLES

#: More names in a selector cost every task milliseconds (1,000 of them 12 ms, 32 of them 0.6).
MAX_NAMED_NODES = 32

_NODE_ID_LABEL = "ray.io/node-id"

#: What describes the environment and therefore cannot come from the caller as well.
_OURS = ("py_executable", "pip", "uv", "conda", "container", "image_uri")


def runtime_env(venv_path: str, env_vars: Mapping[str, str]) -> dict[str, Any]:
    """The one canonical dict of an environment: any difference would cost a worker of its own.

    `PATH` is expanded by Ray on the node where the worker starts.
    """
    return {
        "py_executable": f"{venv_path}/bin/python",
        "env_vars": {
            **dict(sorted(env_vars.items())),
            "VIRTUAL_ENV": venv_path,
            "PATH": f"{venv_path}/bin:${{PATH}}",
        },
    }


def options(
    environment: Mapping[str, Any],
    ready_nodes: Iterable[str],
    given: Mapping[str, Any],
    *,
    variant_id: str,
) -> dict[str, Any]:
    """The full `.options()` dict: the environment, its nodes, and what the caller gave.

    Args:
        environment: what `runtime_env` returned.
        ready_nodes: ids of the nodes where the environment is ready now.
        given: the caller's own options; its `runtime_env` and `label_selector` are merged.
        variant_id: for the message of an error.

    Raises:
        NoEligibleNode: no node is ready.
        InvalidInput: the caller's options contradict the environment or its placement.
    """
    nodes = sorted(set(ready_nodes))
    if len(nodes) > MAX_NAMED_NODES:  # others for each variant, the same ones each time
        nodes = sorted(random.Random(variant_id).sample(nodes, MAX_NAMED_NODES))  # noqa: S311
    if not nodes:
        raise NoEligibleNode(
            f"no live node has the environment of {variant_id!r} ready",
            variant_id=variant_id,
            hint="call prepare() first, or see `ray-envs status`",
        )
    theirs = dict(given.get("runtime_env") or {})
    for name in _OURS:
        if name in theirs:
            raise InvalidInput(
                f"runtime_env[{name!r}] is what the variant {variant_id!r} decides",
                hint="leave it out, or put the packages into the variant",
                variant_id=variant_id,
            )
    if "fallback_strategy" in given:
        raise InvalidInput(
            "fallback_strategy would lead around the nodes where the environment is ready",
            hint="leave it out",
            variant_id=variant_id,
        )
    given_vars = dict(theirs.pop("env_vars", None) or {})
    decided = environment["env_vars"]
    for name, value in given_vars.items():
        if name in RESERVED_VARIABLES or decided.get(name, value) != value:
            raise InvalidInput(
                f"runtime_env['env_vars'][{name!r}] is what the variant {variant_id!r} decides",
                hint="leave it out, or change the variant's env_vars",
                variant_id=variant_id,
            )
    env_vars = {**given_vars, **decided}
    selector = dict(given.get("label_selector") or {})
    if _NODE_ID_LABEL in selector:
        raise InvalidInput(
            f"label_selector[{_NODE_ID_LABEL!r}] is how ray_envs names the ready nodes",
            hint="give it to prepare(nodes=…) or use another label",
            variant_id=variant_id,
        )
    selector[_NODE_ID_LABEL] = f"in({','.join(nodes)})"
    return {
        **given,
        "runtime_env": {**theirs, **environment, "env_vars": env_vars},
        "label_selector": selector,
    }
