"""The commands that change which packages a variant has."""

from __future__ import annotations

import click

from ray_envs.cli.arguments import (
    Variant,
    address,
    defined,
    disk,
    dry_run_option,
    found,
    json_option,
    requirements,
    variant_argument,
)
from ray_envs.cli.printing import Answer, complain, put, put_change, put_rows, say
from ray_envs.cli.waiting import in_background, opened, patiently, watched
from ray_envs.errors import RayEnvsError

#: How many variants `sync` works on at once; their builds are bounded elsewhere.
_AT_ONCE = 8
_requirements_file = click.option("--requirements", "-r", "file", help="A requirements file.")


@click.command()
@variant_argument
@click.argument("packages", nargs=-1)
@_requirements_file
@dry_run_option
@json_option
def add(
    variant: str, packages: tuple[str, ...], file: str | None, dry_run: bool, as_json: bool
) -> None:
    """Add PACKAGES to VARIANT, as a new generation.

    Other pins stay where they can. Running tasks keep the generation that they began with.

    \b
    Example: ray-envs add old 'pandas>=2' pyarrow
    """
    lines = requirements(packages, file)
    name = address(variant)
    with opened() as provider:
        answer = watched(provider, name, lambda: provider.add(name, lines, dry_run=dry_run))
    put_change(answer, as_json=as_json)


@click.command()
@variant_argument
@click.argument("packages", nargs=-1)
@dry_run_option
@json_option
def update(variant: str, packages: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Upgrade PACKAGES of VARIANT, or all, as a new generation.

    They move within what is declared; a requirement takes the place of the declared one.

    \b
    Example: ray-envs update old numpy --dry-run
    """
    lines = requirements(packages, None) if packages else []
    name = address(variant)
    with opened() as provider:
        answer = watched(provider, name, lambda: provider.update(name, lines, dry_run=dry_run))
    put_change(answer, as_json=as_json)


@click.command()
@variant_argument
@click.argument("packages", nargs=-1)
@_requirements_file
@dry_run_option
@json_option
def remove(
    variant: str, packages: tuple[str, ...], file: str | None, dry_run: bool, as_json: bool
) -> None:
    """Remove PACKAGES from VARIANT, as a new generation.

    Only what is declared can be removed; what only that needed goes with it.

    \b
    Example: ray-envs remove old pyarrow
    """
    lines = requirements(packages, file)
    name = address(variant)
    with opened() as provider:
        answer = watched(provider, name, lambda: provider.remove(name, lines, dry_run=dry_run))
    put_change(answer, as_json=as_json)


@click.command()
@variant_argument
@click.option("--to", type=click.IntRange(min=1), help="A generation; by default the previous one.")
@dry_run_option
@json_option
def rollback(variant: str, to: int | None, dry_run: bool, as_json: bool) -> None:
    """Make an earlier generation of VARIANT the current one.

    \b
    Example: ray-envs rollback old --to 1
    """
    name = address(variant)
    with opened() as provider:
        answer = watched(provider, name, lambda: provider.rollback(name, to, dry_run=dry_run))
    put_change(answer, as_json=as_json)


@click.command()
@click.argument("variants", metavar="VARIANT...", nargs=-1, type=Variant())
@click.option("--all", "is_all", is_flag=True, help="Every variant that is defined.")
@dry_run_option
@json_option
def sync(variants: tuple[str, ...], is_all: bool, dry_run: bool, as_json: bool) -> int:
    """Make every node match the locks of VARIANTs.

    Checks each file, mends what is damaged and builds what is missing; with --dry-run it only
    checks. Goes on after a failure, and has its exit code at the end.

    \b
    Example: ray-envs sync --all
    """
    if bool(variants) == is_all:
        raise click.UsageError("Give either one or more VARIANTs, or --all.")
    registry, _ = disk()
    names = [str(found(registry, variant).env_id) for variant in dict.fromkeys(variants)]
    names = names or defined(registry)
    rows: list[Answer] = []
    failed: list[RayEnvsError] = []
    with opened() as provider:
        for at in range(0, len(names), _AT_ONCE):
            now = names[at : at + _AT_ONCE]
            runs = [in_background(lambda n=n: provider.sync(n, dry_run=dry_run)) for n in now]
            for name, run in zip(now, runs, strict=True):
                try:
                    rows.append(patiently(run.result))
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
    """What a sync found, in a line."""
    found_, left = 0, 0
    for check in answer["checks"]:
        found_ += check["damaged_files"]
        left += len(check["left"])
    state = f"{answer['status']}, generation {answer['generation']}"
    if not found_:
        return f"{state}, matches its lock"
    return f"{state}, {found_} files differed from the lock, {left} left as they are"
