"""What the generations of a variant hold, for people and for other tools: from disk alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ray_envs.decisions import edits, locks, resolving
from ray_envs.decisions.local_wheels import in_export
from ray_envs.decisions.packs import MadeFor
from ray_envs.decisions.parsing import parsed_json
from ray_envs.disk import local_wheels
from ray_envs.errors import EnvironmentNotReady, InvalidInput, StorageFailed
from ray_envs.manager.registry import Registry
from ray_envs.models import Generation, Installed, VariantRecord
from ray_envs.node import bundles, receiving, sending
from ray_envs.node.interpreter import this_platform
from ray_envs.node.store import Store
from ray_envs.node.uv_cache import UvCache

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
            f"variant {record.env_id} has no generation {number}", hint=f"its generations: {known}"
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
    """Every generation of a variant, oldest first, with what it changed."""
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
            "diff": edits.diff(before, edits.versions(made)),
        }
        before = edits.versions(made)
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
        "diff": edits.diff(edits.versions(one), edits.versions(other)),
    }


def project_files(registry: Registry, record: VariantRecord, made: Generation) -> dict[str, str]:
    """The texts, by file name, from which `import_env` makes the same generation again."""
    pyproject, uv_lock = registry.lock_text(record.env_id, made.number)
    options = made.definition.model_dump(mode="json", exclude=_IN_TEXTS, exclude_defaults=True)
    wheels = made.definition.wheels
    return {
        "pyproject.toml": in_export(pyproject, wheels),
        "uv.lock": in_export(uv_lock, wheels),
        "options.json": json.dumps(options, indent=1, sort_keys=True) + "\n",
    }


def put_bundle(
    registry: Registry, store: Store, record: VariantRecord, made: Generation, path: Path
) -> dict[str, str]:
    """Write a generation with its wheels, from this machine's uv cache, into one file.

    Returns the texts in it, by file name.

    Raises:
        EnvironmentNotReady: wheels of it are not on this machine.
        StorageFailed: it cannot be written.
    """
    files = project_files(registry, record, made)
    definition = made.definition
    packages = locks.installed(
        files["uv.lock"], this_platform(), extras=definition.extras, groups=definition.groups
    )
    cache = UvCache(store.cache)
    local = {f"sha256:{wheel.sha256}" for wheel in definition.wheels}  # not from uv's cache
    packages = tuple(package for package in packages if package.pin not in local)
    wheels = sending.offers(cache, packages)
    lacking = {package.name for package in packages} - {wheel.package.name for wheel in wheels}
    if lacking:
        raise EnvironmentNotReady(
            f"this machine lacks wheels of {record.env_id}: {', '.join(sorted(lacking))}",
            variant_id=str(record.env_id),
            hint="prepare it here first (`ray-envs sync`), or export where it is prepared",
        )
    manifests = [sending.manifest(cache, wheel) for wheel in wheels]
    contents = {f"{w.sha256}.whl": local_wheels.read(store.root, w) for w in definition.wheels}
    bundles.write_bundle(path, cache, manifests, {**files, **contents}, ray=made.target.ray)
    return files


def take_bundle(path: Path, store: Store) -> dict[str, bytes]:
    """Put the wheels of a bundle into this machine's uv cache; returns its texts by file name.

    Raises:
        InvalidInput: it cannot be read, is damaged, or is for another kind of machine.
        StorageFailed: there is no room for its wheels.
    """
    cache, here = UvCache(store.cache), version("ray")
    with bundles.read_bundle(path) as bundle:
        if bundle.ray != here:
            raise InvalidInput(
                f"the bundle is for Ray {bundle.ray}; this machine has {here}",
                where=str(path),
                hint="export it where this Ray runs",
            )
        _check_made_for(bundle.made_for, sending.made_here(), where=str(path))
        named = _packages_of(bundle.files, where=str(path))
        for manifest in bundle.manifests:
            package = manifest.wheel.package
            if package not in named:  # no other variant is to find what this lock does not name
                raise InvalidInput(
                    f"the bundle has a wheel of {package.name} that its lock does not name",
                    where=str(path),
                    hint="take it only from whom you trust; export it again",
                )
            if receiving.missing(cache, [package]):
                receiving.receive(cache, manifest, bundle.chunks(manifest))
        return dict(bundle.files)


def _check_made_for(made_for: MadeFor, here: MadeFor, *, where: str) -> None:
    """Refuse a bundle of another uv or Python; `receiving` refuses wheels of another platform."""
    for what, called in ("uv", "a uv whose cache has"), ("python", "Python"):
        theirs, ours = getattr(made_for, what), getattr(here, what)
        if theirs != ours:
            raise InvalidInput(
                f"the bundle is for {called} {theirs}; this machine has {ours}",
                where=where,
                hint=f"export it where the same {what} runs as here",
            )


def _packages_of(files: Mapping[str, bytes], *, where: str) -> set[Installed]:
    """What the lock among the texts of a bundle installs here."""
    try:
        _, lock = (files[name].decode() for name in ("pyproject.toml", "uv.lock"))
        options = parsed_json(files["options.json"], where="options.json")
        extras, groups = options.get("extras", ()), options.get("groups", ())
        return set(locks.installed(lock, this_platform(), extras=extras, groups=groups))
    except InvalidInput as exc:
        raise exc.about(hint="write it again with `ray-envs export --bundle`") from None
    except (KeyError, ValueError, AttributeError, TypeError) as exc:
        raise InvalidInput(
            f"the bundle is no project of ours: {type(exc).__name__}: {exc}",
            where=where,
            hint="write it again with `ray-envs export --bundle`",
        ) from None
