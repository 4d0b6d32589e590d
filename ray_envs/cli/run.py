"""`ray-envs run` runs a batch file, shows a table and writes a results file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ray_envs.batch_models import ItemResult, split_entrypoint
from ray_envs.cli.arguments import json_option
from ray_envs.cli.printing import complain, put, put_json, say
from ray_envs.cli.waiting import in_background
from ray_envs.errors import (
    InvalidId,
    InvalidInput,
    InvalidPackages,
    RayEnvsError,
    ResolutionFailed,
    UvFailed,
)
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from ray_envs.batch_models import BatchSpec
    from ray_envs.cli.display import RunDisplay
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.specs import Definition

_SOME_FAILED = 1

#: Errors that fail one variant only: the others run.
_OF_ONE_VARIANT = (ResolutionFailed, UvFailed, InvalidInput, InvalidPackages, InvalidId)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="The JSONL file to write. Default: <name>.results.jsonl in the current folder. Earlier "
    "results in it are first moved to <file>.1, .2, ….",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Skip items that have a result for the same environment, arguments and code.",
)
@click.option(
    "--address",
    help="The Ray cluster. Default: RAY_ADDRESS, the cluster on this machine, or a local Ray.",
)
@json_option
def run(file: Path, results: Path | None, resume: bool, address: str | None, as_json: bool) -> int:
    """Run the batch FILE: every variant with every case.

    \b
    Example: ray-envs run envs/sklearn-upgrade/batch.toml --resume
    Exit code: 0 if all items succeeded, 1 if some failed, another if none could start.
    """
    from ray_envs.client.code_folder import pack_code
    from ray_envs.client.entrypoints import check_entrypoint
    from ray_envs.client.inputs import read_batch, read_definition
    from ray_envs.client.results import results_file

    settings = Settings.from_environment()
    batch = read_batch(file)
    base = file.resolve().parent
    code = None if batch.code is None else base / batch.code
    check_entrypoint(batch, code)
    module = split_entrypoint(batch.entrypoint, where=str(file))[0].split(".")[0]
    if code is None and ((base / f"{module}.py").exists() or (base / module).is_dir()):
        raise InvalidInput(
            f"the module {module!r} is in the folder of the batch file, where workers do not look",
            where=str(file),
            hint='add: code = "."',
        )
    definitions = [
        read_definition(variant.env_spec(), base, where=f"variants[{number}]")
        for number, variant in enumerate(batch.variants)
    ]
    if code is not None:
        pack_code(code)  # it may be too large: say so before Ray starts
    path = results or Path(f"{batch.name}.results.jsonl")
    from ray_envs.cluster.connecting import embeds

    if embeds(address):  # this machine's root is used: fail now if it cannot be written
        from ray_envs.node.store import Store

        _check_policy(definitions, settings)
        Store(settings).set_up()
    with results_file(path, resume=resume) as (log, done):
        _tell_of_unknown(done, batch, path)
        ended = _run_batch(batch, base, code, settings, address, log, done)
    failed = [result for result in ended if not result.ok]
    if as_json:
        put_json(_summary(batch, ended, path))
    else:
        from ray_envs.cli.display import failures, rendered, results_table

        put(rendered(results_table(batch, ended)))
        for paragraph in failures(ended):
            complain(paragraph)
        say(f"ray-envs: results in {path}{', with full tracebacks' if failed else ''}")
    if not failed:
        return 0
    if any(result.attempts for result in ended):
        return _SOME_FAILED
    return _exit_code(failed[0])


def _check_policy(definitions: Sequence[Definition], settings: Settings) -> None:
    """Raise the first error if this machine's settings allow none of the variants.

    If they allow some, those run.
    """
    from ray_envs.decisions.policy import check_definition

    errors: list[RayEnvsError] = []
    for number, definition in enumerate(definitions):
        try:
            check_definition(definition, settings, where=f"variants[{number}]")
        except RayEnvsError as exc:
            errors.append(exc)
    if len(errors) == len(definitions):
        raise errors[0]


def _tell_of_unknown(done: Sequence[ItemResult], batch: BatchSpec, path: Path) -> None:
    """Say which earlier results belong to no item of the batch."""
    variants = {variant.id for variant in batch.variants}
    cases = {case.id for case in batch.cases}
    unknown = [r for r in done if r.variant_id not in variants or r.case_id not in cases]
    if unknown:
        first = f"variant {unknown[0].variant_id!r}, case {unknown[0].case_id!r}"
        say(
            f"ray-envs: {len(unknown)} of {len(done)} results in {path} are of no item of this "
            f"batch and are ignored; the first: {first}"
        )


def _summary(batch: BatchSpec, ended: Sequence[ItemResult], path: Path) -> dict[str, Any]:
    return {
        "name": batch.name,
        "total": len(ended),
        "ok": sum(result.ok for result in ended),
        "failed": sum(not result.ok for result in ended),
        "results_file": str(path),
        "results": [result.model_dump(mode="json") for result in ended],
    }


def _exit_code(result: ItemResult) -> int:
    from ray_envs.errors import all_errors

    codes = {cls.__name__: cls.exit_code for cls in all_errors()}
    return codes.get(result.error.type if result.error else "", _SOME_FAILED)


def _run_batch(
    batch: BatchSpec,
    base: Path,
    code: Path | None,
    settings: Settings,
    address: str | None,
    log: IO[bytes],
    done: Sequence[ItemResult],
) -> list[ItemResult]:
    from ray_envs.cli.display import RunDisplay
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.client.results import append_result
    from ray_envs.client.runner import RayBatchRunner

    kept = {id(result) for result in done}
    ended: list[ItemResult] = []
    # Ray prints the output of workers to stdout, which is for data only.
    with contextlib.redirect_stdout(sys.stderr), RunDisplay(batch) as display:
        for variant in batch.variants:
            display.variant(variant.id, "waiting for Ray")
        try:
            with RayEnvironmentProvider.connect(address, settings=settings) as provider:
                keys, failed = _create_all(batch, base, provider, display)
                runner = RayBatchRunner(provider)
                for result in runner.run_batch(
                    batch,
                    code=code,
                    done=done,
                    keys=keys,
                    failed=failed,
                    on_status=display.statuses,
                ):
                    ended.append(result)
                    if id(result) not in kept:
                        append_result(log, result)
                    display.item(result, runner.progress(), is_earlier=id(result) in kept)
        except KeyboardInterrupt:
            total = len(batch.variants) * len(batch.cases)
            raise KeyboardInterrupt(
                f"interrupted: {len(ended)} of {total} items ended; --resume runs the others"
            ) from None
    return ended


def _create_all(
    batch: BatchSpec, base: Path, provider: RayEnvironmentProvider, display: RunDisplay
) -> tuple[dict[str, str], dict[str, RayEnvsError]]:
    """Define all variants of the batch at the same time.

    Returns the keys of those that were created, and the errors of the others.
    """

    def create(variant: Any) -> str | RayEnvsError:
        name = f"{batch.name}/{variant.id}"
        display.variant(variant.id, "locking")
        try:
            status = provider.create(name, variant.env_spec(), replace=True, base=base)
        except _OF_ONE_VARIANT as exc:
            display.variant(variant.id, "failed", exc.message)
            return exc
        return str(status["key"])

    creating = [in_background(create, variant) for variant in batch.variants]
    made = {v.id: future.result() for v, future in zip(batch.variants, creating, strict=True)}
    return (
        {name: key for name, key in made.items() if isinstance(key, str)},
        {name: error for name, error in made.items() if isinstance(error, RayEnvsError)},
    )
