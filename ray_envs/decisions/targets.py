"""On which nodes an environment shall be. Pure: what nodes are and what variants ask, in; ids, out.

`planning` says what these nodes have to do, `placement` how a task is led to them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ray_envs.models import Definition, NodeEnvState, Phase

#: How far a node is, in the order of choice: those that failed give their places to others.
_READY, _AT_IT, _UNTOUCHED, _HEAD, _FAILED = range(5)
#: How many that failed are replaced: what fails everywhere is not tried on all nodes in turn.
_MAX_REPLACED = 3


@dataclass(frozen=True, slots=True)
class Need:
    """What a variant asks of the nodes that shall have its environment."""

    #: Label and what it must be, sorted.
    labels: tuple[tuple[str, str], ...] = ()
    num_gpus: float = 0
    #: On how many of those that fit; None for all.
    count: int | None = None

    @classmethod
    def of(cls, definition: Definition) -> Need:
        return cls(
            labels=tuple(sorted(definition.label_selector.items())),
            num_gpus=definition.num_gpus or 0,
            count=None if definition.nodes == "all" else definition.nodes,
        )

    def __str__(self) -> str:
        words = [f"{name}={wanted}" for name, wanted in self.labels]
        if self.num_gpus:
            words.append(f"{self.num_gpus:g} GPUs")
        return ", ".join(words) or "no particular node"


@dataclass(frozen=True, slots=True)
class NodeView:
    """One live node as its agent last described it."""

    node_id: str
    #: What an environment must match to be built here: platform, Python and Ray.
    site: str
    is_head: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    num_gpus: float = 0
    #: The keys that are ready here.
    ready: frozenset[str] = frozenset()
    #: What it says of other keys.
    others: Mapping[str, NodeEnvState] = field(default_factory=dict)
    #: Keys that workers wait for here, with the attempt that they belong to.
    asked: Mapping[str, int] = field(default_factory=dict)
    #: Keys that failed, long enough ago to be tried once more.
    due: frozenset[str] = frozenset()


def fits(need: Need, labels: Mapping[str, str], num_gpus: float) -> bool:
    """Whether a node is what a variant asks for."""
    return num_gpus >= need.num_gpus and all(
        _matches(wanted, labels.get(name)) for name, wanted in need.labels
    )


def _matches(wanted: str, value: str | None) -> bool:
    """Whether a label is as Ray's selector wants it; one that is not there is nothing."""
    is_wanted = not wanted.startswith("!")
    wanted = wanted.removeprefix("!")
    values = {wanted}
    if wanted.startswith("in(") and wanted.endswith(")"):
        values = {part.strip() for part in wanted[3:-1].split(",")}
    return (value in values) is is_wanted


def chosen(need: Need, key: str, fitting: Iterable[NodeView]) -> list[NodeView]:
    """The nodes that shall have `key`, of those that fit; the same ones as long as they live.

    Where not all are asked for, those that have it come first, then those that are at it, and
    those that failed last; which of equals is decided by the key, so that keys spread.
    """
    nodes = list(fitting)
    if need.count is None:
        return nodes
    ready = [node for node in nodes if key in node.ready]
    if len(ready) >= need.count:
        nodes = ready
    progress = {node.node_id: _progress(node, key) for node in nodes}
    is_vain = list(progress.values()).count(_FAILED) >= _MAX_REPLACED

    def rank(node: NodeView) -> tuple[int, int, str]:
        rank = progress[node.node_id]
        is_kept = is_vain and rank == _FAILED
        return (_AT_IT if is_kept else rank, spread(node.node_id, key), node.node_id)

    return sorted(nodes, key=rank)[: need.count]


def _progress(node: NodeView, key: str) -> int:
    if key in node.ready:
        return _READY
    state = node.others.get(key)
    if state is not None and state.phase is Phase.FAILED:
        return _FAILED
    if node.is_head:  # it may be at it for others only
        return _HEAD
    return _UNTOUCHED if state is None else _AT_IT


def spread(node_id: str, key: str) -> int:
    """A number by which nodes are in another order for each key, and always in the same one."""
    return zlib.crc32(f"{node_id}/{key}".encode())
