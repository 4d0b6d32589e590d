"""Which environments are wanted on the cluster's nodes, and how often each was asked for.

Verbs record wishes, and the loop of `reconciler` fulfils them. They are kept on disk, so that nodes
get them also after a restart of the manager.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field, ValidationError

from ray_envs.disk.files import write_atomically
from ray_envs.models import Key
from ray_envs.validation import Model


class _Kept(Model):
    """What the file holds."""

    wanted: tuple[Key, ...] = ()
    attempts: dict[Key, int] = Field(default_factory=dict)
    epochs: dict[Key, int] = Field(default_factory=dict)


class Wishes:
    """The wishes of one cluster, by environment key.

    One manager of a root writes the file: the one that serves the root.
    """

    def __init__(self, path: Path | None, *, is_writer: bool = True) -> None:
        self._path = path
        self._is_writer = is_writer
        self._wanted: set[str] = set()
        self._attempts: dict[str, int] = {}
        #: Also of keys that are not wanted now.
        self._epochs: dict[str, int] = {}
        #: Rises with every change.
        self.version = 0
        self._is_held = False

    def load(self) -> None:
        """Read the wishes of the manager before this one; a damaged file counts as empty."""
        if self._path is not None:
            with suppress(OSError, ValidationError):
                kept = _Kept.model_validate_json(self._path.read_bytes())
                self._wanted |= set(kept.wanted)
                self._attempts = {**kept.attempts, **self._attempts}
                self._epochs = {**kept.epochs, **self._epochs}

    def write_from_now(self) -> None:
        """Become the writer of the file: the manager that was it has ended."""
        if not self._is_writer:
            self._is_writer = True
            self.load()
            self._keep()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """The changes in the block are written together."""
        before, self._is_held = self.version, True
        try:
            yield
        finally:
            self._is_held = False
            if self.version != before:
                self._keep()

    def __contains__(self, key: str) -> bool:
        return key in self._wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def attempt(self, key: str) -> int:
        """How often `key` was retried after a failure, on request."""
        return self._attempts.get(key, 0)

    def epoch(self, key: str) -> int:
        """A number that changes when a node loses `key`, or has it after a failure.

        It is part of the runtime_env, since Ray caches the result of an equal runtime_env.
        """
        return self._epochs.get(key, 0)

    def want(self, key: str, *, failed: int | None = None) -> None:
        """Want `key`; with `failed`, retry it where attempts up to that number have failed."""
        if key not in self._wanted or failed is not None:
            self._wanted.add(key)
            if failed is not None:  # it may be from before this file was lost
                self._attempts[key] = max(self.attempt(key), failed) + 1
            self._write()

    def outdate(self, key: str) -> None:
        """Begin another epoch of `key`."""
        self._epochs[key] = self.epoch(key) + 1
        self._write()

    def drop(self, key: str) -> bool:
        """Stop wanting `key`; returns whether it was wanted."""
        if key not in self._wanted:
            return False
        self._wanted.discard(key)
        self._write()
        return True

    def _write(self) -> None:
        self.version += 1
        if not self._is_held:
            self._keep()

    def _keep(self) -> None:
        if self._path is not None and self._is_writer:
            kept = _Kept(
                wanted=tuple(sorted(self._wanted)), attempts=self._attempts, epochs=self._epochs
            )
            with suppress(OSError):  # a full disk: they hold as long as this process
                write_atomically(self._path, kept.model_dump_json() + "\n", is_durable=False)
