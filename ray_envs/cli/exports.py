"""`export` writes a variant into files for other tools and clusters; `import` reads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_envs.cli.arguments import disk, json_option, record_of, variant_argument
from ray_envs.cli.printing import put, put_json, say
from ray_envs.cli.verb_options import dry_run_option, replace_option, verb_option
from ray_envs.cli.waiting import open_provider, wait_for, watch
from ray_envs.errors import InvalidInput
from ray_envs.models import EnvId
from ray_envs.settings import Settings
from ray_envs.specs import Definition, LocalWheel
from ray_envs.validation import validated
from ray_envs.verbs import ExportEnv

if TYPE_CHECKING:
    from ray_envs.models import Generation
    from ray_envs.node.store import Store


@click.command()
@variant_argument
@click.option(
    "--format",
    "form",
    type=click.Choice(["project", "requirements", "pylock"]),
    default="project",
    help="A project for `import` and uv (the default), requirements with hashes, or pylock.toml.",
)
@verb_option(ExportEnv, "generation", type=click.IntRange(min=1))
@click.option("--to", "folder", type=click.Path(path_type=Path), help="The folder to write into.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Write one file with the project and all wheels, for clusters without a package index.",
)
@click.option("--force", is_flag=True, help="Overwrite files that differ.")
@json_option
def export(
    variant: str,
    form: str,
    generation: int | None,
    folder: Path | None,
    bundle: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a generation of VARIANT for other tools or `import`.

    A project is written into a folder, by default into ./NAME with the variant's name. The other
    formats are printed, unless --to is given. A bundle needs the variant's wheels in the uv cache
    of this machine: prepare the variant here first.

    \b
    Example: ray-envs export old --to exported && ray-envs import copy exported
    """
    from ray_envs.manager import exports

    registry, store = disk()
    record = record_of(registry, variant)
    made = exports.generation(registry, record, generation)
    if bundle is not None:
        if folder is not None or form != "project":
            raise InvalidInput("--bundle does not go with --to or --format", hint="leave them out")
        if os.path.lexists(bundle) and not force:
            raise InvalidInput(f"{bundle} exists", hint="give another file, or --force")
        files = exports.put_bundle(registry, store, record, made, bundle)
        folder = bundle.parent
    elif form == "project":
        files = exports.project_files(registry, record, made)
        folder = folder or Path(record.env_id.node_id)
    else:
        name = str(record.env_id)
        with open_provider() as provider:
            files = wait_for(lambda: provider.export(name, form, generation=made.number)["files"])
    if folder is not None and bundle is None:
        _write({**files, **_wheels(made, store)}, folder, force=force)
    if as_json:
        put_json(
            {
                "variant_id": str(record.env_id),
                "generation": made.number,
                "key": made.key,
                "lock_sha256": made.lock_sha256,
                "folder": None if folder is None else str(folder),
                **({} if bundle is None else {"bundle": str(bundle)}),
                "files": files,
            }
        )
    elif bundle is not None:
        put(str(bundle))
    elif folder is None:
        put("\n".join(text.rstrip("\n") for text in files.values()))
    else:
        put("\n".join(str(folder / name) for name in files))


def _wheels(made: Generation, store: Store) -> dict[str, bytes]:
    """The local packages of a generation, by their places in an export."""
    from ray_envs.disk.local_wheels import read

    return {f"wheels/{w.filename}": read(store.root, w) for w in made.definition.wheels}


def _write(files: Mapping[str, str | bytes], folder: Path, *, force: bool) -> None:
    """Write `files` into `folder`. If one exists there and differs, write none of them.

    Raises `InvalidInput`: a file differs and `force` is not set, or the folder cannot be written.
    """
    from ray_envs.disk.files import write_atomically

    contents = {n: t.encode() if isinstance(t, str) else t for n, t in files.items()}
    try:
        for name, content in contents.items():
            file = folder / name
            if not force and os.path.lexists(file) and file.read_bytes() != content:
                raise InvalidInput(
                    f"{file} exists and differs",
                    hint="give another folder with --to, or --force to overwrite it",
                )
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, content)
    except OSError as exc:
        raise InvalidInput(
            f"cannot write to {folder}: {exc.strerror or exc}", hint="give another folder with --to"
        ) from exc


@click.command(name="import")
@variant_argument
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="A file of `export --bundle`, instead of DIR."
)
@replace_option
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
    """Define VARIANT by an export in DIR or in a bundle.

    Prints the key of its environment. DIR has a pyproject.toml, a uv.lock and maybe an
    options.json. The lock stays the same, byte for byte. A bundle contains the wheels: no package
    index is needed if the index settings (UV_DEFAULT_INDEX, …) are those of the export. Import it
    on the node of the manager.

    \b
    Example: ray-envs import copy exported
    """
    name = str(EnvId.parse(variant))
    if (folder is None) is (bundle is None):
        raise click.UsageError("Give either DIR or --bundle FILE.")
    definition = _exported(folder or Path()) if bundle is None else _unbundled(bundle)
    options = definition.model_dump(
        mode="json", exclude={"pyproject", "uv_lock"}, exclude_defaults=True
    )
    wheels = definition.contents()
    wait_s = Settings.from_environment().prepare_timeout_s
    with open_provider() as provider:
        answer = watch(
            provider,
            name,
            lambda: provider.import_project(
                name,
                pyproject=definition.pyproject or "",
                uv_lock=definition.uv_lock or "",
                options=options,
                wheels=wheels,
                replace=replace,
                wait_s=wait_s,
                dry_run=dry_run,
            ),
        )
    if as_json:
        put_json(answer)
    else:
        put(answer["key"])
        if bundle is not None:
            from ray_envs.decisions.policy import file_hosts

            hosts = ", ".join(file_hosts(definition.uv_lock or ""))
            say(f"nodes that lack one of its files fetch it from {hosts}")
        if dry_run and bundle is not None:
            say("dry run: its wheels are in this machine's uv cache; nothing else was changed")
        elif dry_run:
            say("dry run: nothing was changed")


def _unbundled(bundle: Path) -> Definition:
    """Put the wheels of a bundle into this machine's uv cache. Returns its definition.

    Raises:
        InvalidInput: it cannot be read, is damaged, or is for another platform.
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
    """Return the definition that `ray-envs export` wrote into `folder`.

    Raises `InvalidInput`: a file is missing or damaged.
    """
    from ray_envs.client.inputs import read_texts
    from ray_envs.decisions.parsing import parsed_json
    from ray_envs.disk.files import kind_of, read_bytes

    pyproject, uv_lock = read_texts(folder)
    if uv_lock is None:
        raise InvalidInput(
            "there is no uv.lock",
            where=str(folder),
            hint="`ray-envs export` writes one; for other projects use `ray-envs create --project`",
        )
    options: Any = {}
    file = folder / "options.json"
    if kind_of(file) != "missing":
        hint = "export the variant again, or remove the file"
        options = parsed_json(read_bytes(file), where=str(file), hint=hint)
        if not isinstance(options, dict):
            raise InvalidInput("it is not a JSON object", where=str(file), hint=hint)
    read = validated(Definition, options, where=str(file))
    wheels = tuple(_with_content(wheel, folder) for wheel in read.wheels)
    return read.model_copy(update={"pyproject": pyproject, "uv_lock": uv_lock, "wheels": wheels})


def _with_content(wheel: LocalWheel, folder: Path) -> LocalWheel:
    """`wheel` with its content, from an export or from the files of a bundle."""
    from ray_envs.decisions.local_wheels import LIMIT_BYTES, check_content
    from ray_envs.disk.files import read_at_most, unreadable

    file = folder / f"{wheel.sha256}.whl"
    if not file.is_file():
        file = folder / "wheels" / wheel.filename
    try:
        content = read_at_most(file, LIMIT_BYTES + 1)
    except OSError as exc:
        raise unreadable(file, exc) from None
    check_content(wheel, content)
    return wheel.model_copy(update={"content": content})
