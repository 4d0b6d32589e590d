"""Which item of a batch starts next, and which nodes have the resources for it.

Only `node_totals` asks Ray. The rest computes an answer from its arguments.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from ray_envs.client.items import Item
from ray_envs.errors import EnvironmentNotReady, NoEligibleNode
from ray_envs.models import RunDefaults

#: Up to so many items of an environment wait for its running worker, and for at most this time,
#: before a second worker starts. Guesses: a worker takes one to three seconds to start and import.
_FEW = 4
_GRACE_S = 5.0

_RESOURCES = ("CPU", "GPU", "memory")

#: By id of a live node: its total resources, used and free.
Totals = Mapping[str, Mapping[str, float]]


def next_item(
    waiting: Collection[Item], running: Collection[Item], warm: list[str], totals: Totals
) -> Item | None:
    """Return the item to start now, or None if the cluster has no room for another one.

    Ray gives the place of an idle worker to another environment after half a second, and soon ends
    that worker. If all items were started at once, workers of the same environment would start
    again and again. So only as many items start as can run now, and first those whose environment
    has just become free.

    Args:
        waiting: the items that may start, in the order of the batch.
        running: the items that have started.
        warm: keys of environments with a worker that has just become free; the key of the returned
            item is removed.
        totals: the resources of the live nodes.
    """
    by_key: dict[str, Item] = {}
    for item in waiting:
        by_key.setdefault(item.environment["key"], item)
    busy = [item.environment["key"] for item in running]
    left = Counter(item.environment["key"] for item in waiting)
    order = [key for key in warm if key in by_key]
    order += [
        key
        for key in sorted(by_key, key=busy.count)  # stable: in the order of the batch
        if _is_worth_a_worker(key, left[key], running)
    ]
    if not order:
        return None
    item = by_key[order[0]]
    if running and _is_able(item, totals) and not _has_room(item, running, totals):
        return None
    if order[0] in warm:
        warm.remove(order[0])
    return item


def _is_worth_a_worker(key: str, left: int, running: Iterable[Item]) -> bool:
    """Whether to start another worker of an environment, with `left` items waiting for it.

    The running worker finishes a few short items sooner than a new one can start and import.
    """
    began = [item.launched_at for item in running if item.environment["key"] == key]
    is_long = time.monotonic() - max(began, default=0.0) > _GRACE_S
    return not began or left > _FEW or is_long


def _is_able(item: Item, totals: Totals) -> bool:
    """Whether any node could run the item; if none could, `Dispatcher.launch` raises the error."""
    wanted = wanted_resources(item.limits)
    return any(_has_all(node, wanted) for node in totals.values())


def _has_room(item: Item, running: Collection[Item], totals: Totals) -> bool:
    """Whether the cluster has room for the item, and the nodes with its environment have, too."""
    key, ready = item.environment["key"], item.environment["ready_nodes"]
    alike = [other for other in running if other.environment["key"] == key]
    nodes = [totals[node_id] for node_id in ready if node_id in totals]
    return _is_room(item, running, totals.values()) and _is_room(item, alike, nodes)


def node_totals() -> dict[str, dict[str, float]]:
    """Return the total resources of each live node, by node id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def wanted_resources(limits: RunDefaults) -> dict[str, float]:
    return {"CPU": limits.num_cpus, "GPU": limits.num_gpus, "memory": limits.memory or 0}


def _has_all(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _is_room(item: Item, others: Iterable[Item], nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether `nodes` have room for `item` besides `others`."""
    others, nodes = list(others), list(nodes)
    for name in _RESOURCES:
        wanted = wanted_resources(item.limits)[name]
        used = sum(wanted_resources(other.limits)[name] for other in others)
        total = sum(node.get(name, 0) for node in nodes)
        if wanted and used + wanted > total:
            return False
    return True


def able_nodes(
    ready: Sequence[str],
    preparing: Sequence[str],
    totals: Mapping[str, Mapping[str, float]],
    wanted: Mapping[str, float],
    variant_id: str,
) -> list[str]:
    """Return the ready nodes that have the wanted resources when idle.

    Raises:
        EnvironmentNotReady: only nodes that are still being prepared have them.
        NoEligibleNode: there are ready nodes, and none has them.
    """

    def able_of(node_ids: Sequence[str]) -> list[str]:
        return [n for n in node_ids if n in totals and _has_all(totals[n], wanted)]

    able = able_of(ready)
    if not able and able_of(preparing):
        raise EnvironmentNotReady(
            f"the nodes that can run {variant_id!r} are still being prepared",
            variant_id=variant_id,
            hint="see `ray-envs explain`",
        )
    if ready and not able:
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        raise NoEligibleNode(
            f"no node with the environment of {variant_id!r} has {needs}",
            variant_id=variant_id,
            hint="ask for less, or add such a node to the cluster",
        )
    return able
