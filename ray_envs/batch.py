"""RayBatchRunner: runs variants × cases, every item in its own variant's environment.

An item fetches its environment by `variant_id` before it runs. A failing item is a result, not an
exception. Whether a result is written, shown or resumed is not decided here (`cli`).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_envs import inside, placement
from ray_envs.cluster import by_value
from ray_envs.code import pack_code
from ray_envs.errors import InvalidInput, NoEligibleNode, RayEnvsError
from ray_envs.models import BatchSpec, CaseSpec, ErrorInfo, ItemResult, RunDefaults, validated
from ray_envs.provider import EnvironmentProvider, Statuses

#: How long one wait for results lasts: how soon a time-out, a cancel or a lost node is noticed.
_WAIT_S = 0.5
#: How often the runner looks whether the nodes that items wait for are still alive.
_WATCHDOG_S = 5.0

_ENTRYPOINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_RESOURCES = ("CPU", "GPU", "memory")


class BatchState(str, Enum):
    """What a batch is; the last four are final, and decided once."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is. Durations are seconds; `eta_s` is None until something has ended."""

    total: int
    completed: int
    failed: int
    in_progress: int
    elapsed_s: float
    eta_s: float | None


@dataclass(slots=True, eq=False)
class _Item:
    variant_id: str
    case: CaseSpec
    limits: RunDefaults
    call_sha256: str | None
    attempts: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()
    began: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    deadline: float | None = None


class RayBatchRunner:
    """Runs one batch at a time; `run` and `run_batch` yield results as items end.

    Args:
        provider: where environments come from.
        max_pending: how many items are handed to Ray at once.
    """

    def __init__(self, provider: EnvironmentProvider, *, max_pending: int = 100) -> None:
        if max_pending < 1:
            raise InvalidInput(f"max_pending is {max_pending}", hint="give at least 1")
        self._provider = provider
        self._max_pending = max_pending
        self._state = BatchState.PENDING
        self._cancelled = threading.Event()
        self._total = self._completed = self._failed = self._in_progress = 0
        self._started = self._ended = 0.0

    # -- running ------------------------------------------------------------------------------

    def run(
        self,
        function: Any,
        *,
        variants: Sequence[str],
        cases: Iterable[Sequence[Any] | Mapping[str, Any] | CaseSpec],
        prefix: str = "",
        code: Path | None = None,
        on_status: Callable[[Statuses], None] | None = None,
        timeout_s: float | None = None,
        **limits: Any,
    ) -> Iterator[ItemResult]:
        """Call `function` with every case in every variant; yields an `ItemResult` as each ends.

        Args:
            function: a function, a Ray remote function, or an entrypoint "module:function". A
                function of a module of yours is sent by value: environments need not have it.
            variants: ids of variants that were created.
            cases: positional arguments, keyword arguments, or a `CaseSpec`.
            prefix: put before a variant's id to find its environment ("batch/").
            code: a folder whose modules can be imported there.
            on_status: called while environments are being prepared.
            timeout_s: of an item, from its start, in seconds.
            limits: other fields of `RunDefaults`, for every item.

        Raises:
            InvalidInput: the arguments cannot be accepted. Nothing was started.
        """
        given = {**limits, **({} if timeout_s is None else {"timeout_s": timeout_s})}
        defaults = validated(RunDefaults, given, where="run()")
        specs = [_case(case, number) for number, case in enumerate(cases)]
        items = [
            _Item(name, case, defaults, _call_sha256(function, case))
            for case in specs
            for name in variants
        ]
        if not items:
            raise InvalidInput("there is nothing to run", hint="give at least one variant and case")
        return self._run(function, items, prefix=prefix, code=code, on_status=on_status)

    def run_batch(
        self,
        batch: BatchSpec,
        *,
        code: Path | None = None,
        done: Iterable[ItemResult] = (),
        failed: Mapping[str, RayEnvsError] | None = None,
        on_status: Callable[[Statuses], None] | None = None,
    ) -> Iterator[ItemResult]:
        """Run a batch file whose variants were created under `<name>/<variant>`.

        Args:
            batch: what to run.
            code: the folder of the entrypoint, if it is not in the environments.
            done: earlier results; a successful one with the same key and arguments is not repeated.
            failed: variants that could not be created, and why: their items fail with it.
            on_status: called while environments are being prepared.
        """
        items = [
            _Item(
                variant.id,
                case,
                _limits(batch.defaults, variant),
                _call_sha256(batch.entrypoint, case),
            )
            for case in batch.cases  # case by case: every variant's first worker starts early
            for variant in batch.variants
        ]
        return self._run(
            batch.entrypoint,
            items,
            prefix=f"{batch.name}/",
            code=code,
            on_status=on_status,
            done=done,
            failed=failed,
        )

    def _run(
        self,
        function: Any,
        items: list[_Item],
        *,
        prefix: str,
        code: Path | None,
        on_status: Callable[[Statuses], None] | None,
        done: Iterable[ItemResult] = (),
        failed: Mapping[str, RayEnvsError] | None = None,
    ) -> Iterator[ItemResult]:
        if isinstance(function, str) and not _ENTRYPOINT.fullmatch(function):
            raise InvalidInput(f"{function!r} is no entrypoint", hint='write "module:function"')
        if not isinstance(function, str) and not callable(_plain(function)):
            raise InvalidInput(
                f"{function!r} cannot be called", hint='give a function or "module:function"'
            )
        pairs = [(item.variant_id, item.case.id) for item in items]
        twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
        if twice is not None:
            raise InvalidInput(f"variant {twice[0]!r} with case {twice[1]!r} is there twice")
        return self._results(
            function, items, prefix, code, on_status, list(done), dict(failed or {})
        )

    def _results(
        self,
        function: Any,
        items: list[_Item],
        prefix: str,
        code: Path | None,
        on_status: Callable[[Statuses], None] | None,
        done: list[ItemResult],
        failed: dict[str, RayEnvsError],
    ) -> Iterator[ItemResult]:
        if self._state is BatchState.RUNNING:
            raise InvalidInput("this runner is running a batch", hint="use a runner for each batch")
        flight = _Flight(_Payload.of(function, code), self._provider, prefix)
        self._state, self._started = BatchState.RUNNING, time.monotonic()
        self._cancelled.clear()
        self._total, self._completed, self._failed, self._in_progress = len(items), 0, 0, 0
        is_over = False
        try:
            environments = self._fetched(items, prefix, failed, on_status)
            waiting: deque[_Item] = deque()
            known = {(r.variant_id, r.case_id, r.key, r.call_sha256): r for r in done if r.ok}
            for item in items:
                error = failed.get(item.variant_id)
                if error is not None:
                    yield self._counted(_not_run(item, error))
                    continue
                item.environment = environments[item.variant_id]
                earlier = known.get(
                    (item.variant_id, item.case.id, item.environment["key"], item.call_sha256)
                )
                if earlier is not None:
                    yield self._counted(earlier)
                else:
                    waiting.append(item)
            warm: list[str] = []
            while waiting or flight.items:
                if self._cancelled.is_set():
                    break
                while waiting and len(flight.items) < self._max_pending:
                    following = flight.next_of(waiting, warm)
                    if following is None:
                        break
                    waiting.remove(following)
                    try:
                        flight.launch(following)
                    except RayEnvsError as exc:
                        yield self._counted(_not_run(following, exc))
                self._in_progress = len(flight.items)
                warm = []
                for item, result in flight.ended():
                    warm.append(item.environment["key"])
                    if result is None:
                        waiting.appendleft(item)
                    else:
                        yield self._counted(result)
            is_over = not self._cancelled.is_set()
        finally:
            flight.cancel()
            self._in_progress = 0
            self._ended = time.monotonic()
            if not is_over:
                self._state = BatchState.CANCELLED
            elif self._failed == self._total:
                self._state = BatchState.FAILED
            else:
                self._state = BatchState.COMPLETED

    def _fetched(
        self,
        items: list[_Item],
        prefix: str,
        failed: dict[str, RayEnvsError],
        on_status: Callable[[Statuses], None] | None,
    ) -> dict[str, dict[str, Any]]:
        """The environment of each variant; what keeps one from being ready goes into `failed`."""
        names = [n for n in dict.fromkeys(i.variant_id for i in items) if n not in failed]
        environments: dict[str, dict[str, Any]] = {}
        if names:
            try:
                self._provider.prepare(
                    *(prefix + name for name in names), strict=False, on_status=on_status
                )
            except RayEnvsError as exc:
                if exc.variant_id.removeprefix(prefix) not in names:
                    raise
        for name in names:
            try:
                environments[name] = self._provider.environment(prefix + name, prepare=False)
            except RayEnvsError as exc:
                failed[name] = exc
        return environments

    def _counted(self, result: ItemResult) -> ItemResult:
        if result.ok:
            self._completed += 1
        else:
            self._failed += 1
        return result

    # -- watching and ending -------------------------------------------------------------------

    def status(self) -> BatchState:
        """What the batch is."""
        return self._state

    def progress(self) -> Progress:
        """How many items have ended, run and wait, and how long the rest may take."""
        over = self._completed + self._failed
        is_running = self._state is BatchState.RUNNING
        end = time.monotonic() if is_running or not self._ended else self._ended
        elapsed = end - self._started if self._started else 0.0
        eta = elapsed / over * (self._total - over) if over else None
        return Progress(self._total, self._completed, self._failed, self._in_progress, elapsed, eta)

    def cancel(self) -> None:
        """End the batch: what runs is stopped, what waits is not started. From any thread."""
        self._cancelled.set()

    def shutdown(self) -> None:
        """Cancel what runs; the provider stays open, it belongs to the caller."""
        self.cancel()


class _Payload:
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
    def of(cls, function: Any, code: Path | None) -> _Payload:
        if isinstance(function, str):
            return cls(function, None, code)
        import ray

        plain = _plain(function)
        with by_value(_modules_of(plain)):
            return cls(None, ray.cloudpickle.dumps(plain), code)


class _Flight:
    """The items that Ray has: started, watched, and ended one by one."""

    def __init__(self, payload: _Payload, provider: EnvironmentProvider, prefix: str) -> None:
        self._payload = payload
        self._provider = provider
        self._prefix = prefix
        self.items: dict[Any, _Item] = {}
        self._totals = _totals()
        self._looked_at = time.monotonic()

    def next_of(self, waiting: deque[_Item], warm: list[str]) -> _Item | None:
        """The item to start now, or None where the cluster has no room for another.

        Ray gives a worker's place to another environment after half a second and soon ends the
        worker, so that items handed over all at once start the same environment again and again.
        Here an item follows the one that ended in its environment (`warm`), and only as many are
        handed over as can run.
        """
        by_key: dict[str, _Item] = {}
        for item in waiting:
            by_key.setdefault(item.environment["key"], item)
        busy = [item.environment["key"] for item in self.items.values()]
        order = [key for key in warm if key in by_key]
        order += sorted(by_key, key=busy.count)  # stable: in the order of the batch
        item = by_key[order[0]]
        if self.items and self._is_able(item) and not self._has_room(item):
            return None
        if warm and order[0] in warm:
            warm.remove(order[0])
        return item

    def _is_able(self, item: _Item) -> bool:
        """Whether any node could run the item at all; `launch` says why none can."""
        wanted = _wanted(item.limits)
        return any(_has_all(node, wanted) for node in self._totals.values())

    def _has_room(self, item: _Item) -> bool:
        for name in _RESOURCES:
            wanted = _wanted(item.limits)[name]
            used = sum(_wanted(other.limits)[name] for other in self.items.values())
            total = sum(node.get(name, 0) for node in self._totals.values())
            if wanted and used + wanted > total:
                return False
        return True

    def launch(self, item: _Item) -> None:
        """Hand one item to Ray, in its variant's environment on a node where that is ready.

        Raises:
            RayEnvsError: no node can run it.
        """
        if item.attempts:
            item.environment = self._provider.environment(self._prefix + item.variant_id)
        environment, limits = item.environment, item.limits
        nodes = _able_nodes(
            environment["ready_nodes"], self._totals, _wanted(limits), item.variant_id
        )
        options = placement.options(
            environment["runtime_env"],
            nodes,
            {
                "num_cpus": limits.num_cpus,
                "num_gpus": limits.num_gpus,
                "memory": limits.memory,
                "num_returns": "streaming",
                "max_retries": 0,
                "name": f"{item.variant_id}:{item.case.id}",
            },
            variant_id=item.variant_id,
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
        item.began = item.outcome = item.deadline = None
        self.items[
            payload.task.options(**options).remote(request, payload.function, payload.code)
        ] = item

    def ended(self) -> Iterator[tuple[_Item, ItemResult | None]]:
        """Wait a moment; the items that ended, each with its result, or None to start it again."""
        import ray

        if not self.items:
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

    def _advance(self, stream: Any, item: _Item) -> tuple[ItemResult | None] | None:
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
            return self._again_or(item, type(exc).__name__, str(exc))
        except exceptions.RayTaskError as exc:
            return (_broken(item, type(exc.cause).__name__, str(exc.cause), str(exc)),)
        except Exception as exc:
            return (_broken(item, type(exc).__name__, str(exc)),)

    @staticmethod
    def _again_or(item: _Item, kind: str, message: str) -> tuple[ItemResult | None]:
        """Start a lost item again; when its retries are used up, that is its result."""
        if item.attempts <= item.limits.retries:
            return (None,)
        return (_broken(item, kind, message),)

    def _overdue(self) -> Iterator[tuple[_Item, ItemResult | None]]:
        now = time.monotonic()
        for stream, item in list(self.items.items()):
            if item.deadline is not None and now > item.deadline:
                self._end(stream)
                yield (
                    item,
                    _broken(item, "ItemTimeout", f"did not end within {item.limits.timeout_s:g} s"),
                )

    def _stranded(self) -> Iterator[tuple[_Item, ItemResult | None]]:
        """Items that wait for nodes that are all dead: Ray would let them wait for ever."""
        now = time.monotonic()
        if now - self._looked_at < _WATCHDOG_S:
            return
        self._looked_at = now
        self._totals = _totals()
        alive = set(self._totals)
        for stream, item in list(self.items.items()):
            if item.began is None and not alive & set(item.nodes):
                self._end(stream)
                yield item, None

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


def _totals() -> dict[str, dict[str, float]]:
    """What each live node has in all, by node id."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _wanted(limits: RunDefaults) -> dict[str, float]:
    return {"CPU": limits.num_cpus, "GPU": limits.num_gpus, "memory": limits.memory or 0}


def _has_all(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in wanted.items())


def _able_nodes(
    ready: Sequence[str],
    totals: Mapping[str, Mapping[str, float]],
    wanted: Mapping[str, float],
    variant_id: str,
) -> list[str]:
    """Those of the ready nodes that have enough of everything, were they idle."""
    able = [node_id for node_id in ready if node_id in totals and _has_all(totals[node_id], wanted)]
    if ready and not able:
        needs = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
        raise NoEligibleNode(
            f"no node with the environment of {variant_id!r} has {needs}",
            variant_id=variant_id,
            hint="ask for less, or add such a node to the cluster",
        )
    return able


def _case(case: Sequence[Any] | Mapping[str, Any] | CaseSpec, number: int) -> CaseSpec:
    if isinstance(case, CaseSpec):
        return case
    if isinstance(case, Mapping):
        return CaseSpec(id=f"case-{number}", kwargs=dict(case))
    if isinstance(case, str):
        raise InvalidInput(f"case {number} is the string {case!r}", hint="give a list of arguments")
    return CaseSpec(id=f"case-{number}", args=tuple(case))


def _limits(defaults: RunDefaults, variant: Any) -> RunDefaults:
    own = {name: getattr(variant, name) for name in RunDefaults.model_fields}
    return defaults.model_copy(update={k: v for k, v in own.items() if v is not None})


def _call_sha256(function: Any, case: CaseSpec) -> str | None:
    """A hash of what is called with what; None where the arguments are not JSON."""
    name = function if isinstance(function, str) else getattr(function, "__qualname__", "")
    try:
        text = json.dumps([name, list(case.args), case.kwargs], sort_keys=True)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _result(item: _Item, value: Any) -> ItemResult:
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


def _broken(item: _Item, kind: str, message: str, traceback: str = "") -> ItemResult:
    began = (item.began or {}).get("started_at")
    return _filled(
        item,
        ok=False,
        error=ErrorInfo(type=kind, message=message.strip(), traceback=traceback),
        duration_s=round(time.time() - began, 6) if began else 0.0,
    )


def _not_run(item: _Item, error: RayEnvsError) -> ItemResult:
    return _filled(item, ok=False, error=ErrorInfo(type=type(error).__name__, message=str(error)))


def _filled(item: _Item, **fields: Any) -> ItemResult:
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


def _plain(function: Any) -> Any:
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
