"""The verbs of a variant's whole life, as a program calls them; `provider` has them all.

Thin: each is one verb of the EnvManager, with the time-out that suits it. Answers are plain data.
"""

from __future__ import annotations

import sys
import threading
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray_envs.client.connection import VERB_TIMEOUT_S
from ray_envs.settings import Settings

Answer = dict[str, Any]
Packages = Iterable[str] | str

#: How long one long-poll for events lasts: short enough that the end of a subscription is noticed.
_POLL_S = 2.0


class Lifecycle(ABC):
    """What can be done with a variant besides running in it."""

    _settings: Settings
    #: Set by `close`: a subscription then ends without a word.
    _is_closed: bool = False

    @abstractmethod
    def _call(self, verb: str, *, within_s: float = VERB_TIMEOUT_S, **arguments: Any) -> Any:
        """What `EnvManager.<verb>` answers."""

    @abstractmethod
    def _address(self, variant_id: str) -> str:
        """The address of a variant, by the name that our callers gave it."""

    # -- changing ---------------------------------------------------------------------------

    def add(self, variant_id: str, packages: Packages, *, dry_run: bool = False) -> Answer:
        """Add packages as a new generation, which is prepared before it becomes current.

        Args:
            variant_id: the variant.
            packages: requirements, or a requirements text.
            dry_run: only say what would change.

        Returns:
            The status, `diff` (added, removed, changed packages), `operation_id`, `stdout`,
            `stderr`, `exit_code`, `duration_s`.

        Raises:
            NotFound: the variant is not defined.
            InvalidPackages: none are given, or one cannot be accepted.
            ResolutionFailed: nothing satisfies them; the current generation is as it was.
        """
        return self._edit("add_deps", variant_id, packages=_plain(packages), dry_run=dry_run)

    def update(self, variant_id: str, packages: Packages = (), *, dry_run: bool = False) -> Answer:
        """Upgrade the named packages within what is declared, or all; see `add`."""
        return self._edit("update_deps", variant_id, packages=_plain(packages), dry_run=dry_run)

    def remove(self, variant_id: str, packages: Packages, *, dry_run: bool = False) -> Answer:
        """Remove declared packages, and what only they needed; see `add`."""
        return self._edit("remove_deps", variant_id, packages=_plain(packages), dry_run=dry_run)

    def sync(self, variant_id: str, *, dry_run: bool = False) -> Answer:
        """Make every node match the lock: check, mend, build; see `EnvManager.sync_env`."""
        return self._change("sync_env", variant_id, dry_run=dry_run)

    def rollback(self, variant_id: str, to: int | None = None, *, dry_run: bool = False) -> Answer:
        """Make the previous generation, or generation `to`, the current one.

        Raises:
            InvalidInput: there is none, or it was locked for another cluster.
        """
        return self._edit("rollback_env", variant_id, to=to, dry_run=dry_run)

    def import_project(
        self,
        variant_id: str,
        *,
        pyproject: str,
        uv_lock: str,
        options: Mapping[str, Any] | None = None,
        replace: bool = False,
        wait_s: float = 0,
        dry_run: bool = False,
    ) -> Answer:
        """The way back from `export`: the same lock, byte for byte, and the same key."""
        return self._change(
            "import_env",
            variant_id,
            pyproject=pyproject,
            uv_lock=uv_lock,
            options=dict(options or {}),
            replace=replace,
            wait_s=wait_s,
            dry_run=dry_run,
        )

    def pin(self, variant_id: str, *, is_pinned: bool = True) -> Answer:
        """Keep every environment of a variant from being collected, or allow it again."""
        return self._change("pin_env", variant_id, is_pinned=is_pinned)

    def gc(
        self,
        *,
        idle_hours: float | None = None,
        dry_run: bool = False,
        include_current: bool = False,
    ) -> Answer:
        """Collect environments that nobody wants, holds or was promised.

        Returns:
            `deleted` and `kept`, each with its reason, and `freed_bytes`.
        """
        answer: Answer = self._call(
            "cleanup",
            within_s=self._patience_s(),
            idle_hours=idle_hours,
            dry_run=dry_run,
            include_current=include_current,
        )
        return answer

    def doctor(self, *, repair: bool = False, variant_id: str | None = None) -> Answer:
        """Examine every node and environment, and mend what is damaged where that is wanted."""
        name = None if variant_id is None else self._address(variant_id)
        answer: Answer = self._call(
            "doctor", within_s=self._patience_s(), repair=repair, variant_id=name
        )
        return answer

    # -- reading ----------------------------------------------------------------------------

    def deps(self, variant_id: str) -> Answer:
        """`dependencies` as declared, and `locked_versions`."""
        return self._read("list_deps", variant_id)

    def generations(self, variant_id: str) -> list[Answer]:
        """Every generation, oldest first, with what it changed."""
        found: list[Answer] = self._call("list_generations", variant_id=self._address(variant_id))
        return found

    def diff(self, variant_id: str, from_: int, to: int | None = None) -> Answer:
        """The packages that differ between two generations."""
        return self._read("diff_env", variant_id, from_=from_, to=to)

    def export(
        self, variant_id: str, format: str = "project", *, generation: int | None = None
    ) -> Answer:
        """A generation as `files`: texts by name; see `EnvManager.export_env`."""
        return self._read("export_env", variant_id, format=format, generation=generation)

    def explain(self, variant_id: str) -> Answer:
        """Why a variant is as it is; see `EnvManager.explain`."""
        return self._read("explain", variant_id)

    def operations(self, **filters: Any) -> Answer:
        """The operations that match, newest first; see `EnvManager.get_operations`."""
        answer: Answer = self._call("get_operations", **filters)
        return answer

    def delete_operations(self, **filters: Any) -> int:
        """Delete operations that have ended and match; see `EnvManager.delete_operations`."""
        return int(self._call("delete_operations", **filters)["deleted"])

    def events(
        self,
        since: int = 0,
        *,
        kinds: Iterable[str] = (),
        variant_id: str | None = None,
        timeout_s: float = 0,
    ) -> Answer:
        """`events` after number `since`, and `next`; see `EnvManager.events`."""
        answer: Answer = self._call(
            "events",
            since=since,
            kinds=list(kinds),
            variant_id=None if variant_id is None else self._address(variant_id),
            timeout_s=timeout_s,
        )
        return answer

    def subscribe(
        self, handler: Callable[[Answer], None], *, kinds: Iterable[str] = ()
    ) -> Callable[[], None]:
        """Call `handler` with each event from now on, in order, in a thread of its own.

        A handler that raises hurts nobody: its traceback is printed, and the next event comes.

        Returns:
            A function that ends the subscription.
        """
        wanted, is_over = list(kinds), threading.Event()
        position = self.events(since=-1)["next"]

        def follow() -> None:
            nonlocal position
            while not is_over.is_set():
                try:
                    told = self.events(position, kinds=wanted, timeout_s=_POLL_S)
                except Exception as exc:  # closed, or gone for good: the door has tried again
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
                thread.join(2 * _POLL_S)

        return end

    # -- shared -----------------------------------------------------------------------------

    def _change(self, verb: str, variant_id: str, **arguments: Any) -> Answer:
        answer: Answer = self._call(
            verb,
            within_s=self._patience_s(),
            variant_id=self._address(variant_id),
            **arguments,
        )
        return answer

    def _edit(self, verb: str, variant_id: str, **arguments: Any) -> Answer:
        """A change that must not be done twice, although a lost answer makes the door ask again."""
        return self._change(verb, variant_id, operation_id=uuid.uuid4().hex, **arguments)

    def _read(self, verb: str, variant_id: str, **arguments: Any) -> Answer:
        answer: Answer = self._call(verb, variant_id=self._address(variant_id), **arguments)
        return answer

    def _patience_s(self) -> float:
        """How long a change may take: whoever is first, the resolution, and the builds."""
        settings = self._settings
        return settings.lock_timeout_s + settings.uv_lock_timeout_s + settings.prepare_timeout_s


def _plain(packages: Packages) -> list[str] | str:
    return packages if isinstance(packages, str) else list(packages)
