"""The arguments that commands share, and variants on this machine's disk. See also `verb_options`.

`ray` and what uses it are imported late: a command that only reads the disk answers at once.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ray_envs.errors import InvalidPackages, NotFound, RayEnvsError
from ray_envs.models import EnvId
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from ray_envs.manager.registry import Registry
    from ray_envs.models import VariantRecord
    from ray_envs.node.store import Store


class Variant(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """The id of a variant. The shell completes it."""

    name = "variant"

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        with contextlib.suppress(RayEnvsError):
            from ray_envs.manager.registry import Registry

            names = defined_ids(Registry(Settings.from_environment()))
            return [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return []


class Hours(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """A number of hours, 0 or more."""

    name = "hours"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            hours = float(value)
        except ValueError:
            hours = -1.0
        if not 0 <= hours < float("inf"):
            self.fail(f"{value!r} is not a number of hours, such as 72 or 0.5", param, ctx)
        return hours


variant_argument = click.argument("variant", type=Variant())
optional_variant = click.argument("variant", required=False, type=Variant())
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def requirements(
    variant: str, packages: Iterable[str], file: str | None, *, may_have_hashes: bool = False
) -> list[str]:
    """Return the requirements in `packages` and in the requirements file `file`.

    Raises:
        InvalidInput: the file cannot be read.
        InvalidPackages: a requirement is not accepted, or there is none; or the file has options.
    """
    from ray_envs.client.source_files import read_names
    from ray_envs.decisions.requirements import requirement_lines

    lines = requirement_lines(packages, where="PACKAGE")
    if file is not None:
        path = Path.cwd() / file
        lines += read_names(path, variant=variant, may_have_hashes=may_have_hashes)
    if not lines:
        raise InvalidPackages("no packages are given", hint="give at least one, or a file with -r")
    return list(lines)


def disk() -> tuple[Registry, Store]:
    """Return the definitions and the environments under this machine's root.

    Raises `StorageFailed`: another version of ray_envs has written it in another format.
    """
    from ray_envs.manager.registry import Registry
    from ray_envs.node.store import Store

    settings = Settings.from_environment()
    store = Store(settings)
    store.check_format()
    return Registry(settings), store


def defined_ids(registry: Registry) -> list[str]:
    """Return the ids of all variants. They come from the names of folders: no file is opened."""
    names = []
    for folder in registry.stamps():
        # The reverse of `EnvId.folder`: an id cannot contain `%`.
        parts = [part.replace("%5F", "_") for part in folder.split("_")]
        with contextlib.suppress(RayEnvsError):  # a folder of something else
            names.append(str(EnvId.parse("/".join(parts))))
    return sorted(names)


def record_of(registry: Registry, variant: str) -> VariantRecord:
    """Return the record of a variant.

    Raises:
        InvalidId: the id is not allowed.
        NotFound: the variant is not defined. The hint has the most similar id.
        StorageFailed: its definition cannot be read.
    """
    env_id = EnvId.parse(variant)
    record = registry.get(env_id)
    if record is None:
        names = defined_ids(registry)
        close = [name for name in names if name.split("/")[1:2] == [env_id.node_id]]
        close = close or difflib.get_close_matches(str(env_id), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`ray-envs list` shows all variants"
        raise NotFound(f"variant {variant!r} is not defined", variant_id=variant, hint=hint)
    return record


def full_id(variant: str) -> str:
    """Return the full id of a variant; raises what `record_of` raises."""
    return str(record_of(disk()[0], variant).env_id)
