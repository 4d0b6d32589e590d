"""`ray-envs`: the command line. Data on stdout, people's text on stderr, exit codes from `errors`.

Only the way in and out: what the commands do is in `cli_run`, `cli_cluster`, `cli_variants`,
`cli_reads` and `cli_history`. Each reads its input completely before it changes anything.
"""

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
from ray_envs.errors import RayEnvsError

_INTERRUPTED = 130

#: click gives its completion where this variable says for which shell.
_COMPLETE = "_RAY_ENVS_COMPLETE"
#: How people switch completion on, for good.
_INSTALL = {
    "bash": "ray-envs completion bash > ~/.ray-envs-completion.bash\n"
    "# echo '. ~/.ray-envs-completion.bash' >> ~/.bashrc",
    "zsh": "ray-envs completion zsh > ~/.ray-envs-completion.zsh\n"
    "# echo '. ~/.ray-envs-completion.zsh' >> ~/.zshrc   # after compinit",
    "fish": "ray-envs completion fish > ~/.config/fish/completions/ray-envs.fish",
}


class _Notes(logging.Handler):
    """What the package logs, as a line for people."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"note: {record.getMessage()}")


class _Interrupted(Exception):
    """Ctrl-C, past click, which would print an empty line for it and forget what was said."""


class _Commands(click.Group):
    """Our commands; the help lists them as they were added: in the order of a variant's life."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            raise _Interrupted(str(exc)) from None


def main() -> None:
    """The entry point: every error of ours in plain words, with its exit code."""
    signal.signal(signal.SIGINT, _interrupted_once)
    logging.getLogger("ray_envs").addHandler(_Notes())
    warnings.showwarning = lambda message, *_args, **_kwargs: complain(f"warning: {message}")
    try:
        code = cli.main(standalone_mode=False)
    except (_Interrupted, click.exceptions.Abort, KeyboardInterrupt) as exc:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the terminal shows ^C where the cursor is
        complain(str(exc) or "interrupted")
        code = _INTERRUPTED
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except RayEnvsError as exc:
        complain(str(exc))
        code = exc.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _interrupted_once(_signal: int, _frame: object) -> None:
    """The first Ctrl-C ends the command; a second must not end the end: processes would stay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="ray-envs")
def cli() -> None:
    """Locked uv environments for Ray tasks, prepared ahead on every node.

    \b
    Example: ray-envs run envs/sklearn-upgrade/batch.toml

    VARIANT is node, workflow/node or workflow/node/version. Settings are RAY_ENVS_* variables;
    RAY_ENVS_ROOT is where environments live.
    """


@click.command()
@click.argument("shell", type=click.Choice(sorted(_INSTALL)))
def completion(shell: str) -> None:
    """Print the script that completes commands and variants in SHELL.

    \b
    Example: ray-envs completion bash > ~/.ray-envs-completion.bash
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    put(kind(cli, {}, "ray-envs", _COMPLETE).source())
    put(f"# To install it, for good:\n# {_INSTALL[shell]}")  # zsh wants its own first line first


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
