"""What the status of a variant means to a program: is it done, where is it ready, what failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray_envs.decisions.planning import may_pass
from ray_envs.errors import NoEligibleNode, NotFound, from_dict
from ray_envs.models import Phase, Status

#: A variant's status by its id, as `get_env_status` describes it.
Statuses = dict[str, dict[str, Any]]
OnStatus = Callable[[Statuses], None]

_BUSY = (Status.CREATING.value,)
#: The statuses of a variant that tasks can run in: during an update, the old generation is used.
RUNS = (Status.ACTIVE.value, Status.UPDATING.value)
#: How many nodes are listed one by one in an error.
_MAX_LINES = 12


def raise_status_error(variant_id: str, status: Mapping[str, Any]) -> None:
    """Raise what a status says went wrong, if anything did.

    Raises:
        NotFound: the variant is not defined.
        RayEnvsError: the error that its agent reported.
    """
    if status["status"] == Status.NOT_EXISTS.value:
        raise NotFound(
            f"no variant {variant_id!r} is defined",
            variant_id=variant_id,
            hint="`ray-envs list` shows the defined ones, create() makes one",
        )
    if status.get("error"):
        error = dict(status["error"])
        if lines := coverage(status):
            error["detail"] = "\n".join(filter(None, (lines, error.get("detail"))))
        raise from_dict(error).about(variant_id=variant_id)


def may_join(environment: Mapping[str, Any]) -> bool:
    """Whether only a node that is not there yet can run it, and would be made to prepare it."""
    error = environment.get("error") or {}
    return bool(environment["is_gated"]) and error.get("type") == NoEligibleNode.__name__


def is_done(status: Mapping[str, Any], *, everywhere: bool, patient: bool) -> bool:
    """Whether there is nothing more to wait for."""
    if not everywhere and ready_nodes(status) and status["status"] != Status.UPDATING.value:
        return True
    may_come = patient and any(
        node.get("error") and may_pass(node["error"]) for node in status.get("nodes", {}).values()
    )
    return status["status"] not in _BUSY and not may_come


def ready_nodes(status: Mapping[str, Any]) -> list[str]:
    nodes = status.get("nodes", {})
    return [node_id for node_id, state in nodes.items() if state["phase"] == Phase.READY.value]


def coverage(status: Mapping[str, Any]) -> str:
    """On which nodes a variant is ready and on which not, in words; nothing of a single node."""
    nodes = status.get("nodes", {})
    ready = ready_nodes(status)
    if len(nodes) < 2:
        return ""
    lines = [f"ready on {len(ready)} of {len(nodes)} nodes"]
    for node_id, state in nodes.items():
        if node_id not in ready:
            error = state.get("error") or {}
            why = error.get("message") or state.get("progress") or state.get("because") or ""
            where = state.get("address") or node_id[:12]
            lines.append(f"  {where}: {state['phase']}" + (f": {why}" if why else ""))
    return "\n".join(lines[:_MAX_LINES])
