"""`exec`: runs a command in the environment of a variant."""

from __future__ import annotations

import os

import click

from ray_envs.cli.arguments import disk, record_of, variant_argument
from ray_envs.cli.waiting import Phases, open_provider, wait_for
from ray_envs.errors import EnvironmentNotReady, InvalidInput


@click.command(
    name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@variant_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(variant: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in the environment of VARIANT on this machine.

    Builds the environment first if it is missing. Exits with the exit code of COMMAND.

    \b
    Example: ray-envs exec old -- python -c 'import sklearn; print(sklearn.__version__)'
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    registry, store = disk()
    record = record_of(registry, variant)
    key = record.current.key
    if store.record(key) is None:
        name = str(record.env_id)
        with open_provider() as provider:
            wait_for(lambda: provider.prepare(name, on_status=Phases().tell_all))
        record = record_of(registry, variant)  # `prepare` may have made a new generation
        key = record.current.key
        if store.record(key) is None:
            raise EnvironmentNotReady(f"the environment {key} is not on this machine", key=key)
    store.open_hold(key)  # inherited by the command, which so holds its environment
    venv = store.venv(key)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    environ.update(record.definition.env_vars, VIRTUAL_ENV=str(venv))
    environ["PATH"] = f"{venv / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        os.environ["PATH"] = environ["PATH"]  # execvpe looks for the command in this PATH
        os.execvpe(command[0], list(command), environ)  # noqa: S606 - no shell is needed
    except OSError as exc:
        raise InvalidInput(
            f"cannot run {command[0]!r} in variant {variant}: {exc.strerror}",
            hint="the command must be in the environment or on PATH",
        ) from exc
