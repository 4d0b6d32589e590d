"""What commands share: printing, options, the disk, a provider, and waiting for what it does.

Data goes to stdout, people's text to stderr. Decides nothing. Heavy modules are imported by the
functions that need them: what only reads the disk must answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ray_envs.errors import InvalidPackages, NotFound, RayEnvsError
from ray_envs.models import EnvId, EnvSpec, Phase, Status
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.manager.registry import Registry
    from ray_envs.models import VariantRecord
    from ray_envs.node.store import Store

T = TypeVar("T")
Answer = dict[str, Any]

#: How often a command looks how its change goes.
_LOOK_S = 0.1

#: How much of a key people need to tell it from others.
KEY_SHOWN = 10


# -- printing ------------------------------------------------------------------------------------


def put(text: str) -> bool:
    """Data for stdout; False where nobody reads it any more, which is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def put_json(data: Any) -> None:
    put(json.dumps(data, indent=1))


def put_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON list with a row a line: thousands are written and searched quickly."""
    put("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]" if rows else "[]")


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """What is wrong, for people: the first line under our name, the others below it."""
    first, *rest = text.splitlines() or [""]
    say("\n".join([f"ray-envs: {first}", *(f"  {line}" for line in rest)]))


def columns(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: str = "") -> str:
    """A plain table: a line a row, whatever the width of the terminal, so that it can be searched.

    Args:
        header: the names of the columns.
        rows: their cells; None is shown as "-".
        right: the names of columns of numbers, separated by spaces.
    """
    cells = [[name.upper() for name in header]]
    cells += [["-" if c is None else " ".join(str(c).split()) or "-" for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numbers = {header.index(name) for name in right.split()}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at in numbers else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def put_fields(fields: Mapping[str, Any]) -> None:
    """One field a line: its name and its value."""
    for name, value in fields.items():
        text = str(value)
        if isinstance(value, Mapping):
            text = " ".join(f"{key}={value[key]}" for key in sorted(value))
        elif isinstance(value, list | tuple):
            text = " ".join(map(str, value))
        put(f"{name:16} {'-' if value is None else text or '-'}")


def put_diff(diff: Mapping[str, Any]) -> None:
    """A line for each package that differs: `+` added, `-` removed, `~` changed."""
    lines = [(name, f"+ {name} {version}") for name, version in diff["added"].items()]
    lines += [(name, f"- {name} {version}") for name, version in diff["removed"].items()]
    lines += [(name, f"~ {name} {old} -> {new}") for name, (old, new) in diff["changed"].items()]
    for _, line in sorted(lines):
        put(line)


def put_change(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """What a change of a variant did, or with `dry_run` would do."""
    if as_json:
        put_json(answer)
        return
    put_diff(answer["diff"])
    put(f"generation {answer['generation']}, environment {answer['key']}")
    if not answer["is_changed"]:
        say("nothing is to be changed" if answer["dry_run"] else "nothing was changed")
    elif answer["dry_run"]:
        say("a dry run: nothing was changed")


def mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


# -- options -------------------------------------------------------------------------------------


class Variant(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """A variant's address; the shell completes it to those that are defined."""

    name = "variant"

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        with contextlib.suppress(RayEnvsError):
            from ray_envs.manager.registry import Registry

            names = defined(Registry(Settings.from_environment()))
            return [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return []


class Hours(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.2
    """A number of hours that is not negative."""

    name = "hours"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            hours = float(value)
        except ValueError:
            hours = -1.0
        if not 0 <= hours < float("inf"):
            self.fail(f"{value!r} is no number of hours, such as 72 or 0.5", param, ctx)
        return hours


variant_argument = click.argument("variant", type=Variant())
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


def requirements(packages: Iterable[str], file: str | None) -> list[str]:
    """The requirements of a command's words and of its requirements file.

    Raises:
        InvalidInput: the file cannot be read.
        InvalidPackages: one cannot be accepted, or there is none.
    """
    from ray_envs.client.inputs import read_definition
    from ray_envs.decisions.requirements import requirement_lines

    lines = requirement_lines(packages, where="PACKAGE")
    if file is not None:
        lines += read_definition(EnvSpec(requirements=file), Path.cwd()).packages
    if not lines:
        raise InvalidPackages("no packages are given", hint="name at least one, or give -r FILE")
    return list(lines)


# -- the disk ------------------------------------------------------------------------------------


def disk() -> tuple[Registry, Store]:
    """The definitions and the environments of this machine's root."""
    from ray_envs.manager.registry import Registry
    from ray_envs.node.store import Store

    settings = Settings.from_environment()
    return Registry(settings), Store(settings)


def defined(registry: Registry) -> list[str]:
    """The names of all variants, from those of their folders: no file is opened."""
    names = []
    for folder in registry.stamps():
        # `EnvId.folder` the other way round: `%` cannot be in an id.
        parts = [part.replace("%5F", "_") for part in folder.split("_")]
        with contextlib.suppress(RayEnvsError):  # a folder that is none of ours
            names.append(str(EnvId.parse("/".join(parts))))
    return sorted(names)


def found(registry: Registry, variant: str) -> VariantRecord:
    """The definition of a variant.

    Raises:
        InvalidId: that cannot be the name of one.
        NotFound: it is not defined; the nearest one is named.
        StorageFailed: it cannot be read.
    """
    env_id = EnvId.parse(variant)
    record = registry.get(env_id)
    if record is None:
        names = defined(registry)
        close = [name for name in names if name.split("/")[1:2] == [env_id.node_id]]
        close = close or difflib.get_close_matches(str(env_id), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`ray-envs list` shows the defined ones"
        raise NotFound(f"no variant {variant!r} is defined", variant_id=variant, hint=hint)
    return record


def address(variant: str) -> str:
    """The full name of a variant that is defined; see `found`."""
    return str(found(disk()[0], variant).env_id)


# -- changes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened() -> Iterator[RayEnvironmentProvider]:
    """A provider of this machine's root: through its manager where one lives, else without Ray.

    Ctrl-C undoes what is done in this process. A manager's actor goes on: that is said.
    """
    from ray_envs.client.provider import RayEnvironmentProvider
    from ray_envs.manager import presence

    settings = Settings.from_environment()
    has_manager = presence.address_of(settings.root) is not None
    with RayEnvironmentProvider.without_cluster(settings) as provider:
        try:
            yield provider
        except KeyboardInterrupt:
            if has_manager:
                raise KeyboardInterrupt(
                    "interrupted; the manager of this root may go on: see `ray-envs operations`"
                ) from None
            raise


def in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call `function` in a thread that an interrupted command does not wait for."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future


def patiently(function: Callable[[], T]) -> T:
    """What `function` gives; Ctrl-C ends the wait at once, whatever it does."""
    future = in_background(function)
    while not future.done():
        futures_wait([future], timeout=_LOOK_S)
    return future.result()


def watched(provider: RayEnvironmentProvider, name: str, change: Callable[[], Answer]) -> Answer:
    """What `change`, of the variant `name`, answers; meanwhile its new phases are said."""
    phases = Phases()
    future = in_background(change)
    while not future.done():
        with contextlib.suppress(RayEnvsError):  # what is wrong, the change itself tells
            phases.tell(name, provider.status(name))
        futures_wait([future], timeout=_LOOK_S)
    answer = future.result()
    if not answer.get("dry_run") and answer.get("is_changed", True):
        phases.tell(name, answer, is_done=True)
    return answer


class Phases:
    """Says in a line, once, what is being done about environments."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str, str]] = set()

    def tell(self, name: str, status: Mapping[str, Any], *, is_done: bool = False) -> None:
        """Say what `status` has that is new; of one that is not being changed, only when done."""
        change = status.get("change")
        if change:  # it runs as it is, and the next generation is being prepared
            self._say(name, change["key"], change["nodes"])
        elif is_done or status["status"] == Status.CREATING.value:
            self._say(name, status.get("key", ""), status["nodes"])

    def _say(self, name: str, key: str, nodes: Mapping[str, Any]) -> None:
        for state in nodes.values():
            phase = state["phase"]
            if (name, key, phase) not in self._said and phase != Phase.FAILED.value:
                self._said.add((name, key, phase))
                say(f"{name}: {phase} {state.get('progress', '')}".rstrip())
