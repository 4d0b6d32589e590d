"""What the generations of a variant hold, for people and for other tools: from disk alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray_envs import changing, resolving
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.models import Generation, VariantRecord
from ray_envs.registry import Registry

#: What stands in the exported texts themselves.
_IN_TEXTS = {"packages", "pyproject", "uv_lock"}


def generation(registry: Registry, record: VariantRecord, number: int | None) -> Generation:
    """One generation of a variant; without a number, the current one.

    Raises:
        InvalidInput: there is none of that number.
        StorageFailed: it cannot be read.
    """
    if number is None:
        return record.current
    if number not in record.numbers:
        known = ", ".join(map(str, record.numbers))
        raise InvalidInput(
            f"variant {record.env_id} has no generation {number}",
            hint=f"its generations: {known}",
        )
    return registry.generation(record.env_id, number)


def deps(registry: Registry, record: VariantRecord) -> dict[str, Any]:
    """What a variant declares, and the versions that are locked."""
    pyproject, _ = registry.lock_text(record.env_id, record.current.number)
    return {
        "variant_id": str(record.env_id),
        "generation": record.current.number,
        "dependencies": list(resolving.declared(pyproject)),
        "locked_versions": dict(sorted(record.current.packages.items())),
    }


def generations(
    registry: Registry, record: VariantRecord, *, facts: Callable[[Generation], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every generation of a variant, oldest first, with what it changed.

    Args:
        registry: where they are.
        record: the variant.
        facts: what else is known of one, such as whether it is ready.
    """
    rows: list[dict[str, Any]] = []
    before: dict[str, str] = {}
    for number in record.numbers:
        row: dict[str, Any] = {
            "generation": number,
            "is_current": number == record.current.number,
            "error": None,
        }
        rows.append(row)
        try:
            made = registry.generation(record.env_id, number)
        except StorageFailed as exc:  # the others are not concerned
            row["error"] = exc.to_dict()
            continue
        row |= {
            "made_by": made.made_by,
            "key": made.key,
            "lock_sha256": made.lock_sha256,
            "created_at": made.created_at.isoformat(),
            "python_version": made.target.python,
            "ray_version": made.target.ray,
            **facts(made),
            "diff": changing.diff(before, made.packages),
        }
        before = made.packages
    return rows


def difference(
    registry: Registry, record: VariantRecord, from_: int, to: int | None
) -> dict[str, Any]:
    """The packages that differ between two generations; `to` is the current one by default."""
    one, other = (generation(registry, record, number) for number in (from_, to))
    return {
        "variant_id": str(record.env_id),
        "from": one.number,
        "to": other.number,
        "diff": changing.diff(one.packages, other.packages),
    }


def project_files(registry: Registry, record: VariantRecord, made: Generation) -> dict[str, str]:
    """The texts, by file name, from which `import_env` makes the same generation again."""
    pyproject, uv_lock = registry.lock_text(record.env_id, made.number)
    options = made.definition.model_dump(mode="json", exclude=_IN_TEXTS, exclude_defaults=True)
    return {
        "pyproject.toml": pyproject,
        "uv.lock": uv_lock,
        "options.json": json.dumps(options, indent=1, sort_keys=True) + "\n",
    }
