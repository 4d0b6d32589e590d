"""Starts lanes of items as Ray tasks, watches them, and reports how each item ended.

Runs in the user's program. `item_queue` decides when an item starts and keeps the results. Here is
all that touches Ray's tasks: nodes, messages of a task, time-outs, lost workers and lost nodes.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray_envs.batch_models import ItemResult
from ray_envs.client import losses, scheduling
from ray_envs.client.cluster_watch import ClusterWatch
from ray_envs.client.environments import EnvironmentProvider
from ray_envs.client.items import Item, broken, check_key, not_run, result_of, unreadable, valued
from ray_envs.client.lanes import BUDGET_S, Lane, Paces
from ray_envs.client.node_table import NodeTable
from ray_envs.client.payload import Payload
from ray_envs.client.start_checks import StartChecks
from ray_envs.decisions import placement
from ray_envs.errors import EnvironmentNotReady, ManagerUnavailable, NotFound, RayEnvsError

#: How long one wait for results lasts. Time-outs, cancels and lost nodes are noticed after it.
_WAIT_S = 0.5
#: How often the list of live nodes is read again.
_WATCHDOG_S = 5.0
#: After so long without a worker, the environment of an item is checked again.
_LONG_S = 15.0
#: How long an answer about ready nodes is used: nodes join, die and lose their disks.
_FRESH_S = 5.0
#: When no node has an environment ready, the manager is asked again after this time.
_UNREADY_S = 1.0

#: A node was listed as ready, but its environment was missing: no item of that environment goes
#: there for this time, or until the manager no longer lists it.
_REFUSED_S = 10.0
#: How many such starts of one item do not count as retries.
_MAX_REFUSALS = 3
#: After so long without a message, a lane is asked whether its task has ended.
_SILENT_S = 10.0
#: How many messages of one lane are read before the other lanes have their turn.
_IN_A_ROW = 100

#: Makes the runtime_env of an item unlike all others.
ITEM_VARIABLE = "RAY_ENVS_ITEM"

#: An item that has ended and its result; None if it must be started again.
End = tuple[Item, ItemResult | None]


class Dispatcher:
    """Starts items, watches the running ones (`lanes`, by task), and reports how they ended."""

    def __init__(self, payload: Payload, provider: EnvironmentProvider, prefix: str) -> None:
        self._payload = payload
        self._provider = provider
        self._prefix = prefix
        self.lanes: dict[Any, Lane] = {}
        #: The keys of environments in which a lane has ended since `ended`: a worker is free.
        self.freed: list[str] = []
        self._paces = Paces()
        self._nodes = NodeTable()
        self._looked_at = time.monotonic()
        self._cluster = ClusterWatch()
        #: By variant: when its environment was read last, and the answer.
        self._fetched: dict[str, tuple[float, dict[str, Any]]] = {}
        self._start_checks = StartChecks(
            provider.start_error, every_s=provider.worker_start_timeout_s()
        )
        #: By key of an environment that no node has ready: until when its items wait.
        self._unready: dict[str, float] = {}
        #: By key and node id: until when no item of that environment goes to that node.
        self._refused: dict[tuple[str, str], float] = {}

    def pending(self) -> int:
        """Return how many items were started and have not ended."""
        return sum(len(lane.items) for lane in self.lanes.values())

    def next_item(
        self, firsts: Iterable[Item], left: Mapping[str, int], warm: list[str]
    ) -> Item | None:
        """Return the item to start now, or None; see `scheduling.next_item`."""
        now = time.monotonic()
        able = [item for item in firsts if self._unready.get(item.key, 0.0) <= now]
        running = [lane.first for lane in self.lanes.values()]
        return scheduling.next_item(able, left, running, warm, self._nodes.totals)

    def chunk(self, item: Item, left: int) -> int:
        """Return how many items, of the variant of `item`, to start together."""
        return self._paces.chunk(item, left, scheduling.slots(item, self._nodes.totals))

    def launch(self, items: Sequence[Item]) -> bool:
        """Start items of one variant in its environment, on a node where that is ready.

        Returns true if they were started; False if they must wait until a node has the environment.

        Raises:
            ManagerUnavailable: the cluster's head does not answer now.
            RayEnvsError: no node can run them.
        """
        item = items[0]
        if not self._cluster.head_answers():
            raise ManagerUnavailable("the cluster's head does not answer")
        try:
            environment = item.environment = self._current_environment(item)
            refused = self._refusing_nodes(environment)
            ready = [node_id for node_id in environment["ready_nodes"] if node_id not in refused]
            preparing = [*environment["preparing_nodes"], *refused]
            nodes = scheduling.able_nodes(item, ready, preparing, self._nodes.totals)
        except EnvironmentNotReady:
            now = time.monotonic()
            item.unready_at = item.unready_at or now
            if now - item.unready_at > self._provider.prepare_timeout_s():
                raise
            self._unready[item.key] = now + _UNREADY_S
            return False
        item.unready_at = None
        options = self._options(items, environment, nodes)
        now = time.monotonic()
        for each in items:
            each.environment, each.launched_at, each.nodes = environment, now, tuple(nodes)
            each.began = each.outcome = each.deadline = None
        item.attempts += 1
        payload = self._payload
        calls = [{"args": list(i.case.args), "kwargs": i.case.kwargs} for i in items]
        task = payload.task.options(**options)
        stream = task.remote(
            payload.shared(environment, item.limits, BUDGET_S),
            calls,
            payload.function,
            payload.code,
        )
        self.lanes[stream] = Lane(deque(items), tuple(nodes), lead=item)
        return True

    @staticmethod
    def _options(
        items: Sequence[Item], environment: Mapping[str, Any], nodes: list[str]
    ) -> dict[str, Any]:
        item, limits = items[0], items[0].limits
        #: Ray writes it before what the items print.
        name = item.variant_id if len(items) > 1 else f"{item.variant_id}:{item.case.id}"
        # Ray starts a worker for a runtime_env that no other has.
        own = {"env_vars": {ITEM_VARIABLE: uuid.uuid4().hex}} if limits.isolation == "fresh" else {}
        return placement.options(
            # A task that waits at a node for its environment holds that node's CPUs meanwhile,
            # so name ready nodes only.
            {**environment, "preparing_nodes": [], "may_spread": False},
            {
                "num_cpus": limits.num_cpus,
                "num_gpus": limits.num_gpus,
                "memory": limits.memory,
                "num_returns": "streaming",
                "max_retries": 0,
                "name": name,
                "runtime_env": own,
            },
            variant_id=item.variant_id,
            nodes=nodes,
        )

    def _refusing_nodes(self, environment: Mapping[str, Any]) -> list[str]:
        """Return the nodes where an item has just found the environment missing."""
        key, now, ready = environment["key"], time.monotonic(), set(environment["ready_nodes"])
        for (refused_key, node_id), until in list(self._refused.items()):
            is_known = refused_key == key and node_id not in ready  # to the manager, by now
            if until <= now or is_known:
                del self._refused[refused_key, node_id]
        return [node_id for refused_key, node_id in self._refused if refused_key == key]

    def _current_environment(self, item: Item) -> dict[str, Any]:
        """Return the environment of an item, with the nodes that have it ready now.

        On its first start an item keeps the generation that it was given. On a later start that
        generation must still be the variant's current one.

        Raises:
            EnvironmentNotReady: no node has it ready at this moment.
            WrongEnvironment: the variant has another generation now.
            RayEnvsError: no node will have it.
        """
        name, now = self._prefix + item.variant_id, time.monotonic()
        fetched_at, environment = self._fetched.get(name, (item.fetched_at, item.environment))
        if item.attempts or now - fetched_at > _FRESH_S:
            environment = self._provider.environment(name, prepare=False)
            self._fetched[name] = (now, environment)
            self._nodes.look()
        if item.attempts:
            check_key(name, environment, item.environment["key"])
        elif environment["key"] != item.environment["key"]:
            return item.environment
        return environment

    def ended(self) -> Iterator[End]:
        """Wait at most `_WAIT_S`; yield each item that ended, and its result.

        The result is None if the item must be started again.

        Raises `ClusterLost`: the cluster has ended.
        """
        import ray

        self.freed = []
        is_fresh = self._refresh_nodes()
        self._cluster.check(self._nodes.totals)
        if not self.lanes:
            if self._unready:  # nothing runs, and items wait for their environment
                time.sleep(_WAIT_S)
            return
        waiting = list(self.lanes)
        ready, _ = ray.wait(waiting, num_returns=1, timeout=_WAIT_S, fetch_local=False)
        if ready:  # take every message that has arrived, without waiting longer
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        for stream in ready:
            for _ in range(_IN_A_ROW):
                yield from self._advance(stream, self.lanes[stream])
                if (
                    stream not in self.lanes
                    or not ray.wait([stream], timeout=0, fetch_local=False)[0]
                ):
                    break
        yield from self._overdue()
        if is_fresh:
            yield from self._stranded()

    def _refresh_nodes(self) -> bool:
        """Read the list of live nodes again, once in a while; return whether that was now."""
        now = time.monotonic()
        if now - self._looked_at < _WATCHDOG_S or not self._cluster.head_answers():
            return False
        self._looked_at = now
        return self._nodes.look()

    def _advance(self, stream: Any, lane: Lane) -> list[End]:
        """Read the next message of a lane; return the items that have ended with it."""
        import ray

        try:
            message = ray.get(next(stream))
            lane.heard_at = time.monotonic()
            result = valued(lane.first, message) if lane.awaits_value else None
        except Exception as exc:
            if not lane.awaits_value or losses.is_loss(exc):
                return self._over(stream, self._loss(lane, exc))
            result = unreadable(lane.first, exc)
        if result is not None:
            lane.awaits_value = False
            if (lane.first.outcome or {})["is_unfit"]:
                return self._over(stream, result)
            ends: list[End] = [(lane.items.popleft(), result)]
        else:
            ends = self._told(stream, lane, message)
            if message.get("is_over"):  # the items took longer than was expected
                ends += [(item, None) for item in lane.items]
                lane.items.clear()
        if not lane.items and stream in self.lanes:
            self.freed.append(lane.lead.key)
            del self.lanes[stream]
        return ends

    @staticmethod
    def _loss(lane: Lane, exc: Exception) -> ItemResult | None:
        """Return the result of the first item of a lane whose task has ended with an error.

        What the worker told last may be lost, too: then nobody knows at which item it has ended.
        So each runs once more, alone, and that counts for none.
        """
        if len(lane.items) == 1:
            return losses.of(lane.first, exc)
        for item in lane.items:
            item.is_suspect = True
        lane.first.attempts -= lane.first is lane.lead or lane.first.began is not None
        return None

    def _told(self, stream: Any, lane: Lane, message: Mapping[str, Any]) -> list[End]:
        """Take a message of a lane that is not a value; return the items that have ended."""
        ends: list[End] = []
        outcome = message.get("ended")
        if outcome is not None:
            item = lane.first
            item.outcome = outcome
            self._paces.note(item)
            if outcome["kind"] == "crash":  # of the child process that it ran in
                error = outcome["error"]
                again = losses.again_or(item, error["type"], error["message"])
                ends = [(lane.items.popleft(), again)]
            elif outcome["kind"] == "environment":  # missing, damaged, or not the right one
                return self._over(stream, self._again_elsewhere(item, outcome))
            elif outcome["error"] is None and "value" not in outcome:
                lane.awaits_value = True
                return []
            else:
                result = result_of(item, outcome.get("value"))
                if outcome["is_unfit"]:
                    return self._over(stream, result)
                ends = [(lane.items.popleft(), result)]
        if "began" in message:
            lane.begin(message["began"])
        return ends

    def _over(self, stream: Any, result: ItemResult | None) -> list[End]:
        """End a lane whose first item has this result; its other items must be started again."""
        lane = self.lanes[stream]
        self._end(stream)  # no other item must meet that worker
        return [(item, result if item is lane.first else None) for item in lane.items]

    def _again_elsewhere(self, item: Item, message: Mapping[str, Any]) -> ItemResult | None:
        """Start an item again that found something wrong where it ran.

        If the user's function had not been called, this does not count as a retry. The first item
        of a worker shows that the node is at fault. A later item may have met what an item before
        it has left: a new worker of the same node will tell.
        """
        began = item.began or {}
        if not message["is_first"]:
            item.unfit_workers += not message["has_run"]
        elif not message["has_run"] and began:
            self._refused[item.key, began["node_id"]] = time.monotonic() + _REFUSED_S
            item.refusals += item.refusals < _MAX_REFUSALS
        return losses.again_or(item, message["error"]["type"], message["error"]["message"])

    def _overdue(self) -> Iterator[End]:
        now = time.monotonic()
        for stream, lane in list(self.lanes.items()):
            item = lane.first
            if item.deadline is not None and now > item.deadline:
                text = f"did not end within {item.limits.timeout_s:g} s"
                yield from self._over(stream, broken(item, "ItemTimeout", text))

    def _stranded(self) -> Iterator[End]:
        """End the lanes whose nodes have died or whose environment is lost.

        Ray would wait for them for ever. That is also true of a lane that was running: a node that
        loses its power closes no connection, and Ray waits for its answer although it knows that
        the node is dead.
        """
        now, alive = time.monotonic(), set(self._nodes.totals)
        for stream, lane in list(self.lanes.items()):
            if lane.node_id is not None and lane.node_id not in alive:
                yield from self._over(
                    stream, losses.again_or(lane.first, "WorkerLost", "its node has died")
                )
            elif now - lane.heard_at > _SILENT_S and losses.has_lost_words(stream):
                yield from self._over(stream, self._loss(lane, StopIteration()))
        waiting = [(stream, lane) for stream, lane in self.lanes.items() if lane.node_id is None]
        ages: dict[str, float] = {}
        for _, lane in waiting:
            name = lane.lead.variant_id
            ages[name] = max(ages.get(name, 0.0), now - lane.launched_at)
        lost = self._lost({name for name, age in ages.items() if age > _LONG_S})
        bound_s = self._provider.worker_start_timeout_s()
        for name in {name for name, age in ages.items() if age > bound_s} - set(lost):
            error = self._start_checks.error_of(self._prefix + name)
            if error is not None:
                lost[name] = error
        for stream, lane in waiting:
            name = lane.lead.variant_id
            if name in lost:
                yield from self._over(stream, not_run(lane.first, lost[name]))
            elif not alive & set(lane.nodes) or (
                # Ray may have asked a dead node for a worker. If the machine closed no connection,
                # that request fails after minutes, and items with the same nodes wait behind it.
                not alive >= set(lane.nodes) and now - lane.launched_at > _LONG_S
            ):
                yield from self._over(stream, None)

    def _lost(self, variant_ids: set[str]) -> dict[str, RayEnvsError]:
        """Return the variants whose environment no node will have again, each with the error."""
        lost: dict[str, RayEnvsError] = {}
        for variant_id in variant_ids:
            try:
                self._provider.environment(self._prefix + variant_id, prepare=False)
            except (EnvironmentNotReady, ManagerUnavailable, NotFound):
                continue  # being built again; or only its definition was deleted
            except RayEnvsError as exc:
                lost[variant_id] = exc
        return lost

    def _end(self, stream: Any) -> None:
        import ray

        del self.lanes[stream]
        with suppress(Exception):  # the task may have ended just now
            ray.cancel(stream, force=True)

    def cancel(self) -> None:
        """Stop every running item."""
        import ray

        if ray.is_initialized() and not self._cluster.is_lost:
            for stream in list(self.lanes):
                self._end(stream)
        self.lanes.clear()
