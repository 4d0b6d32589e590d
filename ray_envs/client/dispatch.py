"""Starts the items of a batch as Ray tasks, watches them, and reports how each one ended.

Runs in the user's program. `item_queue` decides when an item starts and keeps the results. Here is
all that touches Ray's tasks: nodes, messages of a task, time-outs, lost workers and lost nodes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ray_envs.batch_models import ItemResult
from ray_envs.client import scheduling
from ray_envs.client.cluster_watch import ClusterWatch
from ray_envs.client.environments import EnvironmentProvider
from ray_envs.client.items import Item, broken, not_run, result_of, unreadable
from ray_envs.client.node_table import NodeTable
from ray_envs.client.payload import Payload
from ray_envs.client.start_checks import StartChecks
from ray_envs.decisions import placement
from ray_envs.errors import (
    EnvironmentNotReady,
    ManagerUnavailable,
    NotFound,
    RayEnvsError,
    WrongEnvironment,
)
from ray_envs.plugin import gate

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


class Dispatcher:
    """Starts items, watches the running ones (`items`, by task), and reports how they ended."""

    def __init__(self, payload: Payload, provider: EnvironmentProvider, prefix: str) -> None:
        self._payload = payload
        self._provider = provider
        self._prefix = prefix
        self.items: dict[Any, Item] = {}
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

    def next_item(self, waiting: Iterable[Item], warm: list[str]) -> Item | None:
        """Return the item to start now, or None; see `scheduling.next_item`."""
        now = time.monotonic()
        able = [i for i in waiting if self._unready.get(i.environment["key"], 0.0) <= now]
        return scheduling.next_item(able, self.items.values(), warm, self._nodes.totals)

    def launch(self, item: Item) -> bool:
        """Start one item in its variant's environment, on a node where that is ready.

        Returns true if it was started; False if it must wait until a node has the environment.

        Raises:
            ManagerUnavailable: the cluster's head does not answer now.
            RayEnvsError: no node can run it.
        """
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
            self._unready[item.environment["key"]] = now + _UNREADY_S
            return False
        item.unready_at = None
        limits = item.limits
        options = placement.options(
            # A task that waits at a node for its environment holds that node's CPUs meanwhile,
            # so name ready nodes only.
            {**environment, "preparing_nodes": [], "may_spread": False},
            {
                "num_cpus": limits.num_cpus,
                "num_gpus": limits.num_gpus,
                "memory": limits.memory,
                "num_returns": "streaming",
                "max_retries": 0,
                "name": f"{item.variant_id}:{item.case.id}",
            },
            variant_id=item.variant_id,
            nodes=nodes,
        )
        item.attempts += 1
        item.nodes = tuple(nodes)
        item.launched_at = time.monotonic()
        item.began = item.outcome = item.deadline = None
        payload = self._payload
        request = payload.request(environment, item.case)
        task = payload.task.options(**options)
        self.items[task.remote(request, payload.function, payload.code)] = item
        return True

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

    def ended(self) -> Iterator[tuple[Item, ItemResult | None]]:
        """Wait at most `_WAIT_S`; yield each item that ended, and its result.

        The result is None if the item must be started again.

        Raises `ClusterLost`: the cluster has ended.
        """
        import ray

        is_fresh = self._refresh_nodes()
        self._cluster.check(self._nodes.totals)
        if not self.items:
            if self._unready:  # nothing runs, and items wait for their environment
                time.sleep(_WAIT_S)
            return
        waiting = list(self.items)
        ready, _ = ray.wait(waiting, num_returns=1, timeout=_WAIT_S, fetch_local=False)
        if ready:  # take every message that has arrived, without waiting longer
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        for stream in ready:
            item = self.items[stream]
            end = self._advance(stream, item)
            if end is not None:
                if item.outcome is not None and item.outcome["is_unfit"]:
                    self._end(stream)  # no other item must meet that worker
                else:
                    del self.items[stream]
                yield item, end[0]
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

    def _advance(self, stream: Any, item: Item) -> tuple[ItemResult | None] | None:
        """Read the next message of an item.

        Returns:
            None while the item runs. When it has ended, a tuple of one: its result, or None if it
            must be started again.
        """
        import ray
        from ray import exceptions

        try:
            message = ray.get(next(stream))
            if item.began is None and "kind" not in message:
                item.began = message
                item.deadline = time.monotonic() + item.limits.timeout_s
                return None
            if item.outcome is None:
                item.outcome = message
                if message["kind"] == "environment":  # missing, damaged, or not the right one
                    return self._again_elsewhere(item, message)
                if message["error"] is not None or self._payload.entrypoint is not None:
                    return (result_of(item, message["value"]),)
                return None
            return (result_of(item, message),)
        except StopIteration:
            return self._again_or(item, "WorkerLost", "the worker ended without a result")
        except (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
            exceptions.LocalRayletDiedError,
            exceptions.OutOfMemoryError,
            exceptions.TaskUnschedulableError,  # the named nodes are gone
            exceptions.RuntimeEnvSetupError,
        ) as exc:
            text = str(exc)
            return self._again_or(item, type(exc).__name__, gate.reason_in(text) or text)
        except exceptions.RayTaskError as exc:
            if item.began is None:  # Ray failed in a worker that an item before it has spoilt
                return self._again_or(item, type(exc.cause).__name__, str(exc.cause))
            return (broken(item, type(exc.cause).__name__, str(exc.cause), str(exc)),)
        except Exception as exc:
            if item.outcome is not None:  # it has ended well, and its value has arrived
                return (unreadable(item, exc),)
            return (broken(item, type(exc).__name__, str(exc)),)

    def _again_elsewhere(self, item: Item, message: Mapping[str, Any]) -> tuple[ItemResult | None]:
        """Start an item again that found something wrong where it ran.

        If the user's function had not been called, this does not count as a retry. The first item
        of a worker shows that the node is at fault. A later item may have met what an item before
        it has left: a new worker of the same node will tell.
        """
        began = item.began or {}
        if not message["is_first"]:
            item.unfit_workers += not message["has_run"]
        elif not message["has_run"] and began:
            self._refused[item.environment["key"], began["node_id"]] = time.monotonic() + _REFUSED_S
            item.refusals += item.refusals < _MAX_REFUSALS
        return self._again_or(item, message["error"]["type"], message["error"]["message"])

    @staticmethod
    def _again_or(item: Item, kind: str, message: str) -> tuple[ItemResult | None]:
        """Start a lost item again; when no retry is left, the loss is its result."""
        if item.attempts - item.refusals - item.unfit_workers <= item.limits.retries:
            return (None,)
        return (broken(item, kind, message),)

    def _overdue(self) -> Iterator[tuple[Item, ItemResult | None]]:
        now = time.monotonic()
        for stream, item in list(self.items.items()):
            if item.deadline is not None and now > item.deadline:
                self._end(stream)
                yield (
                    item,
                    broken(item, "ItemTimeout", f"did not end within {item.limits.timeout_s:g} s"),
                )

    def _stranded(self) -> Iterator[tuple[Item, ItemResult | None]]:
        """End the items whose nodes have died or whose environment is lost.

        Ray would wait for them for ever. That is also true of an item that was running: a node that
        loses its power closes no connection, and Ray waits for its answer although it knows that
        the node is dead.
        """
        now, alive = time.monotonic(), set(self._nodes.totals)
        for stream, item in list(self.items.items()):
            if item.began is not None and item.began["node_id"] not in alive:
                self._end(stream)
                yield item, self._again_or(item, "WorkerLost", "its node has died")[0]
        waiting = [(stream, item) for stream, item in self.items.items() if item.began is None]
        lost = self._lost(
            {item.variant_id for _, item in waiting if now - item.launched_at > _LONG_S}
        )
        bound_s = self._provider.worker_start_timeout_s()
        for name in {i.variant_id for _, i in waiting if now - i.launched_at > bound_s} - set(lost):
            error = self._start_checks.error_of(self._prefix + name)
            if error is not None:
                lost[name] = error
        for stream, item in waiting:
            if item.variant_id in lost:
                self._end(stream)
                yield item, not_run(item, lost[item.variant_id])
            elif not alive & set(item.nodes) or (
                # Ray may have asked a dead node for a worker. If the machine closed no connection,
                # that request fails after minutes, and items with the same nodes wait behind it.
                not alive >= set(item.nodes) and now - item.launched_at > _LONG_S
            ):
                self._end(stream)
                yield item, None

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

        del self.items[stream]
        with suppress(Exception):  # the task may have ended just now
            ray.cancel(stream, force=True)

    def cancel(self) -> None:
        """Stop every running item."""
        import ray

        if ray.is_initialized() and not self._cluster.is_lost:
            for stream in list(self.items):
                self._end(stream)
        self.items.clear()


def check_key(name: str, environment: Mapping[str, Any], key: str | None) -> None:
    """Check that a variant still has the environment `key`; None accepts any.

    Raises `WrongEnvironment`: it has another one, because its spec was replaced.
    """
    if key is not None and environment["key"] != key:
        raise WrongEnvironment(
            f"variant {name!r} was replaced while the batch ran: its environment is now "
            f"{environment['key'][:10]}, not {key[:10]}",
            variant_id=name,
            key=key,
            hint="another run or `create --replace` changed it: run one batch at a time, or use "
            "other ids",
        )
