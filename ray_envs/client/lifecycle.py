"""The verbs of a variant's whole life as typed methods. `provider` has them all.

Each asks for one verb of `verbs`, which holds the defaults and the limits. Answers are plain data.
"""

from __future__ import annotations

import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray_envs import verbs
from ray_envs.validation import check_is
from ray_envs.verbs import DEFAULT

Answer = dict[str, Any]
Packages = Iterable[str] | str

#: How long one long-poll lasts, in seconds: Ctrl-C and the end of a subscription are noticed soon.
POLL_S = 2.0


class Lifecycle(ABC):
    """What can be done with a variant besides running in it."""

    #: Set by `close`: a subscription then ends silently.
    _is_closed: bool = False

    @abstractmethod
    def ask(self, request: verbs.Request) -> Any:
        """The answer of the EnvManager to a request."""

    @abstractmethod
    def _address(self, variant_id: str) -> str:
        """The full id of a variant, for the id that the caller uses."""

    def add(self, variant_id: str, packages: Packages, *, dry_run: bool = DEFAULT) -> Answer:
        """Add packages as a new generation, which is prepared before it becomes current.

        Returns:
            The status, `diff` (added, removed, changed packages), `operation_id`, `stdout`,
            `stderr`, `exit_code`, `duration_s`.

        Raises:
            NotFound: the variant is not defined.
            InvalidPackages: no package is given, or one cannot be accepted.
            ResolutionFailed: no versions satisfy them; the current generation stays.
        """
        return self._ask(verbs.AddDeps, variant_id, packages=packages, dry_run=dry_run)

    def update(
        self, variant_id: str, packages: Packages = DEFAULT, *, dry_run: bool = DEFAULT
    ) -> Answer:
        """Upgrade the named packages, or all, within what is declared; see `add`."""
        return self._ask(verbs.UpdateDeps, variant_id, packages=packages, dry_run=dry_run)

    def remove(self, variant_id: str, packages: Packages, *, dry_run: bool = DEFAULT) -> Answer:
        """Remove declared packages and what only they needed; see `add`."""
        return self._ask(verbs.RemoveDeps, variant_id, packages=packages, dry_run=dry_run)

    def sync(self, variant_id: str, *, dry_run: bool = DEFAULT) -> Answer:
        """Make every node match the variant's lock: check each file, repair, build.

        Returns the status and `checks`, what was found on each node.
        """
        return self._ask(verbs.SyncEnv, variant_id, dry_run=dry_run)

    def rollback(
        self, variant_id: str, to: int | None = DEFAULT, *, dry_run: bool = DEFAULT
    ) -> Answer:
        """Make the previous generation, or generation `to`, the current one.

        Raises `InvalidInput`: there is no such generation, or it is of another cluster.
        """
        return self._ask(verbs.RollbackEnv, variant_id, to=to, dry_run=dry_run)

    def import_project(
        self,
        variant_id: str,
        *,
        pyproject: str,
        uv_lock: str,
        options: Mapping[str, Any] = DEFAULT,
        wheels: Mapping[str, bytes] = DEFAULT,
        replace: bool = DEFAULT,
        wait_s: float = DEFAULT,
        dry_run: bool = DEFAULT,
    ) -> Answer:
        """Define a variant from an `export`: the same lock, byte for byte, and the same key."""
        return self._ask(
            verbs.ImportEnv,
            variant_id,
            pyproject=pyproject,
            uv_lock=uv_lock,
            options=options,
            wheels=wheels,
            replace=replace,
            wait_s=wait_s,
            dry_run=dry_run,
        )

    def pin(self, variant_id: str, *, is_pinned: bool = DEFAULT) -> Answer:
        """Keep every environment of a variant from being collected, or allow it again."""
        return self._ask(verbs.PinEnv, variant_id, is_pinned=is_pinned)

    def gc(
        self,
        *,
        idle_hours: float | None = DEFAULT,
        dry_run: bool = DEFAULT,
        include_current: bool = DEFAULT,
    ) -> Answer:
        """Delete unused environments on every node.

        `include_current` adds those of current generations, which are built again on demand.
        Returns `deleted` and `kept`, each environment with its reason, and `freed_bytes`.
        """
        return self._ask(
            verbs.Cleanup, idle_hours=idle_hours, dry_run=dry_run, include_current=include_current
        )

    def doctor(self, *, repair: bool = DEFAULT, variant_id: str | None = None) -> Answer:
        """Examine every node and environment; with `repair`, repair what is damaged."""
        return self._ask(verbs.Doctor, variant_id, repair=repair)

    def deps(self, variant_id: str) -> Answer:
        """`dependencies` as declared, and `locked_versions`."""
        return self._ask(verbs.ListDeps, variant_id)

    def generations(self, variant_id: str) -> list[Answer]:
        """Every generation, oldest first, with the packages that it changed."""
        found: list[Answer] = self.ask(verbs.ListGenerations(variant_id=self._address(variant_id)))
        return found

    def diff(self, variant_id: str, from_: int, to: int | None = DEFAULT) -> Answer:
        """The packages that differ between two generations; `to` is by default the current one."""
        return self._ask(verbs.DiffEnv, variant_id, from_=from_, to=to)

    def export(
        self, variant_id: str, format: str = DEFAULT, *, generation: int | None = DEFAULT
    ) -> Answer:
        """A generation as `files`, texts by name; `format` is project, requirements or pylock."""
        return self._ask(verbs.ExportEnv, variant_id, format=format, generation=generation)

    def explain(self, variant_id: str) -> Answer:
        """The state of a variant on each node with its reason, its users, and what gc does."""
        return self._ask(verbs.Explain, variant_id)

    def operations(self, **filters: Any) -> Answer:
        """The operations that match, newest first, as `rows`; see `verbs.GetOperations`."""
        return self._ask(verbs.GetOperations, **filters)

    def delete_operations(self, **filters: Any) -> int:
        """Delete operations that have ended and match; see `verbs.DeleteOperations`."""
        return int(self._ask(verbs.DeleteOperations, **filters)["deleted"])

    def events(
        self,
        since: int = DEFAULT,
        *,
        kinds: Iterable[str] = DEFAULT,
        variant_id: str | None = None,
        timeout_s: float = DEFAULT,
    ) -> Answer:
        """`events` after number `since`, and `next`, the `since` of the next call."""
        return self._ask(verbs.Events, variant_id, since=since, kinds=kinds, timeout_s=timeout_s)

    def subscribe(
        self, handler: Callable[[Answer], None], *, kinds: Iterable[str] = ()
    ) -> Callable[[], None]:
        """Call `handler` with each event from now on, in order, in a thread of its own.

        If a handler raises, its traceback is printed, and it gets the next event.

        Returns a function that ends the subscription.
        """
        check_is(handler, Callable, where="handler of subscribe()", hint="give a function")
        wanted = verbs.request_of(verbs.Events, {"kinds": kinds}).kinds
        is_over = threading.Event()
        position = self.events(since=-1)["next"]

        def follow() -> None:
            nonlocal position
            while not is_over.is_set():
                try:
                    told = self.events(position, kinds=wanted, timeout_s=POLL_S)
                except Exception as exc:  # closed, or no manager any more
                    if not self._is_closed:
                        print(f"ray_envs: no more events: {exc}", file=sys.stderr)
                    return
                position = told["next"]
                for event in told["events"]:
                    try:
                        handler(event)
                    except Exception:
                        traceback.print_exc()

        thread = threading.Thread(target=follow, daemon=True, name="ray_envs events")
        thread.start()

        def end() -> None:
            is_over.set()
            if thread is not threading.current_thread():
                thread.join(2 * POLL_S)

        return end

    def _ask(
        self, kind: type[verbs.Request], variant_id: str | None = None, **arguments: Any
    ) -> Answer:
        """Ask for a verb; a variant is addressed by the id that the caller uses."""
        if variant_id is not None:
            arguments["variant_id"] = self._address(variant_id)
        answer: Answer = self.ask(verbs.request_of(kind, arguments))
        return answer
