"""The items of a batch that Ray has: started, watched, and ended one by one.

Which items there are, and what becomes of their results, is `batch`'s business. Here is all that
touches Ray's tasks: placement at the start, messages, time-outs, lost workers and nodes.
"""

from __future__ import annotations

import sys
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_envs.client.code_folder import pack_code
from ray_envs.client.environments import EnvironmentProvider
from ray_envs.cluster.cluster import by_value
from ray_envs.decisions import placement
from ray_envs.errors import (
    EnvironmentNotReady,
    ManagerUnavailable,
    NoEligibleNode,
    NotFound,
    RayEnvsError,
    WrongEnvironment,
)
from ray_envs.models import CaseSpec, ErrorInfo, ItemResult, RunDefaults
from ray_envs.plugin import gate
from ray_envs.worker import inside

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

#: How many items of one environment wait for its busy worker, and how long. Guesses: a worker
#: takes one to three seconds to start and import.
_FEW = 4
_GRACE_S = 5.0

_RESOURCES = ("CPU", "GPU", "memory")


@dataclass(slots=True, eq=False)
class Item:
    variant_id: str
    case: CaseSpec
    limits: RunDefaults
    call_sha256: str | None
    attempts: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    fetched_at: float = 0.0
    nodes: tuple[str, ...] = ()
    began: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    deadline: float | None = None
    launched_at: float = 0.0
    #: Since when it waits for an environment that no node has any more.
    unready_at: float | None = None
    #: How often it met a node without its environment, and nothing of it ran.
    refusals: int = 0


class Payload:
    """What every item of a batch sends along: the function or its name, and the code folder."""

    def __init__(self, entrypoint: str | None, function: bytes | None, code: Path | None) -> None:
        import ray

        self.entrypoint = entrypoint
        self.function = function
        self.code_sha256: str | None = None
        self.code: Any = None
        if code is not None:
            self.code_sha256, archive = pack_code(code)
            self.code = ray.put(archive)
        with by_value([inside]):
            # A copy that belongs to no module: Ray pickles it later, at its first use.
            self.task = ray.remote(ray.cloudpickle.loads(ray.cloudpickle.dumps(inside.run_item)))

    @classmethod
    def of(cls, function: Any, code: Path | None) -> Payload:
        if isinstance(function, str):
            return cls(function, None, code)
        import ray

        plain = plain_function(function)
        with by_value(_modules_of(plain)):
            return cls(None, ray.cloudpickle.dumps(plain), code)


class Flight:
    """The items that Ray has: started, watched, and ended one by one."""

    def __init__(self, payload: Payload, provider: EnvironmentProvider, prefix: str) -> None:
        self._payload = payload
        self._provider = provider
        self._prefix = prefix
        self.items: dict[Any, Item] = {}
        self._totals = totals()
        self._looked_at = time.monotonic()
        #: When each variant's environment was asked for last.
        self._fetched: dict[str, tuple[float, dict[str, Any]]] = {}
        #: Until when the items of an environment wait that no node has ready.
        self._unready: dict[str, float] = {}
        #: Until when nothing is sent to a node, by the environment's key and the node's id.
        self._refused: dict[tuple[str, str], float] = {}

    def next_of(self, waiting: deque[Item], warm: list[str]) -> Item | None:
        """The item to start now, or None where the cluster has no room for another.

        Ray gives a worker's place to another environment after half a second and soon ends the
        worker, so that items handed over all at once start the same environment again and again.
        Here an item follows the one that ended in its environment (`warm`), and only as many are
        handed over as can run.
        """
        by_key: dict[str, Item] = {}
        now = time.monotonic()
        for item in waiting:
            if self._unready.get(item.environment["key"], 0.0) <= now:
                by_key.setdefault(item.environment["key"], item)
        busy = [item.environment["key"] for item in self.items.values()]
        left = Counter(item.environment["key"] for item in waiting)
        order = [key for key in warm if key in by_key]
        order += [
            key
            for key in sorted(by_key, key=busy.count)  # stable: in the order of the batch
            if self._is_worth_a_worker(key, left[key])
        ]
        if not order:
            return None
        item = by_key[order[0]]
        if self.items and self._is_able(item) and not self._has_room(item):
            return None
        if warm and order[0] in warm:
            warm.remove(order[0])
        return item

    def _is_worth_a_worker(self, key: str, left: int) -> bool:
        """Whether another worker in an environment that has one is worth its start.

        A few short items are done sooner by the worker that is there than by one that has to
        start and import first; whether they are short shows within a few seconds.
        """
        began = [i.launched_at for i in self.items.values() if i.environment["key"] == key]
        is_long = time.monotonic() - max(began, default=0.0) > _GRACE_S
        return not began or left > _FEW or is_long

    def _is_able(self, item: Item) -> bool:
        """Whether any node could run the item at all; `launch` says why none can."""
        wanted = _wanted(item.limits)
        return any(_has_all(node, wanted) for node in self._totals.values())

    def _has_room(self, item: Item) -> bool:
        """Whether the cluster has room for one more, and the nodes with its environment have."""
        key, ready = item.environment["key"], item.environment["ready_nodes"]
        everybody = list(self.items.values())
        alike = [other for other in everybody if other.environment["key"] == key]
        nodes = [self._totals[node_id] for node_id in ready if node_id in self._totals]
        return _is_room(item, everybody, self._totals.values()) and _is_room(item, alike, nodes)

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
            nodes = _able_nodes(
                [node_id for node_id in environment["ready_nodes"] if node_id not in refused],
                [*environment["preparing_nodes"], *refused],
                self._totals,
                _wanted(limits),
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
        payload = self._payload
        request = {
            "key": environment["key"],
            "venv": environment["venv_path"],
            "python": environment["python_version"],
            "ray": environment["ray_version"],
            "entrypoint": payload.entrypoint,
            "args": list(item.case.args),
            "kwargs": item.case.kwargs,
            "as_json": payload.entrypoint is not None,
            "code_sha256": payload.code_sha256,
        }
        item.attempts += 1
        item.nodes = tuple(nodes)
        item.launched_at = time.monotonic()
        item.began = item.outcome = item.deadline = None
        self.items[
            payload.task.options(**options).remote(request, payload.function, payload.code)
        ] = item
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
            self._totals = totals()
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
                    return (_result(item, message["value"]),)
                return None
            return (_result(item, message),)
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
            return (_broken(item, type(exc.cause).__name__, str(exc.cause), str(exc)),)
        except Exception as exc:
            return (_broken(item, type(exc).__name__, str(exc)),)

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
        return (_broken(item, kind, message),)

    def _overdue(self) -> Iterator[tuple[Item, ItemResult | None]]:
        now = time.monotonic()
        for stream, item in list(self.items.items()):
            if item.deadline is not None and now > item.deadline:
                self._end(stream)
                yield (
                    item,
                    _broken(item, "ItemTimeout", f"did not end within {item.limits.timeout_s:g} s"),
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
        self._totals = totals()
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


def totals() -> dict[str, dict[str, float]]:
    """What each live node has in all, by node id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _wanted(limits: RunDefaults) -> dict[str, float]:
    return {"CPU": limits.num_cpus, "GPU": limits.num_gpus, "memory": limits.memory or 0}


def _has_all(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _is_room(item: Item, others: Iterable[Item], nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether `nodes` have room for `item` besides `others`."""
    others, nodes = list(others), list(nodes)
    for name in _RESOURCES:
        wanted = _wanted(item.limits)[name]
        used = sum(_wanted(other.limits)[name] for other in others)
        total = sum(node.get(name, 0) for node in nodes)
        if wanted and used + wanted > total:
            return False
    return True


def _able_nodes(
    ready: Sequence[str],
    preparing: Sequence[str],
    totals: Mapping[str, Mapping[str, float]],
    wanted: Mapping[str, float],
    variant_id: str,
) -> list[str]:
    """Those of the ready nodes that have enough of everything, were they idle."""

    def able_of(node_ids: Sequence[str]) -> list[str]:
        return [n for n in node_ids if n in totals and _has_all(totals[n], wanted)]

    able = able_of(ready)
    if not able and able_of(preparing):
        raise EnvironmentNotReady(
            f"the nodes that could run {variant_id!r} are still being prepared",
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


def _result(item: Item, value: Any) -> ItemResult:
    outcome = item.outcome or {}
    error = outcome.get("error")
    return _filled(
        item,
        ok=error is None,
        value=value if error is None else None,
        error=ErrorInfo(**error) if error else None,
        python=outcome.get("python"),
        ray=outcome.get("ray"),
        duration_s=round(outcome.get("duration_s", 0.0), 6),
        shadowed=tuple(outcome.get("shadowed", ())),
    )


def _broken(item: Item, kind: str, message: str, traceback: str = "") -> ItemResult:
    began = (item.began or {}).get("started_at")
    return _filled(
        item,
        ok=False,
        error=ErrorInfo(type=kind, message=message.strip(), traceback=traceback),
        duration_s=round(time.time() - began, 6) if began else 0.0,
    )


def not_run(item: Item, error: RayEnvsError) -> ItemResult:
    return _filled(item, ok=False, error=ErrorInfo(type=type(error).__name__, message=str(error)))


def _filled(item: Item, **fields: Any) -> ItemResult:
    began = item.began or {}
    started = began.get("started_at")
    return ItemResult(
        variant_id=item.variant_id,
        case_id=item.case.id,
        key=item.environment.get("key"),
        lock_sha256=item.environment.get("lock_sha256"),
        node_id=began.get("node_id"),
        attempts=item.attempts,
        started_at=datetime.fromtimestamp(started, timezone.utc) if started else None,
        call_sha256=item.call_sha256,
        **fields,
    )


def plain_function(function: Any) -> Any:
    """The function behind a Ray remote function; any other one as it is."""
    return getattr(function, "_function", function)


def _modules_of(function: Any) -> list[ModuleType]:
    """The top module of a function, where it is the user's own: not installed, not built in."""
    name = getattr(function, "__module__", None)
    if name in (None, "__main__", "builtins"):
        return []
    top = sys.modules.get(str(name).split(".")[0])
    path = getattr(sys.modules.get(str(name)), "__file__", None)
    if top is None or path is None:
        return []
    paths = sysconfig.get_paths()
    installed = [paths[kind] for kind in ("purelib", "platlib", "stdlib", "platstdlib")]
    if any(Path(path).is_relative_to(folder) for folder in installed):
        return []
    return [top]
