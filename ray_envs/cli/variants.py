"""The commands that change a variant, from `create` to `delete`, and `exec`, which runs in one.

All go through the manager that lives on the root, or do its work in this process where none does.
What only reads is `cli_reads`, next door.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from ray_envs.cli.console import (
    Answer,
    Phases,
    Variant,
    address,
    complain,
    defined,
    disk,
    dry_run_option,
    found,
    in_background,
    json_option,
    opened,
    patiently,
    put,
    put_change,
    put_json,
    put_rows,
    requirements,
    say,
    variant_argument,
    watched,
)
from ray_envs.errors import EnvironmentNotReady, InvalidInput, RayEnvsError, StorageFailed
from ray_envs.models import Definition, EnvId, EnvSpec
from ray_envs.settings import Settings, cut_off
from ray_envs.validation import validated

#: How many variants `sync` works on at once; their builds are bounded elsewhere.
_AT_ONCE = 8

_requirements_file = click.option("--requirements", "-r", "file", help="A requirements file.")


@click.command()
@variant_argument
@click.argument("packages", nargs=-1)
@click.option("--project", help="A folder with pyproject.toml (and uv.lock).")
@click.option("--requirements", "-r", help="A requirements file.")
@click.option("--extra", "extras", multiple=True, help="An extra of the project; repeatable.")
@click.option("--group", "groups", multiple=True, help="A dependency group of it; repeatable.")
@click.option("--python", help="Must admit the cluster's interpreter.")
@click.option("--exclude-newer", metavar="DATE", help="Take nothing that was uploaded later.")
@click.option("--only-binary", is_flag=True, help="Wheels only: build nothing from source.")
@click.option(
    "--inherit-versions",
    is_flag=True,
    help="A package without a version takes that of the cluster's own environment.",
)
@click.option(
    "--env-var",
    "variables",
    metavar="NAME=VALUE",
    multiple=True,
    help="A variable of its workers; no secrets: Ray logs them. Repeatable.",
)
@click.option(
    "--label",
    "labels",
    metavar="NAME=VALUE",
    multiple=True,
    help="Only for nodes with this label; VALUE as in Ray's label_selector. Repeatable.",
)
@click.option("--num-gpus", type=float, help="GPUs of its tasks: only for nodes with as many.")
@click.option("--nodes", type=click.IntRange(min=1), help="On so many of them; by default on all.")
@click.option("--replace", is_flag=True, help="Make a new generation where the variant exists.")
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

    It is made from PACKAGES, a project or a requirements file. Prints the path of its interpreter;
    with --dry-run what would be installed.

    \b
    Example: ray-envs create old 'scikit-learn==1.7.*'
    """

    given = {name: value for name, value in options.items() if value}
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
    with opened() as provider:
        if dry_run:
            answer = patiently(
                lambda: provider.create(name, spec, replace=replace, base=Path.cwd(), dry_run=True)
            )
        else:
            answer = watched(
                provider,
                name,
                lambda: provider.create(
                    name, spec, replace=replace, base=Path.cwd(), wait_s=wait_s
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
            raise InvalidInput(
                f"{name!r} has no value" if name else "there is no name",
                where=option,
                hint="write NAME=VALUE",
            )
        if name in pairs:
            raise InvalidInput(f"{name!r} is there twice", where=option, hint="give it once")
        pairs[name] = value
    return pairs


# -- dependencies --------------------------------------------------------------------------------


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


# -- generations ---------------------------------------------------------------------------------


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


@click.command(name="import")
@variant_argument
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="A file with the wheels, in place of DIR."
)
@click.option("--replace", is_flag=True, help="Make a new generation where the variant exists.")
@dry_run_option
@json_option
def import_project(
    variant: str,
    folder: Path | None,
    bundle: Path | None,
    replace: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Define VARIANT from an export in DIR, or in a bundle; prints its key.

    DIR has a pyproject.toml, a uv.lock and, where there are any, options.json. From what
    `ray-envs export` wrote, it is the same lock, byte for byte, and the same environment. A bundle
    brings its wheels along: no package index is asked, if the index settings (UV_DEFAULT_INDEX, …)
    are those of the export. Read it where the manager runs.

    \b
    Example: ray-envs import copy exported
    """
    name = str(EnvId.parse(variant))
    if (folder is None) is (bundle is None):
        raise click.UsageError("give either DIR or --bundle FILE")
    definition = _exported(folder or Path()) if bundle is None else _unbundled(bundle)
    options = definition.model_dump(
        mode="json", exclude={"pyproject", "uv_lock"}, exclude_defaults=True
    )
    wait_s = Settings.from_environment().prepare_timeout_s
    with opened() as provider:
        answer = watched(
            provider,
            name,
            lambda: provider.import_project(
                name,
                pyproject=definition.pyproject or "",
                uv_lock=definition.uv_lock or "",
                options=options,
                replace=replace,
                wait_s=wait_s,
                dry_run=dry_run,
            ),
        )
    if as_json:
        put_json(answer)
    else:
        put(answer["key"])
        if dry_run and bundle is not None:
            say("a dry run: its wheels are in uv's cache here, and nothing else was changed")
        elif dry_run:
            say("a dry run: nothing was changed")


def _unbundled(bundle: Path) -> Definition:
    """The definition in a bundle, whose wheels are in this machine's uv cache now.

    Raises:
        InvalidInput: it cannot be read, is damaged, or is for another kind of machine.
        StorageFailed: there is no room for its wheels.
    """
    import tempfile

    from ray_envs.manager import exports

    _, store = disk()
    store.set_up()
    with tempfile.TemporaryDirectory() as folder:
        for file, content in exports.take_bundle(bundle, store).items():
            Path(folder, file).write_bytes(content)
        return _exported(Path(folder))


def _exported(folder: Path) -> Definition:
    """The definition that `ray-envs export` wrote into `folder`.

    Raises:
        InvalidInput: a file is missing or damaged.
    """
    from ray_envs.client.inputs import read_definition
    from ray_envs.disk.files import kind_of, read_bytes

    texts = read_definition(EnvSpec(project=str(folder)), Path.cwd())
    if texts.uv_lock is None:
        raise InvalidInput(
            "there is no uv.lock",
            where=str(folder),
            hint="`ray-envs export` writes one; to lock a project, `ray-envs create --project`",
        )
    options: dict[str, Any] = {}
    file = folder / "options.json"
    if kind_of(file) != "missing":
        try:
            options = json.loads(read_bytes(file))
        except (ValueError, RecursionError):
            raise InvalidInput(
                "it is not JSON", where=str(file), hint="export the variant again, or remove it"
            ) from None
        if not isinstance(options, dict):
            raise InvalidInput(
                "it is no JSON object", where=str(file), hint="export the variant again"
            )
    read = validated(Definition, options, where=str(file))
    return read.model_copy(update={"pyproject": texts.pyproject, "uv_lock": texts.uv_lock})


@click.command()
@variant_argument
@click.option("--off", is_flag=True, help="Allow it again.")
@json_option
def pin(variant: str, off: bool, as_json: bool) -> None:
    """Keep the environments of VARIANT from being collected.

    Those of every generation, however long nobody uses them.

    \b
    Example: ray-envs pin old
    """
    name = address(variant)
    with opened() as provider:
        answer = patiently(lambda: provider.pin(name, is_pinned=not off))
    if as_json:
        put_json(answer)
    else:
        say(f"variant {name} is {'pinned' if answer['is_pinned'] else 'not pinned'}")


@click.command()
@variant_argument
@click.option("--force", is_flag=True, help="Also while somebody runs in it; his files stay.")
@dry_run_option
@json_option
def delete(variant: str, force: bool, dry_run: bool, as_json: bool) -> None:
    """Forget VARIANT; refused while somebody uses it.

    Its history stays. Its environment goes with a later `gc`.

    \b
    Example: ray-envs delete old
    """
    try:
        name = address(variant)
    except StorageFailed:  # damaged: forgetting it is what helps
        name = str(EnvId.parse(variant))
    with opened() as provider:
        patiently(lambda: provider.delete(name, force=force, dry_run=dry_run))
    if as_json:
        put_json({"variant_id": name, "deleted": not dry_run})
    else:
        say(f"variant {name} {'could be' if dry_run else 'is'} forgotten")


# -- running -------------------------------------------------------------------------------------


@click.command(
    name="exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@variant_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(variant: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in the environment of VARIANT.

    On this machine, and with its exit code; the environment is built first if need be.

    \b
    Example: ray-envs exec old -- python -c 'import sklearn; print(sklearn.__version__)'
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    registry, store = disk()
    record = found(registry, variant)
    key = record.current.key
    if store.record(key) is None:
        phases = Phases()

        def tell(statuses: Any) -> None:
            for name, row in statuses.items():
                phases.tell(name, row)

        with opened() as provider:
            name = str(record.env_id)
            patiently(lambda: provider.prepare(name, on_status=tell))
        record = found(registry, variant)  # it may have been locked again for this cluster
        key = record.current.key
        if store.record(key) is None:
            raise EnvironmentNotReady(f"the environment {key} is not on this machine", key=key)
    store.open_hold(key)  # inherited by the command: held for as long as it runs
    venv = store.venv(key)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    environ.update(record.definition.env_vars, VIRTUAL_ENV=str(venv))
    environ["PATH"] = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        os.environ["PATH"] = environ["PATH"]  # execvpe looks the command up in our own PATH
        os.execvpe(command[0], list(command), environ)  # noqa: S606 - that is what exec is for
    except OSError as exc:
        raise InvalidInput(
            f"cannot run {command[0]!r} in variant {variant}: {exc.strerror}",
            hint="the command must be in the environment or on PATH",
        ) from exc
