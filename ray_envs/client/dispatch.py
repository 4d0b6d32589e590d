"""The items of a batch that Ray has: started, watched, and ended one by one.

Which items there are, and what becomes of their results, is `batch`'s business. Here is all that
touches Ray's tasks: placement at the start, messages, time-outs, lost workers and nodes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from ray_envs.client import scheduling
from ray_envs.client.items import Item, broken, not_run, result_of
from ray_envs.client.payload import Payload
from ray_envs.client.provider import EnvironmentProvider
from ray_envs.decisions import placement
from ray_envs.errors import (
    EnvironmentNotReady,
    ManagerUnavailable,
    NotFound,
    RayEnvsError,
    WrongEnvironment,
)
from ray_envs.models import ItemResult
from ray_envs.plugin import gate

#: How long one wait for results lasts: how soon a time-out, a cancel or a lost node is noticed.
_WAIT_S = 0.5
#: How often it is looked whether the nodes that items wait for are still alive.
_WATCHDOG_S = 5.0
#: How long an item may wait for its worker before its environment is looked at again.
_LONG_S = 15.0
#: How long it is believed where an environment is ready: nodes come, go, and lose their disks.
_FRESH_S = 5.0
#: How soon it is looked again whether an environment that no node has now is ready somewhere.
_UNREADY_S = 1.0

#: How long no item goes to a node that was without its environment after all, unless the node is
#: seen to prepare it; and how often that costs an item nothing.
_REFUSED_S = 10.0
_MAX_REFUSALS = 3


class Dispatcher:
    """The items that Ray has: started, watched, and ended one by one."""

    def __init__(self, payload: Payload, provider: EnvironmentProvider, prefix: str) -> None:
        self._payload = payload
        self._provider = provider
        self._prefix = prefix
        self.items: dict[Any, Item] = {}
        self._totals = scheduling.node_totals()
        self._looked_at = time.monotonic()
        #: When each variant's environment was asked for last.
        self._fetched: dict[str, tuple[float, dict[str, Any]]] = {}
        #: Until when the items of an environment wait that no node has ready.
        self._unready: dict[str, float] = {}
        #: Until when nothing is sent to a node, by the environment's key and the node's id.
        self._refused: dict[tuple[str, str], float] = {}

    def next_item(self, waiting: Iterable[Item], warm: list[str]) -> Item | None:
        """The item to start now, or None; see `scheduling.next_item`."""
        now = time.monotonic()
        able = [i for i in waiting if self._unready.get(i.environment["key"], 0.0) <= now]
        return scheduling.next_item(able, self.items.values(), warm, self._totals)

    def launch(self, item: Item) -> bool:
        """Hand one item to Ray, in its variant's environment on a node where that is ready.

        Returns:
            Whether it was handed over: not where it has to wait until a node has the environment.

        Raises:
            RayEnvsError: no node can run it.
        """
        limits = item.limits
        try:
            environment = item.environment = self._current(item)
            refused = self._refused_by(environment)
            nodes = scheduling.able_nodes(
                [node_id for node_id in environment["ready_nodes"] if node_id not in refused],
                [*environment["preparing_nodes"], *refused],
                self._totals,
                scheduling.wanted_resources(limits),
                item.variant_id,
            )
        except EnvironmentNotReady:
            now = time.monotonic()
            item.unready_at = item.unready_at or now
            if now - item.unready_at > self._provider.prepare_timeout_s():
                raise
            self._unready[item.environment["key"]] = now + _UNREADY_S
            return False
        item.unready_at = None
        options = placement.options(
            # What waits at a node holds its place there: the next item is placed by what is ready.
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

    def _refused_by(self, environment: Mapping[str, Any]) -> list[str]:
        """The nodes that count as ready although an item has just found nothing there."""
        key, now, ready = environment["key"], time.monotonic(), set(environment["ready_nodes"])
        for place, until in list(self._refused.items()):
            if until <= now or (place[0] == key and place[1] not in ready):  # it is known by now
                del self._refused[place]
        return [node_id for refused_key, node_id in self._refused if refused_key == key]

    def _current(self, item: Item) -> dict[str, Any]:
        """The environment of an item, with the nodes that have it now.

        An item that has not begun keeps the generation that it was given; one that is started
        again must find that this is still the variant's.

        Raises:
            EnvironmentNotReady: no node has it at this moment.
            RayEnvsError: no node will have it.
        """
        name, now = self._prefix + item.variant_id, time.monotonic()
        fetched_at, environment = self._fetched.get(name, (item.fetched_at, item.environment))
        if item.attempts or now - fetched_at > _FRESH_S:
            environment = self._provider.environment(name, prepare=False)
            self._fetched[name] = (now, environment)
            self._totals = scheduling.node_totals()
        if item.attempts:
            check_key(name, environment, item.environment["key"])
        elif environment["key"] != item.environment["key"]:
            return item.environment
        return environment

    def ended(self) -> Iterator[tuple[Item, ItemResult | None]]:
        """Wait a moment; the items that ended, each with its result, or None to start it again."""
        import ray

        if not self.items:
            if self._unready:  # nothing runs: look again in a moment
                time.sleep(_WAIT_S)
            return
        waiting = list(self.items)
        ready, _ = ray.wait(waiting, num_returns=1, timeout=_WAIT_S, fetch_local=False)
        if ready:  # take all that are there already, without waiting
            ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)
        for stream in ready:
            item = self.items[stream]
            end = self._advance(stream, item)
            if end is not None:
                del self.items[stream]
                yield item, end[0]
        yield from self._overdue()
        yield from self._stranded()

    def _advance(self, stream: Any, item: Item) -> tuple[ItemResult | None] | None:
        """Take the next message of an item; a result (or None: again) in a tuple where it ended."""
        import ray
        from ray import exceptions

        try:
            message = ray.get(next(stream))
            if item.began is None:
                item.began = message
                item.deadline = time.monotonic() + item.limits.timeout_s
                return None
            if item.outcome is None:
                item.outcome = message
                if message["kind"] == "environment":  # damaged, lost or another one: not its fault
                    return self._refuse(item, message)
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
            return (broken(item, type(exc.cause).__name__, str(exc.cause), str(exc)),)
        except Exception as exc:
            return (broken(item, type(exc).__name__, str(exc)),)

    def _refuse(self, item: Item, message: Mapping[str, Any]) -> tuple[ItemResult | None]:
        """Start an item again that found no environment; it is no retry where nothing of it ran."""
        began = item.began or {}
        place = (item.environment["key"], began["node_id"])
        self._refused[place] = time.monotonic() + _REFUSED_S
        item.refusals += not message["has_run"] and item.refusals < _MAX_REFUSALS
        return self._again_or(item, message["error"]["type"], message["error"]["message"])

    @staticmethod
    def _again_or(item: Item, kind: str, message: str) -> tuple[ItemResult | None]:
        """Start a lost item again; when its retries are used up, that is its result."""
        if item.attempts - item.refusals <= item.limits.retries:
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
        """Items that wait for what is gone, nodes or environment: Ray would wait for ever.

        Also those that a node ran: one that loses its power closes no connection, and Ray waits for
        the answer although it knows that the node is dead.
        """
        now = time.monotonic()
        if now - self._looked_at < _WATCHDOG_S:
            return
        self._looked_at = now
        self._totals = scheduling.node_totals()
        alive = set(self._totals)
        for stream, item in list(self.items.items()):
            if item.began is not None and item.began["node_id"] not in alive:
                self._end(stream)
                yield item, self._again_or(item, "WorkerLost", "its node has died")[0]
        waiting = [(stream, item) for stream, item in self.items.items() if item.began is None]
        lost = self._lost(
            {item.variant_id for _, item in waiting if now - item.launched_at > _LONG_S}
        )
        for stream, item in waiting:
            if item.variant_id in lost:
                self._end(stream)
                yield item, not_run(item, lost[item.variant_id])
            elif not alive & set(item.nodes) or (
                # Ray may have asked for a worker there: without a word of the machine's end, that
                # takes minutes to fail, and all items with the same nodes wait behind it.
                not alive >= set(item.nodes) and now - item.launched_at > _LONG_S
            ):
                self._end(stream)
                yield item, None

    def _lost(self, variant_ids: set[str]) -> dict[str, RayEnvsError]:
        """Those variants whose environment no node has any more, and why."""
        lost: dict[str, RayEnvsError] = {}
        for variant_id in variant_ids:
            try:
                self._provider.environment(self._prefix + variant_id, prepare=False)
            except (EnvironmentNotReady, ManagerUnavailable, NotFound):
                continue  # it is being built again, or its definition is gone and it is not
            except RayEnvsError as exc:
                lost[variant_id] = exc
        return lost

    def _end(self, stream: Any) -> None:
        import ray

        del self.items[stream]
        with suppress(Exception):  # it may have ended by itself just now
            ray.cancel(stream, force=True)

    def cancel(self) -> None:
        """Stop everything that Ray still has of this batch."""
        import ray

        if ray.is_initialized():
            for stream in list(self.items):
                self._end(stream)
        self.items.clear()


def check_key(name: str, environment: Mapping[str, Any], key: str | None) -> None:
    """Make sure that a variant is still what it was when the batch asked for it.

    Raises:
        WrongEnvironment: it was given another spec meanwhile.
    """
    if key is not None and environment["key"] != key:
        raise WrongEnvironment(
            f"variant {name!r} was replaced meanwhile: {environment['key'][:10]} is not {key[:10]}",
            variant_id=name,
            key=key,
            hint="another run or `create --replace` changed it; run one at a time, or use "
            "other ids",
        )
