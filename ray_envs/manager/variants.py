"""The variants in the manager's memory: their definitions, and what is being done about them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from ray_envs.errors import NotFound, RayEnvsError, StorageFailed
from ray_envs.manager.demand import Wishes
from ray_envs.manager.registry import Registry
from ray_envs.models import EnvId, Generation, VariantRecord
from ray_envs.settings import Settings


@dataclass(eq=False)
class Variants:
    """The defined variants by name, and the environments that are wanted."""

    _settings: Settings
    _registry: Registry
    wishes: Wishes

    by_name: dict[str, VariantRecord] = field(default_factory=dict, init=False)
    _stamps: dict[str, int] = field(default_factory=dict, init=False)
    #: The folders of definitions that cannot be read.
    damaged: set[str] = field(default_factory=set, init=False)
    #: Generations that are prepared beside the current one, by variant.
    staged: dict[str, Generation] = field(default_factory=dict, init=False)
    #: The name of the operation that changes a variant now, by variant.
    changing: dict[str, str] = field(default_factory=dict, init=False)
    #: Variants that are being locked again, since their current generation cannot run here.
    relocking: dict[str, asyncio.Task[Any]] = field(default_factory=dict, init=False)
    relock_errors: dict[str, RayEnvsError] = field(default_factory=dict, init=False)

    def get(self, name: str) -> VariantRecord:
        """The variant, as the registry has it now.

        Raises:
            NotFound: it is not defined.
            StorageFailed: it cannot be read.
        """
        record = self.by_name.get(name)
        env_id = EnvId.parse(name) if record is None else record.env_id
        if record is None or self._registry.stamp(env_id) != self._stamps.get(env_id.folder):
            record = self._registry.get(env_id)
            if record is None:
                self.forget(env_id)
                raise NotFound(
                    f"no variant {name!r} is defined under {self._settings.root}",
                    variant_id=name,
                    hint="`ray-envs list` shows the defined ones, `ray-envs create` makes one",
                )
            self.remember(record)
        return record

    def remember(self, record: VariantRecord) -> None:
        self.by_name[str(record.env_id)] = record
        self._stamps[record.env_id.folder] = self._registry.stamp(record.env_id)

    def forget(self, env_id: EnvId) -> None:
        """Remove a variant, and the wish for its environment unless another variant has it."""
        record = self.by_name.pop(str(env_id), None)
        self._stamps.pop(env_id.folder, None)
        if record is not None:
            self.unwant(record.current.key)

    def reload(self) -> bool:
        """Read what other processes changed in the registry; returns whether anything did."""
        now = self._registry.stamps()
        if now == self._stamps:
            return False
        folders = {record.env_id.folder: record for record in self.by_name.values()}
        for folder in self._stamps.keys() - now.keys():
            if folder in folders:
                self.forget(folders[folder].env_id)
        for folder, stamp in now.items():
            if self._stamps.get(folder) != stamp:
                self.damaged.discard(folder)
                try:
                    record = self._registry.read(folder)
                    if record is not None and record.env_id.folder == folder:
                        self.by_name[str(record.env_id)] = record
                except StorageFailed:  # the other variants can be used all the same
                    self.damaged.add(folder)
                self._stamps[folder] = stamp
        self.damaged &= now.keys()
        return True

    def known(self, fingerprint: str) -> VariantRecord | None:
        """A variant whose current lock came from `fingerprint`."""
        for record in self.by_name.values():
            if record.current.fingerprint == fingerprint:
                return record
        return None

    def sharing(self, key: str) -> list[str]:
        """The variants whose current generation, or the one being prepared, has this key."""
        names = {n for n, record in self.by_name.items() if record.current.key == key}
        return sorted(names | {n for n, gen in self.staged.items() if gen.key == key})

    def unwant(self, key: str) -> None:
        """Stop wanting `key`, unless a variant has it."""
        if not self.sharing(key):
            self.wishes.drop(key)
