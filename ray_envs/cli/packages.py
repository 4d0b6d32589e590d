"""The commands that change the packages of a variant: add, update, remove, rollback, sync."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from ray_envs.cli.arguments import (
    Variant,
    defined_ids,
    disk,
    full_id,
    json_option,
    record_of,
    requirements,
    variant_argument,
)
from ray_envs.cli.printing import Answer, complain, put, put_change, put_rows, say
from ray_envs.cli.verb_options import dry_run_option, verb_option
from ray_envs.cli.waiting import in_background, open_provider, wait_for, watch
from ray_envs.errors import RayEnvsError
from ray_envs.verbs import RollbackEnv

if TYPE_CHECKING:
    from ray_envs.client.provider import RayEnvironmentProvider

#: How many variants `sync` works on at the same time. Each node limits its builds itself.
_AT_ONCE = 8
_packages = click.argument("packages", nargs=-1)
_requirements_file = click.option("--requirements", "-r", "file", help="A requirements file.")


@click.command()
@variant_argument
@_packages
@_requirements_file
@dry_run_option
@json_option
def add(
    variant: str, packages: tuple[str, ...], file: str | None, dry_run: bool, as_json: bool
) -> None:
    """Add PACKAGES to VARIANT, as a new generation.

    The versions of other packages stay if possible. Running tasks keep their generation.

    \b
    Example: ray-envs add old 'pandas>=2' pyarrow
    """
    lines = requirements(variant, packages, file)
    _change(variant, lambda envs, name: envs.add(name, lines, dry_run=dry_run), as_json=as_json)


@click.command()
@variant_argument
@_packages
@_requirements_file
@dry_run_option
@json_option
def update(
    variant: str, packages: tuple[str, ...], file: str | None, dry_run: bool, as_json: bool
) -> None:
    """Upgrade PACKAGES of VARIANT, or all, as a new generation.

    They stay within the declared requirements. A requirement, such as 'numpy>=2', replaces the
    declared one.

    \b
    Example: ray-envs update old numpy --dry-run
    """
    lines = requirements(variant, packages, file) if packages or file is not None else []
    _change(variant, lambda envs, name: envs.update(name, lines, dry_run=dry_run), as_json=as_json)


@click.command()
@variant_argument
@_packages
@_requirements_file
@dry_run_option
@json_option
def remove(
    variant: str, packages: tuple[str, ...], file: str | None, dry_run: bool, as_json: bool
) -> None:
    """Remove PACKAGES from VARIANT, as a new generation.

    Only declared packages can be removed. Packages that only they needed are removed too.

    \b
    Example: ray-envs remove old pyarrow
    """
    lines = requirements(variant, packages, file, may_have_hashes=True)
    _change(variant, lambda envs, name: envs.remove(name, lines, dry_run=dry_run), as_json=as_json)


@click.command()
@variant_argument
@verb_option(RollbackEnv, "to", type=click.IntRange(min=1))
@dry_run_option
@json_option
def rollback(variant: str, to: int | None, dry_run: bool, as_json: bool) -> None:
    """Make an earlier generation of VARIANT the current one.

    \b
    Example: ray-envs rollback old --to 1
    """
    _change(variant, lambda envs, name: envs.rollback(name, to, dry_run=dry_run), as_json=as_json)


def _change(
    variant: str, change: Callable[[RayEnvironmentProvider, str], Answer], *, as_json: bool
) -> None:
    name = full_id(variant)
    with open_provider() as provider:
        answer = watch(provider, name, lambda: change(provider, name))
    put_change(answer, as_json=as_json)


@click.command()
@click.argument("variants", metavar="VARIANT...", nargs=-1, type=Variant())
@click.option("--all", "is_all", is_flag=True, help="Every variant.")
@dry_run_option
@json_option
def sync(variants: tuple[str, ...], is_all: bool, dry_run: bool, as_json: bool) -> int:
    """Make the environments of VARIANTs match their locks.

    Checks each file on every node, repairs damaged environments and builds missing ones. With
    --dry-run it only checks. If a variant fails, the others are still done, and the exit code is
    that of the failure.

    \b
    Example: ray-envs sync --all
    """
    if bool(variants) == is_all:
        raise click.UsageError("Give either one or more VARIANTs, or --all.")
    registry, _ = disk()
    names = [str(record_of(registry, variant).env_id) for variant in dict.fromkeys(variants)]
    names = names or defined_ids(registry)
    rows: list[Answer] = []
    failed: list[RayEnvsError] = []
    with open_provider() as provider:
        for at in range(0, len(names), _AT_ONCE):
            now = names[at : at + _AT_ONCE]
            runs = [in_background(lambda n=n: provider.sync(n, dry_run=dry_run)) for n in now]
            for name, run in zip(now, runs, strict=True):
                try:
                    rows.append(wait_for(run.result))
                except RayEnvsError as exc:
                    failed.append(exc.about(variant_id=name))
                    rows.append({"variant_id": name, "error": exc.to_dict()})
                    complain(f"{name}: {exc}")
                else:
                    if not as_json:
                        put(f"{name}: {_in_words(rows[-1])}")
    if as_json:
        put_rows(rows)
    elif not names:
        say("no variants are defined")
    return failed[0].exit_code if failed else 0


def _in_words(answer: Answer) -> str:
    """Return what a sync found, in a line."""
    damaged = sum(check["damaged_files"] for check in answer["checks"])
    left = sum(len(check["left"]) for check in answer["checks"])
    state = f"{answer['status']}, generation {answer['generation']}"
    if not damaged:
        return f"{state}, matches its lock"
    return f"{state}, {damaged} files differed from the lock, {left} of them were not repaired"
