"""What the generations of a variant hold, for people and for other tools. Changes nothing."""

from __future__ import annotations

import json
from typing import Any

from ray_envs import changing, resolving
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.models import Generation, VariantRecord, nearest_hint
from ray_envs.reconciler import Reconciler
from ray_envs.registry import Registry

#: What an export can be, and the file that holds it; a project is several.
_FORMATS = {"project": "", "requirements": "requirements.txt", "pylock": "pylock.toml"}


class Exports:
    """The generations of one registry, shown.

    Args:
        registry: where they are.
        reconciler: which of them are ready, and the node whose uv converts locks.
    """

    def __init__(self, registry: Registry, reconciler: Reconciler) -> None:
        self._registry = registry
        self._reconciler = reconciler

    def deps(self, record: VariantRecord) -> dict[str, Any]:
        """See `EnvManager.list_deps`."""
        pyproject, _ = self._registry.lock_text(record.env_id, record.current.number)
        return {
            "variant_id": str(record.env_id),
            "generation": record.current.number,
            "dependencies": list(resolving.declared(pyproject)),
            "locked_versions": dict(record.current.packages),
        }

    def generations(self, record: VariantRecord) -> list[dict[str, Any]]:
        """See `EnvManager.list_generations`."""
        rows: list[dict[str, Any]] = []
        before: dict[str, str] = {}
        for number in record.numbers:
            is_current = number == record.current.number
            try:
                made = self._registry.generation(record.env_id, number)
            except StorageFailed as exc:  # the others are not concerned
                rows.append(
                    {"generation": number, "is_current": is_current, "error": exc.to_dict()}
                )
                continue
            rows.append(
                {
                    "generation": number,
                    "is_current": is_current,
                    "made_by": made.made_by,
                    "key": made.key,
                    "lock_sha256": made.lock_sha256,
                    "created_at": made.created_at.isoformat(),
                    "python_version": made.target.python,
                    "ray_version": made.target.ray,
                    "fits_cluster": not self._reconciler.is_stale(made),
                    "is_ready": self._reconciler.is_ready(made),
                    "diff": changing.diff(before, made.packages),
                    "error": None,
                }
            )
            before = made.packages
        return rows

    def diff(self, record: VariantRecord, from_: int, to: int | None) -> dict[str, Any]:
        """See `EnvManager.diff_env`."""
        one = self._generation(record, from_)
        other = self._generation(record, record.current.number if to is None else to)
        return {
            "variant_id": str(record.env_id),
            "from": one.number,
            "to": other.number,
            "diff": changing.diff(one.packages, other.packages),
        }

    async def export(
        self, record: VariantRecord, format: str, number: int | None
    ) -> dict[str, Any]:
        """See `EnvManager.export_env`."""
        if format not in _FORMATS:
            hint = nearest_hint(format, _FORMATS)
            raise InvalidInput(f"unknown format {format!r}", hint=hint)
        made = self._generation(record, record.current.number if number is None else number)
        pyproject, uv_lock = self._registry.lock_text(record.env_id, made.number)
        definition = made.definition
        if format == "project":
            options = definition.model_dump(
                mode="json", exclude={"packages", "pyproject", "uv_lock"}, exclude_defaults=True
            )
            files = {
                "pyproject.toml": pyproject,
                "uv.lock": uv_lock,
                "options.json": json.dumps(options, indent=1, sort_keys=True) + "\n",
            }
        else:
            text = await self._reconciler.fleet.head().call(
                "export",
                pyproject=pyproject,
                uv_lock=uv_lock,
                extras=list(definition.extras),
                groups=list(definition.groups),
                format=format,
            )
            files = {_FORMATS[format]: text}
        return {
            "variant_id": str(record.env_id),
            "generation": made.number,
            "key": made.key,
            "lock_sha256": made.lock_sha256,
            "files": files,
        }

    def _generation(self, record: VariantRecord, number: int) -> Generation:
        if number not in record.numbers:
            known = ", ".join(map(str, record.numbers))
            raise InvalidInput(
                f"variant {record.env_id} has no generation {number}",
                hint=f"its generations: {known}",
            )
        return self._registry.generation(record.env_id, number)
