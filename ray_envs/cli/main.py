"""The entry point of `ray-envs`: all commands, completion, errors and exit codes."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click
from click.shell_completion import get_completion_class

from ray_envs.cli.printing import complain, put
from ray_envs.cli.waiting import INTERRUPTED
from ray_envs.errors import ClusterLost, RayEnvsError

#: The variable that makes click print completions.
_COMPLETE = "_RAY_ENVS_COMPLETE"
#: The commands by module, in the order of `--help`.
_MODULES = {
    "run": ("run",),
    "cluster": ("up", "down", "runtime-env"),
    "definitions": ("create", "pin", "delete"),
    "reads": ("list", "status", "deps", "generations", "diff"),
    "packages": ("add", "update", "remove", "rollback", "sync"),
    "exports": ("export", "import"),
    "execute": ("exec",),
    "upkeep": ("gc", "explain", "doctor"),
    "history": ("operations", "events"),
}
#: How users install completion.
_INSTALL = {
    "bash": "ray-envs completion bash > ~/.ray-envs-completion.bash\n"
    "# echo '. ~/.ray-envs-completion.bash' >> ~/.bashrc",
    "zsh": "ray-envs completion zsh > ~/.ray-envs-completion.zsh\n"
    "# echo '. ~/.ray-envs-completion.zsh' >> ~/.zshrc   # after compinit",
    "fish": "ray-envs completion fish > ~/.config/fish/completions/ray-envs.fish",
}


class _Notes(logging.Handler):
    """Prints what the package logs."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"note: {record.getMessage()}")


class _Interrupted(Exception):
    """Replaces KeyboardInterrupt, whose message click drops."""


class _Commands(click.Group):
    """The commands of `_MODULES`, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return [*(name for names in _MODULES.values() for name in names), *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for module, names in _MODULES.items():
            if cmd_name in names:
                found = vars(import_module(f"ray_envs.cli.{module}")).values()
                return next(c for c in found if isinstance(c, click.Command) and c.name == cmd_name)
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as exc:
            close = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(exc.message + hint, ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            raise _Interrupted(str(exc)) from None


def main() -> None:
    """Run the command line. Prints each `RayEnvsError` and exits with its code."""
    signal.signal(signal.SIGINT, _interrupted_once)
    for stream in (sys.stdout, sys.stderr):  # a terminal may know few characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    logging.getLogger("ray_envs").addHandler(_Notes())
    warnings.showwarning = lambda message, *_args, **_kwargs: complain(f"warning: {message}")
    try:
        code = cli.main(standalone_mode=False)
    except (_Interrupted, click.exceptions.Abort, KeyboardInterrupt) as exc:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal shows ^C where the cursor is
        complain(str(exc) or "interrupted")
        code = INTERRUPTED
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except ClusterLost as exc:
        complain(str(exc))
        sys.stdout.flush()
        os._exit(exc.exit_code)  # at the end of a process, Ray would wait for its cluster
    except RayEnvsError as exc:
        complain(str(exc))
        code = exc.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _interrupted_once(_signal: int, _frame: object) -> None:
    """End the command. A second Ctrl-C is ignored: it would leave child processes behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="ray-envs")
def cli() -> None:
    """Locked uv environments for Ray tasks, ready on every node before the tasks start.

    \b
    Example: ray-envs run envs/sklearn-upgrade/batch.toml

    VARIANT is node, workflow/node or workflow/node/version. Settings are RAY_ENVS_* variables.
    RAY_ENVS_ROOT is the folder of the environments.
    """


@click.command()
@click.argument("shell", type=click.Choice(sorted(_INSTALL)))
def completion(shell: str) -> None:
    """Print the script for completion in SHELL.

    \b
    Example: ray-envs completion bash > ~/.ray-envs-completion.bash
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    put(kind(cli, {}, "ray-envs", _COMPLETE).source())
    put(f"# To install it:\n# {_INSTALL[shell]}")  # last: the first line must be that of zsh


cli.add_command(completion)
