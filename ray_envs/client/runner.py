"""RayBatchRunner: runs every case in every variant's environment, and yields the results.

Runs in the user's program. An item that fails is a result, not an exception. `cli` writes and shows
results.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ray_envs.batch_models import BatchSpec, CaseSpec, ItemResult, RunDefaults
from ray_envs.client.cases import Cases, Given
from ray_envs.client.code_folder import source_sha256
from ray_envs.client.dispatch import Dispatcher
from ray_envs.client.environments import EnvironmentProvider
from ray_envs.client.item_queue import ItemQueue
from ray_envs.client.items import Item, check_key, not_run
from ray_envs.client.payload import Payload, plain_function
from ray_envs.client.statuses import Statuses
from ray_envs.client.waiting import Waiting
from ray_envs.cluster.connecting import is_client
from ray_envs.errors import InvalidInput, RayEnvsError
from ray_envs.validation import validated

_ENTRYPOINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class BatchState(str, Enum):
    """The state of a batch; the last four are final."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a batch, in items and seconds; `eta_s` is None until an item has ended.

    The total of a generator of cases grows while it is read.
    """

    total: int
    completed: int
    failed: int
    in_progress: int
    elapsed_s: float
    eta_s: float | None


class RayBatchRunner:
    """Runs one batch at a time; `run` and `run_batch` yield results as items end.

    Args:
        provider: gives the environments.
        max_pending: how many items may have been sent to workers and not ended.
    """

    def __init__(self, provider: EnvironmentProvider, *, max_pending: int = 100) -> None:
        if max_pending < 1:
            raise InvalidInput(f"max_pending is {max_pending}", hint="give at least 1")
        self._provider = provider
        self._max_pending = max_pending
        self._state = BatchState.PENDING
        self._cancelled = threading.Event()
        self._total = self._completed = self._failed = 0
        self._dispatcher: Dispatcher | None = None
        self._started = self._ended = 0.0

    def run(
        self,
        function: Any,
        *,
        variants: Sequence[str],
        cases: Iterable[Given],
        prefix: str = "",
        code: Path | None = None,
        on_status: Callable[[Statuses], None] | None = None,
        timeout_s: float | None = None,
        **limits: Any,
    ) -> Iterator[ItemResult]:
        """Call `function` with every case in every variant; yield each `ItemResult` when it ends.

        Args:
            function: a function, a Ray remote function, or an entrypoint "module:function". A
                function of your own module is sent by value: environments need not contain it.
            variants: ids of variants that were created.
            cases: positional arguments, keyword arguments, or a `CaseSpec`. A generator is read
                as the items start: it may give more than memory could keep.
            prefix: put before a variant's id to find its environment ("batch/").
            code: a folder whose modules can be imported there.
            on_status: called while environments are being prepared.
            timeout_s: the time limit of one item, in seconds from its start.
            limits: other fields of `RunDefaults`, for every item.

        Raises:
            InvalidInput: an argument cannot be accepted. Nothing was started, unless a generator
                gave a wrong case after others.
            ClusterLost: while the results are read: the cluster has ended.
        """
        if isinstance(variants, str):
            raise InvalidInput(f"variants is the string {variants!r}", hint="give a list of ids")
        given = {**limits, **({} if timeout_s is None else {"timeout_s": timeout_s})}
        defaults = validated(RunDefaults, given, where="run()")
        _check(function, variants)
        plan = _Plan(function, Cases(cases, variants), dict.fromkeys(variants, defaults))
        return self._results(plan, prefix, code, on_status)

    def run_batch(
        self,
        batch: BatchSpec,
        *,
        code: Path | None = None,
        done: Iterable[ItemResult] = (),
        keys: Mapping[str, str] | None = None,
        failed: Mapping[str, RayEnvsError] | None = None,
        on_status: Callable[[Statuses], None] | None = None,
    ) -> Iterator[ItemResult]:
        """Run a batch file whose variants were created under `<name>/<variant>`.

        Args:
            batch: the content of the batch file.
            code: the folder of the entrypoint, if it is not in the environments.
            done: earlier results; a successful one with the same key and arguments is not repeated.
            keys: the key that `create` returned for each variant. If another run has replaced the
                variant since, its items fail: they must not run in another environment.
            failed: variants that could not be created, with the error that their items get.
            on_status: called while environments are being prepared.
        """
        variants = [variant.id for variant in batch.variants]
        _check(batch.entrypoint, variants)
        plan = _Plan(
            batch.entrypoint,
            Cases(batch.cases, variants),
            {variant.id: _limits(batch.defaults, variant) for variant in batch.variants},
            None if code is None else source_sha256(code),
        )
        return self._results(
            plan, f"{batch.name}/", code, on_status, list(done), keys, dict(failed or {})
        )

    def _results(
        self,
        plan: _Plan,
        prefix: str,
        code: Path | None,
        on_status: Callable[[Statuses], None] | None,
        done: Iterable[ItemResult] = (),
        keys: Mapping[str, str] | None = None,
        failed: dict[str, RayEnvsError] | None = None,
    ) -> Iterator[ItemResult]:
        """Prepare the environments, then yield a result for each item; see `run_batch`."""
        if self._state is BatchState.RUNNING:
            raise InvalidInput("this runner is running a batch", hint="use a runner for each batch")
        dispatcher = Dispatcher(Payload(plan.function, code), self._provider, prefix)
        self._state, self._started = BatchState.RUNNING, time.monotonic()
        self._cancelled.clear()
        self._total, self._completed, self._failed = plan.total, 0, 0
        is_over = False
        try:
            plan.failed = failed or {}
            plan.environments = self._environments(plan, prefix, keys or {}, on_status)
            plan.fetched_at = time.monotonic()
            plan.done = {(r.variant_id, r.case_id, r.key, r.call_sha256): r for r in done if r.ok}
            self._dispatcher = dispatcher
            waiting = Waiting(plan.cases, plan.item_or_result, plan.keys())
            queue = ItemQueue(dispatcher, waiting, self._max_pending, self._cancelled)
            for result in queue.results():
                self._total = plan.total
                if result.ok:
                    self._completed += 1
                else:
                    self._failed += 1
                yield result
            is_over = not self._cancelled.is_set()
        finally:
            self._dispatcher = None
            dispatcher.cancel()
            self._ended = time.monotonic()
            if not is_over:
                self._state = BatchState.CANCELLED
            elif self._failed == self._total:
                self._state = BatchState.FAILED
            else:
                self._state = BatchState.COMPLETED

    def _environments(
        self,
        plan: _Plan,
        prefix: str,
        keys: Mapping[str, str],
        on_status: Callable[[Statuses], None] | None,
    ) -> dict[str, dict[str, Any]]:
        """Prepare and return the environment of each variant that is not in `plan.failed`.

        A variant whose environment cannot be prepared is added there, with the error.
        """
        names = [name for name in plan.limits if name not in plan.failed]
        environments: dict[str, dict[str, Any]] = {}
        if names:
            try:
                self._provider.prepare(
                    *(prefix + name for name in names),
                    strict=False,
                    everywhere=False,  # items start on the first ready node; others follow
                    on_status=on_status,
                )
            except RayEnvsError as exc:
                if exc.variant_id.removeprefix(prefix) not in names:
                    raise
        for name in names:
            try:
                environment = self._provider.environment(prefix + name, prepare=False)
                check_key(prefix + name, environment, keys.get(name))
                environments[name] = environment
            except RayEnvsError as exc:
                plan.failed[name] = exc
        return environments

    def status(self) -> BatchState:
        """Return the state of the batch."""
        return self._state

    def progress(self) -> Progress:
        """Return how many items have ended and are running, and how long the rest may take."""
        over = self._completed + self._failed
        is_running = self._state is BatchState.RUNNING
        end = time.monotonic() if is_running or not self._ended else self._ended
        elapsed = end - self._started if self._started else 0.0
        eta = elapsed / over * (self._total - over) if over else None
        dispatcher = self._dispatcher
        in_progress = dispatcher.pending() if dispatcher is not None else 0
        return Progress(self._total, self._completed, self._failed, in_progress, elapsed, eta)

    def cancel(self) -> None:
        """Stop the running items and start no more. May be called from any thread."""
        self._cancelled.set()

    def shutdown(self) -> None:
        """Cancel the batch. The provider stays open: it belongs to the caller."""
        self.cancel()


@dataclass
class _Plan:
    """What a batch runs: the cases, and for each variant the limits, and what is known of it."""

    function: Any
    cases: Cases
    limits: dict[str, RunDefaults]
    #: A hash of the code folder.
    source: str | None = None
    #: Variants whose items cannot run, with the error that they get.
    failed: dict[str, RayEnvsError] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    fetched_at: float = 0.0
    #: Earlier results, by variant, case, key and call.
    done: dict[tuple[str, str, str | None, str | None], ItemResult] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many items there are; of a generator, as far as it was read."""
        return self.cases.count * len(self.limits)

    def keys(self) -> dict[str, str | None]:
        """Return the key of each variant's environment; None if its items cannot run."""
        return {name: self.environments.get(name, {}).get("key") for name in self.limits}

    def item_or_result(self, name: str, number: int, case: CaseSpec) -> Item | ItemResult:
        """Return the item of a variant and a case; its result, if it needs no run."""
        call_sha256 = _call_sha256(self.function, case, self.source)
        item = Item(name, case, self.limits[name], call_sha256, number=number)
        if name in self.failed:
            return not_run(item, self.failed[name])
        item.environment, item.fetched_at = self.environments[name], self.fetched_at
        return self.done.get((name, case.id, item.key, call_sha256), item)


def _check(function: Any, variants: Sequence[str]) -> None:
    """Raise `InvalidInput` if `function` or the variants cannot be run."""
    if isinstance(function, str) and not _ENTRYPOINT.fullmatch(function):
        raise InvalidInput(f"{function!r} is no entrypoint", hint='write "module:function"')
    if not isinstance(function, str) and not callable(plain_function(function)):
        raise InvalidInput(
            f"{function!r} cannot be called", hint='give a function or "module:function"'
        )
    if is_client():
        raise InvalidInput(
            "a batch cannot run through Ray Client, which cannot stream results",
            hint="use the cluster's own address, or `ray job submit`",
        )
    for name, count in Counter(variants).items():
        if count > 1:
            raise InvalidInput(f"variant {name!r} is there twice")


def _limits(defaults: RunDefaults, variant: Any) -> RunDefaults:
    own = {name: getattr(variant, name) for name in RunDefaults.model_fields}
    return defaults.model_copy(update={k: v for k, v in own.items() if v is not None})


def _call_sha256(function: Any, case: CaseSpec, source: str | None = None) -> str | None:
    """Return a hash of function, arguments and source; None if the arguments are not JSON."""
    name = function if isinstance(function, str) else getattr(function, "__qualname__", "")
    try:
        text = json.dumps([name, list(case.args), case.kwargs, source], sort_keys=True)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()
