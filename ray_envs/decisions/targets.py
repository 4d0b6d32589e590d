"""Decides which nodes shall have an environment.

`planning` decides what these nodes have to build, `placement` how a task gets to them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ray_envs.models import NodeEnvState, Phase
from ray_envs.specs import Definition

#: The progress of a node with an environment, the preferred ones first. Failed nodes come last, so
#: that others replace them.
_READY, _BUILDING, _UNTOUCHED, _HEAD, _FAILED = range(5)
#: When so many nodes have failed, they are not replaced: the build probably fails on all nodes.
_MAX_REPLACED = 3


@dataclass(frozen=True, slots=True)
class Need:
    """The requirements of a variant for the nodes that shall have its environment."""

    #: Pairs of a label and its wanted value, sorted.
    labels: tuple[tuple[str, str], ...] = ()
    num_gpus: float = 0
    #: How many of the fitting nodes; None means all.
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
    """A live node, as its agent described it last."""

    node_id: str
    #: Its platform, Python and Ray; an environment must be for the same ones.
    site: str
    is_head: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    num_gpus: float = 0
    #: The keys that are ready here.
    ready: frozenset[str] = frozenset()
    #: The states of other keys.
    others: Mapping[str, NodeEnvState] = field(default_factory=dict)
    #: Keys that workers wait for here, each with its attempt.
    asked: Mapping[str, int] = field(default_factory=dict)
    #: Keys that failed here so long ago that they are tried again.
    due: frozenset[str] = frozenset()


def fits(need: Need, labels: Mapping[str, str], num_gpus: float) -> bool:
    """Whether a node meets the requirements of a variant, apart from `site` and `count`."""
    return num_gpus >= need.num_gpus and all(
        _matches(wanted, labels.get(name)) for name, wanted in need.labels
    )


def _matches(wanted: str, value: str | None) -> bool:
    """Whether the value of a label matches Ray's selector; None stands for a missing label."""
    is_wanted = not wanted.startswith("!")
    wanted = wanted.removeprefix("!")
    values = {wanted}
    if wanted.startswith("in(") and wanted.endswith(")"):
        values = {part.strip() for part in wanted[3:-1].split(",")}
    return (value in values) is is_wanted


def chosen(need: Need, key: str, fitting: Iterable[NodeView]) -> list[NodeView]:
    """Return those of the fitting nodes that shall have `key`: the same ones while they live.

    If not all are wanted, nodes that have it come first, then those that build it, and those that
    failed come last. Among equals the key decides, so that different keys use different nodes.
    """
    nodes = list(fitting)
    if need.count is None:
        return nodes
    ready = [node for node in nodes if key in node.ready]
    if len(ready) >= need.count:
        nodes = ready
    progress = {node.node_id: _progress(node, key) for node in nodes}
    fails_everywhere = list(progress.values()).count(_FAILED) >= _MAX_REPLACED

    def rank(node: NodeView) -> tuple[int, int, str]:
        rank = progress[node.node_id]
        is_kept = fails_everywhere and rank == _FAILED
        return (_BUILDING if is_kept else rank, spread(node.node_id, key), node.node_id)

    return sorted(nodes, key=rank)[: need.count]


def _progress(node: NodeView, key: str) -> int:
    if key in node.ready:
        return _READY
    state = node.others.get(key)
    if state is not None and state.phase is Phase.FAILED:
        return _FAILED
    if node.is_head:  # it may build it only for others
        return _HEAD
    return _UNTOUCHED if state is None else _BUILDING


def spread(node_id: str, key: str) -> int:
    """Return a sort number: it orders nodes differently for each key, but always the same way."""
    return zlib.crc32(f"{node_id}/{key}".encode())
