"""`ray-envs`: the command line. Data on stdout, people's text on stderr, exit codes from `errors`.

Each command reads its input completely before it changes anything. Reads (`list`, `status`) use
the disk and never Ray, so heavy modules are imported by the commands that need them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as futures_wait
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from ray_envs.errors import (
    EnvironmentNotReady,
    InvalidId,
    InvalidInput,
    InvalidPackages,
    NotFound,
    RayEnvsError,
    ResolutionFailed,
    StorageFailed,
    UvFailed,
)
from ray_envs.models import EnvId, EnvSpec, ItemResult, Status, split_entrypoint, validated
from ray_envs.settings import Settings

if TYPE_CHECKING:
    from ray_envs.display import RunDisplay
    from ray_envs.models import BatchSpec
    from ray_envs.provider import RayEnvironmentProvider
    from ray_envs.registry import Registry
    from ray_envs.store import Store

T = TypeVar("T")

_INTERRUPTED = 130
_SOME_FAILED = 1
#: How often `create` looks how its build goes.
_LOOK_S = 0.1

#: What keeps one variant from being created while the others run.
_OF_ONE_VARIANT = (ResolutionFailed, UvFailed, InvalidInput, InvalidPackages, InvalidId)


def main() -> None:
    """The entry point: every error of ours in plain words, with its exit code."""
    signal.signal(signal.SIGINT, _interrupted_once)
    warnings.showwarning = lambda message, *_args, **_kwargs: _complain(f"warning: {message}")
    try:
        code = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as exc:
        _complain(str(exc.__cause__ or exc) or "interrupted")  # click wraps it
        code = _INTERRUPTED
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except RayEnvsError as exc:
        _complain(str(exc))
        code = exc.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _print(text: str) -> None:
    """Data for stdout; a reader that has seen enough is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted_once(_signal: int, _frame: object) -> None:
    """The first Ctrl-C ends the command; a second must not end the end: processes would stay."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _complain(text: str) -> None:
    first, *rest = text.splitlines() or [""]
    print(f"ray-envs: {first}", *(f"  {line}" for line in rest), sep="\n", file=sys.stderr)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ray-envs")
def cli() -> None:
    """Locked uv environments for Ray tasks, prepared ahead on every node.

    \b
    Example: ray-envs run envs/sklearn-upgrade/batch.toml

    Settings are RAY_ENVS_* variables; RAY_ENVS_ROOT is where environments live.
    """


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


# -- run ----------------------------------------------------------------------------------------


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="The JSONL file; by default <name>.results.jsonl in this folder.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Skip what the results file has already for the same environment and arguments.",
)
@click.option(
    "--address",
    help="A Ray cluster; by default RAY_ADDRESS, one on this machine, or a local Ray.",
)
@_json
def run(file: Path, results: Path | None, resume: bool, address: str | None, as_json: bool) -> int:
    """Run the batch FILE: every variant with every case.

    \b
    Example: ray-envs run envs/sklearn-upgrade/batch.toml --resume
    Exit code: 0 all items succeeded, 1 some failed, others: nothing could run.
    """
    from ray_envs.code import check_entrypoint
    from ray_envs.inputs import read_batch, read_definition

    settings = Settings.from_environment()
    batch = read_batch(file)
    base = file.resolve().parent
    code = None if batch.code is None else base / batch.code
    check_entrypoint(batch, code)
    module = split_entrypoint(batch.entrypoint, where=str(file))[0].split(".")[0]
    if code is None and ((base / f"{module}.py").exists() or (base / module).is_dir()):
        raise InvalidInput(
            f"the module {module!r} lies beside the batch file, but workers do not see it",
            where=str(file),
            hint='add: code = "."',
        )
    for number, variant in enumerate(batch.variants):
        read_definition(variant.env_spec(), base, where=f"variants[{number}]")
    path = results or Path(f"{batch.name}.results.jsonl")
    from ray_envs.cluster import embeds

    if embeds(address):  # the root is this machine's: say now that it cannot be used
        from ray_envs.store import Store

        Store(settings).set_up()
    with _results_file(path, resume=resume) as (log, done):
        ended = _run_batch(batch, base, code, settings, address, log, done)
    failed = [result for result in ended if not result.ok]
    if as_json:
        _print(json.dumps(_summary(batch, ended, path), indent=1))
    else:
        from ray_envs.display import failures, rendered, results_table

        _print(rendered(results_table(batch, ended)))
        for paragraph in failures(ended):
            _complain(paragraph)
        print(f"ray-envs: results in {path}, with full tracebacks", file=sys.stderr)
    if not failed:
        return 0
    if any(result.attempts for result in ended):
        return _SOME_FAILED
    return _exit_code(failed[0])


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
    from ray_envs.batch import RayBatchRunner
    from ray_envs.display import RunDisplay
    from ray_envs.provider import RayEnvironmentProvider

    kept = {id(result) for result in done}
    ended: list[ItemResult] = []
    # Ray prints what workers print to our stdout; data alone belongs there.
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
                        _append(log, result)
                    display.item(result, runner.progress(), is_earlier=id(result) in kept)
        except KeyboardInterrupt:
            total = len(batch.variants) * len(batch.cases)
            raise KeyboardInterrupt(
                f"interrupted: {len(ended)} of {total} items ended; go on with --resume"
            ) from None
    return ended


def _create_all(
    batch: BatchSpec, base: Path, provider: RayEnvironmentProvider, display: RunDisplay
) -> tuple[dict[str, str], dict[str, RayEnvsError]]:
    """Define every variant of the batch at once.

    Returns the key of each variant, and the reason for each that cannot be created.
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

    creating = [_in_background(create, variant) for variant in batch.variants]
    made = {v.id: future.result() for v, future in zip(batch.variants, creating, strict=True)}
    return (
        {name: key for name, key in made.items() if isinstance(key, str)},
        {name: error for name, error in made.items() if isinstance(error, RayEnvsError)},
    )


def _append(log: IO[bytes], result: ItemResult) -> None:
    """One line more in the results file; ASCII, so that no text of a payload can break it."""
    line = json.dumps(result.model_dump(mode="json")).encode()
    try:
        log.write(line + b"\n")
        log.flush()
    except OSError as exc:
        raise StorageFailed(
            f"cannot write results to {log.name}: {exc.strerror}",
            hint="free space there, then go on with --resume",
        ) from exc


@contextlib.contextmanager
def _results_file(path: Path, *, resume: bool) -> Iterator[tuple[IO[bytes], list[ItemResult]]]:
    """The results file, open for appending, and what it holds already (with `resume`).

    Without `resume`, earlier results are kept once more as `<path>.previous`.
    """
    from ray_envs.files import kind_of, storage_errors
    from ray_envs.inputs import read_results

    if kind_of(path) not in ("file", "missing"):
        raise InvalidInput(f"{path} is not a file", hint="give a regular file with --results")
    done = read_results(path) if resume else []
    try:
        log = path.open("ab")
    except OSError as exc:
        raise InvalidInput(
            f"cannot write results to {path}: {exc.strerror}",
            hint="give another file with --results",
        ) from exc
    with log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"another run is writing to {path}", hint="give another file with --results"
            ) from None
        with storage_errors("keep the earlier results"):
            held = path.read_bytes()
            if resume:  # a run that was killed may have left half a line, or a whole one
                whole = held.rfind(b"\n") + 1
                if _is_result(held[whole:]):
                    log.write(b"\n")
                else:
                    log.truncate(whole)
            elif held:
                path.with_name(path.name + ".previous").write_bytes(held)
                log.truncate(0)
        try:
            yield log, done
        finally:
            if os.fstat(log.fileno()).st_size == 0:
                path.unlink(missing_ok=True)


def _is_result(line: bytes) -> bool:
    try:
        ItemResult.model_validate_json(line)
    except ValueError:
        return False
    return True


# -- variants ------------------------------------------------------------------------------------


@cli.command(name="list")
@_json
def list_variants(as_json: bool) -> None:
    """The variants that are defined under the root, and which of them are ready on this machine."""
    registry, store = _disk()
    damaged: list[StorageFailed] = []
    rows = [_described(record, registry, store) for record in registry.all(damaged=damaged)]
    if as_json:
        _print(json.dumps(rows, indent=1))
    elif rows:
        from ray_envs.display import rendered, variants_table

        _print(rendered(variants_table(rows)))
    else:
        print(f"no variants are defined under {store.root}", file=sys.stderr)
    if damaged:
        for other in damaged[1:]:
            _complain(str(other))
        raise damaged[0]


@cli.command()
@click.argument("variant")
@_json
def status(variant: str, as_json: bool) -> None:
    """What this machine's disk says of VARIANT: node, workflow/node or workflow/node/version."""
    registry, store = _disk()
    row = _described(_found(registry, variant), registry, store)
    if as_json:
        _print(json.dumps(row, indent=1))
        return
    for name, value in row.items():
        shown = "-" if value is None else value
        if name == "packages":
            shown = " ".join(f"{n}=={v}" for n, v in sorted(value.items()))
        _print(f"{name:16} {shown}")


@cli.command()
@click.argument("variant")
@click.argument("packages", nargs=-1)
@click.option("--project", help="A folder with pyproject.toml (and uv.lock).")
@click.option("--requirements", "-r", help="A requirements file.")
@click.option("--python", help="Must admit the cluster's interpreter.")
@click.option("--replace", is_flag=True, help="Make a new generation where the variant exists.")
@_json
def create(variant: str, packages: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Define VARIANT from PACKAGES, a project or a requirements file, and build it.

    \b
    Example: ray-envs create old 'scikit-learn==1.7.*'
    """
    replace = options.pop("replace")
    given = {name: value for name, value in options.items() if value is not None}
    spec = validated(EnvSpec, {"packages": packages, **given}, where="ray-envs create")
    name = str(EnvId.parse(variant))
    settings = Settings.from_environment()
    from ray_envs.provider import RayEnvironmentProvider

    with RayEnvironmentProvider.without_cluster(settings) as provider:
        # A failed build puts back what was before; meanwhile, this thread says how it goes.
        creating = _in_background(
            lambda: provider.create(
                name, spec, replace=replace, base=Path.cwd(), wait_s=settings.prepare_timeout_s
            )
        )
        say = _say_phase()
        while not creating.done():
            row = provider.status(name)
            if row["status"] == Status.CREATING.value:  # else: it is what was there before
                say({name: row})
            futures_wait([creating], timeout=_LOOK_S)
        row = creating.result()
        say({name: row})
    _print(json.dumps(row, indent=1) if as_json else row["python_path"])


@cli.command()
@click.argument("variant")
@_json
def delete(variant: str, as_json: bool) -> None:
    """Forget VARIANT. Its environment stays in the store for whoever runs in it."""
    registry, _ = _disk()
    try:
        name = str(_found(registry, variant).env_id)
    except StorageFailed:  # damaged: forgetting it is what helps
        name = str(EnvId.parse(variant))
    from ray_envs.provider import RayEnvironmentProvider

    with RayEnvironmentProvider.without_cluster(Settings.from_environment()) as provider:
        provider.delete(name)
    if as_json:
        _print(json.dumps({"variant_id": name, "deleted": True}))
    else:
        print(f"variant {name} is forgotten", file=sys.stderr)


@cli.command(
    name="exec",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("variant")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(variant: str, command: tuple[str, ...]) -> None:
    """Run COMMAND in the environment of VARIANT on this machine; builds it first if need be.

    \b
    Example: ray-envs exec old -- python -c 'import sklearn; print(sklearn.__version__)'
    """
    if command[0] == "--":
        command = command[1:]
    if not command:
        raise click.UsageError("Missing argument 'COMMAND...'.")
    registry, store = _disk()
    record = _found(registry, variant)
    key = record.current.key
    if store.record(key) is None:
        from ray_envs.provider import RayEnvironmentProvider

        with RayEnvironmentProvider.without_cluster(Settings.from_environment()) as provider:
            provider.prepare(str(record.env_id), on_status=_say_phase())
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


def _disk() -> tuple[Registry, Store]:
    from ray_envs.registry import Registry
    from ray_envs.store import Store

    settings = Settings.from_environment()
    return Registry(settings), Store(settings)


def _found(registry: Registry, variant: str) -> Any:
    env_id = EnvId.parse(variant)
    record = registry.get(env_id)
    if record is None:
        import difflib

        names = [str(r.env_id) for r in registry.all()]
        close = [name for name in names if name.split("/")[1:2] == [env_id.node_id]]
        close = close or difflib.get_close_matches(str(env_id), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`ray-envs list` shows the defined ones"
        raise NotFound(f"no variant {variant!r} is defined", variant_id=variant, hint=hint)
    return record


def _described(record: Any, registry: Registry, store: Store) -> dict[str, Any]:
    from ray_envs.registry import describe_record

    key = record.current.key
    ready = store.record(key)
    return {
        **describe_record(record, registry, store.venv(key)),
        "status": Status.ACTIVE.value if ready else "NOT_BUILT",
        "is_held": store.is_held(key) if ready else False,
        "how": ready.how if ready else None,
    }


def _in_background(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call `function` in a thread that an interrupted command does not wait for."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=call, daemon=True).start()
    return future


def _say_phase() -> Any:
    """A listener of `prepare` that says each new phase in a line."""
    said: set[tuple[str, str]] = set()

    def say(statuses: Mapping[str, Mapping[str, Any]]) -> None:
        for name, row in statuses.items():
            for state in row["nodes"].values():
                if (name, state["phase"]) not in said:
                    said.add((name, state["phase"]))
                    print(f"{name}: {state['phase']} {state['progress']}".rstrip(), file=sys.stderr)

    return say
