"""From a definition to a generation: checks, uv's resolution, and the key. Writes nothing.

uv runs on the head node's agent. Equal resolutions share one run of uv, or reuse a known lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import distributions
from typing import Any

from packaging.utils import canonicalize_name

from ray_envs.decisions import edits, locks, policy, requirements, resolving
from ray_envs.disk import local_wheels
from ray_envs.errors import RayEnvsError, ResolutionFailed, StorageFailed
from ray_envs.manager.fleet import Fleet
from ray_envs.manager.registry import Registry
from ray_envs.models import Generation, Platform, Target, VariantRecord
from ray_envs.node.interpreter import index_settings
from ray_envs.settings import Settings
from ray_envs.specs import Definition
from ray_envs.validation import validated

#: The operations whose lock must keep every pin of the user's own uv.lock.
_KEEPS_PINS = ("create", "import")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A generation that is not written yet, with its texts."""

    generation: Generation
    pyproject: str
    uv_lock: str
    #: uv's output; empty if a known lock was used.
    output: str = ""
    #: The variant whose lock was used again, if one was.
    same_lock: VariantRecord | None = None


@dataclass(eq=False)
class Resolver:
    """Makes generations for one cluster."""

    _settings: Settings
    _registry: Registry
    _fleet: Fleet
    _platform: Platform
    _target: Target
    _known: Callable[[str], VariantRecord | None]

    _resolving: dict[str, asyncio.Task[tuple[str, str]]] = field(default_factory=dict, init=False)

    def checked(self, spec: Mapping[str, Any], *, where: str) -> Definition:
        """`spec` as a definition that may be locked here.

        Raises `InvalidInput, InvalidPackages`: it cannot be accepted, or the policy forbids it.
        """
        definition = validated(Definition, dict(spec), where=where)
        packages = requirements.requirement_lines(definition.packages, where=where)
        if definition.inherit_versions:
            packages = edits.inherited(packages, _versions_here())
        requirements.check_python(definition.python, self._target, where=where)
        if definition.uv_lock is not None:
            locks.check_lock(definition.uv_lock)
        definition = definition.model_copy(update={"packages": packages})
        return policy.check_definition(definition, self._settings, where=where)

    def fits(self, generation: Generation) -> bool:
        """Whether a generation was locked for the Ray, Python and platform of this cluster."""
        return generation.target == self._target and generation.platform == self._platform.name

    async def resolve(
        self,
        definition: Definition,
        *,
        number: int,
        made_by: str,
        base_lock: str | None = None,
        upgrade: Iterable[str] | None = None,
    ) -> Resolved:
        """Lock `definition` for this cluster.

        Args:
            definition: a result of `checked`.
            number: of the generation.
            made_by: the operation.
            base_lock: the lock whose pins are kept where they can be; by default the user's own.
            upgrade: names whose pins may move; an empty one means all; None keeps all pins.

        Raises:
            ResolutionFailed: no versions satisfy it, or pins of the user's lock would have to move.
            UvFailed, StorageFailed: uv could not work.
            InvalidPackages: the policy forbids what uv found, or a file has another hash.
        """
        lost = local_wheels.missing(self._settings.root, definition.wheels)
        if lost:
            raise StorageFailed(
                f"the head has lost the local package {lost[0].filename}",
                hint="create the variant again from its files, or import its export",
            )
        project = resolving.project_text(definition, self._target)
        base = definition.uv_lock if base_lock is None else base_lock
        names = None if upgrade is None else tuple(upgrade)
        fingerprint = resolving.fingerprint(
            project,
            base if names is None else f"upgrade {names}\n{base}",
            definition,
            self._target,
            index_settings=index_settings(),
        )
        known = None if names is not None else self._with_lock_of(fingerprint)
        if known is None:
            same_lock = None
            uv_lock, output = await self._shared(fingerprint, project, base, definition, names)
        else:
            (same_lock, uv_lock), output = known, ""
        policy.check_lock(
            uv_lock, self._settings, only_binary=definition.only_binary, wheels=definition.wheels
        )
        locks.check_hashes(
            uv_lock,
            self._platform,
            definition.hashes,
            extras=definition.extras,
            groups=definition.groups,
        )
        if made_by in _KEEPS_PINS:
            self._check_pins(definition, uv_lock)
        generation = self._generation(definition, project, uv_lock, fingerprint, number, made_by)
        return Resolved(generation, project, uv_lock, output, same_lock)

    def _generation(
        self,
        definition: Definition,
        project: str,
        uv_lock: str,
        fingerprint: str,
        number: int,
        made_by: str,
    ) -> Generation:
        packages = locks.installed(
            uv_lock, self._platform, extras=definition.extras, groups=definition.groups
        )
        return Generation(
            number=number,
            definition=definition,
            made_by=made_by,
            key=locks.key_of(
                packages,
                self._target,
                self._platform,
                build_options=resolving.build_options(project),
            ),
            lock_sha256=locks.lock_sha256(uv_lock),
            fingerprint=fingerprint,
            target=self._target,
            platform=self._platform.name,
            created_at=datetime.now(timezone.utc),
            packages={package.name: package.version for package in packages},
        )

    def _check_pins(self, definition: Definition, uv_lock: str) -> None:
        if definition.uv_lock is None or definition.allow_moved_pins:
            return
        local = {wheel.name for wheel in definition.wheels}
        moved = locks.moved_pins(definition.uv_lock, uv_lock, self._platform, ignored=local)
        if moved:
            raise ResolutionFailed(
                f"with ray {self._target.ray} in it, the project moves pins of its uv.lock",
                detail="\n".join(moved),
                hint="lock the project with this ray in it, or set allow_moved_pins = true",
            )

    def _with_lock_of(self, fingerprint: str) -> tuple[VariantRecord, str] | None:
        """A variant that was locked from the same fingerprint, and the text of its lock."""
        record = self._known(fingerprint)
        if record is not None:
            with suppress(RayEnvsError):
                text = self._registry.lock_text(record.env_id, record.current.number)[1]
                if locks.lock_sha256(text) == record.current.lock_sha256:
                    return record, text
        return None

    async def _shared(
        self,
        fingerprint: str,
        project: str,
        base: str | None,
        definition: Definition,
        upgrade: tuple[str, ...] | None,
    ) -> tuple[str, str]:
        """uv's lock and words; equal questions at once share one uv."""
        task = self._resolving.get(fingerprint)
        if task is None:
            task = asyncio.create_task(self._ask_uv(project, base, definition, upgrade))
            self._resolving[fingerprint] = task
            task.add_done_callback(lambda _: self._resolving.pop(fingerprint, None))
        return await asyncio.shield(task)

    async def _ask_uv(
        self,
        project: str,
        base: str | None,
        definition: Definition,
        upgrade: tuple[str, ...] | None,
    ) -> tuple[str, str]:
        answer = await self._fleet.head().call(
            "lock",
            pyproject=project,
            uv_lock=base,
            exclude_newer=definition.exclude_newer,
            only_binary=definition.only_binary,
            upgrade=None if upgrade is None else list(upgrade),
        )
        return str(answer["uv_lock"]), str(answer["output"])


def _versions_here() -> dict[str, str]:
    """The versions of the cluster's own environment, by name."""
    return {
        str(canonicalize_name(found.metadata["Name"])): found.version
        for found in distributions()
        if found.metadata["Name"]
    }
