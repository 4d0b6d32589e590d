"""What to build, given what is wanted and what is there. Pure: a snapshot in, actions out.

Level-triggered: the planner keeps nothing between two calls, so any snapshot is a legal input and
the state after a restart is planned like any other. `manager` gathers the snapshot and acts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ray_envs.models import NodeEnvState, Phase, Status


@dataclass(frozen=True, slots=True)
class Wish:
    """An environment that some variant wants.

    `attempt` rises whenever somebody asks again: a failure is tried once per attempt, not for ever.
    """

    key: str
    attempt: int
    variants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeView:
    """One live node as its agent last described it."""

    node_id: str
    #: Environments of this node's platform may be built here; others may not.
    platform: str
    states: Mapping[str, NodeEnvState] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Build:
    """Tell the agent of `node_id` to make `key` ready; `because` is for people."""

    node_id: str
    key: str
    attempt: int
    because: str


def plan(
    wishes: Iterable[Wish], nodes: Iterable[NodeView], platforms: Mapping[str, str]
) -> list[Build]:
    """The builds to start now, so that every wish becomes true on every node that fits it.

    Args:
        wishes: what is wanted.
        nodes: the live nodes.
        platforms: the platform of each wanted key.
    """
    actions = []
    wanted = sorted(wishes, key=lambda wish: wish.key)
    for node in sorted(nodes, key=lambda node: node.node_id):
        for wish in wanted:
            if platforms.get(wish.key) != node.platform:
                continue
            because = _why_build(wish, node.states.get(wish.key))
            if because:
                actions.append(Build(node.node_id, wish.key, wish.attempt, because))
    return actions


def _why_build(wish: Wish, state: NodeEnvState | None) -> str:
    """Why a node must build the wish now, or an empty string where it must not."""
    names = ", ".join(wish.variants[:3]) + (", …" if len(wish.variants) > 3 else "")
    if state is None:
        return f"wanted by {names} and not there"
    if is_to_try_again(state, wish.attempt):
        return f"wanted again by {names} after a failure"
    return ""


def is_to_try_again(state: NodeEnvState, attempt: int) -> bool:
    """Whether a failure is older than the last request for the environment."""
    return state.phase is Phase.FAILED and state.attempt < attempt


def status_of(
    key: str, node_ids: Iterable[str], states: Mapping[str, Mapping[str, NodeEnvState]]
) -> Status:
    """What a variant with this key is, over all nodes that shall have it.

    ACTIVE only where every one of them is ready; ERROR where none can become ready any more
    or some failed; CREATING otherwise.

    Args:
        key: the environment's key.
        node_ids: the nodes that shall have it.
        states: by node, then by key.
    """
    phases = []
    for node_id in node_ids:
        state = states.get(node_id, {}).get(key)
        phases.append(state.phase if state else Phase.WAITING)
    if phases and all(phase is Phase.READY for phase in phases):
        return Status.ACTIVE
    if any(not phase.is_final for phase in phases) or not phases:
        return Status.CREATING
    return Status.ERROR
