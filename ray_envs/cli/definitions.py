"""The commands for the definition of a variant: create, pin, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ray_envs.cli.arguments import full_id, json_option, variant_argument
from ray_envs.cli.printing import put, put_change, put_json, say
from ray_envs.cli.verb_options import dry_run_option, replace_option, verb_option
from ray_envs.cli.waiting import open_provider, wait_for, watch
from ray_envs.errors import InvalidInput, StorageFailed
from ray_envs.models import EnvId
from ray_envs.settings import Settings, cut_off
from ray_envs.specs import EnvSpec
from ray_envs.validation import validated
from ray_envs.verbs import DeleteEnv


@click.command()
@variant_argument
@click.argument("packages", nargs=-1)
@click.option("--project", help="A folder with a pyproject.toml, and a uv.lock if it has one.")
@click.option("--requirements", "-r", help="A requirements file in pip's format.")
@click.option("--script", help="A Python file with a `# /// script` block.")
@click.option("--pylock", help="A pylock.toml.")
@click.option("--extra", "extras", multiple=True, help="An extra of the project. Repeatable.")
@click.option(
    "--group", "groups", multiple=True, help="A dependency group of the project. Repeatable."
)
@click.option(
    "--install-project/--no-install-project",
    default=None,
    help="Install the project's own package, or not. Default: if it has a build system.",
)
@click.option("--python", help="A version or specifier that allows the cluster's Python.")
@click.option("--exclude-newer", metavar="DATE", help="Ignore files that were uploaded later.")
@click.option("--only-binary", is_flag=True, help="Install wheels only: build nothing from source.")
@click.option(
    "--inherit-versions",
    is_flag=True,
    help="Packages without a version get that of the cluster's own environment.",
)
@click.option(
    "--env-var",
    "variables",
    metavar="NAME=VALUE",
    multiple=True,
    help="A variable of its workers. No secrets: Ray logs it. Repeatable.",
)
@click.option(
    "--label",
    "labels",
    metavar="NAME=VALUE",
    multiple=True,
    help="Only on nodes with this label, written as in Ray's label_selector. Repeatable.",
)
@click.option("--num-gpus", type=float, help="GPUs of each task. Only on nodes with so many.")
@click.option(
    "--nodes", type=click.IntRange(min=1), help="On how many of these nodes. Default: all."
)
@replace_option
@dry_run_option
@json_option
def create(
    variant: str,
    packages: tuple[str, ...],
    variables: tuple[str, ...],
    labels: tuple[str, ...],
    replace: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Define VARIANT and build its environment.

    Give PACKAGES, a project, a requirements file, a script or a pylock.toml. Prints the path of the
    environment's Python, or with --dry-run the packages that would be installed.

    \b
    Example: ray-envs create old 'scikit-learn==1.7.*'
    """
    given = {name: value for name, value in options.items() if value or value is False}
    given |= {
        "packages": packages,
        "env_vars": _pairs(variables, option="--env-var"),
        "label_selector": _pairs(labels, option="--label"),
    }
    if options["exclude_newer"] is not None:
        try:
            cut_off(options["exclude_newer"])
        except ValueError as exc:
            raise InvalidInput(str(exc), where="--exclude-newer") from None
    spec = validated(EnvSpec, given, where="ray-envs create")
    name = str(EnvId.parse(variant))
    wait_s = Settings.from_environment().prepare_timeout_s
    with open_provider() as provider:
        answer = watch(
            provider,
            name,
            lambda: provider.create(
                name, spec, replace=replace, base=Path.cwd(), wait_s=wait_s, dry_run=dry_run
            ),
        )
    if dry_run or as_json:
        put_change(answer, as_json=as_json)
    else:
        put(answer["python_path"])


def _pairs(texts: tuple[str, ...], *, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            problem = f"{name!r} has no value" if name else "the name is missing"
            raise InvalidInput(problem, where=option, hint="write NAME=VALUE")
        if name in pairs:
            raise InvalidInput(f"{name!r} is given twice", where=option)
        pairs[name] = value
    return pairs


@click.command()
@variant_argument
@click.option("--off", is_flag=True, help="Allow `gc` to delete them again.")
@json_option
def pin(variant: str, off: bool, as_json: bool) -> None:
    """Never delete the environments of VARIANT, even if unused.

    This applies to all its generations.

    \b
    Example: ray-envs pin old
    """
    name = full_id(variant)
    with open_provider() as provider:
        answer = wait_for(lambda: provider.pin(name, is_pinned=not off))
    if as_json:
        put_json(answer)
    else:
        say(f"variant {name} is {'pinned' if answer['is_pinned'] else 'not pinned'}")


@click.command()
@variant_argument
@verb_option(DeleteEnv, "force")
@dry_run_option
@json_option
def delete(variant: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Delete the definition of VARIANT. Fails if it is in use.

    Its history stays. A later `gc` deletes its environment.

    \b
    Example: ray-envs delete old
    """
    try:
        name = full_id(variant)
    except StorageFailed:  # a damaged definition can be deleted too
        name = str(EnvId.parse(variant))
    with open_provider() as provider:
        wait_for(lambda: provider.delete(name, force=force, dry_run=dry_run))
    if as_json:
        put_json({"variant_id": name, "deleted": not dry_run})
    else:
        say(f"variant {name} {'could be' if dry_run else 'is'} deleted")
