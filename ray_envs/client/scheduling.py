"""Which item of a batch starts next, and which nodes have the resources for it.

Only `node_totals` asks Ray. The rest computes an answer from its arguments.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from ray_envs.batch_models import RunDefaults
from ray_envs.client.items import Item
from ray_envs.errors import EnvironmentNotReady, NoEligibleNode

#: Up to so many items of an environment wait for its running worker, and for at most this time,
#: before a second worker starts. Guesses: a worker takes one to three seconds to start and import.
_FEW = 4
_GRACE_S = 5.0

#: By id of a live node: its total resources, used and free.
Totals = Mapping[str, Mapping[str, float]]


def next_item(
    firsts: Iterable[Item],
    left: Mapping[str, int],
    running: Collection[Item],
    warm: list[str],
    totals: Totals,
) -> Item | None:
    """Return the item to start now, or None if the cluster has no room for another one.

    Ray gives the place of an idle worker to another environment after half a second, and soon ends
    that worker. If all items were started at once, workers of the same environment would start
    again and again. So only as many items start as can run now, and first those whose environment
    has just become free: `warm` has their keys, and the key of the returned item is removed.

    Args:
        firsts: the first waiting item of each variant.
        left: how many items wait for each environment, by its key.
        running: the item of each lane that runs, or waits for its worker.
        warm: see above.
        totals: the resources of the live nodes.
    """
    by_key: dict[str, Item] = {}
    for item in sorted(firsts, key=lambda each: each.number):
        by_key.setdefault(item.key, item)
    busy = [item.key for item in running]
    order = [key for key in warm if key in by_key]
    order += [
        key
        for key in sorted(by_key, key=busy.count)  # stable: in the order of the batch
        if _is_worth_a_worker(key, left.get(key, 0), running)
    ]
    if not order:
        return None
    item = by_key[order[0]]
    # If no node could ever run the item, `Dispatcher.launch` raises the error.
    is_possible = any(_can_run(node, item.limits) for node in totals.values())
    if running and is_possible and not _has_room(item, running, totals):
        return None
    if order[0] in warm:
        warm.remove(order[0])
    return item


def _is_worth_a_worker(key: str, left: int, running: Iterable[Item]) -> bool:
    """Whether to start another worker of an environment, with `left` items waiting for it.

    The running worker finishes a few short items sooner than a new one can start and import.
    """
    began = [item.launched_at for item in running if item.key == key]
    is_long = time.monotonic() - max(began, default=0.0) > _GRACE_S
    return not began or left > _FEW or is_long


def _has_room(item: Item, running: Collection[Item], totals: Totals) -> bool:
    """Whether the cluster has room for the item, and the nodes with its environment have, too."""
    ready = item.environment["ready_nodes"]
    alike = [other for other in running if other.key == item.key]
    nodes = [totals[node_id] for node_id in ready if node_id in totals]
    return _is_room(item, running, totals.values()) and _is_room(item, alike, nodes)


def slots(item: Item, totals: Totals) -> int:
    """Return how many items like this one the nodes can run at once, when idle; at least one."""
    wanted = {name: amount for name, amount in _wanted(item.limits).items() if amount}
    rooms = (
        min((int(node.get(name, 0) // amount) for name, amount in wanted.items()), default=1)
        for node in totals.values()
    )
    return max(1, sum(rooms))


def node_totals() -> dict[str, dict[str, float]]:
    """Return the total resources of each live node, by node id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _wanted(limits: RunDefaults) -> dict[str, float]:
    return {"CPU": limits.num_cpus, "GPU": limits.num_gpus, "memory": limits.memory or 0}


def _can_run(node: Mapping[str, float], limits: RunDefaults) -> bool:
    """Whether an idle node has the resources of an item."""
    return all(node.get(name, 0) >= amount for name, amount in _wanted(limits).items())


def _is_room(item: Item, others: Iterable[Item], nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether `nodes` have room for `item` besides `others`."""
    others, nodes = list(others), list(nodes)
    for name, wanted in _wanted(item.limits).items():
        used = sum(_wanted(other.limits)[name] for other in others)
        total = sum(node.get(name, 0) for node in nodes)
        if wanted and used + wanted > total:
            return False
    return True


def able_nodes(
    item: Item, ready: Sequence[str], preparing: Iterable[str], totals: Totals
) -> list[str]:
    """Return the ready nodes that can run the item when idle.

    Raises:
        EnvironmentNotReady: only nodes that are still being prepared can.
        NoEligibleNode: there are ready nodes, and none of them can.
    """
    possible = {name for name, node in totals.items() if _can_run(node, item.limits)}
    able = [node_id for node_id in ready if node_id in possible]
    if not able and not possible.isdisjoint(preparing):
        raise EnvironmentNotReady(
            f"the nodes that can run {item.variant_id!r} are still being prepared",
            variant_id=item.variant_id,
            hint="see `ray-envs explain`",
        )
    if ready and not able:
        wanted = _wanted(item.limits)
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        raise NoEligibleNode(
            f"no node with the environment of {item.variant_id!r} has {needs}",
            variant_id=item.variant_id,
            hint="ask for less, or add such a node to the cluster",
        )
    return able
