"""The entry point of `ray-envs`: all commands, completion, errors and exit codes."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from typing import Any

import click
from click.shell_completion import get_completion_class

from ray_envs.cli import (
    cluster,
    definitions,
    execute,
    exports,
    history,
    packages,
    reads,
    run,
    upkeep,
)
from ray_envs.cli.printing import complain, put
from ray_envs.cli.waiting import INTERRUPTED
from ray_envs.errors import RayEnvsError

#: The variable that makes click print completions.
_COMPLETE = "_RAY_ENVS_COMPLETE"
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
    """Lists the commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            raise _Interrupted(str(exc)) from None


def main() -> None:
    """Run the command line. Prints each `RayEnvsError` and exits with its code."""
    signal.signal(signal.SIGINT, _interrupted_once)
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


for command in (
    run.run,
    cluster.up,
    cluster.down,
    cluster.runtime_env,
    definitions.create,
    reads.list_variants,
    reads.status,
    packages.sync,
    packages.add,
    packages.update,
    packages.remove,
    reads.deps,
    reads.generations,
    reads.diff,
    packages.rollback,
    exports.export,
    exports.import_project,
    execute.execute,
    definitions.pin,
    definitions.delete,
    upkeep.gc,
    history.operations,
    history.events,
    upkeep.explain,
    upkeep.doctor,
    completion,
):
    cli.add_command(command)
